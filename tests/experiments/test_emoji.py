"""The emoji data set: deterministic images that match their captions, and the command."""

import hashlib
import re

import numpy as np
import pytest
from PIL import Image

from experiments.emoji import dataset
from sprint_jax.data import captioned, sources
from sprint_jax.errors import UserError

SIZE = 64


def test_candidates_are_the_same_under_every_python():
    """Python learns new names, and Unicode never changes old ones.

    A change here changes the data of each seed.
    """
    listed = dataset.candidates()
    names = [name for _, name in listed]
    assert len(set(names)) == len(names)
    assert "grinning face" in names
    assert "unicorn face" in names
    unwanted = re.compile(
        "modifier|component|regional|keycap|variation|^two |^three |^grapes$|^eyes$"
    )
    assert not any(unwanted.search(name) for name in names)
    digest = hashlib.sha256(repr(listed).encode()).hexdigest()
    assert (len(listed), digest[:16]) == (1218, "f09f360b66d2676d")


@pytest.mark.parametrize(
    "name, one, several",
    [
        ("grinning face", "a grinning face", "grinning faces"),
        ("face with tears of joy", "a face with tears of joy", "faces with tears of joy"),
        ("alien monster", "an alien monster", "alien monsters"),
        ("unicorn face", "a unicorn face", "unicorn faces"),
        ("x-ray", "an x-ray", "x-rays"),
        ("cherry blossom", "a cherry blossom", "cherry blossoms"),
        ("butterfly", "a butterfly", "butterflies"),
        ("turkey", "a turkey", "turkeys"),
        ("cactus", "a cactus", "cactuses"),
        ("snowman", "a snowman", "snowmen"),
        ("older woman", "an older woman", "older women"),
        ("fish", "a fish", "fish"),
        ("peach", "a peach", "peaches"),
    ],
)
def test_words(name, one, several):
    assert f"{dataset.article(name)} {name}" == one and dataset.plural(name) == several


def test_a_missing_font_names_the_package_and_the_flag(tmp_path):
    with pytest.raises(UserError, match="absent.ttf.*fonts-noto-color-emoji.*--font"):
        dataset.Glyphs(tmp_path / "absent.ttf")
    (tmp_path / "garbage.ttf").write_bytes(b"garbage")
    with pytest.raises(UserError, match="garbage.ttf.*--font.*fonts-noto-color-emoji"):
        dataset.Glyphs(tmp_path / "garbage.ttf")


def test_missing_glyphs_are_not_emoji():
    """An outline font with a few dozen emoji draws a box for all others."""
    matplotlib = pytest.importorskip("matplotlib")
    few = dataset.Glyphs(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf")
    drawn = {few.image(name).tobytes() for name in few.names}
    assert 2 <= len(few.names) < 200 and len(drawn) == len(few.names)


@pytest.fixture(scope="module")
def font():
    """Return the emoji font; skip the test without one."""
    try:
        return dataset.Glyphs()
    except UserError as error:
        pytest.skip(str(error))


def examples(font, count, seed=0, size=SIZE):
    """Return examples of the data set."""
    return [dataset.example(font, seed, i, size) for i in range(count)]


@pytest.fixture(scope="module")
def default_examples(font):
    """Return examples at the default size."""
    return examples(font, 600)


def test_glyphs_are_what_the_font_draws(font):
    assert len(font.names) > 1000
    assert "black droplet" not in font.names  # has a name and is not in this font
    face = font.image("grinning face")
    assert face.dtype == np.uint8
    assert face.shape[2] == 4
    assert min(face.shape[:2]) > 90
    assert face[0, :, 3].any()
    assert face[-1, :, 3].any()
    assert face[:, 0, 3].any()
    assert face[:, -1, 3].any()
    middle = face[face.shape[0] // 2 - 20, face.shape[1] // 2, :3].astype(int)
    assert middle[0] > 200
    assert middle[1] > 150
    assert middle[2] < 130  # yellow: a color glyph, not a black outline
    assert font.image("grinning face") is face
    for name in font.names[::100]:
        assert font.image(name)[..., 3].max() > 200, name


def test_examples_are_pure_and_differ(font, default_examples):
    for index in (0, 7, 599):
        image, caption = dataset.example(font, 0, index, SIZE)
        np.testing.assert_array_equal(image, default_examples[index][0])
        assert caption == default_examples[index][1]
        assert image.shape == (SIZE, SIZE, 3)
        assert image.dtype == np.uint8
    assert len({image.tobytes() for image, _ in default_examples}) == len(default_examples)
    assert [c for _, c in examples(font, 5, seed=1)] != [c for _, c in default_examples[:5]]
    again = dataset.Glyphs()
    np.testing.assert_array_equal(dataset.example(again, 0, 3, SIZE)[0], default_examples[3][0])


def test_size_changes_the_scale_alone(font, default_examples):
    for index in range(20):
        large, caption = dataset.example(font, 0, index, 2 * SIZE)
        assert caption == default_examples[index][1]
        halved = large.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3))
        assert np.abs(halved - default_examples[index][0]).mean() < 12, index


def caption_pattern(font):
    """Return the pattern of all captions."""
    one = "|".join(re.escape(f"{dataset.article(n)} {n}") for n in font.names)
    several = "|".join(re.escape(dataset.plural(n)) for n in font.names)
    color = "|".join(dataset.COLORS)
    ground = (
        f" on an? (?:(?:{color}) background|(?:{color}) to (?:{color}) gradient background"
        f"|(?:striped|dotted|checked) (?:{color}) background)"
    )
    relation = "|".join(dataset.RELATIONS)
    return re.compile(
        f"(?:(?P<first>{one})(?: (?P<relation>{relation}) (?P<second>{one}))?"
        f"|(?P<number>two|three) (?P<several>{several}))(?P<ground>{ground})?"
    )


def test_captions_follow_the_grammar(font, default_examples):
    pattern = caption_pattern(font)
    read = [pattern.fullmatch(caption) for _, caption in default_examples]
    assert all(read), [
        caption for (_, caption), match in zip(default_examples, read, strict=True) if not match
    ][:5]
    assert not any(
        re.search(r"\ba (?!european |one)[aeio]|\ban (?!x-ray)[^aeiou]", caption)
        for _, caption in default_examples
    )
    share = lambda has: np.mean([bool(has(match)) for match in read])
    assert 0.5 < share(lambda m: m["first"] and not m["second"]) < 0.7
    assert 0.12 < share(lambda m: m["relation"]) < 0.28
    assert 0.12 < share(lambda m: m["number"]) < 0.28
    assert 0.42 < share(lambda m: m["ground"]) < 0.58
    assert {m["relation"] for m in read} == {*dataset.RELATIONS, None}
    assert {m["number"] for m in read} == {"two", "three", None}
    grounds = " ".join(m["ground"] or "" for m in read)
    assert all(word in grounds for word in (*dataset.PATTERNS, "gradient"))


def without_glyphs(font, index, monkeypatch):
    """Return the same example with nothing drawn on its background."""
    with monkeypatch.context() as patched:
        patched.setattr(dataset, "_paste", lambda *_: None)
        return dataset.example(font, 0, index, SIZE)[0]


def test_the_background_is_the_named_color(font, default_examples, monkeypatch):
    plain = re.compile(" on an? (" + "|".join(dataset.COLORS) + ") background$")
    patterned = re.compile(
        " on an? (striped|dotted|checked) (" + "|".join(dataset.COLORS) + ") background$"
    )
    gradient = re.compile(" on an? ([a-z ]+) to ([a-z ]+) gradient background$")
    seen = set()
    for index, (_, caption) in enumerate(default_examples):
        ground = without_glyphs(font, index, monkeypatch).astype(int)
        shades = len(np.unique(ground.reshape(-1, 3), axis=0))
        if match := plain.search(caption):
            assert (ground == dataset.COLORS[match[1]]).all()
            seen.add("plain")
        elif match := patterned.search(caption):
            assert shades == 2
            assert (ground == dataset.COLORS[match[2]]).all(-1).mean() > 0.4
            seen.add(match[1])
        elif match := gradient.search(caption):
            corners = ground[0, 0], ground[-1, -1]
            assert match[1] != match[2]
            for corner, color in zip(corners, match.groups(), strict=True):
                assert np.abs(corner - dataset.COLORS[color]).max() < 8
            seen.add("gradient")
    assert seen == {"plain", "gradient", *dataset.PATTERNS}


def drawn_regions(font, index, monkeypatch):
    """Return [(name, mask [S, S])] of what is drawn.

    Each mask is from the example drawn with all glyphs but one left out.
    """
    put, drawn = dataset._paste, []
    names = {id(font.image(name)): name for name in font.names}

    def alone(ground, glyph, *place):
        blank = np.zeros((SIZE, SIZE, 3))
        put(blank, np.concatenate([np.full_like(glyph[..., :3], 255), glyph[..., 3:]], -1), *place)
        drawn.append((names[id(glyph)], blank[..., 0] > 64))

    with monkeypatch.context() as patched:
        patched.setattr(dataset, "_paste", alone)
        dataset.example(font, 0, index, SIZE)
    return drawn


def test_images_show_what_the_caption_says(font, default_examples, monkeypatch):
    """Check number, names and sides.

    Pixels which differ from the background belong to glyphs.
    """
    pattern, relations = caption_pattern(font), set()
    for index, (image, caption) in enumerate(default_examples[:200]):
        match, drawn = pattern.fullmatch(caption), drawn_regions(font, index, monkeypatch)
        assert all(mask.sum() > 0.01 * SIZE**2 for _, mask in drawn), caption
        changed = (image != without_glyphs(font, index, monkeypatch)).any(-1)
        shown = np.any([mask for _, mask in drawn], 0)
        assert (changed & shown).sum() > 0.3 * shown.sum(), caption
        centers = [np.argwhere(mask).mean(0) for _, mask in drawn]
        overlap = np.sum([mask for _, mask in drawn], 0).max()
        if match["number"]:
            assert len(drawn) == dataset.NUMBERS[match["number"]] and overlap == 1
            assert {dataset.plural(name) for name, _ in drawn} == {match["several"]}
        elif match["relation"]:
            (first, _), (second, _) = drawn
            assert overlap == 1
            assert match["first"].endswith(first)
            assert match["second"].endswith(second)
            (y0, x0), (y1, x1) = centers
            along = {"left of": x1 - x0, "right of": x0 - x1, "above": y1 - y0, "below": y0 - y1}[
                match["relation"]
            ]
            across = y1 - y0 if match["relation"] in ("left of", "right of") else x1 - x0
            assert along > 0.3 * SIZE and abs(across) < 0.2 * SIZE, caption
            relations.add(match["relation"])
        else:
            assert len(drawn) == 1 and match["first"].endswith(drawn[0][0])
    assert relations == set(dataset.RELATIONS)


def test_the_data_set_can_be_read(font, tmp_path):
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    dataset.Emoji(font=font, seed=5, size=SIZE, count=12, data_dir=tmp_path).download_and_prepare()
    source = sources.open_source(tmp_path / "emoji/1.0.0")
    assert len(source) == 12
    for index in range(12):
        image, caption = dataset.example(font, 5, index, SIZE)
        example = source[index]
        np.testing.assert_array_equal(captioned.decode_image(example.image), image)
        assert example.caption == caption


def test_the_command(font, tmp_path, command):
    target = tmp_path / "data"
    flags = (f"--to_dir={target}", "--count=70", "--data_seed=5")
    first = command("experiments.emoji", *flags)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.strip().splitlines()
    assert len(lines) == 3, first.stdout
    assert "70 captioned images of 64 px" in lines[0], first.stdout
    assert lines[-1] == f"next: python -m sprint_jax encode --source={target}/emoji/1.0.0"
    sheet = np.asarray(Image.open(target / "preview.png"))
    assert sheet.shape == (8 * 66 + 2, 8 * 66 + 2, 3)
    np.testing.assert_array_equal(sheet[2:66, 68:132], dataset.example(font, 5, 1, 64)[0])
    identity = sources.open_source(target / "emoji/1.0.0").identity()
    again = command("experiments.emoji", *flags)
    assert again.returncode == 0
    assert "there already" in again.stdout
    assert again.stdout.endswith(lines[-1] + "\n")
    assert sources.open_source(target / "emoji/1.0.0").identity() == identity
    other = command("experiments.emoji", *flags, "--count=71")
    assert other.returncode == 2
    assert "count 70, not 71" in other.stderr
    assert "--to_dir" in other.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--to_dir"]),
        (["--to_dir={}", "--count=0"], ["--count=0"]),
        ([f"--to_dir={__file__}"], [f"--to_dir={__file__}", "is a file"]),
        ([f"--to_dir={__file__}/sub"], [f"--to_dir={__file__}/sub", "is a file"]),
        (["--to_dir={}", "--side=32"], ["--side=32", "64 to 128"]),
        (["--to_dir={}", "--font=absent.ttf"], ["absent.ttf", "fonts-noto-color-emoji", "--font"]),
    ],
)
def test_bad_flags(flags, words, tmp_path, command):
    result = command("experiments.emoji", *(flag.format(tmp_path / "out") for flag in flags))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), last
    assert not (tmp_path / "out").exists()

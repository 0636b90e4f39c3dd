"""The embedded data: its generator, checker, text features, codec and batches."""

import collections
import hashlib
import itertools

import numpy as np
import pytest

from helpers.configs import card
from sprint_jax import build, config
from sprint_jax.data import prefetch, shapes_batches
from sprint_jax.encoders import patches, words
from sprint_jax.errors import UserError
from sprint_jax.toy import checker, shapes


def examples(count, **options):
    """Return training examples."""
    return [shapes.example(3, i, **options) for i in range(count)]


def test_examples_are_pure_and_differ():
    again = [shapes.example(3, i) for i in (5, 1)]
    first = examples(6)
    np.testing.assert_array_equal(again[0].image, first[5].image)
    assert again[1].text == first[1].text
    assert len({e.image.tobytes() for e in first}) == 6
    assert shapes.example(4, 5).image.tobytes() != first[5].image.tobytes()


def test_golden_example():
    """The shipped teacher depends on this data: a change of the generator needs a new teacher."""
    example = shapes.example(0, 3)
    assert example.text == "a blue circle above a white triangle"
    digest = hashlib.sha256(
        b"".join(shapes.example(0, i).image.tobytes() for i in range(50))
    ).hexdigest()
    assert digest[:16] == "7915f7a81732eb07"


def test_compositions_are_few_and_apart():
    """A caption leaves this open, so that a student has to choose from the noise alone.

    The counts are of sizes and positions. Fails when `_compose` draws a size for each object, and
    when three stand in a row whose two places share two cells.
    """
    open_to = collections.defaultdict(set)
    for e in examples(6000):
        first, objects = e.caption.text().split()[0], sorted(e.objects, key=lambda o: (o.x, o.y))
        if e.caption.relation:
            first = e.caption.relation
            objects = e.objects
        open_to[first].add(tuple((o.x, o.y, o.size) for o in objects))
    assert {k: len(v) for k, v in open_to.items()} == {
        "a": 9,
        "two": 16,
        "three": 8,
    } | dict.fromkeys(shapes.RELATIONS, 8)
    for kind, arrangements in open_to.items():
        cells = {frozenset((x, y) for x, y, _ in one) for one in arrangements}
        assert all(len(a & b) <= 1 for a, b in itertools.combinations(cells, 2)), kind
        assert all(len({size for _, _, size in one}) == 1 for one in arrangements), kind


def test_captions_parse_back():
    for e in examples(400) + examples(200, split="heldout"):
        assert shapes.parse(e.text) == e.caption


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "a",
        "a red",
        "red circle",
        "two red circle",
        "a red circle near a blue square",
        "a red circle on a pink background",
        "four red circles",
        "a red circle left of a blue",
    ],
)
def test_other_text_does_not_parse(bad):
    with pytest.raises(ValueError, match="grammar"):
        shapes.parse(bad)


def test_heldout_captions_never_train():
    train, heldout = examples(3000), examples(600, split="heldout")
    assert not {e.text for e in train} & {e.text for e in heldout}
    assert {e.caption.kind for e in heldout} == {"shape", "color", "count", "relation"}
    assert not any(
        shapes.is_heldout(shapes.parse(f"a {c} {s}")) for c in shapes.COLORS for s in shapes.SHAPES
    )


def all_captions():
    """Return every caption of the grammar with two objects and a background."""
    words = [f"{c} {s}" for c in shapes.COLORS for s in shapes.SHAPES]
    pairs = [(a, b, r) for a in words for b in words for r in shapes.RELATIONS if a != b]
    texts = [f"a {a} {r} a {b} on a {g} background" for a, b, r in pairs for g in shapes.COLORS]
    return [shapes.parse(text) for text in texts]


def test_halves_cut_the_heldout_captions():
    """Every held-out caption is in one half, and each half is half of them.

    Fails when a half is cut by a bit that decides about held-out captions as well.
    """
    heldout = [c for c in all_captions() if shapes.is_in(c, "heldout")]
    halves = [[c for c in heldout if shapes.is_in(c, half)] for half in shapes.HALVES]
    assert sum(map(len, halves)) == len(heldout) > 500
    assert 0.45 < len(halves[0]) / len(heldout) < 0.55
    assert not any(shapes.is_in(c, "train") for half in halves for c in half)
    assert not any(shapes.is_in(c, h) for c in all_captions()[:200] for h in shapes.HALVES
        if not shapes.is_heldout(c))  # fmt: skip
    found = [examples(300, split=half) for half in shapes.HALVES]
    selection, final = ({e.text for e in made} for made in found)
    assert selection & final == {"a circle on a yellow background"}
    assert min(len(selection), len(final)) > 100
    for made in found:
        assert {e.caption.kind for e in made} == {"shape", "color", "count", "relation"}


@pytest.mark.parametrize("size", [32, 64, 128])
def test_checker_reads_real_images(size):
    made = examples(600 if size < 128 else 100, size=size)
    score, tasks = checker.score([e.image for e in made], [e.caption for e in made])
    assert score >= 0.99
    assert min(tasks.values()) >= 0.99
    assert set(tasks) == set(checker.TASKS)


def test_checker_rejects_other_prompts():
    """Mismatched prompts score at chance, which is what a perfect reader gives the scenes."""
    made = examples(1500)
    asked = [e.caption for e in made[1:] + made[:1]]
    score, _ = checker.score([e.image for e in made], asked)
    assert score <= checker.chance(made, asked) + 0.02


def draw_scene(*objects, background=None):
    """Return the image of objects on a background."""
    placed = [shapes.Object(color, shape, x=x, y=y, size=s) for color, shape, x, y, s in objects]
    return shapes.render(placed, background, 32)


def score_of(image, caption):
    """Return the score of an image and a caption."""
    return checker.judge(checker.read(image), shapes.parse(caption))


def test_checker_finds_each_kind_of_error():
    red, blue = ("red", "circle", 0.25, 0.5, 0.125), ("blue", "square", 0.75, 0.5, 0.125)
    asked = "a red circle left of a blue square"
    assert all(score_of(draw_scene(red, blue), asked).values())
    swapped = score_of(
        draw_scene(("red", "circle", 0.75, 0.5, 0.125), ("blue", "square", 0.25, 0.5, 0.125)), asked
    )
    assert swapped == {
        "two_objects": True,
        "colour_attribution": True,
        "position": False,
        "overall": False,
    }
    recolored = score_of(
        draw_scene(("blue", "circle", *red[2:]), ("red", "square", *blue[2:])), asked
    )
    assert recolored["two_objects"]
    assert not recolored["colour_attribution"]
    assert not recolored["overall"]
    alone = score_of(draw_scene(red), asked)
    assert not any(alone.values())
    ground = score_of(draw_scene(red, blue, background="green"), asked)
    assert ground["position"] and not ground["overall"]
    assert not score_of(draw_scene(red, blue), "a circle")["overall"]
    assert score_of(draw_scene(red), "a red circle")["overall"]
    assert not score_of(draw_scene(red), "a red square")["overall"]
    assert not score_of(draw_scene(red), "a white circle")["colours"]
    two = draw_scene(red, ("red", "circle", 0.75, 0.5, 0.125))
    assert score_of(two, "two red circles")["overall"]
    assert not score_of(two, "three red circles")["counting"]


def test_relation_axes():
    for (name, (dx, dy)), other in itertools.product(
        {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}.items(),
        shapes.RELATIONS,
    ):
        a, b = (0.5 - 0.25 * dx, 0.5 - 0.25 * dy), (0.5 + 0.25 * dx, 0.5 + 0.25 * dy)
        image = draw_scene(("red", "circle", *a, 0.125), ("white", "triangle", *b, 0.125))
        assert score_of(image, f"a red circle {other} a white triangle")["position"] == (
            name == other
        )


def test_noise_is_not_an_object():
    image = draw_scene(("red", "circle", 0.25, 0.5, 0.125)).astype(float)
    image[2:4, 28:30] = 255
    assert len(checker.read(image.astype(np.uint8)).objects) == 1


def test_noise_of_many_colors_is_no_shape():
    """Its median can be the background, which no pixel has moved towards."""
    image = np.full((32, 32, 3), 128, np.uint8)
    colors = np.array([[255, 128, 1], [1, 255, 128], [128, 1, 255]], np.uint8)
    image[8:24, 8:24] = colors[np.add.outer(np.arange(16), np.arange(16)) % 3]
    seen = checker.read(image).objects
    assert len(seen) == 1 and seen[0].shape is None


def test_text_features_are_frozen():
    """The shipped teacher depends on these features, so a new encoder needs a new teacher."""
    encoder = words.ShapesText()
    features, mask = encoder.encode(["a red circle", "a red circle left of a blue square", ""])
    np.testing.assert_array_equal(mask.sum(1), [4, 9, 1])
    digest = np.abs(features).sum(dtype=np.float64)
    np.testing.assert_allclose(digest, 2398.583940208715, rtol=1e-6)
    alone, _ = encoder.encode(["a red circle"])
    np.testing.assert_array_equal(alone[0], features[0])


def test_a_noun_carries_its_adjective_and_its_relation():
    """Check the content of a feature word by word. Fails when distances change sign."""
    encoder = words.ShapesText()
    nouns, positions = encoder.window.words, encoder.window.positions
    feature = encoder.encode(["a red circle left of a blue square"])[0][0, 3]
    around = [
        "<pad>",
        "<pad>",
        "<pad>",
        "<bos>",
        "a",
        "red",
        "circle",
        "left",
        "of",
        "a",
        "blue",
        "square",
        "<pad>",
    ]
    for k, word in enumerate(around):
        expected = 0 if word == "<pad>" else nouns[k][words.WORDS.index(word)]
        np.testing.assert_allclose(feature[16 * k : 16 * k + 16], expected, atol=1e-6)
    np.testing.assert_allclose(feature[-16:], positions[3], atol=1e-6)


@pytest.mark.parametrize(
    "prompt, word", [("a zebra", "zebra"), ("a <pad>", "<pad>"), ("a " * 16, "too long")]
)
def test_text_refuses_unknown_words(prompt, word):
    with pytest.raises(UserError, match=word):
        words.ShapesText().encode([prompt])


def test_space_to_depth_is_exact():
    images = np.stack([e.image for e in examples(4)])
    codec = patches.SpaceToDepth(4, 1.28)
    latents = codec.encode(images)
    assert latents.shape == (4, 8, 8, 48)
    np.testing.assert_array_equal(np.asarray(codec.decode(latents)), images)
    pixel = images[1, 4 * 2 + 1, 4 * 3 + 2] / 127.5 - 1  # row 1, column 2 of cell (2, 3)
    np.testing.assert_allclose(latents[1, 2, 3].reshape(4, 4, 3)[1, 2], 1.28 * pixel, rtol=1e-6)


def shipped_codec():
    """Return the codec that ships with the package."""
    return build.codec(config.parse(card(preset="sprint")))


def test_shipped_codec_keeps_what_the_checker_reads():
    """Fails when decode omits the mean or multiplies by the spread where encode does."""
    made = examples(400, split="heldout")
    images, codec = np.stack([e.image for e in made]), shipped_codec()
    latents = codec.encode(images)
    assert latents.shape == (400, 4, 4, codec.channels) and latents.dtype == np.float32
    decoded = np.asarray(codec.decode(latents))
    assert checker.score(decoded, [e.caption for e in made])[0] >= 0.99
    assert np.sqrt(np.square(decoded.astype(float) - images).mean()) < 8
    np.testing.assert_allclose(codec.basis.T @ codec.basis, np.eye(codec.channels), atol=1e-5)


def test_shipped_codec_equals_a_new_fit():
    """Up to the sign of each component, which the eigenvalue routine may choose."""
    images = np.stack([shapes.example(0, i).image for i in range(4000)])
    fitted, codec = patches.fit_pca(images, 8, 32), shipped_codec()
    np.testing.assert_allclose(fitted["mean"], codec.mean, atol=1e-5)
    np.testing.assert_allclose(fitted["spread"], codec.spread, rtol=1e-3)
    alignment = np.abs((fitted["basis"] * codec.basis).sum(0))
    assert np.median(alignment) > 0.999


def test_latents_are_near_unit_scale():
    images = np.stack([e.image for e in examples(500)])
    for codec in (patches.SpaceToDepth(4, 1.28), shipped_codec()):
        assert 0.9 < np.sqrt(np.square(codec.encode(images)).mean()) < 1.1


def batches(**changes):
    """Return batches of the shapes data."""
    options = dict(
        seed=0,
        batch=4,
        size=32,
        codec=patches.SpaceToDepth(4, 1.28),
        text_encoder=words.ShapesText(),
    )
    return lambda step: shapes_batches.make_batch(step, **(options | changes))


def test_batches_depend_on_the_step_alone():
    with prefetch.Prefetch(batches(), 2, 5) as ahead:
        for step in (2, 3, 4):
            taken, direct = next(ahead), batches()(step)
            for name in direct:
                np.testing.assert_array_equal(taken[name], direct[name])
    small, large = batches(batch=2), batches(batch=4)
    np.testing.assert_array_equal(large(1)["latent"][2:], small(3)["latent"])


def test_an_error_in_the_thread_reaches_the_loop():
    def fail(step):
        """Raise an error at a step."""
        raise RuntimeError(f"step {step}")

    with prefetch.Prefetch(fail, 7, 9) as ahead, pytest.raises(RuntimeError, match="step 7"):
        next(ahead)


def test_prefetching_ends_after_the_last_step():
    """Fails by a wait without end when the thread does not report its end."""
    with prefetch.Prefetch(lambda step: step, 3, 9, depth=2) as ahead:
        assert list(ahead) == [3, 4, 5, 6, 7, 8]

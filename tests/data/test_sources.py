"""Captioned images from tars, TFDS sets and folders: same examples, same order, named faults."""

import io
import itertools
import json
import pathlib
import pickle
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from sprint_jax.data import aspect_ratios, captioned, sources
from sprint_jax.errors import UserError
from sprint_jax.storage import crops

CAPTIONS = ("a grey step", "two ramps", "a blue corner", "ünïcode, with a comma")


def draw_image(index, height=6, width=9):
    """Return uint8 [height, width, 3], different for each index."""
    return np.random.RandomState(index).randint(0, 256, (height, width, 3)).astype(np.uint8)


def encode_image(array, form="PNG", **options):
    """Return the bytes of an image file."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, form, **options)
    return stream.getvalue()


PNGS = tuple(encode_image(draw_image(i)) for i in range(len(CAPTIONS)))


def encode_npy(array):
    """Return the bytes of a .npy file."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def write_tar(path, members):
    """Write (name, bytes) pairs in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def tar_members(index, name, field="prompt"):
    """Return the members of one example of a tar."""
    return [
        (f"{name}.png", PNGS[index]),
        (f"{name}.json", json.dumps({field: CAPTIONS[index], "width": 9}).encode()),
    ]


def write_tars(root, field="prompt"):
    """Write two examples to each of two tars."""
    write_tar(root / "00000.tar", tar_members(0, "000", field) + tar_members(1, "001", field))
    write_tar(root / "00001.tar", tar_members(2, "000", field) + tar_members(3, "001", field))
    return root


def write_file(path, data):
    """Write a file and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def write_folder(root):
    """Write four images and captions, not in order."""
    for index in (3, 1, 0, 2):
        write_file(root / f"{'ab'[index // 2]}/{index}.png", PNGS[index])
        write_file(root / f"{'ab'[index // 2]}/{index}.txt", CAPTIONS[index] + "\n")
    return root


def write_tfds_set(root, names=("image", "caption"), images=PNGS, split="train"):
    """Write a TFDS set with its builder and return the folder of its dataset_info.json."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Images and captions."""

        # TFDS would search the packages of the test's own module for the code of the builder.
        __module__ = "tiny"
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = pathlib.Path(__file__).parent

        def _info(self):
            kinds = (
                tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                tfds.features.Text(),
            )
            features = tfds.features.FeaturesDict(dict(zip(names, kinds, strict=True)))
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples()}

        def _generate_examples(self):
            for i, image in enumerate(images):
                yield i, dict(zip(names, (image, CAPTIONS[i]), strict=True))

    tfds.disable_progress_bar()
    Tiny(data_dir=root, file_format="array_record").download_and_prepare()
    return root / "tiny/1.0.0"


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """Return the folder of a TFDS set."""
    return write_tfds_set(tmp_path_factory.mktemp("tfds"))


def reason_for(source, index):
    """Return why an example cannot be used."""
    with pytest.raises(captioned.BadExample) as caught:
        source[index]
    return str(caught.value)


def test_all_kinds_of_sources_give_the_same_examples(tmp_path, tfds_folder):
    for path in (write_tars(tmp_path / "tars"), write_folder(tmp_path / "folder"), tfds_folder):
        source = sources.open_source(path)
        assert len(source) == 4
        examples = [source[i] for i in range(4)]
        assert [e.caption for e in examples] == list(CAPTIONS)
        assert [e.key for e in examples] == [source.key(i) for i in range(4)]
        assert len({e.key for e in examples}) == 4
        assert all(e.latent is None for e in examples)
        for index, example in enumerate(examples):
            np.testing.assert_array_equal(captioned.decode_image(example.image), draw_image(index))
        for beyond in (4, -1):
            with pytest.raises(IndexError):
                source[beyond]
        copy = pickle.loads(pickle.dumps(source))
        assert [copy[i] for i in (3, 0)] == [examples[3], examples[0]]
        again = sources.open_source(path)
        assert again.identity() == source.identity() == copy.identity()
        assert again[2].key == examples[2].key


def test_tars_are_read_in_the_order_of_names_and_of_the_list(tmp_path):
    root = write_tars(tmp_path)
    keys = ["00000.tar:000", "00000.tar:001", "00001.tar:000", "00001.tar:001"]
    assert [e.key for e in sources.open_source(root)] == keys
    listing = {
        "wids_version": 1,
        "shardlist": [{"url": "elsewhere/00001.tar", "nsamples": 2, "filesize": 1}],
    }
    write_file(root / "wids-meta.json", json.dumps(listing))
    assert [e.caption for e in sources.open_source(root)] == list(CAPTIONS[2:])
    write_file(
        root / "wids-meta.json",
        json.dumps({"shardlist": [{"url": "00001.tar"}, {"url": "00002.tar"}]}),
    )
    with pytest.raises(UserError, match="00002.tar"):
        sources.open_source(root)
    write_file(root / "wids-meta.json", "[]")
    with pytest.raises(UserError, match="shardlist"):
        sources.open_source(root)


def test_members_belong_together_up_to_the_last_dot(tmp_path):
    members = [
        ("./a.b/x.1.seg.png", b"has no caption"),
        ("./a.b/x.JPG", encode_image(draw_image(0), "JPEG")),
        ("./a.b/y.txt", b" of y \n"),
        ("./a.b/x.npz", b"features"),
        ("./a.b/y.webp", PNGS[1]),
        ("./a.b/x.txt", b"of x"),
        ("./.png", b"hidden"),
    ]
    write_tar(tmp_path / "a.tar", members)
    source = sources.open_source(tmp_path)
    assert [(source[i].key, source[i].caption) for i in (1, 2)] == [
        ("a.tar:a.b/x", "of x"),
        ("a.tar:a.b/y", "of y"),
    ]
    assert source[1].image == members[1][1] and source[2].image == PNGS[1]
    assert source.key(0) == "a.tar:a.b/x.1.seg" and len(source) == 3
    assert reason_for(source, 0) == "missing caption"


def test_caption_fields(tmp_path):
    root = write_tars(tmp_path, field="long")
    assert sources.open_source(root, "long")[0].caption == CAPTIONS[0]
    assert reason_for(sources.open_source(root), 0) == "missing caption"


@pytest.mark.parametrize("kept", ["header", "half the picture", "half the caption"])
def test_a_truncated_tar_gives_its_complete_examples(tmp_path, kept):
    path = write_tar(tmp_path / "a.tar", tar_members(0, "000") + tar_members(1, "001"))
    with tarfile.open(path) as tar:
        begin = {member.name: member.offset_data for member in tar}
    cut = {
        "header": begin["001.png"],
        "half the picture": begin["001.png"] + len(PNGS[1]) // 2,
        "half the caption": begin["001.json"] + 5,
    }[kept]
    path.write_bytes(path.read_bytes()[:cut])
    source = sources.open_source(tmp_path)
    assert len(source) == 2 and source[0].caption == CAPTIONS[0]
    assert reason_for(source, 1) == "corrupt record"


@pytest.mark.parametrize(
    "members, expected",
    [
        ([("a.png", PNGS[0])], "missing caption"),
        ([("a.png", PNGS[0]), ("a.txt", b" \n")], "missing caption"),
        ([("a.png", PNGS[0]), ("a.json", b'{"prompt": null}')], "missing caption"),
        ([("a.png", PNGS[0]), ("a.json", b'["prompt"]')], "missing caption"),
        ([("a.png", PNGS[0]), ("a.json", b'{"prompt": "a')], "corrupt record"),
        ([("a.png", PNGS[0]), ("a.txt", b"\xff\xfe\xfa")], "caption is not UTF-8"),
        (
            [("a.png", PNGS[0]), ("a.json", rb'{"prompt": "a dog \ud83d"}')],
            "caption is not UTF-8",
        ),  # half an emoji
        ([("a.json", b'{"prompt": "a"}')], "missing picture"),
        ([("a.npy", encode_npy(np.zeros((2, 1, 1)))[:-3]), ("a.txt", b"a")], "corrupt record"),
        ([("a.npy", b"\x93NUMPY garbage"), ("a.txt", b"a")], "corrupt record"),
        ([("a.npy", encode_npy(np.array([{}]))), ("a.txt", b"a")], "corrupt record"),
        (
            [("a.npy", encode_npy(np.zeros((2, 3)))), ("a.txt", b"a")],
            "latent is not a float array [C, h, w]",
        ),
        (
            [("a.npy", encode_npy(np.zeros((2, 3, 3), int))), ("a.txt", b"a")],
            "latent is not a float array [C, h, w]",
        ),
        (
            [("a.npy", encode_npy(np.full((2, 1, 1), np.nan))), ("a.txt", b"a")],
            "latent is not finite",
        ),
        (
            [("a.npy", encode_npy(np.full((2, 1, 1), 1e300))), ("a.txt", b"a")],
            "latent is not finite",
        ),
    ],
)
def test_bad_samples_have_a_reason(tmp_path, members, expected):
    write_tar(tmp_path / "a.tar", members + tar_members(1, "b"))
    source = sources.open_source(tmp_path)
    assert reason_for(source, 0) == expected
    assert source[1].caption == CAPTIONS[1]


def test_latents(tmp_path):
    latent = np.arange(12, dtype=np.float16).reshape(3, 2, 2)
    write_tar(
        tmp_path / "a.tar", [("a.npy", encode_npy(latent)), ("a.json", b'{"prompt": "steps"}')]
    )
    example = sources.open_source(tmp_path)[0]
    assert example.image is None
    assert example.caption == "steps"
    assert example.latent.dtype == np.float32
    np.testing.assert_array_equal(example.latent, latent)


def test_a_folder_with_metadata(tmp_path):
    for index in range(4):
        write_file(tmp_path / f"{3 - index}.png", PNGS[index])
    lines = [
        {"file_name": "3.png", "text": CAPTIONS[0]},
        {"file_name": "./2.png", "caption": "no", "long": CAPTIONS[1]},
        {"file_name": "0.png", "width": 9},
        {"file_name": "absent.png", "text": "x"},
        {"file_name": "half.png", "text": "a \ud83d"},
    ]
    write_file(tmp_path / "half.png", PNGS[0])
    write_file(tmp_path / "metadata.jsonl", "\n\n".join(map(json.dumps, lines)))
    write_file(tmp_path / "1.txt", CAPTIONS[2])
    source = sources.open_source(tmp_path, caption_field="long")
    assert reason_for(source, 0) == "missing caption"
    assert reason_for(source, 4) == "missing picture"
    assert len(source) == 6
    assert [source.key(i) for i in range(6)] == [
        "0.png",
        "1.png",
        "2.png",
        "3.png",
        "absent.png",
        "half.png",
    ]
    assert reason_for(source, 5) == "caption is not UTF-8"
    assert [(source[i].key, source[i].caption) for i in (1, 2, 3)] == [
        ("1.png", CAPTIONS[2]),
        ("2.png", CAPTIONS[1]),
        ("3.png", CAPTIONS[0]),
    ]
    assert source[1].image == PNGS[2]
    assert sources.open_source(tmp_path)[2].caption == "no"
    write_file(tmp_path / "metadata.jsonl", '{"file_name": "3.png", "text": "a"}\n{"text": "b"}')
    with pytest.raises(UserError, match="metadata.jsonl line 2"):
        sources.open_source(tmp_path)


def test_the_official_folder(tmp_path):
    for index in range(3):
        write_file(tmp_path / f"{index}.png", PNGS[index])
        write_file(tmp_path / f"{index}.txt", CAPTIONS[index])
    for name in ("2.jpg", "3.jpg"):
        write_file(tmp_path / name, encode_image(draw_image(2), "JPEG"))
    write_file(tmp_path / "3.txt", CAPTIONS[3])
    write_file(
        tmp_path / "meta_data.json",
        json.dumps({"name": "x", "img_names": ["2.jpg", "3", "0", "absent"]}),
    )
    source = sources.open_source(tmp_path)
    assert [source[i].key for i in range(3)] == ["0.png", "2.jpg", "3.jpg"]
    assert source[1].caption == CAPTIONS[2]
    assert reason_for(source, 3) == "missing picture" and len(source) == 4
    write_file(tmp_path / "meta_data.json", "{}")
    with pytest.raises(UserError, match="img_names"):
        sources.open_source(tmp_path)


def test_identity_follows_names_and_sizes(tmp_path, tfds_folder):
    def identities(path):
        return sources.open_source(path).identity()

    seen = set()
    for make, changed in ((write_tars, "00001.tar"), (write_folder, "b/3.txt")):
        root = make(tmp_path / make.__name__)
        elsewhere = make(tmp_path / "moved" / make.__name__)
        first = identities(root)
        assert identities(elsewhere) == first
        (root / changed).write_bytes((root / changed).read_bytes() + b" " * 512)
        longer = identities(root)
        (elsewhere / changed).rename(elsewhere / changed.replace(pathlib.Path(changed).stem, "9"))
        renamed = identities(elsewhere)
        seen |= {first, longer, renamed}
    assert len(seen) == 6
    before = identities(tfds_folder)
    assert before not in seen
    for name in (".DS_Store", "._features.json"):
        write_file(tfds_folder / name, "hidden")
    assert identities(tfds_folder) == before


def test_a_bad_tfds_record_affects_no_other(tmp_path):
    path = write_tfds_set(tmp_path)
    (record,) = path.glob("*.array_record-*")
    data = bytearray(record.read_bytes())
    at = data.index(PNGS[2])
    data[at + 40] ^= 0xFF
    record.write_bytes(data)
    source = sources.open_source(path)
    assert reason_for(source, 2) == "corrupt record"
    assert [source[i].caption for i in (0, 1, 3)] == [CAPTIONS[i] for i in (0, 1, 3)]
    record.unlink()
    with pytest.raises(UserError, match="array_record.* is missing"):
        sources.open_source(path)


def test_tfds_sets_that_do_not_fit(tmp_path, tfds_folder):
    with pytest.raises(UserError, match="image and one of"):
        sources.open_source(write_tfds_set(tmp_path / "names", names=("picture", "caption")))
    with pytest.raises(UserError, match="no split train"):
        sources.open_source(write_tfds_set(tmp_path / "split", split="test"))
    other = write_tfds_set(tmp_path / "field", names=("image", "alt"))
    assert sources.open_source(other, "alt")[3].caption == CAPTIONS[3]
    info = json.loads((other / "dataset_info.json").read_text())
    write_file(other / "dataset_info.json", json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="are tfrecord: build it as array_record"):
        sources.open_source(other, "alt")
    write_file(other / "dataset_info.json", "garbage")
    with pytest.raises(UserError, match="build it again"):
        sources.open_source(other, "alt")


def test_what_is_not_a_source(tmp_path, tfds_folder):
    def refused(path, words):
        with pytest.raises(UserError, match=words) as caught:
            sources.open_source(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "absent", "no folder .*absent")
    refused(tmp_path, "empty")
    write_file(tmp_path / "notes/readme.md", "hello")
    refused(tmp_path, ".* holds no known data")
    refused(tmp_path / "notes/readme.md", "is a file")
    write_file(tmp_path / "notes/a.png", PNGS[0])
    refused(tmp_path, "no image in .* has a caption")
    write_tars(tmp_path / "deeper/tars")
    refused(tmp_path, "deeper/tars is: give that")
    refused(tfds_folder.parent, "1.0.0 is: give that")
    write_file(tmp_path / "bad/a.tar", b"no tar at all" * 100)
    refused(tmp_path / "bad", "a.tar")
    write_tar(tmp_path / "other/a.tar", [("a.mp3", b"")])
    refused(tmp_path / "other", "no images")


def test_images_are_rotated_by_their_exif_orientation():
    tall = np.zeros((4, 2, 3), np.uint8)
    tall[0, 1] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter turn clockwise
    turned = captioned.decode_image(encode_image(tall, exif=exif))
    np.testing.assert_array_equal(turned, np.rot90(tall, -1))


def test_transparency_is_white_and_gray_is_gray():
    clear = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    np.testing.assert_array_equal(
        captioned.decode_image(encode_image(clear)), [[[255, 0, 0], [255] * 3, [127] * 3]]
    )
    palette = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)).convert("P")
    stream = io.BytesIO()
    palette.save(stream, "PNG", transparency=palette.getpixel((0, 0)))
    np.testing.assert_array_equal(captioned.decode_image(stream.getvalue())[0, 0], [255] * 3)
    deep = np.array([[0, 257 * 100, 65535]], np.uint16)
    np.testing.assert_array_equal(
        captioned.decode_image(encode_image(deep))[0, :, 0], [0, 100, 255]
    )
    np.testing.assert_array_equal(
        captioned.decode_image(encode_image(draw_image(1)[..., 0]))[..., 2], draw_image(1)[..., 0]
    )


def decompression_bomb():
    """Return a small file of a huge image."""
    return encode_image(np.zeros((10_001, 10_000), bool), "PNG")


@pytest.mark.parametrize("data", [b"", b"no picture", PNGS[0][:60], PNGS[0][:-30], None], ids=str)
def test_undecodable(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(captioned.BadExample, match="^undecodable image$"):
            captioned.decode_image(decompression_bomb() if data is None else data)


def test_fit_crops_the_center():
    wide = draw_image(0, 8, 12)
    np.testing.assert_array_equal(crops.fit_bicubic(wide, 8, 6), wide[:, 3:9])
    np.testing.assert_array_equal(
        crops.fit_bicubic(wide.swapaxes(0, 1), 6, 8), wide.swapaxes(0, 1)[3:9]
    )
    assert crops.fit_bicubic(wide, 8, 12) is wide


@pytest.mark.parametrize(
    "have, want",
    [((40, 64), (20, 16)), ((60, 40), (20, 20)), ((5, 6), (20, 20)), ((3, 90), (8, 8))],
)
def test_fit_is_the_crop_of_the_resized_image(have, want):
    """Fails without antialiasing, with another filter, and when the crop is not centered."""
    image = draw_image(3, *have)
    scale = max(want[0] / have[0], want[1] / have[1])
    height, width = round(have[0] * scale), round(have[1] * scale)
    scaled = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - want[0]) / 2, (width - want[1]) / 2
    assert top == int(top) and left == int(left)
    cut = scaled[int(top) : int(top) + want[0], int(left) : int(left) + want[1]]
    difference = np.abs(crops.fit_bicubic(image, *want).astype(int) - cut)
    assert difference.max() <= 1


def test_fit_of_a_very_long_image():
    assert crops.fit_bicubic(draw_image(0, 1, 50_000), 64, 64).shape == (64, 64, 3)


def test_nearest_bucket():
    buckets = [(512, 512), (384, 640), (640, 384), (300, 900)]
    assert aspect_ratios.nearest_bucket(100, 101, buckets) == (512, 512)
    assert aspect_ratios.nearest_bucket(1080, 1920, buckets) == (384, 640)
    assert aspect_ratios.nearest_bucket(1920, 1080, buckets) == (640, 384)
    assert aspect_ratios.nearest_bucket(10, 1000, buckets) == (300, 900)
    # Between 1/2 and 2 by quotient. By difference, 1.2 would go to 0.5.
    assert aspect_ratios.nearest_bucket(12, 10, [(1, 2), (2, 1)]) == (2, 1)
    same = [(256, 256), (1024, 1024), (512, 512)]
    for order in itertools.permutations(same):
        assert aspect_ratios.nearest_bucket(500, 530, order) == (512, 512)

"""Images of rare modes have the right values; empty and cut images are generated again."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sprint_jax.data import captioned, condition
from sprint_jax.errors import UserError
from sprint_jax.evaluation import gallery, image_sets
from sprint_jax.serving import uploads
from sprint_jax.storage import image_files


def png(pixels, bits, kind, transparent=None):
    """Return a PNG by hand.

    pixels: [H, W] or [H, W, C] in the scale of `bits`, at most one channel below 8. kind: 0 for
    gray, 2 RGB, 4 gray with alpha, 6 RGBA. transparent: the values of the color that is.
    """
    pixels = np.asarray(pixels)
    height, width = pixels.shape[:2]
    rows = b""
    for row in pixels.reshape(height, -1):
        digits = "".join(format(int(value), f"0{bits}b") for value in row)
        digits += "0" * (-len(digits) % 8)
        rows += b"\0" + bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8))

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    clear = b"".join(struct.pack(">H", value) for value in transparent or ())
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + (chunk(b"tRNS", clear) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def stored(image, form="TIFF", **options):
    """Return the file of an image or an array."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def tiff_of_12_bits(values):
    """Return a gray TIFF of four pixels by hand."""
    digits = "".join(format(value, "012b") for value in values)
    fields = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 200, 277: 1, 278: 1, 279: 6}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    head = struct.pack("<2sHIH", b"II", 42, 8, len(fields)) + entries + bytes(4)
    return head.ljust(200, b"\0") + bytes(int(digits[i : i + 8], 2) for i in range(0, 48, 8))


def white_is_zero(data):
    """Return a TIFF whose field PhotometricInterpretation is 0 instead of 1."""
    field = struct.pack("<HHI", 262, 3, 1)
    return data.replace(field + b"\1", field + b"\0")


def gray(*levels):
    return [[level] * 3 for level in levels]


PALETTE = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)).convert("P")
FIRST = PALETTE.getpixel((0, 0))
RGB = np.array([[[200, 100, 50], [0, 0, 77]]], np.uint8)
CLEAR = np.array([[0, 255]], np.uint8)
I16, I32, F = np.uint16, np.int32, np.float32

# {name: (file, its one row of pixels on white)}. Half way between two levels rounds to the even.
MODES = {
    "32 bits, 0..255": (stored(np.array([[0, 100, 200, 255]], I32)), gray(0, 100, 200, 255)),
    "32 bits, 0..65535": (stored(np.array([[0, 25700, 65535]], I32)), gray(0, 100, 255)),
    "32 bits, all": (stored(np.array([[-5, 2**30, 2**31 - 1]], I32)), gray(0, 128, 255)),
    "float, 0..1": (stored(np.array([[0, 0.4, 1]], F)), gray(0, 102, 255)),
    "float, 0..255": (stored(np.array([[-1, 100.4, 255]], F)), gray(0, 100, 255)),
    "float, 0..65535": (stored(np.array([[0, 25700, 65535]], F)), gray(0, 100, 255)),
    "float, not a number": (stored(np.array([[np.nan, 0.2, 1]], F)), gray(0, 51, 255)),
    "float, black": (stored(np.zeros((1, 2), F)), gray(0, 0)),
    "16 bits": (stored(np.array([[0, 25700, 65535]], I16)), gray(0, 100, 255)),
    "16 bits, big-endian": (png([[0, 25700, 65535]], 16, 0), gray(0, 100, 255)),
    "16 bits, white is 0": (white_is_zero(stored(np.array([[0, 25700, 65535]], I16))),
        gray(255, 155, 0)),
    "12 bits": (tiff_of_12_bits([0, 2048, 4095, 1024]), gray(0, 128, 255, 64)),
    "16 bits, a dark PGM": (b"P5 3 1 65535\n" + np.array([0, 100, 300], ">u2").tobytes(),
        gray(0, 0, 1)),
    "10 bits, PGM": (b"P5 3 1 1023\n" + np.array([0, 512, 1023], ">u2").tobytes(),
        gray(0, 128, 255)),
    "PFM": (b"Pf\n3 1\n-1.0\n" + np.array([0, 0.4, 1], "<f4").tobytes(), gray(0, 102, 255)),
    "gray 16, transparent": (png([[0, 5000, 30000]], 16, 0, [5000]), gray(0, 255, 117)),
    "gray 16, black transparent": (png([[0, 5000, 30000]], 16, 0, [0]), gray(255, 19, 117)),
    "gray 8, transparent": (png([[0, 5, 200]], 8, 0, [5]), gray(0, 255, 200)),
    "gray 4, transparent": (png([[0, 5, 9]], 4, 0, [5]), gray(0, 255, 153)),
    "gray 2, transparent": (png([[0, 1, 2]], 2, 0, [2]), gray(0, 85, 255)),
    "gray 1, white transparent": (png([[0, 1]], 1, 0, [1]), gray(0, 255)),
    "gray 1, black transparent": (png([[0, 1]], 1, 0, [0]), gray(255, 255)),
    "RGB 16": (png([[[25700, 0, 65535]]], 16, 2), [[100, 0, 255]]),
    "RGB 16, transparent": (png([[[0x1234, 0x5678, 0x9ABC], [0x3434, 0x7878, 0xBCBC]]], 16, 2,
        [0x1234, 0x5678, 0x9ABC]), [[255] * 3, [0x34, 0x78, 0xBC]]),
    "RGB 8, transparent": (png(RGB, 8, 2, [0, 0, 77]), [[200, 100, 50], [255] * 3]),
    "gray and alpha 16": (png([[[25700, 0], [25700, 65535]]], 16, 4), gray(255, 100)),
    "RGBA 16": (png([[[25700, 0, 0, 0], [25700, 0, 0, 65535]]], 16, 6), [[255] * 3, [100, 0, 0]]),
    "gray and alpha": (stored(Image.merge("LA", [Image.fromarray(CLEAR)] * 2), "PNG"),
        gray(255, 255)),
    "palette, transparent": (stored(PALETTE, "PNG", transparency=FIRST), [[255] * 3, [0, 0, 255]]),
    "palette, GIF": (stored(PALETTE, "GIF", transparency=FIRST), [[255] * 3, [0, 0, 255]]),
    "CMYK": (stored(Image.fromarray(RGB).convert("CMYK")), RGB[0].tolist()),
    "1 bit": (stored(Image.fromarray(CLEAR).convert("1"), "PNG"), gray(0, 255)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODES)
def test_modes_have_the_right_values(tmp_path, name):
    """Fails when levels are clipped or taken for others, and when transparency is lost.

    Commands, training, the server and scoring read alike; scoring leaves transparency out.
    """
    data, expected = MODES[name]
    (tmp_path / "x").write_bytes(data)
    with Image.open(io.BytesIO(data)) as image:
        row = np.asarray(image_files.flatten(image))
    assert row.tolist() == [expected]
    np.testing.assert_array_equal(captioned.decode_image(data), row)
    size = row.shape[:2]
    np.testing.assert_array_equal(image_files.load(tmp_path / "x", *size), row)
    if data[:4] == b"\x89PNG":
        np.testing.assert_array_equal(uploads.from_bytes(data, *size), row)
    if not any(word in name for word in ("transparent", "alpha", "RGBA", "GIF")):
        np.testing.assert_array_equal(image_sets.read(tmp_path / "x"), row)


def test_the_background_of_transparent_gray_is_the_given_one():
    """A ControlNet's lines are drawn on black."""
    data = png([[0, 5000, 30000]], 16, 0, [5000])
    with Image.open(io.BytesIO(data)) as image:
        row = np.asarray(image_files.flatten(image, (10, 20, 30)))[0]
    assert row.tolist() == [[0] * 3, [10, 20, 30], [117] * 3]


def test_rotation_keeps_values_and_transparency():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.array([[100, 200]], I32))
    tall = captioned.decode_image(stored(image, "TIFF", exif=exif))
    assert tall[..., 0].tolist() == [[100], [200]]


def test_endings_are_those_that_pillow_reads():
    """Fails when a format is in the list that Pillow only recognizes, or hands to a program."""
    endings = image_files.endings()
    assert endings[:4] == (".png", ".jpg", ".jpeg", ".webp")
    assert {".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".mpo", ".jfif"} <= set(endings)
    assert not {".eps", ".ps", ".mpg", ".h5", ".hdf", ".grib", ".wmf", ".pdf"} & set(endings)
    assert len(set(endings)) == len(endings)


WHOLE = stored(np.random.RandomState(0).randint(0, 256, (16, 16, 3)).astype(np.uint8), "PNG")
JPEG = stored(Image.new("RGB", (16, 16), (9, 8, 7)), "JPEG")


@pytest.mark.parametrize(
    "data, whole",
    [
        (WHOLE, True),
        (JPEG, True),
        (b"", False),
        (WHOLE[:-1], False),
        (WHOLE[: len(WHOLE) // 2], False),
        (WHOLE[:-20] + bytes(20), False),
        (bytes(len(WHOLE)), False),
        (JPEG[:-2], False),
        (b"\xff", False),
        (None, False),
    ],
)
def test_empty_and_cut_images_are_missing(tmp_path, data, whole):
    """Fails when a file that a crash left counts as done."""
    path = tmp_path / "pictures/0.png"
    path.parent.mkdir()
    if data is not None:
        path.write_bytes(data)
    assert image_files.is_whole(path) == whole
    unit = gallery.Unit("0.png", "a prompt", (0,))
    assert gallery.missing(tmp_path, [unit]) == ([] if whole else [unit])


def test_condition_draws_damaged_images_again(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a", "b", "c"):
        (source / f"{name}.png").write_bytes(WHOLE)
    drawing = condition.drawing("edges", None, None, None)
    targets = condition.targets(source, out, image_sets.found)
    condition.draw(targets, out, drawing)
    before = (out / "a.png").read_bytes()
    (out / "a.png").write_bytes(b"")
    (out / "b.png").write_bytes(before[:-30])
    (out / "c.png").write_bytes(stored(Image.new("RGB", (2, 2)), "PNG"))
    kept = (out / "c.png").read_bytes()
    condition.draw(targets, out, drawing)
    assert (out / "a.png").read_bytes() == (out / "b.png").read_bytes() == before
    assert (out / "c.png").read_bytes() == kept


def test_two_images_of_one_id_are_refused(tmp_path):
    """Fails when the one whose ending sorts last is scored without a word."""
    from sprint_jax.evaluation.prompt_sets import Prompt

    prompts = [Prompt("0", "a", {})]
    for name in ("0.png", "1.png", "1.gif"):
        (tmp_path / name).write_bytes(WHOLE)
    assert image_sets.with_prompts(tmp_path, prompts)[0] == [tmp_path / "0.png"]
    (tmp_path / "Dog.png").write_bytes(WHOLE)
    assert image_sets.with_prompts(tmp_path, [Prompt("dog", "a dog", {})])[0][0].name == "Dog.png"
    (tmp_path / "0.gif").write_bytes(WHOLE)
    with pytest.raises(UserError, match="0.gif and .*0.png would both be the image of 0"):
        image_sets.with_prompts(tmp_path, prompts)


@pytest.mark.parametrize("mark", ["\n", "\r\n", " "])
def test_base64_may_have_line_breaks(mark):
    """Encoders of mail break lines after 76 characters."""
    lines = base64.encodebytes(WHOLE).decode().strip().split("\n")
    assert len(lines) > 1
    for head in ("", "data:image/png;base64,"):
        found = uploads.from_base64(head + mark.join(lines), 16, 16)
        np.testing.assert_array_equal(found, captioned.decode_image(WHOLE))

"""Images that strangers send."""

import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from helpers.servers import LIMITS, image_file, refusal_of, request_body, to_base64
from sprint_jax.serving import schema, uploads
from sprint_jax.serving.refused import Refused
from sprint_jax.storage import image_files


def test_the_bytes_decide_the_format():
    """Fails where a file's declared type is trusted."""
    array = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    for file_format, options, most in (
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 100, "subsampling": 0}, 3),
    ):
        got = uploads.from_bytes(image_file(array, file_format, **options), 20, 20)
        assert got.shape == (20, 20, 3) and got.dtype == np.uint8
        assert np.abs(got.astype(int) - array).max() <= most
    disguised = "data:image/jpeg;base64," + to_base64(image_file(array))
    assert schema.parse(request_body(image=disguised), LIMITS).image.shape == (32, 32, 3)
    for file_format in ("GIF", "BMP", "TIFF", "PPM", "ICO", "PDF"):
        assert (
            refusal_of(
                uploads.from_bytes, image_file(Image.new("RGB", (16, 16)), file_format), 8, 8
            ).status
            == 415
        )
    for text in (
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"PK\x03\x04",
        b"\x00" * 100,
    ):
        assert refusal_of(uploads.from_bytes, text, 8, 8).status == 415


def png_of(width, height, *chunks):
    """Return a handmade PNG file. `chunks` are (name, data)."""
    chunk = lambda name, data: (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*one) for one in ((b"IHDR", header), *chunks, (b"IEND", b""))
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_by_their_header():
    for side in (5000, 12_000, 65_000, 2**31 - 1):
        begin = time.perf_counter()
        told = refusal_of(
            uploads.from_bytes, png_of(side, side, (b"IDAT", zlib.compress(b"\0" * 10_000))), 32, 32
        )
        assert told.status == 413
        assert "pixels" in told.sentence
        assert time.perf_counter() - begin < 0.5
    bomb = zlib.compress(b"\0" * 100_000_000, 9)
    for name in (b"zTXt", b"iCCP"):
        assert (
            refusal_of(
                uploads.from_bytes,
                png_of(8, 8, (name, b"k\0\0" + bomb), (b"IDAT", zlib.compress(b"\0" * 200))),
                8,
                8,
            ).status
            == 400
        )
    assert (
        refusal_of(uploads.from_bytes, b"\x89PNG" + b"x" * uploads.MOST_BYTES, 8, 8).status == 413
    )


def test_a_thin_image_is_not_blown_up():
    """Crop before scaling: one row of a million pixels would need terabytes."""
    begin = time.perf_counter()
    assert uploads.from_bytes(image_file(np.zeros((1, 1_000_000, 3), np.uint8)), 32, 32).shape == (
        32,
        32,
        3,
    )
    assert time.perf_counter() - begin < 2


def test_damaged_files_are_refused_or_read_but_never_fail_otherwise():
    rng = np.random.default_rng(1)
    for name in (b"pHYs", b"acTL"):  # too short: PIL raises ValueError, not OSError
        assert (
            refusal_of(
                uploads.from_bytes,
                png_of(8, 8, (name, b"\0"), (b"IDAT", zlib.compress(b"\0" * 200))),
                8,
                8,
            ).status
            == 400
        )
    for file_format in ("PNG", "JPEG", "WEBP"):
        whole = image_file(
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)), file_format
        )
        assert refusal_of(uploads.from_bytes, whole[: len(whole) // 2], 8, 8).status == 400
        for _ in range(100):
            data = bytearray(whole)
            for _ in range(3):
                data[rng.integers(len(data))] = rng.integers(256)
            try:
                assert uploads.from_bytes(bytes(data), 8, 8).shape == (8, 8, 3)
            except Refused as told:
                assert told.status in (400, 413, 415)


def test_orientation_alpha_depth_and_animation():
    half = np.zeros((20, 20, 3), np.uint8)
    half[:10] = 255  # white above black
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    turned = uploads.from_bytes(image_file(half, "JPEG", exif=exif, quality=100), 20, 20)
    assert turned[:, 15:].mean() > 240 and turned[:, :5].mean() < 15

    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (uploads.from_bytes(image_file(clear), 8, 8) == 255).all()
    assert (uploads.from_bytes(image_file(clear), 8, 8, background=image_files.BLACK) == 0).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert (uploads.from_bytes(image_file(palette, transparency=1), 8, 8) == 255).all()
    assert (uploads.from_bytes(image_file(palette), 8, 8)[0, 0] == [0, 0, 255]).all()

    deep = np.full((8, 8), 0x8040, np.uint16)
    assert (
        uploads.from_bytes(image_file(deep), 8, 8) == 0x80
    ).all()  # PIL's own conversion gives 255
    assert (
        uploads.from_bytes(image_file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), 8, 8)[
            ..., 0
        ]
        > 200
    ).all()

    frames = [Image.new("RGB", (8, 8), colour) for colour in ((0, 255, 0), (255, 0, 0))]
    for file_format in ("PNG", "WEBP"):
        moving = image_file(
            frames[0], file_format, save_all=True, append_images=frames[1:], lossless=True
        )
        assert (uploads.from_bytes(moving, 8, 8)[0, 0] == [0, 255, 0]).all()

"""Conditions of a ControlNet: edges and scribbles of images with known lines, and agreement of
maps.
"""

import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from helpers.runs import assert_refused
from sprint_jax.conditioning import sketches
from sprint_jax.data import captioned
from sprint_jax.evaluation import edges
from sprint_jax.toy import shapes


def flat(color, size=16):
    """Return an image of one color."""
    return np.broadcast_to(np.array(color, np.uint8), (1, size, size, 3)).copy()


def pixels(lines):
    """Return {(row, column)} of the lines of one map."""
    return set(zip(*map(np.ndarray.tolist, np.nonzero(lines)), strict=True))


# --- edges ---


@pytest.mark.parametrize("color", [shapes.BLACK, *shapes.COLORS.values()])
def test_a_flat_image_has_no_edges(color):
    assert not sketches.gradient_edges(flat(color)).any()


@pytest.mark.parametrize(
    "low, high",
    [(shapes.BLACK, (50, 90, 225)), ((16, 16, 20), (16, 16, 80)), ((0, 0, 0), (50, 0, 0))],
)
def test_a_half_plane_has_one_line_on_its_bright_side(low, high):
    """Take four orientations, with either side bright."""
    images = flat(low)
    images[:, :, 7:] = high
    expected = np.zeros((16, 16), np.uint8)
    expected[:, 7] = 255
    for quarter in range(4):
        found = sketches.gradient_edges(np.rot90(images, quarter, (1, 2)))
        assert found.dtype == np.uint8 and found.shape == (1, 16, 16)
        np.testing.assert_array_equal(found[0], np.rot90(expected, quarter))


def test_thresholds_are_steps_in_levels():
    """A step of STRONG draws its whole line, and one level less draws none.

    A fading line continues while it is above WEAK and does not begin below STRONG.
    """
    step = lambda heights: (
        np.stack([np.where(np.arange(16) < 8, 0, h) for h in heights])[None, ..., None]
        .repeat(3, -1)
        .astype(np.uint8)
    )
    count = lambda images: int((sketches.gradient_edges(images) > 0).sum())
    assert (sketches.STRONG, sketches.WEAK) == (50, 25)
    assert count(step([50] * 16)) == 16
    assert count(step([49] * 16)) == 0
    assert count(step(range(60, 12, -3))) == 12  # 60, 57, ... 27
    assert count(step(range(48, 0, -3))) == 0


def test_the_channel_with_the_largest_step_decides():
    """Red beside green of equal gray: a mean over channels would find nothing."""
    images = flat((200, 40, 90))
    images[:, :, 8:] = (40, 200, 90)
    assert (sketches.gradient_edges(images) > 0).sum() == 16


def test_noise_is_no_edge():
    """Thresholds are fixed: an image of nothing stays empty, whatever its largest gradient."""
    rng = np.random.default_rng(0)
    for ground in (shapes.BLACK, shapes.COLORS["blue"]):
        noise = np.clip(np.rint(rng.normal(ground, 6, (64, 32, 32, 3))), 0, 255).astype(np.uint8)
        assert not sketches.gradient_edges(noise).any()


def test_edges_turn_and_move_with_the_image():
    """Exactly, for any translation that keeps the objects inside, for quarter turns and for
    mirrors.
    """
    images = np.full((3, 48, 48, 3), shapes.BLACK, np.uint8)
    for i in range(3):
        images[i, 8:40, 8:40] = shapes.example(0, i, size=32).image
    images[:, :8] = images[:, 40:] = images[:, :, :8] = images[:, :, 40:] = images[:, 8:9, 8:9]
    lines = sketches.gradient_edges(images)
    assert (lines > 0).any((1, 2)).all()
    for by in ((3, -2), (-4, 0), (1, 4)):
        np.testing.assert_array_equal(
            sketches.gradient_edges(np.roll(images, by, (1, 2))), np.roll(lines, by, (1, 2))
        )
    np.testing.assert_array_equal(
        sketches.gradient_edges(np.rot90(images, 1, (1, 2))), np.rot90(lines, 1, (1, 2))
    )
    np.testing.assert_array_equal(sketches.gradient_edges(images[:, :, ::-1]), lines[:, :, ::-1])


def test_images_of_a_batch_do_not_mix():
    images = np.stack([shapes.example(0, i, size=32).image for i in range(6)])
    one_by_one = np.concatenate([sketches.gradient_edges(image[None]) for image in images])
    np.testing.assert_array_equal(sketches.gradient_edges(images), one_by_one)
    weak, strong = flat((0, 0, 0)), flat((0, 0, 0))
    weak[:, :, 8:], strong[:, :, 8:] = 40, 200
    found = sketches.gradient_edges(
        np.concatenate([weak, strong, weak])
    )  # a weak line is not continued by a neighbor's
    np.testing.assert_array_equal(found.any((1, 2)), [False, True, False])


def test_gradient_is_sobels():
    """Compare with scipy, channel by channel, on noise, borders included."""
    image = np.random.RandomState(0).randint(0, 256, (1, 20, 24, 3)).astype(np.uint8)
    gradients = [
        [ndimage.sobel(image[0, ..., c].astype(float), axis, mode="nearest") / 4 for axis in (0, 1)]
        for c in range(3)
    ]
    steepest = np.argmax([dy**2 + dx**2 for dy, dx in gradients], 0)
    square, dy, dx = sketches._steepest(image)
    for found, axis in ((dy, 0), (dx, 1)):
        expected = np.take_along_axis(np.stack([g[axis] for g in gradients]), steepest[None], 0)[0]
        np.testing.assert_array_equal(found[0], expected)
    np.testing.assert_array_equal(square, dy**2 + dx**2)


@pytest.mark.parametrize("background", [None, *shapes.COLORS])
def test_every_object_is_outlined(background):
    """All pairs of colors, all shapes, both sizes: a closed line within a pixel of the object's
    border, and nothing else.
    """
    for name in shapes.COLORS:
        for shape in shapes.SHAPES:
            for half in (3 / 32, 4 / 32, 8 / 32):
                if name == background:
                    continue
                placed = shapes.Object(name, shape, x=0.5, y=0.5, size=half)
                lines = (
                    sketches.gradient_edges(shapes.render([placed], background, 32)[None])[0] > 0
                )
                inside = shapes.coverage(shape, 16, 16, half * 32, 32) > 0.5
                border = ndimage.binary_dilation(inside, np.ones((3, 3))) & ~ndimage.binary_erosion(
                    inside, np.ones((3, 3))
                )
                assert not (lines & ~border).any(), (name, shape, half)
                # the regions that a line of eight neighbors separates
                regions, count = ndimage.label(~lines)
                assert count >= 2, (name, shape, half)
                assert regions[16, 16] not in (0, regions[0, 0]), (name, shape, half)


# --- scribbles ---


SIGMA = sketches.PUBLISHED_SIGMA


def ridge(size=64, column=30):
    """Return a vertical soft edge, Gaussian across, whose height grows from 120 to 250 along it."""
    across = np.exp(-(((np.arange(size) - column) / 5.0) ** 2) / 2)
    return np.rint(np.linspace(120, 250, size)[:, None] * across).astype(np.uint8)


def test_crests_of_a_ridge():
    """A band becomes the line of its crest where that is above RIDGE after smoothing; so does each
    row of a batch.
    """
    soft, size = ridge(), 64
    heights = (
        np.linspace(120, 250, size) * 5 / np.hypot(5, SIGMA)
    )  # Gaussians: the squares of widths add up, and areas stay
    inner = slice(13, 51)  # rows without influence of the border
    expected = np.zeros((size, size), np.uint8)
    expected[heights > sketches.RIDGE, 30] = 255
    assert expected[inner].any() and not expected[inner].all(0).any()
    found = sketches.crests(np.stack([soft, soft.T]), sigma=SIGMA)
    np.testing.assert_array_equal(found[0][inner], expected[inner])
    np.testing.assert_array_equal(found[1], found[0].T)
    assert (soft > sketches.RIDGE)[inner].sum() > 5 * (
        expected[inner] > 0
    ).sum()  # there was a wider band


def test_crests_are_maxima_along_any_of_four_lines():
    """Compare pixel by pixel with the definition, on noise.

    Beyond the border there is nothing to compare with.
    """
    noise = ndimage.gaussian_filter(np.random.RandomState(0).randn(40, 48), 2)
    soft = np.rint(180 + 200 * noise).clip(0, 255).astype(np.uint8)
    smooth = np.pad(
        ndimage.gaussian_filter(soft.astype(np.float32), 1.0, mode="mirror"),
        1,
        constant_values=-np.inf,
    )
    kept = np.zeros((4, *soft.shape), bool)
    for y, x in np.ndindex(*soft.shape):
        near = smooth[y : y + 3, x : x + 3]
        lines = (near[1], near[:, 1], np.diagonal(near), np.diagonal(near[::-1]))
        kept[:, y, x] = [near[1, 1] == line.max() and near[1, 1] > sketches.RIDGE for line in lines]
    assert all(
        (kept[i] & ~np.delete(kept, i, 0).any(0)).any() for i in range(4)
    )  # each of the four matters somewhere
    np.testing.assert_array_equal(sketches.crests(soft, sigma=1.0) > 0, kept.any(0))


def test_a_ring_becomes_a_ring_of_strokes():
    """The crest of a soft circle is within 1.5 pixels of it, and strokes reach 6 pixels to either
    side.
    """
    y, x = np.mgrid[:96, :96] - 48
    radius = np.hypot(x, y)
    soft = np.rint(255 * np.exp(-(((radius - 30) / 3) ** 2) / 2)).astype(np.uint8)
    strokes = sketches.scribble(soft, thickness=1, sigma=SIGMA) > 0
    assert strokes[np.abs(radius - 30) < 5].all()
    assert not strokes[np.abs(radius - 30) > 11].any()


@pytest.mark.parametrize(
    "thickness, width", [(0, 10), (1, 13), (2, 13), (3, 13), (4, 14), (5, 14), (24, 24)]
)
def test_thickness(thickness, width):
    """One vertical crest: 255 of the Gaussian of sigma 3 is above 4 up to six pixels away.

    Then squares of 4 and thickness

    2 are added.
    """
    strokes = sketches.scribble(ridge(), thickness=thickness, sigma=SIGMA)
    assert strokes.dtype == np.uint8 and set(np.unique(strokes)) == {0, 255}
    assert (strokes[40] > 0).sum() == width
    assert (
        strokes[-1] > 0
    ).sum() >= width - 2  # a stroke that leaves the image continues up to its border
    first = {0: 26, 1: 24, 2: 24, 3: 24, 4: 24, 5: 24, 24: 19}[
        thickness
    ]  # even squares reach one farther up and left
    assert np.flatnonzero(strokes[40])[0] == first


def test_scribbles_of_binary_lines():
    """At sigma 0.5 a line of one pixel is its own crest with a stroke of three pixels; at 3 it is
    too faint for one.
    """
    line = np.zeros((2, 16, 16), np.uint8)
    line[0, 8, :] = line[1, :, 5] = 255
    np.testing.assert_array_equal(sketches.crests(line, sigma=0.5), line)
    expected = np.zeros_like(line)
    expected[0, 7:10, :] = expected[1, :, 4:7] = 255
    np.testing.assert_array_equal(sketches.scribble(line, thickness=1, sigma=0.5), expected)
    assert not sketches.scribble(line, thickness=1, sigma=SIGMA).any()
    # Beside the line the value is 4.45 of 255 at this sigma: 4 in bytes, and no stroke.
    np.testing.assert_array_equal(sketches.scribble(line, thickness=1, sigma=0.353), line)


def test_scribbles_move_and_batch():
    soft = np.zeros((96, 96), np.uint8)
    soft[20:84, 20:84] = ridge()
    moved = np.roll(soft, (3, -4), (0, 1))
    both = sketches.scribble(np.stack([soft, moved]), thickness=3, sigma=SIGMA)
    np.testing.assert_array_equal(
        both[1][14:-14, 14:-14], np.roll(both[0], (3, -4), (0, 1))[14:-14, 14:-14]
    )
    np.testing.assert_array_equal(both[0], sketches.scribble(soft, thickness=3, sigma=SIGMA))
    with pytest.raises(ValueError, match="thickness -1"):
        sketches.scribble(soft, thickness=-1, sigma=SIGMA)


# --- the detector's input and output ---


@pytest.mark.parametrize(
    "height, width, resolution, size",
    [
        (512, 512, 512, (512, 512)),
        (480, 640, 512, (512, 704)),
        (1024, 333, 512, (1600, 512)),
        (10, 400, 64, (64, 2560)),
        (50, 50, 20, (64, 64)),
    ],
)
def test_detector_size(height, width, resolution, size):
    """The short side gets the resolution and the long one follows, both to the nearest 64:

    640 * 512 / 480 = 683 is nearer to 704.
    """
    assert sketches.detector_size(height, width, resolution) == size


def test_resize_for_detector():
    """An image of the right size is unchanged, and a smaller one consists of means over areas."""
    image = np.random.RandomState(0).randint(0, 256, (128, 192, 3)).astype(np.uint8)
    np.testing.assert_array_equal(sketches.resize_for_detector(image, 128), image)
    half = image.reshape(64, 2, 96, 2, 3)[:, :, :64].astype(float).mean((1, 3))
    found = sketches.resize_for_detector(np.ascontiguousarray(image[:, :128]), 64)
    assert found.shape == (64, 64, 3) and np.abs(found - half).max() <= 1


def test_levels_are_truncated():
    np.testing.assert_array_equal(
        sketches.to_uint8(np.array([0, 0.5, 254.9 / 255, 1])), [0, 127, 254, 255]
    )


def test_to_rgb():
    lines = np.array([[[0, 255]]], np.uint8)
    np.testing.assert_array_equal(sketches.to_rgb(lines), [[[[0, 0, 0], [255, 255, 255]]]])


# --- agreement ---


def test_agreement_of_shifted_lines():
    """Vertical lines dilate to three columns: moved by 0, 1, 2, 3 pixels they share 3 of 3, 2 of 4,
    1 of 5 and 0 of 6.
    """
    line = np.zeros((4, 16, 16), np.uint8)
    line[:, :, 6] = 255
    moved = np.stack([np.roll(line[i], i, 1) for i in range(4)])
    found = edges.agreement(line, moved)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [1, 2 / 4, 1 / 5, 0], rtol=1e-15)
    np.testing.assert_array_equal(found, edges.agreement(moved, line))
    np.testing.assert_array_equal(found, edges.agreement(line > 0, moved.astype(float) / 255))


def test_agreement_of_points():
    """Two points a knight's move apart: their squares of 9 share 2 x 1.

    At the border squares are cut.
    """
    points = np.zeros((2, 2, 9, 9), bool)
    points[0, 0, 4, 4] = points[1, 0, 5, 6] = True
    points[0, 1, 0, 0] = points[1, 1, 0, 1] = True
    np.testing.assert_allclose(edges.agreement(*points), [2 / 16, 4 / 6], rtol=1e-15)


def test_agreement_of_nothing():
    """Two empty maps agree, and an empty and another map do not. Images of a batch do not mix."""
    empty, some = np.zeros((8, 8)), np.eye(8)
    np.testing.assert_array_equal(
        edges.agreement(np.stack([empty, empty, some]), np.stack([empty, some, some])), [1, 0, 1]
    )
    with pytest.raises(ValueError, match="shapes"):
        edges.agreement(np.zeros((1, 8, 8)), np.zeros((8, 8)))


# --- the command ---


@pytest.fixture
def folder(tmp_path):
    """Return a folder of two images of different sizes, one of them in a subfolder."""
    (tmp_path / "in/more").mkdir(parents=True)
    Image.fromarray(shapes.example(0, 0, size=32).image).save(tmp_path / "in/a.png")
    Image.fromarray(shapes.example(0, 1, size=64).image).save(tmp_path / "in/more/b.bmp")
    return tmp_path / "in"


def test_command_sees_the_pixels_that_training_sees(command, tmp_path):
    """Rotated by EXIF, 16 bits of gray not clipped: the same as in `sprint-jax encode
    --condition`.
    """
    (tmp_path / "in").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(shapes.example(0, 0, size=64).image[:32]).save(
        tmp_path / "in/turned.jpg", exif=turned
    )
    Image.fromarray(np.kron([[1, 0], [0, 1]], np.full((16, 16), 40_000)).astype(np.uint16)).save(
        tmp_path / "in/deep.png"
    )
    result = command(
        "sprint_jax",
        "condition",
        f"--images={tmp_path / 'in'}",
        f"--out={tmp_path / 'out'}",
        "--kind=edges",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for name in ("turned.jpg", "deep.png"):
        image = captioned.decode_image((tmp_path / "in" / name).read_bytes())
        expected = sketches.to_rgb(sketches.gradient_edges(image[None]))[0]
        assert expected.any()
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / "out" / name.replace("jpg", "png"))), expected
        )


def test_command_writes_edges_and_keeps_them(command, folder, tmp_path):
    """Existing files are not made again, and a folder keeps to its settings."""
    flags = [f"--images={folder}", f"--out={tmp_path / 'out'}"]
    result = command("sprint_jax", "condition", *flags, "--kind=edges")
    assert result.returncode == 0, result.stderr[-3000:]
    for name, size in (("a", 32), ("more/b", 64)):
        image = shapes.example(0, ["a", "more/b"].index(name), size=size).image
        expected = sketches.to_rgb(sketches.gradient_edges(image[None]))[0]
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / f"out/{name}.png")), expected
        )
    assert json.loads((tmp_path / "out/condition.json").read_text()) == {"kind": "edges"}
    (tmp_path / "out/a.png").unlink()
    Image.new("RGB", (2, 2)).save(tmp_path / "out/more/b.png")
    kept = (tmp_path / "out/more/b.png").read_bytes()
    assert command("sprint_jax", "condition", *flags, "--kind=edges").returncode == 0
    assert (tmp_path / "out/a.png").exists()
    assert (tmp_path / "out/more/b.png").read_bytes() == kept
    assert_refused(
        command("sprint_jax", "condition", *flags, "--kind=hed", "--weights=w.pth"),
        "kind edges, not hed",
        "--out",
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--kind=hed"], ["--kind=hed", "--weights=ControlNetHED.pth", "--kind=edges"]),
        (["--kind=edges", "--thickness=3"], ["--thickness", "--kind=edges"]),
        (["--kind=scribble", "--weights=absent.pth", "--thickness=-1"], ["--thickness=-1"]),
        (["--kind=scribble", "--weights=absent.pth"], ["absent.pth", "ControlNetHED.pth"]),
        ([], ["--kind is missing"]),
        (["--kind=lines"], ["lines", "scribble"]),
    ],
)
def test_command_refuses(command, folder, tmp_path, flags, words):
    assert_refused(
        command(
            "sprint_jax",
            "condition",
            f"--images={folder}",
            f"--out={tmp_path / 'out'}",
            *flags,
        ),
        *words,
    )
    assert not list(tmp_path.glob("out/**/*.png"))
    assert not (tmp_path / "out/condition.json").exists()  # which would refuse the right command


def test_command_refuses_its_own_output(command, folder):
    assert_refused(
        command(
            "sprint_jax",
            "condition",
            f"--images={folder}",
            f"--out={folder / 'out'}",
            "--kind=edges",
        ),
        "--out",
        "--images",
    )
    (folder / "a.jpg").write_bytes((folder / "a.png").read_bytes())
    assert_refused(
        command(
            "sprint_jax",
            "condition",
            f"--images={folder}",
            f"--out={folder}2",
            "--kind=edges",
        ),
        "a.png",
        "a.jpg",
        "rename",
    )

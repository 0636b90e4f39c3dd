"""Rough sketches of `shapes`: they show their objects and look like strokes of the page."""

import dataclasses
import re

import numpy as np
import pytest

from helpers.configs import card
from helpers.runs import ROOT
from sprint_jax import build, config
from sprint_jax.conditioning import sketches
from sprint_jax.data import shapes_batches
from sprint_jax.toy import checker, freehand, shapes
from sprint_jax.training import datasets

CELLS = {(i + 0.5) / 4 for i in range(4)}


def compositions(count, **options):
    """Return examples whose objects may be anywhere."""
    return [shapes.example(3, i, anywhere=True, **options) for i in range(count)]


def rough_sketches(examples, size=32, split="train"):
    """Return rough sketches of examples."""
    return np.stack(
        [freehand.sketch(3, i, e.objects, size=size, split=split) for i, e in enumerate(examples)]
    )


def controlnet_config(**changes):
    """Return the `smoke` config of the ControlNet with changes to its section."""
    c = config.parse(card("controlnet"))
    return dataclasses.replace(c, control=dataclasses.replace(c.control, **changes))


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_compositions_match_their_captions(split):
    """Fails when a relation is accepted by `along >= abs(across)`, and when `_apart` is
    left out.
    """
    made = compositions(400, split=split)
    assert checker.chance(made, [e.caption for e in made]) == 1.0
    assert checker.score([e.image for e in made], [e.caption for e in made])[0] >= 0.99
    assert all(shapes.is_in(e.caption, split) and shapes.parse(e.text) == e.caption for e in made)


def test_objects_are_placed_anywhere_on_the_grid():
    """All cells, all corners of four cells, and inside.

    Fails when `_scatter` takes `_INNER`, or 0.5, instead of its cells.
    """
    made = compositions(2000)
    alone = [e.objects[0] for e in made if len(e.objects) == 1]
    assert {(o.x, o.y) for o in alone if o.size < 0.2} == {(x, y) for x in CELLS for y in CELLS}
    assert {(o.x, o.y) for o in alone if o.size > 0.2} == {
        (x / 4, y / 4) for x in (1, 2, 3) for y in (1, 2, 3)
    }
    assert all(o.size <= at <= 1 - o.size for e in made for o in e.objects for at in (o.x, o.y))
    related = [e.objects for e in made if e.caption.kind == "relation"]
    assert {(o.x, o.y) for pair in related for o in pair} == {(x, y) for x in CELLS for y in CELLS}


def test_random_streams_are_independent():
    """Other random draws of an example do not change it.

    Fails when `stream` leaves out its counter.
    """
    assert len({shapes.stream(3, 5, "train", name).random() for name in shapes.STREAMS}) == len(
        shapes.STREAMS
    )
    before = np.random.Generator(np.random.Philox(key=[3, 10])).random(8)
    np.testing.assert_array_equal(shapes.stream(3, 5, "train", "example").random(8), before)


def test_a_sketch_is_a_function_of_its_arguments():
    """Fails when seed, index or split is not in the stream."""
    e = shapes.example(3, 5, anywhere=True)
    draw = lambda seed=3, index=5, split="train": freehand.sketch(
        seed, index, e.objects, size=32, split=split
    )
    np.testing.assert_array_equal(draw(), draw())
    assert draw().shape == (32, 32) and draw().dtype == np.uint8
    assert (
        len(
            {
                draw().tobytes(),
                draw(seed=4).tobytes(),
                draw(index=6).tobytes(),
                draw(split="heldout").tobytes(),
            }
        )
        == 4
    )


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_without_wobble_an_outline_is_the_border(shape):
    """Corners have distance 0 and the polygon surrounds the area of the image.

    Fails with 20 corners, which miss those of a square.
    """
    still = freehand.outline(shape, 40.0, (0, 0, 0), (0, 0, 0))
    np.testing.assert_allclose(shapes.distance(shape, *still.T, 40.0), 0, atol=1e-3)
    x, y = still.T
    area = abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2
    assert area == pytest.approx(shapes.coverage(shape, 64, 64, 40, 128).sum(), rel=0.02)
    # With wobble, the outline moves in and out by its height.
    moved = np.hypot(*freehand.outline(shape, 40.0, (3, 0, 0), (0, 0, 0)).T) - np.hypot(x, y)
    np.testing.assert_allclose(moved, 3 * np.cos(2 * np.arctan2(y, x)), atol=1e-6)


@pytest.mark.parametrize("width", [0.64, 1.0, 1.92, 5.0])
def test_a_stroke_is_as_wide_as_its_pen(width):
    """The ink across a straight line is its width, below one pixel too.

    Fails when `width + 1` loses its 1 and when the cap is 1.
    """
    ink = freehand.stroke(np.array([[8.0, 16.3], [24.0, 16.3]]), width, 32)
    np.testing.assert_allclose(ink[:, 16].sum(), width, atol=1e-4)
    level = freehand.stroke(np.array([[8.0, 16.5], [24.0, 16.5]]), width, 32)[:, 16]
    np.testing.assert_allclose([level.sum(), level.max()], [width, min(width, 1)], atol=1e-4)
    reach = np.nonzero(ink.max(0))[
        0
    ]  # round ends: half a width beyond the line, and the half pixel of a gray border
    assert abs(reach[0] + 0.5 - (8 - width / 2)) <= 1
    assert abs(reach[-1] + 0.5 - (24 + width / 2)) <= 1


def test_pens_are_those_of_the_page():
    """Fails when page.js gets a pen that is finer or broader than those in training, and when
    `sketch` draws widths uniformly.
    """
    page = (ROOT / "sprint_jax/serving/page.js").read_text()
    pens = [float(w) for w in re.findall(r'\["(?:Fine|Pen|Brush)", ([\d.]+)\]', page)]
    assert len(pens) == 3 and (min(pens), max(pens)) == freehand.WIDTH
    big = (shapes.Object("red", "square", x=0.5, y=0.5, size=8 / 32),)
    ink = np.array(
        [freehand.sketch(0, i, big, size=32, split="train").sum() / 255 for i in range(400)]
    )
    widths = ink / (8 * 8 * np.mean(freehand.SCALE))  # approximate: ink over the length of the line
    assert 0.85 * 32 * pens[1] < np.median(widths) < 1.15 * 32 * pens[1]
    assert widths.min() < 1 and widths.max() > 4


def test_sketches_are_near_their_objects():
    """All ink is within reach of an object, and all objects have ink.

    Fails when SHIFT is 1/4, and when x and y are swapped.
    """
    made = compositions(300, size=64)
    drawn = rough_sketches(made, 64)
    ys, xs = (np.mgrid[:64, :64] + 0.5) / 64
    for e, ink in zip(made, drawn, strict=True):
        far = np.full((64, 64), np.inf)
        for o in e.objects:
            away = np.maximum(abs(xs - o.x), abs(ys - o.y))
            most = 1.3 * o.size + 1 / 8 + 1 / 32
            assert ink[away < most].sum() > 0
            far = np.minimum(far, away - most)
        assert ink[far > freehand.WIDTH[1] / 2 + 1 / 64].sum() == 0
    centers, one = [], (shapes.Object("red", "circle", x=0.375, y=0.625, size=4 / 32),)
    for i in range(500):
        rows, columns = np.nonzero(freehand.sketch(0, i, one, size=32, split="train"))
        centers.append([columns.mean() + 0.5, rows.mean() + 0.5])
    centers = np.array(centers) / 32 - [0.375, 0.625]
    assert np.abs(centers.mean(0)).max() < 0.02
    assert np.abs(np.corrcoef(centers.T)[0, 1]) < 0.15
    assert (np.abs(centers).max(0) > 0.1).all()
    assert np.abs(centers).max() < 1 / 8 + 1 / 32


def test_the_share_of_rough_examples():
    """Of 4000 examples the same ones are rough in any batch.

    Fails when `is_rough` looks at the first stream.
    """
    assert not any(freehand.is_rough(0, i, 0.0) for i in range(100))
    assert all(freehand.is_rough(0, i, 1.0) for i in range(100))
    for share in (0.25, 0.5):
        rough = np.array([freehand.is_rough(0, i, share) for i in range(4000)])
        assert abs(rough.mean() - share) < 0.03
    kinds = np.array([shapes.example(0, i).caption.kind for i in range(4000)])
    assert all(abs(rough[kinds == kind].mean() - 0.5) < 0.06 for kind in ("count", "relation"))


def test_batches_hold_rough_sketches_of_clean_images():
    """Each row is the usual example with its edges, or a composition with its sketch.

    Without a share all rows are usual ones.
    """
    c = controlnet_config(freehand=0.5)
    with datasets.Shapes(c).batches(16, 1, 2, 0, 1) as ahead:
        rows = next(ahead)
    codec = build.codec(c)
    rough = [freehand.is_rough(c.data.seed, i, 0.5) for i in range(16, 32)]
    assert 0 < sum(rough) < 16
    for row, is_rough in enumerate(rough):
        e = shapes.example(c.data.seed, 16 + row, anywhere=is_rough)
        lines = sketches.gradient_edges(e.image[None])[0]
        if is_rough:
            lines = freehand.sketch(c.data.seed, 16 + row, e.objects, size=32, split="train")
        np.testing.assert_allclose(rows["latent"][row], codec.encode(e.image[None])[0], atol=1e-5)
        np.testing.assert_allclose(
            rows["control"][row], codec.encode(sketches.to_rgb(lines)[None])[0], atol=1e-5
        )
    options = dict(seed=0, batch=16, size=32, codec=codec, text_encoder=build.text_encoder(c))
    plain = shapes_batches.make_batch(1, **options)
    np.testing.assert_array_equal(
        shapes_batches.make_batch(1, **options, freehand=0.5)["latent"], plain["latent"]
    )


def test_checkpoints_know_the_share():
    """Without a ControlNet the share does not count, and the identity is the old one.

    Fails when `Shapes.identity` omits the share.
    """
    names = [
        datasets.Shapes(controlnet_config(**k)).identity
        for k in ({"freehand": 0.0}, {"freehand": 0.5}, {"freehand": 0.25}, {"depth": 0})
    ]
    assert len(set(names)) == 3 and names[0] == names[3] == "drawn shapes"


def test_heldout_sketches_are_judged_by_the_true_edges():
    """Fails when the edges are those of the sketches, and when the sketches are those of the
    training split.
    """
    data = datasets.Shapes(controlnet_config(freehand=0.5))
    rough, clean = data.freehand(6, 4), data.heldout(6, 4)
    np.testing.assert_array_equal(rough.edges, sketches.gradient_edges(rough.images))
    for i in range(6):
        e = shapes.example(1, i, split="heldout", anywhere=True)
        np.testing.assert_array_equal(rough.images[i], e.image)
        np.testing.assert_array_equal(
            rough.sketches[i], freehand.sketch(1, i, e.objects, size=32, split="heldout")
        )
        assert rough.captions[i] == e.text and shapes.is_heldout(e.caption)
    shown = build.codec(controlnet_config()).encode(sketches.to_rgb(rough.sketches))
    np.testing.assert_allclose(rough.cond["control"], shown, atol=1e-6)
    np.testing.assert_array_equal(clean.sketches, clean.edges)
    assert datasets.Shapes(controlnet_config(freehand=0.0)).freehand(6, 4) is None
    assert datasets.Shapes(controlnet_config(depth=0)).freehand(6, 4) is None

"""The diversity of images: what counts as an arrangement, and the figures of known generators."""

import numpy as np
import pytest

from sprint_jax.toy import diversity, shapes
from sprint_jax.toy.diversity import NONE

CAPTION = shapes.parse("a red circle left of a blue square")


def image(caption, index):
    return shapes.render(shapes.arrange(caption, index), caption.background, 32)


def test_images_are_read_as_they_were_drawn():
    """Fails when places or sizes are rounded to the neighbors'."""
    for index in range(200):
        example = shapes.example(3, index, split="heldout")
        known = diversity.possible(example.caption)
        number = diversity.read(example.image[None], [example.caption])[0, 0]
        assert known[number] == diversity.arrangement(example.objects)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("a red circle left of a blue square", 8),  # 2 starts, 2 levels, 2 sizes
        ("two red circles", 16),  # along a row or a column
        ("three red circles", 8),
        ("a red circle", 9),  # 4 places of two sizes, and a large one
        ("a circle", 54),  # of each color
        ("a circle on a red background", 45),
    ],
)
def test_arrangements_of_captions(text, count):
    assert len(diversity.possible(shapes.parse(text))) == count


def test_wrong_images_and_other_places_do_not_count():
    right = image(CAPTION, 0)
    other = shapes.render(shapes.parse("a red circle").objects[:0], None, 32)
    moved = np.roll(right, 3, 1)  # three pixels are no place of the data
    assert diversity.read(np.stack([right, other, moved]), [CAPTION])[0, 1:].tolist() == [NONE] * 2
    assert diversity.read(right[None], [CAPTION])[0, 0] >= 0


def test_effective_numbers():
    assert diversity.effective(np.array([2, 2, 2, NONE])) == pytest.approx(1)
    assert diversity.effective(np.array([0, 1, 2, 3])) == pytest.approx(4)
    assert diversity.effective(np.array([0, 0, 0, 1])) == pytest.approx(4 / 3**0.75)
    assert diversity.effective(np.array([NONE, NONE])) == 0


def test_the_data_show_every_arrangement_alike():
    """64 images of each of 8 captions by the data's own law: near 8 of 8, and none missing."""
    asked = [c for c in diversity.captions("heldout", 30, seed=1) if c.kind == "relation"][:8]
    images = np.stack([image(c, 7000 + i) for c in asked for i in range(64)])
    found = diversity.figures(diversity.read(images, asked), asked)
    assert 7.0 < found["arrangements"] <= 8
    assert found["never_drawn"] < 0.02
    one = np.stack([image(c, 0) for c in asked for _ in range(4)])
    collapsed = diversity.figures(diversity.read(one, asked), asked)
    assert collapsed["arrangements"] == pytest.approx(1)
    assert collapsed["never_drawn"] == pytest.approx(7 / 8)


def test_sameness_is_counted_where_the_other_is_right():
    ours, theirs = np.array([[0, 1, NONE, 3]]), np.array([[0, 2, 5, NONE]])
    assert diversity.same(ours, theirs) == pytest.approx(1 / 3)


def test_captions_are_distinct_and_of_their_split():
    asked = diversity.captions("final", 64, seed=1)
    assert len({caption.text() for caption in asked}) == 64
    assert all(shapes.is_in(caption, "final") for caption in asked)

"""How well fresh heads separate, measured outside the training."""

import numpy as np
import pytest

from benchmarks import discriminator


def test_share_of_pairs_is_the_area_under_the_curve():
    """By hand, and Phi(d / sqrt 2) for two Gaussians at distance d.

    Fails when the sides are swapped.
    """
    assert discriminator.higher([1.0, 2.0], [0.0, 1.5]) == 0.75
    rng = np.random.default_rng(0)
    assert discriminator.higher(rng.normal(size=4000) + 1, rng.normal(size=4000)) == pytest.approx(
        0.7602, abs=0.015
    )

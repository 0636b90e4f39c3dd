"""Repair on data whose consistency function is known: what its hops do, and when it drifts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import oracles
from sprint_jax.diffusion import flow, repair

pytestmark = pytest.mark.usefixtures("no_rank_promotion")

DRAWS = 40_000


def consistency(data):
    """Return the exact one-step student of the data, as a flow network."""

    def v(x, t):
        t = t[:, None]
        return oracles.average(data, x, t, jnp.zeros_like(t))

    return v


def hopped(data, y, s, count=1, ratio=0.5, seed=0):
    """Return y after hops from s, for many draws of noise, [DRAWS]."""
    noises = np.random.default_rng(seed).normal(size=(count, DRAWS, 1))
    values = jnp.full((DRAWS, 1), y)
    times = jnp.full((DRAWS,), s)
    v0, noises = consistency(data), jnp.asarray(noises)
    return repair.hops(v0, never, values, noises, times, ratio=ratio, steps=0)[:, 0]


def never(x, t):
    """Fail: without steps the teacher is not asked."""
    raise AssertionError("the teacher was asked")


@pytest.mark.parametrize("s", [0.3, 0.7])
def test_a_hop_pulls_toward_the_center_of_a_gaussian(s):
    """The mean and spread of a hop are known. Fails for other weights of image and noise."""
    with jax.enable_x64(True):
        data, y = oracles.Gaussian(), 1.7
        found = hopped(data, y, s)
        k = data.s / float(data.std(s))
        mean = data.m + k * (1 - s) * (y - data.m)
        assert found.mean() == pytest.approx(mean, abs=4 * k * s / np.sqrt(DRAWS))
        assert found.std() == pytest.approx(k * s, rel=0.02)


def test_the_second_hop_begins_at_a_share_of_the_time():
    """Two hops shrink by both factors. Fails when the time is not scaled, or noise is reused."""
    with jax.enable_x64(True):
        data, y, s = oracles.Gaussian(), 1.7, 0.7
        found = hopped(data, y, s, count=2)
        k = [data.s / float(data.std(t)) for t in (s, s / 2)]
        mean = data.m + k[0] * (1 - s) * k[1] * (1 - s / 2) * (y - data.m)
        variance = (k[0] * s * k[1] * (1 - s / 2)) ** 2 + (k[1] * s / 2) ** 2
        assert found.mean() == pytest.approx(mean, abs=0.01)
        assert found.var() == pytest.approx(variance, rel=0.03)


def test_the_data_are_where_hops_lead():
    """Images of the data's spread keep it, so what drifts is the expected image, not the law."""
    with jax.enable_x64(True):
        data, rng = oracles.Mixture(), np.random.default_rng(3)
        y = np.where(rng.random(DRAWS) < 0.7, 1.0, -0.6) + data.s * rng.normal(size=DRAWS)
        noises = jnp.asarray(rng.normal(size=(2, DRAWS, 1)))
        s = jnp.full((DRAWS,), 0.7)
        y = jnp.asarray(y)[:, None]
        v0 = consistency(data)
        found = repair.hops(v0, never, y, noises, s, ratio=0.5, steps=0)[:, 0]
        places = np.linspace(-1.2, 1.8, 13)
        shares = (np.asarray(found)[:, None] < places).mean(0)
        wanted = [float(data.cdf(place, 0.0)) for place in places]
        np.testing.assert_allclose(shares, wanted, atol=0.01)


def test_blends_of_two_modes_become_one_of_them():
    """Between narrow modes nothing stays; an image inside a mode keeps its mode from small s.

    Fails when the hop begins so low that the frozen student cannot move a blend.
    """
    with jax.enable_x64(True):
        data = oracles.Mixture(s=0.05)
        blended = lambda y: np.minimum(abs(y - 1.0), abs(y + 0.6)) > 0.25
        assert blended(0.25)
        assert blended(hopped(data, 0.25, 0.7, count=2)).mean() < 0.02
        assert blended(hopped(data, 0.25, 0.1)).mean() > 0.1
        kept = lambda s: (hopped(data, 1.0, s) > 0.2).mean()
        assert kept(0.3) > 0.97 and kept(0.9) < 0.8


def test_the_teacher_leads_where_the_exact_student_does():
    """From s to rho s by the solver and on by the student: second order in the step.

    Fails for a step of the wrong length, or a student that is asked at the wrong time.
    """
    with jax.enable_x64(True):
        data, rng = oracles.Mixture(), np.random.default_rng(4)
        y, n = jnp.asarray(rng.normal(size=(64, 1))), jnp.asarray(rng.normal(size=(1, 64, 1)))
        s, v0 = jnp.linspace(0.5, 0.8, 64), consistency(data)
        v = lambda x, t: data.velocity(x, t[:, None])
        exact = repair.hops(v0, never, y, n, s, ratio=0.5, steps=0)
        error = lambda k: jnp.abs(repair.hops(v0, v, y, n, s, ratio=0.5, steps=k) - exact).max()
        assert error(16) < 5e-3
        assert 3.0 < error(16) / error(32) < 5.0


def test_the_teacher_takes_the_bias_of_a_wrong_student_away():
    """A frozen student that sends all of the middle to one mode moves mass there by itself.

    With the teacher from s to rho s the shares of the data's modes stay.
    """
    with jax.enable_x64(True):
        data, rng = oracles.Mixture(), np.random.default_rng(3)
        y = np.where(rng.random(DRAWS) < 0.7, 1.0, -0.6) + data.s * rng.normal(size=DRAWS)
        y, n = jnp.asarray(y)[:, None], jnp.asarray(rng.normal(size=(1, DRAWS, 1)))
        s, right = jnp.full((DRAWS,), 0.7), consistency(data)

        def wrong(x, t):
            low = (x + 0.6) / t[:, None]  # the velocity that ends at -.6
            return jnp.where((t[:, None] > 0.5) & (jnp.abs(x) < 0.5), low, right(x, t))

        v = lambda x, t: data.velocity(x, t[:, None])
        share = lambda steps: float(
            (repair.hops(wrong, v, y, n, s, ratio=0.5, steps=steps) > 0.2).mean()
        )
        assert share(0) < 0.6
        assert share(4) == pytest.approx(1 - float(data.cdf(0.2, 0.0)), abs=0.02)


def test_no_gradient_passes_hops():
    y, n = jnp.ones((2, 3)), jnp.ones((1, 2, 3))

    def hop(y, a):
        v = lambda x, t: a * x
        return repair.hops(v, v, y, n, jnp.ones(2), ratio=0.5, steps=2).sum()

    for slope in jax.grad(hop, (0, 1))(y, 0.3):
        assert not np.any(slope)


def test_the_nearest_try_is_taken_for_each_image():
    y = jnp.asarray([[0.0, 0.0], [1.0, 1.0]])
    tries = jnp.asarray([[[3.0, 0.0], [1.0, 1.5]], [[0.0, 2.0], [4.0, 1.0]]])
    np.testing.assert_array_equal(repair.nearest(y, tries), [[0.0, 2.0], [1.0, 1.5]])
    assert not jax.grad(lambda y: repair.nearest(y, tries).sum())(y).any()


def test_the_nearest_of_two_tries_keeps_the_mode():
    """An image halfway to another mode: by one try a third leave, by the nearer of two few."""
    with jax.enable_x64(True):
        data = oracles.Mixture(s=0.05)
        one, two = (hopped(data, 0.55, 0.8, seed=seed)[:, None] for seed in (1, 2))
        y = jnp.full_like(one, 0.55)
        gone = lambda found: float((found < 0.2).mean())
        assert 0.1 < gone(one) < 0.5
        assert gone(repair.nearest(y, jnp.stack([one, two]))) < 0.6 * gone(one)


def test_trimming_counts_where_the_error_is_small():
    e = jnp.asarray([[0.1, 0.1], [0.9, 0.1], [0.0, 0.4]])
    values = jnp.asarray([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(repair.trimmed(values, e, 0.09), [1.0, 0.0, 3.0])
    slope = jax.grad(lambda e: repair.trimmed(values * e[:, 0], e, 0.09).sum())(e)
    np.testing.assert_array_equal(slope[:, 0], [1.0, 0.0, 3.0])


def test_denoising_ends_a_straight_line():
    x0, z = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    t = jnp.asarray([0.1, 0.4, 0.7, 1.0])
    xt = flow.interpolate(x0, z, t)
    np.testing.assert_allclose(flow.denoise(z - x0, xt, t), x0, atol=1e-6)

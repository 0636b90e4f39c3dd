"""Rewards against closed forms: policies of Gaussians, Bradley-Terry pairs, cross entropies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sprint_jax.diffusion import reward

pytestmark = [pytest.mark.second_pass, pytest.mark.usefixtures("no_rank_promotion")]

SIGMA_D = 0.5


@pytest.fixture(autouse=True)
def double():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


def grid(count=10):
    """Return two independent standard normals at nodes [N, 2], and their weights."""
    e, w = np.polynomial.hermite_e.hermegauss(count)
    w = w / w.sum()
    both = np.stack(np.meshgrid(e, e, indexing="ij"), -1).reshape(-1, 2)
    return both, (w[:, None] * w).ravel()


def test_golden_slope_of_a_log_probability():
    """t = .3, n = 1: 6.465456 for every element. Fails for a mean over elements."""
    x0_hat, t = jnp.array([[0.4, -0.1]]), jnp.array([0.3])
    a = jnp.cos(0.3) * x0_hat + jnp.sin(0.3) * SIGMA_D
    slope = jax.grad(lambda x: reward.log_prob(a, x, t).sum())(x0_hat)
    np.testing.assert_allclose(slope, 6.465456, atol=1e-6)
    moved = jax.grad(lambda a: reward.log_prob(a, x0_hat, t).sum())(a)
    np.testing.assert_array_equal(moved, 0)


def test_the_policy_gradient_is_that_of_the_expected_reward():
    """R = -|a - b|^2: d E R / d x0_hat = -2 cos (cos x0_hat - b). Fails for a wrong sign."""
    n, w = grid()
    t, x0, b = 0.9, np.array([0.4, -0.2]), np.array([0.1, 0.5])
    a = np.cos(t) * x0 + np.sin(t) * SIGMA_D * n
    R = -np.square(a - b).sum(-1)
    A = jnp.asarray(R - (w * R).sum())

    def loss(x, clip=0.2):
        lp = lambda x: reward.log_prob(
            jnp.asarray(a), jnp.tile(x, (len(n), 1)), jnp.full(len(n), t)
        )
        return (w * reward.policy_loss(lp(x), lp(jnp.asarray(x0)), A, clip)).sum()

    wanted = -2 * np.cos(t) * (np.cos(t) * x0 - b)
    np.testing.assert_allclose(-jax.grad(loss)(jnp.asarray(x0)), wanted, atol=1e-10)


def test_the_clip_bounds_what_a_ratio_can_gain():
    A = jnp.array([1.0, 1.0, -1.0, -1.0])
    log_q = jnp.log(jnp.array([1.5, 0.5, 1.5, 0.5]))
    loss = lambda lp: reward.policy_loss(lp, jnp.zeros(4), A, 0.2).sum()
    slope = jax.grad(loss)(log_q)
    np.testing.assert_allclose(slope, [0.0, -0.5, 1.5, 0.0], atol=1e-12)


def test_an_advantage_leaves_the_sample_itself_out():
    A = reward.advantage(jnp.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), 3)
    np.testing.assert_allclose(A, [1.0, -0.5, -0.5, 0.0, 0.0, 0.0])


def test_pairs_tilt_the_reference_by_the_reward():
    """Two outcomes: p1 / p2 = (ref1 / ref2) exp((r1 - r2) / beta) under Bradley-Terry labels."""
    ref, r, beta = np.array([0.7, 0.3]), np.array([0.0, 1.2]), 2.0
    wins = 1 / (1 + np.exp(-(r[0] - r[1])))

    def loss(logit):
        change = logit - np.log(ref[0] / ref[1])
        pair = functools.partial(reward.pair_loss, beta=beta, different=jnp.ones(1))
        first = pair(jnp.array([change]), jnp.zeros(1))
        other = pair(jnp.zeros(1), jnp.array([change]))
        return (wins * first + (1 - wins) * other).sum()

    best = np.log(ref[0] / ref[1]) + (r[0] - r[1]) / beta
    assert float(jax.grad(loss)(best)) == pytest.approx(0, abs=1e-12)
    swapped = 2 * np.log(ref[0] / ref[1]) - best
    assert abs(float(jax.grad(loss)(swapped))) > 0.1


def test_a_pairs_slope_at_the_reference():
    """-beta / 2 (a_w - a_l) cos / (sin^2 sigma_d^2), and none for a tie."""
    t, x0, beta = 0.7, 0.1, 3.0
    w, worse = jnp.array([[0.5]]), jnp.array([[-0.2]])
    ref = [reward.log_prob(a, jnp.array([[x0]]), jnp.array([t])) for a in (w, worse)]

    def loss(x, different=1.0):
        now = [reward.log_prob(a, x[None, None], jnp.array([t])) for a in (w, worse)]
        gaps = [one - old for one, old in zip(now, ref, strict=True)]
        return reward.pair_loss(*gaps, beta=beta, different=jnp.array([different])).sum()

    wanted = -beta / 2 * 0.7 * np.cos(t) / (np.sin(t) * SIGMA_D) ** 2
    assert float(jax.grad(loss)(jnp.asarray(x0))) == pytest.approx(wanted, rel=1e-9)
    assert float(jax.grad(loss)(jnp.asarray(x0), 0.0)) == 0


def test_a_proxy_is_still_at_the_verdicts_own_log_odds():
    verdict = jnp.array([0.2, 0.5, 0.9])
    slope = jax.grad(lambda logit: reward.verdict_loss(logit, verdict).sum())
    np.testing.assert_allclose(slope(jnp.log(verdict / (1 - verdict))), 0, atol=1e-12)
    np.testing.assert_allclose(slope(jnp.zeros(3)), 0.5 - verdict, atol=1e-12)
    wish = jax.grad(lambda logit: reward.wish(logit).sum())(jnp.array([-9.0, 0.0, 9.0]))
    np.testing.assert_allclose(wish, [-0.99987661, -0.5, -1.2339e-4], rtol=1e-4)

"""Rollouts of a teacher whose flow is known, and distances against NumPy and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import oracles
from sprint_jax.diffusion import distances, rollout, samplers, trigflow

pytestmark = [pytest.mark.second_pass, pytest.mark.usefixtures("no_rank_promotion")]


def run(data, steps, order, shift=2.0):
    """Return (rollout, its times) of a few noises in float64."""
    times = samplers.flow_times(steps, shift).astype(np.float64)
    z = np.random.default_rng(0).normal(size=(7, 2))
    v = lambda x, t: data.velocity(x, t[:, None])
    return rollout.rollout(v, jnp.asarray(z), times, order=order), times


@pytest.mark.parametrize("data", oracles.ALL, ids=lambda data: type(data).__name__)
@pytest.mark.parametrize("order", [1, 2])
def test_rollouts_converge_in_their_order(data, order):
    """Fails when second order weighs the velocity before wrongly for uneven steps."""
    with jax.enable_x64(True):

        def error(steps):
            route, _ = run(data, steps, order)
            one, zero = jnp.ones((7, 1)), jnp.zeros((7, 1))
            return np.abs(route.states[-1] - data.X(route.states[0], one, zero)).max()

        assert error(128) / error(256) == pytest.approx(2**order, rel=0.2)


def test_states_and_velocities_belong_together():
    """Each velocity is the teacher's at its state; second order begins with Euler's step."""
    with jax.enable_x64(True):
        data = oracles.Gaussian()
        (states, velocities), times = run(data, 5, 2)
        assert states.shape == (6, 7, 2) and velocities.shape == (5, 7, 2)
        for x, v, t in zip(states[:-1], velocities, times[:-1], strict=True):
            np.testing.assert_allclose(v, data.velocity(x, t), atol=1e-12)
        np.testing.assert_allclose(
            states[1], states[0] - (times[0] - times[1]) * velocities[0], atol=1e-12
        )
        d, before = times[1] - times[2], times[0] - times[1]
        mixed = (1 + d / before / 2) * velocities[1] - d / before / 2 * velocities[0]
        np.testing.assert_allclose(states[2], states[1] - d * mixed, atol=1e-12)


def test_first_order_is_the_rotation_of_trigflow():
    with jax.enable_x64(True):
        data = oracles.Mixture()
        angles = np.linspace(np.pi / 2, 0, 7)
        z = np.random.default_rng(1).normal(size=(4, 3))
        F = lambda u, t: oracles.trig_velocity(data, u, t)
        rotated = samplers.trigflow_euler(F, jnp.asarray(z), angles)
        times = np.asarray(trigflow.to_flow_time(jnp.asarray(angles)))
        v = lambda x, t: data.velocity(x, t[:, None])
        states = rollout.rollout(v, jnp.asarray(z), times, order=1).states
        np.testing.assert_allclose(states[-1], rotated, atol=1e-12)


def test_no_gradient_passes_a_rollout():
    times = samplers.flow_times(3)
    end = lambda s: rollout.rollout(lambda x, t: s * x, jnp.ones((2, 3)), times, order=2).states
    assert jax.grad(lambda s: end(s).sum())(0.5) == 0


def test_another_order_is_refused():
    with pytest.raises(ValueError, match="order 3: use 1 or 2"):
        rollout.rollout(lambda x, t: x, jnp.ones((2, 3)), samplers.flow_times(2), order=3)


def test_jitter_stays_between_neighbors():
    """Fails when a time leaves its interval, the first moves, or all share one draw."""
    times = samplers.flow_times(15, 2.5)
    drawn = np.stack([rollout.jittered(jax.random.key(i), times) for i in range(400)])
    assert (drawn[:, 0] == 1).all()
    assert (drawn[:, 1:] <= times[:-1]).all() and (drawn[:, 1:] >= times[1:]).all()
    place = (drawn[:, 1:] - times[1:]) / (times[:-1] - times[1:])
    np.testing.assert_allclose(place.mean(0), 0.5, atol=0.06)
    assert np.abs(np.corrcoef(place.T) - np.eye(15)).max() < 0.25


E = np.random.default_rng(2).normal(size=(4, 3, 2, 5)).astype(np.float32)
E *= np.array([0.01, 0.1, 1.0, 10.0], np.float32).reshape(-1, 1, 1, 1)
M = np.square(E, dtype=np.float64).mean((1, 2, 3))


@pytest.mark.parametrize(
    ("distance", "wanted"),
    [
        (distances.square, M),
        (lambda e: distances.pseudo_huber(e, 0.1), np.sqrt(M + 0.01) - 0.1),
        (
            lambda e: distances.token_huber(e, 0.03),
            (np.sqrt(np.square(E, dtype=np.float64).mean(-1) + 0.0009) - 0.03).mean((1, 2)),
        ),
        (lambda e: distances.cauchy(e, 0.2), np.log1p(M / 0.08)),
        (lambda e: distances.adaptive(e, 0.01), M / (M + 0.01)),
        (lambda e: distances.adaptive(e, 0.01, 0.5), M / np.sqrt(M + 0.01)),
    ],
    ids=["square", "pseudo_huber", "token_huber", "cauchy", "adaptive", "adaptive .5"],
)
def test_distances(distance, wanted):
    np.testing.assert_allclose(distance(jnp.asarray(E)), wanted, rtol=2e-5)


@pytest.mark.parametrize(
    ("distance", "power"),
    [
        (distances.square, 1),
        (lambda e: distances.pseudo_huber(e, 1e-3), 0),
        (lambda e: distances.cauchy(e, 1e-3), -1),
        (lambda e: distances.adaptive(e, 1e-5), -1),
    ],
    ids=["square", "pseudo_huber", "cauchy", "adaptive"],
)
def test_how_large_errors_count(distance, power):
    """The norm of the gradient grows as the error's power. Fails without the stopped weight."""
    size = lambda e: np.linalg.norm(jax.grad(lambda e: distance(e).sum())(e))
    small, large = (size(jnp.asarray(scale * E[2:3])) for scale in (1, 10))
    assert np.log10(large / small) == pytest.approx(power, abs=0.02)

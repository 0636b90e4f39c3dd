"""Flow matching and TrigFlow: maps between them, paths, time samplers and the flow loss."""

import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.arrays import max_error, normal_arrays
from sprint_jax.diffusion import flow, trigflow

pytestmark = [pytest.mark.second_pass, pytest.mark.usefixtures("no_rank_promotion")]

BATCH, SHAPE = 16, (16, 3, 4, 2)
ANGLES = np.linspace(0, math.pi / 2, BATCH).astype(np.float32)


def draw(count, seed=0):
    """Return `count` float32 arrays of N(0, 1)."""
    return normal_arrays(*[SHAPE] * count, seed=seed)


def column(t):
    """Return [B] as a float64 NumPy array [B, 1, 1, 1]."""
    return np.asarray(t, np.float64)[:, None, None, None]


def test_time_maps_are_inverse():
    """Fails when from_flow_time swaps its arguments, and when to_flow_time divides by sin - cos."""
    t = ANGLES.astype(np.float64)
    expected = 1 / (1 + np.tan(math.pi / 2 - t))  # 1 / (1 + cot t)
    tau = trigflow.to_flow_time(ANGLES)
    assert max_error(tau, expected) < 1e-6
    assert max_error(trigflow.from_flow_time(tau), t) < 1e-6
    # The map keeps the signal-to-noise ratio.
    assert (
        max_error((1 - np.asarray(tau, np.float64)[1:]) * np.sin(t[1:]), tau[1:] * np.cos(t[1:]))
        < 1e-6
    )


def test_state_map_turns_the_trig_path_into_the_flow_path():
    """Fails when to_flow_state divides by flow_norm, and when flow_norm loses its square root."""
    data, noise = draw(2)
    u = trigflow.interpolate(data, noise, ANGLES)
    tau = trigflow.to_flow_time(ANGLES)
    x_fm = trigflow.to_flow_state(u, ANGLES)
    c = column(tau)
    assert max_error(x_fm, (1 - c) * data + c * noise) < 1e-5
    assert max_error(x_fm, flow.interpolate(data, noise, tau)) < 1e-5
    assert max_error(trigflow.from_flow_state(x_fm, tau), u) < 1e-5


def test_paths_against_numpy():
    """Fails when the sin and cos of trigflow.interpolate or the weights of flow.interpolate are
    swapped.
    """
    data, noise = draw(2)
    angle, tau = column(ANGLES), column(ANGLES / 2)
    expected = np.cos(angle) * data + np.sin(angle) * noise
    assert max_error(trigflow.interpolate(data, noise, ANGLES), expected) < 1e-6
    assert (
        max_error(flow.interpolate(data, noise, ANGLES / 2), (1 - tau) * data + tau * noise) < 1e-6
    )


def test_exact_flow_velocity_becomes_the_exact_trig_velocity():
    """Prop. 3.1: z - x0 becomes cos(t) z - sin(t) x0.

    Fails when (1 - 2 t) of Eq. (8) becomes (1 + 2 t).
    """
    data, noise = draw(2)
    u = trigflow.interpolate(data, noise, ANGLES)
    F = trigflow.from_flow(lambda x, t: noise - data)(u, ANGLES)
    angle = column(ANGLES)
    assert max_error(F, np.cos(angle) * noise - np.sin(angle) * data) < 1e-5
    # The result is the derivative of the path: at t = 0 it is the noise alone.
    assert max_error(F[0], noise[0]) < 1e-6 and max_error(F[-1], -data[-1]) < 1e-5


def test_velocity_maps_are_inverse():
    """Fails when 2 t^2 of to_flow_velocity becomes t^2, which from_flow_velocity contradicts."""
    F, u = draw(2)
    tau = trigflow.to_flow_time(ANGLES)
    x_fm = trigflow.to_flow_state(u, ANGLES)
    v = trigflow.to_flow_velocity(F, u, ANGLES)
    assert max_error(trigflow.from_flow_velocity(v, x_fm, tau), F) < 1e-5
    data, noise = draw(2, seed=1)
    angle = column(ANGLES)
    exact = np.cos(angle) * noise - np.sin(angle) * data
    exact_u = np.cos(angle) * data + np.sin(angle) * noise
    back = trigflow.to_flow_velocity(*(a.astype(np.float32) for a in (exact, exact_u)), ANGLES)
    assert max_error(back, noise - data) < 1e-5


def test_network_wrappers_are_inverse():
    """Fails when to_flow calls F at t_FM instead of the angle, and when from_flow skips the state
    map.
    """
    (x,) = draw(1)
    network = lambda x, t: jnp.tanh(x * (1 + flow.expand(t, x))) + jnp.sin(3 * flow.expand(t, x))
    tau = np.linspace(0, 1, BATCH).astype(np.float32)
    assert max_error(trigflow.to_flow(trigflow.from_flow(network))(x, tau), network(x, tau)) < 1e-5
    assert (
        max_error(trigflow.from_flow(trigflow.to_flow(network))(x, ANGLES), network(x, ANGLES))
        < 1e-5
    )


def test_wrapped_network_is_differentiable():
    """Compare jvp with central differences.

    Fails when to_flow_state has a stop_gradient on its factor.

    The wrapper rounds the state to float32, so state and direction are multiples of 1/64 and the
    difference step is a power of two: every shifted state is exact.
    """
    u, du = (np.round(a * 64) / 64 for a in draw(2))
    network = lambda x, t: jnp.sin(x * (1 + flow.expand(t, x)))
    with jax.enable_x64(True):
        t, dt = jnp.asarray(ANGLES, jnp.float64) * 0.98 + 0.01, jnp.linspace(-1, 1, BATCH)
        F = jax.jit(trigflow.from_flow(network))
        _, J = jax.jvp(F, (jnp.asarray(u), t), (jnp.asarray(du), dt))
        h = 2.0**-11
        difference = lambda h: (F(u + h * du, t + h * dt) - F(u - h * du, t - h * dt)) / (2 * h)
        extrapolated = (4 * difference(h) - difference(2 * h)) / 3
        assert J.dtype == jnp.float64 and max_error(J, extrapolated) < 1e-7


def test_derivatives_are_finite_at_both_ends():
    """Fails when from_flow_time is written as arctan(t / (1 - t)), whose derivative at 1 is NaN."""
    ends = jnp.array([0.0, 1.0])
    _, slope = jax.jvp(trigflow.from_flow_time, (ends,), (jnp.ones(2),))
    np.testing.assert_allclose(slope, [1.0, 1.0], rtol=1e-6)
    _, slope = jax.jvp(trigflow.to_flow_time, (jnp.array([0.0, math.pi / 2]),), (jnp.ones(2),))
    np.testing.assert_allclose(slope, [1.0, 1.0], rtol=1e-6)


def test_denoise():
    """The result is x_t at t = 0 for any F, and the data for the exact F.

    Fails when its minus sign becomes plus.
    """
    data, noise = (trigflow.SIGMA_D * a for a in draw(2))
    xt = trigflow.interpolate(data, noise, ANGLES)
    np.testing.assert_array_equal(
        trigflow.denoise(1e3 * noise, xt, np.zeros(BATCH, np.float32)), xt
    )
    angle = column(ANGLES)
    F = (np.cos(angle) * noise - np.sin(angle) * data) / 0.5
    assert max_error(trigflow.denoise(F.astype(np.float32), xt, ANGLES), data) < 1e-5


@pytest.mark.parametrize(("mean", "std"), [(0.2, 1.6), (-0.6, 1.0)])
def test_trig_time_sampler(mean, std):
    """Median and outer quantiles have a closed form. Fails when e^n / sigma_d loses its sigma_d."""
    draw = jax.jit(lambda key: trigflow.sample_time(key, 100_000, mean=mean, std=std))
    t = np.asarray(draw(jax.random.key(0)))
    for share in (0.1, 0.5, 0.9):
        n = mean + std * statistics.NormalDist().inv_cdf(share)
        assert abs(np.quantile(t, share) - math.atan2(math.exp(n), 0.5)) < 0.01
    assert t.min() > 0 and t.max() < math.pi / 2


def test_max_time_share():
    """Fails when with_max_time replaces times where the draw is false."""
    t = np.full(40_000, 0.7, np.float32)
    for probability in (0.0, 0.3, 1.0):
        changed = np.asarray(trigflow.with_max_time(jax.random.key(1), t, probability))
        at_max = changed == np.float32(math.pi / 2)
        assert abs(at_max.mean() - probability) < (0.01 if 0 < probability < 1 else 1e-9)
        np.testing.assert_array_equal(changed[~at_max], t[~at_max])


def test_flow_time_sampler():
    """Check quantiles of the logit-normal, then its shift.

    Fails when (shift - 1) in sample_time becomes shift.
    """
    mean, std = -0.4, 0.8
    key = jax.random.key(2)
    draw = jax.jit(lambda shift: flow.sample_time(key, 100_000, mean=mean, std=std, shift=shift))
    plain, shifted = (np.asarray(draw(s), np.float64) for s in (1.0, 3.0))
    for share in (0.1, 0.5, 0.9):
        n = mean + std * statistics.NormalDist().inv_cdf(share)
        assert abs(np.quantile(plain, share) - 1 / (1 + math.exp(-n))) < 0.01
    # The shift multiplies the odds of noise against data.
    assert max_error(shifted / (1 - shifted), 3 * plain / (1 - plain)) < 1e-4


def test_flow_loss_closed_form():
    """Fails when the target z - x0 becomes z + x0, and when the mean becomes a sum."""
    data, noise = draw(2)
    t = np.linspace(0, 1, BATCH).astype(np.float32)
    value = flow.loss(lambda x, t: 2 * x - flow.expand(t, x), data, noise, t)
    x = (1 - column(t)) * data + column(t) * noise
    residual = 2 * x - column(t) - (noise.astype(np.float64) - data)
    assert max_error(value, (residual**2).mean((1, 2, 3))) < 1e-5
    assert np.abs(flow.loss(lambda x, t: noise - data, data, noise, t)).max() == 0

"""Flow maps against data whose flow is known: zero at the exact map, and nowhere near it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import oracles
from helpers.arrays import same_bits
from sprint_jax.diffusion import flow_map, samplers, scm, trigflow

pytestmark = [pytest.mark.second_pass, pytest.mark.usefixtures("no_rank_promotion")]

SIGMA_D = 0.5
T = np.array([0.4, 0.7, 1.0, 1.3, 1.5])
R = np.array([0.1, 0.3, 0.5, 0.2, 0.9])
U = np.random.default_rng(0).normal(size=(5, 3)) * 0.8


@pytest.fixture(autouse=True)
def double():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


def exact(data):
    """Return the exact map as a student (u, t, r) -> (F, None)."""
    return lambda u, t, r: (oracles.trig_map(data, u, t, r), None)


def velocity(data):
    """Return dx_t/dt of the data at scale sigma_d."""
    return lambda xt, t: SIGMA_D * oracles.trig_velocity(data, xt / SIGMA_D, t)


def near(data, amount):
    """Return the exact map plus a bump that vanishes nowhere, as a student."""

    def F(u, t, r):
        bump = u * jnp.cos(t + r)[:, None]
        return oracles.trig_map(data, u, t, r) + amount * bump, None

    return F


def stopped(F):
    """Return the value of a student without gradient."""
    return lambda u, t, r: jax.lax.stop_gradient(F(u, t, r)[0])


@pytest.mark.parametrize(
    ("x", "t", "r", "values"),
    [
        (0.7, 0.9, 0.2, (-0.121513760, -0.252661157, 0.876862810)),
        (-1.3, 0.5, 0.0, (-3.457906459, -1.953617112, -0.323191444)),
        (0.25, 1.0, 0.4, (-0.550000000, -0.571572617, 0.592943570)),
    ],
)
def test_golden_values_of_a_gaussian(x, t, r, values):
    """(x, t, r) -> velocity, average velocity, jump; from a derivation of its own."""
    data = oracles.Gaussian()
    found = data.velocity(x, t), oracles.average(data, x, t, r), data.X(x, t, r)
    np.testing.assert_allclose(found, values, atol=1e-9)


@pytest.mark.parametrize(
    ("x", "t", "r", "values"),
    [
        (0.4, 0.8, 0.2, (-0.232335516, -0.650595248, 0.790357149)),
        (-0.9, 0.7, 0.3, (-1.453366928, -0.603958100, -0.658416760)),
        (0.05, 0.95, 0.1, (-0.496115323, -0.822460482, 0.749091410)),
    ],
)
def test_golden_values_of_a_mixture(x, t, r, values):
    data, (x, t, r) = oracles.Mixture(), map(jnp.float64, (x, t, r))
    found = data.velocity(x, t), oracles.average(data, x, t, r), data.X(x, t, r)
    np.testing.assert_allclose(found, values, atol=1e-9)


@pytest.mark.parametrize(
    ("u", "t", "r", "values"),
    [
        (0.7, 1.4, 0.3, (0.105559155, 0.001245568, 0.316407225)),
        (-1.2, 0.9, 0.1, (-0.775765908, -0.420022493, -0.534742357)),
        (0.4, 1.5, 0.0, (0.024875786, -0.112294791, 0.140308371)),
    ],
)
def test_golden_values_in_angles(u, t, r, values):
    """(u, t, r) -> F_T, F, jump at unit scale."""
    data, u = oracles.Gaussian(0.35, 0.0), jnp.array([[u]])
    t, r = jnp.array([t]), jnp.array([r])
    F = oracles.trig_map(data, u, t, r)
    X = flow_map.jump(F, SIGMA_D * u, t - r) / SIGMA_D
    found = oracles.trig_velocity(data, u, t), F, X
    np.testing.assert_allclose(np.ravel(found), values, atol=1e-9)


@pytest.mark.parametrize("data", oracles.ALL, ids=lambda data: type(data).__name__)
def test_a_jump_in_angles_is_the_jump_in_flow_time(data):
    """Eq. (8) carries average velocities as well. Fails when the jump turns the other way."""
    t_fm, r_fm = trigflow.to_flow_time(T), trigflow.to_flow_time(R)
    X = flow_map.jump(oracles.trig_map(data, U, T, R), SIGMA_D * U, T - R) / SIGMA_D
    x_fm = trigflow.to_flow_state(U, T)
    wanted = data.X(x_fm, t_fm[:, None], r_fm[:, None])
    np.testing.assert_allclose(trigflow.to_flow_state(X, jnp.asarray(R)), wanted, atol=1e-12)


@pytest.mark.parametrize("data", oracles.ALL, ids=lambda data: type(data).__name__)
def test_eulerian_is_zero_at_the_exact_map(data):
    xt = SIGMA_D * U
    _, _, g = flow_map.eulerian(exact(data), velocity(data)(xt, T), xt, T, R, warm=1.0)
    np.testing.assert_allclose(g, 0, atol=1e-12)
    _, _, g = flow_map.eulerian(near(data, 0.1), velocity(data)(xt, T), xt, T, R, warm=1.0)
    assert np.abs(g).max() > 1e-3


def test_eulerian_without_end_is_scm():
    """Fails in any bit when the jump's angle or the warm-up enters elsewhere than in sCM."""
    weights = np.random.default_rng(1).normal(size=(3, 3))
    F = lambda u, t: (jnp.tanh(u @ weights + t[:, None]), t)
    xt, v = SIGMA_D * U, SIGMA_D * jnp.cos(U @ weights)
    ours = flow_map.eulerian(lambda u, t, r: F(u, t), v, xt, T, jnp.zeros(5), warm=0.6)
    for one, other in zip(ours, scm.consistency(F, v, xt, T, r=0.6), strict=True):
        assert same_bits(one, other)


def test_eulerian_on_the_diagonal_is_flow_matching():
    """At r = t the target is the velocity itself, whatever the student's derivative is."""
    xt, v = SIGMA_D * U, np.ones_like(U)
    F = lambda u, t, r: (jnp.sin(3 * u) * t[:, None] + r[:, None], None)
    value, _, g = flow_map.eulerian(F, v, xt, T, T, warm=1.0)
    np.testing.assert_allclose(g, -(SIGMA_D * value - v), atol=1e-12)


@pytest.mark.parametrize("data", oracles.ALL, ids=lambda data: type(data).__name__)
@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_lagrangian_vanishes_with_the_teachers_step(data, heun, order):
    """Fails when the teacher is asked at x_t, or its step goes the wrong way."""
    F, xt = exact(data), SIGMA_D * U

    def error(delta):
        found, _ = flow_map.lagrangian(
            F, stopped(F), velocity(data), xt, T, R, delta=delta, heun=heun
        )
        return np.abs(found).max()

    large, small = error(0.02), error(0.01)
    assert small < 0.06
    assert large / small == pytest.approx(2**order, rel=0.12)


@pytest.mark.parametrize("data", oracles.ALL, ids=lambda data: type(data).__name__)
def test_two_jumps_are_one(data):
    F, xt, q = exact(data), SIGMA_D * U, (T + R) / 2
    error, _ = flow_map.semigroup(F, stopped(F), xt, T, q, R)
    np.testing.assert_allclose(error, 0, atol=1e-12)
    F = near(data, 0.1)
    error, _ = flow_map.semigroup(F, stopped(F), xt, T, q, R)
    assert np.abs(error).max() > 1e-3


@pytest.mark.parametrize("method", ["eulerian", "lagrangian", "semigroup"])
@pytest.mark.parametrize("data", oracles.ALL, ids=lambda data: type(data).__name__)
def test_losses_lead_back_to_the_exact_map(data, method):
    """The gradient in the size of a bump around the exact map. Fails for a wrong sign."""
    xt, q = SIGMA_D * U, (T + R) / 2

    def loss(amount):
        F = near(data, amount)
        if method == "eulerian":
            v = velocity(data)(xt, T)
            value, _, g = flow_map.eulerian(F, v, xt, T, R, warm=1.0)
            error = value - jax.lax.stop_gradient(value) - g
        elif method == "lagrangian":
            error, _ = flow_map.lagrangian(
                F, stopped(F), velocity(data), xt, T, R, delta=0.01, heun=True
            )
        else:
            error, _ = flow_map.semigroup(F, stopped(F), xt, T, q, R)
        return jnp.square(error).mean()

    slopes = [float(jax.grad(loss)(amount)) for amount in (-0.2, 0.2)]
    assert slopes[0] < -1e-4 < 1e-4 < slopes[1]


@pytest.mark.parametrize("data", oracles.ALL, ids=lambda data: type(data).__name__)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_jumps_reach_the_end_in_any_number_of_steps(data, steps):
    noise = np.random.default_rng(2).normal(size=(6, 2))
    times = jnp.asarray(np.linspace(np.pi / 2, 0, steps + 1))
    found = samplers.jumps(lambda u, t, r: oracles.trig_map(data, u, t, r), noise, times)
    one, zero = jnp.ones((6, 1)), jnp.zeros((6, 1))
    np.testing.assert_allclose(found, data.X(noise, one, zero), atol=1e-9)

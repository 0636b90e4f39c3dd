"""Whole trainings in one dimension: does each loss, from the teacher's start, reach the exact map?

The student's average velocity is linear, theta(t, r) x with Chebyshev polynomials of degree 8 in
both flow times. The teacher is that of data N(0, .35^2). Every loss gets 4000 updates of Adam,
those by a tangent, which are slower, 16000. In one step noise of size 1 should become .35;
untrained it becomes less than .05. Limits are about twice the errors seen; a map that is trained
from noise alone is right from noise alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import oracles
from sprint_jax.diffusion import distances, flow, flow_map, rollout, trigflow
from sprint_jax.objectives import cmt

pytestmark = pytest.mark.long

SIGMA_D, T_MAX, DEGREE, BATCH = 0.5, np.pi / 2, 8, 256
DATA = oracles.Gaussian(0.35, 0.0)
ROUTE = np.linspace(1, 0, 17)


@pytest.fixture(autouse=True)
def double():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


def chebyshev(t):
    """Return the polynomials of degree 0 to 8 at flow times t [N]: [N, 9]."""
    y = 2 * t - 1
    terms = [jnp.ones_like(y), y]
    for _ in range(DEGREE - 1):
        terms.append(2 * y * terms[-1] - terms[-2])
    return jnp.stack(terms, -1)


def average(c):
    """Return the student as a flow map (x, t, r) -> average velocity, x [N, 1], in flow time."""
    return lambda x, t, r: jnp.einsum("ni,ij,nj->n", chebyshev(t), c, chebyshev(r))[:, None] * x


def student(c):
    """Return the student (u, t, r) -> (F, None) in angles, u [N, 1]."""

    def F(u, t, r):
        t_fm, x = trigflow.to_flow_time(t), trigflow.to_flow_state(u, t)
        v = average(c)(x, t_fm, trigflow.to_flow_time(r))
        return trigflow.from_flow_velocity(v, x, t_fm), None

    return F


def velocity(xt, t):
    """Return dx_t/dt of the teacher at scale sigma_d."""
    return SIGMA_D * oracles.trig_velocity(DATA, xt / SIGMA_D, t)


def states(t):
    """Return one standard deviation of x_t at scale sigma_d [N, 1]."""
    return SIGMA_D * jnp.sqrt((0.35 * jnp.cos(t)) ** 2 + jnp.sin(t) ** 2)[:, None]


def teachers_start():
    """Return the coefficients whose student is the teacher, whatever r is."""
    t = jnp.linspace(0, 1, 200)
    fit = jnp.linalg.lstsq(chebyshev(t), DATA.velocity(jnp.ones(200), t))[0]
    return jnp.zeros((DEGREE + 1, DEGREE + 1)).at[:, 0].set(fit)


def eulerian(c, t, q, r):
    """Return the error without the factor cos(t - r) of a tangent, 0 at the noise."""
    t = jnp.minimum(t, 1.57)
    xt = states(t)
    value, _, g = flow_map.eulerian(student(c), velocity(xt, t), xt, t, r, warm=1.0)
    return value - jax.lax.stop_gradient(value) - g / (SIGMA_D * jnp.cos(t - r)[:, None])


def consistency(c, t, q, r):
    return eulerian(c, t, q, jnp.zeros_like(t))


def lagrangian(heun, from_noise=False):
    def error(c, t, q, r):
        t = jnp.full_like(t, T_MAX) if from_noise else t
        F = student(c)
        still = lambda u, t, r: jax.lax.stop_gradient(F(u, t, r)[0])
        return flow_map.lagrangian(F, still, velocity, states(t), t, r, delta=0.025, heun=heun)[0]

    return error


def semigroup(c, t, q, r):
    F, xt = student(c), states(t)
    still = lambda u, t, r: jax.lax.stop_gradient(F(u, t, r)[0])
    error, _ = flow_map.semigroup(F, still, xt, t, q, r)
    diagonal = SIGMA_D * F(xt / SIGMA_D, t, t)[0] - velocity(xt, t)
    return jnp.concatenate([error[: BATCH // 2], diagonal[BATCH // 2 :]])


def mid_training(every):
    """Return CMT on one rollout of 16 steps of second order, to its end or to all later states."""
    v = lambda x, t: DATA.velocity(x, t[:, None])

    def loss(c, t, q, r):
        nodes = rollout.rollout(v, jnp.ones((1, 1)), ROUTE, order=2).states[:, 0]
        path = jnp.broadcast_to(nodes, (16, *nodes.shape))
        i = jnp.arange(16)
        j = i + 1 + jnp.floor((16 - i) * q[:16] / T_MAX).astype(int) if every else 16
        j = jnp.broadcast_to(jnp.minimum(j, 16), (16, 16))
        return cmt.term(average(c), path, jnp.asarray(ROUTE), j, c=0.05)[0][:, None]

    return loss


def train(error, updates, plain):
    """Return the coefficients after training. plain: the loss is the square of the error."""
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, updates), b2=0.999)

    def step(carry, key):
        c, opt = carry
        r, q, t = trigflow.from_flow_time(jnp.sort(jax.random.uniform(key, (3, BATCH)), 0))
        i = jnp.arange(BATCH)
        r, t = jnp.where(i % 4 == 0, 0.0, r), jnp.where(i % 8 == 0, T_MAX, t)
        # Steps of a solver need room between the two times.
        r = jnp.minimum(r, jnp.maximum(t - 0.03, 0.0))

        def loss(c):
            e = error(c, t, jnp.maximum(q, r), r)
            return (distances.square(e) if plain else e).mean()

        changes, opt = tx.update(jax.grad(loss)(c), opt)
        return (optax.apply_updates(c, changes), opt), None

    def whole():
        c = teachers_start()
        keys = jax.random.split(jax.random.key(0), updates)
        return jax.lax.scan(step, (c, tx.init(c)), keys)[0][0]

    return jax.jit(whole)()


def gains(c):
    """Return what noise of size 1 becomes in one jump, and in two by way of flow time 1/2."""
    one, half, zero = jnp.full(1, T_MAX), jnp.full(1, T_MAX / 2), jnp.zeros(1)
    F = student(c)
    hop = lambda xt, t, r: flow_map.jump(F(xt / SIGMA_D, t, r)[0], xt, t - r)
    noise = jnp.full((1, 1), SIGMA_D)
    single = hop(noise, one, zero)
    double = hop(hop(noise, one, half), half, zero)
    return float(single[0, 0] / SIGMA_D), float(double[0, 0] / SIGMA_D)


def test_the_start_is_the_teachers_own_step():
    """Without training one step leaves nearly nothing; so the trainings below show something."""
    x = flow.denoise(DATA.velocity(jnp.ones((1, 1)), 1.0), jnp.ones((1, 1)), jnp.ones(1))
    single, _ = gains(teachers_start())
    assert single == pytest.approx(float(x[0, 0]), abs=0.01)
    assert abs(single) < 0.05


@pytest.mark.parametrize(
    ("error", "updates", "one", "two"),
    [
        pytest.param(eulerian, 16000, 0.1, 0.1, id="eulerian"),
        pytest.param(consistency, 16000, 0.07, 0.08, id="sCM, r = 0 alone"),
        pytest.param(lagrangian(False), 4000, 0.04, 0.02, id="lagrangian, Euler"),
        pytest.param(lagrangian(True), 4000, 0.02, 0.03, id="lagrangian, Heun"),
        pytest.param(lagrangian(True, True), 4000, 0.02, None, id="lagrangian, from noise alone"),
        pytest.param(semigroup, 4000, 0.07, 0.07, id="semigroup"),
        pytest.param(mid_training(False), 4000, 0.01, None, id="CMT, ends"),
        pytest.param(mid_training(True), 4000, 0.01, 0.01, id="CMT, all pairs"),
    ],
)
def test_a_training_reaches_the_exact_map(error, updates, one, two):
    single, double = gains(train(error, updates, error.__name__ != "loss"))
    print(f"one step {single:.4f}, two {double:.4f}")
    assert single == pytest.approx(0.35, abs=one)
    if two is not None:
        assert double == pytest.approx(0.35, abs=two)

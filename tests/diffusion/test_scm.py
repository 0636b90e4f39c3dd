"""sCM against NumPy and against Gaussian data, whose velocity and consistency function are known.

With x0 ~ N(0, s^2) and z ~ N(0, sigma_d^2) the path has variance a(t)^2 = cos^2 s^2 + sin^2
sigma_d^2. The PF-ODE scales its state by a, so x(t) = x(t') a(t) / a(t') and the consistency
function is s x / a(t).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.arrays import max_error, normal_arrays
from sprint_jax.diffusion import scm

pytestmark = [pytest.mark.second_pass, pytest.mark.usefixtures("no_rank_promotion")]

SIGMA_D = 0.5
S = 0.2
BATCH, SHAPE = 8, (8, 3, 4, 2)
SIZE = 24
T = np.linspace(0.05, 1.55, BATCH)


def draw(count, seed=0):
    """Return `count` float64 arrays of N(0, sigma_d^2)."""
    arrays = normal_arrays(*[SHAPE] * count, seed=seed, dtype=np.float64)
    return [SIGMA_D * a for a in arrays]


def column(t):
    """Return [B] as a NumPy array [B, 1, 1, 1]."""
    return np.asarray(t).reshape(-1, 1, 1, 1)


def traced_column(t):
    """Return a traced [B] as [B, 1, 1, 1]."""
    return jnp.reshape(t, (-1, 1, 1, 1))


def std_at(t, np=np):
    """Return a(t)."""
    return np.sqrt(np.cos(t) ** 2 * S**2 + np.sin(t) ** 2 * SIGMA_D**2)


def velocity(xt, t, np=np, column=column):
    """Return dx_t/dt of Gaussian data: (a'/a) x."""
    t = column(t)
    return np.sin(t) * np.cos(t) * (SIGMA_D**2 - S**2) / std_at(t, np) ** 2 * xt


def exact_F(u, t):
    """Return the output of a network whose Eq. (4) is the consistency function s x / a(t).

    It has no logvar.
    """
    t = traced_column(t)
    return u * (jnp.cos(t) - S / std_at(t, jnp)) / jnp.sin(t), None


def velocity_F(u, t):
    """Return the output of a network that gives the velocity itself: a teacher."""
    return velocity(u, t, jnp, traced_column), None


def odd_F(u, t, p=0.7):
    """Return (velocity, logvar) of a network that belongs to no data.

    The velocity is nonlinear and mixes positions.
    """
    t = traced_column(t)
    value = jnp.sin(p * u + 2 * t) + t * jnp.tanh(jnp.roll(u, 1, 2)) * u
    return value, p * jnp.cos(t[:, 0, 0, 0]) - 0.3


def central(function, h=1e-3):
    """Return d function(h) / dh at 0 in float64 from central differences, extrapolated once."""
    slope = lambda h: (np.asarray(function(h)) - np.asarray(function(-h))) / (2 * h)
    return (4 * slope(h) - slope(2 * h)) / 3


def slope_along_ode(F, xt):
    """Return cos(t) df/dt of F's consistency function along the exact solution, by differences."""

    def f(h):
        t = column(T + h)
        x = xt * std_at(t) / std_at(column(T))
        return np.cos(t) * x - np.sin(t) * SIGMA_D * np.asarray(F(x / SIGMA_D, T + h)[0])

    return np.cos(column(T)) * central(f)


def path(x0, z):
    """Return x_t of the path from x0 to z at the times T."""
    return np.cos(column(T)) * x0 + np.sin(column(T)) * z


def test_tangent_of_exact_consistency_function_is_zero():
    """Fails when the second cos * sin of scm.tangent becomes -, and when J is not scaled by
    sigma_d.
    """
    xt = path(*draw(2))
    with jax.enable_x64(True):
        v = velocity(xt, T)
        _, _, g = jax.jit(lambda: scm.consistency(exact_F, v, xt, T, r=1.0))()
        _, _, wrong = jax.jit(lambda: scm.consistency(velocity_F, v, xt, T, r=1.0))()
    assert np.abs(g).max() < 1e-12
    assert np.abs(wrong).max() > 1e-2


@pytest.mark.parametrize("F", [velocity_F, odd_F])
def test_tangent_is_the_slope_along_the_ode(F):
    """Fails when cos^2 in scm.tangent becomes +, and when either input tangent loses its factor."""
    xt = path(*draw(2))
    with jax.enable_x64(True):
        v = velocity(xt, T)
        value, _, g = jax.jit(lambda: scm.consistency(F, v, xt, T, r=1.0))()
        expected = slope_along_ode(F, xt)
        direct = F(xt / SIGMA_D, T)[0]
    assert max_error(g, expected) < 1e-8
    assert max_error(value, direct) < 1e-12


def test_forward_mode_derivative():
    """Compare J alone, which r scales, with differences. Fails when v loses its 1 / sigma_d.

    g(r = 0) - g(r = 1) = cos sin x_t + sigma_d J.
    """
    xt = path(*draw(2))
    c = np.cos(T) * np.sin(T)
    with jax.enable_x64(True):
        v = velocity(xt, T) + 0.3
        g = jax.jit(lambda r: scm.consistency(odd_F, v, xt, T, r=r)[2])
        shifted = lambda h: odd_F(xt / SIGMA_D + h * column(c) * v / SIGMA_D, T + h * c)[0]
        expected = central(shifted)
        still, half, full = (np.asarray(g(r)) for r in (0.0, 0.5, 1.0))
        F = odd_F(xt / SIGMA_D, T)[0]
    assert max_error((still - full - column(c) * xt) / SIGMA_D, expected) < 1e-8
    assert max_error(still, -column(np.cos(T) ** 2) * (SIGMA_D * np.asarray(F) - v)) < 1e-12
    assert max_error(half - still, (full - still) / 2) < 1e-10


def paper_tangent(x0, z, v, r):
    """Return cos(t) df/dt with warm-up from Eq. (5), by differences and in float64."""
    t, xt = column(T), path(x0, z)
    F = np.asarray(odd_F(xt / SIGMA_D, T)[0])
    dF_dt = central(lambda h: odd_F((xt + h * v) / SIGMA_D, T + h)[0])
    first = -np.cos(t) * (SIGMA_D * F - v)
    second = -np.sin(t) * (xt + SIGMA_D * dF_dt)
    return np.cos(t) * (first + r * second)


def unit(g):
    """Return g / (||g|| + 0.1) for each sample."""
    norm = np.sqrt((g**2).sum((1, 2, 3), keepdims=True))
    return g / (norm + 0.1)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weighting", ["code", "paper"])
def test_loss_value(weighting, normalize):
    """Fails when the prior becomes tan(t), when e^-logvar becomes e^logvar, and when + logvar
    becomes -.
    """
    x0, z = draw(2)
    r = 0.4
    with jax.enable_x64(True):
        network = lambda x, t: velocity(x, t, jnp, traced_column) + 0.1
        v = velocity(path(x0, z), T) + 0.1
        loss = jax.jit(
            lambda: scm.loss(
                odd_F, network, x0, z, T, r=r, weighting=weighting, normalize=normalize
            )
        )
        value, aux = loss()
        g = paper_tangent(x0, z, v, r)
        logvar = np.asarray(odd_F(x0, T)[1])
    used = unit(g) if normalize else g
    square = (used**2).sum((1, 2, 3))
    if weighting == "code":
        expected = 1 / (SIGMA_D * np.tan(T)) / np.exp(logvar) * square / SIZE + logvar
    else:
        w = -logvar
        expected = np.exp(w) / SIZE * square - w
    np.testing.assert_allclose(value, expected, rtol=1e-7)
    np.testing.assert_allclose(aux["error"], square / SIZE, rtol=1e-7)
    np.testing.assert_allclose(aux["tangent_norm"], np.sqrt((g**2).sum((1, 2, 3))), rtol=1e-7)
    np.testing.assert_allclose(aux["logvar"], logvar, rtol=1e-12)


def test_loss_gradient_is_the_published_one():
    """The student's gradient is -2 g dF/dp under the weight, plus that of logvar.

    The teacher's gradient is exactly zero. Fails when the stopped student in scm.loss is not
    stopped, and when the tangent is not. Without both stops of scm.consistency the student's
    gradient is wrong; without the stops of velocity and tangent the teacher's is not zero. (In each
    of these pairs one stop alone is enough.)
    """
    x0, z = draw(2)
    xt = path(x0, z)
    with jax.enable_x64(True):

        def loss(p, q):
            F = lambda u, t: odd_F(u, t, p)
            network = lambda x, t: q * velocity(x, t, jnp, traced_column) + 0.1
            return scm.loss(F, network, x0, z, T, r=0.4, weighting="code", normalize=True)[0].sum()

        by_student, by_teacher = map(float, jax.jit(jax.grad(loss, (0, 1)))(0.7, 1.0))
        g = unit(paper_tangent(x0, z, velocity(xt, T) + 0.1, 0.4))
        dF, dlogvar = (central(lambda h: odd_F(xt / SIGMA_D, T, 0.7 + h)[i]) for i in (0, 1))
        logvar = np.asarray(odd_F(x0, T)[1])
    weight = np.exp(-logvar) / (SIGMA_D * np.tan(T))
    on_F = weight * (-2 * g * dF).mean((1, 2, 3))
    on_logvar = (1 - weight * (g**2).mean((1, 2, 3))) * dlogvar
    assert by_teacher == 0
    assert max_error(by_student, (on_F + on_logvar).sum()) < 1e-7
    assert abs(on_F.sum()) > 0.1  # large enough to show


def test_stopped_outputs():
    """The tangent has no gradient and the value has one.

    Fails without both stops of scm.consistency.
    """
    x0, z = draw(2)
    xt = path(x0, z).astype(np.float32)
    t, v = T.astype(np.float32), z.astype(np.float32)

    def outputs(p):
        value, _, g = scm.consistency(lambda u, t: odd_F(u, t, p), v, xt, t, r=1.0)
        return value.sum(), jnp.square(g).sum()

    of_value, of_tangent = jax.jit(jax.jacrev(outputs))(0.7)
    assert of_tangent == 0 and abs(of_value) > 1


def test_normalize_tangent():
    """g / (||g|| + 0.1) with the full L2 norm.

    Fails when the norm's sum becomes a mean and when c is 0.2.
    """
    (direction,) = draw(1)
    direction /= np.sqrt((direction**2).sum((1, 2, 3), keepdims=True))
    norms = np.array([0, 0.01, 0.1, 0.4, 0.9, 2, 10, 1000.0])
    g, norm = scm.normalize_tangent(jnp.asarray(direction * column(norms), jnp.float32))
    np.testing.assert_allclose(norm, norms, rtol=1e-6)
    expected = np.array([0, 0.01 / 0.11, 0.5, 0.8, 0.9, 2 / 2.1, 10 / 10.1, 1000 / 1000.1])
    assert max_error(g, direction * column(expected)) < 1e-6


def test_tangent_warmup():
    """Fails when its minimum becomes a maximum."""
    r = [float(scm.tangent_warmup(step, 4)) for step in (1, 2, 4, 9)]
    assert r == [0.25, 0.5, 1.0, 1.0]
    assert float(scm.tangent_warmup(1, 0)) == 1.0


def test_guidance():
    """Fails when guided starts from F_cond and when teacher_velocity loses sigma_d."""
    F_uncond, F_cond = (a.astype(np.float32) for a in draw(2))
    w = np.linspace(0, 5, BATCH).astype(np.float32)
    expected = 0.5 * ((1.0 - column(w)) * F_uncond + column(w) * F_cond)
    v = scm.teacher_velocity(F_uncond, F_cond, w)
    assert max_error(v, expected) < 1e-6
    assert max_error(v[0], 0.5 * F_uncond[0]) < 1e-6  # w = 0: the unconditional velocity alone


def test_unknown_weighting_is_refused():
    """Fails when scm.loss stops looking up its weighting in the list."""
    x0, z = draw(2)
    with pytest.raises(ValueError, match="weighting 'edm'"):
        scm.loss(odd_F, velocity, x0, z, T, r=1.0, weighting="edm", normalize=True)

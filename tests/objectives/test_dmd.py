"""DMD on Gaussians whose denoisers are exact, through the objective's own terms; then its step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import distillation
from helpers.arrays import same_bits, tree_error
from helpers.distillation import batch, frozen, jit, networks
from sprint_jax.diffusion import dmd as maths
from sprint_jax.diffusion import flow, samplers, trigflow
from sprint_jax.objectives import dmd, step
from sprint_jax.objectives.base import Frozen, Networks, Role, State
from sprint_jax.objectives.dmd import Dmd

SIGMA_D = 0.5
SETTINGS = Dmd(
    kind="dmd", guidance=(1.5,), uncond_mask="cond", control_dropout=0.0, logvar_start=0.0,
    route_steps=4, route_order=2, route_shift=2.0, stored=0, distance_c=0.1, from_noise=0.6,
    anchor_share=0.25, anchor_weight=0.0, anchor_trim=0.1, sample_steps=1, sampler_times=0.5,
    renoise_mean=-0.6, renoise_std=1.0, dmd_normalize=False, dmd_guidance="coupled",
    critic_updates=1, critic_pull=1.0, dmd_weight=1.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A network of data N(m + shift c, s^2) at scale sigma_d, where c is its text's first number.

    Below t = 1 it is the exact denoiser. At t = 1, whose denoiser is the mean, it draws: z of size
    sigma_d becomes m + shift c + s z / sigma_d. So one description serves student, critic and
    teacher.
    """

    guidance_embed: bool = False
    target_embed: bool = False

    def apply(self, params, x, t, *, text, guidance=None, target=None, **_):
        """Return the velocity in flow coordinates, as `LinearDiT.apply` does."""
        u, angle = trigflow.from_flow_state(x, t), trigflow.from_flow_time(t)
        tau, xt = flow.expand(angle, x), SIGMA_D * u
        mean = flow.expand(params["m"] + params["shift"] * text[:, 0, 0], x)
        c, n = jnp.cos(tau), jnp.sin(tau)
        v = c**2 * params["s"] ** 2 + n**2 * SIGMA_D**2
        clean = mean + c * params["s"] ** 2 / v * (xt - c * mean)
        clean = jnp.where(flow.expand(t, x) > 1 - 1e-6, mean + params["s"] * xt / SIGMA_D, clean)
        F = (c * xt - clean) / (n * SIGMA_D)
        out = trigflow.to_flow_velocity(F, u, angle)
        return type("Out", (), {"velocity": out, "logvar": jnp.zeros_like(t)})


def gaussian(m, s, shift=0.0):
    """Return parameters of `Gaussian`."""
    return {name: jnp.float64(a) for name, a in (("m", m), ("s", s), ("shift", shift))}


@pytest.fixture
def double():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


@functools.cache
def nodes(count=24):
    """Return nodes of the renoising's time, the student's noise and the renoising's; weights."""
    x, w = np.polynomial.hermite_e.hermegauss(count)
    e, we = np.polynomial.hermite_e.hermegauss(8)
    grid = np.meshgrid(np.arctan(np.exp(-0.6 + x) / SIGMA_D), e, e, indexing="ij")
    weights = (w[:, None, None] * we[None, :, None] * we).ravel()
    return [a.ravel() for a in grid], weights / weights.sum()


def draws(text=0.0, w=1.0, times=None):
    """Return draws of one step at the nodes, as `dmd.draw` makes them."""
    (tau, e, n), _ = nodes()
    image = lambda a: jnp.asarray(a)[:, None, None, None]
    seen = {"tau": jnp.asarray(tau), "n": SIGMA_D * image(n)}
    drawn = {
        "z": image(e),
        "step_noise": jnp.zeros((len(e), 0, 1, 1, 1)),
        "times": jnp.full((len(e), 1), jnp.pi / 2),
        "matching": seen,
        "guidance": seen,
    }
    cond = {"text": jnp.full((len(e), 1, 1), text), "mask": jnp.ones((len(e), 1))}
    return {"dmd": drawn, "cond": cond, "w": jnp.full(len(e), w)}


def around(fake, teacher, *, guided=False):
    """Return networks, state and frozen arrays of these parameters.

    The student's role is far away: a loss sees the parameters that it gets.
    """
    network = Gaussian(guidance_embed=guided)
    made = Networks(trained=network, teacher=network, width=1, dtype="float64")
    role = Role(params=fake, ema=None, opt=None, extra=None, updates=0, rejected=np.zeros(2, int))
    still = Frozen(null_text=jnp.zeros((1, 1, 1)), null_mask=jnp.ones((1, 1)), teacher=teacher)
    far = role.replace(params=gaussian(9.0, 2.0))
    return made, State(step=0, roles={"fake": role, "student": far}), still


def pushed(student, fake, teacher, *, guided=False, drawn=None, **changes):
    """Return (dL/dm, dL/ds) of the student."""
    made, state, still = around(fake, teacher, guided=guided)
    settings = dataclasses.replace(SETTINGS, **changes)

    def loss(params):
        each, _ = dmd.term(settings, made, params, drawn or draws(), state, still)
        return (nodes()[1] * each).sum()

    slope = jax.grad(loss)(student)
    return float(slope["m"]), float(slope["s"])


@pytest.mark.usefixtures("double")
def test_golden_gradient_with_an_exact_critic():
    """Fails when teacher and critic are swapped, the target is not stopped, or cos is lost."""
    student, data = gaussian(0.7, 0.2), gaussian(-0.3, 0.35)
    found = pushed(student, student, data)
    np.testing.assert_allclose(found, (0.63352385, -0.02875842), atol=2e-6)
    np.testing.assert_allclose(pushed(data, data, data), (0, 0), atol=1e-8)


@pytest.mark.usefixtures("double")
def test_the_critic_alone_decides_where_widths_agree():
    """dL/dm = k (m_critic - mu), wherever the student is: why the critic must be fast."""
    data = gaussian(0.1, 0.4)
    one = [pushed(gaussian(m, 0.4), gaussian(0.3, 0.4), data)[0] for m in (-2.0, 0.0, 5.0)]
    np.testing.assert_allclose(one, one[0], rtol=1e-6)
    two = pushed(gaussian(0.0, 0.4), gaussian(0.5, 0.4), data)[0]
    assert two == pytest.approx(2 * one[0], rel=1e-6)


@pytest.mark.usefixtures("double")
def test_decoupled_at_one_renoising_is_the_guided_teacher():
    """Fails for either sign that public ports have wrong."""
    student, teacher = gaussian(0.0, 0.3, 0.1), gaussian(-0.1, 0.35, 0.3)
    ask = functools.partial(
        pushed, student, student, teacher, guided=True, drawn=draws(text=1.0, w=3.0)
    )
    np.testing.assert_allclose(ask(dmd_guidance="same"), ask(dmd_guidance="coupled"), atol=1e-8)
    assert abs(ask(dmd_guidance="coupled")[0]) > 0.1


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("guidance", ["same", "full"])
def test_guidance_pushes_toward_the_condition_wherever_the_student_is(guidance):
    """Where critic and conditional teacher agree, guidance alone is left: +.380114 toward it."""
    teacher = gaussian(-0.1, 0.35, 0.3)
    for m in (-0.5, 2.0):
        found, _ = pushed(
            gaussian(m, 0.35, 0.0), teacher, teacher, guided=True,
            drawn=draws(text=1.0, w=3.0), dmd_guidance=guidance,
        )  # fmt: skip
        assert found == pytest.approx(-0.380114, abs=2e-4)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("w", "m", "s"), [(1.5, 0.296, 0.1613), (2.0, 0.372, 0.0837)], ids=["1.5", "2"]
)
def test_guidance_narrows_what_dmd_makes(w, m, s):
    """The fixed point for a condition of width .25 in a law of width .5."""

    class Halves(Gaussian):
        """A teacher with N(.2, .25^2) given text 1 and N(-.1, .5^2) without."""

        def apply(self, params, x, t, *, text, **rest):
            given = super().apply(gaussian(0.2, 0.25), x, t, text=text, **rest).velocity
            none = super().apply(gaussian(-0.1, 0.5), x, t, text=text, **rest).velocity
            out = jnp.where(flow.expand(text[:, 0, 0], x) > 0, given, none)
            return type("Out", (), {"velocity": out, "logvar": jnp.zeros_like(t)})

    student = gaussian(m, s)
    made, state, still = around(student, student, guided=True)
    made = dataclasses.replace(made, teacher=Halves(guidance_embed=True))

    def loss(params):
        each, _ = dmd.term(SETTINGS, made, params, draws(text=1.0, w=w), state, still)
        return (nodes()[1] * each).sum()

    slope = jax.grad(loss)(student)
    np.testing.assert_allclose([slope["m"], slope["s"]], 0, atol=5e-4)


@pytest.mark.usefixtures("double")
def test_the_exact_critic_has_no_gradient():
    """F = -.393068 for N(.3, .2^2) at tau = .9, y = .25. Fails for the other sign of the target."""
    made, *_ = around(gaussian(0.3, 0.2), gaussian(0, 1))
    u, t = jnp.full((1, 1, 1, 1), 0.25 / SIGMA_D), jnp.full(1, 0.9)
    x_fm, t_fm = trigflow.to_flow_state(u, t), trigflow.to_flow_time(t)
    text = jnp.zeros((1, 1, 1))
    v = Gaussian().apply(gaussian(0.3, 0.2), x_fm, t_fm, text=text).velocity
    F = trigflow.from_flow_velocity(v, x_fm, t_fm)
    assert float(F[0, 0, 0, 0]) == pytest.approx(-0.393068, abs=1e-6)

    def loss(params, sign=1.0):
        drawn = draws()
        tau, n = drawn["dmd"]["matching"]["tau"], drawn["dmd"]["matching"]["n"]
        x = dmd.images(made, gaussian(0.3, 0.2), drawn)
        y = trigflow.interpolate(x, n, tau)
        x_fm = trigflow.to_flow_state(y / SIGMA_D, tau)
        t_fm = trigflow.to_flow_time(tau)
        v = Gaussian().apply(params, x_fm, t_fm, text=drawn["cond"]["text"]).velocity
        F = trigflow.from_flow_velocity(v, x_fm, t_fm)
        return (nodes()[1] * maths.critic_loss(sign * F, x, n, tau)).sum()

    slope = jax.grad(loss)(gaussian(0.3, 0.2))
    np.testing.assert_allclose([slope["m"], slope["s"]], 0, atol=1e-7)
    wrong = jax.grad(functools.partial(loss, sign=-1.0))(gaussian(0.3, 0.2))
    assert abs(wrong["m"]) > 0.1


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("kind", "f"),
    [
        ("forward_kl", lambda r: r * np.log(r)),
        ("reverse_kl", lambda r: -np.log(r)),
        ("js", lambda r: (r * np.log(r) - (r + 1) * np.log((r + 1) / 2)) / 2),
        ("hellinger", lambda r: (np.sqrt(r) - 1) ** 2),
        ("jeffreys", lambda r: (r - 1) * np.log(r)),
    ],
)
def test_weights_of_divergences(kind, f):
    """E[h (s_data - s_student) dx] is minus the slope of the divergence, by finite differences."""
    x, dx = np.linspace(-9, 9, 20001), 18 / 20000
    log = lambda m, s: -0.5 * ((x - m) / s) ** 2 - np.log(s * np.sqrt(2 * np.pi))
    # Close laws: the ratio stays inside its clip wherever there is mass.
    data, m, s, e = (0.1, 0.9), -0.1, 0.8, 1e-5
    D = lambda m: np.sum(np.exp(log(m, s)) * f(np.exp(log(*data) - log(m, s)))) * dx
    ratio = log(*data) - log(m, s)
    h = np.asarray(maths.divergence_weight(jnp.asarray(ratio), kind))
    scores = -(x - data[0]) / data[1] ** 2 + (x - m) / s**2
    found = -np.sum(np.exp(log(m, s)) * h * scores) * dx
    assert found == pytest.approx((D(m + e) - D(m - e)) / (2 * e), rel=2e-3)


def test_the_divisor_is_of_each_sample_by_itself():
    """g / mean |x - X_T|. Fails for one number for the whole batch, which drowns small tau."""
    x = jnp.array([[1.0, 3.0], [0.1, -0.1]])
    real = jnp.array([[0.0, 0.0], [0.0, 0.0]])
    fake = jnp.array([[0.5, -0.5], [0.02, 0.04]])
    g = maths.pseudo_gradient(x, real, fake, normalize=True)
    np.testing.assert_allclose(g, [[0.25, -0.25], [0.2, 0.4]], rtol=1e-6)
    w = jnp.array([3.0, 1.5])
    both = maths.decoupled_gradient(x, (real, fake), (real - 0.3, real), w, normalize=True)
    np.testing.assert_allclose(both, [[-0.05, -0.55], [-1.3, -1.1]], rtol=1e-5)


@pytest.mark.usefixtures("double")
def test_training_by_simulation_ends_at_the_consistency_function():
    """A linear student, x0 = theta_k x, has gains a / a(t_k): .713133 for a = .7 at t = 1.3."""
    a, t2 = 0.7, 1.3
    gains = jnp.asarray([a, a / np.hypot(np.cos(t2) * a, np.sin(t2))])
    assert float(gains[1]) == pytest.approx(0.713133, abs=1e-6)

    def F(u, t):
        gain = flow.expand(jnp.where(t > 1.5, gains[0], gains[1]), u)
        c, n = jnp.cos(flow.expand(t, u)), jnp.sin(flow.expand(t, u))
        return (c - gain) * u / n

    z = jnp.asarray([[1.0], [0.0]])
    other = jnp.asarray([[[0.0], [1.0]]])
    times = jnp.stack([jnp.full(2, jnp.pi / 2), jnp.full(2, t2)])
    xt = samplers.simulate(F, z, other, times)
    std = float(jnp.sqrt(jnp.square(xt).sum())) / SIGMA_D  # of independent first and second noise
    assert std == pytest.approx(np.hypot(np.cos(t2) * a, np.sin(t2)), abs=1e-9)
    x = trigflow.denoise(F(xt / SIGMA_D, times[1]), xt, times[1]) / SIGMA_D
    assert float(jnp.sqrt(jnp.square(x).sum())) == pytest.approx(a, abs=1e-9)
    np.testing.assert_allclose(
        x, samplers.scm(F, z, other, jnp.asarray([jnp.pi / 2, t2, 0.0])), atol=1e-12
    )


def test_no_gradient_passes_through_the_simulation():
    F = lambda scale: lambda u, t: scale * u
    times = jnp.stack([jnp.full(2, 1.5), jnp.full(2, 1.0)])
    state = lambda scale: samplers.simulate(F(scale), jnp.ones((2, 1)), jnp.ones((1, 2, 1)), times)
    assert float(jax.grad(lambda scale: state(scale).sum())(0.3)) == 0
    assert float(jnp.abs(state(0.3) - state(0.4)).max()) > 0.01


# Through the one step.

TX = {"student": optax.sgd(1.0), "fake": optax.sgd(0.1, momentum=0.9)}
WHOLE = dataclasses.replace(
    SETTINGS, sample_steps=2, critic_pull=0.9, dmd_normalize=True, dmd_guidance="cleaner",
    anchor_weight=0.5, guidance=(1.25, 2.0),
)  # fmt: skip


@functools.cache
def start():
    """Return the state at step 0, the critic apart from the student."""
    frozen()

    def run():
        state = step.start(
            WHOLE.objective(networks()), TX, ema=0.9, frozen=frozen(), begin=None,
            key=jax.random.key(1),
        )  # fmt: skip
        apart = jax.tree.map(lambda a: 1.1 * a, state.roles["fake"].params)
        fake = state.roles["fake"].replace(params=apart)
        return state.replace(roles=state.roles | {"fake": fake})

    return jax.device_get(jit(run)())


@functools.cache
def update(label, accumulate=1):
    """Return an update as a function of state and batch, compiled."""
    made = WHOLE.objective(networks()).updates[label]
    one = step.make_step(
        made, TX[made.role], ema=0.9 if made.role == "student" else 0.0, accumulate=accumulate,
        seed=3,
    )  # fmt: skip
    return jit(lambda state, rows: one(state, frozen(), rows))


LABELS = ("student", "fake", "student_2_steps", "fake_2_steps")


def test_a_round_has_one_program_for_each_number_of_steps():
    made = dataclasses.replace(WHOLE, critic_updates=2).objective(networks())
    assert made.round == (
        "student", "fake", "fake", "student_2_steps", "fake_2_steps", "fake_2_steps",
    )  # fmt: skip
    roles = [made.updates[label].role for label in made.round]
    assert tuple(roles) == dataclasses.replace(WHOLE, critic_updates=2).round


@pytest.mark.parametrize("label", LABELS)
def test_an_update_leaves_the_other_role_alone(label):
    before = start()
    after, report = update(label)(before, batch())
    role = label.split("_")[0]
    other = {"student": "fake", "fake": "student"}[role]
    assert same_bits(after.roles[other], before.roles[other])
    assert tree_error(after.roles[role].params, before.roles[role].params) > 1e-7
    assert all(np.isfinite(a) for a in jax.tree.leaves(report.scalars))


@pytest.mark.parametrize("label", ["student_2_steps", "fake"])
def test_an_update_does_not_depend_on_how_its_batch_is_cut(label):
    whole, _ = update(label)(start(), batch())
    parts, _ = update(label, 2)(start(), batch())
    role = label.split("_")[0]
    moved = tree_error(whole.roles[role].params, start().roles[role].params)
    assert tree_error(whole.roles[role].params, parts.roles[role].params) < 1e-3 * moved


def test_nan_in_the_critic_rejects_its_update_alone():
    bad = start()
    spoiled = jax.tree.map(lambda a: np.full_like(a, np.nan), bad.roles["fake"].params)
    bad = bad.replace(roles=bad.roles | {"fake": bad.roles["fake"].replace(params=spoiled)})
    after, _ = update("fake")(bad, batch())
    assert after.roles["fake"].rejected.tolist() == [1, 1]
    assert same_bits(after.roles["fake"].opt, bad.roles["fake"].opt)
    assert after.roles["student"].rejected.tolist() == [0, 0]


def test_the_critic_is_pulled_toward_the_student():
    """Without a gradient, k of the critic and 1 - k of the student are left."""
    made = WHOLE.objective(networks()).updates["fake"]
    roles = start().roles
    pulled = made.begin(roles["fake"].params, start())
    wanted = jax.tree.map(
        lambda a, b: 0.9 * a + 0.1 * b, roles["fake"].params, roles["student"].params
    )
    assert tree_error(pulled, wanted) < 1e-7
    assert tree_error(pulled, roles["fake"].params) > 1e-3
    whole = dataclasses.replace(WHOLE, critic_pull=1.0).objective(networks()).updates["fake"]
    assert same_bits(whole.begin(roles["fake"].params, start()), roles["fake"].params)


def test_times_of_simulated_images():
    """The first is pi/2, they decrease, and a share of the second is the sampler's."""
    x0 = jnp.zeros((512, *distillation.build.latent_shape(distillation.tiny_config())))
    three = np.asarray(dmd.draw(WHOLE, jax.random.key(1), x0, 3)["times"])
    assert (np.diff(three, axis=1) <= 0).all()
    drawn = dmd.draw(WHOLE, jax.random.key(0), x0, 2)
    times = np.asarray(drawn["times"])
    np.testing.assert_allclose(times[:, 0], np.pi / 2, rtol=1e-6)
    assert (np.diff(times, axis=1) <= 0).all()
    assert np.isclose(times[:, 1], 1.3).mean() == pytest.approx(0.5, abs=0.07)
    assert (np.asarray(drawn["guidance"]["tau"]) < times[:, 1]).all()

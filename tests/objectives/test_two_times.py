"""CMT, TBCM and flow maps: on data whose flow is known, and through the one step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import distillation, oracles
from helpers.arrays import max_error, tree_error
from helpers.configs import card
from helpers.distillation import SIDE, batch, jit
from helpers.objectives import ALL, CMT, EULERIAN, LAGRANGIAN, SEMIGROUP, TBCM
from sprint_jax import config
from sprint_jax.diffusion import flow, rollout, samplers, scm, trigflow
from sprint_jax.errors import UserError
from sprint_jax.objectives import cmt, eulerian, lagrangian, semigroup, step, tbcm, two_times, views
from sprint_jax.training import stages

SIGMA_D = 0.5
SGD = {"student": optax.sgd(1.0)}
T = np.array([0.4, 0.7, 1.0, 1.3, 1.5])
R = np.array([0.1, 0.3, 0.5, 0.2, 0.9])


def named(settings):
    extra = [getattr(settings, n, "") for n in ("velocity", "states")]
    return " ".join([settings.kind, *filter(None, extra)])


each = pytest.mark.parametrize("settings", ALL, ids=named)


@functools.cache
def networks():
    """Return the networks of a student that knows a second time."""
    tree = card()
    tree.data.size = SIDE * tree.codec.block
    tree.model.update(width=16, depth=1, unroll=1, target_embed=True)
    tree.phases.sprint.objective.head_blocks = (0,)
    c = config.parse(tree)
    return stages.networks(c, c.phases["sprint"])


@functools.cache
def frozen():
    """Return the frozen arrays, with the first block of the teacher alone."""
    whole = distillation.frozen()
    blocks = jax.tree.map(lambda a: a[:1], whole.teacher["blocks"])
    return whole.replace(teacher=whole.teacher | {"blocks": blocks})


# On data whose flow is known, in float64.


def exact(data, amount=0.0):
    """Return the exact map as a student, with a bump of this size."""

    def F(u, t, r):
        gap = jnp.maximum(t - r, 1e-6)  # at r = t the average velocity is that of a tiny jump
        bump = amount * u * jnp.cos(t + r)[:, None]
        return oracles.trig_map(data, u, t, t - gap) + bump, jnp.zeros_like(t)

    return F


def seen(data, amount=0.0):
    """Return the views of an update at points of the data's own paths."""
    u = np.random.default_rng(0).normal(size=(5, 3)) * 0.8
    where = two_times.At(SIGMA_D * u, jnp.asarray(T), jnp.asarray(R), jnp.asarray(T) > 1.4)
    velocity = lambda xt, t: SIGMA_D * oracles.trig_velocity(data, xt / SIGMA_D, t)
    F, frozen_F = exact(data, amount), exact(data, jax.lax.stop_gradient(amount))
    minus = lambda u, t, r: jax.lax.stop_gradient(frozen_F(u, t, r)[0])
    return two_times.Views(F, minus, minus, velocity, lambda: velocity(where.xt, where.t)), where


def of_cmt(data, amount):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    times = jnp.linspace(1.0, 0.0, 5)
    states = jnp.stack([data.X(z, jnp.ones((5, 1)), t) for t in times], 1)
    j = jnp.asarray([[1, 2, 3, 4], [4, 4, 4, 4], [2, 3, 4, 4], [3, 2, 3, 4], [4, 3, 4, 4]])

    def v(x, t, r):
        return oracles.average(data, x, t[:, None], r[:, None]) + amount * jnp.cos(x)

    return cmt.term(v, states, times, j, c=0.1)[0].sum()


def of_tbcm(data, amount):
    """On the states of a coarse rollout, which is not the data's own path."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    times = jnp.asarray(rollout.tbcm_times(5, 2.5), jnp.float64)
    v = lambda x, t: data.velocity(x, t[:, None])
    made = rollout.rollout(v, z, times, order=1)
    made = rollout.Rollout(made.states[1:-1], made.velocities[1:])
    F = lambda u, t: (exact(data, amount)(u, t, jnp.zeros_like(t))[0], jnp.zeros_like(t))
    at = jnp.repeat(times[1:-1], 5).reshape(4, 5)
    return tbcm.term(F, made, at, r=1.0, weighting="code", normalize=False)[0].sum()


def of_eulerian(data, amount):
    see, where = seen(data, amount)
    r = jnp.where(where.diagonal, where.t, where.r)
    at = where._replace(r=r)
    return eulerian.term(see.F, see.here(), at, warm=1.0, c=0.1)[0].sum()


def of_lagrangian(data, amount):
    see, where = seen(data, amount)
    settings = dataclasses.replace(LAGRANGIAN, delta=1e-4)
    return jnp.square(lagrangian.errors(settings, see, where)).sum()


def of_semigroup(data, amount):
    see, where = seen(data, amount)
    return jnp.square(semigroup.errors(SEMIGROUP, see, where, jnp.full(5, 0.3))).sum()


LOSSES = (of_cmt, of_tbcm, of_eulerian, of_lagrangian, of_semigroup)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("data", oracles.ALL, ids=lambda data: type(data).__name__)
def test_the_exact_map_alone_has_no_loss(loss, data):
    """Loss and gradient are 0 there, and a bump of either sign is pushed back.

    Fails for a wrong sign, another target, or times that belong to other states.
    """
    with jax.enable_x64(True):
        loss = functools.partial(loss, data)
        slope = jax.grad(loss)
        assert loss(0.0) == pytest.approx(0, abs=2e-6)
        assert abs(slope(0.0)) < 1e-3
        assert slope(-0.3) < -1e-2 < 1e-2 < slope(0.3)


def test_a_solver_step_of_second_order():
    """The Lagrangian's error at the exact map falls with delta^2 by Heun, with delta by Euler."""
    with jax.enable_x64(True):
        see, where = seen(oracles.Mixture())
        where = where._replace(diagonal=jnp.zeros(5, bool))

        def size(delta, heun):
            settings = dataclasses.replace(LAGRANGIAN, delta=delta, heun=heun)
            return float(jnp.abs(lagrangian.errors(settings, see, where)).max())

        assert 3.4 < size(0.04, True) / size(0.02, True) < 4.6
        assert 1.7 < size(0.04, False) / size(0.02, False) < 2.3


def test_tbcm_falls_to_its_final_factor():
    at = lambda step: float(scm.tangent_schedule(step, 10, final=0.75, start=20, steps=10))
    assert [at(5), at(10), at(20), at(25), at(30), at(99)] == [0.5, 1, 1, 0.875, 0.75, 0.75]


def test_tbcm_has_the_published_route():
    """Angles of the published code's route, of 16 calls at shift 2.5."""
    times = rollout.tbcm_times(16, 2.5)
    angles = np.arctan2(times, 1 - times)
    published = [1.571, 1.542, 1.510, 1.471, 1.427, 1.374, 1.311, 1.236, 1.144, 1.033, 0.900, 0.743]
    np.testing.assert_allclose(angles[:12], published, atol=6e-4)
    np.testing.assert_allclose(angles[12:], [0.564, 0.373, 0.183, 0.0063, 0], atol=6e-4)


# Through the one step.


@functools.cache
def updated(settings, accumulate=1):
    """Return (state before, state after, report) of one update by plain descent."""
    objective = settings.objective(networks())
    arrays = frozen()

    def run():
        state = step.start(
            objective, SGD, ema=0.9, frozen=arrays, begin=None, key=jax.random.key(1)
        )
        update = step.make_step(
            objective.updates["student"], SGD["student"], ema=0.9, accumulate=accumulate, seed=3
        )
        return state, *update(state, arrays, batch())

    return jax.device_get(jit(run)())


def drawn(settings):
    """Return the draws of that update."""
    update = settings.objective(networks()).updates["student"]
    return update.draw(jax.random.fold_in(jax.random.key(3), 0), batch(), frozen())


@each
def test_the_student_begins_as_its_teacher(settings):
    """For every pair of times and every scale, to the bit."""
    params = updated(settings)[0].roles["student"].params
    rows, model, arrays = batch(), networks(), frozen()
    x, t = jnp.asarray(rows["latent"]), jnp.linspace(0.1, 1.0, len(rows["latent"]))
    cond, w = {n: rows[n] for n in ("text", "mask")}, jnp.linspace(1.0, 5.0, len(t))
    map_ = views.student_average(model.trained, params, cond, w)
    wanted = jit(lambda: model.teacher.apply(arrays.teacher, x, t, **cond).velocity)()
    for r in (0.0, 0.3, 1.0):
        found = jit(lambda r=r: map_(x, t, r * t))()
        np.testing.assert_array_equal(found, wanted)


@each
def test_accumulation_changes_nothing(settings):
    (before, one, whole), (_, two, parted) = updated(settings), updated(settings, 2)
    np.testing.assert_allclose(whole.scalars["loss"], parted.scalars["loss"], rtol=1e-4)
    for name in one.roles["student"].params:
        a, b, c = (part.roles["student"].params[name] for part in (one, two, before))
        assert tree_error(a, b) <= 2e-3 * tree_error(a, c) + 1e-6


@pytest.mark.parametrize("settings", [s for s in ALL if s.kind != "tbcm"], ids=named)
def test_the_second_time_learns_at_once(settings):
    """Its embedding ends in zeros, and the first update changes them."""
    before, after, _ = updated(settings)
    last = lambda s: s.roles["student"].params["inputs"]["target_embed"]["linear_2"]["kernel"]
    assert not last(before).any() and np.abs(last(after)).max() > 1e-6


@pytest.mark.parametrize(
    "settings", [s for s in ALL if s.kind in ("cmt", "lagrangian", "semigroup")], ids=named
)
def test_an_update_lowers_its_loss(settings):
    """Of the same draws and targets, by a small step along the gradient."""
    start, _, report = updated(settings)
    update = settings.objective(networks()).updates["student"]
    draws, arrays = drawn(settings), frozen()
    params = start.roles["student"].params

    def after():
        value = lambda p: update.loss(p, draws, start, arrays)[0]
        slope = jax.grad(value)(params)
        size = 0.01 / optax.tree.norm(slope)
        return value(jax.tree.map(lambda p, g: p - size * g, params, slope))

    assert jit(after)() < report.scalars["loss"] - 1e-5


def test_cmt_regresses_all_states_of_the_guided_teacher():
    """The step's loss, written out here."""
    draws, (start, _, report) = drawn(CMT), updated(CMT)
    model, arrays, times = networks(), frozen(), samplers.flow_times(4, 2.0)
    teacher = views.teacher_v(model, arrays, draws["cond"], draws["w"], "cond")
    states = jit(lambda: rollout.rollout(teacher, draws["z"], times, order=2).states)()
    params, j = start.roles["student"].params, np.asarray(draws["j"])
    student = views.student_average(model.trained, params, draws["cond"], draws["w"])
    assert j.min() == 1 and (j > np.arange(4)).all() and len(set(j[:, 0])) > 1
    total = 0.0
    for i in range(4):
        t = jnp.full(len(j), times[i])
        r = jnp.asarray(times[j[:, i]])
        end = states[i] - flow.expand(t - r, states[i]) * student(states[i], t, r)
        e = end - states[j[:, i], np.arange(len(j))]
        total += jnp.sqrt(jnp.square(e).mean((1, 2, 3)) + 0.01) - 0.1
    np.testing.assert_allclose(report.scalars["loss"], total.mean() / 4, rtol=2e-5)


def test_tbcm_asks_for_no_other_velocity():
    """Its loss is sCM's at the rollout's states, with the velocities that made the rollout."""
    settings = dataclasses.replace(TBCM, route_order=1)
    draws, (start, _, report) = drawn(settings), updated(settings)
    model, arrays, times = networks(), frozen(), np.asarray(draws["times"])[0]
    grid = rollout.tbcm_times(4, 2.0)
    assert times[0] == 1 and times[-1] == 0 and (times[1:4] > grid[1:4]).all()
    teacher = views.teacher_v(model, arrays, draws["cond"], draws["w"], "cond")
    params = start.roles["student"].params
    F = views.student_F(model.trained, params, draws["cond"], draws["w"])

    def losses():
        x, total = draws["z"], 0.0
        for i in range(4):
            t_fm = jnp.full(len(x), times[i])
            v = teacher(x, t_fm)
            if i:
                u, t = trigflow.from_flow_state(x, t_fm), trigflow.from_flow_time(t_fm)
                slope = SIGMA_D * trigflow.from_flow_velocity(v, x, t_fm)
                total += scm.loss_at(
                    F, slope, SIGMA_D * u, t, r=0.1, weighting="code", normalize=True
                )[0]
            x = x - (times[i] - times[i + 1]) * v
        return total.mean() / 3

    np.testing.assert_allclose(report.scalars["loss"], jit(losses)(), rtol=2e-4)


def test_two_time_consistency_at_zero_is_scm():
    """With r = 0 throughout and no diagonal: the same error as sCM with no prior."""
    settings = dataclasses.replace(EULERIAN, diagonal=0.0, to_zero=1.0)
    draws, (start, _, report) = drawn(settings), updated(settings)
    model, arrays = networks(), frozen()
    F = views.student_F(model.trained, start.roles["student"].params, draws["cond"], draws["w"])
    velocity = views.teacher_velocity(model, arrays, draws["cond"], draws["w"], "cond")
    loss = lambda: scm.loss(
        F, velocity, draws["x0"], draws["z"], draws["t"], r=1.0, weighting="paper", normalize=True
    )[0].mean()
    np.testing.assert_allclose(report.scalars["loss"], jit(loss)(), rtol=1e-5)


def test_times_and_shares():
    many = dataclasses.replace(EULERIAN, diagonal=0.3, to_zero=0.4, from_noise=0.2)
    rows = {n: np.repeat(a, 100, 0) for n, a in batch().items()}
    draws = two_times.draw(many, jax.random.key(0), rows)
    where = two_times.at(many, networks(), draws, frozen())
    t, r, diagonal = map(np.asarray, (where.t, where.r, where.diagonal))
    assert (r <= t).all() and (r[diagonal] == t[diagonal]).all()
    assert abs(diagonal.mean() - 0.3) < 0.04
    assert abs((r[~diagonal] == 0).mean() - 0.4) < 0.05
    assert abs((t == np.float32(np.pi / 2)).mean() - 0.2) < 0.04


def test_states_of_rollouts_lie_at_their_times():
    """Fails when a state gets another's time, or r passes it."""
    settings = dataclasses.replace(LAGRANGIAN, states="rollout", diagonal=0.0)
    draws, model, arrays = drawn(settings), networks(), frozen()
    where = jit(lambda: two_times.at(settings, model, draws, arrays))()
    teacher = views.teacher_v(model, arrays, draws["cond"], draws["w"], "cond")
    times = samplers.flow_times(4, 2.0)
    states = jit(lambda: rollout.rollout(teacher, draws["z"], times, order=2).states)()
    i = np.asarray(draws["i"])
    assert 0 in i and i.max() > 0
    t_fm = jnp.asarray(times[i])
    np.testing.assert_allclose(where.t, trigflow.from_flow_time(t_fm), rtol=1e-6)
    wanted = SIGMA_D * trigflow.from_flow_state(states[i, np.arange(len(i))], t_fm)
    assert max_error(where.xt, wanted) < 1e-5
    assert (where.r < where.t).all()


def test_meanflow_guides_itself():
    """With velocity data the tangent follows z - x0 and (1 - 1/w) (F_c - F_u)."""
    settings = dataclasses.replace(EULERIAN, velocity="data", diagonal=1.0)
    draws, (start, _, report) = drawn(settings), updated(settings)
    model, arrays = networks(), frozen()
    params, w = start.roles["student"].params, draws["w"]
    t, z, x0 = draws["t"], draws["z"], draws["x0"]
    cos, sin = (f(flow.expand(t, z)) for f in (jnp.cos, jnp.sin))
    xt = cos * x0 + sin * z
    null = draws["cond"] | {"text": jnp.broadcast_to(arrays.null_text, batch()["text"].shape)}

    def wanted():
        at = lambda cond: views.student_map(model.trained, params, cond, w)(xt / SIGMA_D, t, t)[0]
        own = at(draws["cond"])
        v = cos * z - sin * x0 + flow.expand(1 - 1 / w, z) * SIGMA_D * (own - at(null))
        g = -(SIGMA_D * own - v)
        size = jnp.sqrt(jnp.square(g).sum((1, 2, 3), keepdims=True))
        return jnp.square(g / (size + 0.1)).mean()

    np.testing.assert_allclose(report.scalars["loss"], jit(wanted)(), rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "changes", "field"),
    [
        (EULERIAN, dict(diagonal=1.2), "diagonal"),
        (EULERIAN, dict(velocity="self", diagonal=0.0), "diagonal"),
        (EULERIAN, dict(velocity="data", states="rollout"), "states"),
        (EULERIAN, dict(tangent_c=0.0), "tangent_c"),
        (EULERIAN, dict(stored=8), "stored"),
        (LAGRANGIAN, dict(velocity="self", states="rollout"), "states"),
        (LAGRANGIAN, dict(delta=0.0), "delta"),
        (SEMIGROUP, dict(diagonal=0.0), "diagonal"),
        (SEMIGROUP, dict(from_noise=-0.1), "from_noise"),
        (TBCM, dict(tangent_final=0.0), "tangent_final"),
        (TBCM, dict(route_steps=1), "route_steps"),
        (CMT, dict(distance_c=0.0), "distance_c"),
    ],
)
def test_values_out_of_range(settings, changes, field):
    assert field in dict(dataclasses.replace(settings, **changes).problems())


@pytest.mark.parametrize("settings", [CMT, EULERIAN, LAGRANGIAN, SEMIGROUP], ids=named)
def test_a_card_without_a_second_time_is_refused(settings):
    tree = card(preset="shapes")
    del tree.phases.repair
    tree.phases.regression.objective = dataclasses.asdict(settings)
    tree.order = ("teacher", "finetune", "control", "regression")
    with pytest.raises(UserError, match=f"{settings.kind} needs a second time, set config.model"):
        config.parse(tree)
    tree.model.target_embed = True
    assert config.parse(tree).phases["regression"].objective == settings

"""Objectives that follow the teacher's trajectory: on known data, and through the one step."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import oracles
from helpers.arrays import same_bits, tree_error
from helpers.configs import card
from helpers.distillation import batch, frozen, jit, networks
from sprint_jax import config
from sprint_jax.diffusion import distances, flow, rollout, samplers
from sprint_jax.diffusion import repair as hops
from sprint_jax.errors import UserError
from sprint_jax.objectives import guided, regression, rollouts, step, views
from sprint_jax.objectives.regression import Regression
from sprint_jax.objectives.repair import Repair

ROUTE = dict(stored=0,
    guidance=(1.25, 2.0), uncond_mask="cond", control_dropout=0.0, logvar_start=0.0,
    route_steps=4, route_order=2, route_shift=2.0, distance_c=0.1,
)  # fmt: skip
REGRESSION = Regression(kind="regression", from_noise=0.7, **ROUTE)
REPAIR = Repair(
    kind="repair", from_noise=0.6, hops=2, hop_from=(0.6, 0.8), hop_ratio=0.5, hop_steps=2,
    tries=2, hop_c=0.03,
    anchor_share=0.25, anchor_weight=3.0, anchor_trim=0.1, **ROUTE,
)  # fmt: skip
BOTH = (REGRESSION, REPAIR)
SGD = {"student": optax.sgd(1.0)}


@functools.cache
def updated(settings, accumulate=1):
    """Return (state before, state after, report) of one update by plain descent."""
    objective = settings.objective(networks())
    frozen()  # not while another function is traced

    def run():
        state = step.start(
            objective, SGD, ema=0.9, frozen=frozen(), begin=None, key=jax.random.key(1)
        )
        update = step.make_step(
            objective.updates["student"], SGD["student"], ema=0.9, accumulate=accumulate, seed=3
        )
        return state, *update(state, frozen(), batch())

    return jax.device_get(jit(run)())


def drawn(settings):
    """Return the draws of that update."""
    update = settings.objective(networks()).updates["student"]
    return update.draw(jax.random.fold_in(jax.random.key(3), 0), batch(), frozen())


@pytest.mark.parametrize("data", oracles.ALL, ids=lambda data: type(data).__name__)
def test_regression_is_zero_at_the_consistency_function_alone(data):
    """Exact states and ends. Fails when an end belongs to another state, or a time to another."""
    with jax.enable_x64(True):
        z = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
        one, zero, t = jnp.ones((5, 1)), jnp.zeros((5, 1)), jnp.linspace(0.2, 0.9, 5)
        states = jnp.concatenate([z, data.X(z, one, t[:, None])])
        times = jnp.concatenate([jnp.ones(5), t])
        ends = jnp.tile(data.X(z, one, zero), (2, 1))
        at = rollouts.Points(states, times, ends, {}, times, jnp.ones(10))

        def loss(amount):
            def v(x, t):
                t = t[:, None]
                return oracles.average(data, x, t, jnp.zeros_like(t)) + amount * jnp.cos(x)

            return regression.term(REGRESSION, v, at)[0].sum()

        assert loss(0.0) == pytest.approx(0, abs=1e-12)
        slope = jax.grad(loss)
        assert abs(slope(0.0)) < 1e-9
        assert slope(-0.2) < -0.1 < 0.1 < slope(0.2)


def test_the_weights_of_noise_and_inner_states():
    """Of a new rollout: p and 1 - p of both terms, with the noise's term first."""
    draws, arrays = drawn(REGRESSION), frozen()
    at = jit(lambda: rollouts.points(REGRESSION, networks(), draws, arrays))()
    n = len(at.t) // 2
    np.testing.assert_allclose(at.weight, 2 * np.repeat([0.7, 0.3], n), rtol=1e-6)
    assert (at.t[:n] == 1).all() and (at.t[n:] < 1).all()
    np.testing.assert_array_equal(at.end[:n], at.end[n:])
    v = lambda x, t: jnp.zeros_like(x)  # so the error is x - end
    at = rollouts.Points(
        x=jnp.asarray([[3.0], [5.0]]), t=jnp.asarray([1.0, 0.5]), end=jnp.zeros((2, 1)),
        cond={}, w=jnp.zeros(2), weight=jnp.asarray([1.4, 0.6]),
    )  # fmt: skip
    value, aux = regression.term(REGRESSION, v, at)
    huber = lambda e: np.sqrt(e * e + 0.01) - 0.1
    np.testing.assert_allclose(value, [1.4 * huber(3.0), 0.6 * huber(5.0)], rtol=1e-6)
    assert aux.scalars["noise_error"] == 9 and aux.scalars["inner_error"] == 25


def test_regression_follows_the_guided_teacher():
    """The step's loss is that of a rollout written out here.

    Fails without guidance, with another grid, or when a sample gets another sample's end.
    """
    draws = drawn(REGRESSION)
    times = samplers.flow_times(4, 2.0)
    v = jit(views.teacher_v(networks(), frozen(), draws["cond"], draws["w"], "cond"))
    x, states = draws["z"], [draws["z"]]
    before = d_before = None
    for s, t in itertools.pairwise(times):
        now, d = v(x, jnp.full(len(x), s)), s - t
        slope = now if before is None else now + d / (2 * d_before) * (now - before)
        x = x - d * slope
        states.append(x)
        before, d_before = now, d
    start, _, report = updated(REGRESSION)
    params = start.roles["student"].params
    student = jit(views.student_v(networks().trained, params, draws["cond"], draws["w"]))
    j = np.asarray(draws["j"])
    assert set(j) <= {1, 2, 3} and len(set(j)) > 1
    inner = jnp.stack([states[k][i] for i, k in enumerate(j)])
    error = lambda x, t: flow.denoise(student(x, t), x, t) - states[-1]
    losses = [
        distances.pseudo_huber(error(a, t), 0.1)
        for a, t in ((draws["z"], jnp.ones(len(j))), (inner, jnp.asarray(times[j])))
    ]
    wanted = (0.7 * losses[0] + 0.3 * losses[1]).mean()
    np.testing.assert_allclose(report.scalars["loss"], wanted, rtol=2e-5)


def test_repair_is_the_hops_and_the_anchor():
    """The step's loss is written out here.

    Fails when hops use another conditioning, or the anchor is not trimmed.
    """
    draws, (start, _, report) = drawn(REPAIR), updated(REPAIR)
    params, cond, w = start.roles["student"].params, draws["cond"], draws["w"]
    v = jit(views.student_v(networks().trained, params, cond, w))
    one = jnp.ones(len(w))
    y = flow.denoise(v(draws["z"], one), draws["z"], one)
    guided_v = jit(views.teacher_v(networks(), frozen(), cond, w, "cond"))
    found = []
    for k in range(2):
        current = y
        for hop, s in enumerate((draws["s"], 0.5 * draws["s"])):
            x = flow.interpolate(current, draws["n"][:, k, hop], s)
            d = flow.expand(0.25 * s, x)
            first = guided_v(x, s)
            x = x - d * first
            x = x - d * (1.5 * guided_v(x, 0.75 * s) - 0.5 * first)
            current = flow.denoise(v(x, 0.5 * s), x, 0.5 * s)
        found.append(current)
    first, second = (distances.square(y - each) for each in found)
    current = jnp.where(flow.expand(first <= second, y), *found)
    repaired = distances.token_huber(y - current, 0.03).mean()
    np.testing.assert_allclose(report.scalars["repair"], repaired, rtol=2e-5)

    a = draws["anchor"]
    assert len(a["z"]) == len(w) // 4
    teacher = views.teacher_v(networks(), frozen(), a["cond"], a["w"], "cond")
    times = samplers.flow_times(4, 2.0)
    states = jit(lambda z: rollout.rollout(teacher, z, times, order=2).states)(a["z"])
    student = jit(views.student_v(networks().trained, params, a["cond"], a["w"]))
    j = np.asarray(a["j"])
    inner = jnp.stack([states[k][i] for i, k in enumerate(j)])
    errors = [
        flow.denoise(student(x, t), x, t) - states[-1]
        for x, t in ((a["z"], jnp.ones(len(j))), (inner, jnp.asarray(times[j])))
    ]
    noise, within = (distances.token_huber(e, 0.1) for e in errors)
    kept = distances.square(errors[0]) < 0.1
    anchor = (0.6 * noise * kept + 0.4 * within).mean()
    np.testing.assert_allclose(report.scalars["loss"], repaired + 3 * anchor, rtol=2e-5)
    assert report.scalars["anchor_kept"] == kept.mean()


@pytest.mark.parametrize("settings", BOTH, ids=lambda s: s.kind)
def test_the_student_begins_as_its_teacher(settings):
    """The student starts as the unguided teacher, for every guidance scale."""
    params = updated(settings)[0].roles["student"].params
    rows = drawn(settings)
    x, t = rows["z"], jnp.linspace(0.1, 1.0, len(rows["w"]))
    student = views.student_v(networks().trained, params, rows["cond"], rows["w"])(x, t)
    teacher = views.teacher_v(networks(), frozen(), rows["cond"], jnp.ones_like(t), "cond")(x, t)
    np.testing.assert_allclose(student, teacher, atol=2e-5)


@pytest.mark.parametrize("settings", BOTH, ids=lambda s: s.kind)
def test_accumulation_changes_nothing(settings):
    (before, one, whole), (_, two, parted) = updated(settings), updated(settings, 2)
    np.testing.assert_allclose(whole.scalars["loss"], parted.scalars["loss"], rtol=1e-5)
    for name in one.roles["student"].params:
        a, b, c = (each.roles["student"].params[name] for each in (one, two, before))
        moved = tree_error(a, c)
        assert tree_error(a, b) <= 1e-3 * moved + 1e-6


@pytest.mark.parametrize("settings", BOTH, ids=lambda s: s.kind)
def test_an_update_lowers_its_loss(settings):
    """Of the same draws, by a small step along the gradient. Fails for a wrong sign."""
    start, _, report = updated(settings)
    update = settings.objective(networks()).updates["student"]
    draws, state = drawn(settings), start
    value = lambda p: update.loss(p, draws, state, frozen())[0]
    params = start.roles["student"].params

    def after():
        slope = jax.grad(value)(params)
        size = 0.02 / optax.tree.norm(slope)
        return value(jax.tree.map(lambda p, g: p - size * g, params, slope))

    assert jit(after)() < report.scalars["loss"] - 1e-4


def test_repairs_frozen_student_stays():
    """The copy that denoises is where the phase began, and no update changes a bit of it."""
    before, after, _ = updated(REPAIR)
    role = after.roles["student"]
    assert same_bits(before.roles["student"].extra, before.roles["student"].params)
    assert same_bits(role.extra, before.roles["student"].extra)
    assert not same_bits(role.params, before.roles["student"].params)


def test_hops_are_those_of_the_frozen_student():
    """Where the trained student has moved away. Fails when it renoises its own images."""
    draws, role = drawn(REPAIR), updated(REPAIR)[0].roles["student"]
    moved = jax.tree.map(lambda a: a + 0.05 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), role)
    state = updated(REPAIR)[0].replace(roles={"student": role.replace(params=moved.params)})
    update = REPAIR.objective(networks()).updates["student"]
    teacher = views.teacher_v(networks(), frozen(), draws["cond"], draws["w"], "cond")

    def expected(frozen_params):
        student = lambda p: views.student_v(networks().trained, p, draws["cond"], draws["w"])
        one = jnp.ones(len(draws["w"]))
        y = flow.denoise(student(moved.params)(draws["z"], one), draws["z"], one)
        v0, v = student(frozen_params), teacher
        tries = [
            hops.hops(v0, v, y, jnp.moveaxis(n, 1, 0), draws["s"], ratio=0.5, steps=2)
            for n in jnp.moveaxis(draws["n"], 1, 0)
        ]
        target = hops.nearest(y, jnp.stack(tries))
        return distances.token_huber(y - target, 0.03).mean()

    found, right, wrong = jit(
        lambda: (
            update.loss(moved.params, draws, state, frozen())[1].scalars["repair"],
            expected(role.extra),
            expected(moved.params),
        )
    )()
    np.testing.assert_allclose(found, right, rtol=2e-5)
    assert abs(right - wrong) > 0.01 * right


def test_first_hops_are_drawn_from_the_whole_range():
    times = np.asarray(drawn(REPAIR)["s"])
    assert ((times >= 0.6) & (times <= 0.8)).all()
    assert times.max() - times.min() > 0.1


def test_repair_begins_with_what_the_phase_before_made():
    begin = jit(lambda: guided.begin_student(REPAIR, networks(), frozen(), None, jax.random.key(9)))
    given = jax.tree.map(lambda a: a + 1, begin())
    role = REPAIR.objective(networks()).start(frozen(), given, jax.random.key(0))["student"]
    assert same_bits(role.params, given) and same_bits(role.extra, given)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (dict(stored=-1), "stored"),
        (dict(route_steps=1), "route_steps"),
        (dict(route_order=3), "route_order"),
        (dict(route_shift=0.0), "route_shift"),
        (dict(from_noise=1.5), "from_noise"),
        (dict(distance_c=0.0), "distance_c"),
        (dict(hops=0), "hops"),
        (dict(hop_from=(0.8, 0.6)), "hop_from"),
        (dict(hop_from=(0.6,)), "hop_from"),
        (dict(hop_ratio=0.0), "hop_ratio"),
        (dict(hop_steps=-1), "hop_steps"),
        (dict(tries=0), "tries"),
        (dict(hop_c=-1.0), "hop_c"),
        (dict(anchor_share=0.0), "anchor_share"),
        (dict(anchor_weight=0.0), "anchor_weight"),
        (dict(guidance=()), "guidance"),
    ],
)
def test_values_out_of_range(changes, field):
    assert field in dict(dataclasses.replace(REPAIR, **changes).problems())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(batch=16, accumulate=16), "draws 0.5 of it beside it, 8 samples"),
        (dict(batch=1), "draws 0.5 of it beside it, 0 samples"),
    ],
)
def test_an_anchor_that_parts_cannot_hold_is_refused(changes, words):
    """Before anything is compiled. Fails when a share is not checked against the parts."""
    tree = card(preset="shapes")
    tree.phases.repair.update(changes)
    with pytest.raises(UserError, match=words):
        config.parse(tree)

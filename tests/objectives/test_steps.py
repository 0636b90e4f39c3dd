"""The teacher, generator and discriminator steps at a tiny size: what they learn and keep."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from helpers.arrays import max_error, normals, same_bits
from helpers.distillation import (
    BATCH,
    TIMES,
    batch,
    conditions,
    frozen,
    jit,
    networks,
    settings,
    teacher,
    tiny_config,
)
from sprint_jax import build
from sprint_jax.diffusion import flow, scm, trigflow
from sprint_jax.objectives import flow_matching, step, views
from sprint_jax.optim import came, optimizers
from sprint_jax.training import stages

pytestmark = pytest.mark.second_pass

# Plain descent. It compiles faster, and its first update is the gradient itself.
DESCENT = {"student": optax.sgd(1.0, momentum=0.9), "heads": optax.sgd(0.05, momentum=0.9)}


def make_step(role, *, accumulate=1, seed=0, **changes):
    """Return the step of a role, with changes to the settings; not compiled."""
    return step.make_step(
        settings(**changes).objective(networks()).updates[role],
        DESCENT[role],
        ema=tiny_config().phases["sprint"].ema if role == "student" else 0.0,
        accumulate=accumulate,
        seed=seed,
    )


@functools.cache
def start():
    """Return the distillation's state at step 0."""
    teacher()
    make = lambda key: step.start(
        settings().objective(networks()),
        DESCENT,
        ema=tiny_config().phases["sprint"].ema,
        frozen=frozen(),
        begin=None,
        key=key,
    )
    return jax.tree.map(np.asarray, jit(make)(jax.random.key(1)))


def student_role(state):
    """Return the student's role."""
    return state.roles["student"]


@functools.cache
def steps():
    """Return (generator step, discriminator step), compiled."""
    return tuple(jit(make_step(role)) for role in ("student", "heads"))


# What an update may change in a role, beside its counters.
PARTS = ("params", "ema", "opt", "extra")


def rejected(state):
    """Return [the student's rejections in a row, those of the heads, all of both together]."""
    (student_row, of_student), (heads_row, of_heads) = (
        state.roles[name].rejected.tolist() for name in ("student", "heads")
    )
    return [student_row, heads_row, of_student + of_heads]


def batch_with_nan():
    """Return a batch with one NaN."""
    bad = batch()
    bad["latent"][1, 0, 0, 0] = np.nan
    return bad


def flow_settings(**changes):
    """Return the settings of the teacher's flow matching, with changes."""
    return dataclasses.replace(tiny_config().phases["teacher"].objective, **changes)


def teacher_start_and_step(settings, tx, *, ema, accumulate, seed):
    """Return (state at step 0 around `teacher`, compiled step) of flow matching."""
    phase = tiny_config().phases["teacher"]
    objective = settings.objective(stages.networks(tiny_config(), phase))
    update = objective.updates["network"]
    now = step.start(
        objective,
        {"network": tx},
        ema=ema,
        frozen=frozen(),
        begin=teacher(),
        key=jax.random.key(0),
    )
    return now, jit(step.make_step(update, tx, ema=ema, accumulate=accumulate, seed=seed))


@functools.cache
def teacher_run():
    """Return (initial state, step) of the teacher."""
    phase = tiny_config().phases["teacher"]
    tx = optimizers.make(
        phase.optimizers["network"], updates=1000, batch=BATCH, rules=came.LINEAR_DIT
    )
    return teacher_start_and_step(flow_settings(), tx, ema=phase.ema, accumulate=1, seed=0)


def teacher_role(state):
    """Return the teacher's role."""
    return state.roles["network"]


def test_teacher_learns_a_batch():
    """The mean of 5 losses falls by a fifth within 20 steps.

    Fails when the sign of the gradient is flipped.
    """
    now, update = teacher_run()
    losses = []
    for _ in range(20):
        now, report = update(now, frozen(), batch())
        losses.append(float(report.scalars["loss"]))
    assert 0 < np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert int(now.step) == int(teacher_role(now).updates) == 20
    assert not same_bits(teacher_role(now).ema, teacher())
    assert not same_bits(teacher_role(now).ema, teacher_role(now).params)


def test_teacher_rejects_a_nan():
    """Fails when select always takes the new values, and when count_rejected does not reset its
    row.
    """
    now, update = teacher_run()
    for count in (1, 2):
        bad, report = update(now, frozen(), batch_with_nan())
        for part in PARTS:
            assert same_bits(getattr(teacher_role(bad), part), getattr(teacher_role(now), part))
        assert not np.isfinite(report.scalars["loss"])
        assert teacher_role(bad).rejected.tolist() == report.rejected.tolist() == [count, count]
        assert int(bad.step) == count
        now = bad
    good, report = update(now, frozen(), batch())
    assert teacher_role(good).rejected.tolist() == [0, 2]
    assert np.isfinite(report.scalars["loss"])
    assert not same_bits(teacher_role(good).params, teacher_role(now).params)


@functools.cache
def teacher_descent(parts):
    """Return (state, report) after an update by the gradient itself, of a batch in `parts`
    parts.
    """
    drawn = flow_settings(caption_dropout=0.5, time_mean=0.3, time_std=0.7, time_shift=3.0)
    now, update = teacher_start_and_step(drawn, optax.sgd(1.0), ema=0.0, accumulate=parts, seed=5)
    return update(now, frozen(), batch())


def test_teacher_step_is_the_loss_of_its_draws():
    """Compare with the same keys: shifted times, and the null text under the mask of the caption
    where it was dropped.

    Fails without either, and when the null text has another mask.
    """
    (_, report), b = teacher_descent(1), batch()
    k_time, k_noise, k_drop = jax.random.split(jax.random.fold_in(jax.random.key(5), 0), 3)
    odds = 3 * np.exp(0.3 + 0.7 * np.asarray(jax.random.normal(k_time, (BATCH,))))
    t, z = odds / (1 + odds), jax.random.normal(k_noise, b["latent"].shape)
    dropped = np.asarray(jax.random.bernoulli(k_drop, 0.5, (BATCH, 1, 1)))
    text = np.where(dropped, frozen().null_text, b["text"])
    assert 4 < dropped.sum() < BATCH - 4

    v = lambda x, t: networks().teacher.apply(teacher(), x, t, text, b["mask"]).velocity
    expected = jit(lambda: flow.loss(v, b["latent"], z, t).mean())()
    np.testing.assert_allclose(report.scalars["loss"], expected, rtol=1e-5)


def test_a_start_in_which_padding_matters():
    """Three leaves of the usual start change, as specified.

    Fails when another row of the table is raised.
    """
    model, key = networks().teacher, jax.random.key(3)
    flat = lambda params: {
        "/".join(path): np.asarray(a) for path, a in traverse_util.flatten_dict(params).items()
    }
    starts = jit(
        lambda: (
            model.init(key),
            *(flow_matching.fresh(model, key, borders=b) for b in (True, False)),
        )
    )
    usual, raised, same_start = map(flat, starts())
    bias, table, patches = (
        "blocks/ff/conv_inverted/bias",
        "blocks/scale_shift_table",
        "inputs/patch_embed/kernel",
    )
    assert {name for name in usual if not np.array_equal(usual[name], raised[name])} == {
        bias,
        table,
        patches,
    }
    assert all(np.array_equal(usual[name], same_start[name]) for name in usual)
    assert not usual[bias].any()
    assert 1.8 < raised[bias].std() < 2.2
    assert abs(raised[bias].mean()) < 0.5
    np.testing.assert_allclose(
        raised[table] - usual[table],
        np.broadcast_to([[0], [0], [0], [0], [0], [1]], usual[table].shape),
        atol=1e-6,
    )
    np.testing.assert_allclose(raised[patches], 0.3 * usual[patches], rtol=1e-6)


def test_generator_step_updates_the_student_alone():
    """Fails when the adversarial loss enters without its weight."""
    generator, _ = steps()
    before = start()
    after, report = generator(before, frozen(), batch())
    assert same_bits(after.roles["heads"], before.roles["heads"])
    assert not same_bits(student_role(after).params, student_role(before).params)
    assert not same_bits(student_role(after).opt, student_role(before).opt)
    assert int(after.step) == 1 and rejected(after) == [0, 0, 0]
    total = report.scalars["scm"] + 0.5 * report.scalars["adv"]
    np.testing.assert_allclose(report.scalars["loss"], total, rtol=1e-5)
    moved = [
        np.square(a - b).sum()
        for a, b in zip(*(jax.tree.leaves(student_role(now).params) for now in (after, before)))
    ]
    np.testing.assert_allclose(np.sqrt(sum(moved)), report.norms["grad_norm"], rtol=1e-3)


def test_discriminator_step_updates_the_heads_alone():
    """Fails when `prepare` does not advance the singular vectors, and when the gradient is
    negated.
    """
    _, discriminator = steps()
    before = start()
    after, report = discriminator(before, frozen(), batch())
    assert same_bits(student_role(after), student_role(before))
    for part in ("params", "opt", "extra"):
        assert not same_bits(
            getattr(after.roles["heads"], part), getattr(before.roles["heads"], part)
        )
    assert int(after.step) == 1 and np.isfinite(report.scalars["disc"])
    moved = before.roles["heads"].replace(params=after.roles["heads"].params)
    changed = before.replace(roles=before.roles | {"heads": moved})
    _, again = discriminator(changed, frozen(), batch())
    # The same draws, after the update.
    assert 0 < again.scalars["disc"] < report.scalars["disc"] - 1e-4


def test_the_students_average_counts_rounds():
    """Computed by hand for a generator, a discriminator and a generator step: shares of 1/10, then
    2/11.

    Fails when the average counts both kinds of steps.
    """
    generator, discriminator = steps()
    first, _ = generator(start(), frozen(), batch())
    between, _ = discriminator(first, frozen(), batch())
    second, _ = generator(between, frozen(), batch())
    mixed = lambda share, ema, params: jax.tree.map(
        lambda e, p: share * e + (1 - share) * p, ema, params
    )
    far = lambda a, b: float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)))
    zeroth, first, between, second = map(student_role, (start(), first, between, second))
    once = mixed(1 / 10, zeroth.params, first.params)
    assert far(first.ema, once) < 1e-4 * far(zeroth.params, first.params)
    assert same_bits(between.ema, first.ema)
    assert far(second.ema, mixed(2 / 11, once, second.params)) < 1e-3 * far(once, second.params)


def test_margins_are_of_the_students_images_alone():
    """With misaligned pairs beside them or without.

    Fails when the mean is over both kinds of fakes.
    """
    _, with_pairs = steps()[1](start(), frozen(), batch())
    _, without = jit(make_step("heads", misaligned=False))(start(), frozen(), batch())
    with_pairs, without = with_pairs.scalars, without.scalars
    assert abs(with_pairs["disc"] - without["disc"]) > 1e-4
    for side in ("real", "fake"):
        np.testing.assert_allclose(
            with_pairs[f"head_1/{side}"], without[f"head_1/{side}"], rtol=1e-4, atol=1e-6
        )
    assert abs(with_pairs["head_1/real"] - with_pairs["head_1/fake"]) > 1e-3


def test_sprint_steps_reject_a_nan():
    """Fails when the singular vectors keep their new value in make_step."""
    now = start()
    for count, update in enumerate(steps(), 1):
        bad, _report = update(now, frozen(), batch_with_nan())
        for name in ("student", "heads"):
            for part in PARTS:
                before, after = (getattr(each.roles[name], part) for each in (now, bad))
                assert same_bits(after, before), (name, part)
        assert rejected(bad) == [1, count - 1, count]
        now = bad
    good, _ = steps()[0](now, frozen(), batch())
    assert rejected(good) == [0, 1, 2]


def test_a_network_that_always_fails_is_not_hidden_by_the_other():
    """Rejections in a row are counted for each: a finite update of the heads does not reset the
    student's count.
    """
    generator, discriminator = steps()
    now = start()
    for count in (1, 2, 3):
        now, of_student = generator(now, frozen(), batch_with_nan())
        now, of_heads = discriminator(now, frozen(), batch())
        assert rejected(now) == [count, 0, count]
        assert of_student.rejected.tolist() == [count, count]
        assert of_heads.rejected.tolist() == [0, 0]


def test_student_starts_as_the_teacher():
    """This holds at each guidance scale. Fails when student_params prefers its fresh values."""
    b, u = batch(), normals(BATCH, *build.latent_shape(tiny_config()), seed=5)
    t = TIMES
    v = lambda x, t: networks().teacher.apply(teacher(), x, t, b["text"], b["mask"]).velocity
    expected = jit(trigflow.from_flow(v))(u, t)
    student = jit(
        lambda w: views.student_F(
            networks().trained, student_role(start()).params, conditions(b), w
        )(u, t)
    )
    for w in (0.0, 2.0, 7.0):
        F, logvar = student(np.full(BATCH, w, np.float32))
        assert max_error(F, expected) < 1e-6
        assert (np.asarray(logvar) == 0).all()


def test_the_student_receives_the_guidance_of_each_sample():
    """F is the network's own velocity at the scale of the sample.

    Fails when student_F passes no scale, or one for all samples.
    """
    b, w, u = (
        batch(),
        np.tile(np.float32([1.0, 2.0, 4.5, 7.0]), BATCH // 4),
        normals(BATCH, *build.latent_shape(tiny_config()), seed=5),
    )
    t = TIMES
    embed = student_role(start()).params["inputs"]["guidance_embed"]
    told_more = jax.tree.map(
        lambda a: a + 0.3 * normals(*a.shape, seed=a.size), embed
    )  # it ends with zeros
    params = student_role(start()).params | {
        "inputs": student_role(start()).params["inputs"] | {"guidance_embed": told_more}
    }
    F = jit(lambda w: views.student_F(networks().trained, params, conditions(b), w)(u, t)[0])

    @jit
    def alike(one):
        s = trigflow.to_flow_time(t)
        x = trigflow.to_flow_state(u, t)
        v = (
            networks()
            .trained.apply(
                params, x, s, guidance=np.full(BATCH, 1, np.float32) * one, **conditions(b)
            )
            .velocity
        )
        return trigflow.from_flow_velocity(v, x, s)

    each = np.asarray(F(w))
    for i, one in enumerate(w[:4]):
        assert max_error(each[i::4], alike(one)[i::4]) < 1e-5
    for one, other in zip(each, np.asarray(F(w[::-1]))):
        assert max_error(one, other) > 1e-2


@pytest.mark.parametrize("uncond_mask", ["cond", "null"])
def test_teacher_velocity_is_two_calls(uncond_mask):
    """Fails when the null half takes the text, when the masks of the two halves are swapped, and
    when the result is not scaled by sigma_d.
    """
    b, w = batch(), np.tile(np.float32([0.0, 1.0, 2.0, 4.5]), BATCH // 4)
    xt = 0.5 * normals(*b["latent"].shape, seed=3)
    t = TIMES
    value = jit(views.teacher_velocity(networks(), frozen(), conditions(b), w, uncond_mask))(xt, t)

    def F(text, mask):
        v = lambda x, t: networks().teacher.apply(teacher(), x, t, text, mask).velocity
        return np.asarray(jit(trigflow.from_flow(v))(2 * xt, t))

    null_mask = b["mask"] if uncond_mask == "cond" else np.repeat(frozen().null_mask, BATCH, 0)
    uncond, cond = F(np.repeat(frozen().null_text, BATCH, 0), null_mask), F(b["text"], b["mask"])
    w = w[:, None, None, None]
    assert max_error(value, 0.5 * ((1 - w) * uncond + w * cond)) < 1e-5
    assert all(max_error(uncond[i], cond[i]) > 1e-3 for i in range(3))


def test_adversarial_gradient_alone():
    """With scm_weight 0 every block has a gradient, and the logvar head has none.

    Fails when generate's x0_hat is stopped before the renoising.
    """
    before = start()
    after, report = jit(make_step("student", scm_weight=0.0))(before, frozen(), batch())
    slope = jax.tree.map(
        lambda a, b: a - b, student_role(before).params, student_role(after).params
    )
    assert "scm" not in report.scalars and float(report.norms["grad_norm"]) > 1e-3
    np.testing.assert_allclose(report.scalars["loss"], 0.5 * report.scalars["adv"], rtol=1e-6)
    for leaf in slope["blocks"]["ff"]["conv_point"]["kernel"]:
        assert np.abs(leaf).max() > 0
    assert np.abs(slope["inputs"]["logvar"]["kernel"]).max() == 0


def test_qk_norm_is_added_and_nothing_else():
    """Existing parameters stay, and the new weights are ones.

    Fails when a merged weight is zero instead of one.
    """
    model = networks().teacher
    bare = dataclasses.replace(model, qk_norm=False)
    params = jax.tree.map(np.copy, teacher())
    for attention in ("attn1", "attn2"):
        for name in ("norm_q", "norm_k"):
            del params["blocks"][attention][name]
    done = flow_matching.add_qk_norm(params, model, jax.random.key(0))
    assert jax.tree.structure(done) == jax.tree.structure(teacher())
    for attention in ("attn1", "attn2"):
        for name in ("norm_q", "norm_k"):
            assert (np.asarray(done["blocks"][attention].pop(name)["weight"]) == 1).all()
    assert same_bits(done, params)
    done = flow_matching.add_qk_norm(params, model, jax.random.key(0))
    b, t = batch(), TIMES / 1.6
    run = lambda m, p: jit(lambda p: m.apply(p, b["latent"], t, b["text"], b["mask"]).velocity)(p)
    # Without the norms in the forward pass the completed tree is the old network.
    plain = run(bare, params)
    assert max_error(run(bare, done), plain) < 1e-6
    assert max_error(run(model, done), plain) > 1e-3
    del params["inputs"]["time_proj"]
    with pytest.raises(ValueError, match="inputs/time_proj/(bias|kernel) is missing"):
        flow_matching.add_qk_norm(params, model, jax.random.key(0))


def test_frozen_teacher_gets_no_gradient():
    """The gradient of the sCM loss by the teacher's parameters is exactly zero.

    Fails when neither scm.loss's velocity nor the tangent is stopped.
    """
    b, w = batch(), np.full(BATCH, 2.0, np.float32)
    x0, z = (0.5 * normals(*b["latent"].shape, seed=i) for i in (1, 2))
    t = TIMES

    def loss(teacher_params):
        F = views.student_F(networks().trained, student_role(start()).params, conditions(b), w)
        held = frozen().replace(teacher=teacher_params)
        velocity = views.teacher_velocity(networks(), held, conditions(b), w, "cond")
        return scm.loss(F, velocity, x0, z, t, r=1.0, weighting="code", normalize=True)[0].mean()

    value, slope = jit(jax.value_and_grad(loss))(teacher())
    assert value > 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(slope))


def test_logvar_gradient_reaches_its_head_alone_on_request():
    """The value is the same.

    Fails when _head_alone stops nothing, and when it stops the head too.
    """
    b, w = batch(), np.full(BATCH, 2.0, np.float32)
    u, t = normals(*b["latent"].shape, seed=1), TIMES
    params = jax.tree.map(np.copy, student_role(start()).params)
    params["inputs"]["logvar"]["kernel"] += normals(
        *params["inputs"]["logvar"]["kernel"].shape, seed=2
    )  # starts at zero

    def sloped(who):
        mean = lambda p: views.student_F(
            networks().trained, p, conditions(b), w, logvar_gradient=who
        )(u, t)[1].mean()
        value, slope = jit(jax.value_and_grad(mean))(params)
        return value, traverse_util.flatten_dict(slope)

    (value, by_network), (same_value, by_head) = sloped("network"), sloped("head")
    assert value == same_value != 0
    embedding = [path for path in by_network if "time_embed" in path or "guidance_embed" in path]
    assert embedding
    assert max(np.abs(by_network[path]).max() for path in embedding) > 1e-3
    for path, slope in by_head.items():
        expected = by_network[path] if "logvar" in path else np.zeros_like(slope)
        assert np.array_equal(slope, expected), path


def test_logvar_starts_at_the_given_value():
    """At every time and scale, and nothing else changes.

    Fails when the start does not reach the head's bias.
    """
    b, key = batch(), jax.random.key(1)
    zero, moved = (
        views.student_params(teacher(), networks().trained, key, logvar_start=start)
        for start in (0.0, -6.0)
    )
    F = views.student_F(
        networks().trained,
        moved,
        conditions(b),
        np.tile(np.float32([1.0, 1.5, 2.0, 4.5]), BATCH // 4),
    )
    u, t = normals(*b["latent"].shape, seed=1), TIMES
    np.testing.assert_array_equal(jit(F)(u, t)[1], np.full(BATCH, -6.0, np.float32))
    zero["inputs"].pop("logvar"), moved["inputs"].pop("logvar")
    assert same_bits(zero, moved)


def test_generator_step_obeys_logvar_gradient():
    """Fails when scm.term does not pass the key to student_F."""
    before = start()
    params = student_role(before).params
    kernel = params["inputs"]["logvar"]["kernel"]
    logvar = params["inputs"]["logvar"] | {"kernel": normals(*kernel.shape, seed=2)}
    params = params | {"inputs": params["inputs"] | {"logvar": logvar}}
    roles = before.roles | {"student": student_role(before).replace(params=params)}
    before = before.replace(roles=roles)
    updates = {
        who: make_step("student", adv_weight=0.0, logvar_gradient=who)
        for who in ("network", "head")
    }
    # In one program, so that the shared part is compiled once.
    reports = jit(lambda *args: {who: update(*args)[1] for who, update in updates.items()})(
        before, frozen(), batch()
    )
    assert reports["head"].scalars["loss"] == reports["network"].scalars["loss"]
    norms = {who: report.norms for who, report in reports.items()}
    assert norms["head"]["grad_norm/inputs/logvar"] == pytest.approx(
        float(norms["network"]["grad_norm/inputs/logvar"]), rel=1e-4
    )
    with_both, alone = (
        float(norms[who]["grad_norm/inputs/time_embed"]) for who in ("network", "head")
    )
    assert abs(with_both - alone) > 0.01 * with_both


@pytest.mark.parametrize(
    "which, role, loss", [(0, "student", "loss"), (1, "heads", "disc")], ids=["student", "heads"]
)
def test_accumulation_changes_nothing(which, role, loss):
    """Two parts equal the whole.

    Fails when parts are summed instead of averaged, and when a part has draws of its own.
    """
    results = []
    for update in (steps()[which], jit(make_step(role, accumulate=2))):
        after, report = update(start(), frozen(), batch())
        results.append((jax.device_get(after), report.scalars[loss]))
    (one, whole), (two, parted) = results
    assert abs(whole - parted) < 1e-5 * abs(whole)
    before = start()
    for name in ("student", "heads"):
        for part in ("params", "extra"):
            trees = (getattr(each.roles[name], part) for each in (one, two, before))
            for a, b, c in zip(*map(jax.tree.leaves, trees), strict=True):
                # Of the update, not of the parameter. Biases before a normalization change by
                # rounding alone.
                assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a - c) + 1e-6


def test_accumulation_of_the_teacher():
    """Fails when parts are summed instead of averaged."""
    (one, whole), (four, parted) = teacher_descent(1), teacher_descent(4)
    whole, parted = whole.scalars["loss"], parted.scalars["loss"]
    assert abs(whole - parted) < 1e-5 * whole
    for a, b in zip(
        *(jax.tree.leaves(teacher_role(now).params) for now in (one, four)), strict=True
    ):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a)

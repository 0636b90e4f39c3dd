"""The teacher, generator and discriminator steps at a tiny size: what they learn and keep."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from helpers.arrays import max_error, normals
from helpers.compiler import UNOPTIMIZED
from helpers.configs import card
from sprint_jax import build, config
from sprint_jax.diffusion import flow, scm, trigflow
from sprint_jax.training import came, sprint_step, state, teacher_step

pytestmark = pytest.mark.second_pass

BATCH, SIDE = 2 * 8, 4  # two parts of one normalization group each


def jit(function):
    """Compile a function quickly."""
    return jax.jit(function, compiler_options=UNOPTIMIZED)


@functools.cache
def tiny_config():
    """Return the config of a narrow network on small latents."""
    tree = card()
    tree.data.size = SIDE * tree.codec.block
    tree.model.update(width=16, unroll=1)
    tree.phases.teacher.optimizers.network.update(lr=3e-3, warmup=0)
    tree.phases.sprint.objective.update(
        head_blocks=(1,), scm_weight=1.0, adv_weight=0.5, misaligned=True, reduction="code"
    )
    return config.parse(tree)


TIMES = np.tile(np.float32([0.1, 0.6, 1.1, 1.5]), BATCH // 4)


def batch():
    """Return a batch with four prompts, one of them empty."""
    prompts = ["a red circle", "a blue square above a green triangle", "a circle", ""]
    text, mask = build.text_encoder(tiny_config()).encode(prompts * (BATCH // 4))
    return {
        "latent": normals(BATCH, *build.latent_shape(tiny_config())),
        "text": text,
        "mask": mask,
    }


def conditions(rows):
    """Return what networks receive of a batch besides the state."""
    return {name: rows[name] for name in ("text", "mask")}


@functools.cache
def nets():
    """Return the networks with plain descent.

    It compiles faster, and its first update is the gradient itself.
    """
    descent = lambda rate: optax.sgd(rate, momentum=0.9)
    return dataclasses.replace(build.nets(tiny_config()), tx=descent(1.0), heads_tx=descent(0.05))


@functools.cache
def teacher():
    """Return parameters of the teacher, none at its initial value."""
    params = jit(nets().teacher.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    moved = [np.asarray(a) + 0.1 * normals(*a.shape, seed=i) for i, a in enumerate(leaves)]
    return jax.tree.unflatten(tree, [a.astype(np.float32) for a in moved])


@functools.cache
def frozen():
    """Return the frozen arrays of the distillation."""
    null_text, null_mask = build.text_encoder(tiny_config()).encode([""])
    return {"teacher": teacher(), "null_text": null_text, "null_mask": null_mask}


@functools.cache
def start():
    """Return the distillation's state at step 0."""
    teacher()
    make = lambda key: sprint_step.init(
        sprint_step.student_params(
            teacher(), nets(), key, logvar_start=tiny_config().sprint.logvar_start
        ),
        nets(),
        tiny_config().sprint,
        key,
    )
    return jax.tree.map(np.asarray, jit(make)(jax.random.key(1)))


@functools.cache
def steps():
    """Return (generator step, discriminator step), compiled."""
    make = sprint_step.make_generator_step, sprint_step.make_discriminator_step
    return tuple(jit(m(nets(), tiny_config().sprint, 0)) for m in make)


def same_bits(one, other):
    """Return whether two trees are bit-equal; NaN equals nothing."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def batch_with_nan():
    """Return a batch with one NaN."""
    bad = batch()
    bad["latent"][1, 0, 0, 0] = np.nan
    return bad


@functools.cache
def teacher_run():
    """Return (initial state, step) of the teacher."""
    tx = state.optimizer(
        tiny_config().teacher.optimizer,
        1000,
        BATCH,
        came_rules=(came.dit_factored, came.dit_stacked),
    )
    step = jit(teacher_step.make_step(nets().teacher, tx, tiny_config().teacher, 0))
    return teacher_step.init(teacher(), tx, tiny_config().teacher), step


def test_teacher_learns_a_batch():
    """The mean of 5 losses falls by a fifth within 20 steps.

    Fails when the sign of the gradient is flipped.
    """
    now, step = teacher_run()
    losses = []
    for _ in range(20):
        now, metrics = step(now, frozen(), batch())
        losses.append(float(metrics["loss"]))
    assert 0 < np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert int(now.step) == 20
    assert not same_bits(now.ema, teacher())
    assert not same_bits(now.ema, now.params)


def test_teacher_rejects_a_nan():
    """Fails when select always takes the new values, and when count_rejected does not reset its
    row.
    """
    now, step = teacher_run()
    for count in (1, 2):
        bad, metrics = step(now, frozen(), batch_with_nan())
        for part in ("params", "opt", "ema"):
            assert same_bits(getattr(bad, part), getattr(now, part))
        assert not np.isfinite(metrics["loss"])
        assert bad.rejected.tolist() == [count, count] and int(bad.step) == count
        now = bad
    good, metrics = step(now, frozen(), batch())
    assert good.rejected.tolist() == [0, 2] and np.isfinite(metrics["loss"])
    assert not same_bits(good.params, now.params)


@functools.cache
def teacher_descent(parts):
    """Return (state, metrics) after an update by the gradient itself, of a batch in `parts`
    parts.
    """
    c = dataclasses.replace(
        tiny_config().teacher,
        accumulate=parts,
        caption_dropout=0.5,
        time_mean=0.3,
        time_std=0.7,
        time_shift=3.0,
    )
    tx = optax.sgd(1.0)
    return jit(teacher_step.make_step(nets().teacher, tx, c, 5))(
        teacher_step.init(teacher(), tx, c), frozen(), batch()
    )


def test_teacher_step_is_the_loss_of_its_draws():
    """Compare with the same keys: shifted times, and the null text under the mask of the caption
    where it was dropped.

    Fails without either, and when the null text has another mask.
    """
    (_, metrics), b = teacher_descent(1), batch()
    k_time, k_noise, k_drop = jax.random.split(jax.random.fold_in(jax.random.key(5), 0), 3)
    odds = 3 * np.exp(0.3 + 0.7 * np.asarray(jax.random.normal(k_time, (BATCH,))))
    t, z = odds / (1 + odds), jax.random.normal(k_noise, b["latent"].shape)
    dropped = np.asarray(jax.random.bernoulli(k_drop, 0.5, (BATCH, 1, 1)))
    text = np.where(dropped, frozen()["null_text"], b["text"])
    assert 4 < dropped.sum() < BATCH - 4

    v = lambda x, t: nets().teacher.apply(teacher(), x, t, text, b["mask"]).velocity
    expected = jit(lambda: flow.loss(v, b["latent"], z, t).mean())()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_a_start_in_which_padding_matters():
    """Three leaves of the usual start change, as specified.

    Fails when another row of the table is raised.
    """
    model, key = nets().teacher, jax.random.key(3)
    flat = lambda params: {
        "/".join(path): np.asarray(a) for path, a in traverse_util.flatten_dict(params).items()
    }
    starts = jit(
        lambda: (
            model.init(key),
            *(teacher_step.start(model, key, borders=b) for b in (True, False)),
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
    after, metrics = generator(before, frozen(), batch())
    for part in ("heads", "heads_opt", "spectral"):
        assert same_bits(getattr(after, part), getattr(before, part))
    assert not same_bits(after.params, before.params)
    assert not same_bits(after.opt, before.opt)
    assert int(after.step) == 1 and after.rejected.tolist() == [0, 0, 0]
    total = metrics["scm"] + 0.5 * metrics["adv"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    moved = [
        np.square(a - b).sum() for a, b in zip(*map(jax.tree.leaves, (after.params, before.params)))
    ]
    np.testing.assert_allclose(np.sqrt(sum(moved)), metrics["grad_norm"], rtol=1e-3)


def test_discriminator_step_updates_the_heads_alone():
    """Fails when make_discriminator_step runs with update=False, and when its gradient is
    negated.
    """
    _, discriminator = steps()
    before = start()
    after, metrics = discriminator(before, frozen(), batch())
    for part in ("params", "opt", "ema"):
        assert same_bits(getattr(after, part), getattr(before, part))
    for part in ("heads", "heads_opt", "spectral"):
        assert not same_bits(getattr(after, part), getattr(before, part))
    assert int(after.step) == 1 and np.isfinite(metrics["disc"])
    _, again = discriminator(before.replace(heads=after.heads), frozen(), batch())
    assert 0 < again["disc"] < metrics["disc"] - 1e-4  # the same draws, after the update


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
    once = mixed(1 / 10, start().params, first.params)
    assert far(first.ema, once) < 1e-4 * far(start().params, first.params)
    assert same_bits(between.ema, first.ema)
    assert far(second.ema, mixed(2 / 11, once, second.params)) < 1e-3 * far(once, second.params)


def test_margins_are_of_the_students_images_alone():
    """With misaligned pairs beside them or without.

    Fails when the mean is over both kinds of fakes.
    """
    _, with_pairs = steps()[1](start(), frozen(), batch())
    alone = sprint_step.make_discriminator_step(
        nets(), dataclasses.replace(tiny_config().sprint, misaligned=False), 0
    )
    _, without = jit(alone)(start(), frozen(), batch())
    assert abs(with_pairs["disc"] - without["disc"]) > 1e-4
    for side in ("real", "fake"):
        np.testing.assert_allclose(
            with_pairs[f"head_1/{side}"], without[f"head_1/{side}"], rtol=1e-4, atol=1e-6
        )
    assert abs(with_pairs["head_1/real"] - with_pairs["head_1/fake"]) > 1e-3


def test_sprint_steps_reject_a_nan():
    """Fails when spectral keeps its new value in make_discriminator_step."""
    now = start()
    for count, step in enumerate(steps(), 1):
        bad, _metrics = step(now, frozen(), batch_with_nan())
        for part in ("params", "opt", "ema", "heads", "heads_opt", "spectral"):
            assert same_bits(getattr(bad, part), getattr(now, part)), part
        assert bad.rejected.tolist() == [1, count - 1, count]
        now = bad
    good, _ = steps()[0](now, frozen(), batch())
    assert good.rejected.tolist() == [0, 1, 2]


def test_a_network_that_always_fails_is_not_hidden_by_the_other():
    """Rejections in a row are counted for each: a finite update of the heads does not reset the
    student's count.
    """
    generator, discriminator = steps()
    now = start()
    for count in (1, 2, 3):
        now, _ = generator(now, frozen(), batch_with_nan())
        now, metrics = discriminator(now, frozen(), batch())
        assert now.rejected.tolist() == metrics["rejected"].tolist() == [count, 0, count]


def test_student_starts_as_the_teacher():
    """This holds at each guidance scale. Fails when student_params prefers its fresh values."""
    b, u = batch(), normals(BATCH, *build.latent_shape(tiny_config()), seed=5)
    t = TIMES
    v = lambda x, t: nets().teacher.apply(teacher(), x, t, b["text"], b["mask"]).velocity
    expected = jit(trigflow.from_flow(v))(u, t)
    student = jit(lambda w: sprint_step.student_F(nets(), start().params, conditions(b), w)(u, t))
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
    embed = start().params["inputs"]["guidance_embed"]
    told_more = jax.tree.map(
        lambda a: a + 0.3 * normals(*a.shape, seed=a.size), embed
    )  # it ends with zeros
    params = start().params | {"inputs": start().params["inputs"] | {"guidance_embed": told_more}}
    F = jit(lambda w: sprint_step.student_F(nets(), params, conditions(b), w)(u, t)[0])

    @jit
    def alike(one):
        s = trigflow.to_flow_time(t)
        x = trigflow.to_flow_state(u, t)
        v = (
            nets()
            .student.apply(
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
    value = jit(sprint_step.teacher_velocity(nets(), frozen(), conditions(b), w, uncond_mask))(
        xt, t
    )

    def F(text, mask):
        v = lambda x, t: nets().teacher.apply(teacher(), x, t, text, mask).velocity
        return np.asarray(jit(trigflow.from_flow(v))(2 * xt, t))

    null_mask = b["mask"] if uncond_mask == "cond" else np.repeat(frozen()["null_mask"], BATCH, 0)
    uncond, cond = F(np.repeat(frozen()["null_text"], BATCH, 0), null_mask), F(b["text"], b["mask"])
    w = w[:, None, None, None]
    assert max_error(value, 0.5 * ((1 - w) * uncond + w * cond)) < 1e-5
    assert all(max_error(uncond[i], cond[i]) > 1e-3 for i in range(3))


def test_adversarial_gradient_alone():
    """With scm_weight 0 every block has a gradient, and the logvar head has none.

    Fails when generate's x0_hat is stopped before the renoising.
    """
    before, c = start(), dataclasses.replace(tiny_config().sprint, scm_weight=0.0)
    after, metrics = jit(sprint_step.make_generator_step(nets(), c, 0))(before, frozen(), batch())
    slope = jax.tree.map(lambda a, b: a - b, before.params, after.params)
    assert "scm" not in metrics and float(metrics["grad_norm"]) > 1e-3
    np.testing.assert_allclose(metrics["loss"], 0.5 * metrics["adv"], rtol=1e-6)
    for leaf in slope["blocks"]["ff"]["conv_point"]["kernel"]:
        assert np.abs(leaf).max() > 0
    assert np.abs(slope["inputs"]["logvar"]["kernel"]).max() == 0


def test_qk_norm_is_added_and_nothing_else():
    """Existing parameters stay, and the new weights are ones.

    Fails when a merged weight is zero instead of one.
    """
    model = nets().teacher
    bare = dataclasses.replace(model, qk_norm=False)
    params = jax.tree.map(np.copy, teacher())
    for attention in ("attn1", "attn2"):
        for name in ("norm_q", "norm_k"):
            del params["blocks"][attention][name]
    done = teacher_step.add_qk_norm(params, model, jax.random.key(0))
    assert jax.tree.structure(done) == jax.tree.structure(teacher())
    for attention in ("attn1", "attn2"):
        for name in ("norm_q", "norm_k"):
            assert (np.asarray(done["blocks"][attention].pop(name)["weight"]) == 1).all()
    assert same_bits(done, params)
    done = teacher_step.add_qk_norm(params, model, jax.random.key(0))
    b, t = batch(), TIMES / 1.6
    run = lambda m, p: jit(lambda p: m.apply(p, b["latent"], t, b["text"], b["mask"]).velocity)(p)
    # Without the norms in the forward pass the completed tree is the old network.
    plain = run(bare, params)
    assert max_error(run(bare, done), plain) < 1e-6
    assert max_error(run(model, done), plain) > 1e-3
    del params["inputs"]["time_proj"]
    with pytest.raises(ValueError, match="inputs/time_proj/(bias|kernel) is missing"):
        teacher_step.add_qk_norm(params, model, jax.random.key(0))


def test_frozen_teacher_gets_no_gradient():
    """The gradient of the sCM loss by the teacher's parameters is exactly zero.

    Fails when neither scm.loss's velocity nor the tangent is stopped.
    """
    b, w = batch(), np.full(BATCH, 2.0, np.float32)
    x0, z = (0.5 * normals(*b["latent"].shape, seed=i) for i in (1, 2))
    t = TIMES

    def loss(teacher_params):
        F = sprint_step.student_F(nets(), start().params, conditions(b), w)
        held = frozen() | {"teacher": teacher_params}
        velocity = sprint_step.teacher_velocity(nets(), held, conditions(b), w, "cond")
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
    params = jax.tree.map(np.copy, start().params)
    params["inputs"]["logvar"]["kernel"] += normals(
        *params["inputs"]["logvar"]["kernel"].shape, seed=2
    )  # starts at zero

    def sloped(who):
        mean = lambda p: sprint_step.student_F(nets(), p, conditions(b), w, logvar_gradient=who)(
            u, t
        )[1].mean()
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
        sprint_step.student_params(teacher(), nets(), key, logvar_start=start)
        for start in (0.0, -6.0)
    )
    F = sprint_step.student_F(
        nets(), moved, conditions(b), np.tile(np.float32([1.0, 1.5, 2.0, 4.5]), BATCH // 4)
    )
    u, t = normals(*b["latent"].shape, seed=1), TIMES
    np.testing.assert_array_equal(jit(F)(u, t)[1], np.full(BATCH, -6.0, np.float32))
    zero["inputs"].pop("logvar"), moved["inputs"].pop("logvar")
    assert same_bits(zero, moved)


def test_generator_step_obeys_logvar_gradient():
    """Fails when make_generator_step does not pass the key to student_F."""
    before = start()
    kernel = before.params["inputs"]["logvar"]["kernel"]
    logvar = before.params["inputs"]["logvar"] | {"kernel": normals(*kernel.shape, seed=2)}
    before = before.replace(
        params=before.params | {"inputs": before.params["inputs"] | {"logvar": logvar}}
    )
    c = dataclasses.replace(tiny_config().sprint, adv_weight=0.0)
    steps = {
        who: sprint_step.make_generator_step(nets(), dataclasses.replace(c, logvar_gradient=who), 0)
        for who in ("network", "head")
    }
    # In one program, so that the shared part is compiled once.
    norms = jit(lambda *args: {who: step(*args)[1] for who, step in steps.items()})(
        before, frozen(), batch()
    )
    assert norms["head"]["loss"] == norms["network"]["loss"]
    assert norms["head"]["grad_norm/inputs/logvar"] == pytest.approx(
        float(norms["network"]["grad_norm/inputs/logvar"]), rel=1e-4
    )
    with_both, alone = (
        float(norms[who]["grad_norm/inputs/time_embed"]) for who in ("network", "head")
    )
    assert abs(with_both - alone) > 0.01 * with_both


@pytest.mark.parametrize(
    "which, make", enumerate([sprint_step.make_generator_step, sprint_step.make_discriminator_step])
)
def test_accumulation_changes_nothing(which, make):
    """Two parts equal the whole.

    Fails when parts are summed instead of averaged, and when a part has draws of its own.
    """
    results = []
    in_two = jit(make(nets(), dataclasses.replace(tiny_config().sprint, accumulate=2), 0))
    for step in (steps()[which], in_two):
        after, metrics = step(start(), frozen(), batch())
        results.append(
            (jax.device_get(after), metrics["loss"] if "loss" in metrics else metrics["disc"])
        )
    (one, loss), (two, other) = results
    assert abs(loss - other) < 1e-5 * abs(loss)
    before = start()
    for part in ("params", "heads", "spectral"):
        for a, b, c in zip(
            *(jax.tree.leaves(getattr(s, part)) for s in (one, two, before)), strict=True
        ):
            # Of the update, not of the parameter. Biases before a normalization change by rounding
            # alone.
            assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a - c) + 1e-6


def test_accumulation_of_the_teacher():
    """Fails when parts are summed instead of averaged."""
    (one, whole), (four, parted) = teacher_descent(1), teacher_descent(4)
    assert abs(whole["loss"] - parted["loss"]) < 1e-5 * whole["loss"]
    for a, b in zip(*map(jax.tree.leaves, (one.params, four.params)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a)

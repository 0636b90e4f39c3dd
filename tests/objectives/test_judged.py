"""Objectives whose images are judged: judges that fail, the proxy, and policies."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers.arrays import same_bits, tree_error
from helpers.distillation import batch, frozen, jit, networks
from sprint_jax import build, config
from sprint_jax.data import captions
from sprint_jax.diffusion import samplers, trigflow
from sprint_jax.encoders.pixels import EmbeddedPixels
from sprint_jax.errors import UserError
from sprint_jax.objectives import judged, policy, step, views
from sprint_jax.objectives.policy import Policy
from sprint_jax.objectives.proxy_reward import ProxyReward
from sprint_jax.runtime import cards
from sprint_jax.toy import checker, shapes
from sprint_jax.training import datasets, judges, plans, stages

ANCHORED = dict(
    guidance=(1.25, 2.0), uncond_mask="cond", control_dropout=0.0, logvar_start=0.0,
    route_steps=2, route_order=2, route_shift=2.0, stored=0, distance_c=0.1, from_noise=0.6,
    anchor_share=0.25, anchor_weight=1.0, anchor_trim=0.1, reward="helpers.judges:broken",
    reward_weight=1.0,
)  # fmt: skip
PROXY = ProxyReward(
    kind="proxy_reward", disc_mean=-1.5, disc_std=0.5, reduction="code", misaligned=True,
    heads_loss="softplus", head_blocks=(1,), **ANCHORED,
)  # fmt: skip
RLCM = Policy(
    kind="policy", preference="advantage", group=4, beta=0.1, **ANCHORED
)  # fmt: skip
PSO = dataclasses.replace(RLCM, preference="pairs")
TX = {"student": optax.sgd(1.0), "proxy": optax.sgd(0.1, momentum=0.9)}
PROMPTS = ["a red circle", "a blue square above a green triangle", "a circle", "three squares"]


def by_norm(latents, rows, params):
    """Return a verdict in [0, 1] of each image without the host: half for captions of one object,
    and a part that grows with the latents' mean.
    """
    short = (rows > 0).sum(1) < 14
    return 0.5 * short + 0.5 * jax.nn.sigmoid(latents.mean((1, 2, 3)))


def of_nothing(latents, rows, params):
    """Return verdicts that are not numbers."""
    return jnp.full(rows.shape[0], jnp.nan)


def rows():
    """Return a batch with captions."""
    return batch() | {"caption": captions.to_rows(PROMPTS * 4)}


@functools.cache
def made(settings, judge=by_norm):
    """Return the objective with a judge."""
    return settings.objective(dataclasses.replace(networks(), judge=judge))


@functools.cache
def start(settings):
    """Return the state at step 0."""
    frozen()
    make = lambda: step.start(
        made(settings), TX, ema=0.0, frozen=frozen(), begin=None, key=jax.random.key(1)
    )
    return jax.device_get(jit(make)())


@functools.cache
def updated(settings, role="student", judge=by_norm):
    """Return (state after one update, report)."""
    one = step.make_step(
        made(settings, judge).updates[role], TX[role], ema=0.0, accumulate=1, seed=3
    )
    return jax.device_get(jit(lambda s, b: one(s, frozen(), b))(start(settings), rows()))


def test_captions_survive_their_rows():
    texts = ["", "a red circle", "ein grüner Kreis – 圆", "x" * 600]
    assert captions.from_rows(captions.to_rows(texts)) == [*texts[:3], "x" * captions.LENGTH]


def test_the_checker_gives_half_for_the_whole_and_half_for_parts():
    """A red circle: right; for "a red square" and "two red circles" parts of it are."""
    found = shapes.Object("red", "circle", x=0.5, y=0.5, size=0.2)
    image = shapes.render([found], None, 32)
    prompts = ["a red circle", "a red square", "a blue circle", "two red circles"]
    got = checker.reward(prompts, [image] * 4)
    np.testing.assert_allclose(got, [1.0, 0.25, 0.25, 0.0])


@pytest.mark.parametrize("settings", [PROXY, RLCM, PSO], ids=["proxy", "advantage", "pairs"])
def test_an_update_is_finite_and_leaves_other_roles_alone(settings):
    after, report = updated(settings)
    before = start(settings)
    for role, old in before.roles.items():
        if role != "student":
            assert same_bits(after.roles[role], old)
    assert tree_error(after.roles["student"].params, before.roles["student"].params) > 1e-7
    assert after.roles["student"].rejected.tolist() == [0, 0]
    assert all(np.isfinite(a) for a in jax.tree.leaves(report.scalars))


def test_the_proxy_learns_the_verdicts():
    """Its update leaves the student alone, and forty of them halve the distance from the verdicts
    that any constant has.
    """
    settings = dataclasses.replace(PROXY, misaligned=False)
    tx = optax.adam(0.01)
    one = step.make_step(made(settings).updates["proxy"], tx, ema=0.0, accumulate=1, seed=3)
    state = start(settings)
    proxy = state.roles["proxy"].replace(opt=tx.init(state.roles["proxy"].params))
    state = state.replace(roles=state.roles | {"proxy": proxy})
    run = jit(lambda s, b: one(s, frozen(), b))
    first = last = None
    for _ in range(40):
        state, last = run(state, rows())
        first = first or last
    assert same_bits(state.roles["student"], start(settings).roles["student"])
    assert float(last.scalars["proxy"]) < 0.8 * float(first.scalars["proxy"])


@pytest.mark.parametrize(
    ("settings", "role"), [(PROXY, "proxy"), (RLCM, "student"), (PSO, "student")]
)
def test_verdicts_that_are_not_numbers_take_no_update(settings, role):
    after, _ = updated(settings, role, of_nothing)
    assert after.roles[role].rejected.tolist() == [1, 1]
    assert same_bits(after.roles[role].params, start(settings).roles[role].params)


def test_the_policy_raises_what_was_better_in_its_group(monkeypatch):
    """The gradient in x1 is -A cos n / (sin sigma_d D B) of each sample, by hand.

    Fails for the wrong sign, groups that are mixed, and a mean over elements of ln pi.
    """
    draws = policy.draw(RLCM, jax.random.key(0), jax.tree.map(jnp.asarray, rows()))
    np.testing.assert_array_equal(draws["caption"][0], draws["caption"][3])
    assert (np.asarray(draws["caption"][3]) != np.asarray(draws["caption"][4])).any()
    nets = dataclasses.replace(networks(), judge=by_norm)
    params = start(RLCM).roles["student"].params
    alone = dataclasses.replace(RLCM, anchor_weight=1e-12)
    t, first = float(samplers.scm_times(2)[1]), policy._first
    F = lambda u, s: views.student_F(nets.trained, params, draws["cond"], draws["w"])(u, s)[0]
    x1, angle = first(nets, params, draws), jnp.full(16, t)
    a = trigflow.interpolate(x1, draws["n"], angle)
    x = trigflow.denoise(F(a / 0.5, angle), a, angle)
    R = np.asarray(judged.verdicts(nets, x, draws["caption"], frozen())).reshape(4, 4)
    A = (R - (R.sum(1, keepdims=True) - R) / 3).reshape(-1)

    def loss(shift):
        monkeypatch.setattr(policy, "_first", lambda *args: first(*args) + shift)
        return policy._loss(alone, nets, params, draws, start(RLCM), frozen())[0]

    slope = jax.grad(loss)(jnp.zeros_like(x1))
    n = np.asarray(draws["n"]) / 0.5
    wanted = -A[:, None, None, None] * np.cos(t) * n / (np.sin(t) * 0.5) / n[0].size / 16
    np.testing.assert_allclose(slope, wanted, rtol=2e-3, atol=1e-7)


def test_no_gradient_passes_through_a_verdict():
    nets = dataclasses.replace(networks(), judge=by_norm)
    texts = rows()["caption"]
    R = lambda x: judged.verdicts(nets, x, texts, frozen()).sum()
    x = jnp.ones_like(jnp.asarray(rows()["latent"]))
    np.testing.assert_array_equal(jax.grad(R)(x), 0)
    assert float(jnp.abs(R(x) - R(0.5 * x))) > 0.01


def test_pairs_of_equal_images_teach_nothing():
    R, change = jnp.ones(8), jnp.linspace(-1, 1, 8)
    slope = jax.grad(lambda c: policy._pairs(PSO, R, c).sum())(change)
    np.testing.assert_array_equal(slope, 0)
    R = jnp.array([0.0, 1.0, 0.5, 0.5, 1.0, 0.0, 0.0, 0.0])
    slope = np.asarray(jax.grad(lambda c: policy._pairs(PSO, R, c).sum())(change))
    assert (np.flatnonzero(slope) == [0, 1, 4, 5]).all()
    assert slope[1] < 0 < slope[0] and slope[4] < 0 < slope[5]


def raises(prompts, images):
    raise RuntimeError("no weights\nmore")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, r"reward x failed \(no weights\)"),
        (lambda prompts, images: [1.0], "for 2 pictures"),
        (lambda prompts, images: [0.5, float("nan")], "not finite"),
        (lambda prompts, images: [0.5, 1.5], "from 0.5 to 1.5: scale them"),
        (lambda prompts, images: "ab", "one finite number each"),
    ],
)
def test_judges_that_fail_are_one_line(function, message):
    with pytest.raises(UserError, match=message):
        judges.verdicts(function, "x", ["a", "b"], np.zeros((2, 8, 8, 3), np.uint8))


def test_a_judge_inside_a_step_reads_images_and_captions(capsys):
    """The embedded checker on images that it draws itself; and one that fails on the way."""
    c = config.parse(cards.load("sprint:proxy_reward"))
    pixels = EmbeddedPixels(build.codec(c))
    examples = [shapes.example(0, i, size=c.data.size) for i in range(4)]
    latents = pixels.encode({}, np.stack([e.image for e in examples]))
    texts = captions.to_rows([e.text for e in examples])
    judge = judges.make(c.phases["proxy_reward"].objective.reward, pixels, print)
    right = jax.jit(judge)(latents, texts, {})
    assert float(right.mean()) == 1.0
    wrong = jax.jit(judge)(latents[::-1], texts, {})
    assert float(wrong.mean()) < 0.8
    broken = judges.make("helpers.judges:broken", pixels, print)
    assert np.isnan(jax.jit(broken)(latents, texts, {})).all()
    assert np.isnan(jax.jit(broken)(latents, texts, {})).all()
    assert capsys.readouterr().out.count("WARNING: reward helpers.judges:broken failed") == 1


def test_a_judge_asks_for_an_anchor_and_new_rollouts():
    changed = dataclasses.replace(RLCM, anchor_weight=0.0, stored=64)
    assert set(dict(changed.problems())) == {"anchor_weight", "stored"}


def test_encoded_data_have_no_captions_to_judge_by():
    tree = cards.load("sprint:proxy_reward")
    tree.data.encoded = "somewhere"
    tree.evaluation.update(split="heldout", diversity=0)
    with pytest.raises(UserError, match="which batches of encoded data leave out"):
        config.parse(tree)


def test_the_planner_traces_judged_phases():
    """It has no data, and decodes with the embedded codec."""
    tree = cards.load("sprint:policy")
    tree.model.update(width=16, depth=1, heads=2, cross_heads=2, unroll=1)
    c = config.parse(tree)
    *_, stage = plans.abstract_stages(c)
    state = jax.eval_shape(stage.start, stage.frozen, stage.init_arrays)
    rows = datasets.abstract_phase_batch(c, c.phases["policy"])
    _, report = jax.eval_shape(stage.functions[0], state, stage.frozen, rows)
    assert set(report.scalars) >= {"reward", "groups_that_differ"}


@pytest.mark.parametrize("name", ["", "no_colon", ".x:f", "module:"])
def test_a_judge_has_a_name(name):
    assert set(dict(dataclasses.replace(RLCM, reward=name).problems())) == {"reward"}


def test_groups_divide_the_batch():
    tree = cards.load("sprint:policy")
    tree.phases.policy.batch = 30
    tree.phases.policy.objective.anchor_share = 0.5
    with pytest.raises(UserError, match="compares images in groups, use a multiple of 4"):
        config.parse(tree)


def test_a_run_checks_judges_and_frozen_parameters_first():
    tree = cards.load("sprint:policy")
    tree.phases.policy.objective.reward = "helpers.judges:broken"
    with pytest.raises(UserError, match=r"reward helpers.judges:broken failed \(weights.bin"):
        stages.check(config.parse(tree))
    tree.phases.policy.objective.reward = "helpers.nothing:f"
    with pytest.raises(UserError, match="reward helpers.nothing:f: cannot import"):
        stages.check(config.parse(tree))
    tree = cards.load("sprint:shapes")
    tree.phases.repair.optimizers.student.frozen = ("blocks/fff",)
    message = "config.phases.repair.optimizers.student.frozen 'blocks/fff' names no parameter"
    with pytest.raises(UserError, match=message):
        stages.check(config.parse(tree))

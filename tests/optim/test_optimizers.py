"""What all steps share: the moving average, clipping, the parameters of Muon, learning rates."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers.configs import card
from sprint_jax import build, config
from sprint_jax.errors import UserError
from sprint_jax.objectives import step as step_lib
from sprint_jax.optim import came, optimizers
from sprint_jax.training import plans, stages

NONE = came.Rules(lambda *_: False, lambda *_: 0)  # which no test here uses


def plain_optimizer(**changes):
    """Return an optimizer whose update for a constant gradient is the learning rate."""
    o = config.parse(card()).phases["sprint"].optimizers["heads"]
    usual = dict(kind="adamw", lr=0.01, warmup=0, decay_to=1.0, b1=0.0, weight_decay=0.0, clip=1e9)
    return dataclasses.replace(o, **(usual | changes))


def test_the_average_of_three_updates():
    """Computed by hand, from 1: a share of (1 + step) / (10 + step) stays, at most the decay.

    Fails when the two shares are swapped.
    """
    ema = step_lib.start_ema({"w": jnp.ones(2)}, 0.15)
    for step, (value, expected) in enumerate([(2.0, 1.9), (3.0, 2.835), (5.0, 4.67525)]):
        ema = step_lib.update_ema(ema, {"w": jnp.full(2, value)}, 0.15, step)
        np.testing.assert_allclose(ema["w"], expected, rtol=1e-6)
    assert (
        step_lib.start_ema({"w": jnp.ones(2)}, 0.0)
        is step_lib.update_ema(None, {"w": jnp.ones(2)}, 0.0, 0)
        is None
    )


@pytest.mark.parametrize("kind", ["adamw", "muon", "came"])
def test_frozen_parameters_keep_their_bits(kind):
    """Fails when a frozen parameter moves, has optimizer state, or counts in the clipped norm."""
    c = config.parse(card())
    params = jax.tree.map(np.asarray, build.student(c).init(jax.random.key(0)))
    settings = dataclasses.replace(
        plain_optimizer(kind=kind, muon_lr=0.01, b1=0.9, b3=0.99, clip=0.5),
        frozen=("blocks/ff", "to_out"),
    )
    tx = optimizers.make(settings, updates=10, batch=1, rules=came.LINEAR_DIT)
    grads = jax.tree.map(np.ones_like, params)
    state = tx.init(params)
    changes, _ = tx.update(grads, state, params)
    names = lambda tree: {
        "/".join(str(k.key) for k in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    frozen, moved = [], []
    for name, change in names(changes).items():
        still = "blocks/ff/" in name or "/to_out/" in name
        (frozen if still else moved).append(np.abs(change).max())
    assert max(frozen) == 0 and len(frozen) > 3
    assert np.mean(np.asarray(moved) > 0) > 0.5
    sizes = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
    whole = optimizers.make(
        dataclasses.replace(settings, frozen=()), updates=10, batch=1, rules=came.LINEAR_DIT
    )
    assert sizes(state) < 0.8 * sizes(whole.init(params))
    # The others move as they would alone.
    large = jax.tree_util.tree_map_with_path(
        lambda path, g: 1e6 * g if "to_out" in [k.key for k in path] else g, grads
    )
    again, _ = tx.update(large, state, params)
    for one, other in zip(jax.tree.leaves(changes), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (("blocks/fff",), "frozen 'blocks/fff' names no parameter: try blocks/ff"),
        (("a", "b"), "leaves no parameter to train"),
    ],
)
def test_what_is_frozen_must_be_there_and_leave_something(frozen, message):
    tx = optimizers.make(plain_optimizer(frozen=frozen), updates=1, batch=1, rules=NONE)
    tree = {"a": {"blocks": {"ff": jnp.ones(2)}}, "b": jnp.ones(1)}
    with pytest.raises(UserError, match=message):
        tx.init(tree)


def test_clipping_is_by_the_norm_of_the_whole_gradient():
    """A gradient that is ten times too long is scaled to the limit, and a shorter one is kept.

    Fails without the clipping, and when each leaf is clipped by itself. Checked by the second
    update, since the first update of Adam does not depend on the length of the gradient.
    """
    rng = np.random.default_rng(0)
    long, short = (
        {"a": rng.standard_normal(3), "b": rng.standard_normal((2, 2))} for _ in range(2)
    )
    of_norm = lambda g, c: jax.tree.map(
        lambda a: jnp.float32(a * c / np.sqrt(sum(np.square(x).sum() for x in g.values()))), g
    )
    tx = optimizers.make(plain_optimizer(b1=0.9, clip=0.3), updates=10, batch=1, rules=NONE)

    def second_update(first, then):
        """Return the second update."""
        params = jax.tree.map(jnp.zeros_like, first)
        _, held = tx.update(first, tx.init(params), params)
        return tx.update(then, held, params)[0]

    expected = second_update(of_norm(long, 0.3), of_norm(short, 0.2))
    found = second_update(of_norm(long, 3.0), of_norm(short, 0.2))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    raised = second_update(of_norm(long, 0.3), of_norm(short, 0.3))
    assert np.abs(raised["a"] - expected["a"]).max() > 1e-4


BLOCK = {
    f"blocks/{name}/kernel"
    for name in (
        "attn1/to_qkv",
        "attn1/to_out",
        "attn2/to_q",
        "attn2/to_k",
        "attn2/to_v",
        "attn2/to_out",
        "ff/conv_inverted",
        "ff/conv_point",
    )
}
INPUTS = {
    f"inputs/{name}/kernel"
    for name in (
        "caption/linear_1",
        "caption/linear_2",
        "time_embed/linear_1",
        "time_embed/linear_2",
        "time_proj",
    )
}
GUIDANCE = {f"inputs/guidance_embed/linear_{i}/kernel" for i in (1, 2)}


def test_parameters_that_muon_takes_as_matrices():
    """These are inner kernels, by their last two axes.

    Not the patch embedding, outputs, spatial convolutions, tables and biases.
    """
    student = build.student(config.parse(card("controlnet")))
    params = jax.eval_shape(student.init, jax.random.key(0))
    found = {}
    jax.tree_util.tree_map_with_path(
        lambda path, leaf, axes: found.update(
            {jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.ndim, axes)}
        ),
        params,
        optimizers._matrices(params),
    )
    matrices = {name: axes for name, (_, axes) in found.items() if axes is not None}
    trunk, control = (
        BLOCK | INPUTS | GUIDANCE,
        BLOCK | INPUTS | {"zero_in/kernel", "zero_out/kernel"},
    )
    assert matrices.keys() == {f"trunk/{n}" for n in trunk} | {f"control/{n}" for n in control}
    for name, axes in matrices.items():
        ndim = 3 if "blocks" in name or "zero_out" in name else 2
        assert found[name][0] == ndim
        assert (axes.reduction_axis, axes.output_axis) == (
            ndim - 2,
            ndim - 1,
        )


@pytest.mark.parametrize("shape", [(12, 12), (3, 12, 12)], ids=["one", "a stack"])
def test_updates_of_muon_have_singular_values_near_one(shape):
    """In each layer.

    Fails when AdamW takes the kernels, and when a stack is taken for one matrix.
    """
    tx = optimizers.make(plain_optimizer(kind="muon", muon_lr=1.0), updates=10, batch=1, rules=NONE)
    g = {
        "dense": {
            "kernel": jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
        }
    }
    updates, _ = tx.update(g, tx.init(g), g)
    values = np.linalg.svd(np.asarray(updates["dense"]["kernel"]), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    assert (np.asarray(updates["dense"]["kernel"]) * np.asarray(g["dense"]["kernel"])).sum() < 0


def first_rates(tx, updates):
    """Return the learning rates of the first updates of a `plain_optimizer`."""
    params = {"w": jnp.zeros(2)}

    def one(held, _):
        step, held = tx.update({"w": jnp.full(2, 0.1)}, held, params)
        return held, -step["w"][0]

    return np.asarray(jax.lax.scan(one, tx.init(params), None, updates)[1])


def test_rates_of_a_distillation():
    """The rate rises from lr / (warmup + 1), then falls along half a cosine to decay_to at the last
    update.

    Each network has half of the steps.
    """
    c = config.parse(card())
    curve = dict(warmup=4, decay_to=0.1)
    own = dict(student=plain_optimizer(**curve), heads=plain_optimizer(**curve, lr=0.02))
    phase = dataclasses.replace(c.phases["sprint"], steps=40, optimizers=own)
    txs = stages.transformations(phase, phase.objective.objective(stages.networks(c, phase)))
    share = [
        (i + 1) / 5 if i < 4 else 0.1 + 0.9 * (1 + math.cos(math.pi * (i - 4) / 16)) / 2
        for i in range(21)
    ]
    assert share[4] == 1 and share[20] == pytest.approx(0.1)
    np.testing.assert_allclose(first_rates(txs["student"], 21), 0.01 * np.array(share), rtol=1e-4)
    np.testing.assert_allclose(first_rates(txs["heads"], 21), 0.02 * np.array(share), rtol=1e-4)


def test_rates_of_a_fine_tuning(monkeypatch):
    """Each phase has its own rates over its own steps. The card lowers both by the same factor.

    Fails when the fine-tune takes the optimizer of the first training, and when Muon keeps its
    rate.
    """
    tree = card()
    tree.teacher.update(base_qk_norm=False, base_time_scale=1000.0)
    tree.phases.finetune.steps = 6
    c = config.parse(tree)
    seen = []
    monkeypatch.setattr(
        optimizers,
        "make",
        lambda o, *, updates, batch, rules: seen.append((o, updates, batch)) or optax.sgd(0.0),
    )
    first, second, _ = plans.abstract_stages(c)
    assert (first.name, second.name) == ("teacher", "finetune")
    of_teacher, of_finetune = c.phases["teacher"], c.phases["finetune"]
    o, slower = of_teacher.optimizers["network"], of_finetune.optimizers["network"]
    assert seen[:2] == [(o, of_teacher.steps, of_teacher.batch), (slower, 6, of_finetune.batch)]
    assert slower.lr / o.lr == pytest.approx(slower.muon_lr / o.muon_lr)
    assert 0 < slower.muon_lr < o.muon_lr

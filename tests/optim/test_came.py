"""CAME against its formulas, against the package that SANA uses, and layer by layer of a stack."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from sprint_jax.models import discriminator, linear_dit
from sprint_jax.optim import came

pytestmark = pytest.mark.second_pass

RULES = came.LINEAR_DIT._asdict()
SHAPES = {
    "blocks": {
        "attn": {"kernel": (3, 5, 7), "bias": (3, 7)},
        "scale_shift_table": (3, 6, 4),
        "conv_depth_kernel": (3, 3, 3, 4),
    },
    "outputs": {"proj": {"kernel": (6, 4), "bias": (4,)}, "scale_shift_table": (2, 4)},
}
# Large, then small: the first gradients are clipped, and those far below the moments are not.
SCALES = (1.0, 100.0, 0.01, 10.0, 1e-4, 1.0)
# Each constant has an effect on the result.
UNUSUAL = dict(b1=0.8, b2=0.7, b3=0.6, eps1=1e-3, eps2=1e-2, clip_threshold=0.6, weight_decay=0.1)


def is_shape(x):
    """Return whether x is a shape, a leaf of these trees."""
    return isinstance(x, tuple)


def random_tree(shapes, scale=1.0, seed=0):
    """Return normal arrays for a tree of shapes."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: (scale * rng.standard_normal(shape)).astype(np.float32)
    return jax.tree.map(draw, shapes, is_leaf=is_shape)


def descend(tx, params, gradients):
    """Return the parameters after all gradients."""
    state, update = tx.init(params), jax.jit(tx.update)
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


def formulas(p, gradients, matrix, rates, b1, b2, b3, eps1, eps2, clip_threshold, weight_decay):
    """Apply the formulas of the module's docstring to one tensor, in float64.

    Averages are computed the long way.
    """
    p = p.astype(np.float64)
    m, v, s = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)

    def root(full):
        """Return the root of the moment.

        Means commute with the moving average, so `full` holds both.
        """
        if not matrix:
            return np.sqrt(full)
        row, col = full.mean(1, keepdims=True), full.mean(0, keepdims=True)
        return np.sqrt(row * col / row.mean())

    for g, rate in zip(gradients, rates, strict=True):
        g = g.astype(np.float64)
        v = b2 * v + (1 - b2) * (g**2 + eps1)
        u = g / root(v)
        u = u / max(1.0, np.sqrt((u**2).mean()) / clip_threshold)
        m = b1 * m + (1 - b1) * u
        s = b3 * s + (1 - b3) * ((u - m) ** 2 + eps2)
        step = m / root(s) if matrix else m
        p = p - rate * (step + weight_decay * p)
    return p


def assert_close(moved, expected, start, tolerance=1e-5):
    """Assert that displacements agree to `tolerance` of the largest."""
    moved, expected = np.asarray(moved, np.float64) - start, expected - start
    assert np.abs(moved - expected).max() <= tolerance * np.abs(expected).max()


DEFAULTS = dict(
    b1=0.9, b2=0.999, b3=0.9999, eps1=1e-30, eps2=1e-16, clip_threshold=1.0, weight_decay=0.0
)


@pytest.mark.parametrize("given", [{}, UNUSUAL], ids=["defaults", "unusual"])
def test_steps_follow_the_formulas(given):
    """Each layer of each leaf is a tensor of its own, at a falling learning rate."""
    params = random_tree(SHAPES)
    gradients = [random_tree(SHAPES, scale, seed) for seed, scale in enumerate(SCALES, 1)]
    tx = came.came(lambda count: 0.3 / (1 + count), **given, **RULES)
    result = descend(tx, params, gradients)
    rates = [0.3 / (1 + i) for i in range(len(SCALES))]

    def check(path, start, end, *grads):
        names = [key.key for key in path]
        matrix = names[-1] in ("kernel", "scale_shift_table")
        layers = start[None], np.asarray(end)[None], [g[None] for g in grads]
        if names[0] == "blocks":
            layers = start, np.asarray(end), grads
        for i in range(len(layers[0])):
            one = formulas(
                layers[0][i], [g[i] for g in layers[2]], matrix, rates, **(DEFAULTS | given)
            )
            assert_close(layers[1][i], one, layers[0][i])

    jax.tree_util.tree_map_with_path(check, params, result, *gradients)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_equal_those_of_the_package(weight_decay):
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("came_pytorch")
    shapes = {"kernel": (32, 48), "bias": (48,)}
    start = random_tree(shapes)
    gradients = [random_tree(shapes, scale, seed) for seed, scale in enumerate(SCALES, 1)]
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    optimizer = package.CAME(theirs.values(), lr=0.1, weight_decay=weight_decay)
    for g in gradients:
        for k, p in theirs.items():
            p.grad = torch.tensor(g[k])
        optimizer.step()
    tx = came.came(
        0.1,
        weight_decay=weight_decay,
        factored=came.LINEAR_DIT.factored,
        stacked=lambda path, leaf: 0,
    )
    ours = descend(tx, start, gradients)
    for k in shapes:
        assert_close(ours[k], theirs[k].detach().double().numpy(), start[k])


def test_a_stack_is_updated_like_its_layers():
    """The gradients of the layers differ in size.

    Fails if any mean or the clipping is over the layers.
    """
    shapes = SHAPES["blocks"]
    sizes = np.array([1.0, 30.0, 0.01], np.float32)
    scaled = lambda g: g * sizes.reshape(-1, *[1] * (g.ndim - 1))
    params = random_tree(shapes)
    gradients = [jax.tree.map(scaled, random_tree(shapes, 1.0, seed)) for seed in range(1, 5)]
    tx = came.came(0.1, **RULES)
    stack = descend(tx, {"blocks": params}, [{"blocks": g} for g in gradients])["blocks"]
    for i in range(3):
        layer = lambda tree: {"outputs": jax.tree.map(lambda a: a[i], tree)}
        alone = descend(tx, layer(params), [layer(g) for g in gradients])
        for a, b in zip(jax.tree.leaves(layer(stack)), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_zero_gradients_change_nothing():
    """All are zero, then a row and a column among large gradients, then all again."""
    params = random_tree(SHAPES)
    zeros = jax.tree.map(np.zeros_like, params)
    ridge = random_tree(SHAPES, 1e6, 1)
    for kernel in (ridge["blocks"]["attn"]["kernel"], ridge["outputs"]["proj"]["kernel"]):
        kernel[..., 0, :] = 0
        kernel[..., 0] = 0
    tx = came.came(0.1, **RULES)
    update = jax.jit(tx.update)
    updates, state = update(zeros, tx.init(params))
    assert all(np.array_equal(u, np.zeros_like(u)) for u in jax.tree.leaves(updates))
    for g in (ridge, zeros):
        updates, state = update(g, state)
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
        assert all(np.isfinite(s).all() for s in jax.tree.leaves(state))
        kernel = updates["outputs"]["proj"]["kernel"]
        assert not kernel[0].any()
        assert not kernel[:, 0].any()
        assert kernel[1:, 1:].all()


def test_state_is_found_by_path_saved_and_restored(tmp_path):
    """Each leaf has one array for each of its moments and no others.

    Donated and restored, the state continues the same way.
    """
    params = {"outputs": random_tree({"kernel": (6, 4), "bias": (4,)})}
    tx = came.came(0.1, **RULES)
    start = jax.jit(tx.init)(params)
    paths, _ = jax.tree_util.tree_flatten_with_path(start)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in paths
    }
    assert shapes == {
        "count": (),
        "mu/outputs/kernel": (6, 4),
        "mu/outputs/bias": (4,),
        "nu/outputs/bias": (4,),
        "row/outputs/kernel": (6,),
        "res_row/outputs/kernel": (6,),
        "col/outputs/kernel": (4,),
        "res_col/outputs/kernel": (4,),
    }
    step = jax.jit(tx.update, donate_argnums=1)
    _, state = step(jax.tree.map(np.ones_like, params), start)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert int(restored.count) == 1
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True)
    )


def test_rules_of_the_networks():
    """Check which leaves of the real trees have which moments, and along which axes."""
    params = jax.eval_shape(linear_dit.SANA_600M.init, jax.random.key(0))
    state = jax.eval_shape(came.came(1.0, **RULES).init, params)
    block, inputs = state.row["blocks"], state.row["inputs"]
    assert block["attn1"]["to_qkv"]["kernel"].shape == (28, 1152)
    assert state.col["blocks"]["attn1"]["to_qkv"]["kernel"].shape == (28, 3 * 1152)
    assert block["scale_shift_table"].shape == (28, 6)
    assert state.row["outputs"]["scale_shift_table"].shape == (2,)
    assert inputs["patch_embed"]["kernel"].shape == (32,)
    assert inputs["logvar"]["kernel"].shape == (1152,)
    assert state.nu["blocks"]["ff"]["conv_depth_kernel"].shape == (28, 3, 3, 5 * 1152)
    assert state.nu["blocks"]["attn2"]["norm_q"]["weight"].shape == (28, 1152)
    # Each leaf has exactly one second moment. Only one-dimensional layers and stencils have a full
    # one.
    leaves = lambda tree: len(jax.tree.leaves(tree))
    assert leaves(state.row) + leaves(state.nu) == leaves(params) == leaves(state.mu)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.nu)[0]:
        assert leaf.ndim == 1 + (path[0].key == "blocks") or path[-1].key == "conv_depth_kernel", (
            path
        )

    heads = discriminator.LADDHeads(width=8, count=2, dtype="float32")
    params, _ = jax.eval_shape(heads.init, jax.random.key(0))
    state = jax.eval_shape(came.came(1.0, **came.HEADS._asdict()).init, params)
    assert not jax.tree.leaves(state.row) and leaves(state.nu) == leaves(params)
    assert all(came.HEADS.stacked((), a) == 1 and a.shape[0] == 2 for a in jax.tree.leaves(params))


def test_misuse_is_refused():
    matrix = dict(factored=lambda path, leaf: True, stacked=lambda path, leaf: 0)
    with pytest.raises(ValueError, match=r"a/bias has shape \(4,\)"):
        came.came(0.1, **matrix).init({"a": {"bias": jnp.zeros(4)}})
    tx = came.came(0.1, weight_decay=0.1, **matrix)
    params = {"kernel": jnp.zeros((2, 2))}
    with pytest.raises(ValueError, match="params"):
        tx.update(params, tx.init(params))

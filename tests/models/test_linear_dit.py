"""The Linear-DiT: a float64 NumPy forward pass, published sizes, identities and variants."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.arrays import max_error, normals
from helpers.compiler import UNOPTIMIZED
from helpers.kernel_cases import depthwise_loops
from helpers.networks import linear_dit
from sprint_jax.models import layers
from sprint_jax.models.linear_dit import SANA_600M, SANA_1600M, patchify, unpatchify
from sprint_jax.ops import depthwise

pytestmark = pytest.mark.second_pass

MODEL = linear_dit(
    in_channels=3,
    width=16,
    depth=2,
    heads=4,
    cross_heads=2,
    mlp_ratio=2.5,
    text_dim=7,
    patch_size=2,
    guidance_embed=True,
    logvar_head=True,
)
BATCH, HEIGHT, WIDE, LENGTH = 3, 4, 6, 5


def inputs():
    """Return (x, t, text, mask, guidance). Every prompt has a padded end."""
    mask = np.arange(LENGTH) < np.array([2, 4, 3])[:, None]
    return (
        normals(BATCH, HEIGHT, WIDE, 3),
        np.float32([0.02, 0.5, 0.97]),
        normals(BATCH, LENGTH, 7, seed=1),
        mask.astype(np.float32),
        np.float32([1.0, 2.5, 5.0]),
    )


@functools.cache
def initial_params():
    """Return parameters as `init` makes them."""
    return jax.tree.map(
        np.asarray, jax.jit(MODEL.init, compiler_options=UNOPTIMIZED)(jax.random.key(0))
    )


@functools.cache
def random_params():
    """Return parameters that all differ from their initial values, zeros and ones included."""
    leaves, tree = jax.tree.flatten(initial_params())
    moved = [
        a + 0.3 / math.sqrt(a.shape[-1] / 4) * normals(*a.shape, seed=i)
        for i, a in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, [a.astype(np.float32) for a in moved])


@functools.cache
def compiled(model=MODEL, features=(), velocity=True):
    """Return model.apply, compiled once for each variant."""
    run = functools.partial(model.apply, features=features, velocity=velocity)
    return jax.jit(run, compiler_options=UNOPTIMIZED)


def variant(**changes):
    """Return the model with changed fields."""
    return dataclasses.replace(MODEL, **changes)


# --- the network in NumPy, float64 ---


def silu(x):
    return x / (1 + np.exp(-x))


def affine(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def norm(x):
    """Apply LayerNorm without parameters."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def rms(p, x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["weight"]


def embedding(p, value):
    """Return the embedding of times or guidance scales."""
    angles = np.outer(value, 10000.0 ** (-np.arange(128) / 128))
    return affine(
        p["linear_2"], silu(affine(p["linear_1"], np.hstack([np.cos(angles), np.sin(angles)])))
    )


def heads_of(x, heads):
    """Return [B, N, D] as [B, h, N, d]."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def tokens_of(x):
    """Return [B, h, N, d] as [B, N, D]."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def self_attention(p, x, heads):
    """Compute the quadratic form of linear attention, with weights relu(q) . relu(k)."""
    q, k, v = np.split(x @ p["to_qkv"]["kernel"], 3, -1)
    q, k = np.maximum(rms(p["norm_q"], q), 0), np.maximum(rms(p["norm_k"], k), 0)
    q, k, v = (heads_of(a, heads) for a in (q, k, v))
    weights = q @ k.swapaxes(2, 3)
    weights = weights / (weights.sum(-1, keepdims=True) + 1e-15)
    return affine(p["to_out"], tokens_of(weights @ v))


def cross_attention(p, x, text, mask, heads):
    q, k = rms(p["norm_q"], affine(p["to_q"], x)), rms(p["norm_k"], affine(p["to_k"], text))
    q, k, v = (heads_of(a, heads) for a in (q, k, affine(p["to_v"], text)))
    scores = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1])
    weights = np.exp(scores) * mask[:, None, None, :]
    return affine(p["to_out"], tokens_of(weights / weights.sum(-1, keepdims=True) @ v))


def mix_ffn(p, x):
    h = silu(affine(p["conv_inverted"], x))
    value, gate = np.split(depthwise_loops(h, p["conv_depth_kernel"]) + p["conv_depth_bias"], 2, -1)
    return value * silu(gate) @ p["conv_point"]["kernel"]


def numpy_forward(params, x, t, text, mask, guidance):
    """Return (velocity, logvar, output of every block)."""
    params, x, t, text, mask, guidance = jax.tree.map(
        lambda a: np.asarray(a, np.float64), (params, x, t, text, mask, guidance)
    )
    p, size = params["inputs"], 2
    batch, rows, columns = x.shape[0], x.shape[1] // size, x.shape[2] // size
    patches = np.stack(
        [
            x[:, size * r : size * r + 2, size * c : size * c + 2].reshape(batch, -1)
            for r in range(rows)
            for c in range(columns)
        ],
        1,
    )
    h = affine(p["patch_embed"], patches)
    condition = embedding(p["time_embed"], t) + embedding(p["guidance_embed"], 0.1 * guidance)
    modulation = affine(p["time_proj"], silu(condition)).reshape(batch, 6, -1)
    y = affine(p["caption"]["linear_1"], text)
    y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    y = rms(p["caption"]["norm"], affine(p["caption"]["linear_2"], y))
    outputs = []
    for index in range(MODEL.depth):
        b = jax.tree.map(lambda a: a[index], params["blocks"])
        m = [(b["scale_shift_table"] + modulation)[:, i : i + 1] for i in range(6)]
        h = h + m[2] * self_attention(b["attn1"], norm(h) * (1 + m[1]) + m[0], MODEL.heads)
        h = h + cross_attention(b["attn2"], h, y, mask, MODEL.cross_heads)
        z = (norm(h) * (1 + m[4]) + m[3]).reshape(batch, rows, columns, -1)
        h = h + m[5] * mix_ffn(b["ff"], z).reshape(h.shape)
        outputs.append(h)
    p = params["outputs"]
    shift, scale = p["scale_shift_table"][0] + condition, p["scale_shift_table"][1] + condition
    out = affine(p["proj_out"], norm(h) * (1 + scale[:, None]) + shift[:, None])
    image = np.zeros(x.shape)
    for token in range(rows * columns):
        r, c = size * (token // columns), size * (token % columns)
        image[:, r : r + 2, c : c + 2] = out[:, token].reshape(batch, 2, 2, 3)
    return image, affine(params["inputs"]["logvar"], condition)[:, 0], outputs


def test_whole_network_against_numpy():
    """Compare velocity, logvar and every block.

    Fails when the gate and value of the Mix-FFN are swapped, when any two of shift1, scale1 and
    gate1 are swapped, when the final layer takes silu(condition), when the sinusoid has its sine
    first, when linear_attention.EPS is 1e-2, and when the epsilon of a norm is 1e-3.
    """
    out = compiled(features=(0, 1))(random_params(), *inputs())
    velocity, logvar, blocks = numpy_forward(random_params(), *inputs())
    assert max_error(out.velocity, velocity) < 1e-5
    assert max_error(out.logvar, logvar) < 1e-5
    for value, expected in zip(out.features, blocks, strict=True):
        assert max_error(value, expected) < 1e-5


@pytest.mark.parametrize(
    ("model", "published"), [(SANA_600M, 593_501_216), (SANA_1600M, 1_610_237_472)]
)
def test_published_sizes(model, published):
    """The logvar head adds D + 1 parameters. Fails when to_qkv or conv_point gets a bias."""
    count = lambda m: sum(
        a.size for a in jax.tree.leaves(jax.eval_shape(m.init, jax.random.key(0)))
    )
    assert count(dataclasses.replace(model, logvar_head=False)) == published
    assert count(model) == published + model.width + 1


def test_block_without_gates_is_the_identity():
    """Tokens pass where gates and the cross-attention projection are zero.

    Fails when gate1 becomes (1 + gate1).
    """
    params = jax.tree.map(np.copy, random_params())
    for leaf in params["inputs"]["time_proj"].values():
        leaf[:] = 0
    for leaf in params["blocks"]["attn2"]["to_out"].values():
        leaf[:] = 0
    params["blocks"]["scale_shift_table"][:, [2, 5]] = 0
    x = inputs()[0]
    embed = params["inputs"]["patch_embed"]
    tokens = patchify(x, 2).reshape(BATCH, -1, 12) @ embed["kernel"] + embed["bias"]
    for feature in compiled(features=(0, 1))(params, *inputs()).features:
        assert max_error(feature, tokens) < 1e-6
    params["blocks"]["scale_shift_table"][:, 5] = 1
    assert max_error(compiled(features=(0, 1))(params, *inputs()).features[0], tokens) > 0.01


def test_features_need_nothing_after_them():
    """A run that stops early gives the features of the whole run, whatever the later blocks.

    Fails when a segment starts one block late.
    """
    whole = compiled(features=(0, 1))(random_params(), *inputs())
    params = jax.tree.map(np.copy, random_params())
    for leaf in jax.tree.leaves(params["blocks"]):
        leaf[1] = np.nan
    early = compiled(features=(0,), velocity=False)(params, *inputs())
    assert early.velocity is None
    assert max_error(early.features[0], whole.features[0]) < 1e-6
    assert max_error(compiled()(random_params(), *inputs()).velocity, whole.velocity) < 1e-6
    with pytest.raises(ValueError, match="must increase"):
        MODEL.apply(random_params(), *inputs(), features=(1, 0))


@pytest.mark.parametrize("remat", ["block", "cheap"])
def test_loop_variants_change_nothing(remat):
    """Compare value and parameter gradient.

    Fails when the scan runs in reverse for unroll < depth.
    """

    def loss(model):
        value = lambda p: jnp.square(model.apply(p, *inputs()).velocity).mean()
        return jax.jit(jax.value_and_grad(value), compiler_options=UNOPTIMIZED)(random_params())

    value, slope = loss(MODEL)
    other_value, other_slope = loss(variant(unroll=2, remat=remat))
    assert max_error(other_value, value) < 1e-5
    for one, other in zip(jax.tree.leaves(slope), jax.tree.leaves(other_slope), strict=True):
        assert np.abs(one - other).max() < 1e-4 * max(np.abs(one).max(), 1e-3)


def test_bfloat16_is_close():
    """Fails when the velocity keeps the compute dtype."""
    out = compiled(variant(dtype="bfloat16", residual_dtype="bfloat16"))(random_params(), *inputs())
    exact = compiled()(random_params(), *inputs())
    assert out.velocity.dtype == out.logvar.dtype == jnp.float32
    assert 1e-4 < max_error(out.velocity, exact.velocity) < 0.1


def test_a_float32_residual_stream_rounds_less():
    """Compare a bfloat16 network of 24 blocks with the float32 one.

    Fails when tokens, or what a block adds to them, are rounded on the way.
    """
    x, t, text, mask, guidance = inputs()
    deep = jax.tree.map(
        lambda a: 0.3 * np.tile(a, (12,) + (1,) * (a.ndim - 1)), random_params()["blocks"]
    )
    distance = lambda a, b: (
        np.linalg.norm(np.float64(a) - np.float64(b)) / np.linalg.norm(np.float64(b))
    )

    def results(**dtypes):
        model = variant(depth=24, **dtypes)

        def outputs(x, t):
            out = model.apply(
                random_params() | {"blocks": deep}, x, t, text, mask, guidance, features=(1,)
            )
            return out.velocity, out.features[0]

        return jax.jit(
            lambda: jax.jvp(outputs, (x, t), (normals(*x.shape, seed=5), np.ones_like(t))),
            compiler_options=UNOPTIMIZED,
        )()

    (exact, _), (exact_tangent, _) = results(dtype="float32")
    (wide, features), (wide_tangent, _) = results(dtype="bfloat16", residual_dtype="float32")
    (narrow, _), (narrow_tangent, _) = results(dtype="bfloat16", residual_dtype="bfloat16")
    assert distance(wide, exact) < 0.5 * distance(narrow, exact)
    assert distance(wide_tangent, exact_tangent) < 0.8 * distance(narrow_tangent, exact_tangent)
    assert features.dtype == jnp.float32
    assert np.mean(features == features.astype(jnp.bfloat16)) < 0.1


def test_padded_text_has_no_influence():
    """Fails when cross_attention.MASKED is 0."""
    x, t, text, mask, guidance = inputs()
    plain = compiled()(random_params(), x, t, text, mask, guidance).velocity
    padded = np.where(mask[..., None] == 0, 50 * normals(*text.shape, seed=9), text)
    np.testing.assert_array_equal(
        compiled()(random_params(), x, t, padded, mask, guidance).velocity, plain
    )
    seen = text + mask[..., None]
    assert max_error(compiled()(random_params(), x, t, seen, mask, guidance).velocity, plain) > 1e-2


def test_guidance_embedding_starts_at_zero():
    """Fails when zero_last is left out of the guidance embedding."""
    *rest, guidance = inputs()
    at = lambda params, w: compiled()(params, *rest, w).velocity
    np.testing.assert_array_equal(
        at(initial_params(), guidance), at(initial_params(), guidance + 3)
    )
    assert max_error(at(random_params(), guidance + 3), at(random_params(), guidance)) > 1e-2
    without = {
        **initial_params(),
        "inputs": {k: v for k, v in initial_params()["inputs"].items() if k != "guidance_embed"},
    }
    told_nothing = compiled(variant(guidance_embed=False))(without, *rest).velocity
    np.testing.assert_array_equal(told_nothing, at(initial_params(), guidance))
    with pytest.raises(ValueError, match="guidance must be given exactly"):
        MODEL.apply(initial_params(), *rest)


def test_time_scale():
    """Fails when _Inputs ignores time_scale."""
    x, t, *rest = inputs()
    scaled = compiled(variant(time_scale=1000.0))(random_params(), x, t, *rest).velocity
    assert max_error(scaled, compiled()(random_params(), x, 1000 * t, *rest).velocity) < 1e-6
    assert max_error(scaled, compiled()(random_params(), x, t, *rest).velocity) > 1e-2


@pytest.mark.parametrize("qk_norm", [True, False])
def test_qk_norm_ignores_the_scale_of_queries(qk_norm):
    """This holds only with the norm.

    Fails when CrossAttention normalizes neither, and when it normalizes k instead of q.
    """
    attention = layers.CrossAttention(2, qk_norm, jnp.float32, "plain")
    x, text, mask = normals(2, 6, 16), normals(2, 4, 16, seed=1), np.ones((2, 4))
    params = jax.tree.map(np.asarray, attention.init(jax.random.key(0), x, text, mask)["params"])
    scaled = {**params, "to_q": {k: 5 * v for k, v in params["to_q"].items()}}
    apply = jax.jit(lambda p: attention.apply({"params": p}, x, text, mask))
    change = max_error(apply(scaled), apply(params))
    assert change < 1e-4 if qk_norm else change > 0.1


def test_patches():
    """Patches are row-major, row-major inside, with channels last.

    Fails when patchify transposes them.
    """
    x = normals(2, 4, 6, 3)
    patches = np.asarray(patchify(x, 2))
    for row in range(2):
        for column in range(3):
            block = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(patches[:, row, column], block.reshape(2, -1))
    np.testing.assert_array_equal(unpatchify(patches, 2), x)


def library_conv(x, w):
    """Return the depthwise convolution of XLA."""
    return jax.lax.conv_general_dilated(
        x,
        w[:, :, None, :],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def test_unstacked_parameters_give_the_same_result():
    """Take features of both blocks, so that segments are covered.

    Fails when a segment starts at 0.
    """
    x, t, text, mask, w = inputs()
    program = compiled(MODEL, features=(0, 1))
    stacked, listed = (
        program(p, x, t, text, mask, w) for p in (random_params(), MODEL.unstack(random_params()))
    )
    for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(listed), strict=True):
        assert max_error(b, a) < 1e-6


@pytest.mark.parametrize("k", [3, 5])
def test_depthwise_value_and_jvp(k):
    """Compare with the library and with loops.

    Fails when _shifts swaps w[i, j] and w[j, i], and when _jvp returns only the first of its two
    terms.
    """
    x, dx = normals(2, 4, 5, 6), normals(2, 4, 5, 6, seed=1)
    w, dw = normals(k, k, 6), normals(k, k, 6, seed=1)
    ours = depthwise.depthwise_conv
    assert (
        max_error(jax.jit(ours)(x, w), depthwise_loops(x.astype(np.float64), w.astype(np.float64)))
        < 1e-6
    )
    for primals, tangents in (((x, w), (dx, dw)), ((x, w), (dx, 0 * w)), ((x, w), (0 * x, dw))):
        pair = [
            jax.jit(lambda p, t, f=f: jax.jvp(f, p, t))(primals, tangents)
            for f in (ours, library_conv)
        ]
        assert max_error(pair[0][0], pair[1][0]) < 1e-6
        assert max_error(pair[0][1], pair[1][1]) < 1e-5
    along_w = lambda f: jax.jit(lambda w: jax.jvp(lambda w: f(x, w), (w,), (dw,))[1])(w)
    assert max_error(along_w(ours), along_w(library_conv)) < 1e-5


@pytest.mark.parametrize("k", [3, 5])
def test_depthwise_gradients(k):
    """Compare gradients by both arguments.

    They are taken alone, around a stopped forward-mode derivative as in sCM, and through one that
    is not stopped. Fails when _weight_gradient_by_batch leaves out the last sample or its padding
    is (0, 2), when _input_gradient does not flip the stencil, and when _product_rule leaves out a
    term.
    """
    x, dx, w = normals(2, 4, 5, 6), normals(2, 4, 5, 6, seed=1), normals(k, k, 6)

    def plain(conv, x, w):
        return jnp.sin(conv(x, w)).sum()

    def with_tangent(conv, x, w):
        value, J = jax.jvp(lambda x: jnp.sin(conv(x, w)), (x,), (dx,))
        return (
            jnp.square(value + jax.lax.stop_gradient(J - 2 * value)) * (1 + jnp.arange(6))
        ).sum()

    def with_moving_tangent(conv, x, w):
        J = jax.jvp(lambda x, w: jnp.sin(conv(x, w)), (x, w), (dx, jnp.cos(w)))[1]
        return (jnp.square(J) * (1 + jnp.arange(6))).sum()

    for loss in (plain, with_tangent, with_moving_tangent):
        slopes = [
            jax.jit(jax.grad(lambda x, w, f=f: loss(f, x, w), (0, 1)))(x, w)
            for f in (depthwise.depthwise_conv, library_conv)
        ]
        assert max_error(slopes[0][0], slopes[1][0]) < 1e-5
        assert max_error(slopes[0][1], slopes[1][1]) < 1e-5

"""Kernels against float64, in every direction that a step takes, and lowered for each platform."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from helpers.arrays import normal_arrays, relative_error, tree_error
from helpers.configs import card
from helpers.kernel_cases import (
    EPS,
    TINY_MODEL,
    cross,
    cross_case,
    depthwise_loops,
    derivatives,
    differentiation_modes,
    linear,
    linear_case,
    published_case,
    uneven_mask,
)
from helpers.runs import ROOT
from sprint_jax import build, config
from sprint_jax.conversion import folder
from sprint_jax.encoders import load as encoders
from sprint_jax.encoders import pixels as pixel_codecs
from sprint_jax.errors import UserError
from sprint_jax.models.dc_ae import DCAE_F32C32
from sprint_jax.ops import backend, cross_attention, depthwise, linear_attention, norms
from sprint_jax.ops.pallas import depthwise as depthwise_kernel
from sprint_jax.sampling import loading, pipeline

pytestmark = pytest.mark.second_pass

# Compiled if the device has kernels, and interpreted otherwise.
HERE = backend.resolve("pallas", jax.default_backend(), 64, 64, "float32")[0].replace(
    "plain", "interpret"
)


@pytest.fixture(autouse=True)
def full_precision():
    """Compute the float32 products that kernels are compared with exactly; GPUs have a coarser
    default.
    """
    with jax.default_matmul_precision("highest"):
        yield


def in_float64(f, *arguments, **options):
    """Return f of arguments in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), arguments)
        return derivatives(f, *wide, **options)


# --- linear attention ---


def exact_linear(heads, q, k, v, norm_q=None, norm_k=None):
    """Compute linear attention from its equations, for each head, with weights of all pairs of
    tokens.

    It shares no sum with the kernels.
    """
    if norm_q is not None:
        q, k = (
            x / jnp.sqrt((x**2).mean(-1, keepdims=True) + EPS) * w
            for x, w in ((q, norm_q), (k, norm_k))
        )
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)
    pairs = jnp.einsum("bnhd,bmhd->bhnm", split(jnp.maximum(q, 0)), split(jnp.maximum(k, 0)))
    pairs = pairs / (pairs.sum(-1, keepdims=True) + 1e-15)
    return jnp.einsum("bhnm,bmhd->bnhd", pairs, split(v)).reshape(v.shape)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head", "norm"),
    [
        (2, 85, 3, 32, True),
        (1, 256, 4, 32, True),
        slow(1, 21, 2, 72, True),
        slow(2, 130, 1, 112, True),
        slow(1, 1100, 2, 32, False),
        slow(2, 7, 5, 8, True),
    ],
)
def test_linear_attention(batch, tokens, heads, head, norm):
    """Fails when _divide_tangent omits c dtotal, when _through_rms omits its second term, when
    _key_gradient omits gtotal, when _same_head is all ones, and when padded tokens get an inverse
    of inf.
    """
    if head > backend.LARGEST_LINEAR_HEAD.get(HERE, head):
        pytest.skip(f"{HERE} has no kernel for heads of {head}")
    case = linear_case(0, batch, tokens, heads, head, norm)
    found = derivatives(linear(linear_attention.attend, heads, backend=HERE), *case)
    assert tree_error(found, in_float64(functools.partial(exact_linear, heads), *case)) < 1e-5


@pytest.mark.parametrize("norm", [True, False])
def test_linear_attention_of_one_token(norm):
    """The token attends to itself: values and their tangents come back, and queries and keys have
    no gradient.

    Such are latents of 1 x 1 and corners of tiles.
    """
    (q, k, v, *weights), (dq, dk, dv, *dweights), g = linear_case(0, 2, 1, 2, 32, norm)
    f = linear(linear_attention.attend, 2, backend=HERE)
    value, moved = jax.jvp(f, (q, k, v, *weights), (dq, dk, dv, *dweights))
    gradients = jax.vjp(f, q, k, v, *weights)[1](g)
    for found, expected in (
        (value, v),
        (moved, dv),
        (gradients[2], g),
        *((a, 0 * a) for i, a in enumerate(gradients) if i != 2),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("tokens", "head"), [(128, 32), (45, 32), slow(2200, 16)])
def test_linear_attention_of_heads(tokens, head):
    """With q, k and v of a head next to each other: as they lie in memory, padded, and in many
    parts, so that a separate kernel adds the sums.

    Fails when heads are 3 d apart instead of 3 blocks, and when `joined` puts q, k and v of all
    heads together.
    """
    primals, tangents, g = linear_case(3, 1, tokens, 3, head, False)
    by_head = lambda q, k, v: jnp.stack(
        [x.reshape(*x.shape[:2], 3, -1) for x in (q, k, v)], 3
    ).reshape(*q.shape[:2], -1)
    f = lambda *qkv: linear_attention.attend_interleaved(by_head(*qkv), heads=3, backend=HERE)
    assert (
        tree_error(
            derivatives(f, primals, tangents, g),
            in_float64(functools.partial(exact_linear, 3), primals, tangents, g),
        )
        < 1e-5
    )
    plain = lambda *qkv: linear_attention.attend_interleaved(by_head(*qkv), heads=3)
    assert relative_error(plain(*primals), f(*primals)) < 1e-5
    with pytest.raises(ValueError, match="not three times the width of 4 heads"):
        linear_attention.attend_interleaved(jnp.zeros((1, 4, 90)), heads=4, backend=HERE)


@pytest.mark.parametrize("kind", ["queries", "keys", "both", "large"])
def test_linear_attention_without_weight(kind):
    """Where relu leaves nothing the denominator is its epsilon: value and slopes are finite and
    equal the plain ones.

    Fails when the epsilon is left out.
    """
    primals, tangents, g = linear_case(2, 1, 20, 2, 32, False)
    q, k, v = (np.array(a) for a in primals)
    if kind == "large":
        q, k, v = 1e4 * q, 1e4 * k, 1e4 * v
    if kind in ("queries", "both"):
        q[:, ::2] = -np.abs(q[:, ::2])
    if kind in ("keys", "both"):
        k[:] = np.where(np.arange(20)[:, None] % 3 == 0, 0, -np.abs(k))
    case = ((q, k, v), tangents, g)
    found = derivatives(linear(linear_attention.attend, 2, backend=HERE), *case, scan=False)
    expected = derivatives(linear(linear_attention.attend, 2), *case, scan=False)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1e-6, np.abs(b).max()))


def test_linear_attention_refuses():
    qkv, w = jnp.zeros((1, 4, 96)), jnp.ones(32)
    run = functools.partial(linear_attention.attend, heads=2, eps=EPS, backend=HERE)
    with pytest.raises(ValueError, match="both norms, or of neither"):
        run(qkv, w, None)
    with pytest.raises(ValueError, match="not three times the width of 2 heads"):
        run(qkv[..., :64], w, w)
    with pytest.raises(ValueError, match="backend 'cuda'"):
        linear_attention.attend(qkv, w, w, heads=2, eps=EPS, backend="cuda")


# --- cross-attention ---


def exact_cross(mask, q, k, v):
    scores = (
        jnp.einsum("bnhd,blhd->bhnl", q, k) / np.sqrt(q.shape[-1])
        + jnp.where(mask, 0.0, -1e4)[:, None, None]
    )
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return jnp.einsum("bhnl,blhd->bnhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "head"),
    [(2, 85, 70, 2, 32), slow(2, 21, 11, 2, 72), slow(1, 70, 130, 1, 112), slow(2, 1100, 5, 1, 32)],
)
def test_cross_attention(batch, queries, keys, heads, head):
    """Fails when padding keys have the weight of masked ones, when `shrink` is missing from the sum
    or the mean from s', when the kernel without tangents of k and v is used for them, and when only
    the last part of the queries counts.
    """
    case, mask = cross_case(0, batch, queries, keys, heads, head), uneven_mask(batch, keys)
    found = derivatives(cross(cross_attention.attend, mask, backend=HERE), *case)
    assert tree_error(found, in_float64(functools.partial(exact_cross, mask), *case)) < 1e-5


def test_cross_attention_of_hidden_text():
    """With every key masked all have equal weight, and padding keys have none.

    Scores are multiples of 1/8, so that float32 can add them to -1e4. Fails when _ABSENT is MASKED.
    """
    (q, k, v), tangents, g = cross_case(3, 1, 9, 19, 2, 64)
    case = ((jnp.sign(q), jnp.sign(k), v), tangents, g)
    mask = np.zeros((1, 19))
    found = derivatives(cross(cross_attention.attend, mask, backend=HERE), *case, scan=False)
    expected = in_float64(functools.partial(exact_cross, mask), *case, scan=False)
    assert tree_error(found, expected) < 1e-5
    shown = in_float64(functools.partial(exact_cross, mask + 1), *case, scan=False)
    assert tree_error(found, shown) < 1e-5


def test_cross_attention_of_large_scores():
    """Scores of some thousands: one key wins each query.

    Fails when weights come from a log-sum-exp.
    """
    (q, k, v), tangents, g = cross_case(4, 2, 20, 40, 1, 32)
    case = ((100 * jnp.round(4 * q), jnp.round(4 * k), v), tangents, g)
    mask = uneven_mask(2, 40)
    found = derivatives(cross(cross_attention.attend, mask, backend=HERE), *case, scan=False)
    expected = in_float64(functools.partial(exact_cross, mask), *case, scan=False)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3 * max(1e-3, np.abs(b).max()))


# --- both kinds ---


def both_kinds():
    """Return (kernel, primals) of linear attention, then of cross-attention."""
    linear_primals, *_ = linear_case(0, 1, 16, 1, 32, True)
    cross_primals, *_ = cross_case(0, 1, 16, 16, 1, 32)
    return (
        (linear(linear_attention.attend, 1, backend=HERE), linear_primals),
        (cross(cross_attention.attend, np.ones((1, 16)), backend=HERE), cross_primals),
    )


@pytest.mark.parametrize("which", [0, 1], ids=["linear", "cross"])
def test_tangent_that_is_not_stopped(which):
    """The gradient of everything behind primals or tangents is NaN.

    Fails when _refuse returns zeros, and when residuals are stopped before the linear map.
    """
    f, primals = both_kinds()[which]
    along = lambda scale, direction: jax.jvp(
        lambda x: f(x, *primals[1:]), (primals[0] * scale,), (direction,)
    )[1].sum()
    ones = jnp.ones_like(primals[0])
    assert np.isnan(jax.jit(jax.grad(lambda s: along(s, ones)))(1.0))
    assert np.isnan(jax.jit(jax.grad(lambda s: along(1.0, s * ones)))(1.0))
    # If the tangent is stopped, the gradient of both together is that of the value.
    beside = lambda s: f(primals[0] * s, *primals[1:]).sum()
    stopped = jax.grad(lambda s: beside(s) + jax.lax.stop_gradient(along(s, ones)))(1.0)
    np.testing.assert_allclose(stopped, jax.grad(beside)(1.0), rtol=1e-6)


@pytest.mark.parametrize("weight", ["float32", "bfloat16"])
def test_the_dtype_of_a_norms_weight_decides_its_rounding(weight):
    """Fails when a float32 weight is rounded (in training it is not), and when a bfloat16 weight is
    not multiplied in bfloat16, as in diffusers.
    """
    x, w = (
        jnp.asarray(a, d)
        for a, d in zip(normal_arrays((4, 96), (96,), seed=3), ("bfloat16", weight), strict=True)
    )
    exact = np.asarray(x, np.float64)
    unit = exact / np.sqrt(np.square(exact).mean(-1, keepdims=True) + EPS)
    unit = np.asarray(unit.astype(weight), np.float64)
    expected = (unit * np.asarray(w, np.float64)).astype("bfloat16")
    found = np.asarray(jax.jit(norms.rms_norm, static_argnums=2)(x, w, EPS))
    assert np.mean(found != expected) < 0.01


def test_kernels_round_norms_as_plain():
    """Linear attention with weights of either dtype: almost all results are the same bfloat16.

    Fails when a kernel rounds x / rms differently.
    """
    for weight in ("float32", "bfloat16"):
        arrays, _, _ = linear_case(7, 1, 64, 2, 32, True, dtype=jnp.bfloat16)
        arrays = (*arrays[:3], *(jnp.asarray(a, weight) for a in arrays[3:]))
        plain = linear(linear_attention.attend, 2)(*arrays)
        found = linear(linear_attention.attend, 2, backend=HERE)(*arrays)
        assert np.mean(found != plain) < 0.05


@pytest.mark.slow
def test_bfloat16_is_as_good_as_plain():
    """Over several draws the distance of each output to float64 is at most 3 % more than that of
    plain.

    Fails when the state of linear attention is rounded to bfloat16 once, and when the mean in the
    tangent of cross-attention is subtracted from the rounded sum.
    """
    mask = uneven_mask(2, 50)
    kinds = (
        (
            lambda seed: linear_case(seed, 2, 128, 2, 32, True, dtype=jnp.bfloat16),
            linear(linear_attention.attend, 2),
            linear(linear_attention.attend, 2, backend=HERE),
            functools.partial(exact_linear, 2),
        ),
        (
            lambda seed: cross_case(seed, 2, 128, 50, 2, 72, dtype=jnp.bfloat16),
            cross(cross_attention.attend, mask),
            cross(cross_attention.attend, mask, backend=HERE),
            functools.partial(exact_cross, mask),
        ),
    )
    for case, plain, kernel, exact in kinds:
        squares = 0
        for seed in range(3):
            expected = jax.tree.leaves(in_float64(exact, *case(seed), scan=False))
            found = [
                jax.tree.leaves(derivatives(f, *case(seed), scan=False)) for f in (kernel, plain)
            ]
            squares += np.array(
                [
                    [relative_error(a, b) ** 2 for a, b in zip(each, expected, strict=True)]
                    for each in found
                ]
            )
        ours, theirs = np.sqrt(squares)
        assert (ours <= 1.03 * theirs).all(), (ours, theirs)
        assert theirs.min() > 1e-3  # bfloat16 was used


@pytest.mark.parametrize(
    ("changes"),
    [{}, slow({"qk_norm": False, "remat": "none"}), slow({"remat": "cheap", "unroll": 2})],
    ids=str,
)
def test_whole_network(changes):
    """Value, jvp and the gradient of all parameters around a stopped jvp agree with and without
    kernels.

    So does the structure of the parameters.
    """
    x, dx, text = normal_arrays((2, 5, 4, 3), (2, 5, 4, 3), (2, 7, 6), seed=5)
    t, dt, mask = np.array([0.3, 0.6], np.float32), np.ones(2, np.float32), uneven_mask(2, 7)
    plain = dataclasses.replace(TINY_MODEL, **changes)
    kernels = dataclasses.replace(plain, attention=HERE)
    params = plain.init(jax.random.key(0))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, kernels.init(jax.random.key(0))))
    rng = np.random.default_rng(6)
    params = jax.tree.map(
        lambda a: a + 0.2 * rng.standard_normal(a.shape).astype(np.float32), params
    )

    def step(model):
        def loss(params):
            net = lambda x, t: model.apply(params, x, t, text, mask).velocity
            value, J = jax.jvp(net, (x, t), (dx, dt))
            target = jax.lax.stop_gradient(value - J / jnp.sqrt((J**2).sum()))
            return ((value - target) ** 2).sum(), (value, J)

        return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(params))

    found, expected = step(kernels), step(plain)
    assert tree_error(found[1], expected[1]) < 1e-5
    # Leaf by leaf, none finer than a thousandth of the largest: without QK norm that of the keys'
    # bias is rounding only.
    largest = max(np.linalg.norm(a) for a in jax.tree.leaves(expected[0]))
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0]), strict=True):
        assert np.linalg.norm(a - b) < 1e-4 * max(np.linalg.norm(b), 1e-3 * largest)
    assert min(np.abs(a).max() for a in jax.tree.leaves(expected[0]["blocks"]["attn1"])) > 1e-4


# --- depthwise convolution ---


def exact_depthwise(x, w, bias, gated):
    """Compute the depthwise convolution in float64 from its definition."""
    x, w, bias = (np.asarray(a, np.float64) for a in (x, w, bias))
    out = depthwise_loops(x, w) + bias
    if not gated:
        return out
    value, gate = np.split(out, 2, -1)
    return value * gate / (1 + np.exp(-gate))


@pytest.mark.parametrize(
    ("shape", "k", "gated"),
    [
        ((2, 9, 21, 64), 3, True),
        ((1, 9, 16, 48), 5, False),
        slow((1, 33, 17, 32), 3, False),
        slow((3, 4, 40, 128), 5, True),
    ],
)
def test_depthwise(shape, k, gated):
    """No tile divides the sides.

    Fails when the last tiles are not moved back, when borders are not zero, when the gate takes the
    first half, and when a stencil of five reads two rows too few.
    """
    x, w, bias = normal_arrays(shape, (k, k, shape[-1]), shape[-1:], seed=7)
    expected = exact_depthwise(x, w, bias, gated)
    for dtype, most in (("float32", 1e-6), ("bfloat16", 7e-3)):
        arrays = [jnp.asarray(a, dtype) for a in (x, w, bias)]
        found = depthwise.conv(*arrays, gated, backend=HERE)
        assert found.dtype == dtype and relative_error(found, expected) < most
        # At most as far as the formula, which rounds equally often.
        assert (
            relative_error(found, expected)
            < 1.2 * relative_error(depthwise.conv(*arrays, gated), expected) + 1e-7
        )


@pytest.mark.parametrize("gated", [True, slow(False)])
def test_depthwise_derivatives(gated):
    """Forward with constant and changing parameters, reverse, and reverse around a stopped tangent;
    no tile divides the sides.

    Fails when the slope of SiLU lacks its second term, when the stencil is not flipped, when the
    halves of the cotangent are swapped, when the convolution of the gradient lacks its bias, and
    when that of the tangent has it.
    """
    x, w, bias, dx, dw, dbias, g = (
        jnp.asarray(a)
        for a in normal_arrays(
            (2, 5, 18, 32),
            (3, 3, 32),
            (32,),
            (2, 5, 18, 32),
            (3, 3, 32),
            (32,),
            (2, 5, 18, 16 if gated else 32),
            seed=8,
        )
    )

    def derivatives(kind):
        f = lambda x, w, bias: depthwise.conv(x, w, bias, gated, backend=kind)
        along = lambda x, w, bias: jax.jvp(lambda x: f(x, w, bias), (x,), (dx,))

        def scm(*primals):
            value, J = along(*primals)
            return (jnp.square(value + jax.lax.stop_gradient(J - 2 * value)) * g).sum()

        every = lambda *p: (
            along(*p),
            jax.jvp(f, p, (dx, dw, dbias)),
            jax.vjp(f, *p)[1](g),
            jax.vjp(lambda x: f(x, *p[1:]), p[0])[1](g),
            jax.grad(scm, (0, 1, 2))(*p),
        )
        return jax.jit(every)(x, w, bias)

    assert tree_error(derivatives(HERE), derivatives("plain")) < 1e-6
    # A tangent that is not stopped gives NaN, as in attention.
    moved = lambda s: jax.jvp(
        lambda x: depthwise.conv(x, w, bias, gated, backend=HERE), (s * x,), (dx,)
    )[1].sum()
    assert np.isnan(jax.jit(jax.grad(moved))(1.0))


@pytest.mark.slow
def test_depthwise_derivatives_in_bfloat16():
    """Over several draws the distance to float64 is at most 3 % more than that of the formula."""
    squares = 0
    for seed in range(3):
        arrays = normal_arrays(
            (1, 8, 16, 64), (3, 3, 64), (64,), (1, 8, 16, 64), (1, 8, 16, 32), seed=20 + seed
        )

        def derivatives(kind, dtype):
            x, w, bias, dx, g = (jnp.asarray(a, dtype) for a in arrays)
            f = lambda x, w, bias: depthwise.conv(x, w, bias, True, backend=kind)
            return jax.jit(
                lambda x, w, bias: (
                    jax.jvp(lambda x: f(x, w, bias), (x,), (dx,))[1],
                    jax.vjp(f, x, w, bias)[1](g),
                )
            )(x, w, bias)

        arrays = [np.asarray(jnp.asarray(a, "bfloat16"), np.float64) for a in arrays]
        with jax.enable_x64(True):
            expected = jax.device_get(jax.tree.leaves(derivatives("plain", "float64")))
        found = [jax.tree.leaves(derivatives(kind, "bfloat16")) for kind in (HERE, "plain")]
        squares += np.array(
            [
                [relative_error(a, b) ** 2 for a, b in zip(each, expected, strict=True)]
                for each in found
            ]
        )
    ours, theirs = np.sqrt(squares)
    assert (ours <= 1.03 * theirs).all(), (ours, theirs)
    assert theirs.min() > 1e-3  # bfloat16 was used


def test_unsupported_depthwise_inputs_take_the_formula():
    """These are small images, odd channels, other dtypes, and arrays beyond 32-bit offsets.

    Fails when one reaches the kernel.
    """
    tile = depthwise_kernel.tile
    assert tile((1, 32, 32, 5760), "bfloat16", True) == 64
    assert tile((1, 32, 32, 48), "float32", False) == 16
    for shape, dtype, gated in [
        ((1, 3, 32, 64), "float32", False),
        ((1, 32, 15, 64), "float32", False),
        ((1, 32, 32, 40), "float32", False),
        ((1, 32, 32, 48), "float32", True),
        ((1, 32, 32, 64), "float16", False),
        ((8, 512, 512, 1024), "bfloat16", False),
    ]:
        assert tile(shape, dtype, gated) is None, shape
    with pytest.raises(ValueError, match="no depthwise kernel"):
        depthwise_kernel.conv(
            *normal_arrays((1, 3, 3, 16), (3, 3, 16), (16,), seed=0),
            gated=False,
            backend="interpret",
        )
    with pytest.raises(ValueError, match="use interpret or triton"):
        depthwise_kernel.conv(
            *normal_arrays((1, 4, 16, 16), (3, 3, 16), (16,), seed=0), gated=False, backend="tpu"
        )
    assert [backend.depthwise(p) for p in ("gpu", "cuda", "cpu", "tpu")] == [
        "triton",
        "triton",
        "plain",
        "plain",
    ]


# --- platforms ---


DEVICES = {
    "triton": (
        "cuda",
        "__gpu$xla.gpu.triton",
        dict(device_kind="NVIDIA H200", num_cores=132, platform="gpu"),
    ),
    "tpu": ("tpu", "tpu_custom_call", dict(device_kind="TPU v5e", num_cores=1, platform="tpu")),
}


@pytest.mark.parametrize("name", list(DEVICES))
@pytest.mark.parametrize("kind", ["linear", 72, slow(32), slow(112)])
def test_kernels_lower_without_the_device(name, kind):
    """The last step of the compiler is left out.

    Fails when the pieces of a head are not powers of two (Triton), and when blocks do not end on
    128 lanes (TPU).
    """
    platform, target, device = DEVICES[name]
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=AbstractDevice(**device)
    )
    f, arguments = published_case(kind, name)
    counts = {}
    with jax.sharding.use_abstract_mesh(mesh):
        for mode, g in differentiation_modes(f).items():
            text = jax.jit(g).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
            counts[mode] = len(re.findall(re.escape(f"custom_call @{target}("), text))
    expected = (
        {"forward": 2, "jvp": 4, "grad": 4}
        if kind == "linear"
        else {"forward": 1, "jvp": 2, "grad": 3}
    )
    assert counts == expected


@pytest.mark.parametrize(
    ("shape", "k", "gated"), [((1, 32, 32, 5760), 3, True), ((1, 128, 128, 1536), 5, False)]
)
def test_depthwise_lowers(shape, k, gated):
    """For an NVIDIA GPU at published shapes: one kernel and no convolution.

    Fails when a side of a load is not a power of two.
    """
    platform, target, device = DEVICES["triton"]
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=AbstractDevice(**device)
    )
    arguments = [
        jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (shape, (k, k, shape[-1]), shape[-1:])
    ]
    f = lambda *a: depthwise.conv(*a, gated, backend="triton")
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(f).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(f"custom_call @{target}(") == 1
    assert "stablehlo.convolution" not in text


def run_script(*arguments, **environment):
    """Run helpers.kernels_on_devices and return its result."""
    environment = (
        os.environ
        | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        | environment
    )
    result = subprocess.run(
        [sys.executable, "-m", "helpers.kernels_on_devices", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_sharded_operands_are_not_gathered():
    """On eight simulated devices as 4 x 2 a network with kernels gives the numbers of one device.

    No gathered array has the size of an activation. Fails when `launch` does not map over devices.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    found = run_script("mesh", XLA_FLAGS=flags)
    assert set(found) == {"linear", "cross", "linear 3 samples", "depthwise"}
    for name, measured in found.items():
        assert measured["error"] < 1e-5, name
        if "samples" not in name:
            assert measured["gathers"] == 0, name


@pytest.mark.slow
def test_the_tpu_compiler_accepts_the_kernels():
    """Compiled ahead of time by libtpu for 2 x 2 chips: forward, jvp and grad at the published
    widths.
    """
    pytest.importorskip("libtpu")
    found = run_script("tpu", TPU_SKIP_MDS_QUERY="1")
    assert len(found) == 12
    assert all(m["kernels"] >= 1 and m["gathers"] == 0 for m in found.values()), found


# --- choice ---


def test_resolve():
    """Fails when a GPU gets the kernels of a TPU, and when a reason is given although nothing is
    missing.
    """
    resolve = backend.resolve
    assert resolve("plain", "gpu", 32, 72, "bfloat16") == ("plain", None)
    assert resolve("pallas", "gpu", 32, 72, "bfloat16") == ("triton", None)
    assert resolve("pallas", "cuda", 32, 112, "float32") == ("triton", None)
    assert resolve("pallas", "tpu", 32, 112, "bfloat16") == ("tpu", None)
    for arguments, reason in (
        (("cpu", 32, 72, "bfloat16"), "no compiled kernel for a cpu"),
        (
            ("gpu", 72, 72, "bfloat16"),
            "heads of linear attention are 72 wide and kernels for a gpu take up to 64",
        ),
        (
            ("gpu", 32, 136, "bfloat16"),
            "heads are 32, 136 wide and kernels take multiples of 8 up to 128",
        ),
        (("gpu", 32, 20, "bfloat16"), "multiples of 8"),
        (("tpu", 72, 72, "float16"), "the compute dtype is float16"),
    ):
        chosen, sentence = resolve("pallas", *arguments)
        assert chosen == "plain"
        assert reason in sentence
        assert "\n" not in sentence
    with pytest.raises(ValueError, match="use one of plain, pallas"):
        resolve("triton", "gpu", 32, None, "bfloat16")


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [
        ("9.0", "triton"),
        ("8.0", "triton"),
        ("7.5", "plain"),
        ("gfx942", "plain"),
        ("10.0", "triton"),
    ],
)
def test_kernels_by_gpu(monkeypatch, capability, chosen):
    """GPUs of AMD and of NVIDIA before Ampere have no kernels, and a request for them gives the
    reason.

    Fails when "10.0" is compared as text.
    """

    class Card:
        compute_capability = capability

    monkeypatch.setattr(jax, "devices", lambda: [Card()])
    found, sentence = backend.resolve("pallas", "gpu", 32, 72, "bfloat16")
    assert (
        found,
        backend.depthwise("gpu"),
        backend.fastest("gpu") == "pallas",
        backend.launches_cost("gpu"),
    ) == ((chosen, chosen, chosen == "triton", chosen == "triton"))
    assert (sentence is None) == (chosen == "triton")
    assert sentence is None or "capability 8.0" in sentence


def test_config_chooses(monkeypatch):
    """Fails when build leaves the config's request in the model, and when weights of a folder are
    refused because of it.
    """
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    tree = card()
    assert (
        build.student(config.parse(tree)).attention
        == build.student(config.parse(tree)).depthwise
        == "plain"
    )
    tree.model.attention = "pallas"
    parsed = config.parse(tree)
    assert "no compiled kernel" in build.attention(parsed)[1]
    assert build.teacher(parsed).attention == "plain"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert build.attention(parsed) == ("triton", None)
    for made in (build.student, build.teacher, build.base_teacher):
        assert (made(parsed).attention, made(parsed).depthwise) == ("triton", "triton")
    tree.model.attention = "triton"
    with pytest.raises(UserError, match="config.model.attention 'triton': use plain or pallas"):
        config.parse(tree)
    with pytest.raises(ValueError, match="attention 'pallas'"):
        dataclasses.replace(TINY_MODEL, attention="pallas")


def describe_folder(monkeypatch, transformer):
    """Let `loading.load` find this transformer and DC-AE in any folder, without parameters."""
    models = {"transformer": transformer, "autoencoder": DCAE_F32C32}
    nothing = dict.fromkeys(models)

    def assemble(described, params, wording, *, tile, unrolled):
        pixels = pixel_codecs.AutoencoderPixels(described.models["autoencoder"], tile)
        return encoders.Encoders(text=None, pixels=pixels, params={"text": {}, "pixels": {}})

    description = folder.Description(
        path=pathlib.Path(), models=models, instruction="", diffusers=True
    )
    monkeypatch.setattr(folder.Description, "read", lambda *_, **__: nothing)
    monkeypatch.setattr(folder, "is_diffusers", lambda path: True)
    monkeypatch.setattr(folder, "describe", lambda path, dtype: description)
    monkeypatch.setattr(encoders, "assemble", assemble)
    monkeypatch.setattr(loading, "_unstacked", lambda part, model, params, how: params)


def test_pipeline_chooses(monkeypatch, tmp_path):
    """The choice is reported once, and not without a request.

    Fails when load does not pass the choice to the model or to the autoencoder.
    """
    describe_folder(monkeypatch, TINY_MODEL)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    lines = []
    assert loading.load(tmp_path, dtype="float32", say=lines.append).model == TINY_MODEL
    assert lines == []
    assert (
        loading.load(tmp_path, dtype="float32", attention="pallas", say=lines.append).model
        == TINY_MODEL
    )
    assert len(lines) == 1 and "instead of Pallas kernels" in lines[0]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    kinds = lambda pipe: (pipe.model.attention, pipe.pixels.model.attention)
    assert kinds(loading.load(tmp_path, dtype="float32", attention="pallas", say=lines.append)) == (
        "tpu",
        "plain",
    )
    assert kinds(loading.load(tmp_path, dtype="float32", say=lines.append)) == ("plain", "plain")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for wish in ("pallas", None):
        assert kinds(loading.load(tmp_path, dtype="float32", attention=wish, say=lines.append)) == (
            "triton",
            "triton",
        )
    assert kinds(loading.load(tmp_path, dtype="float32", attention="plain", say=lines.append)) == (
        "plain",
        "plain",
    )
    assert kinds(loading.load(tmp_path, dtype="float32", platform="cuda", say=lines.append)) == (
        "plain",
        "plain",
    )
    assert len(lines) == 1
    with pytest.raises(UserError, match="attention 'fast'"):
        loading.load(tmp_path, attention="fast")


def test_pipeline_chooses_the_depthwise_kernel(monkeypatch, tmp_path):
    """On a GPU, for transformer and autoencoder; not for programs that run elsewhere, nor over
    several devices.

    Fails when one of the two is left out.
    """
    describe_folder(monkeypatch, TINY_MODEL)
    kinds = lambda pipe: (pipe.model.depthwise, pipe.pixels.model.depthwise)
    assert (
        kinds(loading.load(tmp_path, dtype="float32"))
        == (backend.depthwise(jax.default_backend()),) * 2
    )
    # The choice of the training run does not matter either.
    trained = dataclasses.replace(TINY_MODEL, attention="interpret", depthwise="interpret")
    with monkeypatch.context() as context:
        describe_folder(context, trained)
        for platform in (None, "cpu", "cuda", ""):
            found = loading.load(tmp_path, dtype="float32", attention="plain", platform=platform)
            assert kinds(found) == ("plain", "plain")
            assert found.model.attention == "plain"
        assert kinds(loading.load(tmp_path, dtype="float32", platform="cpu")) == ("plain", "plain")
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    pipe = loading.load(tmp_path, dtype="float32")
    assert kinds(loading.load(tmp_path, dtype="float32", attention="plain")) == (
        "plain",
        "plain",
    )  # no kernel at all
    assert kinds(pipe) == ("triton", "triton")
    assert kinds(pipeline.over_devices(pipe, devices)) == (
        "plain",
        "plain",
    )
    assert pipeline.over_devices(pipe, devices).model == TINY_MODEL  # nor attention
    assert pipe.staged
    for platform in ("cuda", ""):
        elsewhere = loading.load(tmp_path, dtype="float32", platform=platform)
        assert kinds(elsewhere) == ("plain", "plain") and not elsewhere.staged
    with pytest.raises(ValueError, match="depthwise 'tpu'"):
        dataclasses.replace(TINY_MODEL, depthwise="tpu")
    with pytest.raises(ValueError, match="depthwise 'tpu'"):
        dataclasses.replace(DCAE_F32C32, depthwise="tpu")

"""Products in bfloat16 whose backward pass stays in bfloat16, and which of them remat
recomputes.
"""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.arrays import relative_error
from helpers.kernel_cases import TINY_MODEL
from sprint_jax.models import layers
from sprint_jax.models.controlnet import Controlled, ControlNet
from sprint_jax.ops import matmul

pytestmark = pytest.mark.second_pass


def bfloat16_normals(*shapes):
    """Return normal arrays in bfloat16."""
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


KINDS = {
    "dense": (matmul.dense, (5, 7, 24), (24, 16), (5, 7, 16), jnp.float32),
    "batched": (matmul.batched, (2, 3, 7, 24), (2, 3, 24, 16), (2, 3, 7, 16), jnp.bfloat16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    """They are those of the float64 product, as near as bfloat16 operands allow.

    Those of a float32 kernel are not rounded to bfloat16. Fails when to_kernel rounds its result,
    and when a side is not transposed.
    """
    product, *shapes, second = KINDS[kind]
    a, b, g = bfloat16_normals(*shapes)
    a, b = a.astype(jnp.bfloat16), b.astype(second)
    out, back = jax.vjp(product, a, b)
    assert out.dtype == jnp.float32
    da, db = back(g)
    wide = [np.asarray(x, np.float64) for x in (a, b, g)]
    flat = lambda x: x.reshape(-1, x.shape[-1]) if kind == "dense" else x
    assert relative_error(out, wide[0] @ wide[1]) < 5e-3
    assert relative_error(da, wide[2] @ np.swapaxes(wide[1], -1, -2)) < 5e-3
    assert relative_error(db, np.swapaxes(flat(wide[0]), -1, -2) @ flat(wide[2])) < 5e-3
    assert (da.dtype, db.dtype) == (a.dtype, second)
    if kind == "dense":
        assert not np.array_equal(db, db.astype(jnp.bfloat16))


def test_rounded_once():
    """Value and tangent are those of the float32 result, rounded once; gradients do not depend on
    it.

    Fails when sums are in bfloat16.
    """
    x, kernel, dx, g = bfloat16_normals((5, 700), (700, 16), (5, 700), (5, 16))
    x, dx = x.astype(jnp.bfloat16), dx.astype(jnp.bfloat16)
    wide, rounded = (
        lambda x, kernel, r=r: matmul.dense(x, kernel, rounded=r) for r in (False, True)
    )
    values = jax.jvp(wide, (x, kernel), (dx, 0 * kernel))
    for a, b in zip(jax.jvp(rounded, (x, kernel), (dx, 0 * kernel)), values, strict=True):
        assert a.dtype == jnp.bfloat16
        assert relative_error(a, b.astype(jnp.bfloat16)) < 1e-4
    for a, b in zip(
        jax.vjp(rounded, x, kernel)[1](g.astype(jnp.bfloat16)),
        jax.vjp(wide, x, kernel)[1](g),
        strict=True,
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_bias_is_added_before_rounding():
    """Fails when a Dense layer rounds its product although a bias follows: a third of the results
    differ then.

    A GPU may do that.
    """
    if jax.default_backend() == "gpu":
        pytest.skip("the compiler's own product rounds twice there")
    x, kernel, bias = bfloat16_normals((50, 24), (24, 16), (16,))
    found = layers.Dense(16, dtype=jnp.bfloat16).apply(
        {"params": {"kernel": kernel, "bias": bias}}, x
    )
    product = x.astype(jnp.bfloat16).astype(jnp.float32) @ kernel.astype(jnp.bfloat16).astype(
        jnp.float32
    )
    assert (
        np.mean(np.asarray(found != (product + bias).astype(jnp.bfloat16))) < 0.01
    )  # the sums have another order


def test_derivatives_with_a_bias():
    """Compare value, tangent and gradient with float64.

    The gradients of kernel and bias are sums over many rows and are more precise than bfloat16.
    Fails when the tangent of the bias is rounded before it is broadcast, when a term of the tangent
    is left out, and when the gradient of the kernel is rounded.
    """
    x, kernel, bias, dx, dkernel, dbias, g = bfloat16_normals(
        (3000, 24), (24, 16), (16,), (3000, 24), (24, 16), (16,), (3000, 16)
    )
    x, dx, g = (a.astype(jnp.bfloat16) for a in (x, dx, g))
    out, moved = jax.jvp(matmul.affine, (x, kernel, bias), (dx, dkernel, dbias))
    wide = lambda *arrays: [np.asarray(a, np.float64) for a in arrays]
    a, k, b, da, dk, db, c = wide(x, kernel, bias, dx, dkernel, dbias, g)
    assert out.dtype == moved.dtype == jnp.bfloat16
    assert relative_error(out, a @ k + b) < 5e-3
    assert relative_error(moved, da @ k + a @ dk + db) < 8e-3
    of_x, of_kernel, of_bias = jax.vjp(matmul.affine, x, kernel, bias)[1](g)
    assert of_x.dtype == jnp.bfloat16 and relative_error(of_x, c @ k.T) < 5e-3
    assert relative_error(of_kernel, a.T @ c) < 1e-5
    assert relative_error(of_bias, c.sum(0)) < 1e-5
    # Constants cost nothing: one product, not three.
    along_x = jax.make_jaxpr(
        lambda x, dx: jax.jvp(lambda x: matmul.affine(x, kernel, bias), (x,), (dx,))[1]
    )(x, dx)
    assert (
        len(list(dot_operands(along_x.jaxpr))) == 3
    )  # two for the value, on two kinds of platform, and the tangent


def test_a_gpu_adds_the_bias_to_a_product_of_its_own_dtype():
    """A library can then do it. Fails when an NVIDIA GPU gets the sum in float32."""
    f = jax.jit(matmul.affine)
    arrays = (
        jax.ShapeDtypeStruct((8, 24), jnp.bfloat16),
        jax.ShapeDtypeStruct((24, 16), jnp.bfloat16),
        jax.ShapeDtypeStruct((16,), jnp.float32),
    )
    made = {
        p: f.trace(*arrays).lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "cpu", "tpu")
    }
    sums = {
        p: set(re.findall(r"stablehlo.add .*: tensor<8x16x(\w+)>", text))
        for p, text in made.items()
    }
    assert sums == {"cuda": {"bf16"}, "cpu": {"f32"}, "tpu": {"f32"}}


@pytest.mark.parametrize("kind", KINDS)
def test_tangents_are_those_of_the_plain_product(kind):
    product, *shapes, _ = KINDS[kind]
    a, b = (x.astype(jnp.bfloat16) for x in bfloat16_normals(*shapes[:2]))
    da, db = jnp.cos(a), jnp.sin(b)
    plain = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)
    for tangents in ((da, db), (da, 0 * b), (0 * a, db)):
        ours, theirs = (jax.jvp(f, (a, b), tangents) for f in (product, plain))
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


def loss_around_a_stopped_tangent(model, apply=None):
    """Return a loss (params) -> scalar like that of sCM.

    `apply` replaces that of the model.
    """
    apply = apply or model.apply
    x, text = bfloat16_normals((2, 8, 8, model.in_channels), (2, 5, model.text_dim))
    v = lambda params: (
        lambda x: apply(params, x, jnp.full((2,), 0.5), text=text, mask=jnp.ones((2, 5))).velocity
    )

    def loss(params):
        value, J = jax.jvp(v(params), (x,), (jnp.cos(x),))
        return jnp.square(value - jax.lax.stop_gradient(value + J)).sum()

    return loss


def dot_operands(jaxpr):
    """Return the operands of all products of a jaxpr."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(v.aval.dtype.name for v in equation.invars)
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from dot_operands(inner)


@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
def test_a_network_in_bfloat16_mixes_no_operands(residual):
    """No product of the forward, tangent or backward pass has operands of different dtypes.

    A GPU would compute it in float32. Fails when Dense, or the scores of cross-attention, leave the
    transposes to JAX.
    """
    trunk = dataclasses.replace(TINY_MODEL, dtype="bfloat16", residual_dtype=residual)
    control = ControlNet(
        net=dataclasses.replace(trunk, guidance_embed=False, logvar_head=False), depth=1
    )
    model = Controlled(trunk=trunk, control=control)
    sketch = bfloat16_normals((2, 8, 8, trunk.in_channels), (1,))[0]
    steered = functools.partial(model.apply, control=sketch, control_scale=jnp.ones((2,)))
    jaxpr = jax.make_jaxpr(jax.grad(loss_around_a_stopped_tangent(trunk, steered)))(
        model.init(jax.random.key(0))
    )
    found = set(dot_operands(jaxpr.jaxpr))
    # only float32: linear attention, as published
    assert found == {("bfloat16", "bfloat16"), ("float32", "float32")}, found


def test_cheap_remat_runs_no_kernel_again():
    """The backward pass has only the kernels of the gradient.

    Fails when the output of attention, or what its gradient reads beside it, is not saved, and when
    the gated convolution is not.
    """
    names = lambda remat: collections.Counter(
        re.findall(
            r"name=((?:linear|cross|depthwise)\w+)",
            str(jax.make_jaxpr(jax.grad(loss(remat)))(params)),
        )
    )

    def loss(remat):
        model = dataclasses.replace(
            TINY_MODEL, remat=remat, attention="interpret", depthwise="interpret", width=64
        )
        x, text = bfloat16_normals((2, 16, 16, model.in_channels), (2, 5, model.text_dim))
        v = lambda params: (
            model.apply(params, x, jnp.full((2,), 0.5), text=text, mask=jnp.ones((2, 5))).velocity
        )
        return lambda params: jnp.square(v(params)).sum()

    params = TINY_MODEL.init(jax.random.key(0))
    none, cheap, block = map(names, ("none", "cheap", "block"))
    assert cheap == none, (
        none,
        cheap,
        block,
    )
    assert block["cross_attention"] == 2 * none["cross_attention"], (
        none,
        cheap,
        block,
    )
    assert {
        "linear_attention_state",
        "cross_attention_key_gradient",
        "depthwise_3x3_gated",
        "depthwise_3x3_gated_gradient",
    } <= set(none)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cheap_remat_saves_products(dtype):
    """It recomputes less than a fifth of what remat of whole blocks recomputes.

    Fails when Dense does not name its result.
    """

    def flops(remat):
        model = dataclasses.replace(TINY_MODEL, dtype=dtype, remat=remat, width=128)
        program = (
            jax.jit(jax.grad(loss_around_a_stopped_tangent(model)))
            .lower(model.init(jax.random.key(0)))
            .compile()
        )
        return program.cost_analysis()["flops"]

    none, cheap, block = (flops(remat) for remat in ("none", "cheap", "block"))
    assert cheap - none < 0.2 * (block - none), (none, cheap, block)

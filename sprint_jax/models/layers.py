"""Layers of the Linear-DiT: norms, embeddings, the two attentions and the gated convolution.

Linen modules here only hold parameters; the arithmetic is in plain functions of arrays, that of the attentions in
`kernels/` beside the kernels that may stand for it. Names and epsilons follow SANA (diffusers `SanaTransformer2DModel`). Reductions of norms, softmax and the linear
attention run in float32 whatever the compute dtype, as in the published model.

Shape letters: B batch, N image tokens, L text tokens, D width, h heads, d head width.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from sprint_jax.ops import cross_attention, depthwise, linear_attention, matmul
from sprint_jax.ops.autodiff import mark_expensive
from sprint_jax.ops.norms import rms_norm

QK_EPS = 1e-5  # of the norm of queries and keys

xavier = nn.initializers.xavier_uniform()
small = nn.initializers.normal(0.02)


def modulate(x, shift, scale):
    """AdaLN: x [B, N, D], shift and scale [B, 1, D] -> x's dtype, rounded once."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(wide) * (1 + scale.astype(wide)) + shift).astype(x.dtype)


def sinusoid(value, dim=256):
    """[cos | sin] features of a scalar. value [B] -> [B, dim] float32."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = value.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def silu(x):
    """x sigmoid(x), rounded once whatever the dtype."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def gelu(x):
    """tanh-approximated GELU, rounded once whatever the dtype."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def unstack_layers(stack, depth):
    """A stack of layers as a list of them. Its leaves have a leading axis of `depth`, or are lists of their layers already."""
    is_list = lambda a: isinstance(a, list)
    return [jax.tree.map(lambda a: a[i], stack, is_leaf=is_list) for i in range(depth)]


_TEXT_PROJECTIONS = ("to_k", "to_v")


def fuse_text_projections(blocks):
    """(blocks without their keys' and values' projections of the text, these as one, {"kernel" [D, 2 n D], "bias" [2 n D]}) of a list
    of n blocks. One product instead of 2 n small ones, for which XLA would put the kernels beside each other in every run."""
    attentions = [block["attn2"] for block in blocks]
    joined = {
        leaf: jnp.concatenate(
            [attention[name][leaf] for attention in attentions for name in _TEXT_PROJECTIONS], -1
        )
        for leaf in ("kernel", "bias")
    }
    without = [
        block
        | {
            "attn2": {
                name: a for name, a in block["attn2"].items() if name not in _TEXT_PROJECTIONS
            }
        }
        for block in blocks
    ]
    return without, joined


def project_text(params, text, dtype):
    """A list of (keys, values) [B, L, D], as `CrossAttention` takes them, by what `fuse_text_projections` made."""
    D = text.shape[-1]
    both = Dense(params["kernel"].shape[-1], dtype=dtype).apply({"params": params}, text)
    parts = [both[..., i : i + D] for i in range(0, both.shape[-1], D)]
    return list(zip(parts[::2], parts[1::2], strict=True))


class Dense(nn.Module):
    """x kernel + bias in `dtype`, rounded once where the platform can (`matmul.affine`).

    flax's layer rounds the product before it adds the bias, which costs bfloat16 about a tenth of its accuracy.
    """

    features: int
    dtype: jnp.dtype
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = xavier

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        if self.use_bias:
            y = matmul.affine(
                x, kernel, self.param("bias", nn.initializers.zeros, (self.features,))
            )
        else:
            y = matmul.dense(x, kernel, rounded=True)
        return mark_expensive(y)


class RMSNorm(nn.Module):
    """RMSNorm with a learned weight over all channels (before any head split)."""

    eps: float
    init: float = 1.0

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.constant(self.init), (x.shape[-1],))
        return rms_norm(x, weight, self.eps)


class NormWeight(nn.Module):
    """The parameter of an `RMSNorm` that is computed elsewhere: [width]."""

    width: int

    @nn.compact
    def __call__(self):
        return self.param("weight", nn.initializers.ones, (self.width,))


class ScalarEmbedding(nn.Module):
    """Sinusoid -> Linear -> SiLU -> Linear, for the time and for the guidance scale."""

    width: int
    dtype: jnp.dtype
    zero_last: bool = False

    @nn.compact
    def __call__(self, value):
        features = sinusoid(value).astype(self.dtype)
        hidden = Dense(self.width, dtype=self.dtype, kernel_init=small, name="linear_1")(features)
        last_init = nn.initializers.zeros if self.zero_last else small
        last = Dense(self.width, dtype=self.dtype, kernel_init=last_init, name="linear_2")
        return last(silu(hidden))


class CaptionProjection(nn.Module):
    """Text features to model width: Linear -> tanh-GELU -> Linear -> RMSNorm (weight from 0.01)."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, text):
        text = text.astype(self.dtype)
        hidden = Dense(self.width, dtype=self.dtype, kernel_init=small, name="linear_1")(text)
        hidden = gelu(hidden)
        hidden = Dense(self.width, dtype=self.dtype, kernel_init=small, name="linear_2")(hidden)
        return RMSNorm(eps=1e-5, init=0.01, name="norm")(hidden)


class SelfAttention(nn.Module):
    """Linear self-attention with RMSNorm of q and k over all channels before the head split.

    attention: one of `kernels.backend.BACKENDS`.
    """

    heads: int
    qk_norm: bool
    dtype: jnp.dtype
    attention: str

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        # One product for q, k and v: a third of the calls and better use of narrow widths.
        qkv = Dense(
            3 * width, use_bias=False, dtype=self.dtype, kernel_init=_xavier_thirds, name="to_qkv"
        )(x)
        norms = [
            NormWeight(width, name=name)() if self.qk_norm else None
            for name in ("norm_q", "norm_k")
        ]
        out = linear_attention.attend(
            qkv, *norms, heads=self.heads, eps=QK_EPS, backend=self.attention
        )
        return Dense(width, dtype=self.dtype, kernel_init=xavier, name="to_out")(
            mark_expensive(out)
        )


def _xavier_thirds(key, shape, dtype=jnp.float32):
    """Xavier for each of q, k, v as if they were separate layers."""
    width = shape[1] // 3
    parts = [xavier(k, (shape[0], width), dtype) for k in jax.random.split(key, 3)]
    return jnp.concatenate(parts, -1)


class CrossAttention(nn.Module):
    """Masked softmax attention over the text, QK RMSNorm over all channels, no outer norm or gate.

    text: [B, L, D], or its keys and values, of `project_text`.
    attention: one of `kernels.backend.BACKENDS`.
    """

    heads: int
    qk_norm: bool
    dtype: jnp.dtype
    attention: str

    @nn.compact
    def __call__(self, x, text, mask):
        width = x.shape[-1]
        dense = lambda name: Dense(width, dtype=self.dtype, kernel_init=xavier, name=name)
        q = dense("to_q")(x)
        k, v = (
            text if isinstance(text, tuple) else [dense(name)(text) for name in _TEXT_PROJECTIONS]
        )
        if self.qk_norm:
            q = RMSNorm(eps=QK_EPS, name="norm_q")(q)
            k = RMSNorm(eps=QK_EPS, name="norm_k")(k)
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in (q, k, v))
        out = cross_attention.attend(q, k, v, mask, backend=self.attention)
        return dense("to_out")(mark_expensive(out.reshape(x.shape)))


class GLUMBConv(nn.Module):
    """Mix-FFN: 1x1 expand, SiLU, 3x3 depthwise, value * SiLU(gate), 1x1 project (no bias).

    depthwise: backend of the convolution, see `ops/depthwise.py`.
    """

    hidden: int
    dtype: jnp.dtype
    depthwise: str

    @nn.compact
    def __call__(self, x):  # [B, H, W, D]
        width, inner = x.shape[-1], 2 * self.hidden
        x = Dense(inner, dtype=self.dtype, kernel_init=xavier, name="conv_inverted")(x)
        x = silu(x)
        stencil = self.param("conv_depth_kernel", _depthwise_init, (3, 3, inner))
        bias = self.param("conv_depth_bias", nn.initializers.zeros, (inner,))
        x = depthwise.conv(x, stencil.astype(x.dtype), bias, gated=True, backend=self.depthwise)
        if (
            self.depthwise != "plain"
        ):  # whose gradient does not need what is between convolution and gate
            x = mark_expensive(x)
        return Dense(
            width, use_bias=False, dtype=self.dtype, kernel_init=xavier, name="conv_point"
        )(x)


def _depthwise_init(key, shape, dtype=jnp.float32):
    """PyTorch's default for a convolution: uniform within 1/sqrt(fan-in), fan-in 9."""
    return jax.random.uniform(key, shape, dtype, -1 / 3, 1 / 3)

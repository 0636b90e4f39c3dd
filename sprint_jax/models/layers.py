"""Layers of the Linear-DiT: embeddings, the two attentions and the gated convolution.

Linen modules here only hold parameters. The arithmetic is in pure functions; norms, attention and
convolution are in `ops/`, next to their optional kernels. Names and epsilons follow SANA (diffusers
`SanaTransformer2DModel`). Reductions of norms, softmax and linear attention run in float32
whatever the compute dtype, as in the published model.

Shape letters: B batch, N image tokens, L text tokens, D width, h heads, d head width.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sprint_jax.ops import cross_attention, depthwise, linear_attention, matmul
from sprint_jax.ops.autodiff import mark_expensive
from sprint_jax.ops.norms import rms_norm

Params = Any  # a tree of arrays
Dtype = Any  # what `jnp.dtype` takes

QK_EPS = 1e-5  # of the norm of queries and keys

xavier = nn.initializers.xavier_uniform()
small = nn.initializers.normal(0.02)


def modulate(
    x: Float[Array, "b n d"], shift: Float[Array, "b 1 d"], scale: Float[Array, "b 1 d"]
) -> Float[Array, "b n d"]:
    """Return x (1 + scale) + shift (AdaLN) in x's dtype, rounded once."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(wide) * (1 + scale.astype(wide)) + shift).astype(x.dtype)


def sinusoid(value: Shaped[Array, " b"], dim: int = 256) -> Float[Array, "b {dim}"]:
    """Return [cos | sin] features of scalars, float32."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = value.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def silu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Return x sigmoid(x), rounded once whatever the dtype."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Return the tanh-approximated GELU, rounded once whatever the dtype."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def run(module: nn.Module, params: Params, *inputs: Any) -> Any:
    """Apply a module with its parameters."""
    return module.apply({"params": params}, *inputs)


def unstack_layers(stack: Params, depth: int) -> list[Params]:
    """Return the layers of a stack as a list.

    Leaves have a leading axis of `depth`, or are lists of their layers already.
    """
    is_list = lambda a: isinstance(a, list)
    return [jax.tree.map(lambda a: a[i], stack, is_leaf=is_list) for i in range(depth)]


_TEXT_PROJECTIONS = ("to_k", "to_v")


def fuse_text_projections(blocks: list[Params]) -> tuple[list[Params], Params]:
    """Fuse the key and value projections of the text of n blocks into one product.

    XLA would gather the kernels of 2 n small products in every run.

    Returns:
      The blocks without these projections, and {"kernel" [D, 2 n D], "bias" [2 n D]}.
    """
    attentions = [block["attn2"] for block in blocks]
    fused = {
        leaf: jnp.concatenate(
            [attention[name][leaf] for attention in attentions for name in _TEXT_PROJECTIONS], -1
        )
        for leaf in ("kernel", "bias")
    }
    rest = [
        {name: a for name, a in attention.items() if name not in _TEXT_PROJECTIONS}
        for attention in attentions
    ]
    return [block | {"attn2": own} for block, own in zip(blocks, rest, strict=True)], fused


def project_text(
    params: Params, text: Float[Array, "b l d"], dtype: Dtype
) -> list[tuple[Float[Array, "b l d"], Float[Array, "b l d"]]]:
    """Return the (keys, values) of each block, as `CrossAttention` takes them.

    params: the fused projections of `fuse_text_projections`.
    """
    width = text.shape[-1]
    both = run(Dense(params["kernel"].shape[-1], dtype=dtype), params, text)
    parts = [both[..., i : i + width] for i in range(0, both.shape[-1], width)]
    return list(zip(parts[::2], parts[1::2], strict=True))


class Dense(nn.Module):
    """x kernel + bias in `dtype`, rounded once where the platform can (`matmul.affine`).

    flax's layer rounds the product before it adds the bias, which costs bfloat16 about a tenth of
    its accuracy.
    """

    features: int
    dtype: Dtype
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = xavier

    @nn.compact
    def __call__(self, x: Float[Array, "*s n"]) -> Float[Array, "*s m"]:
        """Return the layer of x."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = matmul.affine(x, kernel, bias)
        else:
            y = matmul.dense(x, kernel, rounded=True)
        return mark_expensive(y)


class RMSNorm(nn.Module):
    """RMSNorm with a learned weight over all channels, before any head split."""

    eps: float
    initial: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*s d"]) -> Float[Array, "*s d"]:
        """Return the norm of x."""
        weight = self.param("weight", nn.initializers.constant(self.initial), (x.shape[-1],))
        return rms_norm(x, weight, self.eps)


class NormWeight(nn.Module):
    """An RMSNorm weight [width] that the attention applies."""

    width: int

    @nn.compact
    def __call__(self) -> Float[Array, " d"]:
        """Return the weight."""
        return self.param("weight", nn.initializers.ones, (self.width,))


class ScalarEmbedding(nn.Module):
    """Sinusoid -> Linear -> SiLU -> Linear, for times and the guidance scale."""

    width: int
    dtype: Dtype
    zero_last: bool = False

    @nn.compact
    def __call__(self, value: Shaped[Array, " b"]) -> Float[Array, "b d"]:
        """Return the embedding of each value."""
        features = sinusoid(value).astype(self.dtype)
        hidden = Dense(self.width, dtype=self.dtype, kernel_init=small, name="linear_1")(features)
        last_init = nn.initializers.zeros if self.zero_last else small
        last = Dense(self.width, dtype=self.dtype, kernel_init=last_init, name="linear_2")
        return last(silu(hidden))


class CaptionProjection(nn.Module):
    """Text features to model width: Linear -> tanh-GELU -> Linear -> RMSNorm (weight from 0.01)."""

    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, text: Float[Array, "b l e"]) -> Float[Array, "b l d"]:
        """Return the projected text."""
        text = text.astype(self.dtype)
        hidden = Dense(self.width, dtype=self.dtype, kernel_init=small, name="linear_1")(text)
        hidden = gelu(hidden)
        hidden = Dense(self.width, dtype=self.dtype, kernel_init=small, name="linear_2")(hidden)
        return RMSNorm(eps=1e-5, initial=0.01, name="norm")(hidden)


class SelfAttention(nn.Module):
    """Linear self-attention with RMSNorm of q and k over all channels before the head split.

    attention: one of `ops.backend.BACKENDS`.
    """

    heads: int
    qk_norm: bool
    dtype: Dtype
    attention: str

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Return the attention of x to itself."""
        width = x.shape[-1]
        # One product for q, k and v: a third of the calls and better use of narrow widths.
        qkv = Dense(
            3 * width, use_bias=False, dtype=self.dtype, kernel_init=_xavier_thirds, name="to_qkv"
        )(x)
        norm_q, norm_k = (
            NormWeight(width, name=name)() if self.qk_norm else None
            for name in ("norm_q", "norm_k")
        )
        out = linear_attention.attend(
            qkv, norm_q, norm_k, heads=self.heads, eps=QK_EPS, backend=self.attention
        )
        to_out = Dense(width, dtype=self.dtype, kernel_init=xavier, name="to_out")
        return to_out(mark_expensive(out))


def _xavier_thirds(key: Array, shape: Any, dtype: Dtype = jnp.float32) -> Array:
    """Draw Xavier values for each of q, k, v as if they were separate layers."""
    width = shape[1] // 3
    parts = [xavier(k, (shape[0], width), dtype) for k in jax.random.split(key, 3)]
    return jnp.concatenate(parts, -1)


class CrossAttention(nn.Module):
    """Masked softmax attention over the text, QK RMSNorm over all channels, no outer norm or gate.

    attention: one of `ops.backend.BACKENDS`.
    """

    heads: int
    qk_norm: bool
    dtype: Dtype
    attention: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        text: Float[Array, "b l d"] | tuple[Float[Array, "b l d"], Float[Array, "b l d"]],
        mask: Shaped[Array, "b l"],
    ) -> Float[Array, "b n d"]:
        """Return the attention of x to the text, or to its (keys, values) of `project_text`."""
        width = x.shape[-1]
        dense = lambda name: Dense(width, dtype=self.dtype, kernel_init=xavier, name=name)
        q = dense("to_q")(x)
        if isinstance(text, tuple):
            k, v = text
        else:
            k, v = (dense(name)(text) for name in _TEXT_PROJECTIONS)
        if self.qk_norm:
            q = RMSNorm(eps=QK_EPS, name="norm_q")(q)
            k = RMSNorm(eps=QK_EPS, name="norm_k")(k)
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in (q, k, v))
        out = cross_attention.attend(q, k, v, mask, backend=self.attention)
        return dense("to_out")(mark_expensive(out.reshape(x.shape)))


class GLUMBConv(nn.Module):
    """Mix-FFN: 1x1 expand, SiLU, 3x3 depthwise, value * SiLU(gate), 1x1 project (no bias).

    depthwise: one of `ops.backend.DEPTHWISE`.
    """

    hidden: int
    dtype: Dtype
    depthwise: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """Return the feed-forward layer of x."""
        width, inner = x.shape[-1], 2 * self.hidden
        x = Dense(inner, dtype=self.dtype, kernel_init=xavier, name="conv_inverted")(x)
        x = silu(x)
        stencil = self.param("conv_depth_kernel", _depthwise_init, (3, 3, inner))
        bias = self.param("conv_depth_bias", nn.initializers.zeros, (inner,))
        x = depthwise.conv(x, stencil.astype(x.dtype), bias, gated=True, backend=self.depthwise)
        # The gradient by kernels does not need what lies between convolution and gate.
        if self.depthwise != "plain":
            x = mark_expensive(x)
        return Dense(
            width, use_bias=False, dtype=self.dtype, kernel_init=xavier, name="conv_point"
        )(x)


def _depthwise_init(key: Array, shape: Any, dtype: Dtype = jnp.float32) -> Array:
    """Draw PyTorch's default for a convolution: uniform within 1/sqrt(fan-in), fan-in 9."""
    return jax.random.uniform(key, shape, dtype, -1 / 3, 1 / 3)

"""Discriminator heads on the features of the frozen teacher (LADD), as released with SANA-Sprint.

One head per hooked block: spectral-norm 1x1 convolution, BatchNormLocal, LeakyReLU, a residual k=9
circular convolution along the row-major token axis, and a 1x1 convolution to one logit per token.
Heads do not see the text; conditioning enters through the teacher's features alone.

Shape letters: B batch, N tokens, D width.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sprint_jax.models.layers import Params
from sprint_jax.ops import matmul

GROUP = 8  # BatchNormLocal: samples per normalization group
KERNEL = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class LADDHeads:
    """Description of the heads."""

    width: int  # of the features, D
    count: int  # hooked blocks, one head each
    # Of the operands of products, "float32" or "bfloat16" (published: bfloat16 autocast).
    # Parameters, sums and norms are float32.
    dtype: str

    def init(self, key: PRNGKeyArray) -> tuple[Params, Params]:
        """Draw parameters and singular vectors of spectral norm, with a leading axis of heads."""
        keys = jax.random.split(key, self.count)
        return jax.vmap(lambda k: _init_head(k, self.width))(keys)

    def advance(self, params: Params, spectral: Params) -> Params:
        """Return the singular vectors after one power iteration.

        A discriminator step calls it once before each use of the heads. Generator steps use the
        stored vectors, as spectral norm in eval mode does.
        """
        step = jax.vmap(power_iteration)
        return {
            name: step(jax.lax.stop_gradient(params[name]["kernel"]), v)
            for name, v in spectral.items()
        }

    def apply(
        self, params: Params, spectral: Params, features: Sequence[Float[Array, "b n d"]]
    ) -> list[Float[Array, "b n"]]:
        """Return the logits of every head, float32.

        Args:
          params, spectral: from `init`.
          features: `count` arrays.

        Raises:
          ValueError: for another number of features.
        """
        if len(features) != self.count:
            raise ValueError(f"{len(features)} features for {self.count} heads")
        one = lambda tree, i: jax.tree.map(lambda a: a[i], tree)
        return [
            _apply_head(one(params, i), one(spectral, i), f.astype(self.dtype))
            for i, f in enumerate(features)
        ]


def _init_head(key: Array, width: int) -> tuple[Params, Params]:
    sizes = {"conv_in": (width, width), "conv_mid": (KERNEL * width, width), "conv_out": (width, 1)}
    params, spectral = {}, {}
    for k, (name, shape) in zip(jax.random.split(key, 3), sizes.items()):
        k_weight, k_bias, k_u = jax.random.split(k, 3)
        bound = 1 / math.sqrt(shape[0])  # PyTorch's default for a convolution of this fan-in
        params[name] = {
            "kernel": jax.random.uniform(k_weight, shape, minval=-bound, maxval=bound),
            "bias": jax.random.uniform(k_bias, shape[1:], minval=-bound, maxval=bound),
        }
        kernel = params[name]["kernel"]
        vectors = {"u": _unit(jax.random.normal(k_u, shape[1:])), "v": jnp.zeros(shape[:1])}
        # So that the first generator steps see a true sigma. The published heads start from random
        # u and v, without these iterations.
        spectral[name] = jax.lax.fori_loop(0, 15, lambda _, v: power_iteration(kernel, v), vectors)
    for name in ("norm_in", "norm_mid"):
        params[name] = {"scale": jnp.ones((width,)), "bias": jnp.zeros((width,))}
    return params, spectral


def _apply_head(params: Params, spectral: Params, x: Float[Array, "b n d"]) -> Float[Array, "b n"]:
    dtype = x.dtype
    weights = {name: spectral_norm(params[name]["kernel"], v) for name, v in spectral.items()}
    conv = lambda name, x: matmul.dense(x.astype(dtype), weights[name]) + params[name]["bias"]
    norm = lambda name, x: batch_norm_local(x, params[name]["scale"], params[name]["bias"])
    activate = lambda x: jax.nn.leaky_relu(x, 0.2)
    h = activate(norm("norm_in", conv("conv_in", x)))
    h = (
        h + activate(norm("norm_mid", conv("conv_mid", circular_windows(h.astype(dtype)))))
    ) / math.sqrt(2)
    return conv("conv_out", h)[..., 0]


def circular_windows(x: Float[Array, "b n d"]) -> Float[Array, "b n e"]:
    """Return each token with its neighbors, wrapping around, offset -4 first.

    The result is [B, N, KERNEL * D].
    """
    half = KERNEL // 2
    return jnp.concatenate([jnp.roll(x, -o, axis=1) for o in range(-half, half + 1)], -1)


def _unit(v: Array) -> Array:
    return v / jnp.maximum(jnp.linalg.norm(v), 1e-12)


def power_iteration(kernel: Float[Array, "i o"], vectors: dict[str, Array]) -> dict[str, Array]:
    """Take one step toward the leading singular pair {"u" [fan_out], "v" [fan_in]}."""
    v = _unit(kernel @ vectors["u"])
    return {"u": _unit(v @ kernel), "v": v}


def spectral_norm(kernel: Float[Array, "i o"], vectors: dict[str, Array]) -> Float[Array, "i o"]:
    """Return kernel / sigma with sigma = v' kernel u and {"u" [fan_out], "v" [fan_in]}.

    Gradients reach the kernel but not u and v, which is PyTorch's rule.
    """
    return kernel / (vectors["v"] @ kernel @ vectors["u"])


def batch_norm_local(
    x: Float[Array, "b n d"],
    scale: Float[Array, " d"],
    bias: Float[Array, " d"],
    eps: float = 1e-5,
) -> Float[Array, "b n d"]:
    """Normalize each channel over groups of GROUP consecutive samples and all tokens.

    There are no running statistics. A batch that GROUP does not divide is split into
    ceil(B / GROUP) equal groups and must divide by that number.

    "Local" means a group of the global batch in its order, whatever the devices: the result does
    not depend on how the batch is split over them. If each device holds a multiple of GROUP
    samples, no group crosses devices, and this is what the published trainer computes on each GPU.

    Raises:
      ValueError: if the batch does not split into equal groups.
    """
    batch, tokens, width = x.shape
    groups = math.ceil(batch / GROUP)
    if batch % groups:
        raise ValueError(f"batch {batch} does not split into {groups} equal normalization groups")
    g = x.reshape(groups, batch // groups * tokens, width)
    mean = g.mean(1, keepdims=True)
    variance = jnp.square(g - mean).mean(1, keepdims=True)
    g = (g - mean) * jax.lax.rsqrt(variance + eps)
    return g.reshape(batch, tokens, width) * scale + bias

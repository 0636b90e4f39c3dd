"""Discriminator heads on the features of the frozen teacher (LADD), as released with SANA-Sprint.

One head per hooked block: spectral-norm 1x1 convolution, BatchNormLocal, LeakyReLU, a residual k=9
circular convolution along the row-major token axis, and a 1x1 convolution to one logit per token. Heads
see no text; conditioning enters through the teacher's features alone.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sprint_jax.ops import matmul

GROUP = 8  # BatchNormLocal: samples per normalisation group
KERNEL = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class LADDHeads:
    """Description of the heads.

    width: feature width D. count: number of hooked blocks, one head each.
    dtype: of the operands of products, "float32" or "bfloat16" (published: bfloat16 autocast). Parameters, sums and norms are float32.
    """

    width: int
    count: int
    dtype: str

    def init(self, key):
        """(params, spectral): parameters and the singular vectors of spectral norm, a leading axis per head."""
        keys = jax.random.split(key, self.count)
        return jax.vmap(lambda k: _init_head(k, self.width))(keys)

    def advance(self, params, spectral):
        """The singular vectors after one power iteration: once before each use in a discriminator step.

        Generator steps use the stored ones as they are, as spectral norm in eval mode does.
        """
        step = jax.vmap(power_iteration)
        return {
            name: step(jax.lax.stop_gradient(params[name]["kernel"]), v)
            for name, v in spectral.items()
        }

    def apply(self, params, spectral, features):
        """Logits of every head: list of `count` arrays [B, N] float32.

        params, spectral: from `init`. features: `count` arrays [B, N, width].
        """
        if len(features) != self.count:
            raise ValueError(f"{len(features)} features for {self.count} heads")
        one = lambda tree, i: jax.tree.map(lambda a: a[i], tree)
        return [
            _apply_head(one(params, i), one(spectral, i), f.astype(self.dtype))
            for i, f in enumerate(features)
        ]


def _init_head(key, width):
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
        # So that the first generator steps see a true sigma. The published heads' spectral_norm begins from random u and v, without these.
        spectral[name] = jax.lax.fori_loop(0, 15, lambda _, v: power_iteration(kernel, v), vectors)
    for name in ("norm_in", "norm_mid"):
        params[name] = {"scale": jnp.ones((width,)), "bias": jnp.zeros((width,))}
    return params, spectral


def _apply_head(params, spectral, x):
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


def circular_windows(x):
    """[B, N, D] -> [B, N, KERNEL * D]: each token with its neighbours, wrapping around, offset -4 first."""
    half = KERNEL // 2
    return jnp.concatenate([jnp.roll(x, -o, axis=1) for o in range(-half, half + 1)], -1)


def _unit(v):
    return v / jnp.maximum(jnp.linalg.norm(v), 1e-12)


def power_iteration(kernel, vectors):
    """One step towards the leading singular pair. kernel [fan_in, fan_out], {"u" [out], "v" [in]}."""
    v = _unit(kernel @ vectors["u"])
    return {"u": _unit(v @ kernel), "v": v}


def spectral_norm(kernel, vectors):
    """kernel / sigma, sigma = v' kernel u, PyTorch's rule: gradients reach the kernel, not u and v.

    kernel [fan_in, fan_out], vectors {"u", "v"} -> [fan_in, fan_out].
    """
    return kernel / (vectors["v"] @ kernel @ vectors["u"])


def batch_norm_local(x, scale, bias, eps=1e-5):
    """Normalises each channel over groups of GROUP consecutive samples and all tokens; no running stats.

    x: [B, N, D]. A batch that GROUP does not divide is split into ceil(B / GROUP) equal groups and must
    divide by that number. "Local" is a group of the global batch in its order, whatever the devices: the
    result does not depend on how the batch is split over them. Where each device holds a multiple of GROUP
    samples no group crosses devices, and this is what the published trainer computes on each GPU.
    """
    batch, tokens, width = x.shape
    groups = math.ceil(batch / GROUP)
    if batch % groups:
        raise ValueError(f"batch {batch} does not split into {groups} equal normalisation groups")
    g = x.reshape(groups, batch // groups * tokens, width)
    mean = g.mean(1, keepdims=True)
    variance = jnp.square(g - mean).mean(1, keepdims=True)
    g = (g - mean) * jax.lax.rsqrt(variance + eps)
    return g.reshape(batch, tokens, width) * scale + bias

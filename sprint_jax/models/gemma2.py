"""Gemma-2 as a text encoder: the decoder stack, and its last hidden state after the final norm.

It is a pure function of a parameter tree, with an optional prefix. Gemma is causal, so the hidden
states, keys and values of a fixed beginning (SANA's instruction) are computed once, and only what
follows is encoded. The arithmetic follows transformers' `Gemma2Model` with eager attention, the
only one with the soft cap.

Shape letters: B batch, P prefix tokens, T tokens, D width, h query heads, g key-value heads,
d head width, r query heads of a key-value head, m = r T.
"""

import dataclasses
from typing import Any

import einops
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from sprint_jax.models import layers
from sprint_jax.models.layers import Params
from sprint_jax.ops import placement


@flax.struct.dataclass
class Prefix:
    """What later tokens need from the tokens before them."""

    keys: Float[Array, "n p g d"]  # of each layer, rotated
    values: Float[Array, "n p g d"]
    first: Float[Array, " width"]  # last hidden state of the first token


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Return the RMSNorm times (1 + weight), computed in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)
    return (x32 * (1 + weight.astype(jnp.float32))).astype(x.dtype)


def _rotate(
    x: Float[Array, "b t h d"], positions: Int[Array, " t"], theta: float
) -> Float[Array, "b t h d"]:
    """Apply the rotary embedding, in the convention of two halves."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2:
    """Description of a Gemma-2 decoder stack."""

    vocab: int  # tokens
    width: int  # D
    depth: int  # layers
    heads: int  # h
    kv_heads: int  # g
    head_dim: int  # d
    hidden: int  # width of the gated MLP
    query_scalar: float  # scores are divided by its square root
    window: int  # even layers see this many tokens back
    softcap: float  # scores become softcap tanh(score / softcap)
    eps: float  # of the norms
    theta: float  # base of the rotary embedding

    def __post_init__(self) -> None:
        """Raise ValueError if the heads do not divide."""
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}")

    def init(self, key: PRNGKeyArray) -> Params:
        """Draw parameters {"embed" [V, D], "layers" (leading axis depth), "norm"}, float32."""
        width, queries, keys = self.width, self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "q": (width, queries),
            "k": (width, keys),
            "v": (width, keys),
            "o": (queries, width),
            "gate": (width, self.hidden),
            "up": (width, self.hidden),
            "down": (self.hidden, width),
        }
        *layer_keys, embed_key = jax.random.split(key, len(shapes) + 1)
        stacked = {
            name: jax.random.normal(k, (self.depth, *shape)) / jnp.sqrt(shape[0])
            for k, (name, shape) in zip(layer_keys, shapes.items(), strict=True)
        }
        norms = {name: jnp.zeros((self.depth, width)) for name in _NORMS}
        return {
            "embed": jax.random.normal(embed_key, (self.vocab, width)) / jnp.sqrt(width),
            "layers": stacked | norms,
            "norm": jnp.zeros((width,)),
        }

    def unstack(self, params: Params) -> Params:
        """Return the parameters with a list of layers, as `LinearDiT.unstack` does."""
        return params | {"layers": layers.unstack_layers(params["layers"], self.depth)}

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        mask: Shaped[Array, "b t"],
        prefix: Prefix | None = None,
    ) -> Float[Array, "b t d"]:
        """Return the last hidden states, in the dtype of the parameters.

        The values at padding are meaningless.

        Args:
          params: tree from `init`, or `unstack` of it. Its dtype is the compute dtype.
          tokens: token ids.
          mask: non-zero for real tokens; padding is on the right.
          prefix: of the tokens before these; None for none.
        """
        return self._run(params, tokens, mask, prefix)[0]

    def prefix(self, params: Params, tokens: Int[Array, " p"]) -> Prefix:
        """Compute the prefix of tokens."""
        states, keys, values = self._run(params, tokens[None], jnp.ones((1, len(tokens))), None)
        return Prefix(keys[:, 0], values[:, 0], states[0, 0])

    def _run(
        self, params: Params, tokens: Array, mask: Array, prefix: Prefix | None
    ) -> tuple[Array, Array, Array]:
        """Return the last hidden states, and keys and values of all layers [depth, B, T, g, d]."""
        batch, length = tokens.shape
        start = 0 if prefix is None else prefix.keys.shape[1]
        here, before = start + jnp.arange(length), jnp.arange(start)
        known = jnp.concatenate([jnp.ones((batch, start), bool), mask.astype(bool)], 1)
        back = here[:, None] - jnp.concatenate([before, here])[None]  # [T, P + T] tokens back
        everything = (back >= 0) & known[:, None]
        windowed = everything & (back < self.window)

        def layer(x, inputs):
            p, past, local = inputs
            p = placement.gather_weights(p, x.dtype)
            allowed = jnp.where(local, windowed, everything)
            z = _rms_norm(x, p["input_norm"], self.eps)
            attended, k, v = self._attention(p, z, here, allowed, past)
            x = x + _rms_norm(attended, p["post_attention_norm"], self.eps)
            z = _rms_norm(x, p["pre_feedforward_norm"], self.eps)
            z = (layers.gelu(z @ p["gate"]) * (z @ p["up"])) @ p["down"]
            x = x + _rms_norm(z, p["post_feedforward_norm"], self.eps)
            return placement.split_over_devices(x), (k, v)

        embed = params["embed"]
        x = embed[tokens] * jnp.asarray(self.width**0.5, embed.dtype)
        past = None if prefix is None else (prefix.keys, prefix.values)
        if isinstance(params["layers"], list):
            found = []
            for i, p in enumerate(params["layers"]):
                x, new = layer(x, (p, jax.tree.map(lambda a: a[i], past), i % 2 == 0))
                found.append(new)
            keys, values = (jnp.stack(a) for a in zip(*found, strict=True))
        else:
            local = jnp.arange(self.depth) % 2 == 0
            x, (keys, values) = jax.lax.scan(layer, x, (params["layers"], past, local))
        return _rms_norm(x, params["norm"], self.eps), keys, values

    def _attention(
        self, p: Params, x: Array, positions: Array, allowed: Array, past: Any
    ) -> tuple[Array, Array, Array]:
        """Attend from x [B, T, D] to the keys that allowed [B, T, P + T] shows.

        past: keys and values [P, g, d] of the prefix, or None.

        Returns:
          [B, T, D], and keys and values [B, T, g, d] of these tokens.
        """
        batch, length, _ = x.shape
        heads = lambda name: (x @ p[name]).reshape(batch, length, -1, self.head_dim)
        q = _rotate(heads("q"), positions, self.theta)
        k = _rotate(heads("k"), positions, self.theta)
        v = heads("v")
        all_k, all_v = k, v
        if past is not None:
            join = lambda old, new: jnp.concatenate(
                [jnp.broadcast_to(old, (batch, *old.shape)), new], 1
            )
            all_k, all_v = join(past[0], k), join(past[1], v)
        # Queries that share keys lie side by side, keys last. A GPU then computes the soft cap,
        # mask and softmax in one pass.
        q = einops.rearrange(q, "b t (g r) d -> b g (r t) d", g=self.kv_heads)
        scores = jnp.einsum("bgmd,bsgd->bgms", q, all_k, preferred_element_type=jnp.float32)
        scores = scores * self.query_scalar**-0.5
        scores = self.softcap * jnp.tanh(scores / self.softcap)
        allowed = jnp.tile(allowed, (1, self.heads // self.kv_heads, 1))[:, None]
        scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, -1).astype(x.dtype)
        out = jnp.einsum("bgms,bsgd->bgmd", weights, all_v)
        return einops.rearrange(out, "b g (r t) d -> b t (g r d)", t=length) @ p["o"], k, v


_NORMS = ("input_norm", "post_attention_norm", "pre_feedforward_norm", "post_feedforward_norm")

# gemma-2-2b, the text encoder of SANA.
GEMMA2_2B = Gemma2(
    vocab=256000,
    width=2304,
    depth=26,
    heads=8,
    kv_heads=4,
    head_dim=256,
    hidden=9216,
    query_scalar=256.0,
    window=4096,
    softcap=50.0,
    eps=1e-6,
    theta=10000.0,
)

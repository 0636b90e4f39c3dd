"""Gemma-2 as a text encoder: the decoder stack alone, its last hidden state after the final norm.

A pure function of a parameter tree, with an optional prefix: Gemma is causal, so the hidden states, keys
and values of a fixed beginning (SANA's instruction) are computed once and only what follows is encoded.
Arithmetic follows transformers' `Gemma2Model` with eager attention (the only one with the soft cap).

Shape letters: B batch, P prefix tokens, T tokens, D width, h query heads, g key-value heads, d head width, m = r t: the r query heads of a
key-value head at t tokens.
"""

import dataclasses

import einops
import flax.struct
import jax
import jax.numpy as jnp

from sprint_jax.models import layers
from sprint_jax.ops import placement


@flax.struct.dataclass
class Prefix:
    """What later tokens need of the ones before them.

    keys, values: [depth, P, g, d], rotated. first: [D], the first token's last hidden state.
    """

    keys: jax.Array
    values: jax.Array
    first: jax.Array


def _rms_norm(x, weight, eps):
    """RMSNorm times (1 + weight), in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)
    return (x32 * (1 + weight.astype(jnp.float32))).astype(x.dtype)


def _rotate(x, positions, theta):
    """Rotary embedding, halves convention. x [B, T, h, d], positions [T]."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2:
    """Description of a Gemma-2 decoder stack.

    vocab: tokens. width, depth: D and the number of layers. heads, kv_heads, head_dim: h, g, d.
    hidden: width of the gated MLP. query_scalar: scores are divided by its square root.
    window: even layers see this many tokens back. softcap: scores become softcap tanh(score / softcap).
    eps: of the norms. theta: base of the rotary embedding.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    query_scalar: float
    window: int
    softcap: float
    eps: float
    theta: float

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}")

    def init(self, key):
        """Random parameters {"embed" [V, D], "layers" (leading axis depth), "norm"}, float32."""
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

    def unstack(self, params):
        """The same parameters with a list of layers, as `LinearDiT.unstack`."""
        return params | {"layers": layers.unstack_layers(params["layers"], self.depth)}

    def apply(self, params, tokens, mask, prefix: Prefix | None = None):
        """Last hidden states.

        Args:
          params: tree from `init`, or `unstack` of it; its dtype is the compute dtype.
          tokens: [B, T] int32. mask: [B, T], non-zero for real tokens; padding is on the right.
          prefix: of the P tokens before these; None for none.
        Returns:
          [B, T, D] in the dtype of the parameters; what stands at padding means nothing.
        """
        return self._run(params, tokens, mask, prefix)[0]

    def prefix(self, params, tokens) -> Prefix:
        """The prefix of tokens [P] int32."""
        states, keys, values = self._run(params, tokens[None], jnp.ones((1, len(tokens))), None)
        return Prefix(keys[:, 0], values[:, 0], states[0, 0])

    def _run(self, params, tokens, mask, prefix):
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
            attended, k, v = self._attention(
                p, _rms_norm(x, p["input_norm"], self.eps), here, allowed, past
            )
            x = x + _rms_norm(attended, p["post_attention_norm"], self.eps)
            z = _rms_norm(x, p["pre_feedforward_norm"], self.eps)
            z = (layers.gelu(z @ p["gate"]) * (z @ p["up"])) @ p["down"]
            x = x + _rms_norm(z, p["post_feedforward_norm"], self.eps)
            return placement.split_over_devices(x), (k, v)

        embed = params["embed"]
        x = embed[tokens] * jnp.asarray(self.width**0.5, embed.dtype)
        past = None if prefix is None else (prefix.keys, prefix.values)
        local = jnp.arange(self.depth) % 2 == 0
        if isinstance(params["layers"], list):
            found = []
            for i, p in enumerate(params["layers"]):
                x, new = layer(x, (p, jax.tree.map(lambda a: a[i], past), i % 2 == 0))
                found.append(new)
            keys, values = (jnp.stack(a) for a in zip(*found, strict=True))
        else:
            x, (keys, values) = jax.lax.scan(layer, x, (params["layers"], past, local))
        return _rms_norm(x, params["norm"], self.eps), keys, values

    def _attention(self, p, x, positions, allowed, past):
        """x [B, T, D], allowed [B, T, P + T] -> ([B, T, D], keys and values [B, T, g, d] of these tokens)."""
        batch, length, _ = x.shape
        heads = lambda name: (x @ p[name]).reshape(batch, length, -1, self.head_dim)
        q, k, v = (
            _rotate(heads("q"), positions, self.theta),
            _rotate(heads("k"), positions, self.theta),
            heads("v"),
        )
        all_k, all_v = k, v
        if past is not None:
            join = lambda old, new: jnp.concatenate(
                [jnp.broadcast_to(old, (batch, *old.shape)), new], 1
            )
            all_k, all_v = join(past[0], k), join(past[1], v)
        # Queries that share keys side by side, keys last: a GPU then takes the soft cap, mask and softmax in one pass.
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

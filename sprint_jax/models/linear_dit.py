"""The Linear-DiT of SANA (0.6B, 1.6B and smaller) as pure functions of a parameter tree.

`LinearDiT` is a frozen description. `init(key)` draws parameters and `apply(params, ...)` is a
function of its arguments alone. The network predicts the flow-matching velocity (noise minus data)
and does not know TrigFlow; `sprint_jax.diffusion.trigflow` wraps it.

Blocks are stacked and scanned over depth, in segments that end at the blocks whose features are
requested (LADD). Without the velocity, nothing after the last requested block is computed.

Shape letters: B batch, H x W tokens, L text tokens, D width, E width of text features.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import einops
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from sprint_jax.models import layers
from sprint_jax.models.layers import Params
from sprint_jax.ops import autodiff, backend, placement
from sprint_jax.ops.norms import layer_norm

REMAT = ("none", "block", "cheap")


@flax.struct.dataclass
class Output:
    """Result of `LinearDiT.apply`."""

    velocity: Float[Array, "b h w c"] | None  # float32; None if only features were requested
    logvar: Float[Array, " b"] | None  # float32; None without a log-variance head
    features: tuple[Float[Array, "b n d"], ...]  # of the requested blocks, in residual_dtype


class _Inputs(nn.Module):
    """Everything before the blocks: tokens, conditioning and projected text."""

    dit: "LinearDiT"

    @nn.compact
    def __call__(self, x, t, text, guidance, target):
        c, dtype = self.dit, self.dit.compute_dtype
        tokens = layers.Dense(c.width, dtype=dtype, kernel_init=layers.xavier, name="patch_embed")(
            patchify(x, c.patch_size).astype(dtype)
        )
        time = layers.ScalarEmbedding(c.width, dtype, name="time_embed")
        conditioning = time(t * c.time_scale)
        if c.guidance_embed:
            embed = layers.ScalarEmbedding(c.width, dtype, zero_last=True, name="guidance_embed")
            conditioning = conditioning + embed(guidance * c.guidance_scale_factor)
        if c.target_embed:
            embed = layers.ScalarEmbedding(c.width, dtype, zero_last=True, name="target_embed")
            conditioning = conditioning + embed(t - target)
        modulation = layers.Dense(
            6 * c.width, dtype=dtype, kernel_init=layers.small, name="time_proj"
        )(layers.silu(conditioning))
        text = layers.CaptionProjection(c.width, dtype, name="caption")(text)
        logvar = None
        if c.logvar_head:
            head = layers.Dense(
                1, dtype=jnp.float32, kernel_init=nn.initializers.zeros, name="logvar"
            )
            logvar = head(conditioning.astype(jnp.float32))[:, 0]
        return tokens, conditioning, modulation.reshape(-1, 6, c.width), text, logvar


class _Block(nn.Module):
    """One transformer block: linear attention, cross-attention, Mix-FFN (AdaLN-single)."""

    dit: "LinearDiT"

    @nn.compact
    def __call__(self, x, modulation, text, mask):  # x [B, H, W, D]
        c = self.dit
        batch, height, width, _ = x.shape
        table = self.param("scale_shift_table", _table_init, (6, c.width))
        rows = jnp.split(table.astype(x.dtype) + modulation, 6, axis=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = rows  # [B, 1, D] each
        x = x.reshape(batch, -1, c.width)
        z = layers.modulate(layer_norm(x), shift1, scale1)
        x = x + gate1 * layers.SelfAttention(
            c.heads, c.qk_norm, c.compute_dtype, c.attention, name="attn1"
        )(z)
        x = x + layers.CrossAttention(
            c.cross_heads, c.qk_norm, c.compute_dtype, c.attention, name="attn2"
        )(x, text, mask)
        z = layers.modulate(layer_norm(x), shift2, scale2)
        z = z.reshape(batch, height, width, c.width)
        z = layers.GLUMBConv(int(c.mlp_ratio * c.width), c.compute_dtype, c.depthwise, name="ff")(z)
        x = x + gate2 * z.reshape(batch, -1, c.width)
        return x.reshape(batch, height, width, c.width)


class _Outputs(nn.Module):
    """Final modulated projection. It takes the conditioning before its SiLU."""

    dit: "LinearDiT"

    @nn.compact
    def __call__(self, x, conditioning):
        c = self.dit
        batch, height, width, _ = x.shape
        table = self.param("scale_shift_table", _table_init, (2, c.width))
        shift, scale = jnp.split(table.astype(x.dtype) + conditioning[:, None], 2, axis=1)
        x = layers.modulate(layer_norm(x.reshape(batch, -1, c.width)), shift, scale)
        channels = c.patch_size**2 * c.in_channels
        x = layers.Dense(
            channels, dtype=c.compute_dtype, kernel_init=layers.xavier, name="proj_out"
        )(x)
        return unpatchify(x.reshape(batch, height, width, channels), c.patch_size)


def _table_init(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
    return jax.random.normal(key, shape, dtype) / jnp.sqrt(shape[-1])


def patchify(x: Float[Array, "b y x c"], size: int) -> Float[Array, "b h w e"]:
    """Return [B, H / size, W / size, size * size * C], the inverse of `unpatchify`."""
    return einops.rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=size, q=size)


def unpatchify(x: Float[Array, "b h w e"], size: int) -> Float[Array, "b y x c"]:
    """Return [B, size * H, size * W, C] of [B, H, W, size * size * C]."""
    return einops.rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=size, q=size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearDiT:
    """Description of a Linear-DiT."""

    in_channels: int  # channels of latents, also predicted
    width: int  # D
    depth: int  # number of blocks
    heads: int  # of self-attention; published ones are 32 wide
    cross_heads: int
    mlp_ratio: float  # hidden width of the Mix-FFN over D
    text_dim: int  # width of the text features
    patch_size: int  # 1 in the published models
    qk_norm: bool  # RMSNorm of queries and keys in both attentions; False is original SANA
    time_scale: float  # 1 for the dense embedding of t in [0, 1]; 1000 is original SANA (Eq. 10)
    guidance_embed: bool  # add the embedding of the guidance scale (student only)
    guidance_scale_factor: float  # multiplies the guidance scale before its sinusoid; 0.1 published
    logvar_head: bool  # add the linear head of the adaptive weight (student only)
    # What the backward pass recomputes: "none", "block" (each block, from its input) or "cheap"
    # (norms and activations; it saves results of products, attentions and convolutions by kernels).
    remat: str
    unroll: int  # blocks per scan step; depth removes the loop, which is faster on a CPU
    # Of the operands and results of products, "float32" or "bfloat16". Parameters are float32.
    dtype: str
    # Of the residual stream and the tables that modulate it: dtype, as in diffusers, or "float32",
    # as the autocast of the published trainer has it.
    residual_dtype: str
    attention: str  # one of `ops.backend.BACKENDS`; parameters are the same for all
    depthwise: str = "plain"  # for the Mix-FFN's convolution, one of `ops.backend.DEPTHWISE`
    # Add the embedding of the distance in flow time to a second time, to which the student jumps.
    # It ends in zeros, so a student starts as its teacher for all pairs of times.
    target_embed: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for sizes or names that do not fit."""
        for name in ("heads", "cross_heads"):
            if self.width % getattr(self, name):
                raise ValueError(
                    f"width {self.width} is not divisible by {name} {getattr(self, name)}"
                )
        if self.residual_dtype not in ("float32", self.dtype):
            raise ValueError(
                f"residual_dtype {self.residual_dtype!r}: use 'float32' or dtype {self.dtype!r}"
            )
        for name, choices in (
            ("dtype", ("float32", "bfloat16")),
            ("remat", REMAT),
            ("depthwise", backend.DEPTHWISE),
            ("attention", backend.BACKENDS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r}: use one of {', '.join(choices)}")

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The dtype of the operands and results of products."""
        return jnp.dtype(self.dtype)

    def init(self, key: PRNGKeyArray) -> Params:
        """Draw parameters {"inputs", "blocks" (leading axis depth), "outputs"}, float32."""
        k_in, k_blocks, k_out = jax.random.split(key, 3)
        side = self.patch_size
        x = jnp.zeros((1, side, side, self.in_channels))
        ones, text, mask = jnp.ones((1,)), jnp.zeros((1, 1, self.text_dim)), jnp.ones((1, 1))
        (tokens, cond, modulation, text, _), inputs = _Inputs(self).init_with_output(
            k_in, x, ones, text, ones, ones
        )
        # Parameters do not depend on the backend of attention.
        block = _Block(dataclasses.replace(self, attention="plain"))
        one_block = lambda k: block.init(k, tokens, modulation, text, mask)["params"]
        return {
            "inputs": inputs["params"],
            "blocks": jax.vmap(one_block)(jax.random.split(k_blocks, self.depth)),
            "outputs": _Outputs(self).init(k_out, tokens, cond)["params"],
        }

    def apply(
        self,
        params: Params,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        text: Float[Array, "b l e"],
        mask: Shaped[Array, "b l"],
        guidance: Float[Array, " b"] | None = None,
        *,
        features: Sequence[int] = (),
        target: Float[Array, " b"] | None = None,
        velocity: bool = True,
        residuals: Float[Array, "k b y x d"] | None = None,
    ) -> Output:
        """Run the network.

        Args:
          params: tree from `init`, or `unstack` of it.
          x: flow-matching state at unit scale.
          t: flow-matching time in [0, 1].
          text: text features.
          mask: non-zero where a text token counts.
          guidance: guidance scale; required if and only if the model embeds it.
          features: increasing block indices (0-based) whose outputs are returned.
          target: flow-matching time r <= t that the velocity is the average down to; required if
            and only if the model embeds it. Down to 0 it is that of a consistency model, at r = t
            the velocity itself.
          velocity: False skips the final layer and every block after the last of `features`.
          residuals: of a ControlNet (`models/controlnet.py`). Number j is added after block j + 1
            and none after block 0, as in diffusers' `SanaTransformer2DModel`.

        Raises:
          ValueError: if the arguments do not fit the model or each other.
        """
        if x.ndim != 4 or x.shape[-1] != self.in_channels:
            raise ValueError(f"x has shape {x.shape}; expected [B, H, W, {self.in_channels}]")
        if (guidance is not None) != self.guidance_embed:
            raise ValueError("guidance must be given exactly when the model has guidance_embed")
        if (target is not None) != self.target_embed:
            raise ValueError("target must be given exactly when the model has target_embed")
        last = self.depth if velocity else max(features, default=-1) + 1
        ends = self._segment_ends(features, last, residuals)
        h, cond, modulation, text, logvar = self.inputs(
            params["inputs"], x, t, text, guidance, target
        )
        text = self.project_text(params, text)
        collected, start = {}, 0
        for end in ends:
            added = None
            if residuals is not None and 1 <= start <= len(residuals):
                added = residuals[start - 1 : end - 1]
            h = self._run_blocks(
                params["blocks"], range(start, end), h, (modulation, text, mask), added
            )
            collected[end - 1] = h.reshape(h.shape[0], -1, self.width)
            start = end
        out = None
        if velocity:
            outputs = placement.gather_weights(params["outputs"], self.compute_dtype)
            out = layers.run(_Outputs(self), outputs, h, cond).astype(jnp.float32)
        return Output(velocity=out, logvar=logvar, features=tuple(collected[f] for f in features))

    def _segment_ends(
        self, features: Sequence[int], last: int, residuals: Array | None
    ) -> list[int]:
        """Return where segments of similar blocks end, in the order of blocks.

        Segments end where features are requested, and where residuals begin and end.
        """
        if list(features) != sorted(set(features)) or any(
            not 0 <= f < self.depth for f in features
        ):
            raise ValueError(f"features {features} must increase within 0..{self.depth - 1}")
        ends = {f + 1 for f in features} | {last}
        if residuals is not None:
            if len(residuals) >= self.depth:
                raise ValueError(
                    f"{len(residuals)} residuals for {self.depth} blocks: use at most "
                    f"{self.depth - 1}"
                )
            ends |= {1, 1 + len(residuals)}
        return sorted(end for end in ends if 0 < end <= last)

    def unstack(self, params: Params) -> Params:
        """Return the parameters with a list of blocks and one projection of the text.

        A scan copies each block's weights before its products, which costs about 5 % of the time
        on a CPU and 20 % on a GPU. Unrolling avoids that but compiles longer. Use it for
        inference: training steps and checkpoints take the stack only.
        """
        blocks, text = layers.fuse_text_projections(
            layers.unstack_layers(params["blocks"], self.depth)
        )
        return params | {"blocks": blocks, "text": text}

    def _run_blocks(
        self, blocks: Params, which: range, h: Array, conditions: tuple, residuals: Array | None
    ) -> Array:
        """Run the blocks `which` and add to each output its own of residuals [n, B, H, W, D].

        conditions: modulation, text and mask, as `block` takes them.
        """
        modulation, text, mask = conditions

        def body(h, block_and_residual, text=text):
            block, residual = block_and_residual
            h = self.block(block, h, modulation, text, mask)
            return (h if residual is None else h + residual), None

        if isinstance(blocks, list):
            for n, i in enumerate(which):
                h, _ = body(h, (blocks[i], None if residuals is None else residuals[n]), text[i])
            return h
        segment = jax.tree.map(lambda a: a[which.start : which.stop], blocks)
        h, _ = jax.lax.scan(
            self.with_remat(body), h, (segment, residuals), unroll=min(self.unroll, len(which))
        )
        return h

    def project_text(self, params: Params, text: Float[Array, "b l d"]) -> Any:
        """Return the text input of the blocks.

        It is the projected text, or a list of (keys, values) by block for unstacked parameters.
        """
        if "text" not in params:
            return text
        return layers.project_text(
            placement.gather_weights(params["text"], self.compute_dtype), text, self.compute_dtype
        )

    def block(
        self,
        params: Params,
        h: Float[Array, "b h w d"],
        modulation: Float[Array, "b 6 d"],
        text: Any,
        mask: Shaped[Array, "b l"],
    ) -> Float[Array, "b h w d"]:
        """Run one block. params: of one layer. text: of that layer, see `project_text`."""
        params = placement.gather_weights(params, self.compute_dtype)
        h = layers.run(_Block(self), params, h, modulation, text, mask)
        return placement.split_over_devices(h)

    def inputs(
        self,
        params: Params,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        text: Float[Array, "b l e"],
        guidance: Float[Array, " b"] | None,
        target: Float[Array, " b"] | None,
    ) -> tuple[
        Float[Array, "b y x d"],
        Float[Array, "b d"],
        Float[Array, "b 6 d"],
        Float[Array, "b l d"],
        Float[Array, " b"] | None,
    ]:
        """Compute everything before the blocks.

        Returns:
          Tokens in residual_dtype, conditioning, modulation, projected text, and logvar.
        """
        params = placement.gather_weights(params, self.compute_dtype)
        tokens, *arrays, logvar = layers.run(_Inputs(self), params, x, t, text, guidance, target)
        tokens, conditioning, modulation, text = (
            placement.split_over_devices(a) for a in (tokens.astype(self.residual_dtype), *arrays)
        )
        return tokens, conditioning, modulation, text, logvar

    def with_remat(self, body: Callable) -> Callable:
        """Wrap the body of a scan over blocks in the rematerialization policy of `remat`."""
        if self.remat == "none":
            return body
        policy = None
        if self.remat == "cheap":
            policy = jax.checkpoint_policies.save_only_these_names(autodiff.EXPENSIVE)
        return jax.checkpoint(body, prevent_cse=False, policy=policy)


# The published sizes (SANA-Sprint 0.6B and 1.6B); in_channels and text_dim are those of DC-AE and
# Gemma-2.
_PUBLISHED: dict[str, Any] = dict(
    in_channels=32,
    text_dim=2304,
    mlp_ratio=2.5,
    patch_size=1,
    qk_norm=True,
    time_scale=1.0,
    guidance_embed=True,
    guidance_scale_factor=0.1,
    logvar_head=True,
    remat="block",
    unroll=1,
    dtype="bfloat16",
    residual_dtype="float32",
    attention="plain",
)
SANA_600M = LinearDiT(width=1152, depth=28, heads=36, cross_heads=16, **_PUBLISHED)
SANA_1600M = LinearDiT(width=2240, depth=20, heads=70, cross_heads=20, **_PUBLISHED)

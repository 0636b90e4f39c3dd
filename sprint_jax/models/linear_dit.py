"""The Linear-DiT of SANA (0.6B, 1.6B and smaller) as pure functions of a parameter tree.

`LinearDiT` is a frozen description; `init(key)` makes parameters and `apply(params, ...)` is a function
of its arguments alone. The network predicts the flow-matching velocity (noise minus data) and knows
nothing of TrigFlow: `sprint_jax.diffusion.trigflow` wraps it. Blocks are stacked and scanned over depth,
in segments that end at the blocks whose features are asked for (LADD), and nothing after the last
wanted block is computed when the velocity is not.
"""

import dataclasses

import einops
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from sprint_jax.models import layers
from sprint_jax.ops import autodiff, backend, placement
from sprint_jax.ops.norms import layer_norm

REMAT = ("none", "block", "cheap")


@flax.struct.dataclass
class Output:
    """Result of `LinearDiT.apply`.

    velocity: [B, H, W, in_channels] float32, or None when only features were asked for.
    logvar: [B] float32, or None when the model has no log-variance head.
    features: tuple of [B, N, D] in residual_dtype, the outputs of the blocks asked for, in that order.
    """

    velocity: jax.Array | None
    logvar: jax.Array | None
    features: tuple


class _Inputs(nn.Module):
    """Everything before the blocks: tokens, conditioning and projected text."""

    dit: "LinearDiT"

    @nn.compact
    def __call__(self, x, t, text, guidance):
        c, dtype = self.dit, self.dit.compute_dtype
        tokens = layers.Dense(c.width, dtype=dtype, kernel_init=layers.xavier, name="patch_embed")(
            patchify(x, c.patch_size).astype(dtype)
        )
        time = layers.ScalarEmbedding(c.width, dtype, name="time_embed")
        conditioning = time(t * c.time_scale)
        if c.guidance_embed:
            embed = layers.ScalarEmbedding(c.width, dtype, zero_last=True, name="guidance_embed")
            conditioning = conditioning + embed(guidance * c.guidance_scale_factor)
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
    """Final modulated projection. Uses the conditioning itself, before its SiLU."""

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


def _table_init(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype) / jnp.sqrt(shape[-1])


def patchify(x, size):
    """[B, H, W, C] -> [B, H/size, W/size, size*size*C]; the inverse of `unpatchify`."""
    return einops.rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=size, q=size)


def unpatchify(x, size):
    """[B, H, W, size*size*C] -> [B, size*H, size*W, C]."""
    return einops.rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=size, q=size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearDiT:
    """Description of a Linear-DiT.

    in_channels: latent channels (also predicted).
    width, depth: D and the number of blocks.
    heads, cross_heads: heads of self- and cross-attention; published self heads are 32 wide.
    mlp_ratio: hidden width of the Mix-FFN over D.
    text_dim: width of the text features.
    patch_size: 1 in the published models.
    qk_norm: RMSNorm of queries and keys in both attentions (off: original SANA, paper Fig. 3a).
    time_scale: 1 feeds t in [0, 1] to the sinusoid (dense embedding), 1000 is original SANA (Eq. 10).
    guidance_embed: adds the embedding of the guidance scale (student only).
    guidance_scale_factor: multiplies the guidance scale before its sinusoid (0.1 published).
    logvar_head: adds the linear head of the adaptive weight (student only).
    remat: what the backward pass recomputes: "none", "block" (each block, from its input) or "cheap"
      (norms and activations; results of products, attentions and, by kernels, of the gated convolution are kept).
    unroll: blocks per scan step; depth removes the loop, which XLA's CPU backend likes.
    dtype: of the operands and results of products, "float32" or "bfloat16"; parameters are always float32.
    residual_dtype: of the residual stream and of the tables that modulate it: dtype, as in diffusers, or "float32", as the published
      trainer's autocast has it around products in bfloat16.
    attention: what computes both attentions, one of `kernels.backend.BACKENDS`; parameters are the same for all.
    depthwise: what computes the Mix-FFN's convolution: "plain", or a backend of `ops/pallas/depthwise.py`.
    """

    in_channels: int
    width: int
    depth: int
    heads: int
    cross_heads: int
    mlp_ratio: float
    text_dim: int
    patch_size: int
    qk_norm: bool
    time_scale: float
    guidance_embed: bool
    guidance_scale_factor: float
    logvar_head: bool
    remat: str
    unroll: int
    dtype: str
    residual_dtype: str
    attention: str
    depthwise: str = "plain"

    def __post_init__(self):
        for name in ("heads", "cross_heads"):
            if self.width % getattr(self, name):
                raise ValueError(
                    f"width {self.width} is not divisible by {name} {getattr(self, name)}"
                )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r}: use 'float32' or 'bfloat16'")
        if self.residual_dtype not in ("float32", self.dtype):
            raise ValueError(
                f"residual_dtype {self.residual_dtype!r}: use 'float32', or dtype, which is {self.dtype!r}"
            )
        if self.remat not in REMAT:
            raise ValueError(f"remat {self.remat!r}: use one of {', '.join(REMAT)}")
        if self.depthwise not in backend.DEPTHWISE:
            raise ValueError(
                f"depthwise {self.depthwise!r}: use one of {', '.join(backend.DEPTHWISE)}"
            )
        if self.attention not in backend.BACKENDS:
            raise ValueError(
                f"attention {self.attention!r}: use one of {', '.join(backend.BACKENDS)}"
            )

    @property
    def compute_dtype(self):
        return jnp.dtype(self.dtype)

    def init(self, key):
        """Random parameters: {"inputs", "blocks" (leading axis depth), "outputs"}, float32."""
        k_in, k_blocks, k_out = jax.random.split(key, 3)
        side = self.patch_size
        x = jnp.zeros((1, side, side, self.in_channels))
        ones, text, mask = jnp.ones((1,)), jnp.zeros((1, 1, self.text_dim)), jnp.ones((1, 1))
        (tokens, cond, modulation, text, _), inputs = _Inputs(self).init_with_output(
            k_in, x, ones, text, ones
        )
        block = _Block(
            dataclasses.replace(self, attention="plain")
        )  # parameters do not depend on it
        one_block = lambda k: block.init(k, tokens, modulation, text, mask)["params"]
        return {
            "inputs": inputs["params"],
            "blocks": jax.vmap(one_block)(jax.random.split(k_blocks, self.depth)),
            "outputs": _Outputs(self).init(k_out, tokens, cond)["params"],
        }

    def apply(
        self, params, x, t, text, mask, guidance=None, *, features=(), velocity=True, residuals=None
    ) -> Output:
        """Runs the network.

        Args:
          params: tree from `init`, or `unstack` of it.
          x: [B, H, W, in_channels] flow-matching state at unit scale.
          t: [B] flow-matching time in [0, 1].
          text: [B, L, text_dim] text features.
          mask: [B, L], non-zero where a text token counts.
          guidance: [B] guidance scale; required if and only if the model embeds it.
          features: increasing block indices (0-based) whose outputs are returned.
          velocity: False skips the final layer and every block after the last of `features`.
          residuals: [K, B, H, W, D] of a ControlNet (`models/controlnet.py`): number j is added after block j + 1,
            none after block 0, as in diffusers' `SanaTransformer2DModel`.
        """
        if x.ndim != 4 or x.shape[-1] != self.in_channels:
            raise ValueError(f"x has shape {x.shape}; expected [B, H, W, {self.in_channels}]")
        if (guidance is not None) != self.guidance_embed:
            raise ValueError("guidance must be given exactly when the model has guidance_embed")
        if list(features) != sorted(set(features)) or any(
            not 0 <= f < self.depth for f in features
        ):
            raise ValueError(f"features {features} must increase within 0..{self.depth - 1}")
        h, cond, modulation, text, logvar = self.inputs(params["inputs"], x, t, text, guidance)
        text = self.text(params, text)
        last = self.depth if velocity else max(features, default=-1) + 1
        # Segments of alike blocks: they end where features are asked for, and where residuals begin and end.
        steered = range(0) if residuals is None else range(1, 1 + len(residuals))
        if steered.stop > self.depth:
            raise ValueError(
                f"{len(residuals)} residuals for {self.depth} blocks: use at most {self.depth - 1}"
            )
        ends = {f + 1 for f in features} | {steered.start, steered.stop, last}
        collected, start = {}, 0
        for end in sorted(e for e in ends if 0 < e <= last):
            part = residuals[start - 1 : end - 1] if start in steered else None
            h = self._run_blocks(params["blocks"], start, end, h, modulation, text, mask, part)
            collected[end - 1] = h.reshape(h.shape[0], -1, self.width)
            start = end
        out = None
        if velocity:
            outputs = placement.gather_weights(params["outputs"], self.compute_dtype)
            out = _Outputs(self).apply({"params": outputs}, h, cond).astype(jnp.float32)
        return Output(velocity=out, logvar=logvar, features=tuple(collected[f] for f in features))

    def unstack(self, params):
        """The same parameters with a list of blocks instead of a stack, for running without a loop, and one projection of the text.

        A loop copies each block's slice of the stack before its products, a twentieth of a CPU's time and a fifth of a
        GPU's; compilation takes longer in return. For inference: steps and checkpoints know the stack alone.
        """
        blocks, text = layers.fuse_text_projections(
            layers.unstack_layers(params["blocks"], self.depth)
        )
        return params | {"blocks": blocks, "text": text}

    def _run_blocks(self, blocks, start, end, h, modulation, text, mask, residuals=None):
        """Blocks start .. end - 1, after each of which its own of residuals [end - start, B, H, W, D] is added."""

        def body(h, block_and_residual, text=text):
            block, residual = block_and_residual
            h = self.block(block, h, modulation, text, mask)
            return (h if residual is None else h + residual), None

        if isinstance(blocks, list):
            for i in range(start, end):
                h, _ = body(
                    h, (blocks[i], None if residuals is None else residuals[i - start]), text[i]
                )
            return h
        segment = jax.tree.map(lambda a: a[start:end], blocks)
        h, _ = jax.lax.scan(
            self.with_remat(body), h, (segment, residuals), unroll=min(self.unroll, end - start)
        )
        return h

    def text(self, params, text):
        """What each block has of the projected text [B, L, D]: that itself, or of `unstack`ed parameters a list of keys and values."""
        if "text" not in params:
            return text
        return layers.project_text(
            placement.gather_weights(params["text"], self.compute_dtype), text, self.compute_dtype
        )

    def block(self, params, h, modulation, text, mask):
        """One block on h [B, H, W, D]. params: of one layer, not of the stack. text: of that layer, see `text`."""
        params = placement.gather_weights(params, self.compute_dtype)
        return placement.split_over_devices(
            _Block(self).apply({"params": params}, h, modulation, text, mask)
        )

    def inputs(self, params, x, t, text, guidance):
        """(tokens [B, H, W, D] in residual_dtype, conditioning, modulation, text, logvar): everything before the blocks."""
        params = placement.gather_weights(params, self.compute_dtype)
        tokens, *arrays, logvar = _Inputs(self).apply({"params": params}, x, t, text, guidance)
        arrays = (tokens.astype(self.residual_dtype), *arrays)
        return (*(placement.split_over_devices(a) for a in arrays), logvar)

    def with_remat(self, body):
        """The body of a scan over blocks, under the policy of `remat`."""
        if self.remat == "none":
            return body
        policy = (
            None
            if self.remat == "block"
            else jax.checkpoint_policies.save_only_these_names(autodiff.EXPENSIVE)
        )
        return jax.checkpoint(body, prevent_cse=False, policy=policy)


# The published sizes (SANA-Sprint 0.6B and 1.6B); in_channels and text_dim are DC-AE's and Gemma-2's.
_PUBLISHED = dict(
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

"""ControlNet on the Linear-DiT: copies of its first blocks read a condition and add to its hidden states.

`ControlNet` is diffusers' `SanaControlNetModel`, with QK-norm where the trunk has it: tokens of the state plus a
zero-initialised projection of the condition's tokens (one patch embedding for both) pass through the copies, and a
zero-initialised projection of what each gives is added to the trunk behind its block 1, 2, ... (never block 0). At the start all
residuals are zero and the trunk draws as it did.

`Controlled` is trunk and ControlNet as one network with the interface of `LinearDiT`, so steps and samplers serve both.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sprint_jax.models import layers
from sprint_jax.models.linear_dit import LinearDiT, Output, patchify
from sprint_jax.ops import placement


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNet:
    """Description.

    net: the network whose first blocks are copied, without guidance embedding and log-variance head: the published
      ControlNet is told neither. depth: number of copies, 7 in the published ones.
    """

    net: LinearDiT
    depth: int

    def __post_init__(self):
        if not 1 <= self.depth < self.net.depth:
            raise ValueError(
                f"depth {self.depth} of the ControlNet: use 1 to {self.net.depth - 1}, below the trunk's depth"
            )
        if self.net.guidance_embed or self.net.logvar_head:
            raise ValueError("a ControlNet copies a network without guidance_embed and logvar_head")

    def init(self, key):
        """Random parameters {"inputs", "blocks" (leading axis depth), "zero_in", "zero_out" (leading axis depth)}."""
        return self.start(self.net.init(key))

    def start(self, trunk):
        """Parameters that copy those of a trunk, of a teacher or a student, and change nothing yet."""
        D, copy = self.net.width, lambda tree: jax.tree.map(jnp.copy, tree)
        kept = ("patch_embed", "time_embed", "time_proj", "caption")
        zeros = lambda *lead: {"kernel": jnp.zeros((*lead, D, D)), "bias": jnp.zeros((*lead, D))}
        return {
            "inputs": copy({name: trunk["inputs"][name] for name in kept}),
            "blocks": copy(jax.tree.map(lambda a: a[: self.depth], trunk["blocks"])),
            "zero_in": zeros(),
            "zero_out": zeros(self.depth),
        }

    def apply(self, params, x, t, text, mask, control, scale):
        """Residuals [depth, B, H, W, D] for `LinearDiT.apply`.

        x, t, text, mask: as there. control: [B, H, W, in_channels] latents of the condition at unit scale, scale: [B],
        what residuals are multiplied by.
        """
        net, dtype = self.net, self.net.compute_dtype
        if control.shape != x.shape:
            raise ValueError(
                f"control has shape {control.shape} and x {x.shape}: they must be equal"
            )
        h, _, modulation, text, _ = net.inputs(params["inputs"], x, t, text, None)
        embed = placement.gather_weights(params["inputs"]["patch_embed"], dtype)
        hint = _dense(embed, patchify(control, net.patch_size), dtype)
        h = h + _dense(
            placement.gather_weights(params["zero_in"], dtype),
            placement.split_over_devices(hint),
            dtype,
        )
        scale = scale[:, None, None, None].astype(h.dtype)

        text = net.text(params, text)

        def body(h, block_and_zero, text=text):
            block, zero = block_and_zero
            h = net.block(block, h, modulation, text, mask)
            return h, scale * _dense(placement.gather_weights(zero, dtype), h, dtype)

        stack = (params["blocks"], params["zero_out"])
        if isinstance(params["blocks"], list):
            found = []
            for *each, its_text in zip(*stack, text, strict=True):
                h, residual = body(h, each, its_text)
                found.append(residual)
            return jnp.stack(found)
        _, residuals = jax.lax.scan(
            net.with_remat(body), h, stack, unroll=min(net.unroll, self.depth)
        )
        return residuals

    def unstack(self, params):
        """As `LinearDiT.unstack`."""
        blocks, zero_out = (
            layers.unstack_layers(params[name], self.depth) for name in ("blocks", "zero_out")
        )
        blocks, text = layers.fuse_text_projections(blocks)
        return params | {"blocks": blocks, "text": text, "zero_out": zero_out}


def _dense(params, x, dtype):
    return layers.Dense(params["kernel"].shape[-1], dtype=dtype).apply({"params": params}, x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controlled:
    """A trunk steered by a ControlNet, with the interface of `LinearDiT`.

    Parameters: {"trunk", "control"}. Without a condition it is the trunk alone.
    """

    trunk: LinearDiT
    control: ControlNet

    @property
    def guidance_embed(self) -> bool:
        return self.trunk.guidance_embed

    @property
    def depth(self) -> int:
        return self.trunk.depth

    def init(self, key):
        k_trunk, k_control = jax.random.split(key)
        return {"trunk": self.trunk.init(k_trunk), "control": self.control.init(k_control)}

    def apply(
        self,
        params,
        x,
        t,
        text,
        mask,
        guidance=None,
        *,
        control=None,
        control_scale=None,
        features=(),
        velocity=True,
    ) -> Output:
        """As `LinearDiT.apply`. control: latents of the condition [B, H, W, C], or None. control_scale: [B], with control."""
        residuals = None
        if control is not None:
            residuals = self.control.apply(
                params["control"], x, t, text, mask, control, control_scale
            )
        return self.trunk.apply(
            params["trunk"],
            x,
            t,
            text,
            mask,
            guidance,
            features=features,
            velocity=velocity,
            residuals=residuals,
        )

    def unstack(self, params):
        """As `LinearDiT.unstack`, of both."""
        return {
            "trunk": self.trunk.unstack(params["trunk"]),
            "control": self.control.unstack(params["control"]),
        }

"""ControlNet on the Linear-DiT: copies of its first blocks read a condition and steer the trunk.

`ControlNet` is diffusers' `SanaControlNetModel`, with QK-norm if the trunk has it. Tokens of the
state plus a zero-initialized projection of the condition's tokens (one patch embedding for both)
pass through the copies. A zero-initialized projection of each copy's output is added to the trunk
after its block 1, 2, ... (never block 0). Initially all residuals are zero, so the trunk generates
the same images as without them.

`Controlled` is trunk and ControlNet as one network with the interface of `LinearDiT`, so steps and
samplers serve both.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from sprint_jax.models import layers
from sprint_jax.models.layers import Params
from sprint_jax.models.linear_dit import LinearDiT, Output, patchify
from sprint_jax.ops import placement


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNet:
    """Description of a ControlNet."""

    # The network whose first blocks are copied. It has no embedding of guidance or of a second time
    # and no log-variance head, since the published ControlNet is not conditioned on either.
    net: LinearDiT
    depth: int  # number of copies, 7 in the published ones

    def __post_init__(self) -> None:
        """Raise ValueError if the depth or the network cannot be copied."""
        if not 1 <= self.depth < self.net.depth:
            raise ValueError(
                f"depth {self.depth} of the ControlNet: use 1 to {self.net.depth - 1}, below the "
                "trunk's depth"
            )
        if self.net.guidance_embed or self.net.target_embed or self.net.logvar_head:
            raise ValueError(
                "a ControlNet copies a network without guidance_embed, target_embed and logvar_head"
            )

    def init(self, key: PRNGKeyArray) -> Params:
        """Draw parameters {"inputs", "blocks", "zero_in", "zero_out"}.

        "blocks" and "zero_out" have a leading axis depth.
        """
        return self.init_from(self.net.init(key))

    def init_from(self, trunk: Params) -> Params:
        """Return parameters that copy those of a trunk, teacher or student, without effect yet."""
        width, copy = self.net.width, lambda tree: jax.tree.map(jnp.copy, tree)
        copied = ("patch_embed", "time_embed", "time_proj", "caption")
        zeros = lambda *lead: {
            "kernel": jnp.zeros((*lead, width, width)),
            "bias": jnp.zeros((*lead, width)),
        }
        return {
            "inputs": copy({name: trunk["inputs"][name] for name in copied}),
            "blocks": copy(jax.tree.map(lambda a: a[: self.depth], trunk["blocks"])),
            "zero_in": zeros(),
            "zero_out": zeros(self.depth),
        }

    def apply(
        self,
        params: Params,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        text: Float[Array, "b l e"],
        mask: Shaped[Array, "b l"],
        *,
        control: Float[Array, "_ _ _ _"],
        scale: Float[Array, " b"],
    ) -> Float[Array, "k b y x d"]:
        """Return the residuals of `LinearDiT.apply`, one for each copy.

        Args:
          params: tree from `init`, or `unstack` of it.
          x, t, text, mask: as in `LinearDiT.apply`.
          control: latents of the condition at unit scale, of x's shape.
          scale: factor of the residuals of each sample.

        Raises:
          ValueError: if control and x have different shapes.
        """
        net, dtype = self.net, self.net.compute_dtype
        if control.shape != x.shape:
            raise ValueError(
                f"control has shape {control.shape} and x {x.shape}: they must be equal"
            )
        h, _, modulation, text, _ = net.inputs(params["inputs"], x, t, text, None, None)
        embed = placement.gather_weights(params["inputs"]["patch_embed"], dtype)
        hint = _dense(embed, patchify(control, net.patch_size), dtype)
        zero_in = placement.gather_weights(params["zero_in"], dtype)
        h = h + _dense(zero_in, placement.split_over_devices(hint), dtype)
        scale = scale[:, None, None, None].astype(h.dtype)
        text = net.project_text(params, text)

        def body(h, block_and_zero, text=text):
            block, zero = block_and_zero
            h = net.block(block, h, modulation, text, mask)
            return h, scale * _dense(placement.gather_weights(zero, dtype), h, dtype)

        stack = (params["blocks"], params["zero_out"])
        if isinstance(params["blocks"], list):
            found = []
            for block, zero, own_text in zip(*stack, text, strict=True):
                h, residual = body(h, (block, zero), own_text)
                found.append(residual)
            return jnp.stack(found)
        _, residuals = jax.lax.scan(
            net.with_remat(body), h, stack, unroll=min(net.unroll, self.depth)
        )
        return residuals

    def unstack(self, params: Params) -> Params:
        """Return the parameters unstacked, as `LinearDiT.unstack` does."""
        blocks, zero_out = (
            layers.unstack_layers(params[name], self.depth) for name in ("blocks", "zero_out")
        )
        blocks, text = layers.fuse_text_projections(blocks)
        return params | {"blocks": blocks, "text": text, "zero_out": zero_out}


def _dense(params: Params, x: Array, dtype: jnp.dtype) -> Array:
    return layers.run(layers.Dense(params["kernel"].shape[-1], dtype=dtype), params, x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controlled:
    """A trunk with a ControlNet, with the interface of `LinearDiT`.

    Parameters are {"trunk", "control"}. Without a condition it is the trunk alone.
    """

    trunk: LinearDiT
    control: ControlNet

    @property
    def guidance_embed(self) -> bool:
        """Whether the trunk embeds the guidance scale."""
        return self.trunk.guidance_embed

    @property
    def target_embed(self) -> bool:
        """Whether the trunk embeds a second time."""
        return self.trunk.target_embed

    @property
    def depth(self) -> int:
        """The number of blocks of the trunk."""
        return self.trunk.depth

    def init(self, key: PRNGKeyArray) -> Params:
        """Draw parameters {"trunk", "control"}."""
        k_trunk, k_control = jax.random.split(key)
        return {"trunk": self.trunk.init(k_trunk), "control": self.control.init(k_control)}

    def apply(
        self,
        params: Params,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        text: Float[Array, "b l e"],
        mask: Shaped[Array, "b l"],
        guidance: Float[Array, " b"] | None = None,
        *,
        control: Float[Array, "_ _ _ _"] | None = None,
        control_scale: Float[Array, " b"] | None = None,
        features: tuple[int, ...] = (),
        target: Float[Array, " b"] | None = None,
        velocity: bool = True,
    ) -> Output:
        """Run the trunk, with residuals of the ControlNet if a condition is given.

        Args:
          params: tree from `init`, or `unstack` of it.
          x, t, text, mask, guidance, features, target, velocity: as in `LinearDiT.apply`.
          control, control_scale: as in `ControlNet.apply`, both or neither.
        """
        residuals = None
        if control is not None:
            if control_scale is None:
                raise ValueError("control needs control_scale")
            residuals = self.control.apply(
                params["control"], x, t, text, mask, control=control, scale=control_scale
            )
        return self.trunk.apply(
            params["trunk"],
            x,
            t,
            text,
            mask,
            guidance,
            features=features,
            target=target,
            velocity=velocity,
            residuals=residuals,
        )

    def unstack(self, params: Params) -> Params:
        """Return the parameters of both networks unstacked, as `LinearDiT.unstack` does."""
        return {
            "trunk": self.trunk.unstack(params["trunk"]),
            "control": self.control.unstack(params["control"]),
        }

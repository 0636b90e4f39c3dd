"""A Linear-DiT for tests: they give its sizes and what they are about."""

from typing import Any

from sprint_jax.models.linear_dit import LinearDiT


def linear_dit(**fields: Any) -> LinearDiT:
    """Return a float32 Linear-DiT without guidance, remat and kernels, but for these fields."""
    plain: dict[str, Any] = dict(
        patch_size=1,
        qk_norm=True,
        time_scale=1.0,
        guidance_embed=False,
        guidance_scale_factor=0.1,
        logvar_head=False,
        remat="none",
        unroll=1,
        dtype="float32",
        residual_dtype="float32",
        attention="plain",
    )
    return LinearDiT(**plain | fields)

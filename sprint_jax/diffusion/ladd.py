"""Latent adversarial distillation, LADD (paper Eq. 11, 12; section 3.3).

Symbols: x0 real data and x0_hat the student's prediction, both at scale sigma_d [B, ...]; s the
renoising angle [B]; D a callable (u, s) -> logits, one array [B, N] per head. D holds the frozen
teacher, the text and the heads.

Where paper and published code differ, the default is the code:
  reduction="code"   mean over all logits of all heads, and the discriminator's sum halved
  reduction="paper"  sum over heads of each head's mean, not halved
Only the code has misaligned text pairs (real images with the text of another, counted as fake).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sprint_jax.diffusion import trigflow
from sprint_jax.diffusion.types import PerSample, Samples

REDUCTIONS = ("code", "paper")

Logits = Sequence[Float[Array, "b _"]]  # one array for each head


def renoise(x0: Samples, z: Samples, s: PerSample) -> Samples:
    """Return x_s / sigma_d of x_s = cos(s) x0 + sin(s) z, at unit scale for the teacher."""
    return trigflow.interpolate(x0, z, s) / trigflow.SIGMA_D


def _over_heads(logits: Logits, function: Callable[[Array], Array], reduction: str) -> PerSample:
    """Reduce a function of the logits: mean over everything (code) or sum over heads (paper)."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r}: use one of {REDUCTIONS}")
    heads = jnp.stack([function(one).mean(-1) for one in logits])
    return heads.mean(0) if reduction == "code" else heads.sum(0)


def generator_loss(logits: Logits, *, reduction: str) -> PerSample:
    """Return -D(x_s_hat) of each sample, Eq. (11).

    Raises:
      ValueError: for an unknown reduction.
    """
    return _over_heads(logits, jnp.negative, reduction)


def discriminator_loss(
    real: Logits, fake: Sequence[Float[Array, "m _"]], *, reduction: str
) -> Float[Array, ""]:
    """Return the hinge loss, averaged over real and over fake samples separately, Eq. (12).

    Real and fake batches may differ in size, so there is no per-sample form.

    Args:
      real: logits of B samples.
      fake: logits of M samples; M = 2B with misaligned pairs appended.
      reduction: "code" or "paper".

    Raises:
      ValueError: for an unknown reduction.
    """
    on_real = _over_heads(real, lambda d: jax.nn.relu(1 - d), reduction).mean()
    on_fake = _over_heads(fake, lambda d: jax.nn.relu(1 + d), reduction).mean()
    return (on_real + on_fake) * (0.5 if reduction == "code" else 1.0)


def misaligned(x0: Samples) -> Samples:
    """Pair real images with the text of the next image: roll x0 by one along the batch."""
    return jnp.roll(x0, 1, axis=0)

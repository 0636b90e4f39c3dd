"""Latent adversarial distillation, LADD (paper Eq. 11, 12; section 3.3).

Symbols: x0 real data and x0_hat the student's prediction, both at scale sigma_d [B, ...]; s the
renoising angle [B]; D a callable (u, s) -> logits, one array [B, N] per head. D holds the frozen
teacher, the text and the heads.

Where paper and published code differ, the default is the code:
  reduction="code"   mean over all logits of all heads, and the discriminator's sum halved
  reduction="paper"  sum over heads of each head's mean, not halved
Only the code has misaligned text pairs (real images with the text of another, counted as fake).

Heads are trained by the hinge loss, as published. Heads trained by the logistic loss ("softplus")
approach ln(p_data / p_student), which `diffusion.dmd` can read as weights.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sprint_jax.diffusion import trigflow
from sprint_jax.diffusion.types import PerSample, Samples

REDUCTIONS = ("code", "paper")
LOSSES = ("hinge", "softplus")

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


def generator_loss(logits: Logits, *, reduction: str, loss: str = "hinge") -> PerSample:
    """Return -D(x_s_hat) of each sample, Eq. (11); with the logistic loss softplus(-D).

    Raises:
      ValueError: for an unknown reduction or loss.
    """
    _check(loss)
    return _over_heads(logits, jnp.negative if loss == "hinge" else _miss, reduction)


def _check(loss):
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r}: use one of {LOSSES}")


def _miss(d):
    return jax.nn.softplus(-d)


def discriminator_loss(
    real: Logits, fake: Sequence[Float[Array, "m _"]], *, reduction: str, loss: str = "hinge"
) -> Float[Array, ""]:
    """Return the loss of the heads, averaged over real and over fake samples separately, Eq. (12).

    Real and fake batches may differ in size, so there is no per-sample form.

    Args:
      real: logits of B samples.
      fake: logits of M samples; M = 2B with misaligned pairs appended.
      reduction: "code" or "paper".
      loss: "hinge" or "softplus".

    Raises:
      ValueError: for an unknown reduction or loss.
    """
    _check(loss)
    short = (lambda d: jax.nn.relu(1 - d)) if loss == "hinge" else _miss
    on_real = _over_heads(real, short, reduction).mean()
    on_fake = _over_heads(fake, lambda d: short(-d), reduction).mean()
    return (on_real + on_fake) * (0.5 if reduction == "code" else 1.0)


def misaligned(x0: Samples) -> Samples:
    """Pair real images with the text of the next image: roll x0 by one along the batch."""
    return jnp.roll(x0, 1, axis=0)

"""Latent adversarial distillation, LADD (paper Eq. 11, 12; section 3.3).

Symbols: x0 real data, x0_hat the student's prediction, both at scale sigma_d [B, ...]; s the renoising
angle [B]; D a callable (u, s) -> logits, one array [B, N] per head, which holds the frozen teacher, the
text and the heads.

Where paper and published code differ, the default is the code:
  reduction="code"   mean over all logits of all heads, and the discriminator's sum halved
  reduction="paper"  sum over heads of each head's mean, not halved
Misaligned text pairs (real pictures with another picture's text, counted as fake) are the code's alone.
"""

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import trigflow

REDUCTIONS = ("code", "paper")


def renoise(x0, z, s):
    """x_s = cos(s) x0 + sin(s) z, returned at unit scale for the teacher: x_s / sigma_d."""
    return trigflow.interpolate(x0, z, s) / trigflow.SIGMA_D


def _over_heads(logits, function, reduction):
    """[B] from per-head logits [B, N]: mean over everything (code) or sum over heads (paper)."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r}: use one of {REDUCTIONS}")
    heads = jnp.stack([function(one).mean(-1) for one in logits])
    return heads.mean(0) if reduction == "code" else heads.sum(0)


def generator_loss(logits, *, reduction):
    """Eq. (11): -D(x_s_hat) of each sample. logits: sequence of [B, N]. Returns [B]."""
    return _over_heads(logits, jnp.negative, reduction)


def discriminator_loss(real, fake, *, reduction):
    """Eq. (12): hinge loss, averaged over real samples and over fake samples apart.

    Args:
      real: sequence of [B, N]. fake: sequence of [M, N]; M = 2B with misaligned pairs appended.
    Returns:
      scalar (real and fake batches may differ in size, so there is no per-sample form).
    """
    on_real = _over_heads(real, lambda d: jax.nn.relu(1 - d), reduction).mean()
    on_fake = _over_heads(fake, lambda d: jax.nn.relu(1 + d), reduction).mean()
    return (on_real + on_fake) * (0.5 if reduction == "code" else 1.0)


def misaligned(x0):
    """Real pictures against the next picture's text: x0 rolled by one along the batch."""
    return jnp.roll(x0, 1, axis=0)

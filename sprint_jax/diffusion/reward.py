"""Rewards: a proxy that has a gradient, and policies of a few-step student that need none.

Proxy (the idea of RG-LCD, Li et al. 2024): heads learn a judge's verdicts of the student's own
images, and the student raises their logit. It works in one step.

Policy: between two steps the sampler renoises, a = cos(t) x0_hat + sin(t) sigma_d n, which is a
Gaussian whose probability has a gradient in x0_hat:

    ln pi(a) = -|a - cos(t) x0_hat|^2 / (2 sin^2(t) sigma_d^2),  d/dx0_hat = cos n / (sin sigma_d)

RLCM (Oertell et al. 2024) raises it where the image that follows is better than others of its
prompt; PSO (Miao et al. 2024) where an image is better than one other, against a frozen student.
Neither sees the last step, which is deterministic, so a student of one step gets no gradient. The
published codes average ln pi over the D elements, which divides the gradient by D and makes a clip
of the ratio mean another thing at every D; here it is the sum.

Symbols: A advantage, R reward [B]; groups of G samples of one prompt lie side by side.
"""

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import trigflow
from sprint_jax.diffusion.flow import expand
from sprint_jax.diffusion.types import PerSample, Samples, Scalar

SIGMA_D = trigflow.SIGMA_D


def log_prob(a: Samples, x0_hat: Samples, t: PerSample) -> PerSample:
    """Return ln pi(a) of each sample up to a constant, a sum over elements. a gets no gradient."""
    t = expand(t, a)
    e = (jax.lax.stop_gradient(a) - jnp.cos(t) * x0_hat) / (jnp.sin(t) * SIGMA_D)
    return -0.5 * jnp.square(e).reshape(e.shape[0], -1).sum(-1)


def advantage(R: PerSample, group: int) -> PerSample:
    """Return R minus the mean of the others of its group, stopped.

    Leaving a sample itself out keeps the gradient unbiased; with it the gradient is (G - 1) / G of
    the true one.
    """
    R = jax.lax.stop_gradient(R).reshape(-1, group)
    others = (R.sum(1, keepdims=True) - R) / (group - 1)
    return (R - others).reshape(-1)


def policy_loss(lp: PerSample, old: PerSample, A: PerSample, clip: Scalar) -> PerSample:
    """Return PPO's -min(A q, A clip(q, 1 - clip, 1 + clip)) with q = exp(lp - old).

    At q = 1 its gradient is the policy gradient -A d ln pi.
    """
    q = jnp.exp(lp - old)
    return -jnp.minimum(A * q, A * jnp.clip(q, 1 - clip, 1 + clip))


def pair_loss(
    winner: PerSample, loser: PerSample, *, beta: Scalar, different: PerSample
) -> PerSample:
    """Return -ln sigmoid(beta (winner - loser)) where the two differ, and 0 for ties.

    winner, loser: ln pi minus that of the reference, of the better and the worse of two images.
    """
    return different * -jax.nn.log_sigmoid(beta * (winner - loser))


def verdict_loss(logit: PerSample, verdict: PerSample) -> PerSample:
    """Return the cross entropy of a proxy's logit with a verdict in [0, 1]."""
    verdict = jax.lax.stop_gradient(verdict)
    return -(verdict * jax.nn.log_sigmoid(logit) + (1 - verdict) * jax.nn.log_sigmoid(-logit))


def wish(logit: PerSample) -> PerSample:
    """Return -ln sigmoid(logit), which the student lowers. It asks little where the proxy is sure
    of a good image already.
    """
    return -jax.nn.log_sigmoid(logit)

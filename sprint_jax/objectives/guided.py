"""Settings and draws that every distillation of a guided teacher shares."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sprint_jax.diffusion import trigflow
from sprint_jax.objectives import views
from sprint_jax.objectives.base import (
    Aux,
    Batch,
    Draws,
    Frozen,
    Networks,
    Objective,
    PyTree,
    Start,
    State,
    Update,
)
from sprint_jax.objectives.conditions import conditions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guided:
    """Settings of a distillation from a guided teacher."""

    guidance: tuple[float, ...]
    """Scales drawn per sample, for the teacher; the student is conditioned on the scale."""
    uncond_mask: Literal["cond", "null"]
    """Mask of the null features: the prompt's own (code) or the null prompt's (diffusers)."""
    control_dropout: float
    """Share of samples without a ControlNet's condition, so that one student draws with it and
    without.
    """
    logvar_start: float
    """Log-variance of the student before training (code: 0).

    The error of a normalized tangent is below 1 / D for latents of D numbers, so -log D is about
    where it ends.
    """

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        if not self.guidance:
            yield "guidance", "give at least one scale"
        if not all(math.isfinite(scale) for scale in self.guidance):
            yield "guidance", "use finite scales"
        if not 0 <= self.control_dropout < 1:
            yield "control_dropout", "use a share from 0 to below 1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed(Guided):
    """Settings of a distillation whose student learns at drawn times."""

    p_mean: float
    """Mean of the student's time sampler, t = arctan(e^n / sigma_d)."""
    p_std: float
    """Standard deviation of n."""


def noise(key: jax.Array, x0: jax.Array) -> jax.Array:
    """Draw N(0, sigma_d^2) noise of the shape of x0."""
    return trigflow.SIGMA_D * jax.random.normal(key, x0.shape)


def scales(key: jax.Array, guidance: tuple[float, ...], n: int) -> jax.Array:
    """Draw a guidance scale for each of n samples."""
    return jax.random.choice(key, jnp.asarray(guidance, jnp.float32), (n,))


def times(key: jax.Array, settings: Timed, n: int) -> jax.Array:
    """Draw the student's times [n] by p_mean and p_std."""
    return trigflow.sample_time(key, n, mean=settings.p_mean, std=settings.p_std)


def draw(
    settings: Guided, key: jax.Array, batch: Any
) -> tuple[Sequence[jax.Array], dict[str, Any]]:
    """Draw what every update of such a distillation reads.

    Returns (six keys for the update's own draws, {"x0": data, "cond": conditions, "w": guidance
    scales [B]}). A batch of stored rollouts brings its scales, and goes along as "nodes"
    [B, K + 1, ...].
    """
    k_w, *keys = jax.random.split(key, 7)
    x0 = trigflow.SIGMA_D * batch["latent"]
    shared = {"x0": x0, "cond": conditions(batch, key, settings.control_dropout)}
    if "nodes" in batch:
        return keys, shared | {"w": batch["w"], "nodes": batch["nodes"]}
    return keys, shared | {"w": scales(k_w, settings.guidance, x0.shape[0])}


def student_alone(
    settings: Any,
    networks: Networks,
    draw: Callable[[jax.Array, Batch, Frozen], Draws],
    loss: Callable[[PyTree, Draws, State, Frozen], tuple[jax.Array, Aux]],
    *,
    extra: Callable[[PyTree], PyTree] = lambda params: None,
) -> Objective:
    """Build an objective whose only role is the student.

    draw, loss: of its update; see `base.Update`. extra: parameters that it begins from -> its extra
    arrays.
    """

    def start(frozen: Frozen, begin: PyTree, key: jax.Array) -> dict[str, Start]:
        params = begin_student(settings, networks, frozen, begin, key)
        return {"student": Start(params, extra(params))}

    return Objective(
        main="student",
        round=settings.round,
        updates={"student": Update(role="student", draw=draw, loss=loss)},
        start=start,
        sampler="renoise",
    )


def begin_student(
    settings: Guided, networks: Networks, frozen: Frozen, begin: PyTree, key: jax.Array
) -> PyTree:
    """Return what a student begins from: the parameters given, or the teacher's, completed."""
    if begin is not None:
        return begin
    return views.student_params(
        frozen.teacher, networks.trained, key, logvar_start=settings.logvar_start
    )

"""sCM alone: continuous-time consistency distillation of the guided teacher (paper Eq. 4, 5, 9)."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax

from sprint_jax.diffusion import scm, trigflow
from sprint_jax.objectives import guided, views
from sprint_jax.objectives.base import Aux, Draws, Frozen, Needs, Networks, Objective, PyTree, State
from sprint_jax.objectives.by_time import by_time


@dataclasses.dataclass(frozen=True, kw_only=True)
class TangentTerm(guided.Guided):
    """Settings of a continuous-time consistency loss, wherever its states come from."""

    tangent_warmup: int
    """H: the tangent's second bracket is scaled by min(1, step / H); steps count updates of all
    roles.
    """
    tangent_normalize: bool
    """Divide the tangent by its norm, as paper and code do."""
    weighting: Literal["code", "paper"]
    """See `diffusion.scm`."""
    logvar_gradient: Literal["network", "head"]
    """What the log-variance trains: its head and the time embedding that it reads (code), or the
    head alone.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScmTerm(TangentTerm, guided.Timed):
    """Settings of the consistency loss on noised data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scm(ScmTerm):
    """Settings of sCM alone."""

    kind: Literal["scm"]
    """Names this objective."""

    @property
    def round(self) -> tuple[str, ...]:
        """The student alone."""
        return ("student",)

    def needs(self) -> Needs:
        """Return what sCM asks of a run: a teacher."""
        return Needs(teacher=True)

    def objective(self, networks: Networks) -> Objective:
        """Build the objective."""

        def loss(params, draws, state, frozen):
            per_sample, aux = term(self, networks, params, draws, state, frozen)
            return per_sample.mean(), aux

        draw_all = lambda key, batch, frozen: draw(self, key, batch)
        return guided.student_alone(self, networks, draw_all, loss)


def draw(settings: guided.Timed, key: jax.Array, batch: Any) -> dict[str, Any]:
    """Draw what the consistency loss of a batch reads: `guided.draw`, and `draw_path`."""
    keys, shared = guided.draw(settings, key, batch)
    return shared | draw_path(settings, keys, shared["x0"])


def draw_path(
    settings: guided.Timed, keys: Sequence[jax.Array], x0: jax.Array
) -> dict[str, jax.Array]:
    """Draw time t [B] and noise z of the student's state, for data x0."""
    return {"t": guided.times(keys[0], settings, x0.shape[0]), "z": guided.noise(keys[1], x0)}


def term(
    settings: Any, networks: Networks, params: PyTree, draws: Draws, state: State, frozen: Frozen
) -> tuple[jax.Array, Aux]:
    """Return the sCM loss of each sample [B], and its statistics.

    settings: a `ScmTerm`. draws: of `draw`.
    """
    per_sample, _, aux = parts(settings, networks, params, draws, state, frozen)
    return per_sample, aux


def parts(
    settings: Any, networks: Networks, params: PyTree, draws: Draws, state: State, frozen: Frozen
) -> tuple[jax.Array, dict[str, jax.Array], Aux]:
    """Return `term` with the error, tangent norm and log-variance of each sample [B] between."""
    cond, w = draws["cond"], draws["w"]
    per_sample, aux = scm.loss(
        views.student_F(
            networks.trained, params, cond, w, logvar_gradient=settings.logvar_gradient
        ),
        views.teacher_velocity(networks, frozen, cond, w, settings.uncond_mask),
        draws["x0"],
        draws["z"],
        draws["t"],
        r=scm.tangent_warmup(state.step + 1, settings.tangent_warmup),
        weighting=settings.weighting,
        normalize=settings.tangent_normalize,
    )
    scalars = {"scm": per_sample.mean()} | {k: v.mean() for k, v in aux.items()}
    return (
        per_sample,
        aux,
        Aux(
            scalars=scalars, by_time=by_time(draws["t"], trigflow.T_MAX, {"scm": per_sample} | aux)
        ),
    )

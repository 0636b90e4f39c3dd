"""Phases of a config as stages of the loop: the one place that puts objective, networks, data and
optimizers together.
"""

import dataclasses
from typing import Any

import jax

from sprint_jax import build
from sprint_jax import config as config_lib
from sprint_jax.errors import UserError
from sprint_jax.objectives import step
from sprint_jax.objectives.base import Frozen, Networks, Objective, PyTree
from sprint_jax.optim import optimizers
from sprint_jax.training import judges, previews
from sprint_jax.training.stage import Stage


def networks(c: config_lib.Config, phase: config_lib.Phase) -> Networks:
    """Return the networks of a phase."""
    match phase.network:
        case "base":
            trained: Any = build.base_teacher(c)
        case "teacher":
            trained = build.teacher(c)
        case "control":
            trained = build.distilled_teacher(c)
        case "student":
            trained = build.student(c)
    return Networks(
        trained=trained,
        teacher=build.distilled_teacher(c),
        width=c.model.width,
        dtype=c.model.dtype,
    )


def stored(c: config_lib.Config, phase: config_lib.Phase) -> Any:
    """Return the network whose parameters a phase ends with."""
    trained = networks(c, phase).trained
    return trained.control if phase.network == "control" else trained


def make(
    c: config_lib.Config,
    name: str,
    data: Any,
    *,
    teacher: PyTree = None,
    begin: PyTree = None,
) -> Stage:
    """Make the stage of the phase of this name.

    data: of `training.datasets`. teacher: parameters of `Frozen.teacher`, or their shapes. begin:
    parameters that the main role begins from, or their shapes; None for the objective's own
    beginning.
    """
    phase = c.phases[name]
    made = networks(c, phase)
    needs, frozen = phase.objective.needs(), data.frozen.replace(teacher=teacher)
    if needs.reward:
        pixels = data.pixels
        if pixels is None:
            raise UserError(
                f"config.phases.{name}: reward {needs.reward} judges images, and there is no "
                "decoder: set config.data.model"
            )
        made = dataclasses.replace(made, judge=judges.make(needs.reward, pixels, print))
        frozen = frozen.replace(pixels=data.pixels_params)
    objective = phase.objective.objective(made)
    txs, seed = transformations(phase, objective), c.seed + phase.seed
    steps = {
        label: step.make_step(
            update,
            txs[update.role],
            ema=phase.ema,
            accumulate=phase.accumulate,
            seed=seed,
        )
        for label, update in objective.updates.items()
    }

    def start(frozen: Frozen, begin: PyTree):
        key = jax.random.key(seed)
        return step.start(objective, txs, ema=phase.ema, frozen=frozen, begin=begin, key=key)

    return Stage(
        name=name,
        steps=phase.steps,
        start=start,
        init_arrays=begin,
        functions=tuple(steps[label] for label in objective.round),
        labels=objective.round,
        roles=tuple(objective.updates[label].role for label in objective.round),
        frozen=frozen,
        prepare=data.prepare,
        batch=phase.batch,
        batches=data.batches,
        data=data.identity,
        main=objective.main,
        result=lambda state: step.result(state, objective),
        preview=_preview(c, phase, objective, made, data, teacher),
    )


def check(c: config_lib.Config) -> None:
    """Raise UserError for what the config alone does not show and would end a run later: a judge
    that fails, and frozen parameters that a network does not have.
    """
    for name in config_lib.active(c):
        phase = c.phases[name]
        if reward := phase.objective.needs().reward:
            judges.check(reward, c.data.size)
        made = networks(c, phase)
        main = phase.objective.objective(made).main
        params = jax.eval_shape(made.trained.init, jax.random.key(0))
        try:
            optimizers.check_frozen(phase.optimizers[main], params)
        except UserError as error:
            raise UserError(f"config.phases.{name}.optimizers.{main}.{error}") from None


def transformations(phase: config_lib.Phase, objective: Objective) -> dict[str, Any]:
    """Return the optimizer of each role, with a schedule over the updates that the role gets."""
    order = [objective.updates[label] for label in objective.round]
    roles = [update.role for update in order]
    return {
        role: optimizers.make(
            phase.optimizers[role],
            updates=round(phase.steps * roles.count(role) / len(roles)),
            batch=phase.batch,
            rules=order[roles.index(role)].rules,
        )
        for role in dict.fromkeys(roles)
    }


def _preview(c, phase, objective, made, data, teacher):
    draw = previews.make(c, data, made.trained, objective.sampler)
    if draw is None or phase.network != "control":
        return draw
    return lambda control: draw({"trunk": teacher, "control": control})


def with_phase(c: config_lib.Config, name: str, **changes: Any) -> config_lib.Config:
    """Return a config in which one phase is changed."""
    phase = dataclasses.replace(c.phases[name], **changes)
    return dataclasses.replace(c, phases=c.phases | {name: phase})

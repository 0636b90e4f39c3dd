"""Stages of a config without any data, for programs that are compiled and not run."""

from collections.abc import Iterator

from sprint_jax import build
from sprint_jax import config as config_lib
from sprint_jax.storage import weights
from sprint_jax.training import datasets, stages
from sprint_jax.training.stage import Stage


def abstract_stages(c: config_lib.Config) -> Iterator[Stage]:
    """Yield the stage of every active phase, with shapes in place of all arrays."""
    data = datasets.Abstract(c)
    base, distilled = (
        weights.abstract(build.base_teacher(c)),
        weights.abstract(build.distilled_teacher(c)),
    )
    fresh = not c.teacher.start
    for name in config_lib.active(c):
        match c.phases[name].network:
            case "base" | "teacher":
                begin = None if fresh else base
                fresh = False
                yield stages.make(c, name, data, begin=begin)
            case "control":
                teacher = weights.abstract(build.teacher(c))
                yield stages.make(c, name, data, teacher=teacher)
            case "student":
                yield stages.make(c, name, data, teacher=distilled)

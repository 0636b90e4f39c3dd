"""The diversity of a run's student beside its teacher's, on captions of `shapes`.

The teacher takes many steps for as many images, so the arrangements of the shipped teacher are a
file of the package; those of another teacher are drawn here.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sprint_jax import build
from sprint_jax import config as config_lib
from sprint_jax.storage import digests, json_files
from sprint_jax.toy import diversity, shapes
from sprint_jax.training import drawing

_SHIPPED = "shapes_arrangements.json"
STEPS = (1,)  # of the student


def measure(job: Any, teacher: Any, student: Any) -> dict[str, dict[str, float]]:
    """Return {sampler: figures} of teacher and student, {} for data without arrangements.

    Figures are those of `toy.diversity`; the student's have "ratio" to the teacher's number of
    arrangements, and "same", how often both draw the same from one noise. job: a `run.Job`.
    """
    config, data = job.config, job.data
    count = config.evaluation.diversity
    if not count or student is None or config.text.vocabulary != "shapes" or config.control.depth:
        return {}
    asked = captions(config)
    theirs = shipped(config, asked)
    name = f"teacher_{config.evaluation.teacher_steps}"
    if theirs is None:
        job.say(f"diversity: {count * count} images by {name} (minutes)")
        theirs = of_teacher(config, data, teacher, asked)
    figures = {name: diversity.figures(theirs, asked)}
    for steps in STEPS:
        ours = of_student(config, data, student, asked, steps=steps)
        found = diversity.figures(ours, asked)
        ratio = found["arrangements"] / max(1e-9, figures[name]["arrangements"])
        same = diversity.same(ours, theirs)
        figures[f"student_{steps}"] = found | {"ratio": ratio, "same": same}
    return figures


def captions(config: config_lib.Config) -> list[shapes.Caption]:
    """Return the captions of the measure."""
    e = config.evaluation
    return diversity.captions(e.split, e.diversity, seed=config.data.eval_seed)


def of_student(
    c: config_lib.Config, data: Any, params: Any, asked: Sequence[shapes.Caption], *, steps: int
) -> diversity.Numbers:
    """Draw as many images of each caption as there are captions; return their arrangements."""
    return diversity.read(drawing.student(c, data, params, _repeated(c, asked), steps=steps), asked)


def of_teacher(
    c: config_lib.Config, data: Any, params: Any, asked: Sequence[shapes.Caption]
) -> diversity.Numbers:
    """Return the same of the teacher in the steps of the config."""
    cond, steps = _repeated(c, asked), c.evaluation.teacher_steps
    return diversity.read(drawing.teacher(c, data, params, cond, steps=steps), asked)


def _repeated(c, asked):
    """Return the conditions of each caption as often as there are captions."""
    encoder = build.text_encoder(c)
    assert encoder is not None, "captions of shapes have an embedded encoder"
    text, mask = encoder.encode([caption.text() for caption in asked])
    return {"text": np.repeat(text, len(asked), 0), "mask": np.repeat(mask, len(asked), 0)}


def described(config: config_lib.Config, asked: Sequence[shapes.Caption]) -> dict[str, Any]:
    """Return what decides the teacher's arrangements."""
    e, file = config.evaluation, build.asset(config.teacher.pretrained)
    return {
        "teacher": digests.hash_file(file)[:16] if file.is_file() else "",
        "steps": e.teacher_steps,
        "guidance": e.teacher_guidance,
        "seed": config.data.eval_seed,
        "size": config.data.size,
        "captions": digests.hash_text("\n".join(caption.text() for caption in asked))[:16],
    }


def asset() -> pathlib.Path:
    """Return the file of the shipped teacher's arrangements."""
    return pathlib.Path(build.__file__).parent / "assets" / _SHIPPED


def shipped(config: config_lib.Config, asked: Sequence[shapes.Caption]) -> diversity.Numbers | None:
    """Return the arrangements of the shipped teacher; None for another one or other captions."""
    if not config.teacher.pretrained or not asset().exists():
        return None
    wanted = described(config, asked)
    for entry in json_files.read(asset()):
        if entry["of"] == wanted:
            return np.array(entry["numbers"])
    return None

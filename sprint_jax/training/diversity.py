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
from sprint_jax.diffusion import samplers
from sprint_jax.sampling import programs
from sprint_jax.storage import digests, json_files
from sprint_jax.toy import diversity, shapes

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
        theirs = drawn(config, data, teacher, asked, steps=config.evaluation.teacher_steps)
    figures = {name: diversity.figures(theirs, asked)}
    for steps in STEPS:
        ours = drawn(config, data, student, asked, steps=steps, student=True)
        found = diversity.figures(ours, asked)
        ratio = found["arrangements"] / max(1e-9, figures[name]["arrangements"])
        same = diversity.same(ours, theirs)
        figures[f"student_{steps}"] = found | {"ratio": ratio, "same": same}
    return figures


def captions(config: config_lib.Config) -> list[shapes.Caption]:
    """Return the captions of the measure."""
    e = config.evaluation
    return diversity.captions(e.split, e.diversity, seed=config.data.eval_seed)


def drawn(
    config: config_lib.Config,
    data: Any,
    params: Any,
    asked: Sequence[shapes.Caption],
    *,
    steps: int,
    student: bool = False,
) -> diversity.Numbers:
    """Draw as many images of each caption as there are captions; return their arrangements."""
    e, shape, count = config.evaluation, build.latent_shape(config), len(asked)
    encoder = build.text_encoder(config)
    assert encoder is not None, "captions of shapes have an embedded encoder"
    text, mask = encoder.encode([caption.text() for caption in asked])
    cond = {"text": np.repeat(text, count, 0), "mask": np.repeat(mask, count, 0)}
    if student:
        times = samplers.scm_times(steps, e.schedule)
        sampler = programs.student_sampler(build.student(config), data.pixels, shape, times)
    else:
        times = samplers.trig_times(steps)
        sampler = programs.teacher_sampler(build.teacher(config), data.pixels, shape, times)
    images = programs.run(
        sampler,
        {"transformer": params, "pixels": data.pixels_params},
        programs.null_of(data.frozen),
        cond,
        guidance=e.student_guidance if student else e.teacher_guidance,
        seed=config.data.eval_seed,
        batch=e.batch,
    )
    return diversity.read(images, asked)


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

"""The evaluation at the end of a run: images and scores of everything on the same held-out prompts
and noise.
"""

import dataclasses
import resource
import time
from typing import Any

import jax
import numpy as np
import tqdm

from sprint_jax import build
from sprint_jax.conditioning import sketches
from sprint_jax.diffusion import samplers
from sprint_jax.evaluation.heldout import Evaluator
from sprint_jax.sampling import programs
from sprint_jax.storage import image_files, json_files, revision, run_files
from sprint_jax.toy import checker
from sprint_jax.training import diversity, drawing, hosts

STUDENT_STEPS = (1, 2, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One row of the table of scores.

    heldout: examples. evaluator: scores images against them. sampler, params, guidance: what draws
    them. changes: of the held-out conditions, {name: value of every example}.
    """

    heldout: Any
    evaluator: Evaluator
    sampler: programs.Sampler
    params: Any
    guidance: float
    changes: dict[str, float]


def evaluate(job: Any, teacher: Any, student: Any, begin: float) -> dict:
    """Score everything, write summary.json and the grids of images; return the summary.

    job: a `run.Job`. student: its parameters, or None. begin: when the run began, by
    `time.perf_counter`.
    """
    config, done = job.config, job.workdir / run_files.SUMMARY
    if hosts.exists(done):
        job.say(f"evaluation: done before, {done}")
        return json_files.read_object(done, "remove it, and give the same command")
    results, grids = {}, {}
    if job.data.pixels is None:
        job.say(
            "evaluation: no images, because there is no autoencoder (config.data.model is empty)"
        )
    else:
        results, grids = _score(job, teacher, student)
    varied = diversity.measure(job, teacher, student) if results else {}
    summary = _summary(results, begin) | {"diversity": varied}
    if hosts.primary():
        _save_grids(config, job.workdir, grids, job.records)
        json_files.write(done, summary)
        if results:
            job.say(_table(summary))
    return summary


def glance(job: Any, student: Any) -> float | None:
    """Return the share of right one-step images of a student on the run's prompts, between phases;
    None for data without a checker.

    student: its parameters, placed for training.
    """
    config, data, e = job.config, job.data, job.config.evaluation
    if data.pixels is None or config.text.vocabulary != "shapes":
        return None
    params = hosts.to_host(student)
    heldout = data.heldout(e.prompts, 2)
    if heldout.meanings is None:
        return None
    images = drawing.student(config, data, params, heldout.cond, steps=1)
    return checker.score(images, heldout.meanings)[0]


def _score(job, teacher, student):
    """Return ({name: result}, {name: images}); every process generates its share."""
    e = job.config.evaluation
    heldout = job.data.heldout(e.prompts, e.reference)
    evaluator = Evaluator(heldout)
    results, grids = {}, {}
    if heldout.images is not None:
        results, grids = {"real": evaluator(heldout.images)}, {"real": heldout.images}
    if heldout.edges is not None and heldout.images is not None:
        # Chance level: the right images, each held against the sketch of the next prompt.
        results["mismatched"] = evaluator(np.roll(heldout.images, 1, 0))
        grids["control"] = sketches.to_rgb(heldout.sketches)
    trials = _trials(job, teacher, student, heldout, evaluator)
    count = len(trials)
    rough = job.data.freehand(e.prompts, e.reference)
    if rough is not None:
        grids["freehand_sketches"] = sketches.to_rgb(rough.sketches)
        trials |= _freehand(trials, rough, e.teacher_steps)
    job.say(
        f"evaluation: {e.prompts} held-out prompts, images by {count} samplers (each compiles "
        f"first)"
    )
    shown = hosts.primary()
    total = len(trials) * e.prompts
    with tqdm.tqdm(
        total=total, desc="evaluation", unit="image", mininterval=1.0, disable=not shown
    ) as bar:
        for name, trial in trials.items():
            images = _generate(job, trial, bar)
            results[name], grids[name] = trial.evaluator(images), images
    return results, grids


def _trials(job, teacher, student, heldout, evaluator) -> dict[str, Trial]:
    """Return everything that is scored, by name."""
    config, data = job.config, job.data
    e, shape = config.evaluation, build.latent_shape(config)

    def trial(sampler, transformer, guidance, **changes):
        params = {"transformer": transformer, "pixels": data.pixels_params}
        return Trial(
            heldout=heldout,
            evaluator=evaluator,
            sampler=sampler,
            params=params,
            guidance=guidance,
            changes=changes,
        )

    trials = {}
    for steps in (e.teacher_steps, 1):
        model, times = build.distilled_teacher(config), samplers.trig_times(steps)
        sampler = programs.teacher_sampler(model, data.pixels, shape, times)
        trials[f"teacher_{steps}"] = trial(sampler, teacher, e.teacher_guidance)
    for steps in STUDENT_STEPS if student is not None else ():
        times = samplers.scm_times(steps, e.schedule)
        sampler = programs.student_sampler(build.student(config), data.pixels, shape, times)
        trials[f"student_{steps}"] = trial(sampler, student, e.student_guidance)
        if config.control.depth and steps == 1:
            trials["student_1_free"] = trial(
                sampler, student, e.student_guidance, control_scale=0.0
            )
    return trials


def _freehand(trials, rough, teacher_steps) -> dict[str, Trial]:
    """Return the trials on rough sketches."""
    evaluator = Evaluator(rough)
    of = {"teacher_freehand": f"teacher_{teacher_steps}", "student_1_freehand": "student_1"}
    return {
        name: dataclasses.replace(trials[clean], heldout=rough, evaluator=evaluator)
        for name, clean in of.items()
        if clean in trials
    }


def _generate(job, trial: Trial, bar) -> np.ndarray:
    """Return an image of every held-out prompt [prompts, H, W, 3]; every process generates its
    share.
    """
    e = job.config.evaluation
    cond = trial.heldout.cond | {
        k: np.full(e.prompts, v, np.float32) for k, v in trial.changes.items()
    }
    starts = list(range(0, e.prompts, e.batch))
    share = -(-len(starts) // jax.process_count())
    # Equal shares, so that they can be gathered: the last ones are generated twice and cut off
    # again.
    first = jax.process_index() * share
    mine = [starts[min(first + i, len(starts) - 1)] for i in range(share)]
    base = bar.n

    def say(n):
        bar.update(min(base + e.prompts, base + n * jax.process_count()) - bar.n)

    images = programs.run(
        trial.sampler,
        trial.params,
        programs.null_of(job.data.frozen),
        cond,
        guidance=trial.guidance,
        seed=job.config.data.eval_seed,
        batch=e.batch,
        starts=mine,
        say=say,
    )
    return _in_order(images, mine, e)


def _in_order(images, starts, e):
    """Gather all processes' images as one array [prompts, H, W, 3]."""
    if jax.process_count() == 1:
        return images
    rows = np.concatenate([np.arange(s, min(s + e.batch, e.prompts)) for s in starts])
    room = len(starts) * e.batch - len(rows)  # a short last batch, padded so that shares are equal
    rows = np.concatenate([rows, np.full(room, -1)])
    padding = np.zeros((room, *images.shape[1:]), images.dtype)
    rows = hosts.concatenate(rows)
    gathered = hosts.concatenate(np.concatenate([images, padding]))
    ordered = np.zeros((e.prompts, *images.shape[1:]), images.dtype)
    ordered[rows[rows >= 0]] = gathered[rows >= 0]
    return ordered


def _save_grids(config, workdir, grids, records):
    suffixes = {"real": "real", f"teacher_{config.evaluation.teacher_steps}": "teacher"}
    suffixes |= {
        "control": "control",
        "freehand_sketches": "freehand_sketches",
        "student_1_freehand": "freehand",
    }
    suffixes |= {f"student_{n}": str(n) for n in STUDENT_STEPS}
    zoom = max(1, 96 // config.data.size)
    saved = {}
    for name, suffix in suffixes.items():
        if name in grids:
            grid = image_files.grid(grids[name][: config.evaluation.samples], columns=8)
            image_files.save(workdir / f"samples_{suffix}.png", grid, zoom)
            saved[f"samples_{suffix}"] = grid
    records.images(config.phases[config.order[-1]].steps, saved)


def _summary(results, begin):
    return {
        "seconds": time.perf_counter() - begin,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "jax": jax.__version__,
        "commit": revision.commit(),
        "device": jax.devices()[0].device_kind,
        "scores": {name: r["score"] for name, r in results.items() if "score" in r},
        "tasks": {name: r["tasks"] for name, r in results.items() if "tasks" in r},
        "frechet": {name: r["frechet"] for name, r in results.items() if "frechet" in r},
        "agreement": {name: r["agreement"] for name, r in results.items() if "agreement" in r},
    }


def _table(summary):
    """Format scores, where the data have a checker, and distances: a line each."""
    tasks = list(next(iter(summary["tasks"].values()), ()))
    columns = ["overall", *tasks] if tasks else []
    agreement = summary["agreement"]
    frechet = summary["frechet"]
    heads = (*columns, *(["Frechet"] if frechet else []), *(["edges"] if agreement else []))
    lines = ["", f"{'':18}" + "".join(f"{t.replace('_', ' '):>20}" for t in heads)]
    for name in frechet or summary["scores"]:
        shares = []
        if tasks:
            shares = [summary["scores"][name]]
            shares += [summary["tasks"][name].get(t, np.nan) for t in tasks]
        row = f"{name:18}" + "".join(f"{100 * s:19.1f}%" for s in shares)
        row += f"{frechet[name]:20.4f}" if frechet else ""
        lines.append(row + (f"{100 * agreement[name]:19.1f}%" if agreement else ""))
    for name, found in summary.get("diversity", {}).items():
        same = f", {100 * found['same']:.1f} % as the teacher's" if "same" in found else ""
        lines.append(
            f"{name:18}{found['arrangements']:.2f} arrangements of a caption, "
            f"{100 * found['never_drawn']:.1f} % of them never drawn{same}"
        )
    return "\n".join(lines) + "\n"

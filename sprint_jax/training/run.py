"""The main job in a work directory: the phases of a config, then evaluation. Finished parts are
skipped.

Every process of a multi-host run calls `run` with the same arguments on a shared work directory;
process 0 writes what people read.
"""

import contextlib
import dataclasses
import hashlib
import pathlib
import sys
import time
from typing import Any

import jax

from sprint_jax import build
from sprint_jax import config as config_lib
from sprint_jax.errors import UserError
from sprint_jax.objectives.base import PyTree
from sprint_jax.reporting import page
from sprint_jax.storage import files, json_files, run_files, trees, weights
from sprint_jax.training import datasets, hosts, loop, pairs, scores, sharding, stages, workdirs
from sprint_jax.training.costs import Costs
from sprint_jax.training.records import Records
from sprint_jax.training.stage import Say, silent

FILES = {
    "base": run_files.TEACHER,
    "teacher": run_files.TEACHER,
    "control": run_files.CONTROL,
    "student": run_files.STUDENT,
}


def _say(message: str) -> None:
    print(message, flush=True)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """What every part of a run needs."""

    config: config_lib.Config
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    data: Any
    records: Records
    costs: Costs
    say: Say


def run(config: config_lib.Config, workdir: pathlib.Path | str, say: Say = _say) -> dict:
    """Run all phases and the evaluation; return the summary (also written to summary.json)."""
    begin = time.perf_counter()
    workdir, primary = pathlib.Path(workdir), hosts.primary()
    say = say if primary else silent
    if jax.process_count() > 1:
        hosts.compare(_identity(config))
    mesh = sharding.mesh(config.mesh.data, config.mesh.fsdp)
    with workdirs.claim(workdir) if primary else contextlib.nullcontext():
        if primary:
            workdirs.write_config(config, workdir)
        hosts.barrier("workdir")
        _greet(config, workdir, say)
        records = Records(workdir if primary else None)
        try:
            job = Job(
                config=config,
                workdir=workdir,
                mesh=mesh,
                data=datasets.open_dataset(config, say),
                records=records,
                costs=Costs(workdir if primary else None),
                say=say,
            )
            stages.check(config)
            teacher = distilled_teacher(job)
            student = trained(job, "student", teacher=teacher)
            with job.costs.measure("evaluation"):
                summary = scores.evaluate(job, teacher, student, begin)
            if "student_1" in summary["scores"]:
                last = config_lib.active(config)[-1]
                job.costs.note(last, score=summary["scores"]["student_1"])
        finally:
            records.close()
        if primary:
            page.write(workdir)
        hosts.barrier("done")
    _say_what_next(config, workdir, student, say)
    return summary


def _greet(config, workdir, say):
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})"
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    say(f"sprint_jax on {devices}{processes}, jax {jax.__version__}, in {workdir}")
    if sentence := build.attention(config)[1]:
        say(sentence)


def _say_what_next(config, workdir, student, say):
    say(
        f"done: images, metrics and summary.json are in {workdir}; open "
        f"{workdir / run_files.REPORT}"
    )
    if student is None:
        weights_file = config.teacher.pretrained or workdir / run_files.TEACHER
        say(f"next: distill it with --config.teacher.pretrained={weights_file}")
        return
    shapes = config.text.vocabulary == "shapes"
    prompt = "a red circle left of a blue square" if shapes else "a red apple"
    say(f'next: sprint-jax sample --model={workdir} --prompt="{prompt}" --steps=2 --out=images')


def _identity(config):
    """Return what all processes must have in common."""
    flat = trees.flatten(config_lib.to_dict(config))
    source = hashlib.sha256()
    for path in sorted(files.below(pathlib.Path(__file__).parents[1])):
        if path.suffix == ".py":
            source.update(path.read_bytes())
    return {f"config.{k}": v for k, v in flat.items()} | {
        "the version of jax": jax.__version__,
        "the version of Python": sys.version.split()[0],
        "the source code (a digest)": source.hexdigest()[:12],
    }


def distilled_teacher(job: Job) -> PyTree:
    """Return the parameters of what is distilled: the teacher's, with those of its ControlNet
    where there is one.
    """
    c = job.config
    model = build.teacher(c)
    if c.teacher.pretrained:
        path = build.asset(c.teacher.pretrained)
        job.say(f"teacher: weights from {path}")
        if path.is_dir() and model.time_scale == 1.0:
            job.say(
                "teacher: conditioned on times in [0, 1]; a SANA made for [0, 1000] would draw "
                "noise, fine-tune it by configs/teacher.py first"
            )
        teacher = build.teacher_weights(c.teacher.pretrained, model)
    else:
        start = c.teacher.start
        begin = build.teacher_weights(start, build.base_teacher(c)) if start else None
        teacher = trained(job, "teacher", begin=begin)
    if not c.control.depth:
        return teacher
    if c.control.pretrained:
        job.say(f"control: weights from {build.asset(c.control.pretrained)}")
        control = build.control_weights(c.control.pretrained, build.controlnet(c))
    else:
        control = trained(job, "control", teacher=teacher)
    return {"trunk": teacher, "control": control}


def trained(job: Job, network: str, *, teacher: PyTree = None, begin: PyTree = None) -> PyTree:
    """Return the parameters of a network after its phases: found finished, or trained here.

    network: "teacher" (with the phases of the base network), "control" or "student". teacher: of
    `Frozen.teacher`. begin: parameters that its first phase begins from. Returns None where no
    phase trains the network.
    """
    c, file = job.config, FILES[network]
    names = [n for n in config_lib.active(c) if FILES[c.phases[n].network] == file]
    if not names:
        return None
    if hosts.exists(job.workdir / file):
        job.say(f"{names[-1]}: done before, {job.workdir / file}")
        model = stages.stored(c, c.phases[names[-1]])
        return weights.load(job.workdir / file, weights.abstract(model))
    for name in names:
        stage = stages.make(c, name, job.data, teacher=teacher, begin=begin)
        if c.phases[name].objective.needs().stored:
            with job.costs.measure(run_files.PAIRS):
                stage = pairs.feed(stage, c, job.data, teacher, job.workdir, job.say)
        with job.costs.measure(name):
            final = loop.train(stage, c.run, job.mesh, job.workdir, job.records, job.say)
        begin = stage.result(final)
        # The last student is scored at the end of the run.
        between = network == "student" and name != names[-1]
        if between and (score := scores.glance(job, begin)) is not None:
            job.say(f"{name}: {score:.1%} of the prompts in one step")
            job.costs.note(name, score=score)
    return _keep(job, file, begin)


def _keep(job, file, params):
    """Write the parameters of a finished network and return them on the host, whole, on every
    process.
    """
    params = hosts.to_host(params)
    if hosts.primary():
        weights.save(job.workdir / file, params)
    hosts.barrier(file)
    return params


def read_config(workdir: pathlib.Path) -> config_lib.Config:
    """Return the config of a work directory. Raises UserError for anything that is not one."""
    try:
        return config_lib.parse(json_files.read(workdir / run_files.CONFIG))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{workdir} is no work directory of a run ({error}): give the --workdir of one"
        ) from None

"""The main job in a work directory: teacher, sprint, evaluation. Does what is not done, skips what is.

Every process of a multi-host run calls `run` with the same arguments on a shared work directory; process 0
writes what people read.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import pathlib
import resource
import sys
import time

import jax
import numpy as np
import tqdm

from sprint_jax import build
from sprint_jax import config as config_lib
from sprint_jax.diffusion import samplers
from sprint_jax.errors import UserError
from sprint_jax.evaluation.heldout import Evaluator
from sprint_jax.reporting import page
from sprint_jax.sampling import programs
from sprint_jax.storage import files, image_files, revision, weights
from sprint_jax.storage import run_files as names
from sprint_jax.training import (
    came,
    datasets,
    hosts,
    loop,
    previews,
    sharding,
    sprint_step,
    state,
    teacher_step,
)
from sprint_jax.training.records import Records

STUDENT_STEPS = (1, 2, 4)


def _say(message):
    print(message, flush=True)


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """What every stage needs."""

    config: config_lib.Config
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    data: datasets.Shapes | datasets.EncodedData
    records: Records
    say: object


def run(config: config_lib.Config, workdir, say=_say):
    """Runs all stages and returns the summary (also written to summary.json)."""
    begin = time.perf_counter()
    workdir, primary = pathlib.Path(workdir), hosts.primary()
    say = say if primary else lambda message: None
    hosts.compare(_identity(config))
    mesh = sharding.mesh(config.mesh.data, config.mesh.fsdp)
    with claim(workdir) if primary else contextlib.nullcontext():
        if primary:
            write_config(config, workdir)
        hosts.barrier("workdir")
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})"
        processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
        say(f"sprint_jax on {devices}{processes}, jax {jax.__version__}, in {workdir}")
        if sentence := build.attention(config)[1]:
            say(sentence)
        records = Records(workdir if primary else None)
        try:
            job = _Job(config, workdir, mesh, datasets.open_inputs(config, say), records, say)
            teacher = _control(job, _teacher(job))
            student = _sprint(job, teacher) if config.sprint.steps else None
            summary = _evaluate(job, teacher, student, begin)
        finally:
            records.close()
        if primary:
            page.write(workdir)
        hosts.barrier("done")
    say(
        f"done: pictures, metrics and summary.json are in {workdir}; look at {workdir / names.REPORT}"
    )
    if student is None:
        say(
            f"next: distil it with --config.teacher.pretrained={config.teacher.pretrained or workdir / names.TEACHER}"
        )
    else:
        prompt = (
            "a red circle left of a blue square"
            if config.text.vocabulary == "shapes"
            else "a red apple"
        )
        say(
            f'next: python -m sprint_jax sample --model={workdir} --prompt="{prompt}" --steps=2 --out=pictures'
        )
    return summary


def _identity(config):
    """What all processes must have in common."""
    values = {f"config.{k}": v for k, v in weights.flatten(config_lib.to_dict(config)).items()}
    source = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parents[1].rglob("*.py")):
        source.update(path.read_bytes())
    return values | {
        "the version of jax": jax.__version__,
        "the version of Python": sys.version.split()[0],
        "the source code (a digest)": source.hexdigest()[:12],
    }


def _done(path) -> bool:
    """Whether process 0 sees the file: all act on one answer."""
    return bool(hosts.from_primary(int(path.exists())))


@contextlib.contextmanager
def claim(workdir):
    """Makes the work directory and holds it for this process."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"cannot write in {workdir} ({error.strerror}): choose another --workdir"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another run is working in {workdir}: wait for it, or choose another --workdir"
            ) from None
        yield


def write_config(config, workdir):
    """Records the resolved config; a directory in which another one has begun something is refused."""
    path = workdir / names.CONFIG
    tree = json.loads(json.dumps(config_lib.to_dict(config)))
    if path.exists():
        old = _recorded(path)
        differing = _differences(old, tree) if _begun(workdir) else []
        if differing:
            name, was, now = differing[0]
            raise UserError(
                f"{workdir} was made with {name}={was}, now {now}: use the same config, or another --workdir"
            )
        if old == tree:
            return
    elif any(child.name != ".lock" for child in workdir.iterdir()):
        raise UserError(
            f"{workdir} is not empty and not a run of this project: choose another --workdir"
        )
    files.write_text(path, json.dumps(tree, indent=2) + "\n")


def _recorded(path):
    """A config.json of ours, as a dict. Raises UserError for any other."""
    with contextlib.suppress(json.JSONDecodeError):
        old = json.loads(path.read_text())
        if isinstance(old, dict) and {"data", "model", "teacher", "sprint"} <= old.keys():
            return old
    raise UserError(f"{path} is not a config of this project: choose another --workdir")


def _begun(workdir):
    """Whether anything but its config and empty records is there: until then another config may take the directory."""
    return any(child.name not in (".lock", names.CONFIG, "events") for child in workdir.iterdir())


def _differences(old, new):
    """[(dotted name, old, new)] of all leaves that differ, but for the mesh: a run may go on with other devices."""
    a, b = weights.flatten(old), weights.flatten(new)
    known = sorted(name for name in a.keys() | b.keys() if not name.startswith("mesh."))
    return [
        (f"config.{n}", a.get(n, "nothing"), b.get(n, "nothing"))
        for n in known
        if a.get(n) != b.get(n)
    ]


def _abstract(model):
    return jax.eval_shape(model.init, jax.random.key(0))


def _keep(job, file, params):
    """Writes the parameters of a finished stage and returns them on the host, whole, on every process."""
    params = hosts.to_host(params)
    if hosts.primary():
        weights.save(job.workdir / file, params)
    hosts.barrier(file)
    return params


def _teacher(job):
    """Parameters of the teacher: loaded, found finished, or trained (and fine-tuned) here."""
    t, model = job.config.teacher, build.teacher(job.config)
    if t.pretrained:
        path = build.asset(t.pretrained)
        job.say(f"teacher: weights from {path}")
        if path.is_dir() and model.time_scale == 1.0:
            job.say(
                "teacher: told times in [0, 1]; a SANA made for [0, 1000] would draw noise, fine-tune it by configs/teacher.py first"
            )
        return datasets.teacher_weights(t.pretrained, model)
    finished = job.workdir / names.TEACHER
    if _done(finished):
        job.say(f"teacher: done before, {finished}")
        return weights.load(finished, _abstract(model))
    params = None
    begun = datasets.teacher_weights(t.start, build.base_teacher(job.config)) if t.start else None
    for stage in teacher_stages(job.config, job.data, begun):
        final = loop.train(
            stage(params), job.config.run, job.mesh, job.workdir, job.records, job.say
        )
        params = state.averaged(final)
    return _keep(job, names.TEACHER, params)


def teacher_stages(config, data, begun):
    """The one or two stages of a teacher as functions: parameters so far (None at first) -> `loop.Stage`.

    begun: parameters, or their shapes, that training begins from; None begins from random ones.
    """
    t, base, model = config.teacher, build.base_teacher(config), build.teacher(config)
    key = jax.random.key(config.seed)

    def first(_):
        if begun is None:
            return _teacher_stage(
                config,
                data,
                "teacher",
                base,
                {},
                lambda _: teacher_step.start(base, key, borders=t.border_start),
            )
        return _teacher_stage(config, data, "teacher", base, begun, lambda begun: begun)

    def second(params):
        before = begun if params is None else params
        return _teacher_stage(
            config,
            data,
            "finetune",
            model,
            before,
            lambda p: teacher_step.add_qk_norm(p, model, key),
        )

    return ([first] if t.steps else []) + (
        [second] if build.needs_finetune(config) and t.finetune_steps else []
    )


def _teacher_stage(config, data, name, model, begun, start):
    """begun: arrays that `start` makes parameters of."""
    t = config.teacher
    optimizer, steps = t.optimizer, t.steps
    if name == "finetune":
        slower = t.finetune_lr / t.optimizer.lr
        optimizer = dataclasses.replace(
            t.optimizer, lr=t.finetune_lr, muon_lr=slower * t.optimizer.muon_lr
        )
        steps = t.finetune_steps
    tx = state.optimizer(
        optimizer, steps, t.batch, came_rules=(came.dit_factored, came.dit_stacked)
    )
    return loop.Stage(
        name=name,
        steps=steps,
        start=lambda frozen, begun: teacher_step.init(start(begun), tx, t),
        begun=begun,
        functions=(teacher_step.make_step(model, tx, t, config.seed),),
        frozen=data.frozen,
        prepare=data.prepare,
        batch=t.batch,
        batches=data.batches,
        data=data.identity,
        strip=previews.teacher(config, data, model),
    )


def _control(job, teacher):
    """Parameters of what is distilled: the teacher's, with those of a ControlNet loaded, found finished, or trained here."""
    k = job.config.control
    if not k.depth:
        return teacher
    model, finished = build.controlnet(job.config), job.workdir / names.CONTROL
    if k.pretrained:
        job.say(f"control: weights from {build.asset(k.pretrained)}")
        return {"trunk": teacher, "control": datasets.control_weights(k.pretrained, model)}
    if _done(finished):
        job.say(f"control: done before, {finished}")
        return {"trunk": teacher, "control": weights.load(finished, _abstract(model))}
    stage = control_stage(job.config, job.data, teacher)
    final = loop.train(stage, job.config.run, job.mesh, job.workdir, job.records, job.say)
    return {"trunk": teacher, "control": _keep(job, names.CONTROL, state.averaged(final))}


def control_stage(config, data, teacher):
    """Flow matching of a ControlNet alone, around the frozen teacher. teacher: its parameters, or their shapes."""
    k, model = config.control, build.distilled_teacher(config)
    t = dataclasses.replace(config.teacher, steps=k.steps, batch=k.batch, optimizer=k.optimizer)
    tx = state.optimizer(
        k.optimizer, k.steps, k.batch, came_rules=(came.dit_factored, came.dit_stacked)
    )
    draw = previews.teacher(config, data, model)
    return loop.Stage(
        name="control",
        steps=k.steps,
        begun={},
        start=lambda frozen, begun: teacher_step.init(model.control.start(frozen["trunk"]), tx, t),
        functions=(teacher_step.make_step(model, tx, t, config.seed + 2),),
        frozen={"trunk": teacher} | data.frozen,
        prepare=data.prepare,
        batch=k.batch,
        batches=data.batches,
        data=data.identity,
        strip=draw and (lambda control: draw({"trunk": teacher, "control": control})),
    )


def _sprint(job, teacher):
    """Parameters of the student: found finished or distilled here."""
    finished = job.workdir / names.STUDENT
    if _done(finished):
        job.say(f"sprint: done before, {finished}")
        return weights.load(finished, _abstract(build.student(job.config)))
    stage = sprint_stage(job.config, job.data, teacher)
    final = loop.train(stage, job.config.run, job.mesh, job.workdir, job.records, job.say)
    return _keep(job, names.STUDENT, state.averaged(final))


def sprint_stage(config, data, teacher):
    """teacher: parameters of `build.distilled_teacher`, or their shapes."""
    nets, s, dropout = build.nets(config), config.sprint, config.control.dropout
    key = jax.random.key(config.seed + 1)

    return loop.Stage(
        name="sprint",
        steps=s.steps,
        start=lambda frozen, begun: sprint_step.start(frozen["teacher"], nets, s, key),
        begun={},
        functions=(
            sprint_step.make_generator_step(nets, s, config.seed + 1, control_dropout=dropout),
            sprint_step.make_discriminator_step(nets, s, config.seed + 1, control_dropout=dropout),
        ),
        frozen={"teacher": teacher} | data.frozen,
        prepare=data.prepare,
        batch=s.batch,
        batches=data.batches,
        data=data.identity,
        strip=previews.student(config, data),
    )


def _evaluate(job, teacher, student, begin):
    """Pictures and scores of everything on the same held-out prompts and noise."""
    config, done = job.config, job.workdir / names.SUMMARY
    if _done(done):
        job.say(f"evaluation: done before, {done}")
        return json.loads(done.read_text())
    results, sheets = {}, {}
    if job.data.pixels is None:
        job.say(
            "evaluation: no pictures, for no autoencoder is at hand (config.data.model is empty)"
        )
    else:
        results, sheets = _pictures(job, teacher, student)
    summary = _summary(results, begin)
    if hosts.primary():
        _save_sheets(config, job.workdir, sheets, job.records)
        files.write_text(done, json.dumps(summary, indent=2) + "\n")
        if results:
            job.say(_table(summary))
    return summary


def _pictures(job, teacher, student):
    """({score: result}, {score: pictures}): every process makes its share."""
    e = job.config.evaluation
    heldout = job.data.heldout(e.prompts, e.reference)
    evaluator = Evaluator(heldout)
    results, sheets = {"real": evaluator(heldout.images)}, {"real": heldout.images}
    if heldout.edges is not None:
        # What chance gives: the right pictures, each held against the drawing of the next prompt.
        results["mismatched"] = evaluator(np.roll(heldout.images, 1, 0))
        sheets["control"] = _white(heldout.sketches)
    chosen = _samplers(job, teacher, student)
    trials = {name: (heldout, evaluator, how) for name, how in chosen.items()}
    rough = job.data.freehand(e.prompts, e.reference)
    if rough is not None:
        sheets["freehand_sketches"], rough_evaluator = _white(rough.sketches), Evaluator(rough)
        by = {"teacher_freehand": f"teacher_{e.teacher_steps}", "student_1_freehand": "student_1"}
        trials |= {
            name: (rough, rough_evaluator, chosen[how]) for name, how in by.items() if how in chosen
        }
    job.say(
        f"evaluation: {e.prompts} held-out prompts, pictures by {len(chosen)} samplers (each compiles first)"
    )
    null = {"text": job.data.frozen["null_text"], "mask": job.data.frozen["null_mask"]}
    with tqdm.tqdm(
        total=len(trials) * e.prompts,
        desc="evaluation",
        unit="picture",
        mininterval=1.0,
        disable=not hosts.primary(),
    ) as bar:
        for name, (asked, judge, (sampler, params, guidance, told)) in trials.items():
            cond = asked.cond | {k: np.full(e.prompts, v, np.float32) for k, v in told.items()}
            starts = list(range(0, e.prompts, e.batch))
            share = -(-len(starts) // jax.process_count())
            # Equal shares, so that they can be gathered: the last ones are made twice and cut off again.
            mine = [
                starts[min(jax.process_index() * share + i, len(starts) - 1)] for i in range(share)
            ]
            made = programs.run(
                sampler,
                params,
                null,
                cond,
                guidance=guidance,
                seed=job.config.data.eval_seed,
                batch=e.batch,
                starts=mine,
                say=lambda n, base=bar.n: bar.update(
                    min(base + e.prompts, base + n * jax.process_count()) - bar.n
                ),
            )
            images = _in_order(made, mine, e)
            results[name], sheets[name] = judge(images), images
    return results, sheets


def _white(sketches):
    """uint8 [N, H, W] as pictures of three channels."""
    return np.repeat(sketches[..., None], 3, -1)


def _in_order(made, starts, e):
    """All processes' pictures as one array [prompts, H, W, 3]."""
    if jax.process_count() == 1:
        return made
    rows = np.concatenate([np.arange(s, min(s + e.batch, e.prompts)) for s in starts])
    room = len(starts) * e.batch - len(rows)  # a short last batch, padded so that shares are equal
    rows = np.concatenate([rows, np.full(room, -1)])
    made = np.concatenate([made, np.zeros((room, *made.shape[1:]), made.dtype)])
    rows, made = hosts.concatenate(rows), hosts.concatenate(made)
    images = np.zeros((e.prompts, *made.shape[1:]), made.dtype)
    images[rows[rows >= 0]] = made[rows >= 0]
    return images


def _samplers(job, teacher, student):
    """{score: (sampler, params, guidance, changes of the held-out conditions)} of everything that is scored."""
    config, data = job.config, job.data
    e, shape = config.evaluation, build.latent_shape(config)
    params = lambda transformer: {"transformer": transformer, "pixels": data.pixels_params}
    chosen = {}
    for steps in (e.teacher_steps, 1):
        sampler = programs.teacher_sampler(
            build.distilled_teacher(config), data.pixels, shape, samplers.trig_times(steps)
        )
        chosen[f"teacher_{steps}"] = (sampler, params(teacher), e.teacher_guidance, {})
    for steps in STUDENT_STEPS if student is not None else ():
        times = samplers.scm_times(steps, e.schedule)
        sampler = programs.student_sampler(build.student(config), data.pixels, shape, times)
        chosen[f"student_{steps}"] = (sampler, params(student), e.student_guidance, {})
        if config.control.depth and steps == 1:
            chosen["student_1_free"] = (
                sampler,
                params(student),
                e.student_guidance,
                {"control_scale": 0.0},
            )
    return chosen


def _save_sheets(config, workdir, sheets, records):
    suffixes = {"real": "real", f"teacher_{config.evaluation.teacher_steps}": "teacher"}
    suffixes |= {
        "control": "control",
        "freehand_sketches": "freehand_sketches",
        "student_1_freehand": "freehand",
    }
    suffixes |= {f"student_{n}": str(n) for n in STUDENT_STEPS}
    zoom = max(1, 96 // config.data.size)
    made = {}
    for name, suffix in suffixes.items():
        if name in sheets:
            sheet = image_files.grid(sheets[name][: config.evaluation.samples], columns=8)
            image_files.save(workdir / f"samples_{suffix}.png", sheet, zoom)
            made[f"samples_{suffix}"] = sheet
    records.images(config.sprint.steps, made)


def _summary(results, begin):
    return {
        "seconds": time.perf_counter() - begin,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "jax": jax.__version__,
        "commit": revision.commit(),
        "device": jax.devices()[0].device_kind,
        "scores": {name: r["score"] for name, r in results.items() if "score" in r},
        "tasks": {name: r["tasks"] for name, r in results.items() if "tasks" in r},
        "frechet": {name: r["frechet"] for name, r in results.items()},
        "agreement": {name: r["agreement"] for name, r in results.items() if "agreement" in r},
    }


def _table(summary):
    """Scores where the data have a checker, and distances, a line each."""
    tasks = list(summary["tasks"].get("real", ()))
    columns = ["overall", *tasks] if tasks else []
    agreement = summary["agreement"]
    heads = (*columns, "Frechet", *(["edges"] if agreement else []))
    lines = ["", f"{'':18}" + "".join(f"{t.replace('_', ' '):>20}" for t in heads)]
    for name, distance in summary["frechet"].items():
        shares = (
            [summary["scores"][name], *(summary["tasks"][name].get(t, np.nan) for t in tasks)]
            if tasks
            else []
        )
        row = f"{name:18}" + "".join(f"{100 * s:19.1f}%" for s in shares) + f"{distance:20.4f}"
        lines.append(row + (f"{100 * agreement[name]:19.1f}%" if agreement else ""))
    return "\n".join(lines) + "\n"

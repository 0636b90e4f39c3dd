"""The main job in a work directory: teacher, sprint, evaluation. Does what is not done, skips what is."""

import contextlib
import dataclasses
import fcntl
import json
import pathlib
import resource
import subprocess
import time

import jax
import numpy as np
import tqdm

from sprint_jax import build, files, generation, pictures, weights
from sprint_jax import config as config_lib
from sprint_jax.data import loader
from sprint_jax.diffusion import samplers
from sprint_jax.errors import UserError
from sprint_jax.evaluation.evaluate import Evaluator
from sprint_jax.training import loop, sprint_step, state, teacher_step
from sprint_jax.training.records import Records

TEACHER_FILE, STUDENT_FILE = "teacher.safetensors", "student.safetensors"
CONFIG_FILE, SUMMARY_FILE = "config.json", "summary.json"
STUDENT_STEPS = (1, 2, 4)


def _say(message):
    print(message, flush=True)


def run(config: config_lib.Config, workdir, say=_say):
    """Runs all stages and returns the summary (also written to summary.json)."""
    begin = time.perf_counter()
    workdir = pathlib.Path(workdir)
    with _claim(workdir):
        _write_config(config, workdir)
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})"
        say(f"sprint_jax on {devices}, jax {jax.__version__}, in {workdir}")
        records = Records(workdir)
        try:
            teacher = _teacher(config, workdir, records, say)
            student = _sprint(config, workdir, teacher, records, say)
            summary = _evaluate(config, workdir, teacher, student, records, begin, say)
        finally:
            records.close()
    say(f"done: pictures, metrics and summary.json are in {workdir}")
    say(f'next: python -m sprint_jax.sample --model={workdir} --prompt="a red circle left of a blue square" --steps=2 --out=pictures')
    return summary


@contextlib.contextmanager
def _claim(workdir):
    """Makes the work directory and holds it for this process."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write in {workdir} ({error.strerror}): choose another --workdir") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run is working in {workdir}: wait for it, or choose another --workdir") from None
        yield


def _write_config(config, workdir):
    """Records the resolved config; a directory made with another one is refused."""
    path = workdir / CONFIG_FILE
    tree = json.loads(json.dumps(config_lib.to_dict(config)))
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except json.JSONDecodeError:
            raise UserError(f"{path} is not a config of this project: choose another --workdir") from None
        differing = _differences(old, tree)
        if differing:
            name, was, now = differing[0]
            raise UserError(
                f"{workdir} was made with {name}={was}, now {now}: use the same config, or another --workdir"
            )
        return
    if any(child.name != ".lock" for child in workdir.iterdir()):
        raise UserError(f"{workdir} is not empty and not a run of this project: choose another --workdir")
    with files.whole(path) as partial:
        partial.write_text(json.dumps(tree, indent=2) + "\n")


def _differences(old, new):
    """[(dotted name, old, new)] of all leaves that differ."""
    a, b = weights.flatten(old), weights.flatten(new)
    names = sorted(a.keys() | b.keys())
    return [
        (f"config.{n}", a.get(n, "nothing"), b.get(n, "nothing")) for n in names if a.get(n) != b.get(n)
    ]


def _batches(config, batch):
    """step -> batch of training pictures."""
    codec, text_encoder = build.codec(config), build.text_encoder(config)
    return lambda step: loader.make_batch(
        step, seed=config.data.seed, batch=batch, size=config.data.size, codec=codec, text_encoder=text_encoder
    )


def _frozen_text(config):
    text, mask = build.text_encoder(config).encode([""])
    return {"null_text": text, "null_mask": mask}


def _abstract(model):
    return jax.eval_shape(model.init, jax.random.key(0))


def _teacher(config, workdir, records, say):
    """Parameters of the teacher: loaded, found finished, or trained (and fine-tuned) here."""
    model = build.teacher(config)
    t = config.teacher
    if t.pretrained:
        path = build.asset(t.pretrained)
        say(f"teacher: weights from {path}")
        return weights.load(path, _abstract(model))
    finished = workdir / TEACHER_FILE
    if finished.exists():
        say(f"teacher: done before, {finished}")
        return weights.load(finished, _abstract(model))
    base = build.base_teacher(config)
    start = lambda: teacher_step.start(base, jax.random.key(config.seed), borders=t.border_start)
    params = _train_teacher(config, "teacher", base, start, t.optimizer, t.steps, workdir, records, say)
    if build.needs_finetune(config):
        change = lambda: teacher_step.add_qk_norm(params, model, jax.random.key(config.seed))
        slower = t.finetune_lr / t.optimizer.lr
        optimizer = dataclasses.replace(t.optimizer, lr=t.finetune_lr, muon_lr=slower * t.optimizer.muon_lr)
        params = _train_teacher(config, "finetune", model, change, optimizer, t.finetune_steps, workdir, records, say)
    weights.save(finished, params)
    return params


def _train_teacher(config, name, model, start_params, optimizer, steps, workdir, records, say):
    t = config.teacher
    tx = state.optimizer(optimizer, steps)
    stage = loop.Stage(
        name=name, steps=steps,
        start=lambda frozen: teacher_step.init(start_params(), tx, t),
        functions=(teacher_step.make_step(model, tx, t, config.seed),),
        frozen={"null_text": _frozen_text(config)["null_text"]},
        batch=_batches(config, t.batch),
    )  # fmt: skip
    final = loop.train(stage, config.run, workdir, records, say)
    return final.ema if final.ema is not None else final.params


def _sprint(config, workdir, teacher, records, say):
    """Parameters of the student: found finished or distilled here."""
    nets, s = build.nets(config), config.sprint
    finished = workdir / STUDENT_FILE
    if finished.exists():
        say(f"sprint: done before, {finished}")
        return weights.load(finished, _abstract(nets.student))
    key = jax.random.key(config.seed + 1)

    def start(frozen):
        k_student, k_heads = jax.random.split(key)
        return sprint_step.init(sprint_step.student_params(frozen["teacher"], nets, k_student), nets, s, k_heads)

    stage = loop.Stage(
        name="sprint", steps=s.steps, start=start,
        functions=(
            sprint_step.make_generator_step(nets, s, config.seed + 1),
            sprint_step.make_discriminator_step(nets, s, config.seed + 1),
        ),
        frozen={"teacher": teacher, **_frozen_text(config)},
        batch=_batches(config, s.batch),
    )  # fmt: skip
    final = loop.train(stage, config.run, workdir, records, say)
    params = final.ema if final.ema is not None else final.params
    weights.save(finished, params)
    return params


def _evaluate(config, workdir, teacher, student, records, begin, say):
    """Pictures and scores of everything on the same held-out prompts and noise."""
    done = workdir / SUMMARY_FILE
    if done.exists():
        say(f"evaluation: done before, {done}")
        return json.loads(done.read_text())
    e = config.evaluation
    say(f"evaluation: {e.prompts} held-out prompts, pictures by {len(STUDENT_STEPS) + 2} samplers (each compiles first)")
    evaluator = Evaluator(
        seed=config.data.eval_seed, count=e.prompts, reference=e.reference, size=config.data.size
    )
    results = {"real": evaluator(evaluator.prompts.images)}
    sheets = {"real": evaluator.prompts.images}
    samplers_ = _samplers(config, teacher, student)
    encoder = build.text_encoder(config)
    bar = tqdm.tqdm(total=len(samplers_) * e.prompts, desc="evaluation", unit="picture", mininterval=1.0)
    for name, (sampler, params, guidance) in samplers_.items():
        images = generation.run(
            sampler, params, encoder, evaluator.prompts.texts, guidance=guidance,
            seed=config.data.eval_seed, batch=e.batch,
            say=lambda n, base=bar.n: bar.update(base + n - bar.n),
        )  # fmt: skip
        results[name], sheets[name] = evaluator(images), images
    bar.close()
    _save_sheets(config, workdir, sheets, records)
    summary = _summary(results, begin)
    with files.whole(done) as partial:
        partial.write_text(json.dumps(summary, indent=2) + "\n")
    say(_table(summary))
    return summary


def _samplers(config, teacher, student):
    """{score: (sampler, params, guidance)} of everything that is scored."""
    e, codec, shape = config.evaluation, build.codec(config), build.latent_shape(config)
    many = f"teacher_{e.teacher_steps}"
    guided = {
        name: generation.teacher_sampler(build.teacher(config), codec, shape, samplers.trig_times(steps))
        for name, steps in ((many, e.teacher_steps), ("teacher_1", 1))
    }
    chosen = {name: (sampler, teacher, e.teacher_guidance) for name, sampler in guided.items()}
    for steps in STUDENT_STEPS:
        times = samplers.scm_times(steps, e.schedule)
        sampler = generation.student_sampler(build.student(config), codec, shape, times)
        chosen[f"student_{steps}"] = (sampler, student, e.student_guidance)
    return chosen


def _save_sheets(config, workdir, sheets, records):
    files = {"real": "real", f"teacher_{config.evaluation.teacher_steps}": "teacher"}
    files |= {f"student_{n}": str(n) for n in STUDENT_STEPS}
    zoom = max(1, 96 // config.data.size)
    made = {}
    for name, suffix in files.items():
        sheet = pictures.grid(sheets[name][: config.evaluation.samples], columns=8)
        pictures.save(workdir / f"samples_{suffix}.png", sheet, zoom)
        made[f"samples_{suffix}"] = sheet
    records.images(config.sprint.steps, made)


def _summary(results, begin):
    return {
        "seconds": time.perf_counter() - begin,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "jax": jax.__version__,
        "commit": _commit(),
        "device": jax.devices()[0].device_kind,
        "scores": {name: r["score"] for name, r in results.items()},
        "tasks": {name: r["tasks"] for name, r in results.items()},
        "frechet": {name: r["frechet"] for name, r in results.items()},
    }


def _commit():
    """Commit of the source tree, with + where it has changes; "unknown" outside one."""
    here = pathlib.Path(__file__).parent
    git = lambda *words: subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
    try:
        commit = git("rev-parse", "HEAD")
        if commit.returncode:
            return "unknown"
        return commit.stdout.strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout else "")
    except FileNotFoundError:
        return "unknown"


def _table(summary):
    tasks = list(summary["tasks"]["real"])
    lines = ["", f"{'':12}" + "".join(f"{t.replace('_', ' '):>20}" for t in ("overall", *tasks, "Frechet"))]
    for name, score in summary["scores"].items():
        shares = [score, *(summary["tasks"][name].get(t, np.nan) for t in tasks)]
        lines.append(f"{name:12}" + "".join(f"{100 * s:19.1f}%" for s in shares) + f"{summary['frechet'][name]:20.4f}")
    return "\n".join(lines) + "\n"

"""Compare objectives on the embedded data at equal cost: 800 CPU-seconds a row.

    python -m experiments.bakeoff                        every missing row, one seed
    python -m experiments.bakeoff --rows=sprint,repair --seeds=0,1,2
    python -m experiments.bakeoff --render               only docs/results/objectives.md anew

A row is a card and a seed. Its student is scored after 400 and after 800 seconds of the process's
CPU time, compilation and stored rollouts included and scoring not, by its moving average: accuracy
and Fréchet distance on 768 prompts of the selection half, and diversity, in 1, 2 and 4 steps. Rows
are appended to docs/results/bakeoff.jsonl, so the comparison can be continued at any time; what is
missing there is listed in docs/results/objectives.md.
"""

import dataclasses
import datetime
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.harness import options as options_lib
from sprint_jax import build, config
from sprint_jax.evaluation.heldout import Evaluator
from sprint_jax.objectives.scm import Scm
from sprint_jax.runtime import cards, cli
from sprint_jax.storage import files, json_lines, revision
from sprint_jax.toy import diversity as diversity_lib
from sprint_jax.training import datasets, diversity, drawing, hosts, loop, pairs, sharding, stages
from sprint_jax.training import scores as scores_lib
from sprint_jax.training.records import Records

ROOT = pathlib.Path(__file__).parents[1]
ROWS = ROOT / "docs/results/bakeoff.jsonl"
PAGE = ROOT / "docs/results/objectives.md"
AT = (400.0, 800.0)  # CPU-seconds
STEPS = scores_lib.STUDENT_STEPS
_EVERY = 20  # updates between looks at the clock


def _sprint() -> Any:
    card: Any = cards.load("sprint:sprint")
    return card.phases.sprint


def _one(tree: Any, name: str, objective: dict[str, Any], *, steps: int, batch: int = 64) -> None:
    """Replace all student phases by one."""
    sprint: Any = _sprint()
    student = sprint.optimizers.student.to_dict()
    for other in [n for n in tree.order if tree.phases[n].network == "student"]:
        del tree.phases[other]
    tree.phases[name] = dict(
        network="student",
        seed=1,
        steps=steps,
        batch=batch,
        accumulate=1,
        ema=0.99,
        optimizers=dict(student=student),
        objective=objective,
    )
    tree.order = ("teacher", "finetune", "control", name)


def _rollouts(**values: Any) -> dict[str, Any]:
    card: Any = cards.load("sprint:shapes")
    return card.phases.regression.objective.to_dict() | values


def _fresh(**values: Any) -> dict[str, Any]:
    kept = ("guidance", "uncond_mask", "control_dropout", "logvar_start")
    route = ("route_steps", "route_order", "route_shift")
    return {n: v for n, v in _rollouts().items() if n in (*kept, *route)} | values


def _two(**values: Any) -> dict[str, Any]:
    """Return settings of a flow map on the embedded data."""
    times = dict(p_mean=0.0, p_std=1.4, states="data", velocity="teacher")
    shares = dict(diagonal=0.25, to_zero=0.5, from_noise=0.3)
    return _fresh(stored=0, distance_c=0.1) | times | shares | values


def _regression(tree: Any) -> None:
    tree.phases.regression.steps = 1000
    tree.phases.repair.steps = 0


def _scm(tree: Any) -> None:
    objective = _sprint().objective.to_dict()
    settings = {f.name: objective[f.name] for f in dataclasses.fields(Scm)}
    _one(tree, "scm", settings | dict(kind="scm", tangent_warmup=150), steps=2400, batch=32)


def _cmt(tree: Any, pairs: str = "ends") -> None:
    settings = _rollouts(kind="cmt", pairs=pairs)
    del settings["from_noise"]
    _one(tree, "cmt", settings, steps=1200, batch=16)


def _cmt_pairs(tree: Any) -> None:
    _cmt(tree, "all")
    _jumps(tree)


def _tbcm(tree: Any, **values: Any) -> None:
    card: Any = cards.load("sprint:sana_600m_tbcm")
    published = card.phases.tbcm.objective.to_dict()
    short = dict(tangent_warmup=150, tangent_final_start=750, tangent_final_steps=100)
    changes = dict(route_order=1, route_shift=1.6, logvar_gradient="head")
    settings = published | _fresh(**(short | changes | values))
    _one(tree, "tbcm", settings, steps=1000, batch=8)


def _tbcm2(tree: Any) -> None:
    _tbcm(tree, route_order=2, tangent_final=1.0)


def _eulerian(tree: Any, **values: Any) -> None:
    settings = _two(
        from_noise=0.0, kind="eulerian", tangent_warmup=150, tangent_c=0.1, logvar_gradient="head"
    )
    _one(tree, "eulerian", settings | values, steps=1600, batch=32)
    _jumps(tree)


def _meanflow(tree: Any) -> None:
    _eulerian(tree, velocity="data", diagonal=0.75)


def _lagrangian(tree: Any) -> None:
    settings = _two(
        kind="lagrangian", delta=0.05, heun=False, states="rollout", diagonal=0.0, stored=8192
    )
    _one(tree, "lagrangian", settings, steps=1600, batch=32)
    _jumps(tree)


def _semigroup(tree: Any) -> None:
    settings = _two(kind="semigroup", middle="uniform", diagonal=0.5)
    _one(tree, "semigroup", settings, steps=1600, batch=32)
    _jumps(tree)


def _jumps(tree: Any) -> None:
    """Give the student a second time. At the rates of the others maps that learn from themselves
    diverge: Eulerian after 250 updates, Lagrangian after 700.
    """
    tree.model.target_embed = True
    tree.evaluation.schedule = "even"
    for name in tree.order:
        phase = tree.phases[name]
        if phase.network == "student" and phase.objective.kind != "cmt":
            student = phase.optimizers.student
            student.update(lr=0.2 * student.lr, muon_lr=0.2 * student.muon_lr)


def _scored_alike(tree: Any) -> None:
    """Leave a preset as it is."""


def _dmd(tree: Any) -> None:
    """Put distribution matching in the place of repair: the time does not suffice for both."""
    del tree.phases.repair
    tree.order = tuple(name for name in tree.order if name != "repair")
    tree.phases.dmd.steps = 2400


# {card: (preset of configs/sprint.py, changes)}.
CARDS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "sprint": ("sprint", _scored_alike),
    "repair": ("shapes", _scored_alike),
    "dmd": ("dmd", _dmd),
    "dmd2": ("dmd2", _scored_alike),
    "rcm": ("rcm", _scored_alike),
    "regression": ("shapes", _regression),
    "scm": ("sprint", _scm),
    "cmt": ("shapes", _cmt),
    "cmt_pairs": ("shapes", _cmt_pairs),
    "tbcm": ("sprint", _tbcm),
    "tbcm2": ("sprint", _tbcm2),
    "eulerian": ("sprint", _eulerian),
    "meanflow": ("sprint", _meanflow),
    "lagrangian": ("sprint", _lagrangian),
    "semigroup": ("sprint", _semigroup),
}


def card(name: str, seed: int) -> config.Config:
    """Return the config of a row."""
    preset, change = CARDS[name]
    tree: Any = cards.load(f"sprint:{preset}")
    change(tree)
    tree.seed = seed
    tree.evaluation.update(prompts=768, split="selection", diversity=64)
    # Checkpoints would never be read.
    tree.run.update(preview_every=_EVERY, log_every=_EVERY, checkpoint_every=10**6)
    return config.parse(tree)


class _Enough(Exception):
    """The row has had its time."""


class _Clock:
    """CPU time of the process without scoring, and what was scored when."""

    def __init__(self, c: config.Config, data: Any):
        self._c, self._data, self._begin, self._aside = c, data, time.process_time(), 0.0
        self.found: dict[str, dict[str, Any]] = {}

    def seconds(self) -> float:
        """Return the CPU-seconds that count."""
        return time.process_time() - self._begin - self._aside

    def look(self, params: Any, *, last: bool = False) -> None:
        """Score parameters where one of the times has passed. Raises _Enough after the last."""
        now = self.seconds()
        due = [at for at in AT if str(round(at)) not in self.found and (last or now >= at)]
        if not due:
            return
        begin = time.process_time()
        scores = score(self._c, self._data, params) | {"cpu_seconds": round(now, 1)}
        self._aside += time.process_time() - begin
        self.found |= {str(round(at)): scores for at in due}
        print(f"  {now:.0f} CPU-s: {_line(scores)}", flush=True)
        if due[-1] == AT[-1]:
            raise _Enough


def score(c: config.Config, data: Any, params: Any) -> dict[str, Any]:
    """Return {"score", "frechet", "arrangements"} of a student, by steps."""
    e = c.evaluation
    heldout = data.heldout(e.prompts, e.reference)
    evaluator, asked = Evaluator(heldout), diversity.captions(c)
    found: dict[str, Any] = {"score": {}, "frechet": {}, "arrangements": {}}
    for steps in STEPS:
        images = drawing.student(c, data, params, heldout.cond, steps=steps)
        result = evaluator(images)
        drawn = diversity.of_student(c, data, params, asked, steps=steps)
        found["score"][str(steps)] = round(result["score"], 4)
        found["frechet"][str(steps)] = round(result["frechet"], 5)
        number = diversity_lib.figures(drawn, asked)["arrangements"]
        found["arrangements"][str(steps)] = round(number, 3)
    return found


def measure(name: str, seed: int) -> dict[str, Any]:
    """Train and score one row."""
    c = card(name, seed)
    data: Any = datasets.open_dataset(c, print)
    teacher = build.teacher_weights(c.teacher.pretrained, build.teacher(c))
    clock, mesh, begin = _Clock(c, data), sharding.mesh(1, 1), None
    blank = np.zeros((8, 8, 3), np.uint8)
    updates: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        try:
            for phase in config.active(c):
                stage = stages.make(c, phase, data, teacher=teacher, begin=begin)
                if c.phases[phase].objective.needs().stored:
                    stage = pairs.feed(stage, c, data, teacher, workdir, print)

                def look(params, phase=phase):
                    updates[phase] = updates.get(phase, -_EVERY) + _EVERY
                    clock.look(params)
                    return blank

                stage = dataclasses.replace(stage, preview=look)
                final = loop.train(stage, c.run, mesh, workdir, Records(None), print)
                begin = hosts.to_host(stage.result(final))
                updates[phase] = c.phases[phase].steps
            clock.look(begin, last=True)
        except _Enough:
            pass
    return {
        "card": name,
        "seed": seed,
        "updates": updates,
        "at": clock.found,
        "date": f"{datetime.date.today()}",
        "commit": revision.commit(),
        "jax": jax.__version__,
    }


def _line(scores: dict[str, Any]) -> str:
    shares = " / ".join(f"{100 * scores['score'][str(n)]:.1f}" for n in STEPS)
    return f"{shares} %, Fréchet {scores['frechet']['1']:.4f}, {scores['arrangements']['1']:.2f}"


def render(rows: list[dict[str, Any]]) -> str:
    """Return docs/results/objectives.md."""
    lines = [
        "# Objectives at equal cost",
        "",
        "```bash",
        "python -m experiments.bakeoff",
        "```",
        "",
        "Every row had 800 seconds of CPU time on two shared cores, compilation and stored",
        "rollouts included. Scores are those of the moving average on 768 prompts of the selection",
        "half: right images in 1 / 2 / 4 steps, Fréchet distance and effective number of",
        "arrangements of a caption in one step. One seed proves little: runs differ by a point and",
        "more. Settings of most cards are first guesses, those of `sprint` and `repair` were",
        "searched. Flow maps have a fifth of the others' learning rates: at those they diverged.",
        "",
        "| card | seed | updates | 400 CPU-s | 800 CPU-s | Fréchet | arrangements | commit, date |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = list(CARDS)
    for row in sorted(rows, key=lambda r: (order.index(r["card"]), r["seed"])):
        early, late = (row["at"][str(round(at))] for at in AT)
        share = lambda s: " / ".join(f"{100 * s['score'][str(n)]:.1f}" for n in STEPS)
        counts = ", ".join(f"{name} {count}" for name, count in row["updates"].items())
        lines.append(
            f"| `{row['card']}` | {row['seed']} | {counts} | {share(early)} | {share(late)} | "
            f"{late['frechet']['1']:.4f} | {late['arrangements']['1']:.2f} | "
            f"{row['commit'][:7]}, {row['date']} |"
        )
    done = {(row["card"], row["seed"]) for row in rows}
    missing = [name for name in CARDS if (name, 0) not in done]
    lines += ["", "Missing rows:", "", *(f"- `{name}`" for name in missing or ["none"]), ""]
    return "\n".join(lines)


def main() -> None:
    """Measure the rows that are missing, and render the page."""
    parser = options_lib.parser(__doc__)
    parser.add_argument("--rows", default=",".join(CARDS), help="names of cards")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--render", action="store_true", help="only write the page")
    options = parser.parse_args()
    names, seeds = options.rows.split(","), [int(s) for s in options.seeds.split(",")]
    for name in names:
        if name not in CARDS:
            raise SystemExit(f"--rows={name}: use names of {', '.join(CARDS)}")
    for seed in seeds:
        for name in names if not options.render else ():
            if any(r["card"] == name and r["seed"] == seed for r in _rows()):
                print(f"{name}, seed {seed}: done before")
                continue
            print(f"{name}, seed {seed}:", flush=True)
            json_lines.append(ROWS, measure(name, seed))
            files.write_text(PAGE, render(_rows()))
    files.write_text(PAGE, render(_rows()))
    print(f"wrote {PAGE}")


def _rows() -> list[dict[str, Any]]:
    return json_lines.rows(ROWS, ("card", "seed")) if ROWS.exists() else []


if __name__ == "__main__":
    with cli.user_errors():
        main()

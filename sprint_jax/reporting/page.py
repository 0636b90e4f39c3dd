"""report.html of a run: one page to look at, from whatever the work directory holds so far.

Images are part of the page, except for large ones, which the page links to. Plots are SVG.
"""

import base64
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from sprint_jax.errors import UserError
from sprint_jax.reporting import plots, rows
from sprint_jax.reporting.rows import Row
from sprint_jax.storage import files, json_files, run_files

_TEMPLATE = "page.html"
_EMBEDDED = 2**20  # bytes of an image; larger ones stay files of their own
_PARTS = 4  # parts of a run, each a line where values are shown by time
_GRIDS = {
    "samples_control": "sketches, the condition",
    "samples_real": "real images",
    "samples_teacher": "teacher",
    "samples_1": "student, 1 step",
    "samples_2": "student, 2 steps",
    "samples_4": "student, 4 steps",
    "samples_freehand_sketches": "rough sketches of other images",
    "samples_freehand": "student, 1 step, by the rough sketches",
}
_BY_TIME = {
    "loss": "flow loss",
    "scm": "sCM loss",
    "error": "sCM error before weighting",
    "tangent_norm": "norm of the tangent",
    "logvar": "learned log-variance",
}
# Plots against the step: (title, {column: label}, whether the axis is logarithmic).
_OVER_STEPS = (
    ("losses", {"loss": "total", "scm": "sCM", "adv": "adversarial"}, False),
    ("sCM error before weighting", {"error": "error"}, True),
    ("discriminator loss", {"disc": "hinge"}, False),
)
_NORMS = {
    "grad_norm": "gradient",
    "disc_grad_norm": "gradient of the heads",
    "tangent_norm": "tangent",
}


@dataclasses.dataclass(frozen=True)
class _Image:
    """An image of the page. source: of its <img>, the bytes themselves or a path."""

    source: str
    caption: str


@dataclasses.dataclass(frozen=True)
class _Cell:
    """A score. share: what a bar behind it shows, in [0, 1]; None for no bar."""

    text: str
    share: float | None = None


@dataclasses.dataclass(frozen=True)
class _Scores:
    """The table of scores: titles of its columns, and the cells of each model."""

    heads: Sequence[str]
    rows: Mapping[str, Sequence[_Cell]]


@dataclasses.dataclass(frozen=True)
class _Phase:
    """A phase of training. sampling: how the previews are drawn. plots: <svg> elements."""

    name: str
    sampling: str
    previews: Sequence[_Image]
    plots: Sequence[str]


def write(run_dir: str | os.PathLike) -> pathlib.Path:
    """Write run_dir/report.html of a run, finished or not, and return its path.

    Raises UserError if the directory is no run or cannot be written.
    """
    run_dir = pathlib.Path(run_dir)
    path = run_dir / run_files.REPORT
    page = render(run_dir)
    try:
        files.write_text(path, page)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): make the directory writable"
        ) from None
    return path


def render(run_dir: str | os.PathLike) -> str:
    """Return the page of a run. Raises UserError if the directory is no run."""
    run_dir = pathlib.Path(run_dir)
    try:
        return _render(run_dir)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        names = f"{run_files.CONFIG}, {run_files.SUMMARY} and {run_files.METRICS}"
        raise UserError(
            f"{names} of {run_dir} are not those of one run ({type(error).__name__}: {error}): "
            "restore them"
        ) from None


def _render(run_dir: pathlib.Path) -> str:
    config = _json(run_dir / run_files.CONFIG)
    if config is None:
        raise UserError(f"{run_dir} has no {run_files.CONFIG}: give the --workdir of a run")
    summary = _json(run_dir / run_files.SUMMARY)
    phases, parts = rows.read(run_dir), _json(run_dir / run_files.PHASES)
    grids = [(run_dir / f"{name}.png", caption) for name, caption in _GRIDS.items()]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(_TEMPLATE).render(
        name=run_dir.resolve().name,
        facts=_facts(config, summary, phases),
        grids=[_image(run_dir, path, caption) for path, caption in grids if path.exists()],
        scores=_scores(summary) if summary and summary.get("frechet") else None,
        parts=_parts(parts or {}),
        phases=[_phase(run_dir, config, name, found) for name, found in phases.items()],
        config=json.dumps(config, indent=2),
    )


def _json(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        found = json_files.read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): restore it from the run") from None
    if not isinstance(found, dict):
        raise UserError(f"cannot read {path} (no JSON object): restore it from the run")
    return found


def _facts(config, summary, phases) -> dict[str, str]:
    done = [_progress(config, name, found) for name, found in phases.items()]
    facts = {
        "state": "finished" if summary else "not finished",
        "training": ", ".join(done) or "none yet",
    }
    rejected = {name: int(found[-1].get("rejected", 0)) for name, found in phases.items()}
    if any(rejected.values()):
        facts["updates dropped, not finite"] = ", ".join(
            f"{name} {count}" for name, count in rejected.items() if count
        )
    if summary:
        facts |= {
            "minutes of the last command": f"{summary['seconds'] / 60:.1f}",
            "peak memory of the host": f"{summary['peak_memory_bytes'] / 1e9:.2f} GB",
            "device": summary["device"],
            "jax": summary["jax"],
            "commit": summary["commit"],
        }
    return facts


def _parts(parts) -> dict[str, tuple[str, str]]:
    """Return {part: (minutes, what the student drew right after it)}."""
    return {
        name: (
            f"{part['seconds'] / 60:.1f}",
            f"{100 * part['score']:.1f} %" if "score" in part else "",
        )
        for name, part in parts.items()
    }


def _progress(config, name, found) -> str:
    """Return how far a phase is, and of how many steps if the config has the phase."""
    steps = config.get("phases", {}).get(name, {}).get("steps")
    return f"{name} {found[-1]['step']}" + (f" of {steps} steps" if steps else " steps")


def _image(run_dir, path, caption) -> _Image:
    if path.stat().st_size > _EMBEDDED:
        return _Image(str(path.relative_to(run_dir)), caption)
    encoded = base64.b64encode(path.read_bytes()).decode()
    return _Image(f"data:image/png;base64,{encoded}", caption)


def _scores(summary) -> _Scores:
    """Return shares, with a bar behind each, and distances."""
    tasks = list(summary["tasks"].get("real", ()))
    shares = ["whole caption", *(t.replace("_", " ") for t in tasks)] if tasks else []
    agreement = summary.get("agreement", {})  # with a ControlNet
    table = {}
    for name, distance in summary["frechet"].items():
        cells = []
        if tasks:
            found = summary["tasks"][name]
            cells += [_share(summary["scores"][name])]
            cells += [_share(found.get(task, math.nan)) for task in tasks]
        cells.append(_Cell(f"{distance:.4f}"))
        if agreement:
            cells.append(_share(agreement[name]))
        table[name] = cells
    heads = (*shares, "Fréchet", *(["edges as asked"] if agreement else []))
    return _Scores(heads, table)


def _share(value: float) -> _Cell:
    return _Cell("none") if math.isnan(value) else _Cell(f"{100 * value:.1f} %", value)


def _phase(run_dir, config, name, found) -> _Phase:
    previews = sorted(run_dir.glob(f"{run_files.PREVIEWS}/{name}_*.png"))
    network = config.get("phases", {}).get(name, {}).get("network")
    steps = f"{config['evaluation']['teacher_steps']} steps, guided"
    return _Phase(
        name,
        "one step" if network == "student" else steps,
        [_image(run_dir, p, f"step {int(p.stem.rpartition('_')[2])}") for p in previews],
        [*_over_steps(found), *_over_time(found)],
    )


def _over_steps(found: list[Row]) -> list[str]:
    """Return plots against the step, those that have a line."""
    by_module = lambda norm: {f"{norm}/{name}": name for name in rows.names(found, norm)}
    plotted = [
        *((title, _lines(found, columns), log) for title, columns, log in _OVER_STEPS),
        ("discriminator margin by head: real less fake", _margins(found), False),
        ("norms", _lines(found, _NORMS), True),
        ("gradient norm by module", _lines(found, by_module("grad_norm")), True),
        ("gradient norm of the heads by module", _lines(found, by_module("disc_grad_norm")), True),
    ]
    return [
        plots.plot(title, lines, x_label="step", log=log) for title, lines, log in plotted if lines
    ]


def _lines(found: list[Row], columns: Mapping[str, str]) -> list[plots.Line]:
    """Return a line for each column {name: label} that the rows have."""
    lines = (plots.Line(label, *rows.column(found, name)) for name, label in columns.items())
    return [line for line in lines if line.x]


def _margins(found: list[Row]) -> list[plots.Line]:
    """Return a line for each head of the discriminator, in the order of its blocks."""
    heads = {name.split("/")[0] for row in found for name in row if name.startswith("head_")}
    lines = []
    for head in sorted(heads, key=lambda name: int(name.removeprefix("head_"))):
        steps, real = rows.column(found, f"{head}/real")
        _, fake = rows.column(found, f"{head}/fake")
        margin = [r - f for r, f in zip(real, fake, strict=True)]
        lines.append(plots.Line(f"block {head.removeprefix('head_')}", steps, margin))
    return lines


def _over_time(found: list[Row]) -> list[str]:
    """Return plots against time t, with a line for each part of the run."""
    top, label = rows.top(found), "t, flow time from data (0) to noise (1)"
    if top > 1:
        label = "t, angle from data (0) to noise (π/2)"
    timed = [row for row in found if any(key.startswith("by_time/") for key in row)]
    drawn = []
    for value in (v for v in _BY_TIME if v in rows.timed(timed)):
        lines = [
            plots.Line(f"steps to {part[-1]['step']}", *rows.by_time(part, value, top))
            for part in rows.parts(timed, _PARTS)
        ]
        log = value in ("error", "tangent_norm")
        drawn.append(plots.plot(f"{_BY_TIME[value]} by time", lines, x_label=label, log=log))
    return drawn

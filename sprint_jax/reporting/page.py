"""report.html of a run: one page to look at, from whatever the work directory holds so far.

Pictures are part of the page, but for large ones, which it links to; plots are SVG.
"""

import base64
import html
import json
import math
import pathlib

from sprint_jax.errors import UserError
from sprint_jax.reporting import plots, rows
from sprint_jax.storage import files, run_files

_EMBEDDED = 2**20  # bytes of a picture; larger ones stay files of their own
_PARTS = 4  # a run is cut into so many parts where values are shown by time
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1340px; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc }
.row { display: flex; flex-wrap: wrap; gap: 14px } figure { margin: 0 0 .6em } figcaption { color: #555; font-size: .9em }
img { max-width: 100%; image-rendering: pixelated } table { border-collapse: collapse } td, th { padding: 2px 10px; text-align: right }
th:first-child, td:first-child { text-align: left } tr + tr { border-top: 1px solid #eee } svg { font-family: inherit }
pre { background: #f6f6f6; padding: 1em; overflow: auto }
"""
_SHEETS = {
    "samples_control": "sketches, the condition",
    "samples_real": "real pictures",
    "samples_teacher": "teacher",
    "samples_1": "student, 1 step",
    "samples_2": "student, 2 steps",
    "samples_4": "student, 4 steps",
    "samples_freehand_sketches": "rough sketches of other pictures",
    "samples_freehand": "student, 1 step, by the rough sketches",
}
_BY_TIME = {
    "loss": "flow loss",
    "scm": "sCM loss",
    "error": "sCM error before weighting",
    "tangent_norm": "norm of the tangent",
    "logvar": "learned log-variance",
}


def write(run_dir):
    """Renders run_dir/report.html, finished run or not, and returns its path. Raises UserError for no run."""
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


def render(run_dir):
    """The page as text."""
    run_dir = pathlib.Path(run_dir)
    config, summary = _json(run_dir / run_files.CONFIG), None
    if config is None:
        raise UserError(f"{run_dir} has no {run_files.CONFIG}: give the --workdir of a run")
    summary = _json(run_dir / run_files.SUMMARY)
    stages = rows.read(run_dir)
    parts = [f"<h1>{html.escape(run_dir.resolve().name)}</h1>", _facts(config, summary, stages)]
    parts += _sheets(run_dir) + (_scores(summary) if summary else [])
    parts += [
        part for stage, found in stages.items() for part in _stage(run_dir, config, stage, found)
    ]
    if not stages:
        parts.append("<p>No row of metrics is written yet.</p>")
    parts.append(
        f"<h2>Config</h2><details><summary>all keys</summary><pre>{html.escape(json.dumps(config, indent=2))}</pre></details>"
    )
    head = f'<meta charset="utf-8"><title>{html.escape(run_dir.resolve().name)}</title><style>{_STYLE}</style>'
    return "\n".join(
        [f'<!doctype html><html lang="en"><head>{head}</head><body>', *parts, "</body></html>", ""]
    )


def _json(path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): restore it from the run") from None


def _done(config, stage, found):
    """How far a stage is, and of how many steps where the config says so."""
    section, key = {"finetune": ("teacher", "finetune_steps")}.get(stage, (stage, "steps"))
    steps = config.get(section, {}).get(key)
    return f"{stage} {found[-1]['step']}" + (f" of {steps} steps" if steps else " steps")


def _facts(config, summary, stages):
    done = [_done(config, stage, found) for stage, found in stages.items()]
    facts = {
        "state": "finished" if summary else "not finished",
        "training": ", ".join(done) or "none yet",
    }
    rejected = {stage: int(found[-1].get("rejected", 0)) for stage, found in stages.items()}
    if any(rejected.values()):
        facts["updates dropped, not finite"] = ", ".join(
            f"{stage} {n}" for stage, n in rejected.items() if n
        )
    if summary:
        facts |= {
            "minutes of the last command": f"{summary['seconds'] / 60:.1f}",
            "peak memory of the host": f"{summary['peak_memory_bytes'] / 1e9:.2f} GB",
            "device": summary["device"],
            "jax": summary["jax"],
            "commit": summary["commit"],
        }
    cells = (
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>"
        for k, v in facts.items()
    )
    return f"<table>{''.join(cells)}</table>"


def _picture(run_dir, path, caption):
    if path.stat().st_size <= _EMBEDDED:
        source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    else:
        source = str(path.relative_to(run_dir))
    return f'<figure><img src="{html.escape(source)}" alt="{html.escape(caption)}"><figcaption>{html.escape(caption)}</figcaption></figure>'


def _sheets(run_dir):
    found = [(run_dir / f"{name}.png", caption) for name, caption in _SHEETS.items()]
    made = [_picture(run_dir, path, caption) for path, caption in found if path.exists()]
    return (
        [
            "<h2>Held-out prompts, the same noise in each sheet</h2>",
            '<div class="row">',
            *made,
            "</div>",
        ]
        if made
        else []
    )


def _scores(summary):
    """Shares, with a bar behind each, and distances."""
    if not summary["frechet"]:
        return []
    tasks = list(summary["tasks"].get("real", ()))
    shares = ["whole caption", *(t.replace("_", " ") for t in tasks)] if tasks else []
    agreement = summary.get("agreement", {})  # with a ControlNet
    heads = (*shares, "Fréchet", *(["edges as asked"] if agreement else []))
    lines = ["<tr><th></th>" + "".join(f"<th>{html.escape(c)}</th>" for c in heads) + "</tr>"]
    for name, distance in summary["frechet"].items():
        values = (
            [summary["scores"][name], *(summary["tasks"][name].get(t, math.nan) for t in tasks)]
            if tasks
            else []
        )
        edges = _share(agreement[name]) if agreement else ""
        lines.append(
            f"<tr><td>{html.escape(name)}</td>{''.join(map(_share, values))}<td>{distance:.4f}</td>{edges}</tr>"
        )
    return ["<h2>Scores</h2>", f"<table>{''.join(lines)}</table>"]


def _share(value):
    if math.isnan(value):
        return "<td>none</td>"
    bar = f"background: linear-gradient(to right, #cfe6f5 {100 * value:.1f}%, transparent 0)"
    return f'<td style="{bar}">{100 * value:.1f} %</td>'


def _stage(run_dir, config, stage, found):
    strips = sorted(run_dir.glob(f"{run_files.PREVIEWS}/{stage}_*.png"))
    parts = [f"<h2>{html.escape(stage)}</h2>"]
    if strips:
        how = (
            "one step"
            if stage == "sprint"
            else f"{config['evaluation']['teacher_steps']} steps, guided"
        )
        parts.append(
            f"<p>The first held-out prompts, always the same noise, after so many steps of training ({how}):</p>"
        )
        parts += [
            _picture(run_dir, path, f"step {int(path.stem.rpartition('_')[2])}") for path in strips
        ]
    parts += ['<div class="row">', *_over_steps(found), *_over_time(stage, found), "</div>"]
    return parts


def _lines(found, named):
    """[Line] of the columns {name: label} that are there."""
    return [
        plots.Line(label, *rows.column(found, name))
        for name, label in named.items()
        if rows.column(found, name)[0]
    ]


def _over_steps(found):
    """Plots against the step."""
    heads = sorted(
        {n.split("/")[0] for row in found for n in row if n.startswith("head_")},
        key=lambda n: int(n[5:]),
    )
    margins = []
    for head in heads:
        steps, real = rows.column(found, f"{head}/real")
        _, fake = rows.column(found, f"{head}/fake")
        margins.append(
            plots.Line(f"block {head[5:]}", steps, [r - f for r, f in zip(real, fake, strict=True)])
        )
    modules = lambda prefix: _lines(
        found, {f"{prefix}/{name}": name for name in rows.names(found, prefix)}
    )
    wanted = [
        ("losses", _lines(found, {"loss": "total", "scm": "sCM", "adv": "adversarial"}), False),
        ("sCM error before weighting", _lines(found, {"error": "error"}), True),
        ("discriminator loss", _lines(found, {"disc": "hinge"}), False),
        ("discriminator margin by head: real less fake", margins, False),
        (
            "norms",
            _lines(
                found,
                {
                    "grad_norm": "gradient",
                    "disc_grad_norm": "gradient of the heads",
                    "tangent_norm": "tangent",
                },
            ),
            True,
        ),
        ("gradient norm by module", modules("grad_norm"), True),
        ("gradient norm of the heads by module", modules("disc_grad_norm"), True),
    ]
    return [
        plots.plot(title, lines, x_label="step", log=log) for title, lines, log in wanted if lines
    ]


def _over_time(stage, found):
    """Plots against time t, a line for each part of the run."""
    made = []
    label = (
        "t, angle from data (0) to noise (π/2)"
        if rows.is_angle(stage)
        else "t, flow time from data (0) to noise (1)"
    )
    timed = [row for row in found if any(key.startswith("by_time/") for key in row)]
    for name in (n for n in _BY_TIME if n in rows.timed(timed)):
        lines = []
        for part in rows.parts(timed, _PARTS):
            lines.append(
                plots.Line(f"steps to {part[-1]['step']}", *rows.by_time(stage, part, name))
            )
        made.append(
            plots.plot(
                f"{_BY_TIME[name]} by time",
                lines,
                x_label=label,
                log=name in ("error", "tangent_norm"),
            )
        )
    return made

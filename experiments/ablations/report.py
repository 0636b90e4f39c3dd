"""The report of a suite: a markdown file with a table for each of the paper's, its verdicts and a
plot.

Everything is made from recorded rows, so a report can be rendered again at any time.
"""

import math
import pathlib
import textwrap
import urllib.parse

from experiments.ablations import grid, plots, verdict
from sprint_jax.storage import files

NAMES = {
    "score": "whole caption correct",
    "frechet": "Fréchet",
    "grad_norm": "gradient norm",
    "tangent_norm": "tangent norm",
}
_LOGARITHMIC = ("grad_norm", "tangent_norm", "frechet")


def write(path, rows, suite: grid.Suite, scale: grid.Scale):
    """Write the markdown file `path`, and its plots into the folder of the same name beside it.

    rows: of results.jsonl. Rows of runs that the suite's tables do not show are left out. A table
    without any result is named as missing.
    """
    shown = {r.name for r in grid.runs_of(suite.tables)}
    rows = [row for row in rows if row["run"] in shown]
    path = pathlib.Path(path)
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    lines, verdicts = [], []
    for t in suite.tables:
        part, found = _section(t, rows, folder)
        lines += part
        verdicts += found
    files.write_text(
        path, "\n".join([*_head(rows, suite, scale), *_overview(verdicts), *lines]).rstrip() + "\n"
    )


def values(rows, run: str, metric: str) -> list[float]:
    """Return a metric of a run over its seeds, in the seeds' order; empty where there is none."""
    found = {
        row["seed"]: row["metrics"][metric]
        for row in rows
        if row["run"] == run and metric in row["metrics"]
    }
    return [found[seed] for seed in sorted(found)]


def judge(t: grid.Table, rows) -> list[tuple]:
    """Return [(metric, better, worse, Verdict)] of all claims whose two rows both have results."""
    by_label = {row.label: row for row in t.rows}
    found = []
    for base in t.metrics:
        for steps in t.steps or ("",):
            for first, second in t.claims:
                better, worse = _directed(t, base, by_label[first], by_label[second])
                if better is None or worse is None:
                    continue
                a, b = (
                    _scale(base, values(rows, r.run, base + (r.metric or steps)))
                    for r in (better, worse)
                )
                if a and b:
                    check = verdict.equal if t.rule == "equal" else verdict.compare
                    found.append(
                        (
                            base + steps,
                            better.label,
                            worse.label,
                            check(a, b, higher=base in grid.HIGHER),
                        )
                    )
    return found


def _directed(t, metric, first, second):
    """Return the two rows of a claim as (better, worse) for a metric.

    Both are None where the paper has no numbers.
    """
    if t.rule != "paper":
        return first, second
    a, b = ((r.clip if metric == "score" else r.fid) for r in (first, second))
    if a is None or b is None or a == b:
        return None, None
    return (first, second) if (a > b) == (metric == "score") else (second, first)


def _scale(metric, numbers):
    """Return the numbers, of norms their logarithms: the paper compares norms by factors."""
    return (
        [math.log10(n) if n > 0 else -math.inf for n in numbers]
        if metric in ("grad_norm", "tangent_norm")
        else numbers
    )


def _section(t, rows, folder):
    """Return (lines, verdicts) of one table."""
    lines = [f"## {t.title}", "", textwrap.fill(t.note, 100), ""]
    columns = [(base, base + steps, steps) for base in t.metrics for steps in (t.steps or ("",))]
    columns = [
        c for c in columns if any(values(rows, r.run, c[0] + (r.metric or c[2])) for r in t.rows)
    ]
    if not columns:
        return [*lines, "No results yet.", ""], []
    paper = any(r.fid is not None for r in t.rows)
    head = [
        "",
        *(_title(base, steps) for base, _, steps in columns),
        "seeds",
        *(("paper: FID", "paper: CLIP") if paper else ()),
    ]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in t.rows:
        numbers = [values(rows, r.run, base + (r.metric or steps)) for base, _, steps in columns]
        cells = [
            r.label,
            *(_cell(base, n) for (base, _, _), n in zip(columns, numbers, strict=True)),
        ]
        cells += [str(max(map(len, numbers)))]
        if paper:
            cells += [_number(r.fid), _number(r.clip)]
        lines.append("| " + " | ".join(cells) + " |")
    dropped = {r.label: int(sum(values(rows, r.run, "rejected"))) for r in t.rows}
    if any(dropped.values()):
        lines += [
            "",
            "Updates dropped as not finite, all seeds: "
            + ", ".join(f"{k} {n}" for k, n in dropped.items() if n)
            + ".",
        ]
    verdicts = judge(t, rows)
    lines += ["", *_verdict_lines(t, verdicts), ""]
    groups = [
        (
            _title(base, steps),
            base in _LOGARITHMIC,
            [(r.label, values(rows, r.run, base + (r.metric or steps))) for r in t.rows],
        )
        for base, _, steps in columns
    ]
    plots.save(folder / f"{t.name}.png", plots.dots(groups))
    lines += [f"![{t.title}]({urllib.parse.quote(folder.name)}/{t.name}.png)", ""]
    return lines, [(t, *found) for found in verdicts]


def _verdict_lines(t, verdicts):
    if not verdicts:
        return ["Nothing to judge yet."]
    relation = {"equal": "equals", "better": "better than", "paper": "better than"}[t.rule]
    lines = [
        "| metric | claim | difference ± standard error | verdict | seeds that would tell |",
        "|---|---|---|---|---|",
    ]
    for metric, better, worse, v in verdicts:
        lines.append(
            f"| {_metric_title(metric)} | {better} {relation} {worse} | {_difference(metric, v)} | "
            f"{v.word} | "
            f"{v.seeds or f'more than {verdict.MOST_SEEDS}' if not math.isnan(v.error) else ''} |"
        )
    return lines


def _difference(metric, v):
    if metric in ("grad_norm", "tangent_norm"):
        return f"factor {10**v.difference:.3g}" + (
            "" if math.isnan(v.error) else f" (× or ÷ {10**v.error:.2f})"
        )
    scale, unit, digits = (100, " points", 1) if metric.startswith("score") else (1, "", 4)
    error = "" if math.isnan(v.error) else f" ± {scale * v.error:.{digits}f}"
    return f"{scale * v.difference:+.{digits}f}{error}{unit}"


def _cell(metric, numbers):
    if not numbers:
        return ""
    mean, error = verdict.summary(numbers)
    scale, unit, form = {"score": (100, " %", ".1f"), "frechet": (1, "", ".4f")}.get(
        metric, (1, "", ".3g")
    )
    return (
        f"{scale * mean:{form}}"
        + ("" if math.isnan(error) else f" ± {scale * error:{form}}")
        + unit
    )


def _number(value):
    return "" if value is None else f"{value:.2f}"


def _title(metric, steps):
    return NAMES[metric] + (f", {steps} step{'s' if steps != '1' else ''}" if steps else "")


def _metric_title(metric):
    base = metric.rstrip("0123456789")
    return _title(base, metric[len(base) :])


def _overview(verdicts):
    """Return lines that count how the claims of each table came out."""
    if not verdicts:
        return []
    words = (verdict.AGREES, verdict.DISAGREES, verdict.UNRESOLVED)
    lines = ["## At a glance", "", "| table | " + " | ".join(words) + " |", "|---|---|---|---|"]
    for title in dict.fromkeys(v[0].title for v in verdicts):
        found = [v[-1].word for v in verdicts if v[0].title == title]
        lines.append(f"| {title} | " + " | ".join(str(found.count(w)) for w in words) + " |")
    return [*lines, ""]


def _head(rows, suite, scale):
    # A tree that was changed since its commit has a + behind it.
    commits = (
        ", ".join(sorted({row["commit"][:7] + "+" * row["commit"].endswith("+") for row in rows}))
        or "none"
    )
    devices = ", ".join(sorted({row["device"] for row in rows})) or "none"
    minutes = sum(row["seconds"] for row in rows) / 60
    command = f"python -m experiments.ablations --suite={suite.name} --scale={scale.name}"
    return [
        f"# {suite.title}",
        "",
        *_paragraph(
            f"`{command}`: {len(rows)} runs, {minutes:.0f} minutes, device {devices}, jax "
            f"{', '.join(sorted({row['jax'] for row in rows}))}, commit {commits}."
        ),
        f"Card `configs/sprint.py:{scale.preset}` with",
        "",
        *(_setting(name, value) for name, value in scale.base.items()),
        "",
        "and for the short trainings of Figure 3",
        "",
        *(_setting(name, value) for name, value in scale.gradients.items()),
        *(line for size, changes in scale.sizes.items() for line in _size(size, changes)),
        "",
        *_paragraph(
            f"""
            Everything is varied around the toy baseline, which differs from the published recipe:
            lambda is 5 (published 0.5), P_mean and P_std are -0.4 and 1.4 (0.0 or 0.2, and 1.6),
            the optimizer is Muon (CAME), the tangent warm-up is H = 300 of
            {scale.base["phases.sprint.steps"]} updates (4000 of 20 000), and the batch is small. A
            row says what a change does here. The verdict says whether that agrees with the paper.
            """
        ),
        *_paragraph(
            """
            *Whole caption correct* is the share of held-out prompts whose every word is drawn; the
            paper has a CLIP score and GenEval there. The Fréchet distance is taken on fixed
            untrained features and is not FID. Numbers are means ± standard errors over seeds. A
            seed changes parameters, training noise, the order of the data and the noise of images.
            The paper's ablations take 2 steps, from pi/2 over 1.0; here the middle time is the
            card's 1.3.
            """
        ),
        *_paragraph(
            """
            Verdicts are of Welch's t-test. *agrees* and *disagrees*: the difference, in the paper's
            direction or against it, is above the 95 % point of Student's t. *not resolved*: it is
            not. Where a table says *equals*, *agrees* is a difference within one standard deviation
            of seeds. The last column is about the number of seeds of each row with which the test
            would find the difference seen here in 80 % of all tries; it is one or two too low where
            it is below five. Among this many claims, one in twenty of those that are not true
            here is resolved by chance in each direction.
            """
        ),
    ]


def _setting(name: str, value: object) -> str:
    return f"- `{name}` = " + (f"`{value}`" if value != "" else "empty")


def _paragraph(text: str) -> list[str]:
    return [textwrap.fill(" ".join(text.split()), 100), ""]


def _size(size: str, changes: dict) -> list[str]:
    """Return the line of one network of the short trainings."""
    listed = ", ".join(f"`{name}` = `{value}`" for name, value in changes.items()) or "as above"
    return textwrap.wrap(f"- {size}: {listed}", 100, subsequent_indent="  ")

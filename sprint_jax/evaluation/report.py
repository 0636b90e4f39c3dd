"""The report of an evaluation: scores and everything that decides about them.

It is written as JSON and as markdown.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from sprint_jax.storage import files


def write(out: str | os.PathLike, report: Mapping[str, Any]) -> pathlib.Path:
    """Write report-SUITE.json and report-SUITE.md to the folder `out`. Return the latter's path.

    report: {"suite": name, "scores": {name: number or {name: number}}}, and sections
    {name: {field: value}}.
    """
    out, suite = pathlib.Path(out), report["suite"]
    files.write_text(
        out / f"report-{suite}.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    )
    files.write_text(out / f"report-{suite}.md", readable(report))
    return out / f"report-{suite}.md"


def readable(report: Mapping[str, Any]) -> str:
    """Return the report as markdown."""
    lines = [f"# {report['suite']}", "", "| score | |", "|---|---|"]
    for name, value in report["scores"].items():
        rows = value.items() if isinstance(value, dict) else [(None, value)]
        lines += [
            f"| {name if part is None else f'{name}: {part}'} | {_shown(v)} |" for part, v in rows
        ]
    for section, fields in report.items():
        if section in ("suite", "scores", "details"):
            continue
        lines += ["", f"## {section.replace('_', ' ')}", "", "| | |", "|---|---|"]
        lines += [
            f"| {name.replace('_', ' ')} | {_shown(value)} |" for name, value in fields.items()
        ]
    return "\n".join(lines) + "\n"


def _shown(value):
    if isinstance(value, float):
        return f"{value:.6g}"
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)

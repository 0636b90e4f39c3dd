"""The rows of metrics.jsonl: columns over steps, and averages by time."""

import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, TypeAlias

from sprint_jax.errors import UserError
from sprint_jax.storage import fields, json_lines, run_files

Row: TypeAlias = dict[str, Any]
_BY_TIME = "by_time/"


def read(run_dir: str | os.PathLike) -> dict[str, list[Row]]:
    """Return {phase: [row, ...]} in the order of training, {} without any row.

    Raises UserError for a row that no run wrote.
    """
    phases: dict[str, list[Row]] = {}
    path = pathlib.Path(run_dir) / run_files.METRICS
    for row in json_lines.rows(path, ("stage", "step")):
        numbers = (value for name, value in row.items() if name not in ("stage", "step"))
        if (
            type(row["stage"]) is not str
            or type(row["step"]) is not int
            or not all(type(value) in (int, float) for value in numbers)
        ):
            raise UserError(
                f"{path} has a row that no run wrote ({fields.shown(row)}): remove that line"
            )
        phases.setdefault(row["stage"], []).append(row)
    return phases


def column(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """Return (steps, values) of the rows that have `name`."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def names(rows: Sequence[Row], prefix: str) -> list[str]:
    """Return the columns `prefix/...` of any row, without the prefix, sorted."""
    start = f"{prefix}/"
    return sorted({key.removeprefix(start) for row in rows for key in row if key.startswith(start)})


def timed(rows: Sequence[Row]) -> list[str]:
    """Return what the rows hold by time, sorted: "loss" of flow matching, say, or "scm"."""
    kinds = {key.split("/")[1] for row in rows for key in row if key.startswith(_BY_TIME)}
    return sorted(kinds - {"share"})


def top(rows: Sequence[Row]) -> float:
    """Return where the times of these rows end.

    That is π/2, TrigFlow's angle of noise, for sCM and flow maps, and 1, its flow time, for flow
    matching and regression.
    """
    return math.pi / 2 if {"scm", "map"}.intersection(timed(rows)) else 1.0


def by_time(rows: Sequence[Row], name: str, top: float) -> tuple[list[float], list[float]]:
    """Return (times, values): the middles of the buckets, and averages of `name` in each.

    Rows hold sums and shares over equally many samples (`objectives/by_time.py`). The average is
    over all samples of these rows, NaN for a bucket without any. top: where times end.
    """
    sums, shares = _sums(rows, name)
    width = top / max(1, len(shares))
    middles = [(i + 0.5) * width for i in range(len(shares))]
    return middles, [s / n if n else math.nan for s, n in zip(sums, shares, strict=True)]


def _sums(rows, name):
    """Return (sums of name, shares) of each bucket over the rows.

    A value that is not finite belongs to an update that was dropped; its share counts for nothing.
    """
    rows = [row for row in rows if f"{_BY_TIME}{name}/0" in row]
    count = sum(key.startswith(f"{_BY_TIME}{name}/") for key in rows[0]) if rows else 0
    pairs = [
        [(row[f"{_BY_TIME}{name}/{i}"], row[f"{_BY_TIME}share/{i}"]) for row in rows]
        for i in range(count)
    ]
    finite = [
        [(value, share) for value, share in bucket if math.isfinite(value)] for bucket in pairs
    ]
    return [[sum(pair[k] for pair in bucket) for bucket in finite] for k in (0, 1)]


def parts(rows: Sequence[Row], count: int) -> list[Sequence[Row]]:
    """Return at most `count` consecutive parts of rows, as equal as can be and none empty."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count : (i + 1) * len(rows) // count] for i in range(count)]

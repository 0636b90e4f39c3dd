"""The rows of a measurement, one per subject and peer, as a table and as a JSON list."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.harness import timing
from sprint_jax.storage import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One subject against one peer. A missing value is None."""

    name: str  # of the subject
    device: str
    threads: int | None
    dtype: str | None
    ours_s: float | None  # median seconds of our program
    spread: list[float] | None  # [least, most] seconds
    repeats: int | None
    parts: dict[str, float] | None  # medians by part of our program, if it has several
    compile_s: float | None  # seconds of tracing and compiling
    peer: str | None  # the other program
    peer_s: float | None
    peer_spread: list[float] | None
    peer_parts: dict[str, float] | None
    ratio: float | None  # ours_s / peer_s
    difference: float | None  # relative Euclidean distance of both results
    floor_s: float | None  # lower bound by arithmetic (`floors`)
    flop: float | None  # of that arithmetic
    note: str | None  # a sentence on the comparison, or why there is no peer
    error: str | None  # a sentence, if the row failed
    jax: str
    commit: str | None


def empty(name: str, where: Mapping[str, Any], **values: Any) -> Row:
    """Return a row with only a name, `where` (device, threads, jax, commit) and given values."""
    filled: dict[str, Any] = {field.name: None for field in dataclasses.fields(Row)}
    filled |= {**where, "name": name, **values}
    return Row(**filled)


def filled(row: Row, ours: timing.Times, peer: timing.Times | None) -> Row:
    """Return the row with its times and ratio."""
    values: dict[str, Any] = dict(
        ours_s=timing.middle(ours.total),
        spread=timing.spread(ours.total),
        repeats=len(ours.total),
        parts=_parts(ours),
    )
    if peer is not None:
        seconds = timing.middle(peer.total)
        values |= dict(
            peer_s=seconds,
            peer_spread=timing.spread(peer.total),
            peer_parts=_parts(peer),
            ratio=values["ours_s"] / seconds,
        )
    return dataclasses.replace(row, **values)


def _parts(times):
    return {name: timing.middle(t) for name, t in times.of.items()} if len(times.of) > 1 else None


def write(path: pathlib.Path, rows: Iterable[Row]) -> None:
    """Write all rows atomically."""
    files.write_text(path, json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


_COLUMNS = ("name", "ours", "spread", "peer", "its time", "ratio", "floor", "x floor", "difference")


def table(rows: Sequence[Row]) -> str:
    """Return the rows as markdown, then their notes and errors, each once."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    for row in rows:
        for kind, text in (("", row.note), ("error: ", row.error), ("parts: ", _spoken(row))):
            line = f"{row.name}{f' / {row.peer}' if row.peer else ''}: {kind}{text}"
            if text and line not in lines:
                lines.append(line)
    return "\n".join(lines)


def _cells(row):
    within = f"{duration(row.spread[0])} to {duration(row.spread[1])}" if row.spread else ""
    above = f"{row.ours_s / row.floor_s:.1f}" if row.ours_s and row.floor_s else ""
    return (
        row.name,
        "failed" if row.error and row.ours_s is None else duration(row.ours_s),
        within,
        row.peer or "",
        duration(row.peer_s),
        "" if row.ratio is None else f"{row.ratio:.2f}",
        duration(row.floor_s),
        above,
        "" if row.difference is None else f"{row.difference:.1e}",
    )


def _spoken(row):
    say = lambda parts: ", ".join(f"{name} {duration(s)}" for name, s in parts.items())
    if not row.parts:
        return None
    return f"ours {say(row.parts)}" + (f"; peer {say(row.peer_parts)}" if row.peer_parts else "")


def duration(seconds: float | None) -> str:
    """Format seconds with three digits in a suitable unit; None becomes ""."""
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"

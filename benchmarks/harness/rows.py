"""What a measurement says: one row per subject and peer, a table for people and a JSON list for programs."""

import dataclasses
import json

from benchmarks.harness import timing
from sprint_jax.storage import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One subject against one peer; None where there is no value.

    name: of the subject. device, threads, dtype, jax, commit: where, in what and of which code.
    ours_s: median seconds of our program; spread: [least, most]; repeats: how many.
    parts: medians by part of our program, where it has several. compile_s: tracing and compiling it.
    peer: what else did the same, or None; peer_s, peer_spread, peer_parts: as ours.
    ratio: ours_s / peer_s. difference: relative Euclidean distance of the two results.
    floor_s: the least seconds by arithmetic (`floors`); flop: of that arithmetic.
    note: a sentence on what was compared, or why there is no peer. error: a sentence, if the row failed.
    """

    name: str
    device: str
    threads: int | None
    dtype: str | None
    ours_s: float | None
    spread: list[float] | None
    repeats: int | None
    parts: dict | None
    compile_s: float | None
    peer: str | None
    peer_s: float | None
    peer_spread: list[float] | None
    peer_parts: dict | None
    ratio: float | None
    difference: float | None
    floor_s: float | None
    flop: float | None
    note: str | None
    error: str | None
    jax: str
    commit: str | None


def empty(name, where, **values) -> Row:
    """A row of nothing but a name, `where` (device, threads, jax, commit) and the given values."""
    nothing = {field.name: None for field in dataclasses.fields(Row)}
    return Row(**nothing | where | {"name": name} | values)


def filled(row: Row, ours: timing.Times, peer: timing.Times | None) -> Row:
    """The row with its times and ratio."""
    values = dict(
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


def write(path, rows):
    """Writes all rows; the file appears whole or stays as it was."""
    files.write_text(path, json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


_COLUMNS = ("name", "ours", "spread", "peer", "its time", "ratio", "floor", "x floor", "difference")


def table(rows) -> str:
    """The rows as markdown, then their notes and errors, each once."""
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


def duration(seconds) -> str:
    """Three digits in the unit that suits."""
    if seconds is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"

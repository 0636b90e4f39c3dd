"""The rows of metrics.jsonl, read back: columns over steps, and averages by time."""

import json
import math
import pathlib

FILE = "metrics.jsonl"
_BY_TIME = "by_time/"
# Where the times of a stage end: the angle of TrigFlow for students (of ablations also "gradients"), flow time for teachers.
_TOP = dict.fromkeys(("sprint", "gradients"), math.pi / 2)


def read(run_dir):
    """{stage: [row, ...]} in the order of training. A line that was cut off or damaged is left out; {} without any row."""
    path = pathlib.Path(run_dir) / FILE
    stages = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # no JSON, or no UTF-8
            continue
        stages.setdefault(row["stage"], []).append(row)
    return stages


def column(rows, name):
    """(steps, values) of the rows that have `name`."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def names(rows, prefix):
    """Columns `prefix/...` of any row, without the prefix, sorted."""
    return sorted(
        {
            key.removeprefix(f"{prefix}/")
            for row in rows
            for key in row
            if key.startswith(f"{prefix}/")
        }
    )


def timed(rows):
    """What the rows hold by time: "loss" of a teacher; "scm", "error", "tangent_norm" and "logvar" of a student."""
    kinds = {key.split("/")[1] for row in rows for key in row if key.startswith(_BY_TIME)}
    return sorted(kinds - {"share"})


def by_time(stage, rows, name):
    """(times, values): the middle of each bucket and the average of `name` over all samples of these rows in it.

    Rows hold sums and shares over equally many samples (`training/buckets.py`). A bucket that was empty in all of
    them is NaN.
    """
    sums, shares = _sums(rows, name)
    width = _TOP.get(stage, 1.0) / max(1, len(shares))
    middles = [(i + 0.5) * width for i in range(len(shares))]
    return middles, [s / n if n else math.nan for s, n in zip(sums, shares, strict=True)]


def is_angle(stage):
    """Whether the times of a stage are angles."""
    return stage in _TOP


def _sums(rows, name):
    """(sums of name, shares) of each bucket over the rows; one that is not finite, of a dropped update, is left out of its bucket."""
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


def parts(rows, count):
    """Consecutive runs of rows, as equal as can be and none empty: at most `count` of them."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count : (i + 1) * len(rows) // count] for i in range(count)]

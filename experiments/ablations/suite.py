"""A suite of runs: finished ones are skipped, begun ones resumed, each a line of results.jsonl.

Knows neither networks nor data: what a run does is a function handed in.
"""

import json
import pathlib
import shutil
import time

import tqdm

from experiments.ablations import grid
from sprint_jax.errors import UserError
from sprint_jax.storage import digests, json_lines

RESULTS = "results.jsonl"
_BAR = (
    "{desc}: {percentage:3.0f}%|{bar}| {n:.1f} of {total_fmt} runs [{elapsed} gone, {remaining} "
    "left]"
)


def go(
    runs,
    seeds: int,
    scale: grid.Scale,
    workdir,
    perform,
    *,
    about: dict,
    after=lambda rows: None,
    say=tqdm.tqdm.write,
):
    """Do every run with seeds 0 .. seeds - 1, one configuration after the other. Return all rows.

    perform: (run, seed, folder, advance) -> {metric: number}; advance takes the share of the run
    that is done. about: what every row records besides (commit, device, versions). after: called
    with all rows after a configuration's last seed. Checkpoints of a finished run are removed. An
    error or an interrupt leaves the rows that are finished, and the folder of the run in progress.
    The same call resumes from there.
    """
    workdir = pathlib.Path(workdir)
    todo = [(r, seed) for r in runs for seed in range(seeds)]
    rows = read(workdir)
    done = finished(rows, scale)
    if (workdir / RESULTS).exists():
        json_lines.write(workdir / RESULTS, rows)  # without a line that was cut off
    with tqdm.tqdm(
        total=len(todo), desc="ablations", bar_format=_BAR, mininterval=1.0, smoothing=0.0
    ) as bar:
        for i, (r, seed) in enumerate(todo):
            if (r.name, seed) not in done:
                begin = time.perf_counter()
                folder = workdir / "runs" / f"{r.name}_{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                metrics = perform(r, seed, folder, lambda share, i=i: bar.update(i + share - bar.n))
                row = {
                    "run": r.name,
                    "seed": seed,
                    "scale": scale.name,
                    "settings": settings(scale, r),
                    "metrics": metrics,
                    "seconds": time.perf_counter() - begin,
                    **about,
                }
                json_lines.append(workdir / RESULTS, row)
                rows.append(row)
                say(_line(row, i + 1, len(todo)))
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                if seed == seeds - 1:
                    after(rows)
            bar.update(i + 1 - bar.n)
    return rows


def read(workdir) -> list[dict]:
    """Return the rows of results.jsonl; a last line that is cut off is no row.

    Raises UserError for any other line that is damaged.
    """
    return json_lines.rows(pathlib.Path(workdir) / RESULTS, ("run", "seed"), kind="a result")


def finished(rows, scale: grid.Scale) -> set:
    """Return {(run, seed)} of rows made with the settings of the grid as it is now.

    Any other row is an error.
    """
    known, done = {r.name: r for r in grid.RUNS}, set()
    for row in rows:
        r = known.get(row["run"])
        if r is None or row["scale"] != scale.name or row["settings"] != settings(scale, r):
            raise UserError(
                f"{RESULTS} has run {row['run']!r} of scale {row['scale']!r} with other settings "
                f"than scale {scale.name!r} has "
                "now: choose another --workdir"
            )
        done.add((row["run"], row["seed"]))
    return done


def settings(scale: grid.Scale, r: grid.Run) -> str:
    """Return a digest of all that a run's numbers depend on in the grid."""
    content = [scale.preset, r.kind, sorted(grid.changes(scale, r).items())]
    return digests.hash_text(json.dumps(content))[:12]


def _line(row, number, total):
    shown = "  ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items())
    return (
        f"{number:3} of {total}  {row['run']:16} seed {row['seed']}  {row['seconds']:5.0f} s  "
        f"{shown}"
    )

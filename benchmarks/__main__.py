"""Measure how fast this is, here, against PyTorch and against arithmetic.

    --suite=cpu       float32: 0.6B transformer, DC-AE decoder, a pair of steps, a whole command
    --suite=gpu       bfloat16: components, prompt to pixels at 512 and 1024 px, the published pair
    --suite=kernels   the two attentions alone, forward and in the derivatives of training

Prints a table and writes its rows to --out as a JSON list, after every case, so that a run cut
short leaves what it measured. Peers (diffusers, PyTorch) run in the same process, alternating with
ours; they need a checkout and requirements-dev.txt, and without them the rows say so. Weights are
random: nothing is downloaded. --operations=N says after each case where its time goes: the N
longest operations of the device.
"""

import dataclasses
import fnmatch
import os
import pathlib
import sys
from typing import Literal

from sprint_jax.errors import UserError
from sprint_jax.runtime import cli
from sprint_jax.storage import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(files.Paths):
    """Options of `python -m benchmarks`."""

    suite: Literal["cpu", "gpu", "kernels"] | None = None
    """What to measure."""
    out: files.LocalPath | None = None
    """JSON file for the rows."""
    only: tuple[str, ...] | None = None
    """Names of the cases to run, * for anything; default: all of the suite."""
    repeats: int = 5
    """Alternating runs of each program."""
    peers: bool = True
    """Leave out the peers, which are timed otherwise."""
    operations: int = 0
    """Longest operations of each program to list, by JAX's profiler."""


def run(options: Options) -> None:
    """Measure the suite and print its table. Raises UserError for bad options."""
    cli.require("suite", options.suite, "use cpu, gpu or kernels")
    if options.repeats < 1:
        raise UserError(f"--repeats={options.repeats}: use 1 or more")
    if options.operations < 0:
        raise UserError(f"--operations={options.operations}: use 0 or more")
    out = _file(options.out)
    # PyTorch lives in the same process and needs memory of the device too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.suite == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    rows = _run(_cases(options), out, options)
    from benchmarks.harness import rows as rows_lib

    print("\n" + rows_lib.table(rows))
    if out:
        print(f"{len(rows)} rows in {out}")


def _file(path: str | None) -> pathlib.Path | None:
    if path is None:
        return None
    out = pathlib.Path(path)
    if out.suffix != ".json" or out.is_dir():
        raise UserError(f"--out={out}: give a file that ends in .json")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(
            f"cannot write --out={out}: {out.parent} is no folder that can be written in"
        )
    return out


def _cases(options):
    import jax

    from benchmarks.harness import suites

    backend = jax.default_backend()
    if options.suite == "gpu" and backend == "cpu":
        raise UserError(
            "--suite=gpu: JAX sees no GPU here; install jax[cuda12], or use --suite=cpu"
        )
    if options.suite == "cpu" and backend != "cpu":
        raise UserError(f"--suite=cpu runs on {backend} because JAX_PLATFORMS says so: unset it")
    cases = (
        suites.kernels(backend) if options.suite == "kernels" else getattr(suites, options.suite)()
    )
    if options.only is None:
        return cases
    names = [case.name for case in cases]
    if not options.only:
        raise UserError(
            f"--only= names no case: leave it out for all of --suite={options.suite}, or use some "
            f"of {', '.join(names)}"
        )
    for pattern in options.only:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"--only={pattern} names no case of --suite={options.suite}: use some of "
                f"{', '.join(names)}"
            )
    return [
        case
        for case in cases
        if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.only)
    ]


def _run(cases, out, options):
    import tqdm

    from benchmarks.harness import bench as bench_lib
    from benchmarks.harness import rows as rows_lib

    bench, rows = (
        bench_lib.Bench(options.repeats, options.operations, options.peers, tqdm.tqdm.write),
        [],
    )
    where = bench.where
    threads = f", {where['threads']} threads" if where["threads"] else ""
    print(
        f"{where['device']}{threads}, jax {where['jax']}, commit {where['commit']}, "
        f"{options.repeats} repeats",
        flush=True,
    )
    with tqdm.tqdm(cases, unit="case", desc="benchmark") as bar:
        for case in bar:
            bar.set_postfix_str(case.name)
            rows += bench_lib.measure(case, bench)
            if out:
                rows_lib.write(out, rows)
    return rows


if __name__ == "__main__":
    cli.start(Options, run, sys.argv[1:], prog="python -m benchmarks", description=__doc__)

"""How fast this is, here, against PyTorch and against arithmetic: python -m benchmarks --suite=cpu

    --suite=cpu       float32: 0.6B transformer, DC-AE decoder, a pair of training steps, a whole command
    --suite=gpu       bfloat16: components, prompt to pixels at 512 and 1024 px, the published training pair
    --suite=kernels   the two attentions alone, forward and in the derivatives of training

Prints a table and writes its rows to --out as a JSON list, after every case, so that a run cut short leaves
what it measured. Peers (diffusers, PyTorch) run in the same process and take turns with ours; they need a
checkout and requirements-dev.txt, and without them the rows say so. Weights are random: nothing is downloaded.
--operations=N says after each case where its time goes: the N longest operations of the device.
"""

import fnmatch
import os
import pathlib
import sys

from absl import app, flags

from sprint_jax.errors import UserError
from sprint_jax.runtime import cli

# Two commands with a flag of one name meet only in a process that imports both.
_SUITE = flags.DEFINE_enum(
    "suite", None, ["cpu", "gpu", "kernels"], "What to measure.", allow_override=True
)
_OUT = flags.DEFINE_string("out", None, "JSON file for the rows.", allow_override=True)
_ONLY = flags.DEFINE_list(
    "only",
    None,
    "Names of the cases to run, * for anything; default: all of the suite.",
    allow_override=True,
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Alternating runs of each program.")
_PEERS = flags.DEFINE_bool("peers", True, "Time the peers too.")
_OPERATIONS = flags.DEFINE_integer(
    "operations", 0, "Longest operations of each program to list, by JAX's profiler."
)


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        if not _SUITE.value:
            raise UserError("--suite is missing: use cpu, gpu or kernels")
        if _REPEATS.value < 1:
            raise UserError(f"--repeats={_REPEATS.value}: use 1 or more")
        if _OPERATIONS.value < 0:
            raise UserError(f"--operations={_OPERATIONS.value}: use 0 or more")
        out = _file()
        # PyTorch lives in the same process and needs memory of the device too.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        if _SUITE.value == "cpu":
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        rows = _run(_cases(), out)
        from benchmarks.harness import rows as rows_lib

        print("\n" + rows_lib.table(rows))
        if out:
            print(f"{len(rows)} rows in {out}")


def _file():
    if _OUT.value is None:
        return None
    out = pathlib.Path(_OUT.value)
    if out.suffix != ".json" or out.is_dir():
        raise UserError(f"--out={out}: give a file that ends in .json")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(
            f"cannot write --out={out}: {out.parent} is no folder that can be written in"
        )
    return out


def _cases():
    import jax

    from benchmarks.harness import suites

    backend = jax.default_backend()
    if _SUITE.value == "gpu" and backend == "cpu":
        raise UserError(
            "--suite=gpu: JAX sees no GPU here; install jax[cuda12], or use --suite=cpu"
        )
    if _SUITE.value == "cpu" and backend != "cpu":
        raise UserError(f"--suite=cpu runs on {backend} because JAX_PLATFORMS says so: unset it")
    cases = (
        suites.kernels(backend) if _SUITE.value == "kernels" else getattr(suites, _SUITE.value)()
    )
    if _ONLY.value is None:
        return cases
    names = [case.name for case in cases]
    if not _ONLY.value:
        raise UserError(
            f"--only= names no case: leave it out for all of --suite={_SUITE.value}, or use some of {', '.join(names)}"
        )
    for pattern in _ONLY.value:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"--only={pattern} names no case of --suite={_SUITE.value}: use some of {', '.join(names)}"
            )
    return [
        case
        for case in cases
        if any(fnmatch.fnmatch(case.name, pattern) for pattern in _ONLY.value)
    ]


def _run(cases, out):
    import tqdm

    from benchmarks.harness import bench as bench_lib
    from benchmarks.harness import rows as rows_lib

    bench, rows = (
        bench_lib.Bench(_REPEATS.value, _OPERATIONS.value, _PEERS.value, tqdm.tqdm.write),
        [],
    )
    where = bench.where
    threads = f", {where['threads']} threads" if where["threads"] else ""
    print(
        f"{where['device']}{threads}, jax {where['jax']}, commit {where['commit']}, {_REPEATS.value} repeats",
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
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)

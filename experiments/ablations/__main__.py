"""Run the paper's ablations, several seeds of each configuration, and write a report with plots.

--suite=followups looks into what came out against the paper. Both suites share a work directory,
and each takes over what the other has made. Every run has a directory under --workdir; run the
command again to resume. The report is written after each configuration and at the end, and alone
with --report_only.
"""

import dataclasses
import pathlib
import sys
from typing import Literal

from experiments.ablations import grid, suite
from sprint_jax.errors import UserError
from sprint_jax.runtime import cards, cli, huge_pages
from sprint_jax.storage import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(files.Paths):
    """Options of `python -m experiments.ablations`."""

    suite: Literal["paper", "followups"] = "paper"
    """Which ablations."""
    scale: Literal["tiny", "small"] = "tiny"
    """How large: tiny on one CPU core, small on one GPU."""
    only: tuple[str, ...] = ()
    """Tables and figures to make, by name, instead of all of the suite."""
    seeds: int = 3
    """Runs of each configuration."""
    workdir: files.LocalPath | None = None
    """Directory of the runs; default: runs/ablate_SCALE."""
    report_only: bool = False
    """Render the report from existing results; run nothing."""
    report: files.LocalPath | None = None
    """Markdown file to write, with plots in a folder beside it; default: WORKDIR/ablations.md."""


def run(options: Options) -> None:
    """Run what is missing and write the report. Raises UserError for bad options."""
    asked = next(s for s in grid.SUITES if s.name == options.suite)
    asked = dataclasses.replace(asked, tables=chosen(asked.tables, options.only))
    if options.seeds < 1:
        raise UserError(f"--seeds={options.seeds}: use 1 or more")
    scale = next(s for s in grid.SCALES if s.name == options.scale)
    workdir = pathlib.Path(options.workdir or f"runs/ablate_{scale.name}")
    name = "ablations" if asked.name == "paper" else asked.name
    where = pathlib.Path(options.report) if options.report else workdir / f"{name}.md"
    if where.suffix != ".md":
        raise UserError(f"--report={where}: name a .md file")
    cli.no_folder("report", str(where))
    if not options.report_only:
        _run(asked, scale, workdir, where, options.seeds)
        return
    from experiments.ablations import report

    rows = suite.read(workdir)
    if not rows:
        raise UserError(
            f"{workdir / suite.RESULTS} has no results: run without --report_only first"
        )
    suite.finished(rows, scale)
    report.write(where, rows, asked, scale)
    print(f"report: {where}")


def chosen(tables, names) -> tuple[grid.Table, ...]:
    """Return the tables that have the given names, all for none.

    Raises UserError for an unknown name.
    """
    known = [t.name for t in tables]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--only={unknown[0]}: use some of {', '.join(known)}")
    return tuple(t for t in tables if not names or t.name in names)


def _run(asked, scale, workdir, where, seeds):
    card = cards.load(f"sprint:{scale.preset}")
    import jax  # after the flags are known to be right
    import tqdm

    from experiments.ablations import experiments, report
    from sprint_jax.runtime import compile_cache
    from sprint_jax.storage import revision
    from sprint_jax.training import workdirs
    from sprint_jax.training.loop import Interrupted

    compile_cache.start()

    def say(message):
        tqdm.tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()

    runs = grid.runs_of(asked.tables)
    with workdirs.claim(workdir):
        work = experiments.Experiments(card, scale, workdir, say)
        say(
            f"ablations: {len(runs)} configurations x {seeds} seeds in {workdir}; "
            f"the whole suite `paper` at scale {scale.name} with 3 seeds takes, in minutes: "
            f"{scale.minutes}"
        )
        about = {
            "commit": revision.commit(),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
        try:
            suite.go(
                runs,
                seeds,
                scale,
                workdir,
                work,
                about=about,
                say=say,
                after=lambda rows: report.write(where, rows, asked, scale),
            )
        except (Interrupted, KeyboardInterrupt):
            say("ablations: stopped; the same command resumes")
            return
        report.write(where, suite.read(workdir), asked, scale)
    say(f"report: {where}")


if __name__ == "__main__":
    huge_pages.restart()
    cli.start(
        Options, run, sys.argv[1:], prog="python -m experiments.ablations", description=__doc__
    )

"""The paper's ablations in one command: python -m experiments.ablations --suite=paper --scale=tiny
[--only=table3,table6]

--suite=followups looks into what came out against the paper. Both suites share a work directory,
so what one made the other has. Every run has a directory under --workdir; stopped at any moment,
the same command goes on. The report is written after each configuration and at the end, and alone
with --report_only.
"""

import dataclasses
import pathlib
import runpy
import sys

from absl import app, flags

from experiments.ablations import grid, suite
from sprint_jax.commands import workdir_flag
from sprint_jax.errors import UserError
from sprint_jax.runtime import cli, huge_pages

_SUITE = flags.DEFINE_enum(
    "suite", "paper", [s.name for s in grid.SUITES], "Which ablations.", allow_override=True
)
_SCALE = flags.DEFINE_enum(
    "scale",
    "tiny",
    [s.name for s in grid.SCALES],
    "How large: tiny on one CPU core, small on one GPU.",
)
_ONLY = flags.DEFINE_list(
    "only",
    [],
    "Tables and figures to make, by name, instead of all of the suite.",
    allow_override=True,
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each configuration.")
_REPORT_ONLY = flags.DEFINE_bool(
    "report_only", False, "Render the report from the results that are there; run nothing."
)
_REPORT = flags.DEFINE_string(
    "report",
    None,
    "Markdown file to write, with plots in a folder beside it; default: WORKDIR/ablations.md.",
)
flags.adopt_module_key_flags(workdir_flag)  # --help shows it here
_CARDS = pathlib.Path(__file__).parents[2] / "configs" / "sprint.py"


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        asked = next(s for s in grid.SUITES if s.name == _SUITE.value)
        asked = dataclasses.replace(asked, tables=chosen(asked.tables, _ONLY.value))
        if _SEEDS.value < 1:
            raise UserError(f"--seeds={_SEEDS.value}: use 1 or more")
        scale = next(s for s in grid.SCALES if s.name == _SCALE.value)
        workdir = pathlib.Path(workdir_flag.WORKDIR.value or f"runs/ablate_{scale.name}")
        where = (
            pathlib.Path(_REPORT.value)
            if _REPORT.value
            else workdir / f"{'ablations' if asked.name == 'paper' else asked.name}.md"
        )
        if where.suffix != ".md":
            raise UserError(f"--report={where}: name a .md file")
        cli.no_folder(_REPORT.name, where)
        if _REPORT_ONLY.value:
            from experiments.ablations import report

            rows = suite.read(workdir)
            if not rows:
                raise UserError(
                    f"{workdir / suite.RESULTS} has no results: run without --report_only first"
                )
            suite.finished(rows, scale)
            report.write(where, rows, asked, scale)
            print(f"report: {where}")
            return
        _run(asked, scale, workdir, where)


def chosen(tables, names) -> tuple[grid.Table, ...]:
    """Those of the tables that have the given names, all for none.

    Raises UserError for an unknown name.
    """
    known = [t.name for t in tables]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--only={unknown[0]}: use some of {', '.join(known)}")
    return tuple(t for t in tables if not names or t.name in names)


def _run(asked, scale, workdir, where):
    if not _CARDS.is_file():
        raise UserError(f"no config file {_CARDS}: run from a checkout of the project")
    card = runpy.run_path(str(_CARDS))["get_config"](scale.preset)
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

    runs, seeds = grid.runs_of(asked.tables), _SEEDS.value
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
            say("ablations: stopped; the same command goes on from there")
            return
        report.write(where, suite.read(workdir), asked, scale)
    say(f"report: {where}")


if __name__ == "__main__":
    huge_pages.restart()
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)

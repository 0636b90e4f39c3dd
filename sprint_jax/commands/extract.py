"""Weights out of a run's newest checkpoint, finished or not: python -m sprint_jax extract --run_dir=DIR --stage=sprint

Reads the parameters alone (their average where there is one), on one machine, whatever the run's devices were.
With --to_file=OTHER/student.safetensors a run that is not finished can be sampled from and converted: the run's config.json is
written beside it, and --model=OTHER reads both. Not into the run's own folder, which would count as finished by such a file.
"""

import pathlib
import sys

from absl import app, flags

from sprint_jax.commands import run_flag
from sprint_jax.errors import UserError
from sprint_jax.runtime import cli
from sprint_jax.storage import files

_STAGE = flags.DEFINE_enum(
    "stage", "sprint", ["teacher", "finetune", "control", "sprint"], "Whose checkpoint to read."
)
_FILE = flags.DEFINE_string("to_file", None, "Safetensors file to write.")
flags.adopt_module_key_flags(run_flag)  # --help shows it here


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        run_dir = pathlib.Path(run_flag.given())
        if not _FILE.value:
            raise UserError("--to_file is missing: name the file to write")
        cli.no_folder(_FILE.name, _FILE.value)
        from sprint_jax.storage import run_files, weights

        to_file = pathlib.Path(_FILE.value)
        drawn = _STAGE.value == "sprint" and to_file.name == run_files.STUDENT
        check_place(run_dir, to_file, drawn)
        step, params = extract(run_dir, _STAGE.value)
        _make_folder(to_file)
        weights.save(to_file, params)
        print(f"wrote {to_file}: {_STAGE.value} after {step} steps")
        if drawn:
            with files.whole(to_file.with_name(run_files.CONFIG)) as partial:
                partial.write_bytes((run_dir / run_files.CONFIG).read_bytes())
            print(
                f"and its {run_files.CONFIG}: python -m sprint_jax sample --model={to_file.parent} draws with it"
            )


def check_place(run_dir, to_file, drawn):
    """Raises UserError where a run would take the file for the end of one of its stages, or its config would replace another."""
    from sprint_jax.storage import run_files

    if to_file.resolve().parent == run_dir.resolve() and to_file.name in (
        run_files.TEACHER,
        run_files.CONTROL,
        run_files.STUDENT,
    ):
        raise UserError(
            f"--to_file={to_file}: by that file the run would count as trained to its end; name one in another folder"
        )
    ours, theirs = run_dir / run_files.CONFIG, to_file.with_name(run_files.CONFIG)
    if drawn and theirs.exists() and ours.exists() and theirs.read_bytes() != ours.read_bytes():
        raise UserError(
            f"--to_file={to_file}: {theirs} is another run's; name a file in a folder of its own"
        )


def _make_folder(to_file):
    try:
        to_file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--to_file={to_file}: cannot make its folder ({error.strerror}): choose another"
        ) from None


def extract(run_dir, stage):
    """Return (step, parameters as NumPy) of the newest whole checkpoint of a phase. Raises UserError without one."""
    from sprint_jax.training import checkpoints, run, stages

    c = run.read_config(run_dir)
    there = [name for name in c.phases if (run_dir / "checkpoints" / name).is_dir()]
    if stage not in there:
        raise UserError(
            f"{run_dir} has no checkpoint of --stage={stage}: it has {', '.join(there) or 'none of any stage yet'}"
        )
    phase = c.phases[stage]
    made = stages.networks(c, phase)
    model = made.trained.control if phase.network == "control" else made.trained
    part = ("roles", phase.objective.objective(made).main, "ema" if phase.ema else "params")
    return checkpoints.read_part(run_dir / "checkpoints" / stage, part, run.abstract(model))


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)

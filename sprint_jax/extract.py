"""Weights out of a run's newest checkpoint, finished or not: python -m sprint_jax.extract --run_dir=DIR --stage=sprint

Reads the parameters alone (their average where there is one), on one machine, whatever the run's devices were.
With --to_file=DIR/student.safetensors a run that is not finished can be sampled from and converted.
"""

import json
import pathlib
import sys

from absl import app, flags

from sprint_jax import cli, run_flag
from sprint_jax.errors import UserError

_STAGE = flags.DEFINE_enum("stage", "sprint", ["teacher", "finetune", "control", "sprint"], "Whose checkpoint to read.")
_FILE = flags.DEFINE_string("to_file", None, "Safetensors file to write.")


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        run_dir = pathlib.Path(run_flag.given())
        if not _FILE.value:
            raise UserError("--to_file is missing: name the file to write")
        from sprint_jax import weights

        step, params = extract(run_dir, _STAGE.value)
        weights.save(_FILE.value, params)
        print(f"wrote {_FILE.value}: {_STAGE.value} after {step} steps")


def extract(run_dir, stage):
    """(step, parameters as NumPy) of the newest whole checkpoint of a stage."""
    import jax

    from sprint_jax import build, config, workdir
    from sprint_jax.training import checkpoints

    try:
        c = config.parse(json.loads((run_dir / workdir.CONFIG).read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{run_dir} is no work directory of a run ({error}): give the --workdir of one") from None
    made = {"teacher": build.base_teacher, "finetune": build.teacher, "control": build.controlnet, "sprint": build.student}
    model = made[stage](c)
    averaged = bool(c.sprint.ema if stage == "sprint" else c.teacher.ema)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    return checkpoints.read_part(run_dir / "checkpoints" / stage, "ema" if averaged else "params", abstract)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)

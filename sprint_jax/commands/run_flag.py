"""--run_dir: the work directory that a command reads."""

from absl import flags

from sprint_jax.errors import UserError

RUN_DIR = flags.DEFINE_string("run_dir", None, "The --workdir of a run.")


def given():
    """The flag's value. Raises UserError without one."""
    if not RUN_DIR.value:
        raise UserError("--run_dir is missing: name the --workdir of a run")
    return RUN_DIR.value

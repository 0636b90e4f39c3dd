"""The main job: python -m sprint_jax.main --config=configs/sprint.py[:preset] [--workdir=DIR] [--config.key=value]"""

import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from sprint_jax import cli

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, optionally with :preset.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; default: runs/FILE_PRESET.")


def main(argv):
    with cli.user_errors():
        if len(argv) > 1:
            raise cli.UserError(f"unexpected argument {argv[1]!r}: flags look like --name=value")
        if _CONFIG.value is None:
            raise cli.UserError("--config is missing: use --config=configs/sprint.py")
        from sprint_jax import config, run  # JAX starts here, after the flags are known to be right

        run.run(config.parse(_CONFIG.value), _WORKDIR.value or _default_workdir())


def _default_workdir():
    """runs/sprint_shapes for configs/sprint.py:shapes, runs/sprint for configs/sprint.py."""
    path, _, preset = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    name = pathlib.Path(path).stem
    return pathlib.Path("runs") / (f"{name}_{preset}" if preset else name)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)

"""The main job: python -m sprint_jax.main --config=configs/sprint.py[:preset] [--workdir=DIR]
[--config.key=value]

Several processes, on one machine or many, run as one: see `launch/`.
"""

import os
import pathlib
import sys

from absl import app, flags

from sprint_jax.commands import config_flag, workdir_flag
from sprint_jax.runtime import cli, compile_cache, distributed, huge_pages, quick_compile

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0 (the next port is used too)."
)
_PROCESSES = flags.DEFINE_integer(
    "processes",
    None,
    "Processes of this run; default: told by SLURM, JobSet or TPU variables, or one.",
)
_PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0.")
_STARTUP = flags.DEFINE_float("startup_seconds", 300.0, "How long to wait for all processes.")
flags.adopt_module_key_flags(config_flag)  # --help shows them here
flags.adopt_module_key_flags(workdir_flag)


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        path, preset = config_flag.path_and_preset()
        workdir = workdir_flag.WORKDIR.value or _default_workdir(path, preset)
        place = distributed.place(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, os.environ)
        compile_cache.start()
        from sprint_jax import config
        from sprint_jax.training import (
            run,  # JAX starts here, after the flags are known to be right
        )
        from sprint_jax.training.loop import Interrupted

        parsed = config.parse(config_flag.CONFIG.value)
        if parsed.run.quick_compile:
            quick_compile.start()
        with distributed.started(place, seconds=_STARTUP.value):
            try:
                run.run(parsed, workdir)
            except Interrupted as stop:
                if place is None or place.process == 0:
                    print(stop)


def _default_workdir(path, preset):
    """runs/sprint_smoke for configs/sprint.py:smoke, runs/sprint for configs/sprint.py."""
    return pathlib.Path("runs") / (f"{path.stem}_{preset}" if preset else path.stem)


if __name__ == "__main__":
    huge_pages.restart()
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)

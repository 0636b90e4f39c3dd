"""Train: python -m sprint_jax.main --config=configs/sprint.py[:PRESET] [--config.KEY=VALUE ...]

`sprint-jax train` does the same, and takes the names of shipped cards as well. Several processes,
on one machine or many, run as one: see `launch/`.
"""

from sprint_jax.runtime import ending

if __name__ == "__main__":
    ending.start()  # before the other imports, which a signal may meet

import pathlib
import sys
from collections.abc import Iterator, Sequence

from absl import app, flags
from ml_collections import config_flags

from sprint_jax.commands import train
from sprint_jax.errors import UserError
from sprint_jax.runtime import cards, cli, huge_pages
from sprint_jax.storage import files

_CONFIG = config_flags.DEFINE_config_file("config", None, "Card: a file, with :PRESET if any.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; default: runs/ and the names of card and preset."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0 (the next port is used too)."
)
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "Processes; default: from variables of SLURM, JobSet or TPUs, or one."
)
_PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0.")
_STARTUP = flags.DEFINE_float("startup_seconds", 300.0, "How long to wait for all processes.")


def main(arguments: Sequence[str]) -> None:
    """Train by the flags. Bad input ends in one line and status 2."""
    with cli.user_errors():
        if len(arguments) > 1:
            raise UserError(f"unexpected argument {arguments[1]!r}: flags look like --name=value")
        if _CONFIG.value is None:
            raise UserError("--config is missing: use --config=configs/sprint.py")
        card = config_flags.get_config_filename(flags.FLAGS["config"])
        if not pathlib.Path(path := cards.split(card)[0]).is_file():
            raise UserError(f"no config file {path}: use --config=configs/sprint.py")
        options = train.Options(
            config=card,
            workdir=_WORKDIR.value,
            coordinator=_COORDINATOR.value,
            processes=_PROCESSES.value,
            process=_PROCESS.value,
            startup_seconds=_STARTUP.value,
        )
        train.start(_CONFIG.value, options)


def parse_flags(arguments: list[str]) -> list[str]:
    """Parse the flags as absl does; an unknown flag, key or preset ends in one line."""
    try:
        return flags.FLAGS(list(_expanded(arguments)))
    except UserError as error:
        cli.fail(error)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        cli.fail(cards.explain(error, arguments))


def _expanded(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the arguments, with the path of --config checked and expanded: absl imports it."""
    before = ""
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if equals and flag.lstrip("-") == "config":
            yield f"{flag}={files.given(value, '--config')}"
        else:
            named = before.lstrip("-") == "config" and before.startswith("-")
            yield files.given(argument, "--config") if named else argument
        before = argument


if __name__ == "__main__":
    huge_pages.restart()
    app.run(main, flags_parser=parse_flags, argv=sys.argv)

"""Run a command: `sprint-jax COMMAND [--flag=value ...]` or `python -m sprint_jax COMMAND`."""

import difflib
import sys
from collections.abc import Sequence
from types import ModuleType

from sprint_jax.commands import (
    average,
    condition,
    convert,
    encode,
    evaluate,
    export,
    extract,
    plan,
    report,
    sample,
    serve,
    train,
)
from sprint_jax.runtime import cli, huge_pages

_MODULES = (
    train,
    sample,
    serve,
    encode,
    evaluate,
    export,
    convert,
    average,
    extract,
    condition,
    plan,
    report,
)
COMMANDS: dict[str, ModuleType] = {m.__name__.rpartition(".")[2]: m for m in _MODULES}


def main() -> None:
    """Run what the command line asks for."""
    if sys.argv[1:2] == ["train"]:
        huge_pages.restart()
    dispatch(sys.argv[1:])


def dispatch(arguments: Sequence[str]) -> None:
    """Run the command that the first argument names, with the arguments behind it.

    Bad input ends the process with one line on stderr and status 2.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_summary())
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        remedy = f"did you mean {near[0]}?" if near else "sprint-jax --help lists the commands"
        cli.fail(f"unknown command {name!r}: {remedy}")
    command, prog = COMMANDS[name], f"sprint-jax {name}"
    cli.start(command.Options, command.run, rest, prog=prog, description=command.__doc__)


def _summary() -> str:
    """Return the help: every command with the first line of its module."""
    rows = [
        f"  {name:11}{(command.__doc__ or '').splitlines()[0]}"
        for name, command in COMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: sprint-jax COMMAND [--flag=value ...]",
            "",
            *rows,
            "",
            "sprint-jax COMMAND --help lists the options of a command.",
        ]
    )


if __name__ == "__main__":
    main()

"""Run a command: `sprint-jax COMMAND [--flag=value ...]` or `python -m sprint_jax COMMAND`."""

import functools
import sys
from collections.abc import Sequence
from types import ModuleType

from sprint_jax.runtime import ending


def main() -> None:
    """Run what the command line asks for."""
    ending.start()  # before the imports of the commands, which a signal may meet
    from sprint_jax.runtime import huge_pages

    if sys.argv[1:2] == ["train"]:
        huge_pages.restart()
    with ending.quiet_pipes():
        dispatch(sys.argv[1:])


@functools.cache
def commands() -> dict[str, ModuleType]:
    """Return {name: module} of all commands, in the order of the help."""
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

    modules = (
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
    return {module.__name__.rpartition(".")[2]: module for module in modules}


def dispatch(arguments: Sequence[str]) -> None:
    """Run the command that the first argument names, with the arguments behind it.

    Bad input ends the process with one line on stderr and status 2.
    """
    import difflib

    from sprint_jax.runtime import cli

    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_summary())
        return
    if name not in commands():
        near = difflib.get_close_matches(name, commands(), 1)
        remedy = f"did you mean {near[0]}?" if near else "sprint-jax --help lists the commands"
        cli.fail(f"unknown command {name!r}: {remedy}")
    command, prog = commands()[name], f"sprint-jax {name}"
    cli.start(command.Options, command.run, rest, prog=prog, description=command.__doc__)


def _summary() -> str:
    """Return the help: every command with the first line of its module."""
    rows = [
        f"  {name:11}{(command.__doc__ or '').splitlines()[0]}"
        for name, command in commands().items()
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

"""Run a command: python -m sprint_jax COMMAND [--flag=value ...]."""

import runpy
import sys

COMMANDS = (
    "sample",
    "serve",
    "encode",
    "evaluate",
    "export",
    "convert",
    "average",
    "extract",
    "condition",
    "plan",
    "report",
)


def main() -> None:
    """Hand the remaining arguments to the module of the command."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: python -m sprint_jax COMMAND, one of {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    command = sys.argv.pop(1)
    runpy.run_module(f"sprint_jax.commands.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

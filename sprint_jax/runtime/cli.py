"""What the commands share: their start, and bad input that ends in one line on stderr."""

import contextlib
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from absl import logging

from sprint_jax.errors import UserError
from sprint_jax.runtime import ending
from sprint_jax.runtime import options as options_lib

T = TypeVar("T")
# Packages that only some commands need, by the extra that installs them.
_EXTRAS = {
    "array_record": "data",
    "fastapi": "app",
    "grain": "data",
    "pydantic": "app",
    "tensorflow_datasets": "data",
    "torch": "eval",
    "uvicorn": "app",
}


def start(
    options: type[T],
    run: Callable[[T], Any],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str | None,
) -> None:
    """Run a command from the command line: parse its options, then call it.

    Bad input ends the process with one line on stderr and status 2. See `options.parse`.
    """
    with user_errors():
        run(options_lib.parse(options, arguments, prog=prog, description=description))


def fail(message: object) -> NoReturn:
    """Print the message as one line on stderr and exit with status 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def _show_warning(message, category, filename, lineno, file=None, line=None):
    """Print our own warnings as one line, and all others as Python does."""
    if issubclass(category, UserWarning) and "sprint_jax" in filename:
        print(f"warning: {message}", file=sys.stderr)
    else:
        print(
            warnings.formatwarning(message, category, filename, lineno, line),
            end="",
            file=sys.stderr,
        )


def require(name: str, value: object, remedy: str) -> None:
    """Raise UserError if the value of --name is missing or empty. remedy: what to give."""
    if not value:
        raise UserError(f"--{name} is missing: {remedy}")


def check_output_file(name: str, path: str | None) -> None:
    """Raise UserError, before the work, if the file that --name is to write cannot be made.

    The path is a folder, or its folder does not exist. None is ignored.
    """
    no_folder(name, path)
    if path and not (folder := pathlib.Path(path).parent).is_dir():
        raise UserError(f"--{name}={path}: there is no folder {folder}, make it first")


def no_folder(name: str, path: str | None) -> None:
    """Raise UserError, before the work, if the file that --name is to write is a folder.

    None is ignored.
    """
    if path and pathlib.Path(path).is_dir():
        raise UserError(f"--{name}={path} is a folder: name a file")


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """End the process with one line and status 2 on a UserError, or an error of the environment.

    Other errors keep their traceback. Notes of libraries below the level of a warning are left out.
    """
    logging.set_verbosity(logging.WARNING)
    try:
        with ending.quiet_pipes(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except UserError as error:
        fail(error)
    except Exception as error:  # any library may raise it
        if (line := _of_the_environment(error)) is None:
            raise
        fail(line)


def _of_the_environment(error: Exception) -> str | None:
    """Return a line for a full disk or memory, missing devices or packages; None for any other."""
    line = " ".join(str(error).split())
    chosen = [n for n in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME") if os.environ.get(n)]
    devices = next((n for n in chosen if os.environ[n] in line), chosen[0] if chosen else None)
    if "No space left on device" in line:
        return f"{line}: free some space, then give the same command"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in line:
        return (
            f"out of memory ({line[:200]}): use --batch_size=1, a smaller size, or --tile; in "
            "training a smaller batch, or accumulate"
        )
    if isinstance(error, ModuleNotFoundError) and (extra := _EXTRAS.get(error.name or "")):
        return f"the package {error.name} is not installed: pip install 'sprint_jax[{extra}]'"
    if isinstance(error, ValueError) and (name := _wrong_variable(error, line)):
        return f"{name}={os.environ[name]}: {line[:200]}: correct or unset this variable"
    # The file in which JAX starts its devices; some of its errors have no text.
    if devices and _raised_in(error).endswith("xla_bridge.py"):
        reason = line[:200] or "no plug-in for them"
        return (
            f"{devices}={os.environ[devices]}: JAX cannot start these devices here ({reason}): "
            "name others, such as cpu, or install theirs"
        )
    return None


def _wrong_variable(error: Exception, line: str) -> str | None:
    """Return the environment variable that JAX cannot read, None for any other error."""
    place = pathlib.Path(_raised_in(error))
    if place.name != "config.py" or "jax" not in place.parts:
        return None
    names = (f"JAX_{word.upper()}" for word in re.findall(r"(?i)\bjax[._](\w+)", line))
    return next((name for name in names if name in os.environ), None)


def _raised_in(error: Exception) -> str:
    """Return the file in which an exception was raised."""
    place = error.__traceback__
    assert place is not None
    while place.tb_next:
        place = place.tb_next
    return place.tb_frame.f_code.co_filename

"""What the commands share: bad input ends in one line on stderr and a non-zero exit, never a traceback."""

import contextlib
import os
import pathlib
import sys
import warnings

from absl import flags, logging

from sprint_jax.errors import UserError


def fail(message):
    """Prints the message as one line and exits with status 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def _show_warning(message, category, filename, lineno, file=None, line=None):
    """Our own warnings as one line for people; anybody else's as Python shows them."""
    if issubclass(category, UserWarning) and "sprint_jax" in filename:
        print(f"warning: {message}", file=sys.stderr)
    else:
        print(
            warnings.formatwarning(message, category, filename, lineno, line),
            end="",
            file=sys.stderr,
        )


def no_arguments(argv):
    """Refuses what is left on the command line after flags: a forgotten --, or a space instead of =."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}: flags look like --name=value")


def no_folder(name, path):
    """Refuses a file to be written, told by --name, where a folder is: said before the work, not after it. None is no file."""
    if path and pathlib.Path(path).is_dir():
        raise UserError(f"--{name}={path} is a folder: name a file")


def folder_of(flag):
    """Refuses a flag that names a folder, or a file in a folder that is not there. None is no file."""
    no_folder(flag.name, flag.value)
    if flag.value and not (folder := pathlib.Path(flag.value).parent).is_dir():
        raise UserError(f"--{flag.name}={flag.value}: there is no folder {folder}, make it first")


@contextlib.contextmanager
def user_errors():
    """Ends the process in one line on a UserError. Libraries' notes below a warning are left out."""
    logging.set_verbosity(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except UserError as error:
        fail(error)
    except Exception as error:  # of whatever library was at work
        if (said := _of_the_machine(error)) is None:
            raise
        fail(said)


def _of_the_machine(error):
    """What to say of an error that is the machine's: no space, no memory, no such devices. None for any other."""
    line, platforms = " ".join(str(error).split()), os.environ.get("JAX_PLATFORMS")
    if "No space left on device" in line:
        return f"{line}: free some space, then give the same command"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in line:
        return f"out of memory ({line[:200]}): use --batch_size=1, a smaller size, or --tile; in training a smaller batch, or accumulate"
    if platforms and _raised_in(error).endswith(
        "xla_bridge.py"
    ):  # where JAX starts its devices; some of its errors have no text
        reason = line[:200] or "no plug-in for them"
        return f"JAX_PLATFORMS={platforms}: JAX cannot start these devices here ({reason}): name others, such as cpu, or install theirs"
    return None


def _raised_in(error):
    """The file in which an exception was raised."""
    place = error.__traceback__
    while place.tb_next:
        place = place.tb_next
    return place.tb_frame.f_code.co_filename


def parse_flags(argv):
    """absl flag parsing whose failures (unknown flag, key or preset, unreadable file) are one line."""
    try:
        return flags.FLAGS(argv)
    except UserError as error:
        fail(error)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        if said := _unknown_key(error, argv):
            fail(said)
        # A config file that raises comes with its whole traceback in the message; its last line says it.
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        fail(lines[-1] if "Traceback" in str(error) else " ".join(lines))


def _unknown_key(error, argv):
    """What to say where a flag --config.KEY names a key that the config has not; None for any other error."""
    while isinstance(error, AttributeError) and error.args and isinstance(error.args[0], KeyError):
        error = error.args[0]
    if not isinstance(error, KeyError):
        return None
    name, *hint = str(
        error.args[0]
    ).splitlines()  # as ml_collections has it; str(error) would be that in quotes
    keys = [word.lstrip("-").partition("=")[0] for word in argv[1:]]
    for key in keys:
        if key.startswith("config.") and name.strip("'") in key.split("."):
            return f"unknown config key {key}: {' '.join(hint) or 'see the config file for those that it has'}"
    return None

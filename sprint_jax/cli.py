"""What the commands share: bad input ends in one line on stderr and a non-zero exit, never a traceback."""

import contextlib
import sys

from absl import flags

from sprint_jax.errors import UserError


def fail(message):
    """Prints the message as one line and exits with status 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def user_errors():
    """Ends the process in one line on a UserError."""
    try:
        yield
    except UserError as error:
        fail(error)


def parse_flags(argv):
    """absl flag parsing whose failures (unknown flag, key or preset, unreadable file) are one line."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
        fail(str(error) or repr(error))

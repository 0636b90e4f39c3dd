"""Files that another program wrote, one JSON object a line, each line for one picture."""

import json

from sprint_jax.errors import UserError
from sprint_jax.storage import files


def read(path, flag, parse, *, kind, form) -> dict:
    """{key: value} of a file's lines; empty lines are passed over.

    Args:
      flag: name of the command's flag that names the file. parse: row -> (key, value, the key in words).
      kind: what a line is, with its article. form: module whose docstring says how it looks.
    Raises UserError naming the first line that is not one, or whose key has a line already.
    """
    try:
        lines = files.read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --{flag}={path} ({error}): give a JSON lines file") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            key, value, words = parse(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} line {number} is not {kind} ({type(error).__name__}: {error}): see {form} for the form"
            ) from None
        if key in found:
            raise UserError(f"{path} line {number}: {words} has a line already")
        found[key] = value
    return found

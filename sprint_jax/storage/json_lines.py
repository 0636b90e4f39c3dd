"""Files of JSON lines: one object a line."""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sprint_jax.errors import UserError
from sprint_jax.storage import files, json_files


def read(
    path: str | os.PathLike,
    flag: str,
    parse: Callable[[Any], tuple[Any, Any, str]],
    *,
    kind: str,
    form: str,
) -> dict[Any, Any]:
    """Return {key: value} of a file that another program wrote; empty lines are left out.

    Args:
      path: the file.
      flag: name of the command's flag that gives the file.
      parse: row -> (key, value, the key in words).
      kind: what a line is, with its article.
      form: module whose docstring describes a line.

    Raises UserError naming the first line that is malformed, or whose key has a line already.
    """
    try:
        lines = files.read_lines(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --{flag}={path} ({error}): give a JSON lines file") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            key, value, words = parse(json_files.parse(line))
            twice = key in found
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path} line {number} is not {kind} ({type(error).__name__}: {why}): see {form} "
                "for the form"
            ) from None
        if twice:
            raise UserError(f"{path} line {number}: {words} has a line already")
        found[key] = value
    return found


def rows(
    path: str | os.PathLike, keys: Iterable[str] = (), *, kind: str | None = None
) -> list[dict[str, Any]]:
    """Return the rows of a file that a command appends to; none if there is no file.

    A command that is killed may leave a damaged line, which is left out: no JSON, or an object
    without all of `keys`. kind: what a line is, with its article; damaged lines before the last one
    then raise UserError, for files whose every line is dear.
    """
    path, keys, found = pathlib.Path(path), frozenset(keys), []
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): restore or remove it") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json_files.parse(line)
        except ValueError:  # no JSON, or no UTF-8
            row = None
        if isinstance(row, dict) and keys <= row.keys():
            found.append(row)
        elif kind is not None and number < len(lines):
            raise UserError(f"{path} line {number} is not {kind}: remove that line")
    return found


def write(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, the file whole or not at all."""
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append(path: str | os.PathLike, row: Mapping[str, Any]) -> None:
    """Add a row to a file."""
    files.append(path, json.dumps(row) + "\n")

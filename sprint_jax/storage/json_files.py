"""JSON: the one reader of JSON text, and files that hold one value."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from sprint_jax.errors import UserError
from sprint_jax.storage import files

_DEEPEST = 100  # brackets within brackets; walks over values are recursive


def parse(
    text: str | bytes,
    *,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
    constant: Callable[[str], Any] | None = None,
) -> Any:
    """Return the value that JSON text spells out.

    Args:
      text: a string, or bytes in UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.
      pairs: makes an object of its [(key, value)], which may repeat keys; default: dict.
      constant: makes a value of NaN, Infinity and -Infinity; default: float.

    Raises ValueError for anything else, brackets nested more than 100 deep included.
    """
    if isinstance(text, str):
        text = text.removeprefix("\ufeff")
    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None
    if _brackets(text) > _DEEPEST and _is_deep(value):
        raise ValueError("brackets are nested too deep")
    return value


def _brackets(text: str | bytes) -> int:
    """Return how many brackets JSON text opens, in strings as well."""
    if isinstance(text, bytes):
        return text.count(b"[") + text.count(b"{")
    return text.count("[") + text.count("{")


def _is_deep(value: Any) -> bool:
    """Return whether lists and objects are nested deeper than `_DEEPEST`."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        inner = [part for part in level if isinstance(part, list | dict)]
        if not inner:
            return False
        level = [x for part in inner for x in (part.values() if type(part) is dict else part)]
    return True


def read(path: str | os.PathLike) -> Any:
    """Return the value of a JSON file. Raises OSError, or ValueError as `parse` does."""
    return parse(pathlib.Path(path).read_bytes())


def read_object(path: str | os.PathLike, remedy: str) -> dict[str, Any]:
    """Return the JSON object of a file. Raises UserError, which ends with the remedy."""
    try:
        value = read(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: {remedy}")
    return value


def write(path: str | os.PathLike, value: Any, *, indent: int = 2, sort_keys: bool = False) -> None:
    """Write a value as JSON, the file whole or not at all. Keeps letters beyond ASCII."""
    text = json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=False)
    files.write_text(path, text + "\n")


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object as JSON gives it back: tuples are lists, keys are strings."""
    return json.loads(json.dumps(dict(value)))

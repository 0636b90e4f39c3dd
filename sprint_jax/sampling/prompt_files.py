"""Files of prompts: text, JSON lines, JSON, and tables with commas or tabs."""

import collections
import csv
import dataclasses
import io
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from sprint_jax.encoders.prompts import is_blank
from sprint_jax.errors import UserError
from sprint_jax.storage import files, json_files

_ID = re.compile(r"[\w-][\w.-]*")
_LONGEST_ID = 150  # bytes; a file's name has at most 255, with what commands add
TABLES = (".csv", ".tsv", ".tab")
_LINES = (".jsonl", ".ndjson")
_TEXTS, _IDS = ("prompt", "caption", "text"), ("id", "item_id")  # columns, the first found counts


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of a file.

    id: unique, may name a file of images. row: everything that the file says about the prompt.
    place: where it stands, for messages.
    """

    id: str
    text: str
    row: Any
    place: str = ""


def read(path: str | os.PathLike, name: str = "--prompts") -> list[Prompt]:
    """Return the prompts of a file.

    name: of what gave the path, for messages.

    The name's ending, in letters of any case, decides about the form. .jsonl: rows with "prompt"
    and perhaps "id". .json: {id: {"prompt": ...}}, as MJHQ-30K's meta_data.json. .csv, .tsv: a
    table with a column prompt, caption or text, and perhaps id or item_id; rows that repeat one
    item, as in dpg_bench.csv, are one prompt. Any other: text, one prompt a line. The default id is
    the number of the prompt in five digits.

    Raises UserError naming the first line that cannot be used, and ids that occur twice.
    """
    path = pathlib.Path(path)
    ending, lines = path.suffix.lower(), read_lines(path, name)
    if ending in TABLES:
        prompts = list(_table(lines, path))
    elif ending == ".json":
        prompts = _object("\n".join(lines), path)
    else:
        one = _row if ending in _LINES else _plain
        numbered = [(number, line) for number, line in enumerate(lines, 1) if not is_blank(line)]
        prompts = [one(i, number, line, path) for i, (number, line) in enumerate(numbered)]
    check(prompts, path, name)
    return prompts


def read_lines(path: pathlib.Path, name: str = "--prompts") -> list[str]:
    """Return the lines of a file of prompts. Raises UserError for a file that is not UTF-8 text."""
    try:
        return files.read_lines(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {name}={path} ({why}): give a UTF-8 text file") from None


def _plain(index, number, line, path):
    if line.lstrip()[0] in "[{":
        try:
            json_files.parse(line)
        except ValueError:
            return Prompt(f"{index:05d}", line, {}, f"{path} line {number}")
        raise UserError(
            f"{path} line {number} is JSON, not a prompt: give the file the ending .jsonl"
        )
    cells = [cell.strip().strip('"').lower() for cell in re.split("[\t,;]", line)]
    if index == 0 and len(cells) > 1 and "prompt" in cells:
        raise UserError(
            f"{path} line {number} is the head of a table, not a prompt: give the file the ending "
            ".csv or .tsv"
        )
    return Prompt(f"{index:05d}", line, {}, f"{path} line {number}")


def _row(index, number, line, path):
    place = f"{path} line {number}"
    try:
        row = json_files.parse(line)
        return Prompt(str(row.get("id", f"{index:05d}")), row["prompt"], row, place)
    except (ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f"{place} is not a JSON object with a prompt") from None


def _object(text, path):
    try:
        rows = json_files.parse(text, pairs=_unique)
        return [
            Prompt(name, row["prompt"], row, f"{path} key {_short(name)}")
            for name, row in rows.items()
        ]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f'{path} is not a table of prompts ({error}): {{id: {{"prompt": ...}}, ...}}'
        ) from None


def _unique(pairs):
    """Return a dict of pairs. Repeated keys raise ValueError instead of being dropped."""
    counts = collections.Counter(name for name, _ in pairs)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(f"{len(twice)} ids occur twice, first {_short(twice[0])}")
    return dict(pairs)


def columns(lines: Sequence[str], ending: str) -> tuple[str, list[str]]:
    """Return (separator, names of the columns) of the first line of a table.

    A .csv may have semicolons or tabs, as spreadsheets write in some languages.
    """
    best = ("", [])
    for separator in ("\t", ",", ";") if ending == ".csv" else ("\t",):
        heads = next(csv.reader(lines[:1], delimiter=separator), [])
        if len(heads) > len(best[1]):
            best = (separator, heads)
    return best


def _table(lines: Sequence[str], path: pathlib.Path) -> Iterator[Prompt]:
    """Yield the prompts of a table. Raises UserError for one without prompts' column."""
    separator, heads = columns(lines, path.suffix.lower())
    names = [head.strip().lower() for head in heads]
    text, key = (next((n for n in some if n in names), None) for some in (_TEXTS, _IDS))
    if text is None:
        shown = ", ".join(filter(None, map(_short, heads))) or "no head"
        raise UserError(
            f"{path} has no column {', '.join(_TEXTS)}, it has {shown}: name the prompts' column "
            "in the first line"
        )
    reader = csv.reader(io.StringIO("\n".join(lines), newline=""), delimiter=separator, strict=True)
    known, count, last = {}, 0, 1
    try:
        for cells in reader:
            first, last = last, reader.line_num + 1
            if first == 1 or not any(cells):
                continue
            if len(cells) != len(names):
                raise ValueError(f"line {first} has {len(cells)} cells, not {len(names)}")
            row = dict(zip(names, cells, strict=True))
            name = row[key] if key else f"{count:05d}"
            if "proposition_id" in row and known.get(name) == row[text]:
                continue
            known[name] = row[text]
            yield Prompt(name, row[text], row, f"{path} line {first}")
            count += 1
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is not a table of prompts ({error}): fix that line") from None


def check(prompts: Sequence[Prompt], path: pathlib.Path, name: str = "--prompts") -> None:
    """Raise UserError for no prompts, prompts that are no text, and ids that cannot name files."""
    if not prompts:
        raise UserError(f"{name}={path} holds no prompt: write one a line")
    for prompt in prompts:
        if not isinstance(prompt.text, str):
            raise UserError(f"{prompt.place or path}: the prompt of {prompt.id} is not text")
        if not _ID.fullmatch(prompt.id):
            raise UserError(
                f"{path}: the id {_short(prompt.id)!r} cannot name a file: use letters, digits, -, "
                "_ and ."
            )
        if len(prompt.id.encode("utf-8", "surrogatepass")) > _LONGEST_ID:
            raise UserError(
                f"{prompt.place or path}: the id {prompt.id[:20]}... has {len(prompt.id)} letters, "
                f"too many for a file's name: use at most {_LONGEST_ID}"
            )
    counts = collections.Counter(prompt.id for prompt in prompts)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UserError(
            f"{path}: {len(twice)} ids occur twice, first {_short(twice[0])}: give each prompt its "
            "own"
        )


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."

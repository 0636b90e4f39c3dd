"""Prompts of benchmarks: text, JSON lines, MJHQ's JSON, GenEval's metadata, DPG-Bench's table."""

import collections
import dataclasses
import os
import pathlib
import re
from typing import Any

from sprint_jax.errors import UserError
from sprint_jax.evaluation import dpg
from sprint_jax.storage import fields, files, json_files
from sprint_jax.toy import shapes

_LONGEST_ID = 150  # bytes; a file's name has at most 255, with what commands add
_ID = re.compile(r"[\w-][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark.

    id: unique, names the image's file. row: everything that the file says about the prompt; for
    DPG-Bench a `dpg.Item`.
    """

    id: str
    text: str
    row: Any


def read(path: str | os.PathLike) -> list[Prompt]:
    """Return the prompts of a file.

    The name's ending decides about the form. .jsonl: rows with "prompt" and perhaps "id". .json:
    {id: {"prompt": ...}}, as MJHQ-30K's meta_data.json. .csv: dpg_bench.csv. Any other: text, one
    prompt a line. The default id is the number of the prompt in five digits.

    Raises UserError naming the first line that cannot be used, and ids that occur twice.
    """
    path = pathlib.Path(path)
    if path.suffix == ".csv":
        prompts = [Prompt(item.id, item.prompt, item) for item in dpg.read_questions(path)]
        _check(prompts, path)
        return prompts
    try:
        lines = files.read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts={path} ({error}): give a UTF-8 file") from None
    if path.suffix == ".json":
        prompts = _table("\n".join(lines), path)
    elif path.suffix == ".jsonl":
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        prompts = [_row(i, number, line, path) for i, (number, line) in enumerate(numbered)]
    else:
        told = [line for line in lines if line.strip()]
        prompts = [Prompt(f"{i:05d}", line, {}) for i, line in enumerate(told)]
    _check(prompts, path)
    return prompts


def _table(text, path):
    try:
        rows = _unique(text)
        return [Prompt(name, row["prompt"], row) for name, row in rows.items()]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f'{path} is not a table of prompts ({error}): {{id: {{"prompt": ...}}, ...}}'
        ) from None


def _unique(text):
    """Parse JSON. Repeated keys raise ValueError instead of being dropped."""

    def table(pairs):
        twice = sorted(
            name
            for name, count in collections.Counter(name for name, _ in pairs).items()
            if count > 1
        )
        if twice:
            raise ValueError(f"{len(twice)} ids occur twice, first {twice[0]}")
        return dict(pairs)

    return json_files.parse(text, pairs=table)


def _row(index, number, line, path):
    try:
        row = json_files.parse(line)
        return Prompt(str(row.get("id", f"{index:05d}")), row["prompt"], row)
    except (ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f"{path} line {number} is not a JSON object with a prompt") from None


def _check(prompts, path):
    if not prompts:
        raise UserError(f"--prompts={path} holds no prompt")
    for prompt in prompts:
        if not _ID.fullmatch(prompt.id):
            raise UserError(
                f"{path}: the id {fields.shown(prompt.id)} cannot name a file: use letters, "
                "digits, -, _ and ."
            )
        if len(os.fsencode(prompt.id)) > _LONGEST_ID:
            raise UserError(
                f"{path}: the id {prompt.id[:20]}... has {len(prompt.id)} letters, too many for a "
                f"file's name: use at most {_LONGEST_ID}"
            )
        if not isinstance(prompt.text, str):
            raise UserError(f"{path}: the prompt of {prompt.id} is not text")
    seen, twice = set(), []
    for prompt in prompts:
        twice += [prompt.id] if prompt.id in seen else []
        seen.add(prompt.id)
    if twice:
        raise UserError(
            f"{path}: {len(twice)} ids occur twice, first {twice[0]}: give each prompt its own"
        )


def heldout_captions(seed: int, count: int, size: int) -> list[Prompt]:
    """Return the first held-out captions of `shapes` that a run is scored on.

    seed: data.eval_seed of the run. size: data.size, in pixels.
    """
    examples = (shapes.example(seed, i, size=size, split="heldout") for i in range(count))
    return [Prompt(f"{i:05d}", example.text, {}) for i, example in enumerate(examples)]

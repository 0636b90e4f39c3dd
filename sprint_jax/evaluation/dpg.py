"""DPG-Bench: scores from recorded answers to questions about images.

Answers come as JSON lines, one line for each image. A prompt has four images, the crops of its
2 x 2 grid in reading order:

    {"item_id": "partiprompts0", "picture": 0, "answers": {"1": "yes", "2": "no", ...}}

The keys of answers are the proposition ids of the official dpg_bench.csv. Its columns item_id,
text, proposition_id and dependency are read here. The official model that answers is mPLUG-large;
its "yes" is 1, everything else 0.

The official script leaves out the first row of its table, the first proposition of one prompt,
because it takes the row for a header. It also leaves out prompts whose image it cannot score. Here
every row counts, and a prompt without answers is an error.
"""

import csv
import dataclasses
import io
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sprint_jax.errors import UserError
from sprint_jax.sampling import prompt_files
from sprint_jax.storage import fields, json_lines

PICTURES = 4
_COLUMNS = ("item_id", "text", "proposition_id", "dependency")


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt and its questions.

    parents: {proposition id: ids that it depends on}, in the order of the file.
    """

    id: str
    prompt: str
    parents: dict[int, tuple[int, ...]]


def read_questions(path: str | os.PathLike) -> list[Item]:
    """Return the prompts of dpg_bench.csv. Raises UserError naming the line that is wrong."""
    lines = prompt_files.read_lines(pathlib.Path(path))
    separator, _ = prompt_files.columns(lines, pathlib.Path(path).suffix.lower())
    table = io.StringIO("\n".join(lines), newline="")
    try:
        rows = list(csv.DictReader(table, delimiter=separator or ","))
    except csv.Error as error:
        raise UserError(
            f"cannot read the questions in {path} ({error}): give dpg_bench.csv"
        ) from None
    lacking = [name for name in _COLUMNS if not rows or rows[0].get(name) is None]
    if lacking:
        raise UserError(f"{path} lacks the columns {', '.join(lacking)}: give dpg_bench.csv")
    texts: dict[str, str] = {}
    parents: dict[str, dict[int, tuple[int, ...]]] = {}
    for number, row in enumerate(rows, 2):
        item = row["item_id"]
        try:
            question = int(row["proposition_id"])
            wanted = tuple(int(part) for part in row["dependency"].split(",") if int(part))
        except (ValueError, AttributeError, TypeError):
            raise UserError(
                f"{path} line {number}: proposition_id and dependency must be whole numbers"
            ) from None
        questions = parents.setdefault(item, {})
        if question in questions:  # the official reader silently keeps the last one too
            warnings.warn(
                f"{path} line {number}: {item} has proposition {question} twice, the later one "
                "counts",
                stacklevel=2,
            )
        texts.setdefault(item, row["text"])
        questions[question] = wanted
    for item, questions in parents.items():
        unknown = [p for wanted in questions.values() for p in wanted if p not in questions]
        if unknown:
            raise UserError(
                f"{path}: {item} depends on proposition {unknown[0]}, which it does not have"
            )
    return [Item(item, texts[item], parents[item]) for item in texts]


def picture_score(answers: Mapping[int, bool], parents: Mapping[int, tuple[int, ...]]) -> float:
    """Return the mean score of an image's questions.

    A question scores 0 if a question that it depends on scores 0. answers: {proposition id: bool}.
    parents: as in `Item`. Questions are scored in its order, so a "no" reaches a question through
    those that come before it in the file.
    """
    scores = {question: float(answers[question]) for question in parents}
    for question, wanted in parents.items():
        if any(scores[parent] == 0 for parent in wanted):
            scores[question] = 0.0
    return float(np.mean(list(scores.values())))


def score(
    answers: Mapping[tuple[str, int], Mapping[int, bool]],
    items: Sequence[Item],
    pictures: int = PICTURES,
) -> dict[str, Any]:
    """Return {"score": 100 x the mean over prompts, "items": {id: mean over images}}.

    answers: {(item id, number of the image): {proposition id: bool}}. Raises UserError for missing
    answers.
    """
    absent = [(i.id, n) for i in items for n in range(pictures) if (i.id, n) not in answers]
    if absent:
        raise UserError(
            f"{len(absent)} of {len(items) * pictures} images have no answers, first picture "
            f"{absent[0][1]} of {absent[0][0]}: ask about all of them"
        )
    shares = {}
    for item in items:
        each = []
        for number in range(pictures):
            given = answers[item.id, number]
            unanswered = [q for q in item.parents if q not in given]
            if unanswered:
                raise UserError(
                    f"picture {number} of {item.id} has no answer to proposition {unanswered[0]}"
                )
            each.append(picture_score(given, item.parents))
        shares[item.id] = float(np.mean(each))
    return {"score": 100 * float(np.mean(list(shares.values()))), "items": shares}


def read_answers(path: str | os.PathLike) -> dict[tuple[str, int], dict[int, bool]]:
    """Return {(item id, number of the image): {proposition id: bool}} of a file of answers.

    Raises UserError naming the first line that is malformed.
    """
    return json_lines.read(
        path, "answers", _answers, kind="an answer", form="sprint_jax/evaluation/dpg.py"
    )


def _answers(row):
    item, picture = row["item_id"], row["picture"]
    if type(item) not in (str, int):
        raise ValueError(f"item_id {fields.shown(item)}")
    item = str(item)
    if isinstance(picture, str) and picture.isdecimal() and len(picture) < 3:
        picture = int(picture)
    if type(picture) is not int or not 0 <= picture < PICTURES:
        raise ValueError(f"picture {fields.shown(picture)}: a number from 0 to {PICTURES - 1}")
    given = {int(question): _yes(answer) for question, answer in row["answers"].items()}
    if len(given) != len(row["answers"]):
        raise ValueError("one proposition is answered twice")
    return (item, picture), given, f"picture {picture} of {item}"


def _yes(answer):
    if isinstance(answer, str):
        return answer == "yes"
    if answer in (0, 1):  # bool too
        return bool(answer)
    raise ValueError(f"answer {fields.shown(answer)}")


def grid(images: np.ndarray) -> np.ndarray:
    """Return four images, uint8 [4, H, W, 3], as one [2 H, 2 W, 3], in reading order, no gaps."""
    a, b, c, d = images
    return np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)])


def crops(sheet: np.ndarray) -> np.ndarray:
    """Cut a grid, uint8 [2 H, 2 W, 3], into its four images [4, H, W, 3]: the inverse of `grid`.

    Raises UserError for odd sides.
    """
    height, width = sheet.shape[:2]
    if height % 2 or width % 2:
        raise UserError(
            f"a 2 x 2 grid of {height} x {width} pixels cannot be cut in four equal images"
        )
    h, w = height // 2, width // 2
    return np.stack([sheet[:h, :w], sheet[:h, w:], sheet[h:, :w], sheet[h:, w:]])

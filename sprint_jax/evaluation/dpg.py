"""DPG-Bench: scores from recorded answers of a visual question answerer, and the crops that it is asked about.

Answers come as JSON lines, one picture a line; a prompt has four, the crops of its 2 x 2 grid in reading order:

    {"item_id": "partiprompts0", "picture": 0, "answers": {"1": "yes", "2": "no", ...}}

The keys of answers are the proposition ids of the official dpg_bench.csv, whose columns item_id, text,
proposition_id and dependency are read here. The official answerer is mPLUG-large; its "yes" is 1, all else 0.

The official script leaves the first row of its table out (the first proposition of one prompt), whose header is gone by then,
and prompts whose picture it cannot score; here every row counts, and a prompt without answers is an error.
"""

import csv
import dataclasses
import warnings

import numpy as np

from sprint_jax.errors import UserError
from sprint_jax.storage import json_lines

PICTURES = 4
_COLUMNS = ("item_id", "text", "proposition_id", "dependency")


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt and its questions. parents: {proposition id: ids it depends on}, in the order of the file."""

    id: str
    prompt: str
    parents: dict[int, tuple[int, ...]]


def read_questions(path) -> list[Item]:
    """The prompts of dpg_bench.csv. Raises UserError naming the line that is wrong."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"cannot read the questions in {path} ({error}): give dpg_bench.csv"
        ) from None
    lacking = [name for name in _COLUMNS if not rows or rows[0].get(name) is None]
    if lacking:
        raise UserError(f"{path} lacks the columns {', '.join(lacking)}: give dpg_bench.csv")
    texts, parents = {}, {}
    for number, row in enumerate(rows, 2):
        item = row["item_id"]
        try:
            question = int(row["proposition_id"])
            wanted = tuple(int(part) for part in row["dependency"].split(",") if int(part))
        except (ValueError, AttributeError):
            raise UserError(
                f"{path} line {number}: proposition_id and dependency must be whole numbers"
            ) from None
        questions = parents.setdefault(item, {})
        if question in questions:  # the official reader keeps the last one too, without a word
            warnings.warn(
                f"{path} line {number}: {item} has proposition {question} twice, the later one counts",
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


def picture_score(answers, parents) -> float:
    """Mean over questions, a question counting 0 where one it depends on counts 0.

    answers: {proposition id: bool}. parents: as in `Item`, walked in its order, so that a "no" reaches the
    questions below it through those that come before them in the file.
    """
    scores = {question: float(answers[question]) for question in parents}
    for question, wanted in parents.items():
        if any(scores[parent] == 0 for parent in wanted):
            scores[question] = 0.0
    return float(np.mean(list(scores.values())))


def score(answers, items, pictures=PICTURES) -> dict:
    """{"score": 100 x the mean over prompts of the mean over pictures, "items": {id: share}}.

    answers: {(item id, picture): {proposition id: bool}}. Raises UserError for answers that are missing.
    """
    absent = [(i.id, n) for i in items for n in range(pictures) if (i.id, n) not in answers]
    if absent:
        raise UserError(
            f"{len(absent)} of {len(items) * pictures} pictures have no answers, first picture {absent[0][1]} of {absent[0][0]}: "
            "ask about all of them"
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


def read_answers(path) -> dict:
    """{(item id, picture): {proposition id: bool}}. Raises UserError naming the first line that is not one."""
    return json_lines.read(
        path, "answers", _answers, kind="an answer", form="sprint_jax/evaluation/dpg.py"
    )


def _answers(row):
    item, picture = str(row["item_id"]), int(row["picture"])
    given = {int(question): _yes(answer) for question, answer in row["answers"].items()}
    return (item, picture), given, f"picture {picture} of {item}"


def _yes(answer):
    if isinstance(answer, str):
        return answer == "yes"
    if answer in (0, 1):  # bool too
        return bool(answer)
    raise ValueError(f"answer {answer!r}")


def grid(images):
    """Four pictures uint8 [4, H, W, 3] -> [2 H, 2 W, 3] in reading order, without gaps."""
    a, b, c, d = images
    return np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)])


def crops(sheet):
    """The inverse of `grid`: uint8 [2 H, 2 W, 3] -> [4, H, W, 3]. Raises UserError for odd sides."""
    height, width = sheet.shape[:2]
    if height % 2 or width % 2:
        raise UserError(
            f"a 2 x 2 grid of {height} x {width} pixels cannot be cut in four equal pictures"
        )
    h, w = height // 2, width // 2
    return np.stack([sheet[:h, :w], sheet[:h, w:], sheet[h:, :w], sheet[h:, w:]])

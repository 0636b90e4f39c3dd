"""GenEval (arXiv 2310.11513): its rules on recorded detections.

Detections come as JSON lines, one line for each image, from whatever runs the detector. Officially
that is Mask2Former Swin-S of mmdet, and CLIP ViT-L/14 for the color of each box:

    {"file": "00000/samples/00000.png",
     "objects": [{"class": "dog", "box": [x1, y1, x2, y2], "confidence": 0.97, "color": "red"}]}

`file` is relative to the folder of images. `box` is in pixels, x to the right and y down. The list
has all objects that the detector reports, of any confidence from 0 to 1; thresholds are applied
here. `class` is a name of GenEval's object_names.txt, or one that a prompt asks for. `color`
(or `colour`) is one of `COLORS`. It is needed only for objects whose class a prompt asks for by
color. An image without objects has an empty list. An image without a line is an error.

The metadata of a prompt are those of the official evaluation_metadata.jsonl: `prompt`, `tag`,
`include` and perhaps `exclude`. `include` is a list of {"class", "count"} with perhaps "color" and
"position": [relation, index into include].
"""

import collections
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from sprint_jax.errors import UserError
from sprint_jax.storage import fields, json_lines

Detection: TypeAlias = dict[str, Any]  # an object of a line, with the keys above

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# The names of COCO's classes in the official object_names.txt, which differ for mouse, remote and
# keyboard.
CLASSES = frozenset((
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
))  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
CONFIDENCE = 0.3  # an object counts above this
COUNTING_CONFIDENCE = 0.9  # in the task of counting
MOST_OBJECTS = 16  # of a class, the most confident ones
POSITION_MARGIN = 0.1  # share of both extents that is taken off the distance of two centers
_DIRECTION = 0.5  # smallest share of the distance that lies along the named axis
_LEVEL = 1e-3  # pixels; a smaller distance has no direction


def check_metadata(metadata: Any, where: str) -> None:
    """Raise UserError if the metadata of a prompt are not of the official form.

    where: names the prompt in the error line.
    """
    if (
        not isinstance(metadata, dict)
        or metadata.get("tag") not in TASKS
        or not metadata.get("include")
        or not all(isinstance(metadata.get(kind, []), list) for kind in ("include", "exclude"))
    ):
        raise UserError(
            f"{where} is not GenEval metadata: it needs prompt, tag (one of {', '.join(TASKS)}) "
            "and include"
        )
    for kind in ("include", "exclude"):
        for number, wanted in enumerate(metadata.get(kind, [])):
            if (
                not isinstance(wanted, dict)
                or not isinstance(wanted.get("class"), str)
                or type(wanted.get("count")) is not int
                or wanted["count"] < 1
            ):
                raise UserError(f"{where}: {kind} {number} needs class and count, a number")
    for number, wanted in enumerate(metadata["include"]):
        if wanted.get("color", COLORS[0]) not in COLORS:
            raise UserError(
                f"{where}: include {number} asks for color {wanted['color']!r}: use one of "
                f"{', '.join(COLORS)}"
            )
        if "position" in wanted:
            match wanted["position"]:
                case [relation, int(target)] if relation in RELATIONS and 0 <= target < number:
                    continue
            raise UserError(
                f"{where}: include {number} has position {wanted['position']}: give a relation and "
                "an earlier index"
            )


def kept(objects: Sequence[Detection], task: str) -> dict[str, list[Detection]]:
    """Return {class: objects} above the task's confidence.

    The most confident objects come first, at most 16 of a class.
    """
    least = COUNTING_CONFIDENCE if task == "counting" else CONFIDENCE
    by_class: dict[str, list[Detection]] = collections.defaultdict(list)
    for one in sorted(objects, key=lambda o: -o["confidence"]):
        if one["confidence"] > least and len(by_class[one["class"]]) < MOST_OBJECTS:
            by_class[one["class"]].append(one)
    return {name: found for name, found in by_class.items() if found}


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Return where a box is as seen from another.

    The set has none, one, or on an exact diagonal two of `RELATIONS`. The distance of the centers
    is shortened on each axis by a tenth of both extents. A direction holds if the rest on its axis
    is more than half of the whole distance.
    """
    a, b = (np.asarray(corners, np.float64).reshape(2, 2) for corners in (box, other))
    apart = a.mean(0) - b.mean(0)
    margin = POSITION_MARGIN * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0]))
    left = np.sign(apart) * np.maximum(np.abs(apart) - margin, 0)
    if (np.abs(left) < _LEVEL).all():
        return set()
    x, y = left / np.linalg.norm(apart)
    holds = {
        "left of": x < -_DIRECTION,
        "right of": x > _DIRECTION,
        "above": y < -_DIRECTION,
        "below": y > _DIRECTION,
    }
    return {name for name, true in holds.items() if true}


def judge(objects: Sequence[Detection], metadata: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Return whether an image shows what its prompt asks for, and what is wrong.

    objects: detections of one image, as in the file. Raises KeyError if a color that is needed is
    missing.
    """
    found = kept(objects, metadata["tag"])
    groups: list[list[Detection] | None] = []
    faults: list[str] = []
    for wanted in metadata["include"]:
        # The most confident ones stand for the class, in color and position too.
        chosen = found.get(wanted["class"], [])[: wanted["count"]]
        fault = _fault(chosen, wanted, groups)
        groups.append(None if fault else chosen)
        faults += [fault] if fault else []
    for unwanted in metadata.get("exclude", []):
        number = len(found.get(unwanted["class"], []))
        if number >= unwanted["count"]:
            faults.append(
                f"expected fewer than {unwanted['count']} {unwanted['class']}, found {number}"
            )
    return not faults, faults


def _fault(chosen, wanted, groups):
    """Return what is wrong with the objects chosen for one entry of include, None if nothing."""
    if len(chosen) < wanted["count"]:
        return f"expected {wanted['count']} {wanted['class']}, found {len(chosen)}"
    if "color" in wanted:
        colors = [o["colour"] if "colour" in o else o["color"] for o in chosen]
        if colors.count(wanted["color"]) < wanted["count"]:
            expected = f"{wanted['count']} {wanted['color']} {wanted['class']}"
            return f"expected {expected}, found {', '.join(colors)}"
    if "position" in wanted:
        relation, target = wanted["position"]
        if groups[target] is None:
            return f"no target for {wanted['class']} to be {relation}"
        if not all(
            relation in relations(o["box"], other["box"])
            for o in chosen
            for other in groups[target]
        ):
            return f"expected {wanted['class']} {relation} the target"
    return None


def read_detections(path: str | os.PathLike) -> dict[str, list[Detection]]:
    """Return {file: objects} of a file of detections.

    Raises UserError naming the first line that is malformed.
    """
    return json_lines.read(
        path, "detections", _detections, kind="a detection", form="sprint_jax/evaluation/geneval.py"
    )


def _detections(row):
    if not isinstance(row["file"], str) or not isinstance(row["objects"], list):
        raise TypeError("file must be text, and objects a list")
    return row["file"], [_object(o) for o in row["objects"]], row["file"]


def _object(row):
    name, box, confidence = row["class"], row["box"], row["confidence"]
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"class {fields.shown(name)}: it must be a name")
    if not fields.NUMBER.many().accepts(box) or len(box) != 4:
        raise ValueError(f"box {fields.shown(box)}: it must be four numbers")
    if box[0] > box[2] or box[1] > box[3]:
        raise ValueError(f"box {box}: it must be [x1, y1, x2, y2] with x1 <= x2 and y1 <= y2")
    if not fields.NUMBER.accepts(confidence) or not 0 <= confidence <= 1:
        raise ValueError(f"confidence {fields.shown(confidence)}: it must be from 0 to 1")
    given = [row[key] for key in ("colour", "color") if row.get(key) is not None]
    color = given[0] if given else None
    if any(one not in COLORS or one != color for one in given):
        raise ValueError(f"color {', '.join(map(fields.shown, given))}")
    found = {"class": name, "box": box, "confidence": float(confidence)}
    return found | ({"color": color} if color else {})


def _check_classes(detections, images):
    """Raise UserError for a class that is unknown: its objects would count as absent.

    Where prompts ask for GenEval's classes alone, any other name is, such as mouse. Where they ask
    for more, the detector has a vocabulary of its own, and only another spelling of a known name is
    unknown, such as Dog.
    """
    lists = (m.get(kind, []) for _, m in images for kind in ("include", "exclude"))
    asked = {wanted["class"] for some in lists for wanted in some}
    known, official = CLASSES | asked, asked <= CLASSES
    spellings = {_spelled(name): name for name in known}
    for file, _ in images:
        for name in (one["class"] for one in detections[file]):
            if name not in known and (official or _spelled(name) in spellings):
                near = spellings.get(_spelled(name)) or next(
                    iter(difflib.get_close_matches(name.lower(), known, 1)), "dog"
                )
                raise UserError(
                    f"detections of {file} have the class {fields.shown(name)}, which no prompt "
                    f"and no part of GenEval has: use its names, such as {near!r}"
                )


def _spelled(name):
    """Return a name without what writers of names differ in."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def score(
    detections: Mapping[str, Sequence[Detection]],
    images: Sequence[tuple[str, Mapping[str, Any]]],
) -> dict[str, Any]:
    """Return the share of right images of each task, and the mean of the tasks.

    Args:
      detections: {file: objects}.
      images: [(file, metadata)].

    Returns:
      {"overall": mean of the tasks that occur, "tasks": {task: share},
      "counts": {task: number of images}, "wrong": {file: reasons}}.

    Raises UserError for images without detections, for a class that is unknown, and for a color
    that is needed and missing.
    """
    absent = [file for file, _ in images if file not in detections]
    if absent:
        raise UserError(
            f"{len(absent)} of {len(images)} images have no detections, first {absent[0]}: run the "
            "detector on all"
        )
    _check_classes(detections, images)
    right: dict[str, list[bool]] = collections.defaultdict(list)
    wrong: dict[str, list[str]] = {}
    for file, metadata in images:
        try:
            correct, reasons = judge(detections[file], metadata)
        except KeyError:
            raise UserError(
                f"detections of {file} lack a color that its prompt asks about: "
                'add "color" to its objects'
            ) from None
        right[metadata["tag"]].append(correct)
        if not correct:
            wrong[file] = reasons
    tasks = {task: float(np.mean(right[task])) for task in TASKS if task in right}
    counts = {task: len(right[task]) for task in tasks}
    return {
        "overall": float(np.mean(list(tasks.values()))),
        "tasks": tasks,
        "counts": counts,
        "wrong": wrong,
    }

"""GenEval (arXiv 2310.11513): its rules on recorded detections, and the folders that its detector reads.

Detections come as JSON lines, one picture a line, from whatever runs the detector (officially Mask2Former Swin-S
of mmdet, and CLIP ViT-L/14 for the colour of each box):

    {"file": "00000/samples/00000.png",
     "objects": [{"class": "dog", "box": [x1, y1, x2, y2], "confidence": 0.97, "colour": "red"}, ...]}

`file` is relative to the folder of pictures. `box` is in pixels, x to the right and y down. All objects that the
detector reports belong in the list, of any confidence; thresholds are applied here. `colour` (or `color`) is one
of `COLOURS`; it is needed only of objects whose class a prompt asks for by colour. A picture without objects has
an empty list; a picture without a line is an error.

The metadata of a prompt are those of the official evaluation_metadata.jsonl: `prompt`, `tag`, `include` (a list
of {"class", "count"} with perhaps "color" and "position": [relation, index into include]) and perhaps `exclude`.
"""

import collections

import numpy as np

from sprint_jax.errors import UserError
from sprint_jax.storage import json_lines

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
CONFIDENCE = 0.3  # an object counts above this
COUNTING_CONFIDENCE = 0.9  # in the task of counting
MOST_OBJECTS = 16  # of a class, the most confident ones
POSITION_MARGIN = 0.1  # of the two extents together, taken off the distance of two centres
_DIRECTION = 0.5  # least share of the distance that must lie along the named axis
_LEVEL = 1e-3  # pixels; less is no direction


def check_metadata(metadata, where):
    """Raises UserError where the metadata of a prompt are not of the official form. where: names them."""
    if (
        not isinstance(metadata, dict)
        or metadata.get("tag") not in TASKS
        or not metadata.get("include")
    ):
        raise UserError(
            f"{where} is not GenEval metadata: it needs prompt, tag (one of {', '.join(TASKS)}) and include"
        )
    for kind in ("include", "exclude"):
        for number, wanted in enumerate(metadata.get(kind, [])):
            if (
                not isinstance(wanted, dict)
                or "class" not in wanted
                or type(wanted.get("count")) is not int
            ):
                raise UserError(f"{where}: {kind} {number} needs class and count, a number")
    for number, wanted in enumerate(metadata["include"]):
        if wanted.get("color", COLOURS[0]) not in COLOURS:
            raise UserError(
                f"{where}: include {number} asks for color {wanted['color']!r}: use one of {', '.join(COLOURS)}"
            )
        if "position" in wanted:
            match wanted["position"]:
                case [relation, int(target)] if relation in RELATIONS and 0 <= target < number:
                    continue
            raise UserError(
                f"{where}: include {number} has position {wanted['position']}: a relation and an earlier index"
            )


def kept(objects, task):
    """{class: its objects}: those above the task's confidence, the most confident first, at most 16 of a class."""
    least = COUNTING_CONFIDENCE if task == "counting" else CONFIDENCE
    by_class = collections.defaultdict(list)
    for one in sorted(objects, key=lambda o: -o["confidence"]):
        if one["confidence"] > least and len(by_class[one["class"]]) < MOST_OBJECTS:
            by_class[one["class"]].append(one)
    return {name: found for name, found in by_class.items() if found}


def relations(box, other):
    """Where a box is as seen from another: a set of none, one or (exactly diagonal) two of `RELATIONS`.

    The distance of the centres is shortened on each axis by a tenth of both extents; a direction holds where what
    is left on its axis is more than half of the whole distance.
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


def judge(objects, metadata) -> tuple[bool, list[str]]:
    """Whether a picture shows what its prompt asks for, and why not.

    objects: detections of one picture, as in the file. Raises KeyError where a colour is needed and not given.
    """
    found, groups, faults = kept(objects, metadata["tag"]), [], []
    for wanted in metadata["include"]:
        # The most confident ones stand for the class, in colour and position too.
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
    """What is wrong with the objects chosen for one entry of include; None where nothing is."""
    if len(chosen) < wanted["count"]:
        return f"expected {wanted['count']} {wanted['class']}, found {len(chosen)}"
    if "color" in wanted:
        colours = [o["colour"] if "colour" in o else o["color"] for o in chosen]
        if colours.count(wanted["color"]) < wanted["count"]:
            return f"expected {wanted['count']} {wanted['color']} {wanted['class']}, found {', '.join(colours)}"
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


def read_detections(path) -> dict[str, list]:
    """{file: objects} of a file of detections. Raises UserError naming the first line that is not one."""
    return json_lines.read(
        path, "detections", _detections, kind="a detection", form="sprint_jax/evaluation/geneval.py"
    )


def _detections(row):
    return row["file"], [_object(o) for o in row["objects"]], row["file"]


def _object(row):
    if len(row["box"]) != 4 or not np.isfinite([*row["box"], row["confidence"]]).all():
        raise ValueError(f"box {row['box']} with confidence {row['confidence']}")
    colour = row.get("colour", row.get("color"))
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"colour {colour!r}")
    return {"class": row["class"], "box": row["box"], "confidence": float(row["confidence"])} | (
        {"colour": colour} if colour else {}
    )


def score(detections, pictures) -> dict:
    """Shares right of each task, over pictures, and `overall`, the mean of the tasks.

    Args:
      detections: {file: objects}. pictures: [(file, metadata)].
    Returns:
      {"overall", "tasks": {task: share}, "counts": {task: pictures}, "wrong": {file: reasons}}. Without all six
      tasks, "overall" is the mean of those that are there.
    Raises UserError for pictures without detections, and for a colour that is needed and missing.
    """
    absent = [file for file, _ in pictures if file not in detections]
    if absent:
        raise UserError(
            f"{len(absent)} of {len(pictures)} pictures have no detections, first {absent[0]}: run the detector on all"
        )
    right, wrong = collections.defaultdict(list), {}
    for file, metadata in pictures:
        try:
            correct, reasons = judge(detections[file], metadata)
        except KeyError:
            raise UserError(
                f'detections of {file} lack a colour that its prompt asks about: add "colour" to its objects'
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

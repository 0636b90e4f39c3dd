"""Scores of recorded judgments: GenEval's detections and DPG-Bench's answers."""

import pathlib
import warnings
from typing import Any

from sprint_jax.errors import UserError
from sprint_jax.evaluation import dpg, geneval, prompt_sets
from sprint_jax.evaluation.images import folder
from sprint_jax.evaluation.options import Options
from sprint_jax.evaluation.scores import Scores
from sprint_jax.storage import files, image_files, json_files


def measure(options: Options, found: list[prompt_sets.Prompt] | None) -> Scores | None:
    """Return the scores of the record, None without one: a line then says how to make it.

    found: the prompts, None for the official folders in --folder. Raises UserError for a record of
    other images.
    """
    return _geneval(options, found) if options.suite == "geneval" else _dpg(options, found or [])


def _geneval(options: Options, found: list[prompt_sets.Prompt] | None) -> Scores | None:
    if not options.detections:
        print(
            f"images and metadata are in {folder(options)}; next: run the detector on it and give "
            "--detections=FILE.jsonl"
        )
        return None
    images = _geneval_images(options, found)
    scores = geneval.score(geneval.read_detections(options.detections), images)
    if lacking := [task for task in geneval.TASKS if task not in scores["tasks"]]:
        warnings.warn(
            f"no prompts of {', '.join(lacking)}: overall is the mean of the other tasks",
            stacklevel=1,
        )
    protocol = {
        "pictures": len(images),
        "detections": options.detections,
        "confidence": geneval.CONFIDENCE,
        "counting_confidence": geneval.COUNTING_CONFIDENCE,
        "most_objects": geneval.MOST_OBJECTS,
        "position_margin": geneval.POSITION_MARGIN,
    }
    return Scores(
        {"overall": scores["overall"], "tasks": scores["tasks"]},
        protocol,
        {"pictures": scores["counts"], "wrong": scores["wrong"]},
    )


def _geneval_images(
    options: Options, found: list[prompt_sets.Prompt] | None
) -> list[tuple[str, Any]]:
    """Return [(file, metadata)] of the prompts, or of the official folders in --folder."""
    if found is not None:
        return [
            (f"{i:05d}/samples/{j:05d}.png", prompt.row)
            for i, prompt in enumerate(found)
            for j in range(options.per_prompt)
        ]
    root, images = folder(options), []
    for path in (child / "metadata.jsonl" for child in _children(root)):
        if not path.is_file():
            continue
        metadata = _read_metadata(path)
        samples = [p for p in _children(path.parent / "samples") if image_files.is_image(p.name)]
        if not samples:
            raise UserError(f"{path.parent} has no samples: make them first")
        images += [(sample.relative_to(root).as_posix(), metadata) for sample in samples]
    if not images:
        raise UserError(
            f"{root} has no */metadata.jsonl: give the official layout, or "
            "--prompts=evaluation_metadata.jsonl"
        )
    return images


def _children(path: pathlib.Path) -> list[pathlib.Path]:
    return files.children(path) if path.is_dir() else []


def _read_metadata(path: pathlib.Path) -> Any:
    try:
        metadata = json_files.read(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): make the folder again") from None
    geneval.check_metadata(metadata, str(path))
    return metadata


def _dpg(options: Options, found: list[prompt_sets.Prompt]) -> Scores | None:
    if not options.answers:
        print(
            f"2 x 2 grids are in {folder(options)}; next: ask about their images and give "
            "--answers=FILE.jsonl"
        )
        return None
    scores = dpg.score(dpg.read_answers(options.answers), [prompt.row for prompt in found])
    protocol = {
        "prompts": len(found),
        "pictures": len(found) * dpg.PICTURES,
        "answers": options.answers,
    }
    return Scores({"dpg": scores["score"]}, protocol, {"items": scores["items"]})

"""Prompts of benchmarks: the files that `sampling.prompt_files` reads, and DPG-Bench's table."""

import os
import pathlib

from sprint_jax.evaluation import dpg
from sprint_jax.sampling import prompt_files
from sprint_jax.toy import shapes

Prompt = prompt_files.Prompt


def read(path: str | os.PathLike) -> list[Prompt]:
    """Return the prompts of a file, as `prompt_files.read` does.

    The rows of a table of questions, dpg_bench.csv, are `dpg.Item`.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() in prompt_files.TABLES:
        heads = prompt_files.columns(prompt_files.read_lines(path), path.suffix.lower())[1]
        if "proposition_id" in heads:
            prompts = [Prompt(item.id, item.prompt, item) for item in dpg.read_questions(path)]
            prompt_files.check(prompts, path)
            return prompts
    return prompt_files.read(path)


def heldout_captions(seed: int, count: int, size: int, split: str) -> list[Prompt]:
    """Return the first held-out captions of `shapes` that a run is scored on.

    seed: data.eval_seed of the run. size: data.size, in pixels. split: evaluation.split.
    """
    examples = (shapes.example(seed, i, size=size, split=split) for i in range(count))
    return [Prompt(f"{i:05d}", example.text, {}) for i, example in enumerate(examples)]

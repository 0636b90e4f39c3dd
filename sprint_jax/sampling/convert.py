"""Checkpoints between the layout of diffusers and ours."""

import dataclasses
import pathlib
from collections.abc import Callable

from sprint_jax.config import Config
from sprint_jax.conversion import folder
from sprint_jax.encoders import instruction
from sprint_jax.errors import UserError
from sprint_jax.models.controlnet import Controlled
from sprint_jax.sampling import loading


def convert(
    source: pathlib.Path,
    target: pathlib.Path,
    instruction_file: str | None,
    *,
    say: Callable[[str], None] = print,
) -> None:
    """Write a checkpoint in the other layout.

    Args:
      source: a diffusers folder, one of ours, a work directory of a run, or a .safetensors file by
        the official repository's names.
      target: folder to make, which appears whole or not at all.
      instruction_file: text before each prompt, for a diffusers folder; None takes diffusers' own.
      say: called with each line of progress.

    Raises UserError for any other source, and for a target that is not empty.
    """
    if source.is_file():
        folder.write_diffusers(target, folder.read_native(source))
    elif folder.is_diffusers(source):
        wording = instruction.published(instruction_file)
        folder.write_ours(
            target, folder.read_diffusers(source, dtype=None, instruction=wording, say=say)
        )
    elif folder.is_ours(source):
        folder.write_diffusers(target, folder.read_ours(source, dtype=None, say=say))
    elif source.is_dir():
        _convert_run(source, target, say)
    else:
        raise UserError(f"no folder or file {source}: give a checkpoint")


def _convert_run(source: pathlib.Path, target: pathlib.Path, say: Callable[[str], None]) -> None:
    """Write a run's student for diffusers and say what it lacks there."""
    student, config = _student(source)
    folder.write_diffusers(target, student)
    if config.text.vocabulary == "gemma":
        say(
            "only transformer/ and scheduler/ were written: put them into a copy of "
            f"{config.data.model or 'the published folder'}"
        )
    else:
        say(
            "embedded models have a text encoder and a pixel codec that diffusers does not know: "
            "only"
        )
        say(
            "transformer/ and scheduler/ were written; load them with SanaTransformer2DModel and "
            "SCMScheduler"
        )
    if (target / "controlnet").is_dir():
        say(
            "controlnet/ as well, for sprint_jax alone: diffusers' SanaControlNetModel has no "
            "QK-norm"
        )


def _student(path: pathlib.Path) -> tuple[folder.Checkpoint, Config]:
    """Return (a run's student as diffusers has it, without its log-variance head; its config)."""
    model, params, config = loading.read_student(path)
    if isinstance(model, Controlled):
        control = {"controlnet": params["control"]}
        checkpoint = _without_logvar(model.trunk, params["trunk"])
        return dataclasses.replace(
            checkpoint, controlnet=model.control, params=checkpoint.params | control
        ), config
    return _without_logvar(model, params), config


def _without_logvar(model, params) -> folder.Checkpoint:
    inputs = {name: leaf for name, leaf in params["inputs"].items() if name != "logvar"}
    model = dataclasses.replace(model, logvar_head=False)
    return folder.Checkpoint(transformer=model, params={"transformer": params | {"inputs": inputs}})

"""Checkpoints between diffusers' layout and ours: python -m sprint_jax convert --from=DIR --to=DIR

from a diffusers SANA-Sprint folder      to our form (model.json and safetensors), instruction included
from our form                            to a diffusers folder, bit-equal tensors
from a run directory (--workdir)         to diffusers' transformer/ and scheduler/
from a .safetensors file of the official to diffusers' transformer/ and scheduler/
     repository's names
"""

import dataclasses
import pathlib
import sys

from absl import app, flags

from sprint_jax.errors import UserError
from sprint_jax.runtime import cli

_FROM = flags.DEFINE_string("from", None, "Folder or native .safetensors file to convert.")
_TO = flags.DEFINE_string("to", None, "Folder to make; it must not exist or be empty.")
_TEXT = flags.DEFINE_string(
    "instruction",
    None,
    "Text file with the instruction before each prompt ('' for none); default: of diffusers.",
)


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        for name, flag in (("from", _FROM), ("to", _TO)):
            if not flag.value:
                raise UserError(f"--{name} is missing: give a folder")
        source, target = pathlib.Path(_FROM.value), pathlib.Path(_TO.value)
        from sprint_jax.conversion import folder
        from sprint_jax.encoders import instruction

        say = lambda message: print(message, flush=True)
        if source.is_file():
            folder.write_diffusers(target, folder.read_native(source))
        elif folder.is_diffusers(source):
            wording = instruction.published(_TEXT.value)
            folder.write_ours(
                target, folder.read_diffusers(source, dtype=None, instruction=wording, say=say)
            )
        elif folder.is_ours(source):
            folder.write_diffusers(target, folder.read_ours(source, dtype=None, say=say))
        elif source.is_dir():
            student, config = _student(source)
            folder.write_diffusers(target, student)
            if config.text.vocabulary == "gemma":
                say(
                    f"only transformer/ and scheduler/ were written: put them into a copy of {config.data.model or 'the published folder'}"
                )
            else:
                say(
                    "embedded models have a text encoder and a pixel codec that diffusers does not know: only"
                )
                say(
                    "transformer/ and scheduler/ were written; load them with SanaTransformer2DModel and SCMScheduler"
                )
            if (target / "controlnet").is_dir():
                say(
                    "controlnet/ as well, for sprint_jax alone: diffusers' SanaControlNetModel has no QK-norm"
                )
        else:
            raise UserError(f"no folder or file {source}: give a checkpoint")
        say(f"wrote {target}")


def _student(path):
    """(the student of a run as diffusers has it, without its log-variance head; the run's config)."""
    from sprint_jax.models.controlnet import Controlled
    from sprint_jax.sampling import loading

    model, params, config = loading.read_student(path)
    if isinstance(model, Controlled):
        control = {"controlnet": params["control"]}
        checkpoint = _without_logvar(model.trunk, params["trunk"])
        return dataclasses.replace(
            checkpoint, controlnet=model.control, params=checkpoint.params | control
        ), config
    return _without_logvar(model, params), config


def _without_logvar(model, params):
    from sprint_jax.conversion import folder

    inputs = {name: leaf for name, leaf in params["inputs"].items() if name != "logvar"}
    model = dataclasses.replace(model, logvar_head=False)
    return folder.Checkpoint(transformer=model, params={"transformer": params | {"inputs": inputs}})


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)

"""The instruction before every prompt of the published models.

Its wording belongs to SANA's authors and is not part of this project. It is read from the source
of an installed diffusers package (parsed, never imported, so PyTorch is not needed) or from a
file.
"""

import ast
import importlib.util
import pathlib

from sprint_jax.errors import UserError
from sprint_jax.storage import files

_SOURCE = "pipelines/sana/pipeline_sana_sprint.py"
_ARGUMENT = "complex_human_instruction"
_OTHERWISE = (
    "use a folder converted once, which holds it (sprint-jax convert --instruction=FILE), or name "
    "a text file ('' for none): --instruction_file of sample, serve, evaluate and export, "
    "--caption_instruction of encode"
)


def published(path: str | None = None) -> str:
    """Read the instruction: from a UTF-8 file, "" for none, or from diffusers when path is None.

    Raises UserError where neither can be read.
    """
    if path is not None:
        if path == "":
            return ""
        try:
            return files.read_text(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot read the instruction file {path} ({error}): give a UTF-8 text file"
            ) from None
    spec = importlib.util.find_spec("diffusers")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "published SANA-Sprint models expect an instruction before each prompt, and its "
            f"wording is not part of this project: pip install diffusers, or {_OTHERWISE}"
        )
    source = pathlib.Path(spec.submodule_search_locations[0]) / _SOURCE
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        raise UserError(
            f"the installed diffusers has no readable {_SOURCE}: {_OTHERWISE}"
        ) from None
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name == "__call__":
            lines = _default(function)
            if lines is not None:
                return "\n".join(lines)
    raise UserError(f"the installed diffusers gives {_ARGUMENT} no default: {_OTHERWISE}")


def _default(function):
    """Return the list of strings that is the default of the argument, or None."""
    named = function.args.args
    defaults = [None] * (len(named) - len(function.args.defaults)) + function.args.defaults
    pairs = [*zip(named, defaults), *zip(function.args.kwonlyargs, function.args.kw_defaults)]
    for argument, default in pairs:
        if argument.arg == _ARGUMENT and default is not None:
            value = ast.literal_eval(default)
            return (
                value
                if isinstance(value, list) and all(isinstance(line, str) for line in value)
                else None
            )
    return None

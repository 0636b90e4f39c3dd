"""Tokenizers of transformers from a folder's files. Code that a folder brings is never run."""

import os
import pathlib
from typing import Any

from sprint_jax.errors import UserError
from sprint_jax.storage import fields, json_files

# Files of a tokenizer whose "auto_map" names code of the folder.
_CONFIGS = ("tokenizer_config.json", "config.json")


def load(folder: str | os.PathLike) -> Any:
    """Return the tokenizer of a folder, read by transformers.

    Raises UserError for a folder that cannot be read, or needs code of its own.
    """
    import transformers  # takes seconds

    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: download the whole model")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises many kinds for a damaged folder
        if named := _own_code(folder):
            raise UserError(
                f"the tokenizer in {folder} needs code of the folder ({named}), which is never "
                "run: use a folder with one of transformers' own tokenizers"
            ) from None
        why = " ".join(str(error).split())[:120]
        raise UserError(f"cannot read the tokenizer in {folder} ({why}): download it again") from (
            None
        )
    longest = tokenizer.model_max_length
    if type(longest) not in (int, float):
        raise UserError(
            f"{folder / _CONFIGS[0]} has model_max_length={fields.shown(longest)}: it must be a "
            "number"
        )
    # Callers cut texts at lengths of their own, as diffusers does, and transformers would warn.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def _own_code(folder: pathlib.Path) -> str | None:
    """Return the file whose "auto_map" names code of the folder, None if there is none."""
    for name in _CONFIGS:
        try:
            config = json_files.read(folder / name)
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and config.get("auto_map"):
            return name
    return None

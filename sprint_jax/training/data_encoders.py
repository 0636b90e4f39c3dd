"""The encoders of a data set: of a published folder, or the embedded ones of a card."""

import hashlib
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from sprint_jax import config
from sprint_jax.data.encode_settings import Encoders
from sprint_jax.encoders import load
from sprint_jax.errors import UserError
from sprint_jax.sampling import loading
from sprint_jax.sampling.options import say
from sprint_jax.storage import files, weights
from sprint_jax.training import datasets


def of_card(card: ConfigDict) -> Encoders:
    """Return the embedded encoders of a card. Raises UserError for a card of published ones."""
    c = config.parse(card)
    pixels, text, name = datasets.embedded(c)
    params: dict[str, Any] = {"pixels": {}, "text": {}}
    return Encoders(pixels=pixels, text=text, params=params, identity=name, side=c.data.size)


def of_folder(
    path: str | pathlib.Path,
    dtype: str | None = None,
    pixels_dtype: str = "float32",
    instruction: str | None = None,
) -> Encoders:
    """Return the autoencoder and the text encoder of a diffusers folder or a converted one.

    Args:
      dtype: of the text encoder; None is float32 on a CPU, else bfloat16.
      pixels_dtype: of the autoencoder.
      instruction: file of the text before each caption, "" for none; None is the model's own.

    Raises UserError for any other folder.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise UserError(
            f"no folder --encoder={path}: give a diffusers folder, one made by sprint-jax convert, "
            "or a config file"
        )
    if (path / "config.json").is_file():
        raise UserError(
            f"--encoder={path} is a run directory: give its config file, a diffusers folder, or "
            "one made by sprint-jax convert"
        )
    # Loops over blocks on every platform, for the identity's sake.
    found = load.load(
        path,
        dtype=dtype or loading.default_dtype(),
        pixels_dtype=pixels_dtype,
        instruction=instruction,
        unrolled=(),
        say=say,
    )
    return Encoders(
        pixels=found.pixels,
        text=found.text,
        params=found.params,
        identity=identity(found, path),
        side=32 * found.pixels.factor,
    )


def identity(encoders: Any, path: str | pathlib.Path) -> str:
    """Name the encoders of a published model by what is in them.

    The name is the same wherever the folder lies and whichever layout it has.

    Args:
      encoders: with text, pixels and their params.
      path: the folder that they were loaded from.
    """
    digest = hashlib.sha256()
    for model, params in (
        (encoders.pixels.model, encoders.params["pixels"]),
        (encoders.text.model, encoders.params["text"]["model"]),
    ):
        digest.update(repr(model).encode())
        weights.feed(digest, params)
    for file in files.children(pathlib.Path(path) / "tokenizer"):
        if file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    digest.update(encoders.text.prompts.prefix.tobytes())
    names = f"{type(encoders.pixels.model).__name__} and {type(encoders.text.model).__name__}"
    trees = encoders.params["pixels"], encoders.params["text"]["model"]
    of_pixels, of_text = (jax.tree.leaves(tree)[0].dtype.name for tree in trees)
    dtypes = of_text if of_pixels == of_text else f"{of_pixels} and {of_text}"
    return f"{names}, {dtypes}, {digest.hexdigest()[:16]}"

"""Open a model by its path: the folder of one, or an exported file with its programs."""

import pathlib
from typing import TYPE_CHECKING, Any

from sprint_jax.errors import UserError
from sprint_jax.sampling.options import say
from sprint_jax.storage import files

if TYPE_CHECKING:
    from sprint_jax.sampling.exported import Exported
    from sprint_jax.sampling.pipeline import Pipeline


def open_model(
    path: pathlib.Path | str, *, dtype: str | None = None, **options: Any
) -> "Pipeline | Exported":
    """Return the model of a folder, or the programs of an exported file.

    dtype: None is the default of this machine. options: further keywords of `loading.load`. Each
    is None or False where it was not given. Raises UserError for options that an exported file has
    settled.
    """
    path = files.local(path, "--model")
    if path.is_file():
        _refuse_settled({"dtype": dtype} | options)
        from sprint_jax.sampling import exported

        return exported.load(path, say=say)
    from sprint_jax.sampling import loading  # knows the networks; an exported file needs none

    return loading.load(path, dtype=dtype or loading.default_dtype(), say=say, **options)


def _refuse_settled(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value not in (None, False):
            flag = "instruction_file" if name == "instruction" else name
            raise UserError(
                f"--{flag} is settled in an exported file: give it to sprint-jax export"
            )

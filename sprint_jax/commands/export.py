"""Export a model as one file that draws without the networks' code.

--model is a folder that `sprint-jax sample` takes; an exported file cannot be exported again. The
file holds the traced and lowered programs, the weights and the tokenizer, and `sprint-jax sample
--model=FILE` draws from it. Exported for a CPU and drawn on it, the images equal those of the
folder to the last bit, at equal steps, batch size and seed. A file may also be exported for
devices that are not here; they compile it when they run it.
"""

import pathlib

from sprint_jax.sampling.options import ExportOptions as Options
from sprint_jax.storage import settings


def run(options: Options) -> pathlib.Path:
    """Write the file and return its path. Raises UserError for bad input."""
    from sprint_jax.sampling import export

    path = pathlib.Path(options.out)
    with settings.file_claim(path, "--out"):
        header = export.export_model(options)
    print(
        f"wrote {path}: {len(header.programs)} programs for {', '.join(header.platforms)}, "
        f"{path.stat().st_size / 1e6:.1f} MB"
    )
    return path

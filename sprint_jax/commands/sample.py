"""Generate images of prompts in few steps.

--model is a SANA-Sprint folder in the diffusers layout, a folder of `sprint-jax convert`, the
--workdir of a run, or a file of `sprint-jax export`. Writes 00000.png and so on, and
manifest.jsonl.
"""

import pathlib

from sprint_jax.runtime import compile_cache
from sprint_jax.sampling.options import SampleOptions as Options
from sprint_jax.storage import settings


def run(options: Options) -> pathlib.Path:
    """Write the images and return their folder. Raises UserError for bad input."""
    from sprint_jax.sampling import sample

    compile_cache.start()
    with settings.folder_claim(options.out, "--out"):
        return sample.sample(options)

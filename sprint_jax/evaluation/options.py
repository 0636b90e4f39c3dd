"""Options of `sprint-jax evaluate`."""

import dataclasses
from typing import Literal

from sprint_jax.sampling.options import ImageOptions
from sprint_jax.storage import files

SUITES = ("shapes", "fid", "clip", "geneval", "dpg", "imagereward")
_PER_PROMPT = {"geneval": 4, "dpg": 4}  # official; other suites have one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ImageOptions):
    """Options of `sprint-jax evaluate`."""

    suite: Literal["shapes", "fid", "clip", "geneval", "dpg", "imagereward"] | None = None
    """What to measure."""
    folder: files.LocalPath | None = None
    """Score these images instead of generating some."""
    prompts: files.LocalPath | None = None
    """File of prompts: text, one a line, a table as for sample, or the file of a benchmark."""
    split: Literal["heldout", "selection", "final"] | None = None
    """shapes: which of its captions, without --prompts; default: those that the run is scored on.
    """
    first: int | None = None
    """Only the first N prompts; default: all (shapes: 256)."""
    images_per_prompt: int | None = None
    """Images of each prompt; default: 1 (geneval and dpg: 4)."""
    file_format: Literal["png", "jpeg"] = "png"
    """Of the generated images; SANA's FID is of JPEG."""
    shard: str | None = None
    """i/n: generate only every n-th image, from i = 0, and score nothing."""
    weights: files.LocalPath | None = None
    """fid: Inception weights, a file. clip: a folder."""
    unpublished_weights: bool = False
    """fid: accept other weights than the published ones; not FID."""
    save_weights: files.LocalPath | None = None
    """Write the Inception weights of a .pth as safetensors here, and end."""
    reference: files.LocalPath | None = None
    """fid: npz with mu and sigma, or a folder of real images."""
    save_reference: files.LocalPath | None = None
    """fid: write the statistics of the images to this npz."""
    fid_resize: Literal["pytorch-fid", "clean-fid"] = "pytorch-fid"
    """How images become 299 x 299."""
    picture_size: int | None = None
    """fid: bring images to this side first (bilinear, then the middle); SANA's FID has 512."""
    scoring_batch: int = 32
    """Images that a scoring network sees at a time."""
    detections: files.LocalPath | None = None
    """geneval: JSON lines of detections (sprint_jax/evaluation/geneval.py)."""
    answers: files.LocalPath | None = None
    """dpg: JSON lines of answers (sprint_jax/evaluation/dpg.py)."""
    grid: bool = False
    """geneval: also write grid.png for each prompt."""
    hook: str | None = None
    """module:function. imagereward: (prompts, images) -> scores. fid: images -> features, not by
    Inception."""

    @property
    def per_prompt(self) -> int:
        """The number of images of each prompt."""
        given = self.images_per_prompt
        return _PER_PROMPT.get(self.suite or "", 1) if given is None else given

    @property
    def recorded(self) -> bool:
        """Whether the suite scores recorded judgments of the images, of a detector or a reader."""
        return self.suite in ("geneval", "dpg")

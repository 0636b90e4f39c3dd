"""Draw from images what a ControlNet is conditioned on.

    edges      lines where colors step; needs no weights
    hed        --weights=ControlNetHED.pth (or .safetensors): soft edges of the published detector
    scribble   --weights as for hed: strokes along its edges, of --thickness

Writes white lines on black, a PNG per image under its name. Whole files are kept: run the
command again to resume. hed and scribble have the size that the detector saw.
"""

import dataclasses
import pathlib
from typing import Literal

from sprint_jax.runtime import cli, compile_cache
from sprint_jax.storage import files, settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(files.Paths):
    """Options of `sprint-jax condition`."""

    images: files.LocalPath = ""
    """Folder of images."""
    kind: Literal["edges", "hed", "scribble"] | None = None
    """What to draw of them."""
    thickness: int | None = None
    """scribble: width of strokes, 0 (thinned) to 24 in published training; default 1."""
    detect_resolution: int | None = None
    """hed, scribble: short side that the detector sees, in pixels; default 512."""
    weights: files.LocalPath | None = None
    """hed, scribble: ControlNetHED.pth or .safetensors."""
    save_weights: files.LocalPath | None = None
    """Write the weights of a .pth as safetensors here, and end."""
    out: files.LocalPath = ""
    """Folder to make, or to resume."""


def run(options: Options) -> None:
    """Draw every missing image. Raises UserError for options that do not belong together."""
    from sprint_jax.data import condition
    from sprint_jax.evaluation import image_sets

    if options.save_weights:
        cli.check_output_file("save_weights", options.save_weights)
        condition.save_weights(options.weights, options.save_weights)
        print(f"the weights are in {options.save_weights}: give it as --weights")
        return
    cli.require("images", options.images, "give a folder of images")
    cli.require("kind", options.kind, "give edges, hed, scribble")
    cli.require("out", options.out, "give the folder to make")
    kind, given = options.kind or "", (options.detect_resolution, options.thickness)
    drawing = condition.drawing(kind, options.weights, *given)
    images, out = pathlib.Path(options.images), pathlib.Path(options.out)
    targets = condition.targets(images, out, image_sets.found)
    if kind != "edges":
        compile_cache.start()
    with settings.folder_claim(options.out, "--out"):
        condition.draw(targets, out, drawing)
    print(f"{len(targets)} images of kind {kind} in {options.out}")

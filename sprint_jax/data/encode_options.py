"""Options of `sprint-jax encode`, with their checks."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Literal

from sprint_jax.errors import UserError
from sprint_jax.storage import files

if TYPE_CHECKING:
    from sprint_jax.conditioning.detector import Lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(files.Paths):
    """Options of `sprint-jax encode`."""

    source: files.LocalPath = ""
    """Folder of captioned images: WebDataset tars, TFDS, or plain files."""
    encoder: files.LocalPath = ""
    """Diffusers or converted folder, or card NAME[:PRESET] or FILE.py[:PRESET]."""
    encoded: files.LocalPath = ""
    """Folder to make, or to resume."""
    text: Literal["features", "tokens"] = "features"
    """Store text features, or tokens (far smaller)."""
    caption_field: str = "prompt"
    """Field that holds captions, where the source has fields."""
    caption_instruction: files.LocalPath | None = None
    """Text file with the instruction before each caption; '' for none; default: the model's."""
    encode_dtype: Literal["bfloat16", "float32"] | None = None
    """Of the text encoder; default: bfloat16, on a CPU float32."""
    pixels_dtype: Literal["bfloat16", "float32"] = "float32"
    """Of the autoencoder; the published trainer's is float32."""
    sizes: str | None = None
    """HEIGHTxWIDTH,... to choose from by aspect ratio, or 'published' for the bins of the published
    models; default: the model's own square.
    """
    condition: Literal["none", "edges", "hed", "scribble"] = "none"
    """Lines to store for a ControlNet."""
    hed_weights: files.LocalPath | None = None
    """hed, scribble: ControlNetHED.pth or .safetensors."""
    thickness: int | None = None
    """scribble: of strokes, in pixels; default: drawn for each example from 0 to 24, as published.
    """
    heldout: int = 256
    """About how many examples to hold out. A hash of its name decides about each."""
    shard_records: int = 1024
    """Examples of the source in a chunk."""
    hosts: int = 1
    """How many of these commands share the work."""
    host: int = 0
    """Which of them this is, from 0."""
    max_bad_share: float = 0.05
    """Abort if more than this share of the examples, 0 to 1, is unusable; three are always
    tolerated.
    """
    encode_batch: int = 16
    """Images, and captions, encoded at a time."""


def check(options: Options) -> None:
    """Raise UserError for missing options, values out of range, and options that conflict."""
    for name in ("source", "encoder", "encoded"):
        if not getattr(options, name):
            raise UserError(f"--{name} is missing: give a folder")
    for name in ("shard_records", "hosts", "encode_batch"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}: use 1 or more")
    out, source = pathlib.Path(options.encoded), pathlib.Path(options.source)
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"--encoded={out} lies in --source={source}, whose files are read: choose another"
        )
    if not 0 <= options.max_bad_share <= 1:
        raise UserError(f"--max_bad_share={options.max_bad_share}: use a share from 0 to 1")
    if not 0 <= options.host < options.hosts:
        raise UserError(
            f"--host={options.host} of --hosts={options.hosts}: use 0 to {options.hosts - 1}"
        )
    _check_condition(options)


def _check_condition(options: Options) -> None:
    kind, detected = options.condition, options.condition in ("hed", "scribble")
    if detected and not options.hed_weights:
        raise UserError(
            f"--condition={kind} needs --hed_weights=ControlNetHED.pth of the detector; "
            "--condition=edges needs none"
        )
    for name, value, belongs in (
        ("hed_weights", options.hed_weights, detected),
        ("thickness", options.thickness, kind == "scribble"),
    ):
        if value is not None and not belongs:
            raise UserError(f"--{name} does not belong to --condition={kind}: leave it out")
    if options.thickness is not None and options.thickness < 0:
        raise UserError(f"--thickness={options.thickness}: use 0 or more")


def condition(options: Options) -> "Lines | None":
    """Return the lines to store for a ControlNet, or None. Loads their detector."""
    if options.condition == "none":
        return None
    from sprint_jax.conditioning import detector, sketches

    thickness = None
    if options.condition == "scribble":
        given = options.thickness
        thickness = sketches.PUBLISHED_THICKNESS if given is None else (given, given)
    found = detector.load(options.hed_weights) if options.hed_weights else None
    return detector.Lines(options.condition, found, thickness)


def sizes(text: str | None, factor: int, side: int) -> tuple[tuple[int, int], ...]:
    """Parse --sizes. Returns the (height, width) pairs without duplicates, sorted.

    Args:
      text: the option. None or "" means the square of `side` pixels.
      factor: sides must be multiples of this number of pixels.
      side: side of the model's own square, in pixels.

    Raises UserError if the text is malformed, or a side is not a positive multiple of `factor`.
    """
    from sprint_jax.data import aspect_ratios

    if not text:
        return ((side, side),)
    if text == "published":
        found = list(aspect_ratios.BINS_1024)
    else:
        try:
            found = [(int(height), int(width)) for height, width in _split(text)]
        except ValueError:
            raise UserError(
                f"--sizes={text}: give HEIGHTxWIDTH, several with commas, or 'published'"
            ) from None
    for height, width in found:
        if min(height, width) <= 0 or height % factor or width % factor:
            raise UserError(
                f"--sizes={text}: {height}x{width} is not in multiples of this model's {factor} "
                "pixels"
            )
    return tuple(sorted(set(found)))


def _split(text: str) -> list[list[str]]:
    return [size.split("x") for size in text.split(",")]

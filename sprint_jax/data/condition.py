"""Drawing the condition images of a ControlNet for a folder of images."""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from sprint_jax.conditioning import sketches
from sprint_jax.errors import UserError
from sprint_jax.storage import settings

_KEEPER = settings.Keeper(
    file="condition.json",
    flag="out",
    refusal="{folder} was made with {key} {old}, not {new}: give another --{flag}, or remove it",
)
_THICKNESS, _RESOLUTION = 1, 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """The settings that determine the images of an output folder."""

    kind: str  # one of `sketches.KINDS`
    weights: str | None  # file of the detector; None for edges
    resolution: int  # short side of the detector's input, in pixels
    thickness: int  # of the strokes of scribbles, in pixels

    def settings(self) -> dict[str, object]:
        """Return the settings that matter for this kind, as the folder records them."""
        values: dict[str, object] = {"kind": self.kind}
        if self.kind != "edges":
            values |= {"weights": str(self.weights), "detect_resolution": self.resolution}
        if self.kind == "scribble":
            values["thickness"] = self.thickness
        return values


def drawing(
    kind: str, weights: str | None, resolution: int | None, thickness: int | None
) -> Drawing:
    """Return the drawing for the options of the command.

    Raises UserError for options that do not belong to the kind, are missing, or are out of range.
    """
    edges = kind == "edges"
    if not edges and not weights:
        raise UserError(
            f"--kind={kind} needs --weights=ControlNetHED.pth of the detector; --kind=edges needs "
            "none"
        )
    for name, value, belongs in (
        ("weights", weights, not edges),
        ("detect_resolution", resolution, not edges),
        ("thickness", thickness, kind == "scribble"),
    ):
        if value is not None and not belongs:
            raise UserError(f"--{name} does not belong to --kind={kind}: leave it out")
    if thickness is not None and thickness < 0:
        raise UserError(f"--thickness={thickness}: use 0 or more")
    if resolution is not None and resolution < 1:
        raise UserError(f"--detect_resolution={resolution}: use 1 or more")
    return Drawing(
        kind=kind,
        weights=weights,
        resolution=_RESOLUTION if resolution is None else resolution,
        thickness=_THICKNESS if thickness is None else thickness,
    )


def save_weights(weights: str | None, path: str) -> None:
    """Convert the detector's weights to safetensors. Raises UserError as `hed_weights.load`."""
    from sprint_jax.conditioning import hed, hed_weights

    if not weights:
        raise UserError("--weights is missing: give the .pth file that --save_weights converts")
    hed_weights.save(weights, path, hed.PUBLISHED)


def targets(
    source: pathlib.Path, out: pathlib.Path, find: Callable[[pathlib.Path], list[pathlib.Path]]
) -> dict[pathlib.Path, pathlib.Path]:
    """Return {file to write: image that it is drawn from}.

    find: lists the images below a folder.

    Raises UserError if the output lies among the images, or two images would become one file.
    """
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"--out={out} lies in --images={source}, whose images are read: choose another"
        )
    found = {}
    for path in find(source):
        target = out / path.relative_to(source).with_suffix(".png")
        if target in found:
            raise UserError(f"{found[target]} and {path} would both become {target}: rename one")
        found[target] = path
    return found


def draw(images: dict[pathlib.Path, pathlib.Path], out: pathlib.Path, drawing: Drawing) -> None:
    """Draw the missing images of `targets`, with a progress bar. Whole files are kept.

    Raises UserError if the folder has other settings, or an image cannot be read.
    """
    from sprint_jax.storage import image_files

    missing = {target: path for target, path in images.items() if not image_files.is_whole(target)}
    # Load the weights before the folder is claimed, so that an error leaves it unclaimed.
    lines_of = _lines(drawing) if missing else None
    _claim(out, drawing)
    if lines_of:
        _write(missing, len(images), lines_of, drawing.kind)


def _claim(out: pathlib.Path, drawing: Drawing) -> None:
    """Claim the folder for the drawing. Raises UserError if it has other settings."""
    recorded = _KEEPER.recorded(out) or {}
    # Report another kind first: its settings also have other names.
    if "kind" in recorded:
        _KEEPER.check(out, recorded | {"kind": drawing.kind})
    _KEEPER.claim(out, drawing.settings())


def _write(
    missing: dict[pathlib.Path, pathlib.Path],
    total: int,
    lines_of: Callable[[np.ndarray], np.ndarray],
    kind: str,
) -> None:
    """Draw and write the missing images. total: number of images, for the progress bar."""
    import tqdm

    from sprint_jax.data import captioned
    from sprint_jax.storage import image_files

    with tqdm.tqdm(
        total=total, initial=total - len(missing), unit="image", desc=kind, delay=5
    ) as bar:
        for target, path in missing.items():
            try:
                # Decode exactly as `sprint-jax encode --condition` does.
                image = captioned.decode_image(path.read_bytes())
            except (OSError, captioned.BadExample) as error:
                raise UserError(
                    f"cannot read the image {path} ({error}): repair or remove it; what is done is "
                    "kept"
                ) from None
            target.parent.mkdir(parents=True, exist_ok=True)
            image_files.save(target, sketches.to_rgb(lines_of(image)))
            bar.update()


def _lines(drawing: Drawing) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from an image, uint8 [H, W, 3], to its lines, uint8 [h, w]."""
    if drawing.kind == "edges":
        return lambda image: sketches.gradient_edges(image[None])[0]
    from sprint_jax.conditioning import detector

    assert drawing.weights is not None  # `drawing` checked it
    detect = detector.load(drawing.weights).detect
    if drawing.kind == "hed":
        return lambda image: detect(image, drawing.resolution)
    return lambda image: sketches.scribble(
        detect(image, drawing.resolution),
        thickness=drawing.thickness,
        sigma=sketches.PUBLISHED_SIGMA,
    )

"""Pictures to what a ControlNet is steered by: python -m sprint_jax condition --images=DIR --kind=KIND --out=DIR

    edges      lines where colours step; needs nothing more
    hed        --weights=ControlNetHED.pth (or .safetensors): soft edges of the published detector
    scribble   --weights as for hed: strokes along its edges, of --thickness

White lines on black, one PNG a picture by its name (sprint_jax/conditioning/sketches.py has the details). What is there is
kept: stopped at any moment, the same command goes on; other settings in the same folder are refused. hed and scribble
have the size that the detector saw, edges that of the picture.
"""

import json
import pathlib
import sys

from absl import app, flags

from sprint_jax.conditioning import sketches
from sprint_jax.errors import UserError
from sprint_jax.runtime import cli
from sprint_jax.storage import files

_IMAGES = flags.DEFINE_string("images", None, "Folder of pictures.")
_KIND = flags.DEFINE_enum("kind", None, sketches.KINDS, "What to make of them.")
_THICKNESS = flags.DEFINE_integer(
    "thickness",
    1,
    "scribble: of strokes, 0 to 24 in published training; 0 thins, 1 to 3 leave them.",
)
_RESOLUTION = flags.DEFINE_integer(
    "detect_resolution", 512, "hed, scribble: short side that the detector sees, pixels."
)
# Named as in sprint-jax evaluate, for the same things; one process runs one of the two commands.
_WEIGHTS = flags.DEFINE_string(
    "weights", None, "hed, scribble: ControlNetHED.pth or .safetensors.", allow_override=True
)
_SAVE_WEIGHTS = flags.DEFINE_string(
    "save_weights",
    None,
    "Write the weights of a .pth as safetensors here, and end.",
    allow_override=True,
)
_OUT = flags.DEFINE_string("out", None, "Folder to make, or to go on with.", allow_override=True)

_SETTINGS = "condition.json"


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        if _SAVE_WEIGHTS.value:
            _save_weights()
            return
        _check_flags()
        from sprint_jax.evaluation import image_sets

        source, out = pathlib.Path(_IMAGES.value), pathlib.Path(_OUT.value)
        if out.resolve().is_relative_to(source.resolve()):
            raise UserError(
                f"--out={out} lies in --images={source}, whose pictures are read: choose another"
            )
        targets = {}
        for path in image_sets.found(source):
            target = out / path.relative_to(source).with_suffix(".png")
            if target in targets:
                raise UserError(
                    f"{targets[target]} and {path} would both become {target}: rename one"
                )
            targets[target] = path
        wanted = {target: path for target, path in targets.items() if not target.exists()}
        detect = (
            _detector() if wanted and _KIND.value != "edges" else None
        )  # before the folder is claimed: wrong weights lock none
        _claim(out)
        _make(wanted, len(targets), detect)
        print(f"{len(targets)} pictures of kind {_KIND.value} in {out}")


def _check_flags():
    wanted = (
        (_IMAGES, "a folder of pictures"),
        (_KIND, ", ".join(sketches.KINDS)),
        (_OUT, "the folder to make"),
    )
    for flag, what in wanted:
        if not flag.value:
            raise UserError(f"--{flag.name} is missing: give {what}")
    edges = _KIND.value == "edges"
    if not edges and not _WEIGHTS.value:
        raise UserError(
            f"--kind={_KIND.value} needs --weights=ControlNetHED.pth of the detector; --kind=edges needs none"
        )
    for flag, belongs in (
        (_WEIGHTS, not edges),
        (_RESOLUTION, not edges),
        (_THICKNESS, _KIND.value == "scribble"),
    ):
        if flag.present and not belongs:
            raise UserError(f"--{flag.name} does not belong to --kind={_KIND.value}: leave it out")
    if _THICKNESS.value < 0:
        raise UserError(f"--thickness={_THICKNESS.value}: use 0 or more")
    if _RESOLUTION.value < 1:
        raise UserError(f"--detect_resolution={_RESOLUTION.value}: use 1 or more")


def _save_weights():
    from sprint_jax.conditioning import hed, hed_weights

    if not _WEIGHTS.value:
        raise UserError("--weights is missing: give the .pth file that --save_weights is made of")
    cli.folder_of(_SAVE_WEIGHTS)
    hed_weights.save(_WEIGHTS.value, _SAVE_WEIGHTS.value, hed.PUBLISHED)
    print(f"the weights are in {_SAVE_WEIGHTS.value}: give it as --weights")


def _claim(out):
    """Writes the settings into the folder. Refuses one that was made with others."""
    settings = {"kind": _KIND.value}
    if _KIND.value != "edges":
        settings |= {"weights": str(_WEIGHTS.value), "detect_resolution": _RESOLUTION.value}
    if _KIND.value == "scribble":
        settings["thickness"] = _THICKNESS.value
    path = out / _SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            have = json.loads(path.read_text())
            differs = [name for name in have | settings if have.get(name) != settings.get(name)]
            other = [f"{name} {have.get(name)}, not {settings.get(name)}" for name in differs]
            if other:
                raise UserError(
                    f"{out} was made with {'; '.join(other)}: give another --out, or remove it"
                )
            return
        files.write_text(path, json.dumps(settings, indent=2) + "\n")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"cannot use --out={out} ({error}): choose another") from None


def _make(targets, total, detect):
    """Makes {target: source}, of `total` in all. detect: of `_detector`, None for edges."""
    import tqdm

    from sprint_jax.data import sources
    from sprint_jax.storage import image_files

    if not targets:
        return
    with tqdm.tqdm(
        total=total, initial=total - len(targets), unit="picture", desc=_KIND.value, delay=5
    ) as bar:
        for target, path in targets.items():
            try:
                image = sources.load_picture(
                    path.read_bytes()
                )  # the pixels that sprint-jax encode --condition sees
            except (OSError, sources.BadExample) as error:
                raise UserError(
                    f"cannot read the picture {path} ({error}): repair or remove it; what is done is kept"
                ) from None
            lines = detect(image) if detect else sketches.gradient_edges(image[None])[0]
            if _KIND.value == "scribble":
                lines = sketches.scribble(
                    lines, thickness=_THICKNESS.value, sigma=sketches.PUBLISHED_SIGMA
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            image_files.save(target, sketches.to_rgb(lines))
            bar.update()


def _detector():
    """A function from uint8 [H, W, 3] to soft edges, uint8 [h, w]."""
    from sprint_jax.conditioning import detector as lines_lib
    from sprint_jax.runtime import compile_cache

    compile_cache.start()
    detect = lines_lib.load(_WEIGHTS.value).detect
    return lambda image: detect(image, _RESOLUTION.value)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)

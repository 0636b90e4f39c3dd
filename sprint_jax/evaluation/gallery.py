"""A folder of generated images of many prompts, made with one protocol.

    OUT/protocol.json      the settings that decide about pixels, and what generated with them
    OUT/manifest.jsonl     file, prompt and noise of every image that belongs here
    OUT/pictures/          the images

Generation can be interrupted and resumed; existing images are kept. A folder keeps to its settings.
It is claimed when the first images are written, so a command that fails earlier claims nothing.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from sprint_jax.errors import UserError
from sprint_jax.evaluation import dpg, image_sets
from sprint_jax.evaluation.prompt_sets import Prompt
from sprint_jax.sampling import generation, pipeline
from sprint_jax.storage import (
    fields,
    files,
    image_files,
    json_files,
    json_lines,
    revision,
    run_files,
)
from sprint_jax.storage.settings import Keeper

PROTOCOL, MANIFEST, PICTURES = "protocol.json", "manifest.jsonl", "pictures"
FORMATS = {"png": "PNG", "jpeg": "JPEG"}
_KEEPER = Keeper(file=PROTOCOL, flag="out", section="settings")
_ROW_KINDS = {
    "file": fields.TEXT,
    "prompt": fields.TEXT,
    "indices": fields.NUMBER.many(),
}
_PROTOCOL_KINDS = {"settings": fields.OBJECT, "made_by": fields.OBJECT.many()}
_WINDOW = 8  # batches that are generated before their images are written
_ENDS = 1 << 20  # bytes at each end of a file that enter its fingerprint


@dataclasses.dataclass(frozen=True)
class Unit:
    """A file to generate: one image, or four as a 2 x 2 grid.

    indices: numbers that determine the noise of each image.
    """

    file: str
    prompt: str
    indices: tuple[int, ...]


def plain(prompts: Sequence[Prompt], per_prompt: int, ending: str) -> list[Unit]:
    """Return the files ID.png, or ID_0.png and so on for several images of a prompt."""
    name = lambda prompt, j: f"{prompt.id}{f'_{j}' if per_prompt > 1 else ''}.{ending}"
    return [
        Unit(name(prompt, j), prompt.text, (i * per_prompt + j,))
        for i, prompt in enumerate(prompts)
        for j in range(per_prompt)
    ]


def geneval(prompts: Sequence[Prompt], per_prompt: int) -> list[Unit]:
    """Return the files of the official folders, 00000/samples/00000.png.

    `write_metadata` writes the other files of these folders.
    """
    return [
        Unit(f"{i:05d}/samples/{j:05d}.png", prompt.text, (i * per_prompt + j,))
        for i, prompt in enumerate(prompts)
        for j in range(per_prompt)
    ]


def grids(prompts: Sequence[Prompt]) -> list[Unit]:
    """Return the files of DPG-Bench: ID.png with four images."""
    n = dpg.PICTURES
    return [
        Unit(f"{p.id}.png", p.text, tuple(range(n * i, n * i + n))) for i, p in enumerate(prompts)
    ]


def write_metadata(
    out: str | os.PathLike, prompts: Sequence[Prompt], per_prompt: int, with_grid: bool
) -> None:
    """Write metadata.jsonl, and with_grid also grid.png, in each folder of a prompt."""
    for i, prompt in enumerate(prompts):
        folder = pathlib.Path(out) / PICTURES / f"{i:05d}"
        json_lines.write(folder / "metadata.jsonl", [prompt.row])
        if with_grid:
            images = [image_sets.read(folder / f"samples/{j:05d}.png") for j in range(per_prompt)]
            image_files.save(
                folder / "grid.png", image_files.grid(np.stack(images), columns=per_prompt, gap=2)
            )


def fingerprint(model: str | os.PathLike) -> str:
    """Return a digest of names, sizes and both ends of a model's files.

    It does not read gigabytes. Raises UserError if there is no such folder.
    """
    model = pathlib.Path(model)
    if not model.is_dir():
        raise UserError(
            f"no directory {model}: give a diffusers folder, a converted model or the --workdir "
            "of a run"
        )
    if (model / run_files.STUDENT).is_file():
        paths = [model / run_files.CONFIG, model / run_files.STUDENT]
    else:
        paths = sorted(p for p in files.below(model) if p.suffix in (".safetensors", ".json"))
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(_ENDS)
            file.seek(max(0, size - _ENDS))
            digest.update(
                repr((path.relative_to(model).as_posix(), size)).encode() + head + file.read()
            )
    return digest.hexdigest()


def check(out: str | os.PathLike, settings: Mapping[str, Any], units: Sequence[Unit]) -> None:
    """Raise UserError where `claim` would; claim nothing.

    The folder is made, so that one that cannot be written is refused as well.
    """
    out = pathlib.Path(out)
    with _KEEPER.hold(out):
        _check_settings(out, settings)
        _rows(out, units)


def claim(out: str | os.PathLike, settings: Mapping[str, Any], units: Sequence[Unit]) -> None:
    """Make the folder belong to these settings.

    settings: plain values that decide about pixels. Several processes may claim one folder at once.
    Raises UserError naming the first setting or image that differs.
    """
    out = pathlib.Path(out)
    with _KEEPER.hold(out):
        _check_settings(out, settings)
        _KEEPER.claim(out, settings)
        rows = _rows(out, units).values()
        with _KEEPER.writing(out):
            (out / PICTURES).mkdir(exist_ok=True)
            json_lines.write(out / MANIFEST, rows)


def _check_settings(out, settings):
    _KEEPER.check(out, settings)
    images = out / PICTURES
    if not (out / PROTOCOL).exists() and images.is_dir() and not files.is_empty(images):
        raise UserError(f"{images} holds images and {PROTOCOL} is missing: choose another --out")
    if not (out / PROTOCOL).exists() and (out / MANIFEST).exists():
        raise UserError(f"{out} holds images of sprint-jax sample: choose another --out")


def _rows(out, units):
    """Return {file: row} of the manifest and of the units."""
    known = json_lines.rows(out / MANIFEST, ("file", "prompt", "indices"), kind="an image's")
    for row in known:
        if not all(kind.accepts(row[name]) for name, kind in _ROW_KINDS.items()):
            raise UserError(
                f"{out / MANIFEST} has a line of no image ({fields.shown(row)}): remove that line"
            )
    rows = {row["file"]: row for row in known}
    for unit in units:
        row = {"file": unit.file, "prompt": unit.prompt, "indices": list(unit.indices)}
        if rows.setdefault(unit.file, row) != row:
            raise UserError(
                f"{out} has {unit.file} of {rows[unit.file]['prompt']!r} with noise "
                f"{rows[unit.file]['indices']}, now of {unit.prompt!r} with {row['indices']}: use "
                "the same prompts, or another --out"
            )
    return rows


def missing(out: str | os.PathLike, units: Sequence[Unit]) -> list[Unit]:
    """Return the units whose files do not exist, or are empty or cut, as a crash leaves them."""
    images = pathlib.Path(out) / PICTURES
    return [unit for unit in units if not image_files.is_whole(images / unit.file)]


class Bar(Protocol):
    """A progress bar of tqdm that counts images."""

    @property
    def n(self) -> float:
        """The images so far."""
        ...

    def update(self, n: float, /) -> Any:
        """Add images."""


def make(
    out: str | os.PathLike,
    units: Sequence[Unit],
    pipe: pipeline.Pipeline,
    options: Mapping[str, Any],
    *,
    batch: int,
    file_format: str,
    bar: Bar,
    claim: Callable[[], object],
) -> None:
    """Generate and write the images of units, and record in protocol.json what generated them.

    options: keywords of `generation.generate`. batch: images of a program run, rounded up to a
    multiple of the devices. file_format: of `FORMATS`. claim: `claim` of this folder, called when
    the first images are generated and before they are written.
    """
    out, devices = pathlib.Path(out), jax.local_devices()
    batch = -(-batch // len(devices)) * len(devices)
    if len(devices) > 1:
        pipe = pipeline.over_devices(pipe, devices)
    asked = lambda name: getattr(pipe, name) if options.get(name) is None else options[name]
    maker = {
        "commit": revision.commit(),
        "jax": jax.__version__,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "batch": batch,
        **{name: asked(name) for name in ("guidance_scale", "schedule", "height", "width")},
        "dtype": pipe.dtype,
    }
    size = max(1, _WINDOW * batch // len(units[0].indices))
    for start in range(0, len(units), size):
        part, begun = units[start : start + size], bar.n
        prompts = [unit.prompt for unit in part for _ in unit.indices]
        images = generation.generate(
            pipe,
            prompts,
            indices=[i for unit in part for i in unit.indices],
            batch_size=batch,
            say=lambda done: bar.update(begun + done - bar.n),
            **options,
        )
        if start == 0:
            claim()
            _record(out, maker)
        for unit in part:
            own, images = images[: len(unit.indices)], images[len(unit.indices) :]
            path = out / PICTURES / unit.file
            path.parent.mkdir(parents=True, exist_ok=True)
            image_files.save(
                path, own[0] if len(own) == 1 else dpg.grid(own), file_format=FORMATS[file_format]
            )


def _record(out, maker):
    with _KEEPER.hold(out):
        known = protocol(out)
        if maker not in known["made_by"]:
            known["made_by"].append(maker)
            json_files.write(out / PROTOCOL, known)


def protocol(out: str | os.PathLike) -> dict[str, Any]:
    """Return {"settings", "made_by"} of a folder."""
    path = pathlib.Path(out) / PROTOCOL
    try:
        known = json_files.read(path)
        fields.check(known, _PROTOCOL_KINDS, "it")
        return {"settings": known["settings"], "made_by": known.get("made_by", [])}
    except (OSError, ValueError, KeyError, UserError) as error:
        raise UserError(f"{path} cannot be read ({error}): choose another --out") from None

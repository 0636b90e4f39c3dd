"""A folder of pictures of many prompts, made with one protocol, that can be interrupted and gone on with.

    OUT/protocol.json      the settings that decide about pixels, and who made pictures with them
    OUT/manifest.jsonl     file, prompt and noise of every picture that belongs here
    OUT/pictures/          the pictures

A folder keeps to its settings: other ones are refused by name. What is there is kept. It is nobody's until the first
pictures are there, so that a command that ends before them locks nothing.
"""

import dataclasses
import hashlib
import json
import pathlib

import jax
import numpy as np

from sprint_jax.errors import UserError
from sprint_jax.evaluation import dpg, image_sets
from sprint_jax.sampling import generation, pipeline
from sprint_jax.storage import files, image_files, revision, run_files
from sprint_jax.storage.settings import Keeper

PROTOCOL, MANIFEST, PICTURES = "protocol.json", "manifest.jsonl", "pictures"
FORMATS = {"png": "PNG", "jpeg": "JPEG"}
_KEEPER = Keeper(file=PROTOCOL, flag="out", section="settings")
_WINDOW = 8  # batches whose pictures are made before they are written
_ENDS = 1 << 20  # bytes at each end of a file that go into its fingerprint


@dataclasses.dataclass(frozen=True)
class Unit:
    """A file to make: one picture, or four as a 2 x 2 grid. indices: name the noise of each picture."""

    file: str
    prompt: str
    indices: tuple[int, ...]


def plain(prompts, per_prompt, ending):
    """ID.png, or ID_0.png ... where a prompt has several pictures."""
    name = lambda prompt, j: f"{prompt.id}{f'_{j}' if per_prompt > 1 else ''}.{ending}"
    return [
        Unit(name(prompt, j), prompt.text, (i * per_prompt + j,))
        for i, prompt in enumerate(prompts)
        for j in range(per_prompt)
    ]


def geneval(prompts, per_prompt):
    """The official folders: 00000/samples/00000.png. `metadata` writes what stands beside them."""
    return [
        Unit(f"{i:05d}/samples/{j:05d}.png", prompt.text, (i * per_prompt + j,))
        for i, prompt in enumerate(prompts)
        for j in range(per_prompt)
    ]


def grids(prompts):
    """DPG-Bench's: ID.png with four pictures."""
    n = dpg.PICTURES
    return [
        Unit(f"{p.id}.png", p.text, tuple(range(n * i, n * i + n))) for i, p in enumerate(prompts)
    ]


def write_metadata(out, prompts, per_prompt, with_grid):
    """metadata.jsonl, and perhaps grid.png, in each folder of a prompt."""
    for i, prompt in enumerate(prompts):
        folder = pathlib.Path(out) / PICTURES / f"{i:05d}"
        files.write_text(
            folder / "metadata.jsonl", json.dumps(prompt.row, ensure_ascii=False) + "\n"
        )
        if with_grid:
            images = [image_sets.read(folder / f"samples/{j:05d}.png") for j in range(per_prompt)]
            image_files.save(
                folder / "grid.png", image_files.grid(np.stack(images), columns=per_prompt, gap=2)
            )


def fingerprint(model) -> str:
    """Of a model's files: names, sizes and both ends of each, without reading gigabytes."""
    model = pathlib.Path(model)
    if not model.is_dir():
        raise UserError(
            f"no directory {model}: give a diffusers folder, a converted model or the --workdir of a run"
        )
    if (model / run_files.STUDENT).is_file():
        paths = [model / run_files.CONFIG, model / run_files.STUDENT]
    else:
        paths = sorted(p for p in model.rglob("*") if p.suffix in (".safetensors", ".json"))
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


def check(out, settings, units):
    """Raise UserError where `claim` would; claim nothing.

    The folder is made, so that one that cannot be written is refused as well.
    """
    out = pathlib.Path(out)
    with _KEEPER.hold(out):
        _check_settings(out, settings)
        _rows(out, units)


def claim(out, settings, units):
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
            files.write_text(
                out / MANIFEST, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            )


def _check_settings(out, settings):
    _KEEPER.check(out, settings)
    images = out / PICTURES
    if not (out / PROTOCOL).exists() and images.is_dir() and any(images.iterdir()):
        raise UserError(f"{images} holds images and {PROTOCOL} is missing: choose another --out")


def _rows(out, units):
    """{file: row} of the manifest, with those of the units."""
    rows = {}
    if (out / MANIFEST).exists():
        for line in filter(None, files.read_lines(out / MANIFEST)):
            row = json.loads(line)
            rows[row["file"]] = row
    for unit in units:
        row = {"file": unit.file, "prompt": unit.prompt, "indices": list(unit.indices)}
        if rows.setdefault(unit.file, row) != row:
            raise UserError(
                f"{out} has {unit.file} of {rows[unit.file]['prompt']!r} with noise {rows[unit.file]['indices']}, now of "
                f"{unit.prompt!r} with {row['indices']}: use the same prompts, or another --out"
            )
    return rows


def missing(out, units):
    """Units whose files are not there yet. Files appear whole, so one that is there is done."""
    return [unit for unit in units if not (pathlib.Path(out) / PICTURES / unit.file).exists()]


def make(out, units, pipe, options, *, batch, file_format, bar, claim):
    """Makes and writes the pictures of units; records in protocol.json with what. bar: of tqdm, in pictures.

    options: keywords of `generation.generate`. batch: pictures a program run, rounded up to a multiple of the devices.
    claim: called when the first pictures are made, before they are written; `claim` of this folder.
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
            files.write_text(out / PROTOCOL, json.dumps(known, indent=2) + "\n")


def protocol(out) -> dict:
    """Return {"settings", "made_by"} of a folder."""
    path = pathlib.Path(out) / PROTOCOL
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): choose another --out") from None
    return {"settings": known["settings"], "made_by": known.get("made_by", [])}

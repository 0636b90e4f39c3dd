"""Whole checkpoints on disk: diffusers pipelines, our own form of them, and how to tell which is which."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from sprint_jax.conversion import configs, rules, tables
from sprint_jax.errors import UserError
from sprint_jax.models.controlnet import ControlNet
from sprint_jax.models.dc_ae import DCAE, Stage
from sprint_jax.models.gemma2 import Gemma2
from sprint_jax.models.linear_dit import LinearDiT
from sprint_jax.storage import tensors, weights

INDEX = "model_index.json"  # diffusers
MODEL = "model.json"  # ours
PARTS = ("transformer", "autoencoder", "text_encoder", "controlnet")
_FORMAT = "sprint_jax model 1"
_PIPELINES = ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline")
# The part's folder and the stem of its weight files, in diffusers pipelines.
_DIFFUSERS = {
    "transformer": ("transformer", "diffusion_pytorch_model"),
    "autoencoder": ("vae", "diffusion_pytorch_model"),
    "text_encoder": ("text_encoder", "model"),
    "controlnet": ("controlnet", "diffusion_pytorch_model"),
}
_REQUIRED = ("scheduler", "tokenizer", "transformer", "vae", "text_encoder")
SHARD_BYTES = 5 * 10**9
_CROSS_HEADS = {1152: 16, 2240: 20}  # of the published widths, for files without a config


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model in memory.

    transformer, autoencoder, text_encoder: descriptions; the last two None in a transformer alone. controlnet: None in
    most.
    params: {part: tree of arrays, as `place` left them}. tokenizer: folder of its files. instruction: before every prompt.
    """

    transformer: LinearDiT
    autoencoder: DCAE | None
    text_encoder: Gemma2 | None
    params: dict[str, Any]
    tokenizer: pathlib.Path | None
    instruction: str
    controlnet: ControlNet | None = None

    def parts(self):
        return [part for part in PARTS if getattr(self, part) is not None]


def is_diffusers(path) -> bool:
    return (pathlib.Path(path) / INDEX).is_file()


def is_ours(path) -> bool:
    return (pathlib.Path(path) / MODEL).is_file()


def _abstract(model):
    return jax.eval_shape(model.init, jax.random.key(0))


def _keep(part, path, array):
    return array


def _dtype(dtype):
    """A NumPy dtype; None stays None."""
    return None if dtype is None else np.dtype(jax.numpy.dtype(dtype))


def read_diffusers(
    path, *, dtype, instruction: str, pixels_dtype=None, place=_keep, say=lambda message: None
) -> Checkpoint:
    """A SANA-Sprint pipeline folder.

    dtype: "float32" or "bfloat16" for every part, or None to keep what the files hold. pixels_dtype: of the autoencoder, None for dtype.
    place: (part, path, NumPy array) -> leaf, called for each array as soon as it is read.
    Raises UserError for a folder that lacks a part, has one of another kind, or damaged files.
    """
    path = pathlib.Path(path)
    index = configs.read_json(path / INDEX)
    kind = index.get("_class_name")
    if kind not in _PIPELINES:
        more = (
            ": give its controlnet/ beside a SANA-Sprint model" if "ControlNet" in str(kind) else ""
        )
        raise UserError(
            f"{path} holds a {kind}, not a SANA-Sprint pipeline ({' or '.join(_PIPELINES)}){more}"
        )
    for part in _REQUIRED:
        if not (path / part).is_dir():
            raise UserError(f"{path} has no {part}/: download the whole folder")
    configs.check_scheduler(configs.read_json(path / "scheduler" / "scheduler_config.json"))
    compute = dtype or "float32"
    models = {
        "transformer": configs.transformer(
            configs.read_json(path / "transformer" / "config.json"), compute
        ),
        "autoencoder": configs.autoencoder(configs.read_json(path / "vae" / "config.json")),
        "text_encoder": configs.text_encoder(
            configs.read_json(path / "text_encoder" / "config.json")
        ),
    }
    _check_widths(models)
    if (path / "controlnet").is_dir():
        models["controlnet"] = configs.controlnet(
            configs.read_json(path / "controlnet" / "config.json"), compute
        )
    params = {}
    for part, (folder, stem) in _DIFFUSERS.items():
        if part not in models:
            continue
        say(f"reading {folder}")
        found = tensors.find(path / folder, stem)
        rows = getattr(tables, part)(models[part])
        params[part] = _load(
            part, rows, found, models[part], _dtype_of(part, dtype, pixels_dtype), place
        )
    return Checkpoint(
        **models, params=params, tokenizer=path / "tokenizer", instruction=instruction
    )


def read_transformer(path) -> tuple[LinearDiT, Any]:
    """(description, parameters float32) of a diffusers transformer: a pipeline's folder of any kind, or transformer/."""
    path = pathlib.Path(path)
    inner, stem = _DIFFUSERS["transformer"]
    path = path / inner if (path / inner).is_dir() else path
    model = configs.transformer(configs.read_json(path / "config.json"), "float32")
    rows = tables.transformer(model)
    return model, _load("transformer", rows, tensors.find(path, stem), model, "float32", _keep)


def read_controlnet(path) -> tuple[ControlNet, Any]:
    """(description, parameters float32) of a diffusers ControlNet: a pipeline's folder of any kind, or controlnet/."""
    path = pathlib.Path(path)
    inner, stem = _DIFFUSERS["controlnet"]
    path = path / inner if (path / inner).is_dir() else path
    model = configs.controlnet(configs.read_json(path / "config.json"), "float32")
    return model, _load(
        "controlnet", tables.controlnet(model), tensors.find(path, stem), model, "float32", _keep
    )


def _dtype_of(part, dtype, pixels_dtype):
    return pixels_dtype if part == "autoencoder" and pixels_dtype else dtype


def _load(part, rows, found, model, dtype, place):
    leaf = functools.partial(place, part)
    return rules.load(rows, found, _abstract(model), _dtype(dtype), part.replace("_", " "), leaf)


def _check_widths(models):
    transformer, autoencoder, text = (models[part] for part in PARTS[:3])
    if transformer.in_channels != autoencoder.latent_channels:
        raise UserError(
            f"the transformer takes {transformer.in_channels} latent channels, the autoencoder makes "
            f"{autoencoder.latent_channels}: these parts do not belong together"
        )
    if transformer.text_dim != text.width:
        raise UserError(
            f"the transformer takes text features {transformer.text_dim} wide, the text encoder makes {text.width}: "
            "these parts do not belong together"
        )


def write_diffusers(path, checkpoint: Checkpoint, *, shard_bytes=SHARD_BYTES):
    """A folder that diffusers loads. A transformer alone becomes transformer/ and scheduler/."""
    with whole(path) as partial:
        for part in checkpoint.parts():
            folder, stem = _DIFFUSERS[part]
            (partial / folder).mkdir()
            model = getattr(checkpoint, part)
            configs.write_json(
                partial / folder / "config.json", getattr(configs, f"{part}_json")(model)
            )
            named = rules.export(getattr(tables, part)(model), checkpoint.params[part])
            tensors.write(partial / folder, stem, named, shard_bytes=shard_bytes)
        (partial / "scheduler").mkdir()
        configs.write_json(
            partial / "scheduler" / "scheduler_config.json", configs.scheduler_json()
        )
        if checkpoint.tokenizer is not None:
            shutil.copytree(checkpoint.tokenizer, partial / "tokenizer")
        if checkpoint.autoencoder is not None:
            configs.write_json(partial / INDEX, _INDEX_JSON)


_INDEX_JSON = {
    "_class_name": "SanaSprintPipeline",
    "scheduler": ["diffusers", "SCMScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "tokenizer": ["transformers", "GemmaTokenizerFast"],
    "transformer": ["diffusers", "SanaTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderDC"],
}


def read_ours(
    path, *, dtype, pixels_dtype=None, place=_keep, say=lambda message: None
) -> Checkpoint:
    """A folder made by `write_ours`. dtype, pixels_dtype, place: as in `read_diffusers`."""
    path, compute = pathlib.Path(path), dtype or "float32"
    described = configs.read_json(path / MODEL)
    if described.get("format") != _FORMAT:
        raise UserError(
            f"{path / MODEL} has format {described.get('format')!r}, this version reads {_FORMAT!r}: convert again"
        )
    try:
        models = {
            "transformer": LinearDiT(
                **described["transformer"]
                | {"dtype": compute, "residual_dtype": compute, "attention": "plain"}
            ),
            "autoencoder": _autoencoder(described["autoencoder"]),
            "text_encoder": Gemma2(**described["text_encoder"]),
        }
        if "controlnet" in described:
            models["controlnet"] = configs.controlnet(described["controlnet"], compute)
        instruction = described["instruction"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / MODEL} does not describe a model ({error}): convert again"
        ) from None
    params = {}
    for part, model in models.items():
        say(f"reading {part}")
        rows = [
            rules.Row(name, leaf.shape, name)
            for name, leaf in weights.flatten(_abstract(model)).items()
        ]
        params[part] = _load(
            part,
            rows,
            tensors.scan(path / f"{part}.safetensors"),
            model,
            _dtype_of(part, dtype, pixels_dtype),
            place,
        )
    return Checkpoint(
        **models, params=params, tokenizer=path / "tokenizer", instruction=instruction
    )


def _autoencoder(fields):
    stages = {
        side: tuple(Stage(**stage | {"scales": tuple(stage["scales"])}) for stage in fields[side])
        for side in ("encoder", "decoder")
    }
    return DCAE(**fields | stages)


def write_ours(path, checkpoint: Checkpoint):
    """model.json, one safetensors file a part under our names, and the tokenizer."""
    with whole(path) as partial:
        described = {part: dataclasses.asdict(getattr(checkpoint, part)) for part in PARTS[:3]}
        if checkpoint.controlnet is not None:
            described["controlnet"] = configs.controlnet_json(checkpoint.controlnet)
        del described["transformer"][
            "residual_dtype"
        ]  # says how to compute, not what, like the next ones: the reader chooses
        for part in ("transformer", "autoencoder"):
            for field in ("attention", "depthwise"):
                del described[part][field]
        described |= {"format": _FORMAT, "instruction": checkpoint.instruction}
        (partial / MODEL).write_text(
            json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        for part in checkpoint.parts():
            tensors.write(
                partial, part, weights.flatten(checkpoint.params[part]), shard_bytes=2**62
            )
        shutil.copytree(checkpoint.tokenizer, partial / "tokenizer")


def read_native(file) -> Checkpoint:
    """A transformer of the official repository, its `.pth` names in a safetensors file.

    The file has no config: sizes are read off the shapes, and heads are the published ones for that width.
    """
    found = {name: t for name, t in tensors.scan(file).items() if name not in tables.NATIVE_DROPPED}
    try:
        width, channels = found["x_embedder.proj.weight"].shape[:2]
        hidden = found["blocks.0.mlp.point_conv.conv.weight"].shape[1]
        text_dim = found["y_embedder.y_proj.fc1.weight"].shape[1]
    except KeyError as error:
        raise UserError(
            f"{file} has no {error.args[0]}: it does not hold a SANA transformer under its native names"
        ) from None
    except (ValueError, IndexError):
        raise UserError(
            f"{file} holds native names with other shapes: it is no SANA transformer"
        ) from None
    if width not in _CROSS_HEADS:
        raise UserError(
            f"{file} is {width} wide; native files carry no head counts, and only those of {list(_CROSS_HEADS)} are known"
        )
    model = LinearDiT(
        in_channels=channels,
        width=width,
        depth=1 + max(int(n.split(".")[1]) for n in found if n.startswith("blocks.")),
        heads=width // 32,
        cross_heads=_CROSS_HEADS[width],
        mlp_ratio=hidden / width,
        text_dim=text_dim,
        patch_size=1,
        qk_norm="blocks.0.attn.q_norm.weight" in found,
        time_scale=1.0,
        guidance_embed="cfg_embedder.mlp.0.weight" in found,
        guidance_scale_factor=0.1,
        logvar_head=False,
        remat="none",
        unroll=1,
        dtype="float32",
        residual_dtype="float32",
        attention="plain",
    )
    params = rules.load(
        tables.native_transformer(model), found, _abstract(model), None, "transformer"
    )
    return Checkpoint(model, None, None, {"transformer": params}, None, "")


@contextlib.contextmanager
def whole(path, flag="--to"):
    """A folder to fill, which takes its name only when it is complete; on an error nothing is left. flag: what named it."""
    path = pathlib.Path(path).resolve()  # of a link its target; of "." a name
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty: choose another {flag}")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"cannot write in {path.parent} ({error.strerror}): choose another {flag}"
        ) from None
    try:
        yield partial
        _take_name(partial, path)
    except OSError as error:
        raise UserError(
            f"writing {path} failed ({error.strerror or error}): free some space and try again"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _take_name(partial, path):
    """Gives a complete folder its name. Into an empty one that must stay itself, a mount point or where the caller is, its contents move."""
    if path.exists() and not path.is_mount() and path != pathlib.Path.cwd():
        path.rmdir()
    if not path.exists():
        os.rename(partial, path)
        return
    try:
        for child in sorted(partial.iterdir()):
            shutil.move(child, path / child.name)
    except OSError:
        for child in path.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        raise

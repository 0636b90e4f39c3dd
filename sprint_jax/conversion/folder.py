"""Checkpoint folders: diffusers pipelines, the project's own form, and how to tell them apart."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np

from sprint_jax.conversion import configs, rules, tables
from sprint_jax.errors import UserError
from sprint_jax.models.controlnet import ControlNet
from sprint_jax.models.dc_ae import DCAE, Stage
from sprint_jax.models.gemma2 import Gemma2
from sprint_jax.models.linear_dit import LinearDiT
from sprint_jax.storage import fields, files, json_files, safetensors_files, settings, weights

INDEX = "model_index.json"  # diffusers
MODEL = "model.json"  # ours
SHARD_BYTES = 5 * 10**9
_FORMAT = "sprint_jax model 1"
_PIPELINES = ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline")
_REQUIRED = ("scheduler", "tokenizer", "transformer", "vae", "text_encoder")
_CROSS_HEADS = {1152: 16, 2240: 20}  # by published width, for files without a config

_StrPath: TypeAlias = str | os.PathLike[str]
_T = TypeVar("_T")
_Place: TypeAlias = Callable[[str, str, np.ndarray], Any]  # (part, dotted path, array) -> leaf
_Say: TypeAlias = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class _Part:
    """How diffusers stores one part of a pipeline."""

    folder: str
    stem: str  # of the names of its weight files
    to_json: Callable[[Any], dict[str, Any]]
    rows: Callable[[Any], list[rules.Row]]


_STEM = "diffusion_pytorch_model"
_PARTS = {
    "transformer": _Part("transformer", _STEM, configs.transformer_json, tables.transformer),
    "autoencoder": _Part("vae", _STEM, configs.autoencoder_json, tables.autoencoder),
    "text_encoder": _Part("text_encoder", "model", configs.text_encoder_json, tables.text_encoder),
    "controlnet": _Part("controlnet", _STEM, configs.controlnet_json, tables.controlnet),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model in memory: descriptions of its parts, and their parameters."""

    transformer: LinearDiT
    autoencoder: DCAE | None = None  # None for a transformer alone
    text_encoder: Gemma2 | None = None  # None for a transformer alone
    controlnet: ControlNet | None = None
    params: dict[str, Any]  # {part: tree of arrays}
    tokenizer: pathlib.Path | None = None  # folder of its files
    instruction: str = ""  # precedes every prompt

    @property
    def models(self) -> dict[str, Any]:
        """The descriptions of the parts that the checkpoint has, by name."""
        models = {
            "transformer": self.transformer,
            "autoencoder": self.autoencoder,
            "text_encoder": self.text_encoder,
            "controlnet": self.controlnet,
        }
        return {part: model for part, model in models.items() if model is not None}


_read = functools.partial(json_files.read_object, remedy="copy the whole folder again")


def is_diffusers(path: _StrPath) -> bool:
    """Return whether a folder is a diffusers pipeline."""
    return (pathlib.Path(path) / INDEX).is_file()


def is_ours(path: _StrPath) -> bool:
    """Return whether a folder was made by `write_ours`."""
    return (pathlib.Path(path) / MODEL).is_file()


@functools.lru_cache(maxsize=16)
def _abstract(model: Any) -> Any:
    """Return the shapes of a network. Raises UserError where its sizes do not fit each other."""
    try:
        return weights.abstract(model)
    except (ArithmeticError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"the config of the {type(model).__name__} has sizes that do not fit each other ({why})"
        ) from None


def _keep(part: str, path: str, array: np.ndarray) -> np.ndarray:
    del part, path
    return array


def _ignore(message: str) -> None:
    del message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """The descriptions of a checkpoint folder, before any array is read.

    Callers choose which parts to read, and with `replace` how they compute.
    """

    path: pathlib.Path
    models: dict[str, Any]  # {part: network}
    instruction: str | None  # precedes every prompt; None if the folder does not hold one
    diffusers: bool  # whether the files have the names of diffusers

    @property
    def tokenizer(self) -> pathlib.Path:
        """The folder with the files of the tokenizer."""
        return self.path / "tokenizer"

    def replace(self, **models: Any) -> "Description":
        """Return the description with other networks for some parts."""
        return dataclasses.replace(self, models=self.models | models)

    def read(
        self,
        parts: Sequence[str] | None = None,
        *,
        dtype: str | None,
        pixels_dtype: str | None = None,
        place: _Place = _keep,
        say: _Say = _ignore,
    ) -> dict[str, Any]:
        """Read parameters. Returns {part: tree}.

        Args:
          parts: the parts to read. None reads all.
          dtype: "float32" or "bfloat16" for every part. None keeps the dtypes of the files.
          pixels_dtype: dtype of the autoencoder, if it differs.
          place: (part, dotted path, NumPy array) -> leaf, called for each array when it is read.
          say: called with a line of progress before each part.

        Raises UserError if a file is missing or damaged.
        """
        params = {}
        for part, model in self.models.items():
            if parts is not None and part not in parts:
                continue
            wanted = _dtype_of(part, dtype, pixels_dtype)
            rows, found, name = self._files(part, model)
            say(f"reading {name}")
            params[part] = _load(part, rows, found, model, wanted, place)
        return params

    def _files(
        self, part: str, model: Any
    ) -> tuple[list[rules.Row], Mapping[str, safetensors_files.Tensor], str]:
        """Return the table of a part, the tensors of its files, and its name for people."""
        if self.diffusers:
            stored = _PARTS[part]
            found = safetensors_files.find(self.path / stored.folder, stored.stem)
            return stored.rows(model), found, stored.folder
        flat = weights.flatten(_abstract(model))
        rows = [rules.Row(name, leaf.shape, name) for name, leaf in flat.items()]
        return rows, safetensors_files.scan(self.path / f"{part}.safetensors"), part


def describe(path: _StrPath, *, dtype: str | None) -> Description:
    """Describe a diffusers pipeline or a folder made by `write_ours`, without reading arrays.

    dtype: "float32" or "bfloat16", the compute dtype of the networks. None is float32.

    Raises UserError if a part is missing or of another kind.
    """
    path, compute = pathlib.Path(path), dtype or "float32"
    if is_diffusers(path):
        _check_pipeline(path)
        models, instruction = _describe(path, compute), None
        _check_widths(models)
    else:
        models, instruction = _describe_ours(path, compute)
    try:
        for model in models.values():
            _abstract(model)
    except UserError as error:
        raise UserError(f"{path if is_diffusers(path) else path / MODEL}: {error}") from None
    return Description(
        path=path, models=models, instruction=instruction, diffusers=is_diffusers(path)
    )


def read_diffusers(
    path: _StrPath,
    *,
    dtype: str | None,
    instruction: str,
    pixels_dtype: str | None = None,
    place: _Place = _keep,
    say: _Say = _ignore,
) -> Checkpoint:
    """Read the folder of a SANA-Sprint pipeline.

    instruction: text that precedes every prompt. The other arguments and the errors are those of
    `Description.read`.
    """
    described = describe(path, dtype=dtype)
    params = described.read(dtype=dtype, pixels_dtype=pixels_dtype, place=place, say=say)
    return Checkpoint(
        **described.models, params=params, tokenizer=described.tokenizer, instruction=instruction
    )


def _check_pipeline(path: pathlib.Path) -> None:
    """Raise UserError unless a folder holds a whole SANA-Sprint pipeline."""
    kind = _read(path / INDEX).get("_class_name")
    if kind not in _PIPELINES:
        more = (
            ": give its controlnet/ beside a SANA-Sprint model" if "ControlNet" in str(kind) else ""
        )
        raise UserError(
            f"{path} holds a {fields.name(kind)}, not a SANA-Sprint pipeline "
            f"({' or '.join(_PIPELINES)}){more}"
        )
    for part in _REQUIRED:
        if not (path / part).is_dir():
            raise UserError(f"{path} has no {part}/: download the whole folder")
    _of_config(path / "scheduler" / "scheduler_config.json", configs.check_scheduler)


def _describe(path: pathlib.Path, dtype: str) -> dict[str, Any]:
    """Read the descriptions of the parts of a pipeline."""
    of = lambda part, made: _of_config(path / part / "config.json", made)
    models = {
        "transformer": of("transformer", lambda config: configs.transformer(config, dtype)),
        "autoencoder": of("vae", configs.autoencoder),
        "text_encoder": of("text_encoder", configs.text_encoder),
    }
    if (path / "controlnet").is_dir():
        models["controlnet"] = of("controlnet", lambda config: configs.controlnet(config, dtype))
    return models


def _of_config(path: pathlib.Path, made: Callable[[dict[str, Any]], _T]) -> _T:
    """Return what a function makes of a JSON file. Its error lines get the file's name."""
    config = _read(path)
    try:
        return made(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_transformer(path: _StrPath) -> tuple[LinearDiT, Any]:
    """Read a diffusers transformer as float32: (description, parameters).

    path: the folder of any pipeline, or its transformer/.
    """
    path = _subfolder(path, "transformer")
    model = _of_config(path / "config.json", lambda c: configs.transformer(c, "float32"))
    return model, _load_alone("transformer", path, model)


def read_controlnet(path: _StrPath) -> tuple[ControlNet, Any]:
    """Read a diffusers ControlNet as float32: (description, parameters).

    path: the folder of any pipeline, or its controlnet/.
    """
    path = _subfolder(path, "controlnet")
    model = _of_config(path / "config.json", lambda c: configs.controlnet(c, "float32"))
    return model, _load_alone("controlnet", path, model)


def _subfolder(path: _StrPath, name: str) -> pathlib.Path:
    path = pathlib.Path(path)
    return path / name if (path / name).is_dir() else path


def _load_alone(part: str, path: pathlib.Path, model: Any) -> Any:
    stored = _PARTS[part]
    found = safetensors_files.find(path, stored.stem)
    return _load(part, stored.rows(model), found, model, "float32", _keep)


def _dtype_of(part: str, dtype: str | None, pixels_dtype: str | None) -> str | None:
    return pixels_dtype if part == "autoencoder" and pixels_dtype else dtype


def _load(
    part: str,
    rows: Sequence[rules.Row],
    found: Mapping[str, safetensors_files.Tensor],
    model: Any,
    dtype: str | None,
    place: _Place,
) -> Any:
    numpy_dtype = None if dtype is None else np.dtype(jax.numpy.dtype(dtype))
    name, leaf = part.replace("_", " "), functools.partial(place, part)
    return rules.load(rows, found, _abstract(model), numpy_dtype, name, leaf)


def _check_widths(models: Mapping[str, Any]) -> None:
    """Raise UserError if the transformer does not fit the autoencoder or the text encoder."""
    transformer, autoencoder = models["transformer"], models["autoencoder"]
    text = models["text_encoder"]
    if transformer.in_channels != autoencoder.latent_channels:
        raise UserError(
            f"the transformer takes {transformer.in_channels} latent channels, the autoencoder "
            f"makes {autoencoder.latent_channels}: these parts do not belong together"
        )
    if transformer.text_dim != text.width:
        raise UserError(
            f"the transformer takes text features {transformer.text_dim} wide, the text encoder "
            f"makes {text.width}: these parts do not belong together"
        )


def write_diffusers(
    path: _StrPath, checkpoint: Checkpoint, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a folder that diffusers loads.

    A checkpoint without an autoencoder becomes transformer/ and scheduler/ only, and controlnet/ if
    it has one.
    """
    with new_folder(path) as partial:
        for part, model in checkpoint.models.items():
            stored = _PARTS[part]
            (partial / stored.folder).mkdir()
            json_files.write(
                partial / stored.folder / "config.json", stored.to_json(model), sort_keys=True
            )
            named = rules.export(stored.rows(model), checkpoint.params[part])
            safetensors_files.write(
                partial / stored.folder, stored.stem, named, shard_bytes=shard_bytes
            )
        (partial / "scheduler").mkdir()
        scheduler = partial / "scheduler" / "scheduler_config.json"
        json_files.write(scheduler, configs.scheduler_json(), sort_keys=True)
        if checkpoint.tokenizer is not None:
            shutil.copytree(checkpoint.tokenizer, partial / "tokenizer")
        if checkpoint.autoencoder is not None:
            json_files.write(partial / INDEX, _INDEX_JSON, sort_keys=True)


_INDEX_JSON = {
    "_class_name": "SanaSprintPipeline",
    "scheduler": ["diffusers", "SCMScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "tokenizer": ["transformers", "GemmaTokenizerFast"],
    "transformer": ["diffusers", "SanaTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderDC"],
}


def read_ours(
    path: _StrPath,
    *,
    dtype: str | None,
    pixels_dtype: str | None = None,
    place: _Place = _keep,
    say: _Say = _ignore,
) -> Checkpoint:
    """Read a folder made by `write_ours`. Arguments and errors are those of `Description.read`."""
    described = describe(path, dtype=dtype)
    params = described.read(dtype=dtype, pixels_dtype=pixels_dtype, place=place, say=say)
    return Checkpoint(
        **described.models,
        params=params,
        tokenizer=described.tokenizer,
        instruction=described.instruction or "",
    )


def _describe_ours(path: pathlib.Path, dtype: str) -> tuple[dict[str, Any], str]:
    """Read the descriptions of the parts, and the instruction, of our form."""
    described = _read(path / MODEL)
    if described.get("format") != _FORMAT:
        raise UserError(
            f"{path / MODEL} has format {fields.shown(described.get('format'))}, this version "
            f"reads {_FORMAT!r}: convert again"
        )
    chosen = {"dtype": dtype, "residual_dtype": dtype, "attention": "plain"}
    try:
        models = {
            "transformer": _described(LinearDiT, described["transformer"], chosen),
            "autoencoder": _autoencoder(described["autoencoder"]),
            "text_encoder": _described(Gemma2, described["text_encoder"]),
        }
        if "controlnet" in described:
            models["controlnet"] = configs.controlnet(described["controlnet"], dtype)
        instruction = described["instruction"]
        if not isinstance(instruction, str):
            raise TypeError(f"instruction is {fields.shown(instruction)}")
        return models, instruction
    except (AttributeError, KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(
            f"{path / MODEL} does not describe a model ({error}): convert again"
        ) from None


# Fields of our networks that hold less, or more, than their types say.
_KINDS = {
    "depth": fields.LAYERS,
    "layers": fields.LAYERS,
    "mlp_ratio": configs.RATIO,
    "guidance_scale_factor": fields.NUMBER,
}


def _described(network: type[_T], given: Any, chosen: Mapping[str, Any] = {}) -> _T:
    """Return a network of the fields that model.json gives, and of those chosen here."""
    kinds = fields.kinds_of(network) | _KINDS
    fields.check(given, kinds, network.__name__)
    return network(**dict(given) | dict(chosen))


def _autoencoder(given: dict[str, Any]) -> DCAE:
    stages: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        for stage in given[side]:
            if not fields.ODD.many().accepts(stage["scales"]):
                raise ValueError(f"scales of {side} are {fields.shown(stage['scales'])}")
        tupled = [stage | {"scales": tuple(stage["scales"])} for stage in given[side]]
        stages[side] = tuple(_described(Stage, stage) for stage in tupled)
    return _described(DCAE, given | stages)


def write_ours(path: _StrPath, checkpoint: Checkpoint) -> None:
    """Write model.json, one safetensors file for each part under our names, and the tokenizer."""
    assert checkpoint.tokenizer is not None, "a transformer alone has no folder of this form"
    models = checkpoint.models
    with new_folder(path) as partial:
        described: dict[str, Any] = {
            part: dataclasses.asdict(models[part])
            for part in ("transformer", "autoencoder", "text_encoder")
        }
        if checkpoint.controlnet is not None:
            described["controlnet"] = configs.controlnet_json(checkpoint.controlnet)
        # The reader chooses how to compute.
        del described["transformer"]["residual_dtype"]
        for part in ("transformer", "autoencoder"):
            for field in ("attention", "depthwise"):
                del described[part][field]
        described |= {"format": _FORMAT, "instruction": checkpoint.instruction}
        json_files.write(partial / MODEL, described)
        for part in models:
            flat = weights.flatten(checkpoint.params[part])
            safetensors_files.write(partial, part, flat, shard_bytes=2**62)
        shutil.copytree(checkpoint.tokenizer, partial / "tokenizer")


def read_native(file: _StrPath) -> Checkpoint:
    """Read a transformer of the official repository: the names of its `.pth`, as safetensors.

    The file has no config. Sizes follow from the shapes, and the numbers of heads are the published
    ones for the width. Raises UserError for another file or an unknown width.
    """
    found = {
        name: t
        for name, t in safetensors_files.scan(file).items()
        if name not in tables.NATIVE_DROPPED
    }
    try:
        width, channels = found["x_embedder.proj.weight"].shape[:2]
        hidden = found["blocks.0.mlp.point_conv.conv.weight"].shape[1]
        text_dim = found["y_embedder.y_proj.fc1.weight"].shape[1]
    except KeyError as error:
        raise UserError(
            f"{file} has no {error.args[0]}: it does not hold a SANA transformer under its native "
            "names"
        ) from None
    except (ValueError, IndexError):
        raise UserError(
            f"{file} holds native names with other shapes: it is no SANA transformer"
        ) from None
    if width not in _CROSS_HEADS:
        raise UserError(
            f"{file} is {width} wide; native files carry no head counts, and only those of "
            f"{list(_CROSS_HEADS)} are known"
        )
    qk_norm = "blocks.0.attn.q_norm.weight" in found
    described = {
        "in_channels": channels,
        "out_channels": channels,
        "num_attention_heads": width // 32,
        "attention_head_dim": 32,
        "num_layers": 1 + max(int(n.split(".")[1]) for n in found if n.startswith("blocks.")),
        "num_cross_attention_heads": _CROSS_HEADS[width],
        "cross_attention_head_dim": width // _CROSS_HEADS[width],
        "cross_attention_dim": width,
        "caption_channels": text_dim,
        "mlp_ratio": hidden / width,
        "guidance_embeds": "cfg_embedder.mlp.0.weight" in found,
        "qk_norm": "rms_norm_across_heads" if qk_norm else None,
    }
    model = configs.transformer(described, "float32")
    rows = tables.native_transformer(model)
    params = rules.load(rows, found, _abstract(model), None, "transformer")
    return Checkpoint(transformer=model, params={"transformer": params})


@contextlib.contextmanager
def new_folder(path: _StrPath, flag: str = "--to") -> Iterator[pathlib.Path]:
    """Yield a folder to fill. It gets its name when the block ends; an error leaves nothing behind.

    flag: names the option that gave the path, for errors. Raises UserError if the path exists and
    is not an empty folder, or cannot be written.
    """
    path = pathlib.Path(path).resolve()  # follow a link, and give "." a name
    cannot = f"cannot write in {path.parent} ({{}}): choose another {flag}".format
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(cannot(error.strerror)) from None
    with settings.file_claim(path, flag):
        if path.exists() and (not path.is_dir() or not files.is_empty(path)):
            raise UserError(f"{path} exists and is not empty: choose another {flag}")
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
        except OSError as error:
            raise UserError(cannot(error.strerror)) from None
        try:
            with files.unfinished(partial):
                yield partial
                _publish(partial, path)
        except OSError as error:
            raise UserError(
                f"writing {path} failed ({error.strerror or error}): free some space and try again"
            ) from None


def _publish(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Rename a complete folder to its final name.

    An empty folder that cannot be replaced (a mount point or the working directory) receives the
    contents instead.
    """
    if path.exists() and not path.is_mount() and path != pathlib.Path.cwd():
        path.rmdir()
    if not path.exists():
        files.rename_finished(partial, path)
        return
    try:
        for child in files.children(partial):
            shutil.move(child, path / child.name)
    except OSError:
        for child in files.children(path):
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        raise

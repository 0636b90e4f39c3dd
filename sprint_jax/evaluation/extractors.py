"""Features of images and texts, by weights that the user brings: the FID Inception and CLIP.

An extractor is any callable from a list of uint8 images [H, W, 3] to features [N, D].
"""

import importlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from sprint_jax.conversion import configs
from sprint_jax.encoders import tokenizers
from sprint_jax.errors import UserError
from sprint_jax.evaluation.networks import clip as clip_lib
from sprint_jax.evaluation.networks import inception
from sprint_jax.storage import (
    crops,
    digests,
    fields,
    files,
    json_files,
    safetensors_files,
    torch_files,
)

# The first digits of the SHA-256 of pytorch-fid's weights are part of their file's name.
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
_INCEPTION_SHA256 = "6726825d"
_SOURCE = "source_sha256"  # of the .pth that a .safetensors file was made from


class Batched:
    """A function (params, rows), run in batches of one size, each sharded over local devices."""

    def __init__(self, function: Callable[..., Any], params: Any, batch: int):
        devices = jax.local_devices()
        mesh = jax.sharding.Mesh(np.array(devices), ("rows",))
        self._batch = -(-batch // len(devices)) * len(devices)
        self._rows = NamedSharding(mesh, PartitionSpec("rows"))
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self._function = jax.jit(function)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return [N, D] as NumPy of rows [N, ...]; the last batch is padded."""
        made = []
        for start in range(0, len(rows), self._batch):
            part = rows[start : start + self._batch]
            padded = np.concatenate([part, np.repeat(part[-1:], self._batch - len(part), 0)])
            found = self._function(self._params, jax.device_put(padded, self._rows))
            made.append(np.asarray(found)[: len(part)])
        return np.concatenate(made)


class Inception:
    """Pooled features of the published Inception, with one of two resizes to 299."""

    def __init__(self, params: Any, *, resize: str, batch: int):
        if resize == "pytorch-fid":
            function = lambda p, x: inception.features(p, inception.resized(x))
        else:  # clean-fid's range differs too: 128 is the middle
            function = lambda p, x: inception.features(p, (x - 128) / 128)
        self._resize, self._run = resize, Batched(function, params, batch)

    def __call__(self, images: Any) -> np.ndarray:
        """Return features float64 [N, 2048] of uint8 images of one size, [N, H, W, 3] or a list."""
        if self._resize == "clean-fid":
            images = [clean_resize(image) for image in images]
        return self._run(np.stack(images)).astype(np.float64)


def clean_resize(image: np.ndarray) -> np.ndarray:
    """Resize uint8 [H, W, 3] to float32 [299, 299, 3] in 0..255, as clean-fid does.

    PIL's antialiased bicubic on float channels, not rounded.
    """
    side = (inception.SIDE, inception.SIDE)
    channels = [
        np.asarray(
            Image.fromarray(image[..., c].astype(np.float32)).resize(side, Image.Resampling.BICUBIC)
        )
        for c in range(3)
    ]
    return np.clip(np.stack(channels, -1), 0, 255)


def load_inception(path: pathlib.Path | str, *, unpublished: bool = False) -> tuple[Any, str]:
    """Load the published .pth file, or a file of `save_inception`.

    unpublished: accept weights of any origin, with their own digest. Returns (parameters, SHA-256
    of the published file that they come from). Raises UserError for a file that is not there, not
    whole, or not of the published weights.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(
            f"no Inception weights at {path}: download {INCEPTION_FILE} (of pytorch-fid) and give "
            f"its path"
        )
    found, digest = _read_inception(path)
    if not digest.startswith(_INCEPTION_SHA256) and not unpublished:
        raise UserError(
            f"{path} does not come from {INCEPTION_FILE}: the SHA-256 is {digest[:8]}..., not "
            f"{_INCEPTION_SHA256}...; download it again, or say --unpublished_weights for a "
            "distance that is not FID"
        )
    try:
        return inception.params_of(found), digest
    except ValueError as error:
        raise UserError(
            f"{path} is not the FID Inception ({error}): give {INCEPTION_FILE}"
        ) from None


def _read_inception(path):
    """Read ({name: array}, digest) of a .safetensors or a .pth file."""
    if path.suffix == ".safetensors":
        found = {}
        for name, tensor in safetensors_files.scan(path).items():
            if not isinstance(tensor.dtype, str):  # counters are no weights
                found[name] = np.empty(tensor.shape, tensor.dtype)
                safetensors_files.read(tensor, found[name])
        return found, safetensors_files.metadata(path).get(_SOURCE) or digests.hash_file(path)
    remedy = (
        f"run sprint-jax evaluate there with --weights={path} --save_weights=FILE.safetensors, and "
        f"give that file"
    )
    found = torch_files.read(path, remedy)
    found = {k: v for k, v in found.items() if np.issubdtype(v.dtype, np.floating)}
    for name, array in found.items():
        safetensors_files.check_finite(array, name, path)
    return found, digests.hash_file(path)


def save_inception(
    source: pathlib.Path | str, target: pathlib.Path | str, *, unpublished: bool = False
) -> None:
    """Write the weights of a .pth file as safetensors, by the same names, with its SHA-256.

    Needs PyTorch.
    """
    load_inception(source, unpublished=unpublished)  # refused here rather than where it is used
    found, digest = _read_inception(pathlib.Path(source))
    layers = tuple(f"{name}." for name in inception.layer_shapes())
    kept = {k: v for k, v in found.items() if k.startswith(layers) and v.dtype == np.float32}
    with files.whole(target) as partial:
        safetensors_files.write_file(partial, kept, metadata={_SOURCE: digest})


class CLIP:
    """Features of images and texts by a CLIP of transformers' layout.

    logit_scale: its logarithm, as stored.
    """

    def __init__(self, model: clip_lib.CLIP, params: Any, tokenizer: Any, *, batch: int):
        self._model, self._tokenizer = model, tokenizer
        self.logit_scale = float(params["logit_scale"])
        self._image = Batched(model.image_features, params, batch)
        self._text = Batched(model.text_features, params, batch)

    def images(self, images: Any) -> np.ndarray:
        """Return features float32 [N, P] of uint8 images [H, W, 3]."""
        return self._image(np.stack([clip_resize(image, self._model.size) for image in images]))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return features float32 [N, P] of texts, cut to the window with the end token kept."""
        return self._text(self.tokens(texts))

    def tokens(self, texts: Sequence[str]) -> np.ndarray:
        """Return tokens int32 [N, 77], padded after the end token; the first end token counts."""
        encoded = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self._model.length
        )
        return np.array(encoded["input_ids"], np.int32)


def clip_resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 [H, W, 3] to [size, size, 3] as CLIP does.

    The shorter side becomes `size` by PIL's bicubic; the middle is kept.
    """
    return crops.fit_short_side(image, size, Image.Resampling.BICUBIC)


def load_clip(path: pathlib.Path | str, *, batch: int) -> tuple[CLIP, str]:
    """Load a folder with transformers' CLIPModel and its tokenizer.

    Returns (extractor, SHA-256 of the weights' file, or over those of several).
    Raises UserError for a folder that lacks a part, or whose parts do not fit each other.
    """
    path = pathlib.Path(path)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} has no config.json: give the folder of a CLIP model "
            f"(openai/clip-vit-large-patch14)"
        )
    config = json_files.read_object(path / "config.json", "download the folder again")
    try:
        model = clip_model(config)
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / 'config.json'} does not describe a CLIP ({type(error).__name__}: {error})"
        ) from None
    found, wanted = safetensors_files.find(path, "model"), model.tensor_shapes()
    absent = sorted(wanted.keys() - found.keys())
    if absent:
        raise UserError(
            f"{path} lacks {len(absent)} tensors of a CLIP, first {absent[0]}: download it again"
        )
    arrays = {}
    for name, shape in wanted.items():
        if tuple(found[name].shape) != shape:
            raise UserError(
                f"{path} holds {name} with shape {tuple(found[name].shape)}, its config.json needs "
                f"{shape}"
            )
        arrays[name] = np.empty(shape, np.float32)
        safetensors_files.read(found[name], arrays[name])
    parts = [digests.hash_file(file) for file in sorted({t.file for t in found.values()})]
    digest = parts[0] if len(parts) == 1 else digests.hash_text("".join(parts))
    return CLIP(model, model.params_of(arrays), tokenizers.load(path), batch=batch), digest


_TOWER = configs.TRANSFORMERS | {
    "dropout": fields.ANY,
    "hidden_act": fields.only("quick_gelu", "gelu"),
    "hidden_size": fields.SIZE,
    "intermediate_size": fields.SIZE,
    "layer_norm_eps": fields.POSITIVE,
    "num_attention_heads": fields.SIZE,
    "num_hidden_layers": fields.LAYERS,
    "projection_dim": fields.SIZE.or_null(),  # that of the whole counts
}
_VISION = _TOWER | {
    "image_size": fields.SIZE,
    "model_type": fields.only("clip_vision_model"),
    "num_channels": fields.only(3),
    "patch_size": fields.SIZE,
}
_TEXT = _TOWER | {
    "eos_token_id": fields.Kind("a token's number", lambda v: type(v) is int and v >= 0),
    "max_position_embeddings": fields.SIZE,
    "model_type": fields.only("clip_text_model"),
    "vocab_size": fields.SIZE,
}
_CLIP = configs.TRANSFORMERS | {
    "logit_scale_init_value": fields.ANY,  # the file has the trained value
    "model_type": fields.only("clip"),
    "projection_dim": fields.SIZE,
    "text_config": fields.OBJECT,
    "text_config_dict": fields.OBJECT.or_null(),
    "vision_config": fields.OBJECT,
    "vision_config_dict": fields.OBJECT.or_null(),
}


def clip_model(config: Mapping[str, Any]) -> clip_lib.CLIP:
    """Describe the CLIP of transformers' config.json. Missing keys have transformers' defaults.

    Raises UserError for an unsupported field, and ValueError for values that do not fit each other.
    """
    fields.check(config, _CLIP, "the CLIP config")
    vision, text = _part(config, "vision_config", _VISION), _part(config, "text_config", _TEXT)
    tower = lambda c, width, inner, heads: clip_lib.Tower(
        width=c.get("hidden_size", width),
        layers=c.get("num_hidden_layers", 12),
        heads=c.get("num_attention_heads", heads),
        inner=c.get("intermediate_size", inner),
        eps=c.get("layer_norm_eps", 1e-5),
    )
    towers = tower(vision, 768, 3072, 12), tower(text, 512, 2048, 8)
    for each in towers:
        if each.width % each.heads:
            raise ValueError(f"hidden_size {each.width} is no multiple of its {each.heads} heads")
    activations = {c.get("hidden_act", "quick_gelu") for c in (vision, text)}
    if len(activations) != 1:
        raise ValueError(f"hidden_act {sorted(activations)}: both parts must have the same")
    end = text.get("eos_token_id", 49407)
    return clip_lib.CLIP(
        vision=towers[0],
        text=towers[1],
        size=vision.get("image_size", 224),
        patch=vision.get("patch_size", 32),
        vocabulary=text.get("vocab_size", 49408),
        length=text.get("max_position_embeddings", 77),
        features=config.get("projection_dim", 512),
        end=None if end == 2 else end,
        activation=activations.pop(),
    )


def _part(config: Mapping[str, Any], name: str, kinds: Mapping[str, fields.Kind]) -> dict[str, Any]:
    """Return the config of a part. Raises UserError where its older form says another value."""
    part, older = config[name], config.get(f"{name}_dict") or {}
    for given in (part, older):
        fields.check(given, kinds, f"the CLIP config: {name}")
    for field, value in older.items():
        if field in part and part[field] != value:
            raise UserError(
                f"the CLIP config has {name}.{field}={fields.shown(part[field])}, but "
                f"{fields.shown(value)} in {name}_dict"
            )
    return older | part


def hooked(found: Any, count: int, dimensions: int, name: str) -> np.ndarray:
    """Return what a hook gave for `count` images as float64, checked.

    dimensions: 1 for a number of each image, 2 for features [count, D]. name: of the hook. Raises
    UserError for anything else, and for values that are not finite.
    """
    wanted = "one finite number each" if dimensions == 1 else "features [N, D], finite"
    try:
        array = np.asarray(found)
        what = f"{array.dtype} {array.shape}"
        right = array.dtype.kind in "buif" and array.ndim == dimensions and array.size > 0
        array = array.astype(np.float64) if right else array
    except (TypeError, ValueError, RuntimeError):  # of ragged lists, and of tensors on a device
        what, right = type(found).__name__, False
    if right and len(array) == count and np.isfinite(array).all():
        return array
    if right and len(array) == count:
        what = "values that are not finite"
    raise UserError(f"--hook={name} gave {what} for {count} pictures: {wanted}")


def hook(name: str) -> Callable[..., Any]:
    """Import the user's function "module:function". Raises UserError where it cannot be found."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(f"--hook={name}: write it as module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except AttributeError:
        raise UserError(f"--hook={name}: {module} has no {function}") from None
    except Exception as error:  # the user's module may raise anything
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--hook={name}: cannot import {module} ({line}): it must be on the Python path"
        ) from None
    if not callable(found):
        raise UserError(f"--hook={name} is not a function")
    return found

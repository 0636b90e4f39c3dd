"""Training data: batches, held-out examples, and decoding latents to images.

Three kinds of data sets share one interface: `Shapes` draws the embedded data as they are needed,
`EncodedData` reads a folder that `sprint-jax encode` made, and `Prompts` reads a file of prompts
for objectives that need no images. `open_dataset` chooses.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from sprint_jax import build
from sprint_jax import config as config_lib
from sprint_jax.conditioning import sketches
from sprint_jax.data import batches, captions, encoded, prefetch, prompts_data, shapes_batches
from sprint_jax.data.order import Order
from sprint_jax.encoders import load as encoders
from sprint_jax.encoders.pixels import EmbeddedPixels, PixelCodec
from sprint_jax.encoders.text import EmbeddedText, TextEncoder
from sprint_jax.errors import UserError
from sprint_jax.objectives import rollouts
from sprint_jax.objectives.base import Batch, Frozen
from sprint_jax.sampling import loading, prompt_files
from sprint_jax.storage import digests
from sprint_jax.toy import freehand, shapes

# Real images behind the Fréchet distance come from indices far from those of the prompts.
_REFERENCE_START = 1_000_000
_SCRIBBLE_SIGMA = 0.5  # pixels: strokes of three pixels, for one-pixel lines of small images


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Heldout:
    """Examples that training never sees.

    captions: N texts.
    cond: conditions under the names of a network's `apply`: features "text" [N, L, D] and "mask"
      [N, L], with a ControlNet "control" [N, h, w, c] and "control_scale" [N], all 1.
    images: uint8 [N, H, W, 3]; None where the data are prompts alone.
    reference: real images for the Fréchet distance, uint8 [M, H, W, 3]; None as `images`.
    meanings: of the captions, for the checker of shapes; None for other data.
    sketches: what "control" shows, uint8 [N, H, W]; None without a ControlNet.
    edges: uint8 [N, H, W], reference edges for the agreement score: the sketches, or the edges of
      `images` for rough sketches.
    """

    captions: list[str]
    cond: dict[str, np.ndarray]
    images: np.ndarray | None
    reference: np.ndarray | None
    meanings: list[shapes.Caption] | None
    sketches: np.ndarray | None
    edges: np.ndarray | None


Say = Callable[[str], None]


class Dataset(Protocol):
    """What a run needs of its data.

    pixels, pixels_params: the codec of its latents and its parameters, None where there is none.
    frozen: features of the empty prompt, and the text encoder where batches hold token ids.
    identity: names the data, for checkpoints. sizes: (height, width) of its latents, more than one
    with buckets of aspect ratios.
    """

    pixels: PixelCodec | None
    pixels_params: Any
    frozen: Frozen
    identity: str
    sizes: list[tuple[int, int]]

    def batches(self, batch: int, start: int, stop: int, process: int, processes: int) -> Any:
        """Return a context and iterator of this process's rows of the batches start .. stop - 1."""
        ...

    def prepare(self, frozen: Frozen, batch: Batch) -> Batch:
        """Turn a batch as read into the batch that steps take. Traced."""
        ...

    def heldout(self, count: int, reference: int) -> Heldout:
        """Return `count` held-out examples and up to `reference` real images."""
        ...

    def freehand(self, count: int, reference: int) -> Heldout | None:
        """Return held-out examples with rough sketches; None where training has none."""
        ...


def abstract_batch(c: config_lib.Config, batch: int) -> dict:
    """Return the shapes of a global batch of the data as the steps take it, without any data."""
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    latent = f32(batch, *build.latent_shape(c))
    rows = {
        "latent": latent,
        "text": f32(batch, c.text.length, c.text.dim),
        "mask": f32(batch, c.text.length),
    }
    if captioned(c):
        rows["caption"] = jax.ShapeDtypeStruct((batch, captions.LENGTH), jnp.uint8)
    return rows | {"control": latent} if c.control.depth else rows


def captioned(c: config_lib.Config) -> bool:
    """Return whether batches carry captions: whether a phase that runs reads them."""
    return any(c.phases[name].objective.needs().captions for name in config_lib.active(c))


def abstract_phase_batch(c: config_lib.Config, phase: config_lib.Phase) -> dict:
    """Return `abstract_batch` of a phase, with stored rollouts where its objective reads them."""
    rows, settings = abstract_batch(c, phase.batch), phase.objective
    if not isinstance(settings, rollouts.RolloutTerm) or not settings.stored:
        return rows
    numbers = jax.ShapeDtypeStruct((phase.batch,), jnp.float32)
    nodes = (phase.batch, settings.route_steps + 1, *build.latent_shape(c))
    rows |= {"nodes": jax.ShapeDtypeStruct(nodes, jnp.float16), "w": numbers}
    return rows | {"control_scale": numbers} if c.control.depth else rows


def open_dataset(c: config_lib.Config, say: Say) -> Dataset:
    """Open the data set of a config. Raises UserError where it does not fit."""
    if c.data.prompts:
        return Prompts(c, say)
    return EncodedData(c, say) if c.data.encoded else Shapes(c)


class Abstract:
    """The shapes of a data set without data, for programs that are compiled and not run."""

    def __init__(self, c: config_lib.Config):
        f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        self.frozen = Frozen(
            null_text=f32(1, c.text.length, c.text.dim), null_mask=f32(1, c.text.length)
        )
        self.batches, self.identity = None, ""
        self.pixels: PixelCodec | None = None
        self.pixels_params: Any = {}
        if captioned(c) and c.text.vocabulary != "gemma":
            # Images that are judged are decoded in the step.
            self.pixels = EmbeddedPixels(build.codec(c))

    def prepare(self, frozen: Frozen, batch: Batch) -> Batch:
        """Return the batch as it is."""
        return batch


class Shapes:
    """Drawn images: example i of the training split is a function of (seed, i)."""

    def __init__(self, c: config_lib.Config):
        self._c, self._codec = c, build.codec(c)
        encoder = build.text_encoder(c)
        assert encoder is not None, "the config of drawn images has an embedded encoder"
        self._encoder = encoder
        self.pixels: PixelCodec | None = EmbeddedPixels(self._codec)
        self.pixels_params: Any = {}
        text, mask = self._encoder.encode([""])
        self.sizes = [build.latent_shape(c)[:2]]
        self.identity = "drawn shapes"
        if c.control.depth and c.control.freehand:
            self.identity += f", {c.control.freehand} of them by rough sketches"
        self.frozen = Frozen(null_text=text, null_mask=mask)

    def batches(self, batch: int, start: int, stop: int, process: int, processes: int) -> Any:
        """Return a context and iterator of this process's rows of the batches start .. stop - 1."""
        make = lambda step: shapes_batches.make_batch(
            step,
            seed=self._c.data.seed,
            batch=batch,
            size=self._c.data.size,
            codec=self._codec,
            text_encoder=self._encoder,
            condition=_condition(self._c) if self._c.control.depth else None,
            freehand=self._c.control.freehand,
            captions=captioned(self._c),
            process=process,
            processes=processes,
        )
        return prefetch.Prefetch(make, start, stop)

    def prepare(self, frozen: Frozen, batch: Batch) -> Batch:
        """Return the batch as it is."""
        return batch

    def heldout(self, count: int, reference: int) -> Heldout:
        """Draw held-out examples."""
        return self._heldout(count, reference, rough=False)

    def freehand(self, count: int, reference: int) -> Heldout | None:
        """Draw held-out examples with objects anywhere and rough sketches; None without these."""
        return (
            self._heldout(count, reference, rough=True)
            if self._c.control.depth and self._c.control.freehand
            else None
        )

    def _heldout(self, count, reference, rough):
        d, split = self._c.data, self._c.evaluation.split
        draw = lambda first, n: [
            shapes.example(d.eval_seed, first + i, size=d.size, split=split, anywhere=rough)
            for i in range(n)
        ]
        examples = draw(0, count)
        text, mask = self._encoder.encode([e.text for e in examples])
        cond, lines, edges = {"text": text, "mask": mask}, None, None
        images = np.stack([e.image for e in examples])
        if self._c.control.depth:
            lines = edges = _condition(self._c)(images)[..., 0]
            if rough:
                drawn = [
                    freehand.sketch(d.eval_seed, i, e.objects, size=d.size, split=split)
                    for i, e in enumerate(examples)
                ]
                lines, edges = np.stack(drawn), sketches.gradient_edges(images)
            shown = self._codec.encode(sketches.to_rgb(lines))
            cond |= {"control": shown, "control_scale": np.ones(count, np.float32)}
        return Heldout(
            captions=[e.text for e in examples],
            cond=cond,
            images=images,
            reference=np.stack([e.image for e in draw(_REFERENCE_START, reference)]),
            meanings=[e.caption for e in examples],
            sketches=lines,
            edges=edges,
        )


def _condition(c: config_lib.Config) -> Callable[[np.ndarray], np.ndarray]:
    """Return images -> images of the ControlNet's condition."""
    if c.control.condition == "edges":
        return lambda images: sketches.to_rgb(sketches.gradient_edges(images))
    return lambda images: sketches.to_rgb(
        sketches.scribble(sketches.gradient_edges(images), thickness=1, sigma=_SCRIBBLE_SIGMA)
    )


class EncodedData:
    """A folder of encoded images and captions."""

    def __init__(self, c: config_lib.Config, say: Say):
        self._c, self._say = c, say
        self._train = encoded.Encoded(c.data.encoded, "train")
        manifest = self._train.manifest
        _check_manifest(c, manifest)
        self._tokens = manifest["text"] == "tokens"
        self.sizes = self._train.buckets
        self.identity = (
            f"{manifest['counts']['train']} examples of source {manifest['source']} encoded by "
            f"{manifest['model']}"
        )
        if c.control.depth:
            self.identity += f", with {manifest['condition']}"
        self._text: Any = None
        self.pixels: PixelCodec | None = None
        self.pixels_params: Any = None
        self.frozen = self._null()
        if c.data.model:
            # Never unrolled: sharding knows stacked layers.
            dtype = loading.default_dtype()
            found = encoders.load(c.data.model, dtype=dtype, pixels_dtype=dtype, say=say)
            self._text, self.pixels = found.text, found.pixels
            self.pixels_params = found.params["pixels"]
            if self._tokens:
                self.frozen = self.frozen.replace(text_encoder=found.params["text"])
        elif c.text.vocabulary != "gemma":
            self.pixels, _, identity = embedded(c)
            self.pixels_params = {}
            if manifest["model"] != identity:
                raise UserError(
                    f"{c.data.encoded} was encoded by {manifest['model']}, the config has "
                    f"{identity}: encode again with this config, or use the one it was made with"
                )
        if self.pixels is not None:
            # Checked before training, not after it.
            self._fitting(encoded.Encoded(c.data.encoded, "heldout"), c.evaluation.prompts)

    def _null(self):
        path = pathlib.Path(self._c.data.encoded) / encoded.NULL
        if not path.is_file():
            raise UserError(
                f"{path} is missing: run sprint-jax encode on the folder again, it adds what lacks"
            )
        found = safetensors.numpy.load_file(path)
        return Frozen(
            null_text=found["text"].astype(np.float32)[None],
            null_mask=found["mask"].astype(np.float32)[None],
        )

    def batches(self, batch: int, start: int, stop: int, process: int, processes: int) -> Any:
        """Return a context and iterator as `Shapes.batches` does.

        With token ids instead of features, "tokens" takes the place of "text".
        A condition that the folder holds goes along only where there is a ControlNet.
        """
        d = self._c.data
        return batches.iterate(
            self._train,
            seed=d.seed,
            batch=batch,
            start=start,
            stop=stop,
            process_index=process,
            process_count=processes,
            workers=d.workers,
            max_bad=d.max_bad,
            control=self._c.control.depth > 0,
            say=self._say,
        )

    def prepare(self, frozen: Frozen, batch: Batch) -> Batch:
        """Encode token ids inside the compiled step; return other batches as they are."""
        return _encoded(self._text, frozen, batch)

    def heldout(self, count: int, reference: int) -> Heldout:
        """Return held-out examples at the config's size; images are decoded latents."""
        data = encoded.Encoded(self._c.data.encoded, "heldout")
        fitting = self._fitting(data, count)
        rows = self._read(data, fitting, count, max(count, min(reference, len(fitting))))
        stacked = batches.stack(data.manifest, rows)
        images = self._decode(stacked["latent"])
        ready = jax.jit(self.prepare)(self.frozen, {k: v[:count] for k, v in stacked.items()})
        captions = [row["caption"].tobytes().decode("utf-8", "replace") for row in rows[:count]]
        cond, edges = {name: np.asarray(ready[name]) for name in ("text", "mask")}, None
        if self._c.control.depth:
            cond |= {
                "control": stacked["control"][:count],
                "control_scale": np.ones(count, np.float32),
            }
            edges = self._decode(stacked["control"][:count]).max(-1)
        return Heldout(
            captions=captions,
            cond=cond,
            images=images[:count],
            reference=images,
            meanings=None,
            sketches=edges,
            edges=edges,
        )

    def _fitting(self, data, count):
        """Return the numbers of the examples of the config's size.

        Raises UserError where there are fewer than count.
        """
        size = build.latent_shape(self._c)[:2]
        fitting = [i for i in range(len(data)) if data.buckets[data.bucket_of[i]] == size]
        if len(fitting) < count:
            raise UserError(
                f"{self._c.data.encoded} holds out {len(fitting)} examples of {size[0]}x{size[1]} "
                f"latents and config.evaluation.prompts is {count}: lower it, or encode with a "
                "larger --heldout"
            )
        return fitting

    def _read(self, data, numbers, least, wanted):
        """Read the first records of these numbers that can be used.

        Raises UserError for fewer than least.
        """
        rows, bad = [], []
        for i in numbers:
            if len(rows) == wanted:
                break
            try:
                rows.append(data.read(i))
            except encoded.BadRecord as error:
                bad.append(f"{i} ({error})")
        if bad:
            self._say(
                f"{self._c.data.encoded}: {len(bad)} held-out examples cannot be used, first "
                f"{bad[0]}"
            )
        if len(rows) < least:
            raise UserError(
                f"{self._c.data.encoded}: {len(rows)} held-out examples can be used and "
                f"config.evaluation.prompts is {least}: encode again, or with a larger --heldout"
            )
        return rows

    def freehand(self, count: int, reference: int) -> Heldout | None:
        """Return None: the objects of these images are unknown."""
        return None

    @functools.cached_property
    def _decoder(self) -> Any:
        assert self.pixels is not None, "checked when the data set was opened"
        return jax.jit(self.pixels.decode)

    def _decode(self, latents: np.ndarray) -> np.ndarray:
        part = 1 if self._c.data.model else 32
        padded = np.concatenate([latents, np.repeat(latents[-1:], -len(latents) % part, 0)])
        made = [
            np.asarray(self._decoder(self.pixels_params, padded[i : i + part]))
            for i in range(0, len(padded), part)
        ]
        return np.concatenate(made)[: len(latents)]


class Prompts:
    """Prompts of a file, for objectives that roll a teacher out and need no images.

    Latents of a batch are zeros, which say the size alone.
    """

    def __init__(self, c: config_lib.Config, say: Say):
        self._c, path = c, pathlib.Path(c.data.prompts)
        found = prompt_files.read(path, "config.data.prompts")
        self._captions = [prompt.text for prompt in found]
        self.sizes = [build.latent_shape(c)[:2]]
        listed = digests.hash_text("\n".join(self._captions))[:16]
        self.identity = f"{len(self._captions)} prompts, {listed}"
        self.pixels_params: Any = {}
        if c.text.vocabulary == "gemma":
            dtype = loading.default_dtype()
            found = encoders.load(c.data.model, dtype=dtype, pixels_dtype=dtype, say=say)
            self._text: TextEncoder = found.text
            self.pixels: PixelCodec | None = found.pixels
            self.pixels_params = found.params["pixels"]
            params: Any = found.params["text"]
        else:
            self.pixels, self._text, _ = embedded(c)
            params = None
        text, mask = prompts_data.null_features(self._text, params)
        self.frozen = Frozen(null_text=text, null_mask=mask, text_encoder=params)
        prompts_data.check(self._text, self._captions, path)
        if len(self._captions) < c.evaluation.prompts:
            raise UserError(
                f"config.data.prompts={path} has {len(self._captions)} prompts and "
                f"config.evaluation.prompts is {c.evaluation.prompts}: lower it, or give more"
            )

    def batches(self, batch: int, start: int, stop: int, process: int, processes: int) -> Any:
        """Return a context and iterator of this process's rows of the batches start .. stop - 1:
        token ids, or features of the embedded encoders, and their mask.
        """
        order = Order(len(self._captions), self._c.data.seed)

        def make(step: int) -> dict[str, np.ndarray]:
            rows = order.rows(step, batch, process, processes)
            texts = [self._captions[i] for i in rows]
            found = prompts_data.arrays(self._text, texts)
            return found | {"caption": captions.to_rows(texts)} if captioned(self._c) else found

        return prefetch.Prefetch(make, start, stop)

    def prepare(self, frozen: Frozen, batch: Batch) -> Batch:
        """Encode token ids inside the compiled step, and say the size of latents by zeros."""
        shape = (len(batch["mask"]), *build.latent_shape(self._c))
        kept = {name: batch[name] for name in ("caption",) if name in batch}
        latent = jnp.zeros(shape, jnp.float32)
        return {"latent": latent, **_encoded(self._text, frozen, batch), **kept}

    def heldout(self, count: int, reference: int) -> Heldout:
        """Return the first prompts. They are trained on as well: there are no images to learn."""
        captions = self._captions[:count]
        rows = prompts_data.arrays(self._text, captions)
        ready = jax.jit(self.prepare)(self.frozen, rows)
        meanings = None
        if self._c.text.vocabulary == "shapes":
            with contextlib.suppress(ValueError):
                meanings = [shapes.parse(caption) for caption in captions]
        return Heldout(
            captions=captions,
            cond={name: np.asarray(ready[name]) for name in ("text", "mask")},
            images=None,
            reference=None,
            meanings=meanings,
            sketches=None,
            edges=None,
        )

    def freehand(self, count: int, reference: int) -> Heldout | None:
        """Return None: there are no sketches."""
        return None


def _encoded(text: Any, frozen: Frozen, batch: Batch) -> Batch:
    """Replace token ids by features of the text encoder; return other batches as they are."""
    if "tokens" not in batch:
        return batch
    arrays = {"tokens": batch["tokens"], "mask": batch["mask"]}
    features, mask = text.features(frozen.text_encoder, arrays)
    kept = {name: a for name, a in batch.items() if name not in arrays}
    return kept | {"text": features.astype(jnp.float32), "mask": mask}


def _check_manifest(c, manifest):
    wanted = {"channels": c.codec.channels, "factor": c.codec.block}
    if manifest["text"] == "features":
        wanted |= {"text_dim": c.text.dim, "text_length": c.text.length}
    for name, value in wanted.items():
        if manifest[name] != value:
            raise UserError(
                f"{c.data.encoded} has {name} {manifest[name]}, the config {value}: use the config "
                f"that it was encoded for"
            )
    _check_condition(c, manifest["condition"])
    if manifest["text"] == "tokens" and not c.data.model:
        raise UserError(
            f"{c.data.encoded} holds token ids: name the folder with the text encoder in "
            f"config.data.model"
        )


def _check_condition(c, held):
    """Raise UserError where a folder with this condition cannot train the config's ControlNet."""
    wanted = c.control.condition
    if not c.control.depth or held == wanted:
        return
    use = "" if held == encoded.NO_CONDITION else f", or use --config.control.condition={held}"
    raise UserError(
        f"{c.data.encoded} was encoded with condition {held}, config.control.condition is "
        f"{wanted}: encode into another folder with --condition={wanted}{use}"
    )


def embedded(c: config_lib.Config) -> tuple[PixelCodec, TextEncoder, str]:
    """Build (pixels, text, identity) of the embedded encoders of a config."""
    codec, encoder = build.codec(c), build.text_encoder(c)
    if encoder is None:
        raise UserError(
            "config.text.vocabulary is gemma: give --encoder the diffusers or converted folder "
            "that holds it"
        )
    settings = dataclasses.asdict(c.codec) | {"weights": ""}, dataclasses.asdict(c.text)
    content = build.asset(c.codec.weights).read_bytes() if c.codec.weights else b""
    digest = digests.hash_bytes(repr(settings).encode() + content)
    return (
        EmbeddedPixels(codec),
        EmbeddedText(encoder),
        f"{c.text.vocabulary} words, {digest[:16]}",
    )

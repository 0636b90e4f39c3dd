"""Scores of images by a checker or a network, with the protocol that they were measured by."""

import dataclasses
import functools
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from sprint_jax.errors import UserError
from sprint_jax.evaluation import clip_score, extractors, fid, image_sets
from sprint_jax.evaluation.images import Images, captions
from sprint_jax.evaluation.options import Options
from sprint_jax.storage import crops
from sprint_jax.toy import checker

Protocol = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a report holds.

    values: {name: number, or {part: number}}; empty if only a reference was asked for.
    protocol: what decides about them. details: of single images, perhaps.
    """

    values: dict[str, Any]
    protocol: Protocol
    details: dict[str, Any] | None = None


def measure(options: Options, images: Images) -> Scores:
    """Score images by the suite's checker or network. Raises UserError for what it cannot read."""
    sizes, formats = image_sets.inspected(images.paths)
    shown = [f"{h} x {w}" for h, w in sorted(sizes)]
    common = {"pictures": len(images.paths), "sizes": shown, "format": formats}
    if options.suite == "shapes":
        image_sets.one_size(sizes, "they are not of one model")
        values, protocol = _shapes(images), {"checker": "sprint_jax.toy.checker"}
    elif options.suite == "fid":
        values, protocol = _fid(options, images.paths, sizes, formats)
    elif options.suite == "clip":
        values, protocol = _clip(options, images)
    else:
        values, protocol = _imagereward(options, images), {"hook": options.hook}
    return Scores(values, common | protocol)


def _texts(images: Images) -> list[str]:
    assert images.texts is not None
    return images.texts


def _shapes(images: Images) -> dict[str, Any]:
    found = captions(_texts(images))
    read = (
        image_sets.read(path)
        for path in tqdm.tqdm(images.paths, unit="image", desc="read", delay=5)
    )
    overall, tasks = checker.score(read, found)
    return {"overall": overall, "tasks": tasks}


def _parts(
    options: Options, paths: Sequence[pathlib.Path], name: str
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield (where it begins, images) of a part at a time, with a bar."""
    size = 4 * options.scoring_batch
    with tqdm.tqdm(total=len(paths), unit="image", desc=name, delay=5) as bar:
        for start in range(0, len(paths), size):
            part = paths[start : start + size]
            yield start, [image_sets.read(path) for path in part]
            bar.update(len(part))


def _fid(
    options: Options, paths: Sequence[pathlib.Path], sizes: Any, formats: Sequence[str]
) -> tuple[dict[str, float], Protocol]:
    extract, protocol = _features(options)
    reference, described = _reference(options, extract, protocol)
    gaussian = _gaussian(options, extract, paths, sizes, "features")
    if options.save_reference:
        fid.save(options.save_reference, gaussian, protocol | {"file_format": ",".join(formats)})
        print(f"statistics of {gaussian.count} images in {options.save_reference}")
    if reference is None:
        return {}, protocol
    if len(gaussian.mean) > 500:  # minutes on a slow machine, and no way to watch it
        print(
            f"the matrix root of {len(gaussian.mean)} features: a minute or two",
            file=sys.stderr,
            flush=True,
        )
    published = protocol["weights_sha256"] is not None and not options.unpublished_weights
    name = "fid" if published else "frechet_distance_not_fid"
    return {name: fid.distance(gaussian, reference)}, protocol | described


def _features(options: Options) -> tuple[Callable[..., Any], Protocol]:
    """Return (images -> features, the protocol of these features)."""
    if options.hook:
        extract, digest = _hooked(options.hook), None
        name = f"hook {options.hook}"
    else:
        params, digest = extractors.load_inception(
            options.weights or "", unpublished=options.unpublished_weights
        )
        extract = extractors.Inception(
            params, resize=options.fid_resize, batch=options.scoring_batch
        )
        published = digest is not None and not options.unpublished_weights
        name = "FID Inception, 2048 pooled" if published else "Inception of other weights"
    return extract, {
        "features": name,
        "weights_sha256": digest,
        "resize": None if options.hook else options.fid_resize,
        "picture_size": options.picture_size,
    }


def _hooked(name: str) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Return the function of a hook that makes features [N, D], with its results checked."""
    function, widths = extractors.hook(name), set()

    def extract(images: list[np.ndarray]) -> np.ndarray:
        found = extractors.hooked(function(images), len(images), 2, name)
        widths.add(found.shape[1])
        if len(widths) > 1:
            raise UserError(
                f"--hook={name} gave features of {' and of '.join(map(str, sorted(widths)))} "
                "numbers: all need the same"
            )
        return found

    return extract


def _gaussian(
    options: Options,
    extract: Callable[..., Any],
    paths: Sequence[pathlib.Path],
    sizes: Any,
    name: str,
) -> fid.Gaussian:
    """Return the statistics of images, read and put through the network part by part."""
    side = options.picture_size
    if side is None:
        image_sets.one_size(sizes, "say --picture_size to bring them to one")
    fit = (
        (lambda image: image)
        if side is None
        else functools.partial(crops.fit_short_side, size=side)
    )
    parts = (
        fid.Moments.of(extract([fit(image) for image in images]))
        for _, images in _parts(options, paths, name)
    )
    gaussian = fid.merge(parts).gaussian()
    if gaussian.count <= len(gaussian.mean):
        warnings.warn(
            f"{gaussian.count} pictures give a singular covariance of {len(gaussian.mean)} "
            f"features (it takes {len(gaussian.mean) + 1}): the distance is far too large and "
            "compares only with itself",
            stacklevel=1,
        )
    return gaussian


def _reference(
    options: Options, extract: Callable[..., Any], protocol: Protocol
) -> tuple[fid.Gaussian | None, Protocol]:
    """Return (statistics of --reference, what the report says about it); (None, {}) without one.

    Raises UserError for statistics that were made with another protocol.
    """
    if not options.reference:
        return None, {}
    path = pathlib.Path(options.reference)
    if path.is_dir():
        paths = image_sets.found(path)
        sizes, formats = image_sets.inspected(paths)
        gaussian = _gaussian(options, extract, paths, sizes, "reference")
        return gaussian, {
            "reference": str(path),
            "reference_pictures": gaussian.count,
            "reference_format": formats,
        }
    gaussian, stored = fid.load(path)
    for name, value in protocol.items():
        ours = "" if value is None else str(value)
        if name in stored and stored[name] != ours:
            raise UserError(
                f"{path} was made with {name}={stored[name] or None}, now {value}: use the same, "
                "or other statistics"
            )
    described: Protocol = {
        "reference": str(path),
        "reference_pictures": gaussian.count or "not in the file",
        "reference_format": stored.get("file_format", "not in the file"),
    }
    if unsaid := [name for name in protocol if name not in stored]:
        described["not in the reference's file"] = unsaid
    return gaussian, described


def _clip(options: Options, images: Images) -> tuple[dict[str, float], Protocol]:
    clip, digest = extractors.load_clip(options.weights or "", batch=options.scoring_batch)
    texts, found = _texts(images), []
    for start, part in _parts(options, images.paths, "clip"):
        features = clip.images(part), clip.texts(texts[start : start + len(part)])
        found.append(clip_score.cosines(*features))
    cosines = np.concatenate(found)
    scores = {
        "clip_score": clip_score.sana(cosines, clip.logit_scale),
        "clip_score_torchmetrics": clip_score.torchmetrics(cosines),
    }
    return scores, {
        "weights": options.weights,
        "weights_sha256": digest,
        "scale": float(np.exp(clip.logit_scale)),
        "text": "cut to the window, end token kept",
    }


def _imagereward(options: Options, images: Images) -> dict[str, float]:
    assert options.hook is not None
    score, texts, found = extractors.hook(options.hook), _texts(images), []
    for start, part in _parts(options, images.paths, "score"):
        given = score(texts[start : start + len(part)], part)
        found.append(extractors.hooked(given, len(part), 1, options.hook))
    return {"imagereward": float(np.concatenate(found).mean())}

"""Training batches of `shapes`. The batch of a step is a pure function of (seed, step)."""

from collections.abc import Callable

import numpy as np

from sprint_jax.conditioning import sketches
from sprint_jax.data import captions as captions_data
from sprint_jax.data.protocols import Batch, CaptionEncoder, ImageCodec
from sprint_jax.toy import freehand as freehand_lib
from sprint_jax.toy import shapes


def make_batch(
    step: int,
    *,
    seed: int,
    batch: int,
    size: int,
    codec: ImageCodec,
    text_encoder: CaptionEncoder,
    condition: Callable[[np.ndarray], np.ndarray] | None = None,
    freehand: float = 0.0,
    captions: bool = False,
    process: int = 0,
    processes: int = 1,
) -> Batch:
    """Return one process's rows of the global batch of a step, float32.

    Args:
      step: counted from 0.
      seed: names the data set.
      batch: number of examples in the global batch, a multiple of `processes`.
      size: side of the images, in pixels.
      codec: encodes images as latents.
      text_encoder: encodes captions as features.
      condition: uint8 [b, H, W, 3] -> condition images of the same shape. None for no ControlNet.
      freehand: probability that an example places its objects anywhere and is shown by a rough
        sketch. It has no effect without a condition.
      captions: add "caption", uint8 [b, bytes].
      process, processes: index and number of the processes that share the batch.

    Returns:
      {"latent" [b, h, w, c], "text" [b, L, D], "mask" [b, L]}, and with a condition
      "control" [b, h, w, c], where b = batch / processes.
    """
    share = batch // processes
    first = step * batch + process * share
    indices = range(first, first + share)
    rough = [condition is not None and freehand_lib.is_rough(seed, i, freehand) for i in indices]
    examples = [
        shapes.example(seed, i, size=size, anywhere=r) for i, r in zip(indices, rough, strict=True)
    ]
    text, mask = text_encoder.encode([e.text for e in examples])
    images = np.stack([e.image for e in examples])
    rows = {"latent": codec.encode(images), "text": text, "mask": mask}
    if captions:
        rows["caption"] = captions_data.to_rows([e.text for e in examples])
    if condition is None:
        return rows
    shown = condition(images)
    for row in np.flatnonzero(rough):
        drawn = freehand_lib.sketch(
            seed, indices[row], examples[row].objects, size=size, split="train"
        )
        shown[row] = sketches.to_rgb(drawn)
    return rows | {"control": codec.encode(shown)}

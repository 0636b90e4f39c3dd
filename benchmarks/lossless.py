"""Measure how lossless the TrigFlow conversion is (paper Table 1, by distance instead of FID).

    python -m benchmarks.lossless [--count=256] [--steps=50]

Samples the shipped teacher by flow Euler and by TrigFlow rotation from the same noise. Compares the
Fréchet distance between the two sets with the distance of either to images of pure noise. Flow
Euler runs twice: at the times that correspond to the evenly spaced angles, where both samplers take
the same steps in other coordinates, and at its own evenly spaced times (Table 1).
"""

import pathlib
from typing import Any

import jax
import numpy as np

from benchmarks.harness import options as options_lib
from sprint_jax import build, config
from sprint_jax.diffusion import samplers
from sprint_jax.runtime import cards
from sprint_jax.sampling import programs
from sprint_jax.storage import weights
from sprint_jax.toy import frechet
from sprint_jax.training import datasets

ROOT = pathlib.Path(__file__).parent.parent


def main() -> None:
    """Sample and print the distances."""
    parser = options_lib.parser(__doc__)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    c = config.parse(cards.load("sprint"))
    data: Any = datasets.Shapes(c)
    model, shape = build.teacher(c), build.latent_shape(c)
    path = ROOT / "sprint_jax/assets/shapes_teacher.safetensors"
    params = jax.device_put(weights.load(path, weights.abstract(model)))
    prompts = data.heldout(options.count, 1)
    null = {"text": data.frozen.null_text, "mask": data.frozen.null_mask}
    angles = samplers.trig_times(options.steps)
    matched = (np.sin(angles) / (np.sin(angles) + np.cos(angles))).astype(np.float32)
    paths = {
        "flow_matched": ("flow", matched),
        "flow_even": ("flow", samplers.flow_times(options.steps)),
        "trigflow": ("trigflow", angles),
    }
    images = {}
    for name, (kind, times) in paths.items():
        sampler = programs.teacher_sampler(model, data.pixels, shape, times, sampler=kind)
        images[name] = programs.run(
            sampler,
            {"transformer": params, "pixels": {}},
            null,
            prompts.cond,
            guidance=c.evaluation.teacher_guidance,
            seed=c.data.eval_seed,
            batch=64,
            say=lambda n, name=name: print(f"{name}: {n} of {options.count}", flush=True),
        )
    noise = jax.random.normal(jax.random.key(0), (options.count, *shape))
    images["noise"] = np.asarray(data.pixels.decode({}, noise))
    moments = {k: frechet.moments(frechet.features(v)) for k, v in images.items()}
    to_noise = min(frechet.distance(moments[name], moments["noise"]) for name in paths)
    print(
        f"{options.steps} steps, {options.count} images; Fréchet distance to noise {to_noise:.4f}"
    )
    for name in ("flow_matched", "flow_even"):
        between = frechet.distance(moments[name], moments["trigflow"])
        pixels = np.abs(images[name].astype(int) - images["trigflow"]).mean()
        print(
            f"{name:12} to trigflow: Fréchet {between:.2e} ({100 * between / to_noise:.2g} % of "
            f"that), mean pixel difference {pixels:.2g} of 255"
        )


if __name__ == "__main__":
    main()

"""How lossless is the TrigFlow conversion in practice? (paper Table 1, by distance instead of FID)

    python benchmarks/lossless.py [--count=256] [--steps=50]

Samples the shipped teacher by flow Euler and by TrigFlow rotation from the same noise, and compares the
Fréchet distance between the two sets with the distance of either to pictures of pure noise.
"""

import argparse
import json
import pathlib
import runpy

import jax
import numpy as np

from sprint_jax import build, config, generation, weights
from sprint_jax.diffusion import samplers
from sprint_jax.evaluation import frechet
from sprint_jax.evaluation.evaluate import heldout

ROOT = pathlib.Path(__file__).parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    c = config.parse(runpy.run_path(str(ROOT / "configs/sprint.py"))["get_config"]())
    model, codec, shape = build.teacher(c), build.codec(c), build.latent_shape(c)
    path = ROOT / "sprint_jax/assets/shapes_teacher.safetensors"
    params = jax.device_put(weights.load(path, jax.eval_shape(model.init, jax.random.key(0))))
    prompts = heldout(c.data.eval_seed, options.count, c.data.size).texts
    # The same nodes on both roads: flow times are the images of evenly spaced angles.
    angles = samplers.trig_times(options.steps)
    flow_nodes = np.sin(angles) / (np.sin(angles) + np.cos(angles))
    made = {}
    for name, times in (("flow", flow_nodes.astype(np.float32)), ("trigflow", angles)):
        sampler = generation.teacher_sampler(model, codec, shape, times, sampler=name)
        made[name] = generation.run(
            sampler, params, build.text_encoder(c), prompts, guidance=c.evaluation.teacher_guidance,
            seed=c.data.eval_seed, batch=64, say=lambda n, name=name: print(f"{name}: {n} of {options.count}", flush=True),
        )  # fmt: skip
    noise = jax.random.normal(jax.random.key(0), (options.count, *shape))
    made["noise"] = np.asarray(codec.decode(noise))
    moments = {k: frechet.moments(frechet.features(v)) for k, v in made.items()}
    between = frechet.distance(moments["flow"], moments["trigflow"])
    to_noise = min(frechet.distance(moments[k], moments["noise"]) for k in ("flow", "trigflow"))
    pixels = np.abs(made["flow"].astype(int) - made["trigflow"]).mean()
    print(json.dumps({
        "steps": options.steps, "count": options.count, "frechet_flow_trigflow": between,
        "frechet_to_noise": to_noise, "share": between / to_noise, "mean_pixel_difference": pixels,
    }))  # fmt: skip


if __name__ == "__main__":
    main()

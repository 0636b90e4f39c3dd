"""Measure how far a student is from the end of its teacher's ODE, which sCM alone should reduce.

    python -m benchmarks.ode_distance RUN_DIR [RUN_DIR ...] [--count=128] [--steps=24]

Held-out images are noised to some angles t. From there it solves the guided teacher's PF-ODE to 0
(Heun, --steps even steps) and compares the student's f(x_t, t), Eq. 4, with its end. It prints

  - the mean squared distance over the variance of the data (1 is as far as the mean image);
  - the variance of f over that of the data, 1 for images with the contrast of real ones;
  - the share of captions that are entirely right;
  - how far the student's embedding of t has moved from the teacher's, over its size, and the share
    of that along the weights of the log-variance head.

All runs must have the same teacher.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import options as options_lib
from sprint_jax import build, config
from sprint_jax.diffusion import trigflow
from sprint_jax.evaluation.heldout import Evaluator
from sprint_jax.objectives import views
from sprint_jax.runtime import cli
from sprint_jax.sampling import loading
from sprint_jax.training import datasets, stages

ANGLES = (0.3, 0.6, 0.9, 1.2, 1.4, 1.5, trigflow.T_MAX)
SIGMA_D = trigflow.SIGMA_D


def main() -> None:
    """Solve the ODE and print the table of each run."""
    parser = options_lib.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    c = _common_config(options.runs)
    data: Any = datasets.open_dataset(c, print)
    phase: Any = c.phases[config.active(c)[-1]]
    n = options.count
    nets = stages.networks(c, phase)
    teacher = build.teacher_weights(c.teacher.pretrained, nets.teacher)
    frozen = data.frozen.replace(teacher=teacher)
    heldout = data.heldout(n, 64)
    evaluator = Evaluator(heldout)
    cond, w = jax.tree.map(jnp.asarray, heldout.cond), jnp.full((n,), c.evaluation.student_guidance)
    velocity = views.teacher_velocity(nets, frozen, cond, w, phase.objective.uncond_mask)
    x0 = SIGMA_D * jnp.asarray(data.pixels.encode({}, heldout.images))
    z = SIGMA_D * jax.random.normal(jax.random.key(c.data.eval_seed), x0.shape)
    states = [trigflow.interpolate(x0, z, jnp.full((n,), t)) for t in ANGLES]
    solve = jax.jit(functools.partial(heun, velocity, steps=options.steps))
    ends = []
    for t, xt in zip(ANGLES, states, strict=True):
        ends.append(solve(xt, t))
        print(f"ODE from t = {t:.3f} solved", file=sys.stderr, flush=True)
    spread = jnp.var(x0)
    right = lambda x: evaluator(np.asarray(data.pixels.decode({}, x / SIGMA_D)))["score"]

    def report(name, f):
        found = [f(xt, jnp.full((n,), t)) for t, xt in zip(ANGLES, states, strict=True)]
        errors = (jnp.mean(jnp.square(x - end)) for x, end in zip(found, ends, strict=True))
        _line(f"{name}: distance", [error / spread for error in errors], ".4f")
        _line("variance", [jnp.var(x) / spread for x in found], ".3f")
        _line("right", [right(x) for x in found], ".1%")

    _line("t", ANGLES, ".3f")
    _line("ODE's end: right", [right(x) for x in ends], ".1%")
    one_step = jax.jit(lambda xt, t: trigflow.denoise(velocity(xt, t) / SIGMA_D, xt, t))
    report("teacher, 1 step", one_step)

    @jax.jit
    def denoise(params, xt, t):
        F = views.student_F(nets.trained, params, cond, w)
        return trigflow.denoise(F(xt / SIGMA_D, t)[0], xt, t)

    for path in options.runs:
        params = loading.read_student(path)[1]
        report(str(path), functools.partial(denoise, params))
        moved, along = embedding(nets, frozen.teacher, params, w[0])
        _line("embedding moved", moved, ".2f")
        _line("along the head", along, ".0%")


def _common_config(runs: Sequence[pathlib.Path]) -> config.Config:
    """Return the config of the first run, or exit if the runs have different teachers or models."""
    configs = [loading.read_config(path) for path in runs]
    first = configs[0]
    for path, c in zip(runs, configs, strict=True):
        same = (
            c.teacher.pretrained == first.teacher.pretrained != ""
            and dataclasses.replace(c.model, unroll=first.model.unroll) == first.model
        )
        if c.control.depth or not same:
            sys.exit(
                f"{path} is not a text-to-image run from a given teacher "
                f"(config.teacher.pretrained) with the model of {runs[0]}: give such runs"
            )
    return first


def heun(velocity: Callable, xt: jax.Array, t: float, *, steps: int) -> jax.Array:
    """Solve dx/dt = velocity(x, t) from xt [B, ...] at the angle t to 0, in even Heun steps."""
    times, n = t * jnp.linspace(1, 0, steps + 1), len(xt)

    def step(x, ab):
        a, b = ab
        first = velocity(x, jnp.full((n,), a))
        second = velocity(x + (b - a) * first, jnp.full((n,), b))
        return x + (b - a) * (first + second) / 2, None

    return jax.lax.scan(step, xt, (times[:-1], times[1:]))[0]


def embedding(nets: Any, teacher: Any, student: Any, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compare the student's and the teacher's embeddings e and e' of each of ANGLES.

    Returns ||e - e'|| / ||e'||, and the share of its square along the log-variance head's weights.
    """
    t, n = trigflow.to_flow_time(jnp.asarray(ANGLES)), len(ANGLES)
    x = jnp.zeros((n, nets.teacher.patch_size, nets.teacher.patch_size, nets.teacher.in_channels))
    text = jnp.zeros((n, 1, nets.teacher.text_dim))
    before = nets.teacher.inputs(teacher["inputs"], x, t, text, None)[1]
    guidance = jnp.full((n,), w) if nets.student.guidance_embed else None
    moved = nets.student.inputs(student["inputs"], x, t, text, guidance)[1] - before
    head = student["inputs"]["logvar"]["kernel"][:, 0]
    along = moved @ (head / jnp.maximum(jnp.linalg.norm(head), 1e-12))
    size = jnp.linalg.norm(moved, axis=1)
    return size / jnp.linalg.norm(before, axis=1), jnp.square(along / jnp.maximum(size, 1e-12))


def _line(name, values, form):
    print(f"{name[-28:]:28}" + " ".join(f"{format(float(v), form):>8}" for v in values), flush=True)


if __name__ == "__main__":
    with cli.user_errors():
        main()

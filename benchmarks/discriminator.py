"""Measure whether fresh heads can tell a student's one-step images from real ones.

    python -m benchmarks.discriminator RUN_DIR [--updates=600] [--kind=muon --muon_lr=0.01]
        [--lr=1e-3] [--head_blocks=0,2,4,6]

The run's discriminator step trains fresh heads against its finished, fixed student. For some noise
levels it then prints the share of pairs of held-out prompts in which a real image has the higher
logit (mean over tokens and heads): than the student's one-step image ("student"), and than a real
image of another prompt ("misaligned"). One half is chance and leaves the student nothing to learn.
RUN_DIR is a run whose teacher was given (config.teacher.pretrained).
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from benchmarks.harness import options as options_lib
from sprint_jax import build, config
from sprint_jax.diffusion import ladd, trigflow
from sprint_jax.errors import UserError
from sprint_jax.objectives import ladd as ladd_objective
from sprint_jax.runtime import cli
from sprint_jax.sampling import loading
from sprint_jax.training import datasets, stages

NOISE = (0.05, 0.2, 0.55, 1.0)  # tan s
BATCH = 64


def main() -> None:
    """Train heads and print the table."""
    parser = options_lib.parser(__doc__)
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--count", type=int, default=256, help="held-out prompts")
    parser.add_argument("--kind", help="optimizer of the heads: adamw or muon")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--muon_lr", type=float)
    parser.add_argument(
        "--head_blocks", type=lambda text: tuple(map(int, text.split(","))), help="0,2,4,6"
    )
    parser.add_argument(
        "--no_misaligned",
        action="store_true",
        help="use only the student's images as fakes (paper)",
    )
    options = parser.parse_args()
    c = _config(options)
    data: Any = datasets.open_dataset(c, print)
    phase = c.phases["sprint"]
    nets = stages.networks(c, phase)
    teacher = build.teacher_weights(c.teacher.pretrained, nets.teacher)
    student = jax.tree.map(jnp.asarray, loading.read_student(options.run)[1])
    stage = stages.make(c, "sprint", data, teacher=teacher, begin=student)
    frozen, state = stage.frozen, stage.start(stage.frozen, student)
    discriminator = stage.functions[stage.labels.index("heads")]
    step = jax.jit(
        lambda state, frozen, batch: discriminator(state, frozen, data.prepare(frozen, batch))[0]
    )
    with data.batches(phase.batch, 0, options.updates, 0, 1) as batches:
        for _ in tqdm.trange(options.updates, desc="heads", mininterval=1.0):
            state = step(state, frozen, next(batches))
    heldout = data.heldout(options.count, 64)
    x0 = trigflow.SIGMA_D * np.asarray(data.pixels.encode({}, heldout.images))
    logits = jax.jit(functools.partial(_logits, nets, c))
    found = [
        logits(
            frozen,
            state,
            i,
            x0=x0[i : i + BATCH],
            cond=jax.tree.map(lambda a, i=i: a[i : i + BATCH], heldout.cond),
        )
        for i in range(0, options.count, BATCH)
    ]
    real, fake, shifted = (np.concatenate(side, axis=1) for side in zip(*found, strict=True))
    print(f"{'tan s':>8}{'student':>10}{'misaligned':>12}")
    for level, r, f, m in zip(NOISE, real, fake, shifted, strict=True):
        print(f"{level:8.2f}{higher(r, f):10.1%}{higher(r, m):12.1%}")


def higher(a: np.ndarray, b: np.ndarray) -> float:
    """Return the share of pairs in which a's logit is higher, the area under the ROC curve.

    a: [N], b: [M].
    """
    return float((np.asarray(a)[:, None] > np.asarray(b)[None]).mean())


def _config(options):
    """Return the run's config with the options applied."""
    c = loading.read_config(options.run)
    if c.control.depth or not c.teacher.pretrained:
        raise UserError(
            f"{options.run} is not a text-to-image run from a given teacher "
            "(config.teacher.pretrained): give such a run"
        )
    tree = config.to_dict(c)
    tree["phases"]["sprint"]["optimizers"]["heads"] |= {
        k: v for k in ("kind", "lr", "muon_lr") if (v := getattr(options, k)) is not None
    }
    if options.head_blocks:
        tree["phases"]["sprint"]["objective"]["head_blocks"] = options.head_blocks
    tree["phases"]["sprint"]["objective"]["misaligned"] &= not options.no_misaligned
    return config.parse(tree)


def _logits(nets, c, frozen, state, index, *, x0, cond):
    """Return mean logits [len(NOISE), B] of real, student's and misaligned images.

    Images of one prompt are renoised alike, at every level.
    """
    n = len(x0)
    k_start, k_renoise = jax.random.split(
        jax.random.fold_in(jax.random.key(c.data.eval_seed), index)
    )
    noise = lambda key: trigflow.SIGMA_D * jax.random.normal(key, x0.shape)
    start = {"t": jnp.full((n,), trigflow.T_MAX), "z": noise(k_start)}
    w = jnp.full((n,), c.evaluation.student_guidance)
    draws = {"x0": x0, "cond": cond, "w": w, "start": start}
    student, heads = state.roles["student"], state.roles["heads"]
    fake, z = ladd_objective.generate(nets, student.params, draws), noise(k_renoise)

    def judge(x, level):
        s = jnp.full((n,), jnp.arctan(level))
        every = ladd_objective.discriminate(
            c.phases["sprint"].objective,
            nets,
            frozen.teacher,
            (heads.params, heads.extra["real"]),
            cond,
            (ladd.renoise(x, z, s), s),
        )
        return jnp.stack(every).mean((0, 2))

    return [
        jnp.stack([judge(x, level) for level in NOISE]) for x in (x0, fake, ladd.misaligned(x0))
    ]


if __name__ == "__main__":
    with cli.user_errors():
        main()

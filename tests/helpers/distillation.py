"""A distillation at a tiny size: its config, networks, batch and frozen arrays."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from helpers.arrays import normals
from helpers.compiler import UNOPTIMIZED
from helpers.configs import card
from sprint_jax import build, config
from sprint_jax.objectives.base import Frozen, Networks
from sprint_jax.objectives.scm_ladd import ScmLadd
from sprint_jax.training import stages

BATCH, SIDE = 2 * 8, 4  # two parts of one normalization group each


def jit(function: Any) -> Any:
    """Compile a function quickly."""
    return jax.jit(function, compiler_options=UNOPTIMIZED)


@functools.cache
def tiny_config() -> config.Config:
    """Return the config of a narrow network on small latents."""
    tree = card()
    tree.data.size = SIDE * tree.codec.block
    tree.model.update(width=16, unroll=1)
    tree.phases.teacher.optimizers.network.update(lr=3e-3, warmup=0)
    tree.phases.sprint.objective.update(
        head_blocks=(1,), scm_weight=1.0, adv_weight=0.5, misaligned=True, reduction="code"
    )
    return config.parse(tree)


# Times of the samples of a batch.
TIMES = np.tile(np.float32([0.1, 0.6, 1.1, 1.5]), BATCH // 4)


def batch() -> dict[str, np.ndarray]:
    """Return a batch with four prompts, one of them empty."""
    prompts = ["a red circle", "a blue square above a green triangle", "a circle", ""]
    text, mask = build.text_encoder(tiny_config()).encode(prompts * (BATCH // 4))
    return {
        "latent": normals(BATCH, *build.latent_shape(tiny_config())),
        "text": text,
        "mask": mask,
    }


def conditions(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what networks receive of a batch besides the state."""
    return {name: rows[name] for name in ("text", "mask")}


def settings(**changes: Any) -> ScmLadd:
    """Return the settings of sCM + LADD, with changes."""
    return dataclasses.replace(tiny_config().phases["sprint"].objective, **changes)


@functools.cache
def networks() -> Networks:
    """Return the networks of the distillation."""
    return stages.networks(tiny_config(), tiny_config().phases["sprint"])


@functools.cache
def teacher() -> Any:
    """Return parameters of the teacher, none at its initial value."""
    params = jit(networks().teacher.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    moved = [np.asarray(a) + 0.1 * normals(*a.shape, seed=i) for i, a in enumerate(leaves)]
    return jax.tree.unflatten(tree, [a.astype(np.float32) for a in moved])


@functools.cache
def frozen() -> Frozen:
    """Return the frozen arrays of the distillation."""
    null_text, null_mask = build.text_encoder(tiny_config()).encode([""])
    return Frozen(null_text=null_text, null_mask=null_mask, teacher=teacher())

"""Optimizers: the settings of one, and the optax transformation that they describe."""

import dataclasses
import difflib
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import optax

from sprint_jax.errors import UserError
from sprint_jax.optim import came


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimizer of one role, with its schedule."""

    kind: Literal["adamw", "muon", "came"]
    """Muon uses AdamW for all parameters that are not matrices."""
    lr: float
    """Learning rate of AdamW or CAME."""
    muon_lr: float
    """Learning rate of Muon's matrices."""
    reference_batch: int
    """Both rates are multiplied by sqrt(batch / reference_batch); 0 leaves them (the published
    trainer has 256).
    """
    warmup: int
    """Updates of linear warm-up."""
    decay_to: float
    """Final share of the rates under a cosine; 1 keeps them constant."""
    b1: float
    """Decay of the first moment (Muon's matrices keep optax's 0.95)."""
    b2: float
    """Decay of the second moment."""
    b3: float
    """Decay of CAME's instability."""
    weight_decay: float
    """Decoupled weight decay."""
    clip: float
    """Largest global norm of the gradient."""
    frozen: tuple[str, ...]
    """Parameters that keep their values: parts of their paths, such as blocks/ff or to_out. They
    have no optimizer state, and the clipped norm leaves them out. GDD-I freezes ("blocks/ff",
    "to_out"), half of a Linear-DiT and more.
    """

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, what to use instead) for each value out of range."""
        if self.clip <= 0:
            yield "clip", "use a norm above 0"
        if self.kind == "muon" and self.muon_lr <= 0:
            yield "muon_lr", "kind muon needs a rate above 0 for its matrices"
        if self.kind == "came" and not (0 < self.b1 < 1 and 0 < self.b3 < 1):
            yield "b1", f"kind came needs b1 and b3 ({self.b3}) between 0 and 1"
        for name in ("lr", "muon_lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                yield name, "use a finite rate of 0 or more"


def make(
    settings: Optimizer, *, updates: int, batch: int, rules: came.Rules
) -> optax.GradientTransformation:
    """Build global-norm clipping and then the optimizer, with linear warm-up and a cosine over
    `updates`.

    batch: samples of a global batch, for the square-root rule of the rate. rules: how CAME sees
    the parameters.
    """
    factor = math.sqrt(batch / settings.reference_batch) if settings.reference_batch else 1.0

    def schedule(lr: float) -> optax.Schedule:
        lr = factor * lr
        steps = max(1, updates - settings.warmup)
        cosine = optax.cosine_decay_schedule(lr, steps, alpha=settings.decay_to)
        # The first update already moves: warm-up runs from lr / (warmup + 1) to lr.
        rise = optax.linear_schedule(lr / (settings.warmup + 1), lr, settings.warmup)
        return optax.join_schedules([rise, cosine], [settings.warmup])

    match settings.kind:
        case "muon":
            update = optax.contrib.muon(
                schedule(settings.muon_lr),
                weight_decay=settings.weight_decay,
                adam_b1=settings.b1,
                adam_b2=settings.b2,
                adam_weight_decay=settings.weight_decay,
                adam_learning_rate=schedule(settings.lr),
                muon_weight_dimension_numbers=_matrices,
            )
        case "came":
            update = came.came(
                schedule(settings.lr),
                b1=settings.b1,
                b2=settings.b2,
                b3=settings.b3,
                weight_decay=settings.weight_decay,
                factored=rules.factored,
                stacked=rules.stacked,
            )
        case "adamw":
            update = optax.adamw(
                schedule(settings.lr),
                b1=settings.b1,
                b2=settings.b2,
                weight_decay=settings.weight_decay,
            )
    tx = optax.chain(optax.clip_by_global_norm(settings.clip), update)
    if not settings.frozen:
        return tx
    labels = lambda params: _labels(params, settings.frozen)
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def check_frozen(settings: Optimizer, params: Any) -> None:
    """Raise UserError where a frozen part names no parameter, or nothing is left to train."""
    if settings.frozen:
        _labels(params, settings.frozen)


def _labels(params: Any, frozen: tuple[str, ...]) -> Any:
    """Return "frozen" or "trained" for each parameter.

    Raises UserError for a part of a path that names no parameter, or where nothing is left to
    train.
    """
    name = lambda path: "/".join(str(key.key) for key in path)
    names = [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for part in frozen:
        if not any(f"/{part}/" in f"/{one}/" for one in names):
            near = ", ".join(difflib.get_close_matches(part, _parts(names), 3, 0.3)) or names[0]
            raise UserError(f"frozen {part!r} names no parameter: try {near}")
    is_frozen = lambda one: any(f"/{part}/" in f"/{one}/" for part in frozen)
    if all(map(is_frozen, names)):
        raise UserError(f"frozen {', '.join(frozen)} leaves no parameter to train")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "frozen" if is_frozen(name(path)) else "trained", params
    )


def _parts(names: list[str]) -> list[str]:
    """Return every part of every path, once."""
    parts = {}
    for one in names:
        keys = one.split("/")
        for i in range(len(keys)):
            parts |= {"/".join(keys[i:j]): None for j in range(i + 1, len(keys) + 1)}
    return list(parts)


def _matrices(params: Any) -> Any:
    """Return the axes of each parameter that Muon treats as a matrix: inner kernels, layer by
    layer of a stack.
    """

    def axes(path, leaf):
        names = [str(key.key) for key in path]
        if names[-1] != "kernel" or names[-2] in ("patch_embed", "proj_out", "logvar"):
            return None
        return optax.contrib.MuonDimensionNumbers(
            reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1
        )

    return jax.tree_util.tree_map_with_path(axes, params)

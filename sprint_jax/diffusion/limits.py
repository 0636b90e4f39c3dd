"""Ranges of what a person may ask of a sampler, the same for every command, request and config.

Beyond them numbers overflow to infinity, memory does not suffice, or nothing is meant.
"""

from collections.abc import Mapping

from sprint_jax.errors import UserError

SIDE = 2**14  # pixels; the largest published models draw 4096
RANGES: Mapping[str, tuple[float, float]] = {
    "steps": (1, 1000),
    "guidance_scale": (-100, 100),
    "control_scale": (0, 10),
    "height": (1, SIDE),
    "width": (1, SIDE),
    "images_per_prompt": (1, 100_000),
    "batch_size": (1, 4096),
    "seed": (0, 2**31 - 1),
}


def advice(name: str, value: float) -> str | None:
    """Return what to use instead of a value out of range, NaN included; None for one within."""
    if name == "strength":
        return None if 0 < value <= 1 else "use more than 0 and at most 1"
    low, high = RANGES[name]
    if low <= value <= high:
        return None
    few = value < low == 1 and isinstance(value, int)
    return "use 1 or more" if few else f"use {low} to {high}"


def check(values: Mapping[str, float | None], form: str = "{name} {value}") -> None:
    """Raise UserError for the first value out of range.

    values: by the names of RANGES, or strength; None is a default. form: of the option in messages.
    """
    for name, value in values.items():
        if value is not None and (better := advice(name, value)):
            raise UserError(f"{form.format(name=name, value=value)}: {better}")

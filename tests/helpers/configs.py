"""The config cards, as tests read them."""

import dataclasses
import importlib
from types import ModuleType
from typing import Any

from sprint_jax import config


def _module(file: str) -> ModuleType:
    return importlib.import_module(f"sprint_jax.cards.{file}")


def card(file: str = "sprint", preset: str = "smoke") -> Any:
    """Return the ConfigDict of a preset of configs/`file`.py."""
    return _module(file).get_config(preset)


def presets(file: str = "sprint") -> tuple[str, ...]:
    """Return the names of the presets of configs/`file`.py."""
    return tuple(_module(file).PRESETS)


def smoke_config(**data: Any) -> config.Config:
    """Return the parsed `smoke` preset of the default card, with changes to its data section."""
    parsed = config.parse(card())
    return dataclasses.replace(parsed, data=dataclasses.replace(parsed.data, **data))

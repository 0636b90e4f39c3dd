"""The config cards, as tests read them."""

import dataclasses
import runpy
from typing import Any

from helpers.runs import ROOT
from sprint_jax import config


def _namespace(file: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / f"configs/{file}.py"))


def card(file: str = "sprint", preset: str = "smoke") -> Any:
    """Return the ConfigDict of a preset of configs/`file`.py."""
    return _namespace(file)["get_config"](preset)


def presets(file: str = "sprint") -> tuple[str, ...]:
    """Return the names of the presets of configs/`file`.py."""
    return tuple(_namespace(file)["PRESETS"])


def smoke_config(**data: Any) -> config.Config:
    """Return the parsed `smoke` preset of the default card, with changes to its data section."""
    parsed = config.parse(card())
    return dataclasses.replace(parsed, data=dataclasses.replace(parsed.data, **data))

"""The config cards, as tests read them."""

import runpy
from typing import Any

from helpers.runs import ROOT


def _namespace(file: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / f"configs/{file}.py"))


def card(file: str = "sprint", preset: str = "smoke") -> Any:
    """Return the ConfigDict of a preset of configs/`file`.py."""
    return _namespace(file)["get_config"](preset)


def presets(file: str = "sprint") -> tuple[str, ...]:
    """Return the names of the presets of configs/`file`.py."""
    return tuple(_namespace(file)["PRESETS"])

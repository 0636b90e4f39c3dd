"""Train a model: the main job, the same as `python -m sprint_jax.main`.

--config is a shipped card, perhaps with a preset (sprint, sprint:smoke), or the path of a card's
file. Run the command again to resume. launch/ starts several processes that run as one.
"""

import dataclasses
import os
import pathlib

from ml_collections import ConfigDict

from sprint_jax.runtime import cards, compile_cache, distributed, launchers, quick_compile
from sprint_jax.storage import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(files.Paths):
    """Options of `sprint-jax train`."""

    config: files.LocalPath = ""
    """Card, NAME[:PRESET] or FILE.py[:PRESET]; --config.KEY=VALUE replaces its values."""
    overrides: tuple[str, ...] = ()
    """KEY=VALUE for each replaced value."""
    workdir: files.LocalPath | None = None
    """Directory of the run; default: runs/ and the names of card and preset."""
    coordinator: str | None = None
    """host:port of process 0 (the next port is used too)."""
    processes: int | None = None
    """Processes of this run; default: from variables of SLURM, JobSet or TPUs, or one."""
    process: int | None = None
    """Number of this process, from 0."""
    startup_seconds: float = 300.0
    """How long to wait for all processes."""


def run(options: Options) -> None:
    """Train. Raises UserError for a bad card, and for a work directory of other settings."""
    start(cards.load(options.config, options.overrides), options)


def start(card: ConfigDict, options: Options) -> None:
    """Train by a card that is loaded already; options.config only names the work directory."""
    file, preset = cards.split(options.config)
    name = f"{pathlib.Path(file).stem}{'_' * bool(preset)}{preset}"
    place = launchers.place(options.coordinator, options.processes, options.process, os.environ)
    compile_cache.start()
    from sprint_jax import config
    from sprint_jax.training import run as training
    from sprint_jax.training.loop import Interrupted

    parsed = config.parse(card)
    if parsed.run.quick_compile:
        quick_compile.start()
    with distributed.started(place, seconds=options.startup_seconds):
        try:
            training.run(parsed, pathlib.Path(options.workdir or f"runs/{name}"))
        except Interrupted as stop:
            if place is None or place.process == 0:
                print(stop)

"""Predict what a configuration needs on devices that are not here.

    --topology=v5e:16x16, v5p:4x4x4, v6e:8x8   TPU pods: the true steps are compiled for them
                                               (pip install libtpu)
    --topology=h200:8x8, h100:4x8, a100:4x8    nodes x GPUs: compiled for them without a GPU
                                               (pip install "jax[cuda12]"); without that compiler
                                               for as many simulated CPU devices

Prints for each step: parameters and bytes per device, compiled memory, FLOPs, bytes of each
collective, the least time of a step, the hours of the whole recipe, and the first step that does
not fit with what to change.
"""

import dataclasses
import functools
import pathlib

from sprint_jax.runtime import cards, cli
from sprint_jax.storage import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(files.Paths):
    """Options of `sprint-jax plan`."""

    config: files.LocalPath = ""
    """Card, NAME[:PRESET] or FILE.py[:PRESET]; --config.KEY=VALUE replaces its values."""
    overrides: tuple[str, ...] = ()
    """KEY=VALUE for each replaced value."""
    topology: str = ""
    """Device and its numbers, for example v5e:16x16 or h200:8x8."""
    table: files.LocalPath | None = None
    """File to add the table to, as markdown."""


def run(options: Options) -> str:
    """Print the table, add it to --table, and return it. Raises UserError before it compiles."""
    card = cards.load(options.config, options.overrides)
    cli.require("topology", options.topology, "for example v5e:16x16 or h200:8x8")
    cli.check_output_file("table", options.table)
    from sprint_jax.planning import hardware, topology

    device, shape, count = hardware.parse_topology(options.topology)
    topology.prepare(device, count)  # before JAX is imported
    from sprint_jax import config
    from sprint_jax.planning import report

    parsed, say = config.parse(card), functools.partial(print, flush=True)
    if options.table:
        report.read_table(pathlib.Path(options.table))
    steps = report.measure(parsed, device, shape, say)
    table = report.render(parsed, options.config, options.topology, steps)
    say("\n" + table)
    if options.table:
        report.append(pathlib.Path(options.table), table)
        say(f"added to {options.table}")
    return table

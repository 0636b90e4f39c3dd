"""What each step of a configuration needs on devices that are not here, as a table in markdown."""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from sprint_jax.config import Config, active
from sprint_jax.errors import UserError
from sprint_jax.planning import collectives, flops, hardware, topology
from sprint_jax.storage import files
from sprint_jax.training import datasets, plans, sharding
from sprint_jax.training.stage import Placed, check_batch

Say = Callable[[str], None]
_Step = tuple[str, int, Placed, Callable, dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a configuration, measured by compiling it.

    name: the phase, and the part of its round if there are several.
    times: how often the recipe runs it.
    batch: samples. parameters: of the network that it trains.
    state, frozen, held, temporary: bytes a device.
    flops: of all devices together. collectives: {kind: bytes that a device sends}.
    """

    name: str
    times: int
    batch: int
    parameters: int
    state: int
    frozen: int
    held: int
    temporary: int
    flops: float
    collectives: Mapping[str, float]

    @property
    def peak(self) -> int:
        """The most bytes that a device holds at once."""
        return self.held + self.temporary


def measure(config: Config, device: hardware.Device, shape: Sequence[int], say: Say) -> list[Step]:
    """Compile every step of a configuration for a topology.

    Raises UserError for a topology that does not exist, and a batch that its mesh does not divide.
    """
    if config.model.attention != "plain":
        say(
            "attention is planned in plain JAX, without the kernels of config.model.attention: "
            "they are chosen where they run"
        )
    if topology.is_simulated(device):
        say(
            "pip install 'jax[cuda12]' for memory and collectives of the GPUs' own compiler (no "
            "GPU needed); simulated CPU devices now"
        )
    devices = topology.devices(device, shape)
    return [
        _measure(name, times, placed, function, batch, say)
        for name, times, placed, function, batch in _steps(config, devices, say)
    ]


def _steps(config: Config, devices: Sequence[Any], say: Say) -> Iterator[_Step]:
    """Yield (name, times run, placed stage, function, abstract batch) of every step."""
    mesh = sharding.mesh(config.mesh.data, config.mesh.fsdp, devices)
    for stage in plans.abstract_stages(config):
        check_batch(stage, mesh)
        placed = Placed.on(stage, mesh, say)
        batch = datasets.abstract_phase_batch(config, config.phases[stage.name])
        for label, function in dict(zip(stage.labels, stage.functions, strict=True)).items():
            share = stage.labels.count(label) / len(stage.labels)
            name = stage.name if len(stage.labels) == 1 else f"{stage.name} {label}"
            yield name, round(stage.steps * share), placed, function, batch


def _measure(
    name: str, times: int, placed: Placed, function: Callable, batch: dict, say: Say
) -> Step:
    say(f"{name}: compiling for {placed.mesh.size} devices (half a minute to minutes, no bar)")
    begin = time.perf_counter()
    compiled = placed.lower(function, batch).compile()
    say(f"{name}: compiled in {time.perf_counter() - begin:.0f} s")
    memory: Any = compiled.memory_analysis()
    state = placed.state
    counted = flops.count(function, state, placed.frozen, batch)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Step(
        name=name,
        times=times,
        batch=batch["latent"].shape[0],
        parameters=sum(a.size for a in jax.tree.leaves(state.roles[placed.stage.main].params)),
        state=sharding.per_device_bytes(state),
        frozen=sharding.per_device_bytes(placed.frozen),
        held=held,
        temporary=memory.temp_size_in_bytes,
        flops=counted.multiplied,
        collectives=collectives.totals(collectives.parse(compiled.as_text() or "")),
    )


def render(config: Config, name: str, where: str, steps: Sequence[Step]) -> str:
    """Return the table.

    name: of the card. where: the topology, as `hardware.parse_topology` reads it.
    """
    device, shape, count = hardware.parse_topology(where)
    fsdp = config.mesh.fsdp
    data = count // fsdp if config.mesh.data == -1 else config.mesh.data
    kind = (
        "compiled for as many simulated CPU devices; a CPU computes bfloat16 in float32, so "
        "temporary memory and collectives are upper bounds"
        if topology.is_simulated(device)
        else "compiled ahead of time for it"
    )
    hours = sum(s.times * max(_seconds(s, device, shape, fsdp)) / 3600 for s in steps)
    accumulate = ", ".join(str(config.phases[name].accumulate) for name in active(config))
    exchanged = "; ".join(f"{s.name} {_exchanged(s)}" for s in steps)
    lines = [
        f"### {name} on {where}",
        "",
        f"{count} devices as data x fsdp = {data} x {fsdp}, model.remat={config.model.remat}, "
        f"accumulate={accumulate}; {kind}. Predictions, nothing was run.",
        "",
        "| step | batch | parameters | state a device | frozen a device | temporary a device | "
        "peak of memory | TFLOP | least time: arithmetic | collectives |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(s, device, shape, fsdp) for s in steps),
        "",
        f"Bytes that a device exchanges in a step: {exchanged}.",
        "Least time of the recipe, the larger of arithmetic at the data sheet's peak and "
        f"collectives: {hours:.1f} hours; at 40 % of that {hours / 0.4:.0f}.",
        advice(config, device, next((s for s in steps if s.peak > device.memory), None)) + "\n",
    ]
    return "\n".join(lines)


def _row(step: Step, device: hardware.Device, shape: Sequence[int], fsdp: int) -> str:
    compute, transfer = _seconds(step, device, shape, fsdp)
    cells = (
        step.name,
        str(step.batch),
        f"{step.parameters / 1e6:.1f} M",
        _gib(step.state),
        _gib(step.frozen),
        _gib(step.temporary),
        f"{100 * step.peak / device.memory:.0f} % of {_gib(device.memory)}",
        f"{step.flops / 1e12:.0f}",
        f"{1e3 * compute:.0f} ms",
        f"{1e3 * transfer:.0f} ms",
    )
    return f"| {' | '.join(cells)} |"


def _seconds(
    step: Step, device: hardware.Device, shape: Sequence[int], fsdp: int
) -> tuple[float, float]:
    """Return the least seconds of (arithmetic, what a device sends) of one step.

    On GPUs the traffic that gathers weights stays inside a node if fsdp does; the sums over all
    devices leave it.
    """
    inside = topology.is_tpu(device) or math.prod(shape) == shape[-1]
    gathers = device.link if inside or shape[-1] % fsdp == 0 else device.outside
    sums = device.link if inside else device.outside
    rate = lambda kind: gathers if kind in ("all-gather", "reduce-scatter") else sums
    transfer = sum(size / rate(kind) for kind, size in step.collectives.items())
    return step.flops / (math.prod(shape) * device.peak_bf16), transfer


def _exchanged(step: Step) -> str:
    kinds = sorted(step.collectives.items())
    return ", ".join(f"{kind} {_gib(size)}" for kind, size in kinds) or "nothing"


def advice(config: Config, device: hardware.Device, step: Step | None) -> str:
    """Return a sentence on the first step that does not fit, with what to change. None: all fit."""
    if step is None:
        return "Everything fits."
    changes = []
    if config.model.remat != "block":
        changes.append("--config.model.remat=block")
    name = step.name.partition(" ")[0]
    if step.temporary > 0.5 * step.peak:
        parts = 2 * config.phases[name].accumulate
        changes.append(
            f"--config.phases.{name}.accumulate={parts}, or a smaller --config.phases.{name}.batch"
        )
    if step.held > 0.4 * device.memory:
        changes.append(f"a larger --config.mesh.fsdp (now {config.mesh.fsdp})")
    return (
        f"DOES NOT FIT: the {step.name} step needs {_gib(step.peak)} of {_gib(device.memory)}. "
        f"Change: {'; '.join(changes) or 'more devices'}."
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def read_table(path: pathlib.Path) -> str:
    """Return the text of --table so far. Raises UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read --table={path} ({error}): give a UTF-8 text file, or another name"
        ) from None


def append(path: pathlib.Path, table: str) -> None:
    """Add a table to the file --table."""
    files.write_text(path, read_table(path) + table + "\n")

"""What a configuration needs on hardware that is not here: python -m sprint_jax plan --config=… --topology=…

    --topology=v5e:16x16, v5p:4x4x4, v6e:8x8     TPU pods: the true steps are compiled for them (pip install libtpu)
    --topology=h200:8x8, h100:4x8, a100:4x8      nodes x GPUs: compiled for them (pip install "jax[cuda12]", no GPU needed);
                                                 without that compiler for as many simulated CPU devices

Prints, for each step of the configuration: parameters and bytes per device, compiled memory, FLOPs, bytes of
each collective, the least time a step can take, the hours of the whole recipe, and the first thing that does
not fit with what to change.
"""

import math
import os
import pathlib
import sys
import time

from absl import app, flags

from sprint_jax.commands import config_flag
from sprint_jax.errors import UserError
from sprint_jax.planning import gpus, hardware
from sprint_jax.runtime import cli
from sprint_jax.storage import files

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Device and its numbers, for example v5e:16x16 or h200:8x8."
)
_TABLE = flags.DEFINE_string("table", None, "File to add the table to, as markdown.")
flags.adopt_module_key_flags(config_flag)  # --help shows it here


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        path, preset = config_flag.path_and_preset()
        if not _TOPOLOGY.value:
            raise UserError("--topology is missing: for example v5e:16x16 or h200:8x8")
        device, shape, count = hardware.parse_topology(_TOPOLOGY.value)
        # Before JAX starts: neither kind of device is here.
        os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        if _is_simulated(device):
            simulated = (
                f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0"
            )
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {simulated}"
        elif not _is_tpu(device):
            gpus.prepare()
        from sprint_jax import config

        parsed = config.parse(config_flag.CONFIG.value)
        cli.folder_of(_TABLE)
        if _TABLE.value:
            _table(pathlib.Path(_TABLE.value))  # refused before minutes of compiling
        say = lambda message: print(message, flush=True)
        if parsed.model.attention != "plain":
            say(
                "attention is planned in plain JAX, without the kernels of config.model.attention: they are chosen where they run"
            )
        if _is_simulated(device):
            say(
                "pip install 'jax[cuda12]' for memory and collectives of the GPUs' own compiler (no GPU needed); simulated CPU devices now"
            )
        steps = [_measure(*step, say) for step in _steps(parsed, _devices(device, shape), say)]
        name = f"{path}{':' + preset if preset else ''}"
        report = _report(parsed, name, device, shape, steps)
        say("\n" + report)
        if _TABLE.value:
            _append(pathlib.Path(_TABLE.value), report)


def _is_tpu(device):
    return device.name.startswith("v")


def _is_simulated(device):
    return not _is_tpu(device) and not gpus.compiler()


def _devices(device, shape):
    import jax

    if _is_simulated(device):
        return jax.devices()
    if not _is_tpu(device):
        return gpus.devices(device, *shape)
    from jax.experimental import topologies

    topology = f"{device.name}:{'x'.join(map(str, shape))}"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # the library raises many kinds
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot describe {topology} ({line}): pip install libtpu, and use a topology that exists"
        ) from None


def _steps(config, devices, say):
    """Yield (label, times run, placed stage, function, abstract batch) of every step of the configuration."""
    from sprint_jax.training import datasets, plans, sharding
    from sprint_jax.training.stage import Placed, check_batch

    mesh = sharding.mesh(config.mesh.data, config.mesh.fsdp, devices)
    for stage in plans.abstract_stages(config):
        check_batch(stage, mesh)
        placed, batch = Placed.on(stage, mesh, say), datasets.abstract_batch(config, stage.batch)
        for label, function in dict(zip(stage.labels, stage.functions, strict=True)).items():
            share = stage.labels.count(label) / len(stage.labels)
            name = stage.name if len(stage.labels) == 1 else f"{stage.name} {label}"
            yield (name, round(stage.steps * share), placed, function, batch)


def _measure(name, times, placed, function, batch, say):
    """Everything the report says about one step."""
    import jax

    from sprint_jax.planning import collectives, flops
    from sprint_jax.training import sharding

    say(f"{name}: compiling for {placed.mesh.size} devices (half a minute to minutes, no bar)")
    begin = time.perf_counter()
    compiled = placed.lower(function, batch).compile()
    say(f"{name}: compiled in {time.perf_counter() - begin:.0f} s")
    memory, state = compiled.memory_analysis(), placed.state
    counted = flops.count(function, state, placed.frozen, batch)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "name": name,
        "times": times,
        "batch": batch["latent"].shape[0],
        "parameters": sum(a.size for a in jax.tree.leaves(state.roles[placed.stage.main].params)),
        "state": sharding.per_device_bytes(state),
        "frozen": sharding.per_device_bytes(placed.frozen),
        "held": held,
        "temporary": memory.temp_size_in_bytes,
        "flops": counted.multiplied,
        "collectives": collectives.totals(collectives.parse(compiled.as_text())),
    }


def _report(config, name, device, shape, steps):
    """Markdown."""
    from sprint_jax import config as config_lib

    mesh, count = config.mesh, math.prod(shape)
    data = count // mesh.fsdp if mesh.data == -1 else mesh.data
    kind = (
        "compiled ahead of time for it"
        if not _is_simulated(device)
        else (
            "compiled for as many simulated CPU devices; a CPU computes bfloat16 in float32, so temporary memory and "
            "collectives are upper bounds"
        )
    )
    running = [config.phases[n] for n in config_lib.active(config)]
    accumulate = ", ".join(str(phase.accumulate) for phase in running)
    lines = [
        f"### {name} on {_TOPOLOGY.value}",
        "",
        f"{count} devices as data x fsdp = {data} x {mesh.fsdp}, model.remat={config.model.remat}, accumulate="
        f"{accumulate}; {kind}. Predictions, nothing was run.",
        "",
        "| step | batch | parameters | state a device | frozen a device | temporary a device | peak of memory | TFLOP | "
        "least time: arithmetic | collectives |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    hours, first = 0.0, None
    for s in steps:
        compute, transfer = _seconds(s, device, shape, mesh.fsdp)
        hours += s["times"] * max(compute, transfer) / 3600
        peak = s["held"] + s["temporary"]
        if first is None and peak > device.memory:
            first = (s, peak)
        lines.append(
            f"| {s['name']} | {s['batch']} | {s['parameters'] / 1e6:.1f} M | {_gib(s['state'])} | {_gib(s['frozen'])} | "
            f"{_gib(s['temporary'])} | {100 * peak / device.memory:.0f} % of {_gib(device.memory)} | "
            f"{s['flops'] / 1e12:.0f} | {1e3 * compute:.0f} ms | {1e3 * transfer:.0f} ms |"
        )
    lines += [
        "",
        "Bytes that a device exchanges in a step: "
        + "; ".join(f"{s['name']} {_exchanged(s)}" for s in steps)
        + ".",
    ]
    lines.append(
        f"Least time of the recipe, the larger of arithmetic at the data sheet's peak and collectives: {hours:.1f} hours; at 40 % "
        f"of that {hours / 0.4:.0f}."
    )
    lines.append(_fits(config, device, first) + "\n")
    return "\n".join(lines)


def _seconds(step, device, shape, fsdp):
    """Least seconds of arithmetic, and of what a device sends, of one step.

    On GPUs what gathers weights stays inside a node where `fsdp` does, and the sums over all devices leave it.
    """
    inside = _is_tpu(device) or math.prod(shape) == shape[-1]
    gathers = device.link if inside or shape[-1] % fsdp == 0 else device.outside
    sums = device.link if inside else device.outside
    rate = lambda kind: gathers if kind in ("all-gather", "reduce-scatter") else sums
    transfer = sum(size / rate(kind) for kind, size in step["collectives"].items())
    return step["flops"] / (math.prod(shape) * device.peak_bf16), transfer


def _exchanged(step):
    return (
        ", ".join(f"{kind} {_gib(size)}" for kind, size in sorted(step["collectives"].items()))
        or "nothing"
    )


def _fits(config, device, first):
    if first is None:
        return "Everything fits."
    step, peak = first
    changes = []
    if config.model.remat != "block":
        changes.append("--config.model.remat=block")
    name = step["name"].partition(" ")[0]
    if step["temporary"] > 0.5 * peak:
        parts = 2 * config.phases[name].accumulate
        changes.append(
            f"--config.phases.{name}.accumulate={parts}, or a smaller --config.phases.{name}.batch"
        )
    if step["held"] > 0.4 * device.memory:
        changes.append(f"a larger --config.mesh.fsdp (now {config.mesh.fsdp})")
    advice = "; ".join(changes) or "more devices"
    return f"DOES NOT FIT: the {step['name']} step needs {_gib(peak)} of {_gib(device.memory)}. Change: {advice}."


def _gib(size):
    return f"{size / 2**30:.2f} GiB"


def _table(path):
    """The text of --table so far. Raises UserError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read --table={path} ({error}): give a UTF-8 text file, or another name"
        ) from None


def _append(path, report):
    files.write_text(path, _table(path) + report + "\n")
    print(f"added to {path}")


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)

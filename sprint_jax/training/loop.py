"""The one training loop. A stage brings its state, its steps and its batches; the loop brings the rest.

Order: restore or start, compile and say what was compiled, then rounds. A round is one call of each step
function on consecutive batches (one for the teacher; generator and discriminator for the sprint), and
rows, checkpoints and stops fall between rounds. Metrics of a round are fetched after the next one has
been launched, so the device never waits for the host.
"""

import dataclasses
import signal
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sprint_jax import config as config_lib
from sprint_jax.data.loader import Prefetch
from sprint_jax.errors import UserError
from sprint_jax.training import records as records_lib
from sprint_jax.training.checkpoints import Checkpoints


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived and everything is saved. The message says how to go on."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training.

    name: in logs, metrics and the checkpoint folder. steps: batches consumed in all.
    start: frozen -> state at step 0. functions: steps of a round, each (state, frozen, batch) -> (state,
    metrics). frozen: arrays that never change. batch: step number -> batch of NumPy arrays.
    """

    name: str
    steps: int
    start: Callable
    functions: tuple[Callable, ...]
    frozen: dict
    batch: Callable


def data_mesh():
    """All devices on the axes ("data", "fsdp"); states are replicated, batches split over "data"."""
    axes = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((jax.device_count(), 1), ("data", "fsdp"), axis_types=axes)


def train(stage: Stage, run: config_lib.Run, workdir, records, say):
    """Runs a stage to its end from the newest checkpoint and returns its final state.

    Raises Interrupted after saving when asked to stop, UserError when updates stay non-finite.
    """
    mesh = data_mesh()
    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated),
        jax.eval_shape(stage.start, stage.frozen),
    )
    frozen = jax.device_put(stage.frozen, replicated)
    with Checkpoints(f"{workdir}/checkpoints/{stage.name}", keep=run.keep) as checkpoints:
        done = checkpoints.latest()
        if done is None:
            state, done = jax.jit(stage.start, out_shardings=replicated)(frozen), 0
        else:
            state = checkpoints.restore(done, abstract)
            say(f"{stage.name}: resumed from checkpoint at step {done} of {stage.steps}")
        records.rewind(stage.name, done)
        if done >= stage.steps:
            return state
        functions = _compile(stage, abstract, frozen, replicated, split, say)
        with _Stop() as stop, Prefetch(stage.batch, done, stage.steps) as batches:
            bar = records_lib.progress(stage.name, done, stage.steps)
            watch = _Watch(stage.name, run, records, bar)
            while done < stage.steps:
                metrics = {}
                for function in functions:
                    state, new = function(state, frozen, jax.device_put(next(batches), split))
                    metrics |= new
                done += len(functions)
                watch.launched(done, metrics)
                if done % run.checkpoint_every == 0 or done >= stage.steps or stop.requested:
                    watch.flush()
                    checkpoints.save(done, state)
                if stop.requested:
                    break
            watch.flush()
            bar.close()
    if stop.requested and done < stage.steps:
        raise Interrupted(f"{stage.name}: stopped at step {done} of {stage.steps}; the same command goes on from there")
    return state


def _compile(stage, abstract, frozen, replicated, split, say):
    example = stage.batch(0)
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split), example)
    say(f"{stage.name}: compiling (seconds to a minute, no bar)")
    compiled, begin = [], time.perf_counter()
    for function in stage.functions:
        jitted = jax.jit(function, donate_argnums=0, out_shardings=replicated)
        compiled.append(jitted.lower(abstract, frozen, batch).compile())
    count = sum(a.size for a in jax.tree.leaves(abstract.params))
    say(
        f"{stage.name}: {jax.device_count()} x {jax.devices()[0].device_kind}, "
        f"{count / 1e6:.2f} M parameters, compiled in {time.perf_counter() - begin:.0f} s"
    )
    return compiled


class _Watch:
    """Looks at metrics one round late: writes rows, moves the bar, stops on lasting non-finite updates."""

    def __init__(self, name, run, records, bar):
        self._name, self._run, self._records, self._bar = name, run, records, bar
        self._waiting = None
        self._every = run.log_every

    def launched(self, step, metrics):
        self.flush()
        self._waiting = (step, metrics)

    def flush(self):
        if self._waiting is None:
            return
        step, metrics = self._waiting
        self._waiting = None
        metrics = jax.device_get(metrics)
        in_a_row, in_all = metrics.pop("rejected")
        if in_a_row >= self._run.max_rejected:
            bad = sorted(k.split("/", 1)[1] for k, v in metrics.items() if "/" in k and not np.isfinite(v))
            raise UserError(
                f"{self._name}: {in_a_row} updates in a row were not finite, at step {step} in "
                f"{', '.join(bad) or 'the loss'}; all were dropped. Lower the learning rate, or look at the data"
            )
        self._bar.update(step - self._bar.n)
        if step % self._every == 0:
            self._bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
            self._records.write(self._name, step, metrics | {"rejected": in_all})


class _Stop:
    """Turns SIGTERM and SIGINT into a request while inside."""

    def __enter__(self):
        self.requested = False
        self._old = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _request(self, *_):
        self.requested = True

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

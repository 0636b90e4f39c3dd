"""The one training loop. A stage brings its state, its steps and its batches; the loop brings the rest.

Order: restore or start, compile and say what was compiled, then rounds. A round is one call of each step
function on consecutive batches (one for the teacher; generator and discriminator for the sprint), and
rows, checkpoints and stops fall between rounds. Metrics of a round are fetched after the next one has
been launched, so the device never waits for the host.
"""

import concurrent.futures
import dataclasses
import pathlib
import signal
import time
from collections.abc import Callable

import jax
import numpy as np

from sprint_jax import config as config_lib
from sprint_jax.errors import UserError
from sprint_jax.storage import image_files
from sprint_jax.storage import run_files as names
from sprint_jax.training import hosts, sharding
from sprint_jax.training import records as records_lib
from sprint_jax.training import state as state_lib
from sprint_jax.training.checkpoints import Checkpoints


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived and everything is saved. The message says how to go on."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training.

    name: in logs, metrics and the checkpoint folder. steps: batches consumed in all.
    start: (frozen, begun) -> state at step 0. begun: arrays that only the start needs. functions: steps of a
    round, each (state, frozen, batch) -> (state, metrics). frozen: arrays that never change. prepare: (frozen, batch as read) -> batch as the steps take
    it, compiled with them. batch: samples of a global batch. batches: (batch, start, stop, process, processes)
    -> context and iterator of this process's rows as NumPy arrays. data: names what is learnt from.
    strip: parameters -> uint8 [H, W, 3], pictures of fixed prompts on the way; None where they cannot be drawn.
    """

    name: str
    steps: int
    start: Callable
    begun: dict
    functions: tuple[Callable, ...]
    frozen: dict
    prepare: Callable
    batch: int
    batches: Callable
    data: str
    strip: Callable | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    """A stage on a mesh: abstract state and frozen arrays with their shardings."""

    stage: Stage
    mesh: jax.sharding.Mesh
    state: object
    frozen: dict

    @classmethod
    def on(cls, stage: Stage, mesh, say=lambda message: None):
        """say: told of big arrays that stay whole on every device."""
        frozen, begun = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (stage.frozen, stage.begun)
        )
        state = jax.eval_shape(stage.start, frozen, begun)
        place = lambda tree, say: sharding.abstract(tree, sharding.shardings(tree, mesh, say))
        return cls(stage, mesh, place(state, say), place(frozen, say))

    def start(self, frozen):
        """The state at step 0, made where it will stay."""
        begun = sharding.abstract(self.stage.begun, sharding.shardings(self.stage.begun, self.mesh))
        out = jax.tree.map(lambda a: a.sharding, self.state)
        return jax.jit(self.stage.start, out_shardings=out)(frozen, place(self.stage.begun, begun))

    def lower(self, function, batch):
        """The lowered program of one step function for abstract global arrays `batch`."""

        def step(state, frozen, batch):
            return function(state, frozen, self.stage.prepare(frozen, batch))

        split = sharding.batch(self.mesh)
        arrays = {
            k: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split) for k, a in batch.items()
        }
        out = jax.tree.map(lambda a: a.sharding, self.state), sharding.replicated(self.mesh)
        with jax.set_mesh(self.mesh):
            return jax.jit(step, donate_argnums=0, out_shardings=out).lower(
                self.state, self.frozen, arrays
            )


class _Programs:
    """Compiled steps by the shapes of their batch: one set, or one for each aspect ratio."""

    def __init__(self, placed: Placed, say, compiled: dict, side_by_side: bool):
        self._placed, self._say, self._compiled, self._side_by_side = (
            placed,
            say,
            compiled,
            side_by_side,
        )

    def get(self, batch):
        key = tuple((k, a.shape, a.dtype) for k, a in sorted(batch.items()))
        if key not in self._compiled:
            self._compiled[key] = self._compile(batch)
        return self._compiled[key]

    def _compile(self, batch):
        stage, begin = self._placed.stage, time.perf_counter()
        self._say(
            f"{stage.name}: compiling for latents {batch['latent'].shape} (seconds to two minutes, no bar)"
        )
        # One compiles while the next is traced; several at a time take memory (4.0 instead of 2.6 GB for the embedded default), and
        # on an accelerator each other's measurements of the programs they try out.
        with concurrent.futures.ThreadPoolExecutor(
            len(stage.functions) if self._side_by_side else 1
        ) as pool:
            compiling = [
                pool.submit(self._placed.lower(function, batch).compile)
                for function in stage.functions
            ]
        compiled = [one.result() for one in compiling]
        mesh = self._placed.mesh
        count = sum(a.size for a in jax.tree.leaves(self._placed.state.params))
        state = sharding.per_device_bytes(self._placed.state) + sharding.per_device_bytes(
            self._placed.frozen
        )
        self._say(
            f"{stage.name}: {mesh.size} x {mesh.devices.flat[0].device_kind} as data x fsdp = "
            f"{' x '.join(map(str, mesh.devices.shape))}, {count / 1e6:.2f} M parameters, state and frozen networks "
            f"{state / 2**20:.1f} MiB a device, compiled in {time.perf_counter() - begin:.0f} s"
        )
        return compiled


def train(
    stage: Stage, run: config_lib.Run, mesh, workdir, records, say, *, compiled=None, bar=True
):
    """Runs a stage to its end from the newest whole checkpoint and returns its final state.

    compiled: {shapes of a batch: programs} of an earlier stage with the same functions on the same mesh, whose
    arrays alone differ; what is compiled here is added to it. bar: shows progress on stderr.
    Raises Interrupted after saving when asked to stop, UserError when updates stay non-finite.
    """
    check_batch(stage, mesh)
    placed = Placed.on(stage, mesh, say)
    frozen = place(stage.frozen, placed.frozen)
    with Checkpoints(
        f"{workdir}/checkpoints/{stage.name}", keep=run.keep, data=stage.data, say=say
    ) as checkpoints:
        state, done = checkpoints.restore_newest(placed.state)
        window = _Window(checkpoints.beside(done) if state is not None else None)
        if state is None:
            state, done = placed.start(frozen), 0
            _strip(stage, run, workdir, records, done, state)
        else:
            say(f"{stage.name}: resumed from checkpoint at step {done} of {stage.steps}")
        records.rewind(stage.name, done)
        if done >= stage.steps:
            return state
        programs = _Programs(placed, say, {} if compiled is None else compiled, run.quick_compile)
        split = sharding.batch(mesh)
        reader = stage.batches(
            stage.batch, done, stage.steps, jax.process_index(), jax.process_count()
        )
        with _Stop() as stop, reader as batches:
            batch = _global(next(batches), split, stage.batch)
            programs.get(batch)
            progress = records_lib.progress(
                stage.name, done, stage.steps, shown=bar and hosts.primary()
            )
            watch = _Watch(stage.name, run, records, progress, window)
            while done < stage.steps:
                metrics = {}
                for i in range(len(stage.functions)):
                    state, new = programs.get(batch)[i](state, frozen, batch)
                    metrics |= new
                    if done + i + 1 < stage.steps:
                        batch = _global(next(batches), split, stage.batch)
                done += len(stage.functions)
                watch.launched(done, metrics)
                # Before the checkpoint: whoever goes on from it finds every strip up to its step.
                _strip(stage, run, workdir, records, done, state)
                stopping = stop.agreed()
                if done % run.checkpoint_every == 0 or done >= stage.steps or stopping:
                    watch.flush()
                    checkpoints.save(done, state, beside=window.state())
                if stopping:
                    break
            watch.flush()
            progress.close()
            checkpoints.wait()
            # In the last round or during the last save as well: another stage would follow. Twice, for of several processes
            # the first answer is what they had asked for before the save.
            stopping = stopping or stop.agreed() or stop.agreed()
    if stopping:
        raise Interrupted(
            f"{stage.name}: stopped at step {done} of {stage.steps}; the same command goes on from there"
        )
    return state


def check_batch(stage, mesh):
    if stage.batch % mesh.size:
        raise UserError(
            f"{stage.name}: a batch of {stage.batch} does not divide by the {mesh.size} devices of the mesh "
            f"{' x '.join(map(str, mesh.devices.shape))}: change config.{stage.name}.batch, or use fewer devices"
        )


def place(tree, abstract):
    """Host arrays, equal on every process, onto the shardings of `abstract`."""

    def one(array, like):
        if isinstance(array, jax.Array) and array.sharding == like.sharding:
            return array
        array = np.asarray(array)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: array[index])

    return jax.tree.map(one, tree, abstract)


def _global(rows, split, batch):
    return {
        name: jax.make_array_from_process_local_data(split, a, (batch, *a.shape[1:]))
        for name, a in rows.items()
    }


def _strip(stage, run, workdir, records, done, state):
    """Every `strip_every` steps, pictures by the parameters as they are: strips/STAGE_STEP.png.

    Parameters (their average where there is one) are gathered by all processes; process 0 draws and writes.
    """
    if stage.strip is None or not run.strip_every or done % run.strip_every:
        return
    params = hosts.to_host(state_lib.averaged(state))
    if hosts.primary():
        strip = stage.strip(params)
        folder = pathlib.Path(workdir) / names.STRIPS
        folder.mkdir(exist_ok=True)
        image_files.save(folder / f"{stage.name}_{done:07d}.png", strip)
        records.images(done, {f"strip_{stage.name}": strip})


class _Window:
    """Averages what steps say by time (`buckets.by_time`) over the rounds from one row to the next."""

    def __init__(self, state):
        """state: of a checkpoint between two rows, or None."""
        self._rounds, self._sums = state or (0, {})

    def add(self, by_time):
        self._rounds += 1
        for name, values in by_time.items():
            sums = self._sums.get(name, [0.0] * len(values))
            self._sums[name] = [a + float(b) for a, b in zip(sums, values, strict=True)]

    def take(self):
        """{"by_time/NAME/BUCKET": average}; begins anew."""
        rounds, sums = self.state()
        self._rounds, self._sums = 0, {}
        return {
            f"by_time/{name}/{i}": s / rounds
            for name, row in sums.items()
            for i, s in enumerate(row)
        }

    def state(self):
        """For `__init__`, as plain values. A copy: checkpoints are written while training goes on."""
        return [self._rounds, dict(self._sums)]


class _Watch:
    """Looks at metrics one round late: writes rows, moves the bar, stops on lasting non-finite updates."""

    def __init__(self, name, run, records, bar, window):
        self._name, self._run, self._records, self._bar, self._window = (
            name,
            run,
            records,
            bar,
            window,
        )
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
        *in_a_row, in_all = metrics.pop("rejected")
        self._window.add(metrics.pop("by_time", {}))
        if max(in_a_row) >= self._run.max_rejected:
            bad = sorted(
                k.split("/", 1)[1] for k, v in metrics.items() if "/" in k and not np.isfinite(v)
            )
            raise UserError(
                f"{self._name}: {max(in_a_row)} updates in a row were not finite, at step {step} in "
                f"{', '.join(bad) or 'the loss'}; all were dropped. Lower the learning rate, or look at the data"
            )
        self._bar.update(step - self._bar.n)
        if step % self._every == 0:
            self._bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
            self._records.write(
                self._name, step, metrics | self._window.take() | {"rejected": in_all}
            )


class _Stop:
    """Turns SIGTERM and SIGINT into a request while inside. Of several processes one is enough."""

    def __enter__(self):
        self._requested = False
        self._asked = None
        self._old = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _request(self, *_):
        self._requested = True

    def agreed(self) -> bool:
        """Whether to stop after this round: the same answer on every process.

        Of several processes it is what they had asked for a round ago, so that none waits for the answer.
        JAX's own agreement (`reached_preemption_sync_point`) names a step, which rounds of two steps and
        the stages' counts, each from 0, pass by.
        """
        if jax.process_count() == 1:
            return self._requested
        before, self._asked = self._asked, hosts.anywhere(self._requested)
        return before is not None and bool(before)

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

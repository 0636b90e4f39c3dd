"""The one training loop. A stage brings its state, its steps and its batches; the loop brings the
rest.

Order: restore or start, compile and say what was compiled, then rounds. A round is one call of
each step function on consecutive batches, and rows, checkpoints and stops fall between rounds.
Reports of a round are fetched after the next one has been launched, so the device never waits for
the host.
"""

import concurrent.futures
import functools
import pathlib
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from sprint_jax import config as config_lib
from sprint_jax.objectives.base import State
from sprint_jax.storage import image_files, run_files
from sprint_jax.training import hosts, sharding
from sprint_jax.training import records as records_lib
from sprint_jax.training.checkpoints import Checkpoints
from sprint_jax.training.stage import Placed, Say, Stage, check_batch, place
from sprint_jax.training.watch import Interrupted, Stop, Watch, Window


class _Programs:
    """Compiled steps by the shapes of their batch: one set, or one for each aspect ratio."""

    def __init__(self, placed: Placed, say: Say, compiled: dict, side_by_side: bool):
        self.placed, self._say = placed, say
        self._compiled, self._side_by_side = compiled, side_by_side

    def get(self, batch: Mapping[str, jax.Array]) -> list:
        """Return the compiled steps of a round for batches of these shapes."""
        key = tuple((k, a.shape, a.dtype) for k, a in sorted(batch.items()))
        if key not in self._compiled:
            self._compiled[key] = self._compile(batch)
        return self._compiled[key]

    def _compile(self, batch):
        stage, begin = self.placed.stage, time.perf_counter()
        of = f"latents {batch['latent'].shape}" if "latent" in batch else f"{stage.batch} prompts"
        self._say(f"{stage.name}: compiling for {of} (seconds to two minutes, no bar)")
        distinct = list(dict.fromkeys(stage.functions))
        # One compiles while the next is traced. Compiling several at once needs more memory (4.0
        # instead of 2.6 GB for the embedded default) and disturbs autotuning on accelerators.
        workers = len(distinct) if self._side_by_side else 1
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            compiling = [
                pool.submit(self.placed.lower(function, batch).compile) for function in distinct
            ]
        compiled = dict(zip(distinct, (one.result() for one in compiling), strict=True))
        self._say_compiled(time.perf_counter() - begin)
        return [compiled[function] for function in stage.functions]

    def _say_compiled(self, seconds):
        stage, mesh, state = self.placed.stage, self.placed.mesh, self.placed.state
        count = sum(a.size for a in jax.tree.leaves(state.roles[stage.main].params))
        held = sharding.per_device_bytes(state) + sharding.per_device_bytes(self.placed.frozen)
        self._say(
            f"{stage.name}: {mesh.size} x {mesh.devices.flat[0].device_kind} as data x fsdp = "
            f"{' x '.join(map(str, mesh.devices.shape))}, {count / 1e6:.2f} M parameters, state "
            f"and frozen networks {held / 2**20:.1f} MiB a device, compiled in {seconds:.0f} s"
        )


def train(
    stage: Stage,
    run: config_lib.Run,
    mesh: jax.sharding.Mesh,
    workdir: pathlib.Path | str,
    records: Any,
    say: Say,
    *,
    compiled: dict | None = None,
    bar: bool = True,
) -> State:
    """Run a stage to its end from the newest whole checkpoint and return its final state.

    compiled: {shapes of a batch: programs} of an earlier stage with the same functions on the same
    mesh, whose arrays alone differ; what is compiled here is added to it. bar: show progress on
    stderr. Raises Interrupted after saving when asked to stop, UserError when updates stay
    non-finite.
    """
    check_batch(stage, mesh)
    placed = Placed.on(stage, mesh, say)
    frozen = place(stage.frozen, placed.frozen)
    directory = f"{workdir}/checkpoints/{stage.name}"
    with Checkpoints(directory, keep=run.keep, data=stage.data, say=say) as checkpoints:
        state, done = checkpoints.restore_newest(placed.state)
        window = Window(checkpoints.beside(done) if state is not None else None)
        draw = functools.partial(_preview, stage, run, workdir, records)
        if state is None:
            state, done = placed.start(frozen), 0
            draw(done, state)
        else:
            say(f"{stage.name}: resumed from checkpoint at step {done} of {stage.steps}")
        records.rewind(stage.name, done)
        if done >= stage.steps:
            return state
        programs = _Programs(placed, say, {} if compiled is None else compiled, run.quick_compile)
        processes = jax.process_index(), jax.process_count()
        reader = stage.batches(stage.batch, done, stage.steps, *processes)
        with Stop() as stop, reader as rows:
            rounds = _rounds(programs, state, frozen, rows, done)
            next(rounds)  # compiles, so that the bar begins with the first step
            progress = records_lib.progress(
                stage.name, done, stage.steps, shown=bar and hosts.primary()
            )
            watch = Watch(stage, run, records, progress, window)
            stopping = False
            while done < stage.steps and not stopping:
                state, done, reports = next(rounds)
                watch.launched(done, reports)
                # Before saving, so that a resumed run has every preview up to its step.
                draw(done, state)
                stopping = stop.agreed()
                if done % run.checkpoint_every == 0 or done >= stage.steps or stopping:
                    watch.flush()
                    checkpoints.save(done, state, beside=window.state())
            watch.flush()
            progress.close()
            checkpoints.wait()
            # A stop requested during the final round or save must not start the next stage. Twice,
            # because the answer of several processes lags one call.
            stopping = stopping or stop.agreed() or stop.agreed()
    if stopping:
        raise Interrupted(
            f"{stage.name}: stopped at step {done} of {stage.steps}; rerun the same command to "
            f"resume"
        )
    return state


def _rounds(programs: _Programs, state: State, frozen, rows, done: int) -> Iterator[Any]:
    """Compile for the first batch and yield None; then yield (state, steps done, reports) of each
    round.

    The caller must not use a state again once the next round was asked for: steps take its memory
    over.
    """
    stage, split = programs.placed.stage, sharding.batch(programs.placed.mesh)
    batch = _global(next(rows), split, stage.batch)
    programs.get(batch)
    yield None
    while done < stage.steps:
        reports = []
        for i in range(len(stage.functions)):
            state, report = programs.get(batch)[i](state, frozen, batch)
            reports.append(report)
            if done + i + 1 < stage.steps:
                batch = _global(next(rows), split, stage.batch)
        done += len(stage.functions)
        yield state, done, reports


def _global(rows, split, batch):
    return {
        name: jax.make_array_from_process_local_data(split, a, (batch, *a.shape[1:]))
        for name, a in rows.items()
    }


def _preview(stage, run, workdir, records, done, state):
    """Every `preview_every` steps, draw images with the current parameters:
    previews/STAGE_STEP.png.

    All processes gather the parameters (their average where there is one); process 0 draws and
    writes.
    """
    if stage.preview is None or not run.preview_every or done % run.preview_every:
        return
    params = hosts.to_host(stage.result(state))
    if hosts.primary():
        image = stage.preview(params)
        if image is None:
            warnings.warn(
                f"{stage.name}: no preview of step {done}, its images are not finite (NaN or "
                "infinity)",
                stacklevel=1,
            )
            return
        folder = pathlib.Path(workdir) / run_files.PREVIEWS
        folder.mkdir(exist_ok=True)
        image_files.save(folder / f"{stage.name}_{done:07d}.png", image)
        records.images(done, {f"preview_{stage.name}": image})

"""A phase of a run, ready to train: `Stage` on the host, `Placed` on a mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sprint_jax.errors import UserError
from sprint_jax.objectives.base import Batch, Frozen, PyTree, State
from sprint_jax.objectives.step import Step
from sprint_jax.training import sharding

Say = Callable[[str], None]


def silent(message: str) -> None:
    """Ignore a message."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One phase of training, ready for the loop.

    name: in logs, metrics and the checkpoint folder. steps: updates of all roles together. start:
    (frozen, init_arrays) -> `State` at step 0. init_arrays: inputs of `start` alone, freed once
    training starts. functions: the steps of a round, in order; one that comes several times is
    compiled once. labels: a name for each of them, for plans and benchmarks. roles: what each of
    them trains. frozen: arrays that never change. prepare: (frozen, batch as read) -> batch as the
    steps take it, compiled with them. batch: samples of a global batch. batches: (batch, start,
    stop, process, processes) -> context and iterator of this process's rows as NumPy arrays. data:
    names the data set. main: role of the result. result: state -> parameters that the phase ends
    with. preview: parameters -> uint8 [H, W, 3], images of fixed prompts; None where none can be
    drawn.
    """

    name: str
    steps: int
    start: Callable[[Frozen, PyTree], State]
    init_arrays: PyTree
    functions: tuple[Step, ...]
    labels: tuple[str, ...]
    roles: tuple[str, ...]
    frozen: Frozen
    prepare: Callable[[Frozen, Batch], Batch]
    batch: int
    batches: Callable[..., Any]
    data: str
    main: str
    result: Callable[[State], PyTree]
    preview: Callable[[PyTree], np.ndarray | None] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    """A stage on a mesh: abstract state and frozen arrays with their shardings."""

    stage: Stage
    mesh: jax.sharding.Mesh
    state: State
    frozen: Frozen

    @classmethod
    def on(cls, stage: Stage, mesh: jax.sharding.Mesh, say: Say = silent) -> "Placed":
        """Place a stage.

        `say` gets a line for each large array that stays whole on every device.
        """
        frozen, init_arrays = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (stage.frozen, stage.init_arrays)
        )
        state = jax.eval_shape(stage.start, frozen, init_arrays)
        on_mesh = lambda tree: sharding.abstract(tree, sharding.shardings(tree, mesh, say))
        return cls(stage, mesh, on_mesh(state), on_mesh(frozen))

    def start(self, frozen: Frozen) -> State:
        """Make the state at step 0 where it will stay."""
        arrays = self.stage.init_arrays
        abstract = sharding.abstract(arrays, sharding.shardings(arrays, self.mesh))
        out = jax.tree.map(lambda a: a.sharding, self.state)
        return jax.jit(self.stage.start, out_shardings=out)(frozen, place(arrays, abstract))

    def lower(self, function: Step, batch: Mapping[str, Any]) -> jax.stages.Lowered:
        """Lower one step for a batch of abstract global arrays."""

        def step(state, frozen, batch):
            return function(state, frozen, self.stage.prepare(frozen, batch))

        split = sharding.batch(self.mesh)
        arrays = {
            k: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split) for k, a in batch.items()
        }
        out = jax.tree.map(lambda a: a.sharding, self.state), sharding.replicated(self.mesh)
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(step, donate_argnums=0, out_shardings=out)
            return jitted.lower(self.state, self.frozen, arrays)


def check_batch(stage: Stage, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError where the batch does not divide by the devices."""
    if stage.batch % mesh.size:
        raise UserError(
            f"{stage.name}: a batch of {stage.batch} does not divide by the {mesh.size} devices of "
            f"the mesh {' x '.join(map(str, mesh.devices.shape))}: change "
            f"config.phases.{stage.name}.batch, or use fewer devices"
        )


def place(tree: PyTree, abstract: PyTree) -> PyTree:
    """Put host arrays, equal on every process, onto the shardings of `abstract`."""

    def one(array, like):
        if isinstance(array, jax.Array) and array.sharding == like.sharding:
            return array
        array = np.asarray(array)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: array[index])

    return jax.tree.map(one, tree, abstract)

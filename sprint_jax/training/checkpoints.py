"""Orbax checkpoints of a training state: asynchronous, the last few kept, exact on restore."""

import pathlib

import jax
import orbax.checkpoint as ocp

from sprint_jax.errors import UserError


class Checkpoints:
    """Checkpoints of one stage under `directory`. Use as a context; leaving it waits for pending writes."""

    def __init__(self, directory, *, keep):
        self._directory = pathlib.Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        try:
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        except (ValueError, OSError) as error:
            raise UserError(f"{self._directory} cannot hold checkpoints ({_line(error)}): use another --workdir") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.wait_until_finished()
        self._manager.close()

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step, state):
        """Starts writing `state`; returns once its arrays are copied."""
        if step != self.latest():
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))

    def restore(self, step, abstract):
        """The state at `step`, placed as `abstract` (ShapeDtypeStructs with shardings) says."""
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        try:
            restored = self._manager.restore(step, args=arguments)["state"]
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise UserError(
                f"checkpoint {self._directory}/{step} does not fit the config ({_line(error)}): "
                "use the config it was made with, or another --workdir"
            ) from None
        # Through one compiled copy: restored buffers are not always donatable, these are.
        return jax.jit(lambda tree: jax.tree.map(lambda a: a.copy(), tree))(restored)


def _line(error):
    return " ".join(str(error).split())[:300]

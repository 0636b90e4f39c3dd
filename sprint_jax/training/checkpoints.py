"""Orbax checkpoints of a training state: asynchronous, whole or not there, exact on restore,
checked on read.

Beside the arrays a checkpoint holds a fingerprint of each: a sum over its bits that does not
depend on how the array is cut, so that a checkpoint from eight devices is checked as well on two.
One that cannot be read, or whose bits changed, is set aside with a loud message and the one before
it is used.
"""

import functools
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from sprint_jax.errors import UserError
from sprint_jax.storage import digests, files
from sprint_jax.training import hosts

_DAMAGED = "damaged-"


class Checkpoints:
    """Checkpoints of one stage under `directory`.

    Use as a context; leaving it waits for pending writes. data: names the data set and is kept
    beside the state. With the step it is the whole state of the input, whose order depends on
    nothing else.
    """

    def __init__(
        self,
        directory: pathlib.Path | str,
        *,
        keep: int,
        data: str = "",
        say: Callable[[str], None] = lambda message: None,
    ):
        self._directory, self._data, self._say = pathlib.Path(directory).absolute(), data, say
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        try:
            # Register handlers here; otherwise the manager cannot read metadata before its first
            # save or restore.
            handlers = {
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            }
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, item_handlers=handlers
            )
        # Orbax reads files of JSON here, whatever they hold.
        except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
            raise UserError(
                f"{self._directory} cannot hold checkpoints ({_line(error)}): use another --workdir"
            ) from None

    def __enter__(self):
        absl_logging.get_absl_logger().addFilter(_is_news)
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.wait()
            self._manager.close()
        finally:
            absl_logging.get_absl_logger().removeFilter(_is_news)

    def save(self, step: int, state: Any, beside: Any = None) -> None:
        """Start writing `state`; returns once its arrays are copied.

        beside: what the host knows and a resumed run needs, as plain values for JSON.

        Raises UserError when this or the save before it could not be written; earlier checkpoints
        are whole.
        """
        if step == self._manager.latest_step():
            return
        meta = {"fingerprints": fingerprints(state), "data": self._data, "beside": beside}
        meta["digest"] = _digest(meta)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                ),
            )
        except (OSError, ValueError) as error:
            raise self._cannot_write(error) from None

    def wait(self) -> None:
        """Wait until the last save is on disk. Raises UserError when it could not be written."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._cannot_write(error) from None

    def _cannot_write(self, error):
        whole = sorted(int(p.name) for p in files.children(self._directory) if p.name.isdigit())
        last = (
            f"the checkpoint of step {whole[-1]} is whole" if whole else "there is no earlier one"
        )
        return UserError(
            f"cannot write a checkpoint in {self._directory} ({_line(error)}); {last}: free some "
            "disk space and rerun the same command"
        )

    def restore_newest(self, abstract: Any) -> tuple[Any, int]:
        """Restore (state, step) of the newest whole checkpoint; (None, 0) without any.

        abstract: ShapeDtypeStructs with shardings, of any mesh. Damaged checkpoints are renamed
        and skipped. Raises UserError for one that was made with another config.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            self._check_fits(step, abstract)
            state, damage = self._read(step, abstract)
            if damage is None:
                return state, step
            self._set_aside(step, damage)
        return None, 0

    def beside(self, step: int) -> Any:
        """Return what `save` got beside the state of `step`; None where it got nothing."""
        found = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return found["meta"].get("beside")

    def _check_fits(self, step, abstract):
        """Raise UserError for names and shapes other than the config's; ignore unreadable files."""
        try:
            found = self._manager.item_metadata(step)["state"]
            have = {_name(p): tuple(a.shape) for p, a in jax.tree_util.tree_leaves_with_path(found)}
        except Exception:  # damaged beyond its own description, which reading will find
            return
        want = {_name(p): tuple(a.shape) for p, a in jax.tree_util.tree_leaves_with_path(abstract)}
        differing = sorted(
            name for name in have.keys() | want.keys() if have.get(name) != want.get(name)
        )
        if have and differing:
            name = differing[0]
            raise UserError(
                f"checkpoint {self._directory}/{step} does not fit the config: {name} is "
                f"{have.get(name, 'missing')} there and {want.get(name, 'unknown')} here; use the "
                "config it was made with, or another --workdir"
            )

    def _read(self, step, abstract):
        """Return (state, None), or (None, what is wrong with it); the same on every process."""
        damage = state = None
        try:
            state, meta = self._restore_alone(step, abstract)
            saved, data = _checked(meta)["fingerprints"], meta["data"]
        except MemoryError:
            raise
        except PermissionError as error:
            raise UserError(
                f"cannot read checkpoint {self._directory}/{step} ({error.strerror}): make it "
                f"readable"
            ) from None
        except Exception as error:  # whatever a library raises over a damaged file
            if "RESOURCE_EXHAUSTED" in str(
                error
            ):  # the device is too small, the file is not to blame
                raise
            damage = _line(error)
        # Before anything that processes do together: one that could not read takes no part in it.
        if hosts.any_true(damage is not None):
            return None, damage or "another process cannot read it"
        self._check_data(step, data)
        # Through one compiled copy: restored buffers are not always donatable, these are.
        placed = jax.tree.map(lambda a: a.sharding, abstract)
        state = jax.jit(lambda tree: jax.tree.map(lambda a: a.copy(), tree), out_shardings=placed)(
            state
        )
        now = fingerprints(state)
        changed = [name for name in saved if now.get(name) != saved[name]]
        return (None, f"{changed[0]} changed on disk") if changed else (state, None)

    def _restore_alone(self, step, abstract):
        """Return (state, what is beside it) as this process reads them.

        By the handlers, because the manager waits for all processes.
        """
        folder: Any = self._directory / str(step)  # Orbax wants its own kind of path
        state = ocp.StandardCheckpointHandler().restore(
            folder / "state", args=ocp.args.StandardRestore(abstract)
        )
        return state, ocp.JsonCheckpointHandler().restore(
            folder / "meta", args=ocp.args.JsonRestore()
        )

    def _free(self, name):
        """Return a path of that name, numbered if taken: a step can be damaged more than once."""
        paths = [self._directory / name, *(self._directory / f"{name}-{i}" for i in range(2, 100))]
        return next(path for path in paths if not path.exists())

    def _check_data(self, step, data):
        if data != self._data:
            raise UserError(
                f"checkpoint {self._directory}/{step} was made from {data}, the config now reads "
                f"{self._data}: use the same data, or another --workdir"
            )

    def _set_aside(self, step, damage):
        kept = self._free(f"{_DAMAGED}{step}")
        self._say(
            f"WARNING: checkpoint {self._directory}/{step} is damaged ({damage}); kept as "
            f"{kept.name}, going back to the one before"
        )
        if hosts.primary():
            (self._directory / str(step)).rename(kept)
        hosts.barrier(f"set aside {step}")
        self._manager.reload()


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a record of the log is shown.

    Each of Orbax's threads logs an error of writing with its traceback, 300 lines in all, and then
    raises it: the one line of `_cannot_write` says it.
    """
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def fingerprints(state: Any) -> dict[str, int]:
    """Return {name: sum over the array of bits x (2 position + 1), modulo 2^32}.

    Any changed bit changes it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(hosts.to_host(_fingerprints(state)))
    return {_name(path): int(number) for path, number in leaves}


@jax.jit  # one function for all saves: traced once a state, which takes a second
def _fingerprints(tree):
    return jax.tree.map(_fingerprint, tree)


def _fingerprint(a):
    bits = jax.lax.bitcast_convert_type(
        a, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
    )
    position = jnp.zeros(a.shape, jnp.uint32)
    for axis, size in enumerate(a.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * position + 1), dtype=jnp.uint32)


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _digest(meta: dict[str, Any]) -> str:
    """Return a hash of what is beside a state, without that hash."""
    rest = {name: value for name, value in meta.items() if name != "digest"}
    return digests.hash_text(json.dumps(rest, sort_keys=True))


def _checked(meta: Any) -> dict[str, Any]:
    """Return what is beside a state. Raises ValueError if it changed on disk."""
    if not isinstance(meta, dict) or meta.get("digest") != _digest(meta):
        raise ValueError("what is kept beside the state changed on disk")
    return meta


def _line(error):
    return " ".join(str(error).split())[:300]


def read_part(
    directory: pathlib.Path | str, part: tuple[str, ...], abstract: Any
) -> tuple[int, Any]:
    """Return (step, NumPy tree) of one part of the newest checkpoint that holds it whole, by any
    number of devices.

    part: names from the state down, as ("roles", "student", "ema"). abstract: its shapes. Raises
    UserError where there is none.
    """
    reasons: list[str] = []
    for found in _parts(directory, part, abstract, reasons):
        return found
    raise UserError(
        f"no whole checkpoint with {'/'.join(part)} in {directory} "
        f"({'; '.join(reasons) or 'it holds none'})"
    )


def read_parts(
    directory: pathlib.Path | str, part: tuple[str, ...], abstract: Any
) -> list[tuple[int, Any]]:
    """Return what `read_part` returns for every checkpoint, the oldest first.

    Raises UserError for one that is damaged.
    """
    reasons: list[str] = []
    found = list(_parts(directory, part, abstract, reasons))
    if reasons:
        raise UserError(f"{directory} has a damaged checkpoint ({reasons[0]}): remove it")
    return found[::-1]


def _parts(directory, part, abstract, reasons):
    """Yield (step, NumPy tree) of whole checkpoints, the newest first; tell why of the others."""
    directory = pathlib.Path(directory).absolute()
    steps = sorted((int(p.name) for p in directory.glob("*") if p.name.isdigit()), reverse=True)
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    wanted = abstract
    for name in reversed(part):
        wanted = {name: wanted}
    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    state = ocp.args.PyTreeRestore(wanted, restore_args=plain, partial_restore=True)
    for step in steps:
        with ocp.CheckpointManager(directory, item_handlers=handlers) as manager:
            try:
                found = manager.restore(
                    step, args=ocp.args.Composite(state=state, meta=ocp.args.JsonRestore())
                )
                saved = _checked(found["meta"])["fingerprints"]
            except Exception as error:  # whatever a library raises over a damaged file
                reasons.append(f"step {step}: {_line(error)}")
                continue
        now = fingerprints(found["state"])
        changed = [name for name, number in now.items() if saved.get(name) != number]
        if changed:
            reasons.append(f"step {step}: {changed[0]} changed on disk")
        else:
            yield step, functools.reduce(lambda tree, name: tree[name], part, found["state"])

"""Stored rollouts of a run: made once before the first phase that reads them, shard by shard.

A shard is a pure function of the teacher, the settings and its number, so an interrupted run
resumes by shard, bit for bit. Every process makes whole shards on its own devices.
"""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from sprint_jax import config as config_lib
from sprint_jax.data import pairs
from sprint_jax.data.protocols import Batch
from sprint_jax.errors import UserError
from sprint_jax.objectives import guided, rollouts
from sprint_jax.objectives.base import Frozen, Networks, PyTree
from sprint_jax.storage import run_files
from sprint_jax.training import hosts, sharding, stages
from sprint_jax.training.stage import Say, Stage

FOLDER = run_files.PAIRS
SHARD = 1024  # rollouts, rounded to whole batches
_CAPTIONS = ("mask", "text", "tokens", "control")


def feed(
    stage: Stage, c: config_lib.Config, data: Any, teacher: PyTree, workdir: pathlib.Path, say: Say
) -> Stage:
    """Return a stage whose batches are stored rollouts; make those that are missing.

    stage: of an objective that reads them. data: the data set of the run, whose captions they are
    of. Raises UserError for a disk that is too small, rollouts of something else, and rollouts that
    are not finite.
    """
    if len(data.sizes) > 1:
        shown = ", ".join(f"{height}x{width}" for height, width in data.sizes)
        raise UserError(
            f"config.phases.{stage.name}.objective.stored: the data have latents of {shown} and "
            "stored rollouts need one size, set it to 0 (new rollouts in every update)"
        )
    # The first phase that reads them describes them: all others agree (`config.parse`).
    first = next(n for n in config_lib.active(c) if c.phases[n].objective.needs().stored)
    maker = _maker(c, c.phases[first], data, teacher)
    folder = workdir / FOLDER
    if hosts.primary():
        pairs.KEEPER.claim(folder, maker.described)
    hosts.barrier("pairs")
    _make(maker, folder, say)
    hosts.barrier("pairs made")
    read = pairs.Pairs(folder, maker.shards)
    seed = c.seed + c.phases[stage.name].seed

    def batches(batch: int, start: int, stop: int, process: int, processes: int):
        return read.batches(batch, start, stop, process, processes, seed=seed)

    identity = f"{len(read)} rollouts of {data.identity}, {maker.described['teacher']}"
    return dataclasses.replace(stage, batches=batches, data=identity)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Maker:
    """How the shards of a run are made.

    settings: of the first objective that reads them. batch: rollouts at a time. described: what
    decides their content.
    """

    settings: rollouts.RolloutTerm
    networks: Networks
    frozen: Frozen
    data: Any
    batch: int
    seed: int
    described: dict[str, Any]

    @property
    def per_shard(self) -> int:
        """Batches of a whole shard."""
        return max(1, SHARD // self.batch)

    @property
    def shards(self) -> int:
        """Shards of all rollouts."""
        return math.ceil(self.settings.stored / (self.batch * self.per_shard))

    def steps(self, shard: int) -> range:
        """Return the numbers of the shard's batches."""
        last = self.settings.stored // self.batch
        return range(shard * self.per_shard, min(last, (shard + 1) * self.per_shard))


def _maker(c, phase, data, teacher) -> _Maker:
    s, seed = phase.objective, c.seed + phase.seed
    described = {
        "teacher": _digest(teacher),
        "data": data.identity,
        "batch": phase.batch,
        "seed": seed,
        "data_seed": c.data.seed,
    } | {name: getattr(s, name) for name in rollouts.CONTENT}
    return _Maker(
        settings=s,
        networks=stages.networks(c, phase),
        frozen=data.frozen.replace(teacher=teacher),
        data=data,
        batch=phase.batch,
        seed=seed,
        described=described,
    )


def _digest(tree: PyTree) -> str:
    """Name parameters by what they hold."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.ascontiguousarray(leaf).data)
    return f"weights {found.hexdigest()[:16]}"


def _make(maker: _Maker, folder: pathlib.Path, say: Say) -> None:
    """Make this process's share of the shards that are missing."""
    mine = range(jax.process_index(), maker.shards, jax.process_count())
    missing = [i for i in mine if not pairs.shard(folder, i).exists()]
    if not missing:
        say(f"{FOLDER}: done before, {folder}")
        return
    total = sum(len(maker.steps(i)) for i in missing) * maker.batch
    say(f"{FOLDER}: {total} rollouts of the teacher into {folder} (compiles first)")
    roll = _compiled(maker)
    with tqdm.tqdm(
        total=total, desc=FOLDER, unit="rollout", mininterval=1.0, disable=not hosts.primary()
    ) as bar:
        for i in missing:
            rows = list(_shard(maker, roll, i, folder, total, bar))
            stacked = {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}
            pairs.write_shard(pairs.shard(folder, i), stacked)


def _shard(maker, roll, number, folder, total, bar) -> Iterator[Batch]:
    """Yield the rows of each batch of a shard."""
    steps = maker.steps(number)
    with maker.data.batches(maker.batch, steps.start, steps.stop, 0, 1) as batches:
        for step, batch in zip(steps, batches, strict=True):
            rows = {name: batch[name] for name in _CAPTIONS if name in batch} | roll(step, batch)
            if not np.isfinite(rows["nodes"]).all():
                raise UserError(
                    f"{FOLDER}: rollouts of batch {step} are not finite: look at the teacher, "
                    "config.teacher.pretrained"
                )
            if bar.n == 0:
                pairs.check_room(folder, total, rows)
            bar.update(maker.batch)
            yield rows


def _compiled(maker: _Maker) -> Callable[[int, Batch], Batch]:
    """Return (number of a batch, its rows) -> nodes, scales and dropped conditions, on the host."""
    local = jax.local_devices()
    mesh = sharding.mesh(-1, 1, local if maker.batch % len(local) == 0 else local[:1])
    split, whole = sharding.batch(mesh), sharding.replicated(mesh)
    frozen = jax.device_put(maker.frozen, whole)

    @jax.jit
    def roll(frozen, step, batch):
        key = jax.random.fold_in(jax.random.key(maker.seed), step)
        keys, shared = guided.draw(maker.settings, key, maker.data.prepare(frozen, batch))
        draws = shared | {"z": jax.random.normal(keys[0], shared["x0"].shape)}
        nodes = rollouts.roll_out(maker.settings, maker.networks, frozen, draws)
        made = {"nodes": nodes.astype(jnp.float16), "w": shared["w"]}
        scale = shared["cond"].get("control_scale")
        return made if scale is None else made | {"control_scale": scale}

    def run(step: int, batch: Batch) -> Batch:
        placed = jax.device_put(batch, split)
        return jax.device_get(roll(frozen, np.uint32(step), placed))

    return run

"""Stored rollouts: what a shard holds, how it is made and read, and when it is refused."""

import dataclasses
import functools
import itertools
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.arrays import normals
from helpers.configs import card
from sprint_jax import build, config
from sprint_jax.data import pairs as storage
from sprint_jax.diffusion import flow, samplers
from sprint_jax.errors import UserError
from sprint_jax.objectives import rollouts
from sprint_jax.training import datasets, pairs, stages

STORED, BATCH = 24, 4


def tree(**changes):
    """Return a narrow card whose two student phases read the same stored rollouts."""
    tree = card(preset="shapes")
    tree.model.update(width=16, depth=1, heads=2, cross_heads=2, unroll=1)
    for name in ("regression", "repair"):
        tree.phases[name].batch = BATCH
        tree.phases[name].objective.update(stored=STORED, route_steps=3, guidance=(1.25, 2.0))
    tree.phases.regression.objective.update(changes)
    return tree


@functools.cache
def parsed():
    return config.parse(tree())


@functools.cache
def teacher():
    shapes = jax.eval_shape(build.teacher(parsed()).init, jax.random.key(0))
    leaves, kind = jax.tree.flatten(shapes)
    moved = [0.2 * normals(*a.shape, seed=i) for i, a in enumerate(leaves)]
    return jax.tree.unflatten(kind, moved)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of 8 rollouts: three of them."""
    monkeypatch.setattr(pairs, "SHARD", 8)


def feed(folder, c=None, name="regression", weights=None, data=None):
    """Return the fed stage of a phase, with what was said."""
    c, said = c or parsed(), []
    data = data or datasets.Shapes(c)
    weights = weights or teacher()
    stage = stages.make(c, name, data, teacher=weights)
    return pairs.feed(stage, c, data, weights, folder, said.append), said


def content(folder):
    """Return {file below the folder: its bytes}."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.npy")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A work directory with all shards."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "SHARD", 8)
        feed(folder)
    return folder


def test_shards_hold_rollouts_of_the_guided_teacher(made):
    """Second order, written out here. Fails without guidance, or with another row's caption."""
    c, rows = parsed(), storage.Pairs(made / pairs.FOLDER, 3).read(range(STORED))
    with datasets.Shapes(c).batches(BATCH, 0, STORED // BATCH, 0, 1) as batches:
        read = list(batches)
    text = np.concatenate([b["text"] for b in read])
    mask = np.concatenate([b["mask"] for b in read])
    np.testing.assert_array_equal(rows["text"], text)
    np.testing.assert_array_equal(rows["mask"], mask)
    assert set(rows["w"]) == {1.25, 2.0}
    model = build.teacher(c)
    null = np.broadcast_to(datasets.Shapes(c).frozen.null_text, text.shape)

    @jax.jit
    def v(x, s):
        t = jnp.full(len(x), s)
        uncond = model.apply(teacher(), x, t, text=null, mask=mask).velocity
        return flow.guided(
            uncond, model.apply(teacher(), x, t, text=text, mask=mask).velocity, rows["w"]
        )

    nodes = rows["nodes"].astype(np.float32)
    x, before = nodes[:, 0], None
    assert abs(x.std() - 1) < 0.02 and abs(np.corrcoef(x[0].ravel(), x[1].ravel())[0, 1]) < 0.2
    for i, (s, t) in enumerate(itertools.pairwise(samplers.flow_times(3, 2.0)), 1):
        now, d = v(x, s), s - t
        slope = now if before is None else now + d / (2 * before[1]) * (now - before[0])
        x, before = x - d * slope, (now, d)
        # Half precision of a state moves the ones after it.
        np.testing.assert_allclose(nodes[:, i], x, atol=4e-3)
    assert len({noise.tobytes() for noise in rows["nodes"][:, 0]}) == STORED  # none is drawn twice
    assert rows["nodes"].dtype == np.float16
    np.testing.assert_array_equal(rows["latent"], nodes[:, -1])


def test_an_interrupted_set_resumes_bit_for_bit(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    lost = storage.shard(tmp_path / pairs.FOLDER, 1)
    shutil.rmtree(lost)
    other = storage.shard(tmp_path / pairs.FOLDER, 2) / "nodes.npy"
    before = other.stat().st_mtime_ns
    lost.with_name(lost.name + ".partial").mkdir()  # of a process that was killed
    _, said = feed(tmp_path)
    assert said[0].startswith("pairs: 8 rollouts")
    assert content(tmp_path) == content(made)
    assert other.stat().st_mtime_ns == before
    assert feed(tmp_path)[1] == [f"pairs: done before, {tmp_path / pairs.FOLDER}"]


def test_processes_share_the_shards(made, tmp_path, monkeypatch):
    """Each makes its own, and all together are those of one process to the bit."""
    maker = lambda: pairs._maker(
        parsed(), parsed().phases["regression"], datasets.Shapes(parsed()), teacher()
    )
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process, count in ((0, 2), (1, 1)):
        monkeypatch.setattr(jax, "process_index", lambda p=process: p)
        before = len(list(tmp_path.glob("shard-*")))
        pairs._make(maker(), tmp_path, str)
        assert len(list(tmp_path.glob("shard-*"))) - before == count
    assert content(tmp_path) == content(made / pairs.FOLDER)


def read(made, batch, start, stop, process=0, processes=1, seed=0):
    rows = storage.Pairs(made / pairs.FOLDER, 3)
    with rows.batches(batch, start, stop, process, processes, seed=seed) as batches:
        return [b["nodes"] for b in batches]


def test_an_epoch_reads_every_row_once(made):
    rows = np.concatenate(read(made, 8, 0, 6))
    key = lambda part: sorted(r.tobytes() for r in part)
    everything = key(storage.Pairs(made / pairs.FOLDER, 3).read(range(STORED))["nodes"])
    assert key(rows[:STORED]) == key(rows[STORED:]) == everything
    assert not np.array_equal(rows[:STORED], rows[STORED:])
    assert not np.array_equal(rows, np.concatenate(read(made, 8, 0, 6, seed=1)))


def test_processes_and_a_resumed_run_read_the_same_rows(made):
    """Over the end of an epoch: batches of 16 of 24 rows."""
    whole = read(made, 16, 0, 4)
    parts = [read(made, 16, 0, 4, process, 2) for process in range(2)]
    for step, rows in enumerate(whole):
        np.testing.assert_array_equal(rows, np.concatenate([p[step] for p in parts]))
    np.testing.assert_array_equal(whole[2:], read(made, 16, 2, 4))


def test_both_phases_read_one_set(made):
    stage, said = feed(made, name="repair")
    assert said == [f"pairs: done before, {made / pairs.FOLDER}"]
    assert stage.data.startswith("24 rollouts of drawn shapes, weights ")


def test_the_loss_of_stored_rollouts(made):
    """One point of each: its noise with probability p, else an inner state."""
    c = parsed()
    stage, _ = feed(made)
    with stage.batches(BATCH, 0, 1, 0, 1) as batches:
        batch = next(batches)
    settings = dataclasses.replace(c.phases["regression"].objective, from_noise=0.5)
    networks = stages.networks(c, c.phases["regression"])
    update = settings.objective(networks).updates["student"]
    draws = update.draw(jax.random.key(3), batch, stage.frozen)
    j = np.asarray(draws["j"])
    assert 0 in j and j.max() > 0
    model, params = networks.trained, networks.trained.init(jax.random.key(1))
    loss, _ = update.loss(params, draws, None, stage.frozen)
    times, nodes = samplers.flow_times(3, 2.0), batch["nodes"].astype(np.float32)
    x, t = nodes[np.arange(BATCH), j], jnp.asarray(times[j])
    cond = {"text": batch["text"], "mask": batch["mask"], "guidance": batch["w"]}
    end = x - t[:, None, None, None] * model.apply(params, x, t, **cond).velocity
    wanted = jnp.sqrt(jnp.square(end - nodes[:, -1]).mean((1, 2, 3)) + 0.01) - 0.1
    np.testing.assert_allclose(loss, wanted.mean(), rtol=1e-5)


def test_the_share_from_the_noise():
    settings = parsed().phases["regression"].objective
    many = 4000
    shared = {"x0": np.zeros((many, 1)), "cond": {}, "w": None, "nodes": None}
    j = np.asarray(rollouts.draw(settings, jax.random.key(0), shared)["j"])
    assert abs((j == 0).mean() - 0.7) < 0.02
    assert abs((j == 1).mean() - 0.15) < 0.02 and set(j) == {0, 1, 2}


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="GiB for 24 stored rollouts .* has 0.00 GiB"):
        feed(tmp_path)
    assert not list((tmp_path / pairs.FOLDER).glob("shard*"))


def test_rollouts_of_another_teacher_are_refused(made):
    moved = jax.tree.map(lambda a: a + 1, teacher())
    with pytest.raises(UserError, match="holds rollouts of teacher=weights .*: remove it"):
        feed(made, weights=moved)


def test_a_teacher_that_is_not_finite_is_named(tmp_path):
    broken = jax.tree.map(lambda a: a * np.float32(np.nan), teacher())
    with pytest.raises(UserError, match="batch 0 are not finite"):
        feed(tmp_path, weights=broken)
    assert not list((tmp_path / pairs.FOLDER).glob("shard*"))


@pytest.mark.parametrize("damage", ["cut", "missing", "other length"])
def test_a_damaged_shard_is_named(made, tmp_path, damage):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    file = storage.shard(tmp_path / pairs.FOLDER, 2) / "nodes.npy"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "missing":
        file.unlink()
    else:
        np.save(file, np.load(file)[:3])
    with pytest.raises(UserError, match="shard-00002 is damaged .*: remove it, and give the same"):
        feed(tmp_path)


def test_several_latent_sizes_are_refused(tmp_path):
    data = datasets.Shapes(parsed())
    data.sizes = [(4, 4), (2, 8)]
    with pytest.raises(UserError, match="latents of 4x4, 2x8 and stored rollouts need one size"):
        feed(tmp_path, data=data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(route_steps=5), "repair.objective.route_steps 3: phases share .* regression has 5"),
        (dict(guidance=(1.5,)), "repair.objective.guidance"),
        (dict(stored=26), "use a multiple of config.phases.regression.batch 4"),
        (dict(stored=-1), "stored -1: use 0"),
    ],
)
def test_cards_that_do_not_agree(changes, words):
    changed = tree(**changes)
    if changes.get("stored", 0) > 0:
        changed.phases.repair.objective.update(changes)
    with pytest.raises(UserError, match=words):
        config.parse(changed)


def test_one_phase_may_store_and_another_not():
    parsed = config.parse(tree(stored=0, route_steps=5))
    assert parsed.phases["regression"].objective.stored == 0

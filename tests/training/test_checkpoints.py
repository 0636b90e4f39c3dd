"""Checkpoints: exact on any mesh, damage is detected, a full disk is survived."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.runs import ROOT, run_on_devices
from sprint_jax.errors import UserError
from sprint_jax.training.checkpoints import Checkpoints, fingerprints


def tree(step):
    """Return leaves of several kinds, with other values at each step."""
    key = jax.random.fold_in(jax.random.key(0), step)
    w = jax.random.normal(key, (64, 48))
    return {"w": w, "half": w[:8].astype(jnp.bfloat16), "step": jnp.int32(step)}


def abstract(like):
    """Return the shapes of a tree on one device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), like)


def assert_equal(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def folder(tmp_path):
    """Return a checkpoint folder with steps 4 and 8."""
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        checkpoints.save(4, tree(4))
        checkpoints.save(8, tree(8))
    return tmp_path / "c"


def data_files(checkpoint):
    """Return the files that hold arrays, the largest last."""
    files = [p for p in (checkpoint / "state").rglob("*") if p.is_file() and "/d/" in str(p)]
    return sorted(files, key=lambda p: p.stat().st_size)


def change_what_is_beside(checkpoint):
    """Write other statistics beside the state, which would end a resumed run."""
    path = checkpoint / "meta" / "metadata"
    path.write_text(path.read_text().replace('"beside": null', '"beside": [3]'))
    assert "[3]" in path.read_text()


def flip_bit(checkpoint):
    """Flip one bit in the middle of the largest file."""
    path = data_files(checkpoint)[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(checkpoint):
    """Cut the largest file in half."""
    path = data_files(checkpoint)[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_metadata(checkpoint):
    """Remove the metadata of the arrays."""
    for name in ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"):
        for path in checkpoint.rglob(name):
            path.unlink()


def remove_fingerprints(checkpoint):
    """Remove the fingerprints."""
    for path in (checkpoint / "meta").iterdir():
        path.unlink()


def remove_all_files(checkpoint):
    """Leave an empty folder."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.unlink()


def restore(folder, said=None, like=None):
    """Return (state, step) of the newest intact checkpoint."""
    with Checkpoints(folder, keep=2, say=(said if said is not None else []).append) as checkpoints:
        return checkpoints.restore_newest(abstract(like or tree(0)))


def test_the_newest_is_restored(folder):
    said = []
    state, step = restore(folder, said)
    assert step == 8 and not said
    assert_equal(state, tree(8))
    assert restore(folder.parent / "other") == (None, 0)


@pytest.mark.parametrize(
    "damage",
    [
        flip_bit,
        truncate,
        remove_metadata,
        remove_fingerprints,
        remove_all_files,
        change_what_is_beside,
    ],
)
def test_damage_is_reported_and_the_previous_step_used(folder, damage):
    """Training continues: the same step is saved anew and may be damaged once more."""
    for kept in ("damaged-8", "damaged-8-2"):
        damage(folder / "8")
        said = []
        with Checkpoints(folder, keep=2, say=said.append) as checkpoints:
            state, step = checkpoints.restore_newest(abstract(tree(0)))
            assert step == 4
            assert_equal(state, tree(4))
            assert len(said) == 1
            assert "WARNING" in said[0]
            assert f"{folder}/8 is damaged" in said[0]
            assert kept in said[0]
            assert (folder / kept).is_dir() and not (folder / "8").exists()
            checkpoints.save(8, tree(8))
        state, step = restore(folder)
        assert step == 8
        assert_equal(state, tree(8))


def test_fingerprints_find_changed_bits(folder, monkeypatch):
    """They detect arrays that read without error but are not those that were written."""
    from sprint_jax.training import checkpoints as module

    real = module.fingerprints
    monkeypatch.setattr(
        module, "fingerprints", lambda state: real(state | {"w": state["w"].at[3, 5].add(1e-6)})
    )
    with Checkpoints(folder, keep=3) as checkpoints:
        checkpoints.save(12, tree(12))
    monkeypatch.undo()
    said = []
    assert restore(folder, said)[1] == 8
    assert "w changed on disk" in said[0]


def test_after_a_failed_read_no_collective_follows(folder, monkeypatch):
    """Another process failed, so nothing collective may follow: it would hang, or be taken for that
    of another step.
    """
    from sprint_jax.training import checkpoints as module

    def together(*_):
        raise AssertionError("done by all processes, after one of them had failed")

    answers = iter([True, False])  # of the newest step, then of the previous one
    real = module.fingerprints
    monkeypatch.setattr(module.hosts, "any_true", lambda mine: mine or next(answers))
    monkeypatch.setattr(
        module,
        "fingerprints",
        lambda state: real(state) if next(answers, None) is None else together(),
    )
    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.restore", together)
    said = []
    state, step = restore(folder, said)
    assert step == 4 and "another process cannot read it" in said[0]
    assert_equal(state, tree(4))


def test_all_checkpoints_damaged(folder):
    said = []
    flip_bit(folder / "4"), flip_bit(folder / "8")
    assert restore(folder, said) == (None, 0)
    assert len(said) == 2


@pytest.mark.parametrize("other", [{"w": jnp.zeros((64, 47))}, {"more": jnp.zeros(3)}])
def test_another_shape_is_refused_and_nothing_renamed(folder, other):
    with pytest.raises(UserError, match="does not fit the config"):
        restore(folder, like=tree(0) | other)
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["4", "8"]


def test_other_data_are_refused_and_nothing_renamed(tmp_path):
    """Fails when the data that a checkpoint was made from is not compared."""
    with Checkpoints(tmp_path, keep=2, data="drawn shapes") as checkpoints:
        checkpoints.save(4, tree(4))
    with (
        Checkpoints(tmp_path, keep=2, data="a folder") as checkpoints,
        pytest.raises(
            UserError,
            match="4 was made from drawn shapes, the config now reads a folder: use the same data",
        ),
    ):
        checkpoints.restore_newest(abstract(tree(0)))
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["4"]


def test_restored_buffers_can_be_donated(folder):
    state, _ = restore(folder)
    jax.block_until_ready(
        jax.jit(lambda t: jax.tree.map(lambda a: a * 2, t), donate_argnums=0)(state)
    )
    assert state["w"].is_deleted() and state["half"].is_deleted()


def test_fingerprints_tell_values_apart():
    state = tree(1)
    plain = fingerprints(state)
    assert plain == fingerprints(jax.tree.map(jnp.copy, state))
    swapped = state["w"].at[0, 0].set(state["w"][5, 7]).at[5, 7].set(state["w"][0, 0])
    assert fingerprints({"w": swapped})["w"] != plain["w"]
    for name, kind in (("w", np.uint32), ("half", np.uint16), ("step", np.uint32)):
        for bit in (0, 7, 15):
            bits = np.array(state[name]).view(kind).copy()
            bits.flat[-1] ^= kind(1 << bit)
            changed = jnp.asarray(
                bits.view(np.asarray(state[name]).dtype).reshape(state[name].shape)
            )
            assert fingerprints({name: changed})[name] != plain[name]


FULL = """
import resource, signal, sys
import jax.numpy as jnp
from sprint_jax.runtime import cli
from sprint_jax.training.checkpoints import Checkpoints

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = lambda step: {"w": jnp.arange(2**18, dtype=jnp.float32) * 1.7 + step}
with cli.user_errors(), Checkpoints(sys.argv[1], keep=2) as checkpoints:
    checkpoints.save(4, state(4))
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, resource.RLIM_INFINITY))
    checkpoints.save(8, state(8))
    if sys.argv[2] == "next":  # the error comes with the next save, not at the end
        checkpoints.save(12, state(12))
"""


@pytest.mark.parametrize("moment", ["end", "next"])
def test_full_disk(tmp_path, moment):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", FULL, tmp_path / "c", moment]
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr[-3000:]
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines[:5]
    assert lines[-1].startswith(f"error: cannot write a checkpoint in {tmp_path / 'c'}"), (
        result.stderr[-3000:]
    )
    assert "checkpoint of step 4 is whole" in lines[-1]
    state, step = restore(tmp_path / "c", like={"w": jnp.zeros(2**18)})
    assert step == 4
    assert_equal(state, {"w": jnp.arange(2**18, dtype=jnp.float32) * 1.7 + 4})


# --- other meshes, with simulated devices ---


@pytest.mark.parametrize(
    "counts",
    [pytest.param("2", marks=pytest.mark.slow), pytest.param("1 2 4", marks=pytest.mark.long)],
)
def test_eight_devices_are_restored_on_fewer(tmp_path, counts):
    run_on_devices(
        "helpers.checkpoints_on_devices",
        tmp_path / "c",
        tmp_path / "found.json",
        *counts.split(),
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == counts.split()
    for seen in found.values():
        assert seen["step"] == 1
        assert seen["equal"]
        assert seen["placed"]
        assert seen["fingerprints"]
        for ours, theirs in seen["metrics"].values():
            assert ours == pytest.approx(theirs, rel=1e-5)

"""Rules from names to partitions, and steps whose results on eight devices equal those on one."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from helpers.configs import card
from helpers.runs import run_on_devices
from sprint_jax import build, config
from sprint_jax.errors import UserError
from sprint_jax.models.discriminator import LADDHeads
from sprint_jax.models.linear_dit import SANA_600M, SANA_1600M
from sprint_jax.training import datasets, sharding, stages
from sprint_jax.training.stage import Placed

pytestmark = pytest.mark.second_pass


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return the differences between a 2x4 mesh and one device."""
    out = tmp_path_factory.mktemp("devices") / "found.json"
    run_on_devices("helpers.on_devices", out, "2x4")
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def measured_on_all(tmp_path_factory):
    """Return the differences between all meshes and one device."""
    out = tmp_path_factory.mktemp("devices") / "found.json"
    run_on_devices("helpers.on_devices", out)
    return json.loads(out.read_text())


def assert_equal_to_one_device(found):
    """Assert that metrics and state are within 1e-5 of one device after each step.

    No activation is gathered.
    """
    assert max(found["metrics"]) < 1e-5
    assert max(found["state"]) < 1e-5
    assert found["gathered"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["teacher", "sprint"])
def test_eight_devices_equal_one(measured, stage):
    """Fails when normalization groups follow the devices, when a rule cuts the wrong axis, and when
    a loop runs over samples.
    """
    assert_equal_to_one_device(measured[f"{stage} 2x4"])


def test_state_is_sharded_evenly():
    """Each device holds an eighth and at most 5 % more, optimizers included.

    Fails when the rule for biases or for kernels is dropped.
    """
    c = config.parse(card())
    teacher = jax.eval_shape(build.teacher(c).init, jax.random.key(0))
    stage = stages.make(c, "sprint", datasets.Abstract(c), teacher=teacher)
    state = Placed.on(stage, abstract_mesh(1, 8)).state
    whole = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    assert 1 / 8 <= sharding.per_device_bytes(state) / whole <= 1 / 8 + 0.05


@pytest.mark.long
def test_every_mesh_equals_one_device(measured_on_all):
    assert len(measured_on_all) == 8
    for found in measured_on_all.values():
        assert_equal_to_one_device(found)


def abstract_mesh(data, fsdp):
    """Return a mesh without devices."""
    return jax.sharding.AbstractMesh((data, fsdp), (sharding.DATA, sharding.FSDP))


@pytest.mark.parametrize("size, fsdp", [(SANA_600M, 64), (SANA_1600M, 32)], ids=["600M", "1600M"])
def test_published_sizes_divide(size, fsdp):
    """Each leaf of both networks has a rule or is small; nothing large stays whole."""
    said = []
    tree = jax.eval_shape(size.init, jax.random.key(0))
    heads, spectral = jax.eval_shape(
        LADDHeads(width=size.width, count=4, dtype="bfloat16").init, jax.random.key(0)
    )
    placed = sharding.shardings(
        {"params": tree, "heads": heads, "spectral": spectral}, abstract_mesh(8, fsdp), said.append
    )
    assert not said
    assert placed["params"]["blocks"]["attn1"]["to_qkv"]["kernel"].spec == P(None, "fsdp", None)
    assert placed["heads"]["conv_mid"]["kernel"].spec == P(None, "fsdp", None)
    assert placed["spectral"]["conv_out"]["u"].spec == P()


def test_an_axis_that_does_not_divide_is_named():
    tree = {
        "params": {"blocks": {"attn1": {"kernel": jax.ShapeDtypeStruct((2, 1152, 8), jnp.float32)}}}
    }
    message = r"attn1/kernel .* does not divide by config.mesh.fsdp=256: .* 1152.* 128"
    with pytest.raises(UserError, match=f"params/blocks/{message}"):
        sharding.shardings(tree, abstract_mesh(1, 256))


def test_large_replicated_leaves_are_reported():
    said = []
    tree = {
        "something": jax.ShapeDtypeStruct((4096, 1024), jnp.float32),
        "small": jax.ShapeDtypeStruct((3,), jnp.float32),
    }
    placed = sharding.shardings(tree, abstract_mesh(1, 8), said.append)
    assert placed["something"].spec == P()
    assert len(said) == 1 and "something" in said[0]


def test_mesh_that_does_not_match_the_devices():
    with pytest.raises(UserError, match="3 x 2.*there are 1 devices"):
        sharding.mesh(3, 2, jax.devices()[:1])

"""The planner: its table for a small configuration, its advice, and what it refuses."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from helpers.configs import card
from helpers.runs import TINY_FLAGS
from sprint_jax import build, config
from sprint_jax.errors import UserError
from sprint_jax.planning import gpus, hardware, report
from sprint_jax.training import loop


@pytest.mark.slow
def test_the_table_of_a_small_configuration(command, tmp_path):
    """Parameters, batch and bytes are those of the networks.

    Each of two devices holds half of what is sharded.
    """
    flags = (
        *TINY_FLAGS,
        "--topology=h200:1x2",
        "--config.mesh.fsdp=2",
        "--config.teacher.pretrained=elsewhere",
        "--config.model.attention=pallas",
        f"--table={tmp_path / 'table.md'}",
    )
    result = command("sprint_jax", "plan", *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    table = (tmp_path / "table.md").read_text()
    assert table.strip() in result.stdout
    assert "2 devices as data x fsdp = 1 x 2" in table
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.splitlines()
        if line.startswith("| ")
    ]
    assert [row[0] for row in rows] == ["step", "sprint student", "sprint heads"]
    c = config.parse(card())
    count = sum(
        a.size for a in jax.tree.leaves(jax.eval_shape(build.student(c).init, jax.random.key(0)))
    )
    for row in rows[1:]:
        assert row[1] == str(c.phases["sprint"].batch)
        assert row[2] == f"{count / 1e6:.1f} M"
    exchanged = re.search(r"sprint student (.*); sprint heads", table).group(1)
    assert "all-gather" in exchanged and "Everything fits." in table
    assert "attention is planned in plain JAX" in result.stdout
    # With the compiler of the GPUs if it is installed; otherwise a message says how to get it.
    assert ("compiled ahead of time for it" in table) == gpus.compiler()
    assert (
        ("pip install 'jax[cuda12]'" in result.stdout)
        == ("simulated CPU devices" in table)
        == (not gpus.compiler())
    )


def test_advice_follows_what_is_too_large():
    c = config.parse(card(preset="sana_600m"))
    device = dataclasses.replace(hardware.H200, memory=10 * 2**30)
    unlike = dict(times=1, batch=1, parameters=1, state=1, frozen=1, flops=1.0, collectives={})
    step = report.Step(name="sprint student", temporary=20 * 2**30, held=2**30, **unlike)
    said = report.advice(c, device, step)
    assert "sprint student step needs 21.00 GiB of 10.00 GiB" in said
    assert "--config.phases.sprint.accumulate=2" in said
    assert "fsdp" not in said and "remat" not in said
    without = dataclasses.replace(c, model=dataclasses.replace(c.model, remat="none"))
    assert "--config.model.remat=block" in report.advice(without, device, step)
    held = dataclasses.replace(step, temporary=2**30, held=20 * 2**30)
    assert "a larger --config.mesh.fsdp (now 8)" in report.advice(c, device, held)


def test_a_batch_that_the_mesh_does_not_divide():
    @dataclasses.dataclass
    class Mesh:
        size: int
        devices: np.ndarray

    @dataclasses.dataclass
    class Stage:
        name: str
        batch: int

    with pytest.raises(
        UserError, match="batch of 6 does not divide by the 4 devices of the mesh 2 x 2"
    ):
        loop.check_batch(Stage("sprint", 6), Mesh(4, np.zeros((2, 2))))
    loop.check_batch(Stage("sprint", 8), Mesh(4, np.zeros((2, 2))))


@pytest.mark.parametrize(
    "flags, words",
    [
        ([*TINY_FLAGS], "--topology is missing"),
        ([*TINY_FLAGS, "--topology=h300:8x8"], "h300"),
        ([*TINY_FLAGS, "--topology=h200:8"], "2 positive numbers"),
        ([*TINY_FLAGS, "--topology=h200:1x3"], "batch of 8 does not divide by the 3 devices"),
        (["--topology=h200:1x2"], "--config is missing"),
        ([*TINY_FLAGS, "--topology=h200:1x2", "--table=/tmp"], "--table=/tmp is a folder"),
    ],
)
def test_the_command_refuses(command, flags, words):
    result = command("sprint_jax", "plan", *flags)
    assert "compiling" not in result.stdout
    assert result.returncode == 2, result.stderr[-2000:]
    assert words in result.stderr.strip().splitlines()[-1], result.stderr[-2000:]
    assert "Traceback" not in result.stderr


def test_an_unwritable_table_is_refused_before_compiling(command, tmp_path):
    (tmp_path / "plan.md").write_bytes(b"Zur\xfcck\n")  # Latin-1
    result = command(
        "sprint_jax",
        "plan",
        *TINY_FLAGS,
        "--topology=h200:1x2",
        f"--table={tmp_path / 'plan.md'}",
    )
    assert result.returncode == 2
    assert "compiling" not in result.stdout
    assert "Traceback" not in result.stderr
    assert "cannot read --table=" in result.stderr.strip().splitlines()[-1]
    assert (tmp_path / "plan.md").read_bytes() == b"Zur\xfcck\n"

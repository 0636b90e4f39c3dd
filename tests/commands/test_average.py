"""`sprint-jax average`: the mean of students' weights, and runs that cannot be averaged."""

import json

import jax
import numpy as np
import pytest

from helpers.configs import card
from sprint_jax import build, config
from sprint_jax.errors import UserError
from sprint_jax.sampling import loading
from sprint_jax.storage import weights
from sprint_jax.training import average


def write_run(folder, seed):
    """Write a finished run from a given teacher, with random weights.

    Only the files that the student needs are written.
    """
    tree = card()
    tree.teacher.pretrained = "teacher.safetensors"
    c = config.parse(tree)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict(c)))
    weights.save(folder / "student.safetensors", build.student(c).init(jax.random.key(seed)))
    return folder


def change_config(folder, section, **values):
    """Change values of one section of a run's config. section: keys with dots between."""
    path = folder / "config.json"
    tree = inner = json.loads(path.read_text())
    for key in section.split("."):
        inner = inner[key]
    inner |= values
    path.write_text(json.dumps(tree))
    return folder


def test_weights_are_the_mean_and_the_folder_is_a_model(command, tmp_path):
    """Take three runs.

    Fails when a mean is taken pairwise, when a run is left out, and when the sum is not divided.
    """
    runs = [write_run(tmp_path / str(i), i) for i in range(3)]
    change_config(runs[1], "model", unroll=2, dtype="bfloat16")
    change_config(runs[2], "phases.sprint", steps=14)
    made = tmp_path / "made"
    result = command(
        "sprint_jax", "average", f"--runs={','.join(map(str, runs))}", f"--averaged={made}"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "mean of 3 students" in result.stdout, result.stderr[-2000:]
    each = [weights.flatten(loading.read_student(r)[1]) for r in runs]
    found = weights.flatten(loading.read_student(made)[1])
    for name, value in found.items():
        np.testing.assert_allclose(
            value, np.mean([np.float64(e[name]) for e in each], axis=0), rtol=1e-6, atol=1e-9
        )
    assert loading.read_student(made)[2] == loading.read_student(runs[0])[2]
    before = sorted(p.name for p in made.iterdir())
    again = command("sprint_jax", "average", f"--runs={runs[0]},{runs[1]}", f"--averaged={made}")
    assert again.returncode == 2
    assert "not empty" in again.stderr
    assert "--averaged" in again.stderr
    assert sorted(p.name for p in made.iterdir()) == before


@pytest.mark.parametrize(
    "section, values, message",
    [
        ("teacher", {"pretrained": ""}, "teacher of its own"),
        ("teacher", {"pretrained": "another.safetensors"}, "config.teacher.pretrained"),
        ("model", {"time_scale": 1000.0}, "config.model"),
        ("codec", {"scale": 2.0}, "config.codec"),
    ],
)
def test_refuses_runs_that_have_nothing_in_common(section, values, message, tmp_path):
    first, second = (
        write_run(tmp_path / "a", 0),
        change_config(write_run(tmp_path / "b", 1), section, **values),
    )
    with pytest.raises(UserError, match=message):
        average.average([first, second])


def test_refuses_a_controlnet_trained_in_the_run(tmp_path):
    """Two ControlNets begin from different weights, even with one teacher."""
    runs = [change_config(write_run(tmp_path / str(i), i), "control", depth=1) for i in range(2)]
    for path in runs:
        change_config(path, "phases.control", steps=8)
        c = config.parse(json.loads((path / "config.json").read_text()))
        weights.save(path / "student.safetensors", build.student(c).init(jax.random.key(0)))
    with pytest.raises(UserError, match="ControlNet of its own"):
        average.average(runs)
    for path in runs:
        change_config(path, "control", pretrained="controlnet.safetensors")
    average.average(runs)


def test_names_what_is_missing(command, tmp_path):
    one = command("sprint_jax", "average", f"--runs={tmp_path}", f"--averaged={tmp_path / 'made'}")
    assert one.returncode == 2 and "two or more" in one.stderr
    none = command(
        "sprint_jax",
        "average",
        f"--runs={tmp_path},{tmp_path}",
        f"--averaged={tmp_path / 'made'}",
    )
    assert none.returncode == 2
    assert "no config.json" in none.stderr
    assert not (tmp_path / "made").exists()

"""`sprint-jax average`: the mean of students' weights, and runs that cannot be averaged."""

import json

import jax
import numpy as np
import pytest

from helpers.configs import card
from sprint_jax import __main__ as entry
from sprint_jax import build, config
from sprint_jax.errors import UserError
from sprint_jax.optim import weight_space
from sprint_jax.sampling import loading
from sprint_jax.storage import weights
from sprint_jax.training import average, checkpoints, weight_search


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


def write_checkpoints(folder, count):
    """Write checkpoints of a run's student: its parameters times 1, 2, ... at 10, 20, ..."""
    c = config.parse(json.loads((folder / "config.json").read_text()))
    _, params, _ = loading.read_student(folder)
    ema = bool(c.phases["sprint"].ema)
    with checkpoints.Checkpoints(folder / "checkpoints/sprint", keep=count) as made:
        for i in range(1, count + 1):
            scaled = jax.tree.map(lambda a, i=i: np.float32(i * a), params)
            state = {"roles": {"student": {"ema" if ema else "params": scaled}}}
            made.save(10 * i, state)
            made.wait()
    return params


def test_checkpoints_of_a_run_by_a_profile_and_by_weights(command, tmp_path):
    """Fails when steps and weights are in another order than the checkpoints."""
    run = write_run(tmp_path / "run", 0)
    first = weights.flatten(write_checkpoints(run, 3))
    for option, factor in (
        ("--weights=2,0,-1", 2 * 1 - 3),
        ("--relative=.1", weight_space.profile([10, 20, 30], 0.1) @ [1, 2, 3]),
    ):
        made = tmp_path / option.strip("-").replace("=", "_")
        result = command(
            "sprint_jax", "average", f"--runs={run}", "--checkpoints=sprint", option,
            f"--averaged={made}",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
        assert "weighted sum of 3 checkpoints" in result.stdout
        found = weights.flatten(loading.read_student(made)[1])
        for name, value in found.items():
            np.testing.assert_allclose(value, factor * first[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights=.5,.6"], "they sum to 1.1"),
        (["--relative=.1"], "--checkpoints=PHASE"),
        (["--weights=.5,.5", "--search=2"], "give one of"),
        (["--weights=1"], "1 for 2: give one for each of"),
        (["--search=2"], "config.evaluation.split=heldout, which the search would see"),
        (["--checkpoints=sprint"], "name one run with --checkpoints"),
    ],
)
def test_names_what_is_wrong_with_weights(options, message, tmp_path, capsys):
    runs = [write_run(tmp_path / str(i), i) for i in range(2)]
    arguments = [f"--runs={runs[0]},{runs[1]}", f"--averaged={tmp_path / 'made'}", *options]
    with pytest.raises(SystemExit) as stopped:
        entry.dispatch(["average", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_search_finds_the_good_member(tmp_path, monkeypatch):
    """Two students, a score that is the distance from the first: the search nears it, the winner is
    scored on other prompts, and the mean stands beside it.
    """
    runs = [write_run(tmp_path / str(i), i) for i in range(2)]
    for run in runs:
        change_config(run, "evaluation", split="final")
    members = average.students(runs)
    asked = []

    def scorer(members, prompts, shift):
        def score(found):
            asked.append(shift)
            return float(abs(found[1]))

        return score

    monkeypatch.setattr(weight_search, "_scorer", scorer)
    *winners, plain = weight_search.find(members, rounds=4, prompts=16, seed=0)
    assert abs(winners[0].weights[1]) < 0.01
    assert plain.again == 0.5
    assert asked.count(1) == len(winners) + 1


def test_a_damaged_checkpoint_is_named(tmp_path):
    """Fails when it is left out and the others are combined without a word."""
    run = write_run(tmp_path / "run", 0)
    write_checkpoints(run, 3)
    for path in (run / "checkpoints/sprint/20").rglob("*"):
        if path.is_file() and path.stat().st_size:
            path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(UserError, match="damaged checkpoint .step 20.*remove it"):
        average.checkpoints(run, "sprint")

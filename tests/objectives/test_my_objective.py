"""The example of a method from outside the package, trained by the main command."""

import json
import math

from helpers.runs import ROOT, read_rows
from sprint_jax.sampling import loading

CARD = "examples/my_objective.py"


def test_the_example_trains(finished, command, tmp_path):
    """Its student begins away from the guided teacher, is trained alone, and can be sampled.

    Fails when a role without an optimizer of its own is asked for, and when the run cannot name the
    class in its config.json.
    """
    result = command(
        "sprint_jax.main",
        f"--config={CARD}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.teacher.pretrained={finished / 'teacher.safetensors'}",
        "--config.run.preview_every=0",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = read_rows(tmp_path / "run")
    assert [(row["stage"], row["step"]) for row in rows] == [("sprint", n) for n in range(2, 13, 2)]
    for row in rows:
        assert 0 < row["loss"] < math.inf and 0 < row["grad_norm"] < math.inf
        assert not row.keys() & {"scm", "adv", "disc"}
    objective = json.loads((tmp_path / "run/config.json").read_text())["phases"]["sprint"]
    assert objective["objective"]["kind"] == "examples.my_objective:VelocityRegression"
    assert objective["optimizers"].keys() == {"student"}
    assert "student_1" in json.loads((tmp_path / "run/summary.json").read_text())["scores"]
    assert loading.load(tmp_path / "run") is not None


def test_the_example_is_short():
    assert len((ROOT / CARD).read_text().splitlines()) <= 60

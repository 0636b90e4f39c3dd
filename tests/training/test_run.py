"""The main job end to end at `smoke` size: what it writes, and what interruptions change."""

import dataclasses
import json
import signal
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from helpers.configs import card
from helpers.runs import TINY_FLAGS, read_rows, wait_for_row
from sprint_jax import config
from sprint_jax.errors import UserError
from sprint_jax.toy import checker
from sprint_jax.training import extract, workdirs

pytestmark = pytest.mark.second_pass


def test_a_run_writes_everything(finished):
    for name in ("samples_1", "samples_2", "samples_4", "samples_teacher", "samples_real"):
        assert Image.open(finished / f"{name}.png").size[0] > 200
    summary = json.loads((finished / "summary.json").read_text())
    names = ["real", "teacher_20", "teacher_1", "student_1", "student_2", "student_4"]
    for part in ("scores", "tasks", "frechet"):
        assert list(summary[part]) == names
    assert summary["scores"]["real"] >= 0.99
    assert summary["frechet"]["real"] < 0.5 * summary["frechet"]["teacher_20"]
    assert set(summary["tasks"]["real"]) <= set(checker.TASKS)
    assert summary["seconds"] > 0
    assert summary["peak_memory_bytes"] > 1e8
    assert summary["jax"]


def read_scalars(folder):
    """Return {(tag, step): value} of TensorBoard's files.

    Each record is a length, its checksum, an event and its checksum.
    """
    found = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event, data = event_pb2.Event.FromString(data[12 : 12 + length]), data[16 + length :]
            found |= {
                (v.tag, event.step): v.simple_value
                for v in event.summary.value
                if v.WhichOneof("value") == "simple_value"
            }
    return found


def test_tensorboard_has_the_values_of_the_rows(finished):
    """Sums by time are the exception. Fails when a scalar is written under another name or step."""
    expected = {}
    for row in read_rows(finished):
        shown = {
            k: v
            for k, v in row.items()
            if k not in ("stage", "step") and not k.startswith("by_time/")
        }
        expected |= {(f"{row['stage']}/{k}", row["step"]): np.float32(v) for k, v in shown.items()}
    assert read_scalars(finished / "events") == expected


def test_rows_have_every_step_once(finished):
    steps = {}
    for row in read_rows(finished):
        assert all(np.isfinite(v) for k, v in row.items() if k != "stage")
        steps.setdefault(row["stage"], []).append(row["step"])
    assert steps == {
        "teacher": [2, 4, 6, 8, 10, 12],
        "finetune": [2, 4],
        "sprint": [2, 4, 6, 8, 10, 12],
    }


def test_a_finished_run_does_nothing_again(finished, command):
    before = (finished / "student.safetensors").stat().st_mtime_ns
    result = command("sprint_jax.main", *TINY_FLAGS, f"--workdir={finished}")
    assert result.returncode == 0 and "done before" in result.stdout
    assert (finished / "student.safetensors").stat().st_mtime_ns == before


def test_extract_reads_the_newest_checkpoint(finished, command, tmp_path):
    """Fails when it takes the parameters instead of their average, and when it accepts an
    incomplete checkpoint.
    """
    out = tmp_path / "now" / "student.safetensors"
    result = command("sprint_jax", "extract", f"--run_dir={finished}", f"--to_file={out}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "after 12 steps" in result.stdout, result.stderr[-2000:]
    for name in ("student.safetensors", "config.json"):
        assert (tmp_path / "now" / name).read_bytes() == (finished / name).read_bytes()
    refused = command("sprint_jax", "extract", f"--run_dir={tmp_path}", f"--to_file={out}")
    assert refused.returncode == 2 and "no work directory" in refused.stderr


@pytest.mark.parametrize(
    "name, words",
    [
        ("run/student.safetensors", "trained to its end"),
        ("other/student.safetensors", "another run's"),
    ],
)
def test_extract_leaves_the_run_and_its_config_alone(monkeypatch, tmp_path, name, words):
    """To a run, a student.safetensors of its own means that its training has ended."""
    for folder in ("run", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({"of": folder}))
    with pytest.raises(UserError, match=words):
        extract.check_place(tmp_path / "run", tmp_path / name, drawn=True)
    extract.check_place(tmp_path / "run", tmp_path / "student.safetensors", drawn=True)


def test_a_directory_belongs_to_a_config_once_training_began(tmp_path):
    """A mistyped value does not claim it, and other devices may continue it."""
    c = config.parse(card())
    of = lambda seed, fsdp=1: dataclasses.replace(
        c, seed=seed, mesh=dataclasses.replace(c.mesh, fsdp=fsdp)
    )
    workdirs.write_config(of(1), tmp_path)
    (tmp_path / "events").mkdir()
    workdirs.write_config(of(2), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 2
    (tmp_path / "checkpoints").mkdir()
    workdirs.write_config(of(2, fsdp=4), tmp_path)
    with pytest.raises(UserError, match="was made with config.seed=2, now 3"):
        workdirs.write_config(of(3), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["fsdp"] == 4
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="not empty and not a run"):
        workdirs.write_config(of(3), tmp_path)
    (tmp_path / "theirs").mkdir()
    for foreign in ('{"model_type": "gemma2"}', "[1]", "{"):
        (tmp_path / "theirs/config.json").write_text(foreign)
        with pytest.raises(UserError, match="not a config of this project"):
            workdirs.write_config(of(3), tmp_path / "theirs")
        assert (tmp_path / "theirs/config.json").read_text() == foreign


KILLED = """
    import os, pathlib, time
    from sprint_jax.training.watch import Watch

    launched = Watch.launched

    def killing(watch, step, reports):
        launched(watch, step, reports)
        if (watch._name, step) == ({stage!r}, {step}):
            watch.flush()  # a row that the checkpoint knows nothing of
            while not pathlib.Path({checkpoint!r}).is_dir():
                time.sleep(0.05)
            os.kill(os.getpid(), 9)

    Watch.launched = killing
"""


@pytest.mark.slow
def test_killed_between_checkpoints_then_resumed_is_bit_equal(finished, command, tmp_path):
    """The previews are the same too.

    Fails when the training key ignores the step, when EMA or the state of the optimizer is not
    restored, and when rows are not rewound.
    """
    flags, said = (*TINY_FLAGS, f"--workdir={tmp_path / 'run'}"), ""
    for stage, step, saved in (("teacher", 6, 4), ("sprint", 10, 8)):
        checkpoint = str(tmp_path / "run/checkpoints" / stage / str(saved))
        killed = command(
            "sprint_jax.main",
            *flags,
            before=KILLED.format(stage=stage, step=step, checkpoint=checkpoint),
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
        assert said in killed.stdout and read_rows(tmp_path / "run")[-1]["step"] == step
        said = f"{stage}: resumed from checkpoint at step {saved} of 12"
    result = command("sprint_jax.main", *flags)
    assert result.returncode == 0 and said in result.stdout, result.stderr[-3000:]
    for name in ("teacher.safetensors", "student.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()
    assert read_rows(tmp_path / "run") == read_rows(finished)
    ours, theirs = (
        {p.name: p.read_bytes() for p in (d / "previews").iterdir()}
        for d in (tmp_path / "run", finished)
    )
    assert ours == theirs
    ours, theirs = (
        json.loads((d / "summary.json").read_text()) for d in (tmp_path / "run", finished)
    )
    assert ours["scores"] == theirs["scores"] and ours["frechet"] == theirs["frechet"]


def test_sigterm_saves_and_says_how_to_resume(command, tmp_path):
    flags = (*TINY_FLAGS, f"--workdir={tmp_path / 'run'}", "--config.phases.teacher.steps=4000")
    process = command("sprint_jax.main", *flags, background=True)
    wait_for_row(tmp_path / "run", "teacher", 6, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-2000:]
    assert "rerun the same command to resume" in out
    saved = [
        int(p.name) for p in (tmp_path / "run/checkpoints/teacher").iterdir() if p.name.isdigit()
    ]
    assert read_rows(tmp_path / "run")[-1]["step"] <= max(saved) < 4000


def test_two_runs_in_one_workdir(command, tmp_path):
    flags = (*TINY_FLAGS, f"--workdir={tmp_path / 'run'}", "--config.phases.teacher.steps=4000")
    first = command("sprint_jax.main", *flags, background=True)
    wait_for_row(tmp_path / "run", "teacher", 2, first)
    second = command("sprint_jax.main", *flags)
    first.kill()
    first.wait()
    assert second.returncode == 2 and "another run is working" in second.stderr


def test_sample_depends_on_seed_index_and_prompt_alone(finished, command, tmp_path):
    prompts = ["a red circle", "a blue square above a green triangle", "two white squares"] * 7
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    many = command(
        "sprint_jax",
        "sample",
        f"--model={finished}",
        f"--prompts={tmp_path / 'prompts.txt'}",
        "--steps=3",
        "--seed=5",
        f"--out={tmp_path / 'many'}",
    )
    assert many.returncode == 0, many.stderr
    few = command(
        "sprint_jax",
        "sample",
        f"--model={finished}",
        *(f"--prompt={p}" for p in prompts[:2]),
        "--steps=3",
        "--seed=5",
        f"--out={tmp_path / 'few'}",
    )
    assert few.returncode == 0, few.stderr
    manifest = [
        json.loads(line) for line in (tmp_path / "many/manifest.jsonl").read_text().splitlines()
    ]
    assert [r["prompt"] for r in manifest] == prompts
    assert manifest[0] == {
        "file": "00000.png",
        "prompt": prompts[0],
        "seed": 5,
        "index": 0,
        "steps": 3,
    }
    for i in range(2):
        one, other = (
            np.asarray(Image.open(tmp_path / d / f"{i:05d}.png")) for d in ("many", "few")
        )
        np.testing.assert_array_equal(one, other)
    first, repeated = (np.asarray(Image.open(tmp_path / "many" / f"{i:05d}.png")) for i in (0, 3))
    assert (first != repeated).any()  # same prompt, other index

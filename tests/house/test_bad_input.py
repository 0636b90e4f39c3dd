"""Bad input: one line that names the value and the remedy, a non-zero exit, and no lost files."""

import importlib.util
import json
import re
import shutil

import pytest

from helpers.configs import card
from helpers.runs import TINY_FLAGS, assert_refused
from sprint_jax import config as config_lib
from sprint_jax.errors import UserError
from sprint_jax.runtime import cli
from sprint_jax.sampling import loading
from sprint_jax.training import run, workdirs


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config=configs/sprint.py:nonsense"], ["nonsense", "shapes"]),
        (["--config=configs/absent.py"], ["absent.py"]),
        ([], ["--config"]),
        (
            [*TINY_FLAGS, "--config.phases.sprint.stepz=4"],
            [
                "unknown config key config.phases.sprint.stepz: "
                'Did you mean "steps" instead of "stepz"?'
            ],
        ),
        (
            [*TINY_FLAGS, "--config.phases.sprint.objective.nope=4"],
            ["unknown config key config.phases.sprint.objective.nope: see the config file"],
        ),
        ([*TINY_FLAGS, "--config.nope.steps=4"], ["unknown config key config.nope.steps"]),
        (
            [*TINY_FLAGS, "--config.sprint.steps=4"],
            ["unknown config key config.sprint.steps: it is config.phases.sprint.steps now"],
        ),
        ([*TINY_FLAGS, "--config.phases.sprint.steps=many"], ["steps"]),
        ([*TINY_FLAGS, "--nonsense=1"], ["nonsense"]),
        ([*TINY_FLAGS, "--workdir=/proc/none"], ["/proc/none", "--workdir"]),
        (
            [*TINY_FLAGS, "--config.phases.sprint.steps=3"],
            ["config.phases.sprint.steps", "multiple of 2"],
        ),
        ([*TINY_FLAGS, "--process=1"], ["--coordinator", "--processes"]),
        ([*TINY_FLAGS, "--config.mesh.fsdp=3"], ["config.mesh", "3", "devices"]),
    ],
)
def test_main_refuses(command, flags, words):
    assert_refused(command("sprint_jax.main", *flags), *words)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--prompt=a red circle", "--steps=0"], ["--steps=0: use 1"]),
        (["--prompt="], ["empty"]),
        (["--prompt=" + "a " * 40], ["too long"]),
        (["--prompt=a zebra"], ["zebra", "circle"]),
        ([], ["--prompt"]),
        (["--prompts=/nowhere.txt"], ["/nowhere.txt"]),
        (["--prompt=a circle", "--seed=-1"], ["--seed"]),
        (["--prompt=a circle", "--height=0"], ["--height=0"]),
        (["--prompt=a circle", "--strength=0.5"], ["--strength belongs to --image"]),
        (["--prompt=a circle", "--control_scale=1"], ["--control_scale belongs to --control"]),
        (["--prompt=a circle", "--steps=3", "--schedule=paper"], ["paper", "3"]),
    ],
)
def test_sample_refuses(finished, command, tmp_path, flags, words):
    result = command(
        "sprint_jax", "sample", f"--model={finished}", f"--out={tmp_path / 'out'}", *flags
    )
    assert_refused(result, *words)
    assert not list(tmp_path.glob("out/*.png"))
    assert not (tmp_path / "out/manifest.jsonl").exists()


_PLUGIN = importlib.util.find_spec("jax_cuda12_plugin")
_CUDA = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        _PLUGIN is not None, reason="there is a plug-in for CUDA here, and JAX logs what that says"
    ),
)


@pytest.mark.parametrize("platforms", [_CUDA, "nonsense"])
def test_absent_devices_are_named_by_their_variable(finished, command, tmp_path, platforms):
    for module, flags in (
        (
            "sprint_jax",
            ["sample", f"--model={finished}", "--prompt=a circle", f"--out={tmp_path}"],
        ),
        ("sprint_jax.main", [*TINY_FLAGS, f"--workdir={tmp_path / 'run'}"]),
    ):
        assert_refused(
            command(module, *flags, environment={"JAX_PLATFORMS": platforms}),
            f"JAX_PLATFORMS={platforms}",
            "cpu",
        )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 69017779152 bytes."),
        MemoryError("Unable to allocate 1 TiB"),
    ],
)
def test_no_memory_is_one_line_with_a_remedy(capsys, error):
    with pytest.raises(SystemExit), cli.user_errors():
        raise error
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(
        word in line for word in ("error: out of memory", str(error), "--batch_size=1", "--tile")
    )


def test_a_missing_package_is_one_line_with_its_extra(capsys):
    with pytest.raises(SystemExit), cli.user_errors():
        raise ModuleNotFoundError("No module named 'grain'", name="grain")
    line = capsys.readouterr().err
    assert line == "error: the package grain is not installed: pip install 'sprint_jax[data]'\n"
    with pytest.raises(ModuleNotFoundError), cli.user_errors():
        raise ModuleNotFoundError("No module named 'sprint_jax.typo'", name="sprint_jax.typo")


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="^a mistake$"), cli.user_errors():
        raise RuntimeError("a mistake")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--to_file={tmp}"], ["--to_file=", "is a folder"]),
        (["--to_file=/proc/q.safetensors"], ["/proc/q.safetensors"]),
        (["--to_file=/proc/none/q.safetensors"], ["/proc/none/q.safetensors"]),
        (
            ["--to_file={tmp}/a.safetensors", "--stage=control"],
            ["--stage=control", "teacher, finetune, sprint"],
        ),
    ],
)
def test_extract_refuses(finished, command, tmp_path, flags, words):
    assert_refused(
        command(
            "sprint_jax",
            "extract",
            f"--run_dir={finished}",
            *(flag.format(tmp=tmp_path) for flag in flags),
        ),
        *words,
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "module, flags",
    [
        ("experiments.ablations", "workdir suite"),
        ("experiments.emoji", "to_dir font"),
        ("benchmarks", "suite no_peers"),
        ("sprint_jax.main", "config workdir processes"),
    ],
)
def test_help_shows_the_flags_of_a_program(command, module, flags):
    shown = command(module, "--help").stdout
    first = r"^(?:│? *)--{}\b"  # of its line, in absl's help and in tyro's
    assert [f for f in flags.split() if not re.search(first.format(f), shown, re.M)] == []


def test_fit_codec_refuses_a_folder(command, tmp_path):
    assert_refused(
        command("experiments.fit_codec", f"--file={tmp_path}"), f"--file={tmp_path} is a folder"
    )


def test_loading_what_is_not_a_model(finished, tmp_path):
    with pytest.raises(UserError, match="no directory"):
        loading.load(tmp_path / "absent")
    with pytest.raises(UserError, match="has no config.json"):
        loading.load(tmp_path)
    shutil.copy(finished / "config.json", tmp_path)
    with pytest.raises(UserError, match="has no student.safetensors yet"):
        loading.load(tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text(
        json.dumps({"_class_name": "SanaTransformer2DModel", "num_layers": 28})
    )
    with pytest.raises(
        UserError, match=f"one part of a published model: give the folder above it, {tmp_path}$"
    ):
        loading.load(tmp_path / "transformer")
    (tmp_path / "student.safetensors").write_bytes(
        (finished / "student.safetensors").read_bytes()[:1000]
    )
    with pytest.raises(UserError, match="not a whole safetensors file"):
        loading.load(tmp_path)


def test_weights_of_another_shape(finished, tmp_path):
    tree = json.loads((finished / "config.json").read_text())
    tree["model"]["width"] = 64
    (tmp_path / "config.json").write_text(json.dumps(tree))
    shutil.copy(finished / "student.safetensors", tmp_path)
    with pytest.raises(UserError, match="has shape .* the model needs"):
        loading.load(tmp_path)


def test_workdir_of_another_config_is_left_alone(finished):
    config = card()
    config.teacher.update(base_qk_norm=False, base_time_scale=1000.0)
    config.phases.finetune.steps = 4
    config.phases.sprint.batch = 16
    before = (finished / "summary.json").read_bytes()
    with pytest.raises(UserError, match="config.phases.sprint.batch=8, now 16"):
        run.run(config_lib.parse(config), finished)
    assert (finished / "summary.json").read_bytes() == before


def test_foreign_workdir_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty and not a run"):
        run.run(config_lib.parse(card()), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_checkpoint_of_another_shape(tmp_path):
    """A checkpoint that does not fit is named and not overwritten."""
    import jax.numpy as jnp

    from sprint_jax.training.checkpoints import Checkpoints

    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        checkpoints.save(4, {"w": jnp.ones((3,))})
    import jax

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for abstract in ({"w": (4,)}, {"w": (3,), "more": (2,)}):
        target = {
            k: jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding) for k, s in abstract.items()
        }
        with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
            with pytest.raises(UserError, match="does not fit the config"):
                checkpoints.restore_newest(target)
        assert (tmp_path / "c/4").is_dir()


def test_missing_pretrained_weights(tmp_path):
    config = card()
    config.teacher.pretrained = str(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="no weights at"):
        run.run(config_lib.parse(config), tmp_path / "run")


def test_a_run_of_version_0_1_is_refused(tmp_path):
    """By training and by sampling, with what to do; its files stay."""
    old = json.dumps({"seed": 0, "data": {}, "model": {}, "teacher": {}, "sprint": {"steps": 4}})
    (tmp_path / "config.json").write_text(old)
    (tmp_path / "student.safetensors").touch()
    with pytest.raises(UserError, match="written by version 0.1, .*: choose another --workdir"):
        workdirs.write_config(config_lib.parse(card()), tmp_path)
    with pytest.raises(UserError, match="is a run of version 0.1: convert it with that version"):
        loading.load(tmp_path)
    assert (tmp_path / "config.json").read_text() == old

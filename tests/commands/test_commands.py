"""Every command alike: its help, its start, and what it refuses before anything is imported."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from helpers.runs import ROOT
from sprint_jax import __main__
from sprint_jax.runtime import options


def run_in(folder, *arguments, path=ROOT):
    """Run sprint-jax in a folder that is no checkout."""
    return subprocess.run(
        [sys.executable, "-m", "sprint_jax", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def test_the_list_of_commands_fits_on_one_screen(capsys):
    __main__.dispatch(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    for name in __main__.commands():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert len(line.split()) > 3, line


@pytest.mark.parametrize("name", __main__.commands())
def test_help_lists_every_option_and_what_it_is(monkeypatch, capsys, name):
    command = __main__.commands()[name]
    monkeypatch.setenv("COLUMNS", "250")
    with pytest.raises(SystemExit) as end:
        __main__.dispatch([name, "--help"])
    shown = capsys.readouterr().out
    assert not end.value.code and command.__doc__.splitlines()[0] in shown
    docs = options.field_docs(command.Options)
    for field in dataclasses.fields(command.Options):
        assert docs.get(field.name), f"{field.name} has no text below it"
        if field.name != options.OVERRIDES:
            assert f"--{field.name.rstrip('_')}" in shown
            assert docs[field.name].split()[0] in shown


def test_options_are_frozen_and_by_keyword():
    for command in __main__.commands().values():
        assert dataclasses.is_dataclass(command.Options)
        with pytest.raises(TypeError):
            command.Options("a")
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(command.Options(), dataclasses.fields(command.Options)[0].name, "a")


def test_help_starts_neither_jax_nor_numpy():
    """What makes a start slow. Fails when a command imports a room's code at its top."""
    program = (
        "import json, sys\n"
        "from sprint_jax import __main__\n"
        "try: __main__.dispatch(['evaluate', '--help'])\n"
        "except SystemExit: print(json.dumps(sorted(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    modules = json.loads(result.stdout.splitlines()[-1])
    assert "tyro" in modules
    assert not {"jax", "numpy", "scipy", "flax", "PIL"} & set(modules)


def test_importing_the_package_imports_nothing():
    program = (
        "import sys, sprint_jax; print([m for m in sys.modules if m.startswith('sprint_jax.')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"{program}; print('jax' in sys.modules, sprint_jax.__version__)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.stdout.split("\n")[:2] == ["[]", "False 0.1.0"], result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["smaple"], "unknown command 'smaple': did you mean sample?"),
        (["draw"], "unknown command 'draw': sprint-jax --help lists the commands"),
        (["sample", "--promt=x"], "unknown flag --promt: did you mean --prompt?"),
        (["sample", "--steps=two"], "--steps=two: use a whole number"),
        (["export", "--platforms=cpu,gpu"], "use some of cpu, cuda, rocm, tpu"),
        (["plan", "--topology=v5e:4x4"], "--config is missing: use --config=configs/sprint.py"),
        (["train", "--config=sprnt"], "use one of controlnet, sprint, teacher"),
        (
            ["train", "--config=sprint:smoke", "--config.run.nope=1"],
            "unknown config key config.run",
        ),
        (
            ["train", "--config=sprint:smoke", "--config.sprint.steps=1"],
            "config.sprint.steps: it is config.phases.sprint.steps now",
        ),
    ],
)
def test_bad_input_is_one_line_with_status_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        __main__.dispatch(arguments)
    said = capsys.readouterr()
    assert end.value.code == 2 and not said.out
    assert said.err.startswith("error: ")
    assert message in said.err
    assert said.err.count("\n") == 1


@pytest.mark.slow
def test_the_wheel_carries_the_cards(tmp_path):
    """Outside a checkout: a card that another imports, and its values replaced."""
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*wheel, f"--wheel-dir={tmp_path / 'dist'}", str(ROOT)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (file,) = (tmp_path / "dist").glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*install, f"--target={tmp_path / 'lib'}", str(file)], check=True)
    (tmp_path / "cwd").mkdir()
    flags = ("--config=controlnet:smoke", "--config.phases.sprint.steps=3")
    result = run_in(tmp_path / "cwd", "train", *flags, path=tmp_path / "lib")
    assert result.returncode == 2, result.stderr
    assert "config.phases.sprint.steps 3" in result.stderr, result.stderr
    assert not list((tmp_path / "cwd").iterdir())
    assert (tmp_path / "lib/sprint_jax/py.typed").exists()
    assert (tmp_path / "lib/bin/sprint-jax").exists()

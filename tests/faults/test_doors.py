"""Faults that public reports show at the doors of the commands: paths and overwritten images."""

import concurrent.futures
import dataclasses
import importlib
import json
import pathlib
import pkgutil
import re
import typing

import numpy as np
import pytest

from helpers.configs import card
from sprint_jax import commands, config
from sprint_jax.errors import UserError
from sprint_jax.evaluation import gallery, image_sets, prompt_sets
from sprint_jax.runtime import cards, options
from sprint_jax.sampling import loading, opening, sample
from sprint_jax.sampling.options import SampleOptions
from sprint_jax.storage import files

ADDRESSES = ("gs://bucket/run", "s3://bucket", "hdfs://a/b", "file:///a", "GS://b", "https://a/b")
SECTIONS = (config.Data, config.Text, config.Codec, config.Teacher, config.Control, config.Phase)
NAMES_A_FILE = re.compile(
    r"\b(weights|files?|folders?|director(y|ies)|card|image to|sketch)\b|\.\w+\b", re.I
)
# Texts whose help speaks of files without naming one.
NO_PATHS = {("train", "coordinator"), ("extract", "stage"), ("serve", "host")}


def option_classes():
    names = [module.name for module in pkgutil.iter_modules(commands.__path__)]
    found = [(n, importlib.import_module(f"sprint_jax.commands.{n}").Options) for n in names]
    for name in ("experiments.emoji.__main__", "experiments.fit_codec", "benchmarks.__main__"):
        found.append((name, importlib.import_module(name).Options))
    return found


def path_fields():
    """Yield (command, class, field, whether it takes several) of every option that is a path."""
    for command, kind in option_classes():
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            if files.is_path(hints[field.name]):
                yield command, kind, field.name, typing.get_origin(hints[field.name]) is tuple


def test_every_option_that_names_a_file_is_marked_as_a_path():
    """Fails when an option or config key whose help names a file or folder is a plain text."""
    kinds = [*option_classes(), *((f"config.{kind.__name__}", kind) for kind in SECTIONS)]
    for command, kind in kinds:
        docs = options.field_docs(kind)
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            text = "str" in str(hints[field.name]) and "Literal" not in str(hints[field.name])
            words = f"{field.name.replace('_', ' ')}: {docs[field.name]}"
            if text and NAMES_A_FILE.search(words):
                marked = files.is_path(hints[field.name])
                assert marked or (command, field.name) in NO_PATHS, (command, field.name)
    for command, kind in option_classes():
        assert issubclass(kind, files.Paths), command


def test_addresses_are_refused_by_every_option(monkeypatch):
    """By the command line and by Python callers alike, in one line that names flag and address."""
    monkeypatch.setenv("HOME", "/home/someone")
    count = 0
    for command, kind, name, several in path_fields():
        flag = f"--{name.rstrip('_')}"
        for address in ADDRESSES:
            with pytest.raises(UserError, match=re.escape(f"{flag}={address}: ")) as error:
                kind(**{name: (address,) if several else address})
            assert "\n" not in str(error.value) and "local path" in str(error.value)
        with pytest.raises(UserError, match=f"{flag}=gs://"):
            options.parse(kind, [f"{flag}=gs://b/x"], prog=command, description="")
        parsed = options.parse(kind, [f"{flag}=~/x/y"], prog=command, description="")
        expanded = "/home/someone/x/y"
        assert getattr(parsed, name) == ((expanded,) if several else expanded)
        count += 1
    assert count > 40


def test_addresses_are_refused_by_config_keys_and_python_functions(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in ("data.encoded", "data.model", "codec.weights", "teacher.pretrained",
                "teacher.start", "control.pretrained"):  # fmt: skip
        tree = cards.override(card(), [f"{key}=gs://bucket/x"])
        with pytest.raises(UserError, match=rf"config\.{key}=gs://bucket/x: gs:// is not read"):
            config.parse(tree)
    parsed = config.parse(cards.override(card(), ["data.model=~/encoders"]))
    assert parsed.data.model == str(tmp_path / "encoders")
    assert config.parse(card()).codec.weights.startswith("package:")
    for call in (
        lambda: loading.load("s3://a/b"),
        lambda: opening.open_model("s3://a/b"),
        lambda: loading.load(tmp_path, controlnet="s3://a/b"),
        lambda: loading.load(tmp_path, instruction="s3://a/b"),
        lambda: cards.load("s3://a/b.py"),
    ):
        with pytest.raises(UserError, match="=s3://a/b.*: s3:// is not read or written here"):
            call()


def test_the_main_command_expands_and_refuses_its_paths(capsys, monkeypatch, tmp_path):
    from sprint_jax import main

    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments in (["--config=gs://b/c.py"], ["--config", "gs://b/c.py"]):
        with pytest.raises(SystemExit) as end:
            main.parse_flags(["main", *arguments])
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith("error: --config=gs://b/c.py: gs:// is not read")
    given = ["main", "--config=~/c.py:smoke", "--workdir=~/run", "--config", "~/d.py"]
    assert list(main._expanded(given)) == [
        "main",
        f"--config={tmp_path}/c.py:smoke",
        "--workdir=~/run",  # expanded by train.Options
        "--config",
        f"{tmp_path}/d.py",
    ]


@pytest.mark.parametrize("path", ["a" * 5000, "b/" * 2500, "c\0d", "~nobody_of_this_name/x"])
def test_what_is_no_path_is_one_line(path):
    """Fails when a name that is too long is a traceback of the first file operation."""
    for _, kind, name, several in path_fields():
        with pytest.raises(UserError, match=f"--{name.rstrip('_')}=") as error:
            kind(**{name: (path,) if several else path})
        assert len(str(error.value)) < 250 and "\n" not in str(error.value)


def images_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)


def write(out, prompts, seed=0, **changes):
    asked = SampleOptions(prompt=list(prompts), out=str(out), seed=seed, **changes)
    return sample.write(out, images_of(len(prompts), seed), list(prompts), asked)


def rows_of(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def test_a_second_sample_keeps_the_images_of_the_first(tmp_path):
    """Fails when files or the manifest are replaced, and when an index does not begin at 0."""
    assert write(tmp_path, ["a", "b"]) == ["00000.png", "00001.png"]
    before = (tmp_path / "00000.png").read_bytes()
    assert write(tmp_path, ["c"], seed=3) == ["00002.png"]
    assert (tmp_path / "00000.png").read_bytes() == before
    listed = [(row["file"], row["prompt"], row["seed"], row["index"]) for row in rows_of(tmp_path)]
    assert listed == [
        ("00000.png", "a", 0, 0), ("00001.png", "b", 0, 1), ("00002.png", "c", 3, 0)
    ]  # fmt: skip
    (tmp_path / "00041.jpg").touch()  # a converted image keeps its number
    (tmp_path / "notes.txt").touch()
    assert write(tmp_path, ["d"]) == ["00042.png"]
    paths, prompts = image_sets.with_prompts(tmp_path, None)
    assert prompts == ["a", "b", "c", "d"] and all(path.is_file() for path in paths)
    two = [prompt_sets.Prompt("00000", "c", {}), prompt_sets.Prompt("00001", "d", {})]
    with pytest.raises(UserError, match="images of 3 commands: leave --prompts out"):
        image_sets.with_prompts(tmp_path, two)


def test_overwrite_replaces_the_images_of_earlier_commands_alone(tmp_path):
    write(tmp_path, ["a", "b", "c"])
    (tmp_path / "mine.png").touch()
    assert write(tmp_path, ["d"], overwrite=True) == ["00000.png"]
    assert [(row["file"], row["prompt"]) for row in rows_of(tmp_path)] == [("00000.png", "d")]
    left = {path.name for path in tmp_path.iterdir() if path.suffix == ".png"}
    assert left == {"00000.png", "mine.png"}


def test_folders_of_other_commands_are_refused(tmp_path):
    """A manifest of another program is never replaced: of evaluate by sample, and the reverse."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/manifest.jsonl").write_text('{"audio": "a.wav"}\n')
    with pytest.raises(UserError, match="not written by sprint-jax sample: choose another --out"):
        sample.sample(SampleOptions(prompt=["a circle"], out=str(tmp_path / "a")))
    assert (tmp_path / "a/manifest.jsonl").read_text() == '{"audio": "a.wav"}\n'
    (tmp_path / "b").mkdir()
    (tmp_path / "b/protocol.json").write_text("{}")
    with pytest.raises(UserError, match="holds images of sprint-jax evaluate: choose another"):
        sample.sample(SampleOptions(prompt=["a circle"], out=str(tmp_path / "b")))
    write(tmp_path / "c", ["a"])
    with pytest.raises(UserError, match="holds images of sprint-jax sample: choose another --out"):
        gallery.check(tmp_path / "c", {"seed": 0}, [])


def write_many(out, seed, count):
    for _ in range(count):
        write(pathlib.Path(out), ["a", "b"], seed=seed)


def test_two_samples_at_once_take_no_number_twice(tmp_path):
    """Fails without the lock, which counts for threads too: both then read one largest number."""
    with concurrent.futures.ThreadPoolExecutor(2) as both:
        for written in [both.submit(write_many, str(tmp_path), s, 20) for s in (1, 2)]:
            written.result(30)
    names = [row["file"] for row in rows_of(tmp_path)]
    assert names == [f"{i:05d}.png" for i in range(80)]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names

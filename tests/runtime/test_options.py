"""Options of a command line: how each type is written, and what is refused in one line."""

import dataclasses
from typing import Literal

import pytest

from sprint_jax.errors import UserError
from sprint_jax.runtime import options
from sprint_jax.storage import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared(files.Paths):
    """What two commands share."""

    model: files.LocalPath | None = None
    """Folder of the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Shared):
    """One option of every type."""

    prompt: list[str] = dataclasses.field(default_factory=list)
    """What to draw;
    may be repeated."""
    steps: int = 2
    """Network calls."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of weights."""
    guidance_scale: float | None = None
    """Scale."""
    counts: tuple[int, ...] = (1, 2, 4)
    """Several."""
    names: tuple[str, ...] | None = None
    """Some."""
    tile: bool = False
    """Decode in tiles."""
    peers: bool = True
    """Time peers."""
    from_: str = ""
    """Source."""
    overrides: tuple[str, ...] = ()
    """Values of the card."""


def parse(*arguments: str) -> Options:
    return options.parse(Options, arguments, prog="sprint-jax try", description="Try it.")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], {}),
        (["--model=a"], {"model": "a"}),
        (["--model", "a"], {"model": "a"}),
        (["--model="], {"model": ""}),
        (["--model=a", "--model=b"], {"model": "b"}),
        (["--prompt=a=b", "--prompt=--c", "--prompt", "-d"], {"prompt": ["a=b", "--c", "-d"]}),
        (["--steps=-3"], {"steps": -3}),
        (["--dtype=float32"], {"dtype": "float32"}),
        (["--guidance_scale=1e-3"], {"guidance_scale": 1e-3}),
        (["--guidance-scale", "-2"], {"guidance_scale": -2.0}),
        (["--counts=8"], {"counts": (8,)}),
        (["--counts=8, 1"], {"counts": (8, 1)}),
        (["--names=a,b"], {"names": ("a", "b")}),
        (["--names="], {"names": ()}),
        (["--tile"], {"tile": True}),
        (["--tile=True", "--peers=false"], {"tile": True, "peers": False}),
        (["--tile", "--notile"], {}),
        (["--nopeers"], {"peers": False}),
        (["--no_peers"], {"peers": False}),
        (["--from=x"], {"from_": "x"}),
        (
            ["--config.a.b=3", "--model=m", "--config.c", "4"],
            {"model": "m", "overrides": ("a.b=3", "c=4")},
        ),
    ],
)
def test_every_spelling(arguments, expected):
    assert parse(*arguments) == Options(**expected)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--step=3", "unknown flag --step: did you mean --steps?"),
        ("--quality=3", "unknown flag --quality: sprint-jax try --help lists those it has"),
        ("--notable", "unknown flag --notable: sprint-jax try --help lists those it has"),
        ("--steps=x", "--steps=x: use a whole number"),
        ("--steps=1.5", "--steps=1.5: use a whole number"),
        ("--guidance_scale=much", "--guidance_scale=much: use a number"),
        ("--counts=1,x", "--counts=1,x: give whole numbers with commas between"),
        ("--dtype=int8", "--dtype=int8: use one of bfloat16, float32"),
        ("--tile=perhaps", "--tile=perhaps: use True or False"),
        ("--steps", "--steps has no value: write --steps=value"),
        ("two", "unexpected argument 'two': flags look like --name=value"),
        ("-x", "unexpected argument '-x': flags look like --name=value"),
    ],
)
def test_one_line_for_bad_input(argument, message):
    with pytest.raises(UserError) as error:
        parse(argument)
    assert str(error.value) == message


def test_a_flag_does_not_take_the_next_flag_for_its_value():
    with pytest.raises(UserError, match="--model has no value"):
        parse("--model", "--steps=3")


def test_config_overrides_belong_to_commands_with_a_card():
    with pytest.raises(UserError, match="unknown flag --config.a"):
        options.parse(Shared, ["--config.a=1"], prog="sprint-jax try", description="")


def test_help_lists_every_option_with_its_text(capsys, monkeypatch):
    """Fails when inherited options, the text below a field or a default are left out."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        parse("--help")
    shown = capsys.readouterr()
    assert not end.value.code and not shown.err
    for row in (
        "--model PATH",
        "Folder of the model.",
        "What to draw; may be repeated.",
        "--steps INT",
        "Network calls. (default: 2)",
        "--dtype {bfloat16,float32}",
        "--guidance_scale NUMBER",
        "--counts INT,...",
        "(default: 1,2,4)",
        "--tile",
        "--from TEXT",
    ):
        assert row in shown.out, row
    assert "overrides" not in shown.out and "None" not in shown.out

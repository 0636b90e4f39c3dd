"""The configuration: every field is read, unknown and missing keys are named, cards parse."""

import ast
import dataclasses

import pytest

from conftest import ROOT
from sprint_jax import build, config
from sprint_jax.errors import UserError


def card(preset):
    namespace = {}
    exec((ROOT / "configs/sprint.py").read_text(), namespace)
    return namespace["get_config"](preset), namespace["PRESETS"]


SECTIONS = [c for c in vars(config).values() if dataclasses.is_dataclass(c)]


def attributes_read():
    """Names of all attributes that the package reads outside config.py."""
    names = set()
    for path in (ROOT / "sprint_jax").rglob("*.py"):
        if path.name != "config.py":
            tree = ast.parse(path.read_text())
            names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return names


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_every_field_is_read(section):
    """Model is unpacked whole into a constructor, which refuses what it does not take."""
    if section is not config.Model:
        unread = {f.name for f in dataclasses.fields(section)} - attributes_read()
        assert not unread


def test_the_unpacked_section_reaches_its_constructor():
    parsed = config.parse(card("shapes")[0])
    for name, value in dataclasses.asdict(parsed.model).items():
        assert getattr(build.student(parsed), name) == value


@pytest.mark.parametrize("preset", card("shapes")[1])
def test_cards_parse_and_survive_json(preset):
    parsed = config.parse(card(preset)[0])
    assert config.parse(config.to_dict(parsed)) == parsed


def test_shape_that_lacks_a_key():
    tree = card("shapes")[0].to_dict()
    del tree["sprint"]["max_time"]
    with pytest.raises(UserError, match="config.sprint.max_time is missing"):
        config.parse(tree)


def test_unknown_key_names_its_neighbour():
    tree = card("shapes")[0].to_dict()
    tree["teacher"]["captoin_dropout"] = 0.1
    with pytest.raises(UserError, match="captoin_dropout; did you mean config.teacher.caption_dropout"):
        config.parse(tree)


@pytest.mark.parametrize(
    "path, value",
    [
        ("data.size", 30), ("codec.weights", ""), ("model.heads", 3), ("model.cross_heads", 3), ("model.dtype", "float16"),
        ("teacher.steps", -1), ("teacher.batch", 0), ("sprint.steps", 3), ("sprint.uncond_mask", "x"),
        ("sprint.weighting", "x"), ("sprint.reduction", "x"), ("sprint.max_time", 1.5),
        ("sprint.guidance", ()), ("sprint.head_blocks", (3, 1)), ("sprint.head_blocks", (99,)),
        ("sprint.batch", 1), ("evaluation.schedule", "x"), ("evaluation.prompts", 0),
        ("evaluation.samples", 1000), ("evaluation.teacher_steps", 0), ("run.log_every", 3),
        ("run.checkpoint_every", 0), ("run.keep", 0),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(path, value):
    tree = card("shapes")[0].to_dict()
    section, name = path.split(".")
    tree[section][name] = value
    with pytest.raises(UserError, match=f"config.*{name}"):
        config.parse(tree)

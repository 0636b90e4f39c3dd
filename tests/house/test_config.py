"""The configuration: all fields are read, unknown and missing keys are named, cards parse."""

import ast
import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.configs import card, presets
from helpers.runs import ROOT
from sprint_jax import build, config
from sprint_jax.errors import UserError
from sprint_jax.models import discriminator
from sprint_jax.models.linear_dit import SANA_600M, SANA_1600M
from sprint_jax.optim import came, optimizers
from sprint_jax.runtime.renamed_keys import RENAMED, renamed
from sprint_jax.sampling import programs
from sprint_jax.storage import weights
from sprint_jax.training import datasets
from sprint_jax.training import stages as stages_lib

pytestmark = pytest.mark.second_pass

SECTIONS = [c for c in vars(config).values() if dataclasses.is_dataclass(c)]


@functools.cache
def attributes_read():
    """Return the names of all attributes that the package reads outside config.py."""
    names = set()
    for path in (ROOT / "sprint_jax").rglob("*.py"):
        if path.name != "config.py":
            tree = ast.parse(path.read_text())
            names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return names


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_every_field_is_read(section):
    """By its name. Model is unpacked whole into a constructor, which refuses unknown fields."""
    if section is not config.Model:
        unread = {f.name for f in dataclasses.fields(section)} - attributes_read()
        assert not unread


def test_the_unpacked_section_reaches_its_constructor():
    parsed = config.parse(card(preset="sprint"))
    for name, value in dataclasses.asdict(parsed.model).items():
        assert getattr(build.student(parsed), name) == value


CARDS = [
    card(file, preset) for file in ("sprint", "teacher", "controlnet") for preset in presets(file)
]


def recording(value, seen, path=""):
    """Return a copy of a config whose fields add their dotted names to `seen` when they are
    read.
    """
    if isinstance(value, dict):
        return {n: recording(v, seen, f"{path}{n}.") for n, v in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    inner = {n: recording(v, seen, f"{path}{n}.") for n, v in fields.items()}

    def read(self, name):
        if name in fields:
            seen.add(f"{path}{name}")
        return object.__getattribute__(self, name)

    return type(type(value).__name__, (type(value),), {"__getattribute__": read})(**inner)


def replace_fields(value, **changes):
    """Apply `dataclasses.replace`, which would read all fields, without reading any."""
    held = {f.name: object.__getattribute__(value, f.name) for f in dataclasses.fields(value)}
    return type(value)(**(held | changes))


IMAGE = (32, 32, 3)  # of the default card

# These belong to a run, a folder or files, and the test below does not read them. Only their names
# are checked.
ELSEWHERE = {
    "data.encoded",
    "data.model",
    "data.prompts",
    "data.workers",
    "data.max_bad",
    "mesh.data",
    "mesh.fsdp",
    "teacher.start",
    # `parse` reads it: it chooses the class of the section.
    *(f"phases.{name}.objective.kind" for name in ("teacher", "finetune", "control", "sprint")),
    # Only random parameters are changed by it.
    "phases.finetune.objective.border_start",
    "phases.control.objective.border_start",
    "evaluation.diversity",
    "evaluation.reference",
    "evaluation.samples",
    *(f"run.{f.name}" for f in dataclasses.fields(config.Run)),
}


def test_every_field_of_every_section_is_read(monkeypatch):
    """By stages, their steps, their data and their previews.

    Fails when a network is trained with the batch, rate or clipping of another: the names are the
    same.
    """
    monkeypatch.setattr(dataclasses, "replace", replace_fields)
    tree, seen = card("controlnet"), set()
    tree.teacher.update(pretrained="", base_qk_norm=False, base_time_scale=1000.0)
    tree.phases.finetune.steps = 4
    drawn = lambda *_, batch, **others: np.zeros((batch, *IMAGE), np.uint8)
    monkeypatch.setattr(programs, "run", drawn)
    for kind in ("muon", "came", "adamw"):  # each kind has fields of its own
        for optimizer in (
            tree.phases.teacher.optimizers.network,
            tree.phases.finetune.optimizers.network,
            tree.phases.control.optimizers.network,
            tree.phases.sprint.optimizers.student,
            tree.phases.sprint.optimizers.heads,
        ):
            optimizer.update(kind=kind, muon_lr=0.01, b1=0.9, b3=0.99)
        c = recording(config.parse(tree), seen)
        base, teacher, distilled = (
            jax.eval_shape(model.init, jax.random.key(0))
            for model in (build.base_teacher(c), build.teacher(c), build.distilled_teacher(c))
        )
        data = datasets.Shapes(c)
        stages = (
            stages_lib.make(c, "teacher", data),
            stages_lib.make(c, "finetune", data, begin=base),
            stages_lib.make(c, "control", data, teacher=teacher),
            stages_lib.make(c, "sprint", data, teacher=distilled),
        )
        assert config.active(c) == tuple(stage.name for stage in stages)
    for stage in stages:
        state = jax.eval_shape(stage.start, stage.frozen, stage.init_arrays)
        for step in stage.functions:
            batch = datasets.abstract_phase_batch(c, c.phases[stage.name])
            jax.eval_shape(step, state, stage.frozen, batch)
        stage.preview(None)
    with data.batches(2, 0, 1, 0, 1) as batches:
        next(batches)
    assert weights.flatten(config.to_dict(config.parse(tree))).keys() - seen == ELSEWHERE


@pytest.mark.parametrize("tree", CARDS)
def test_cards_parse_and_survive_json(tree):
    parsed = config.parse(tree)
    assert config.parse(config.to_dict(parsed)) == parsed


@pytest.mark.parametrize("preset, size", [("sana_600m", SANA_600M), ("sana_1600m", SANA_1600M)])
def test_the_published_recipe(preset, size):
    """Numbers of the paper's appendix and of the released configuration, with their networks."""
    c = config.parse(card(preset=preset))
    assert build.student(c) == size
    phase = c.phases["sprint"]
    s = phase.objective
    assert (phase.steps, phase.batch) == (20000, 512)
    assert (s.tangent_warmup, s.guidance) == (4000, (4.0, 4.5, 5.0))
    assert (s.p_mean, s.p_std, s.disc_mean, s.disc_std) == (0.2, 1.6, -0.6, 1.0)
    assert (s.scm_weight, s.adv_weight, s.max_time, s.head_blocks) == (
        1.0,
        0.5,
        0.5,
        (2, 8, 14, 19),
    )
    assert phase.optimizers.keys() == {"student", "heads"}
    for o in phase.optimizers.values():
        assert (o.kind, o.lr, o.b1, o.b2, o.b3, o.clip, o.reference_batch) == (
            "came",
            2e-6,
            0.9,
            0.999,
            0.9999,
            0.1,
            256,
        )
    c = config.parse(card("teacher", preset))
    t = c.phases["finetune"]
    assert config.active(c) == ("finetune",) and not c.teacher.base_qk_norm
    assert (t.steps, t.batch, t.optimizers["network"].lr) == (5000, 1024, 2e-5)


def test_the_square_root_rule():
    """One update of plain AdamW is the rate itself.

    Fails when the ratio is inverted and when the root is missing.
    """
    heads = config.parse(card(preset="sprint")).phases["sprint"].optimizers["heads"]
    o = dataclasses.replace(heads, lr=1e-3, reference_batch=256)
    tx = optimizers.make(o, updates=100, batch=1024, rules=came.LINEAR_DIT)
    params = {"w": jnp.ones((3,))}
    updates, _ = tx.update({"w": jnp.full((3,), 0.1)}, tx.init(params), params)
    assert abs(float(updates["w"][0]) + 2e-3) < 1e-6


def test_shape_that_lacks_a_key():
    tree = card(preset="sprint").to_dict()
    del tree["phases"]["sprint"]["objective"]["max_time"]
    with pytest.raises(UserError, match="config.phases.sprint.objective.max_time is missing"):
        config.parse(tree)


def test_unknown_key_names_its_neighbour():
    tree = card(preset="sprint").to_dict()
    tree["phases"]["teacher"]["objective"]["captoin_dropout"] = 0.1
    with pytest.raises(
        UserError,
        match="captoin_dropout; did you mean config.phases.teacher.objective.caption_dropout",
    ):
        config.parse(tree)


@pytest.mark.parametrize(
    "path, value",
    [
        ("data.size", 30),
        ("codec.weights", ""),
        ("model.heads", 3),
        ("model.cross_heads", 3),
        ("model.dtype", "float16"),
        ("phases.teacher.steps", -1),
        ("phases.teacher.batch", 0),
        ("phases.sprint.steps", 3),
        ("phases.sprint.objective.uncond_mask", "x"),
        ("phases.sprint.objective.weighting", "x"),
        ("phases.sprint.objective.logvar_gradient", "x"),
        ("phases.sprint.objective.reduction", "x"),
        ("phases.sprint.objective.max_time", 1.5),
        ("phases.sprint.objective.guidance", ()),
        ("phases.sprint.objective.head_blocks", (3, 1)),
        ("phases.sprint.objective.head_blocks", (99,)),
        ("phases.sprint.batch", 1),
        ("phases.sprint.accumulate", 3),
        ("phases.sprint.accumulate", 8),
        ("phases.teacher.accumulate", 0),
        ("text.vocabulary", "x"),
        ("text.dim", 7),
        ("model.remat", "x"),
        ("mesh.fsdp", 0),
        ("data.workers", -1),
        ("evaluation.schedule", "x"),
        ("evaluation.prompts", 1),
        ("evaluation.reference", 1),
        ("evaluation.batch", 0),
        ("evaluation.samples", 1000),
        ("evaluation.teacher_steps", 0),
        ("run.log_every", 3),
        ("control.depth", -1),
        ("control.depth", 7),
        ("control.condition", "x"),
        ("phases.sprint.objective.control_dropout", 1.0),
        ("control.freehand", -0.1),
        ("control.freehand", 1.1),
        ("phases.control.batch", 0),
        ("phases.control.optimizers.network.kind", "x"),
        ("phases.sprint.optimizers.student.clip", 0.0),
        ("phases.sprint.optimizers.student.muon_lr", 0.0),
        ("phases.teacher.optimizers.network.clip", -1.0),
        ("phases.sprint.batch", 10),
        ("phases.sprint.batch", 36),
        ("phases.sprint.accumulate", 0),
        ("model.heads", 0),
        ("model.cross_heads", 0),
        ("model.patch_size", 0),
        ("codec.block", 0),
        ("phases.sprint.ema", 1.0),
        ("phases.sprint.ema", -0.1),
        ("phases.teacher.ema", 1.5),
        ("phases.teacher.ema", math.nan),
        ("phases.sprint.optimizers.student.lr", -1e-3),
        ("phases.sprint.optimizers.heads.lr", math.nan),
        ("phases.teacher.optimizers.network.muon_lr", math.inf),
        ("phases.control.optimizers.network.weight_decay", -1.0),
        ("phases.finetune.optimizers.network.lr", math.inf),
        ("phases.sprint.objective.guidance", (1.5, math.nan)),
        ("evaluation.teacher_guidance", math.nan),
        ("evaluation.student_guidance", math.inf),
        ("data.seed", -1),
        ("data.eval_seed", -1),
        ("run.max_rejected", 0),
        ("run.checkpoint_every", 0),
        ("run.keep", 0),
        ("run.preview_every", 3),
        ("run.preview_every", -2),
    ],
)
def test_values_out_of_range_are_named(path, value):
    tree = card(preset="sprint").to_dict()
    *sections, name = path.split(".")
    section = functools.reduce(dict.__getitem__, sections, tree)
    section[name] = value
    with pytest.raises(UserError, match=f"config.*{name}"):
        config.parse(tree)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"phases.sprint.optimizers.student.kind": "came"},
            r"phases.sprint.optimizers.student.b1 0.0: kind came needs b1 and b3 \(0.0\)",
        ),
        (
            {"teacher.pretrained": "", "teacher.base_time_scale": 1000.0},
            "base_time_scale 1000.0 .* use equal ones, or phases.finetune.steps",
        ),
        (
            {"teacher.pretrained": "", "model.time_scale": 1000.0},
            "use equal ones, or phases.finetune.steps",
        ),
        ({"teacher.pretrained": "", "teacher.base_qk_norm": False}, "base_qk_norm False"),
        (
            {"teacher.pretrained": "", "model.qk_norm": False, "phases.finetune.steps": 4},
            "never takes it away",
        ),
        (
            {
                "teacher.pretrained": "",
                "phases.teacher.steps": 0,
                "teacher.start": "x",
                "phases.finetune.steps": 4,
            },
            "nothing trains a teacher",
        ),
    ],
)
def test_values_that_do_not_go_together_are_named(changes, words):
    tree = card(preset="sprint")
    for path, value in changes.items():
        *sections, name = path.split(".")
        functools.reduce(lambda node, part: node[part], sections, tree)[name] = value
    with pytest.raises(UserError, match=words):
        config.parse(tree)


@pytest.mark.parametrize(
    "path, value, remedy",
    [
        ("phases.sprint.steps", "400", "use a whole number"),
        ("phases.sprint.steps", True, "use a whole number"),
        ("phases.sprint.steps", 4.0, "use a whole number"),
        ("phases.sprint.objective.guidance", "x", "use a list, each a number"),
        ("phases.sprint.objective.guidance", (1.5, "x"), "use a number"),
        ("phases.sprint.objective.head_blocks", (0.5,), "use a whole number"),
        ("phases.sprint.objective.tangent_normalize", 1, "use True or False"),
        ("phases.sprint.optimizers.student.lr", "fast", "use a number"),
        ("phases.sprint.optimizers.student.lr", False, "use a number"),
        ("phases.sprint.optimizers.student", 3, "give a section with keys"),
        ("phases.sprint.optimizers", 3, "use a section with keys"),
        ("phases.sprint.objective", 3, "rcm, proxy_reward, policy, or module:Class"),
        ("phases.sprint", 3, "give a section with keys"),
        ("phases", [3], "use a section with keys"),
        ("order", "sprint", "use a list, each a text"),
        ("order", (1,), "use a text"),
        ("mesh", 3, "give a section with keys"),
        ("data.encoded", None, "use a text"),
        ("model.dtype", 16, "use float32 or bfloat16"),
    ],
)
def test_values_of_the_wrong_type_are_one_line(path, value, remedy):
    """The line names the key, the value and what to use.

    Fails when True counts as a whole number, and when a text counts as a list.
    """
    tree = card(preset="sprint").to_dict()
    *sections, name = path.split(".")
    functools.reduce(dict.__getitem__, sections, tree)[name] = value
    with pytest.raises(UserError) as error:
        config.parse(tree)
    line = str(error.value)
    assert line.startswith(f"config.{path}") and line.endswith(remedy), line
    assert (
        repr(value[-1] if remedy.startswith("use a ") and isinstance(value, tuple) else value)
        in line
    )
    assert "\n" not in line


@pytest.mark.parametrize(
    "path, value, words",
    [
        (
            "phases.sprint.objective.kind",
            "drift",
            "objective.kind 'drift': use flow_matching, regression",
        ),
        ("phases.sprint.objective.kind", "no_module:X", "'no_module:X' cannot be imported"),
        ("phases.sprint.objective.kind", "math:X", "'math:X' cannot be imported"),
        ("phases.sprint.objective.kind", "math:pi", "'math:pi' is no settings class"),
        ("phases.sprint.objective.kind", "sprint_jax.config:Model", "no settings class: .* round"),
        ("phases.sprint.objective.kind", "scm", "unknown config key .*objective.adv_weight"),
        ("phases.sprint.optimizers", "student", "optimizers student: give one for each of heads"),
        ("phases.sprint.network", "control", "network control: scm_ladd trains student"),
        ("phases.teacher.network", "student", "network student: flow_matching trains base or"),
        ("order", ("teacher", "distil"), "config.order names 'distil': use names of config.phases"),
        ("order", ("sprint", "teacher"), "config.order sprint, teacher: .* in the order of their"),
        ("order", ("teacher", "sprint", "sprint"), "name each phase once"),
        ("order", (), "config.order is empty"),
    ],
)
def test_phases_that_cannot_run_are_named(path, value, words):
    """Each is one line, before anything is compiled."""
    tree = card(preset="sprint").to_dict()
    *sections, name = path.split(".")
    section = functools.reduce(dict.__getitem__, sections, tree)
    section[name] = {value: section[name][value]} if name == "optimizers" else value
    with pytest.raises(UserError, match=words) as error:
        config.parse(tree)
    assert "\n" not in str(error.value)


def test_a_config_of_version_0_1_names_the_new_keys():
    """Each old key has a new name that exists in today's cards."""
    with pytest.raises(UserError, match="version 0.1, .* is now config.phases.sprint.steps"):
        config.parse({"seed": 0, "sprint": {"steps": 4}})
    today = weights.flatten(card("controlnet").to_dict())
    for old, new in RENAMED.items():
        assert any(f"{key}.".startswith(f"{new}.") for key in today), (old, new)
        assert not any(f"{key}.".startswith(f"{old}.") for key in today), (old, new)
    assert renamed("sprint.steps") == "phases.sprint.steps"
    assert renamed("sprint.max_time") == "phases.sprint.objective.max_time"
    assert renamed("teacher.optimizer.lr") == "phases.teacher.optimizers.network.lr"
    assert renamed("teacher.start") is None


def test_batches_that_normalize_in_unequal_groups_are_refused():
    """The error comes before training, for all batches that the heads would refuse, alone or with
    misaligned ones.

    No other batch is refused.
    """

    def normalizes(batch):
        """Return whether the heads accept a batch."""
        try:
            return jax.eval_shape(
                discriminator.batch_norm_local, jnp.zeros((batch, 1, 1)), jnp.ones(1), jnp.zeros(1)
            )
        except ValueError:
            return None

    for batch in range(2, 65):
        tree = card(preset="sprint")
        tree.phases.sprint.batch = batch
        holds = normalizes(batch) and normalizes(2 * batch)
        with (
            contextlib.nullcontext()
            if holds
            else pytest.raises(UserError, match=f"sprint.batch {batch}")
        ):
            config.parse(tree)


def test_a_controlnet_that_nothing_trains_or_shows_is_named():
    tree = card(preset="sprint").to_dict()
    tree["control"]["depth"] = 3
    with pytest.raises(
        UserError, match="control.pretrained is empty and config.phases.control.steps is 0"
    ):
        config.parse(tree)
    tree["control"]["condition"] = "hed"
    tree["phases"]["control"]["steps"] = 10
    with pytest.raises(UserError, match="condition hed needs encoded images"):
        config.parse(tree)


def test_encoded_images_have_no_rough_sketches():
    """Fails when the share is silently not used."""
    tree = card(preset="emoji").to_dict()
    config.parse(tree)
    tree["control"]["freehand"] = 0.5
    with pytest.raises(
        UserError,
        match="config.control.freehand 0.5: encoded images have no rough sketches, use 0",
    ) as error:
        config.parse(tree)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "preset, share",
    [("shapes", 0.5), ("smoke", 0.5), ("sana_600m", 0.0), ("sana_1600m", 0.0)],
)
def test_cards_of_the_controlnet_set_the_share(preset, share):
    assert config.parse(card("controlnet", preset)).control.freehand == share

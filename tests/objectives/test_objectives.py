"""The seam for objectives: methods alone and together, rounds, roles, phases and needs."""

import dataclasses
import functools
import shutil
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers.arrays import same_bits
from helpers.configs import card
from helpers.distillation import (
    batch,
    frozen,
    jit,
    networks,
    settings,
    teacher,
    tiny_config,
)
from sprint_jax import build, config
from sprint_jax.errors import UserError
from sprint_jax.objectives import base, guided, ladd, scm, step
from sprint_jax.storage import weights
from sprint_jax.training import datasets, loop, run, sharding, stage, stages
from sprint_jax.training.costs import Costs

DESCENT = {"student": optax.sgd(1.0), "heads": optax.sgd(0.05)}


def alone(kind, name):
    """Return the settings of one method, with the values of the card's sCM + LADD."""
    values = vars(settings()) | {"kind": name}
    return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind)})


@functools.cache
def student_start():
    """Return parameters that a student begins from."""
    begin = lambda: guided.begin_student(settings(), networks(), frozen(), None, jax.random.key(1))
    return jit(begin)()


def start_and_step(objective, role):
    """Return (state at step 0, step of a role), not compiled."""
    state = step.start(
        objective, DESCENT, ema=0.9, frozen=frozen(), begin=student_start(), key=jax.random.key(2)
    )
    ema = 0.9 if role == objective.main else 0.0
    update = objective.updates[role]
    return state, step.make_step(update, DESCENT[role], ema=ema, accumulate=1, seed=0)


def both_after(one, other, role):
    """Return ((state, report), (state, report)) after the same update by two settings."""
    teacher()
    started = [start_and_step(each.objective(networks()), role) for each in (one, other)]
    states, updates = zip(*started, strict=True)
    # In one program, so that the shared part is compiled once.
    together = jit(lambda states, *rest: [u(s, *rest) for u, s in zip(updates, states)])
    return together(states, frozen(), batch())


def test_scm_alone_is_the_generator_without_ladd():
    """The same draws give the same loss and the same gradient.

    Fails when sCM alone splits its key otherwise, and when its loss leaves out the log-variance.
    """
    (mine, found), (_, expected) = both_after(
        alone(scm.Scm, "scm"), settings(adv_weight=0.0), "student"
    )
    assert mine.roles.keys() == {"student"}
    assert found.scalars.keys() == expected.scalars.keys() and "scm" in found.scalars
    for name, value in (found.scalars | found.norms).items():
        wanted = (expected.scalars | expected.norms)[name]
        np.testing.assert_allclose(value, wanted, rtol=1e-6, err_msg=name)
    assert found.norms["grad_norm"] > 0


@pytest.mark.parametrize("role", ["student", "heads"])
def test_ladd_alone_is_the_pair_without_scm(role):
    """Both updates are the same, and each leaves the other role's bits alone.

    Fails when LADD alone splits its key otherwise, and when its student's update has another
    weight.
    """
    (mine, found), (_, expected) = both_after(
        alone(ladd.Ladd, "ladd"), settings(scm_weight=0.0, adv_weight=1.0), role
    )
    assert found.scalars.keys() == expected.scalars.keys()
    assert "scm" not in found.scalars
    for name, value in (found.scalars | found.norms).items():
        wanted = (expected.scalars | expected.norms)[name]
        np.testing.assert_allclose(value, wanted, rtol=1e-6, err_msg=name)
    before, _ = start_and_step(alone(ladd.Ladd, "ladd").objective(networks()), role)
    for name in ("student", "heads"):
        assert same_bits(mine.roles[name], before.roles[name]) == (name != role)


# --- rounds: an objective of vectors, which compiles in no time ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vectors:
    """Settings of an objective whose student and heads are vectors, each drawn to a number."""

    kind: Literal["vectors"] = "vectors"
    round: tuple[str, ...] = ("student", "heads", "heads")
    names: tuple[str, str] = ("disc", "disc_grad_norm")

    def problems(self):
        """Yield nothing."""
        yield from ()

    def needs(self):
        """Return needs of nothing."""
        return base.Needs(teacher=False)

    def objective(self, networks):
        """Build the objective."""

        def update(role, names):
            return base.Update(
                role=role,
                draw=lambda key, batch, frozen: {"x": batch["latent"].mean((1, 2, 3))},
                loss=lambda params, draws, state, frozen: (
                    jnp.square(params["w"]["v"] - draws["x"][:, None] - 1.0).mean(),
                    base.Aux(),
                ),
                names=names,
            )

        own = {"student": ("loss", "grad_norm"), "heads": self.names}
        begin = {role: base.Start({"w": {"v": jnp.zeros(2)}}) for role in own}
        return base.Objective(
            main="student",
            round=self.round,
            updates={role: update(role, names) for role, names in own.items()},
            start=lambda frozen, begin_from, key: begin,
            sampler="renoise",
        )


class Rows:
    """Stands in for `Records`."""

    def __init__(self):
        self.written = []

    def rewind(self, stage, step):
        self.written = [row for row in self.written if row[0] != stage or row[1] <= step]

    def write(self, stage, step, scalars):
        self.written.append((stage, step, {k: float(v) for k, v in scalars.items()}))

    def images(self, step, images):
        pass


def settings_of_run(every):
    """Return a section `run` with rows and checkpoints each `every` steps and no previews."""
    c = tiny_config().run
    return dataclasses.replace(
        c, log_every=every, checkpoint_every=every, preview_every=0, keep=10, quick_compile=False
    )


def one_device():
    """Return a mesh of one device."""
    return sharding.mesh(1, 1, jax.devices()[:1])


def vector_stage(steps, **phase):
    """Return a stage of the vectors."""
    optimizer = tiny_config().phases["sprint"].optimizers["heads"]
    c = stages.with_phase(
        tiny_config(),
        "sprint",
        objective=Vectors(),
        optimizers=dict.fromkeys(("student", "heads"), optimizer),
        steps=steps,
        **phase,
    )
    return stages.make(c, "sprint", datasets.Shapes(c))


def test_a_role_that_comes_twice_in_a_round_is_compiled_once(tmp_path, monkeypatch):
    """Each role counts its own updates, and its schedule runs over them.

    Fails when every entry of a round is lowered, and when a role counts the steps of all.
    """
    lowered, scheduled, lower = [], [], stage.Placed.lower
    monkeypatch.setattr(
        stage.Placed, "lower", lambda *given: lowered.append(given[1]) or lower(*given)
    )
    make = stages.optimizers.make

    def counting(o, *, updates, batch, rules):
        scheduled.append(updates)
        return make(o, updates=updates, batch=batch, rules=rules)

    monkeypatch.setattr(stages.optimizers, "make", counting)
    made, rows = vector_stage(6), Rows()
    final = loop.train(made, settings_of_run(3), one_device(), tmp_path, rows, print)
    assert made.labels == ("student", "heads", "heads") and len(lowered) == 2
    assert int(final.step) == 6
    assert {name: int(role.updates) for name, role in final.roles.items()} == {
        "student": 2,
        "heads": 4,
    }
    assert scheduled == [2, 4]
    assert [row[:2] for row in rows.written] == [("sprint", 3), ("sprint", 6)]
    assert {"loss", "grad_norm", "disc", "disc_grad_norm", "rejected"} <= rows.written[0][2].keys()


def test_the_average_is_of_the_main_role_alone():
    """Fails when every role keeps one, and when an update of another role moves it."""
    made = vector_stage(6, ema=0.9)
    state = made.start(made.frozen, made.init_arrays)
    assert state.roles["heads"].ema is None
    assert same_bits(state.roles["student"].ema, state.roles["student"].params)
    student, heads, _ = made.functions
    first, _ = jax.jit(student)(state, made.frozen, batch())
    second, _ = jax.jit(heads)(first, made.frozen, batch())
    assert same_bits(second.roles["student"], first.roles["student"])
    assert second.roles["heads"].ema is None
    assert same_bits(made.result(second), first.roles["student"].ema)
    assert not same_bits(made.result(second), first.roles["student"].params)
    alone = vector_stage(6, ema=0.0)
    assert same_bits(alone.result(first.replace()), made.result(first))


def test_roles_do_not_share_names_in_the_metrics():
    with pytest.raises(ValueError, match="loss, grad_norm, loss, other: give each names"):
        Vectors(names=("loss", "other")).objective(None)


# --- phases ---


def test_the_control_phase_trains_the_controlnet_alone():
    """Its role holds the ControlNet's parameters; the trunk is frozen and no part of the result."""
    c = config.parse(card("controlnet"))
    trunk, control = (weights.abstract(model) for model in (build.teacher(c), build.controlnet(c)))
    made = stages.make(c, "control", datasets.Abstract(c), teacher=trunk)
    state = jax.eval_shape(made.start, made.frozen, made.init_arrays)
    assert state.roles.keys() == {"network"}
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert shapes(made.result(state)) == shapes(control)
    after, _ = jax.eval_shape(
        made.functions[0], state, made.frozen, datasets.abstract_batch(c, made.batch)
    )
    assert shapes(after) == shapes(state)


@pytest.mark.parametrize("kind", ["ladd", "scm_ladd"])
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"objective.head_blocks": (0, 7)}, r"objective.head_blocks \(0, 7\): .* within 0..6"),
        ({"batch": 12, "accumulate": 2}, "batch 12: with accumulate 2 use a multiple of 16"),
        ({"batch": 18}, "batch 18: the discriminator normalizes in equal groups"),
        ({"batch": 1}, "batch 1: .* needs 2 or more"),
        ({"network": "teacher"}, "network teacher: .* trains student"),
        ({"steps": 5}, "steps 5: use a multiple of 2 .student and heads take turns"),
    ],
)
def test_needs_are_refused_before_anything_compiles(kind, changes, words):
    """By `parse`, in one line that names the key."""
    tree = card(preset="sprint")
    phase = tree.phases.sprint
    if kind == "ladd":
        phase.objective = vars(alone_of(phase.objective))
    config.parse(tree)
    for path, value in changes.items():
        *sections, name = path.split(".")
        functools.reduce(lambda node, part: node[part], sections, phase)[name] = value
    with pytest.raises(UserError, match=f"config.phases.sprint.{words}") as error:
        config.parse(tree)
    assert "\n" not in str(error.value)


def alone_of(section):
    """Return the settings of LADD alone with the values of a card's section."""
    values = section.to_dict() | {"kind": "ladd"}
    return ladd.Ladd(**{f.name: values[f.name] for f in dataclasses.fields(ladd.Ladd)})


def test_a_method_that_needs_a_teacher_cannot_train_one():
    """Fails when `Needs.teacher` is not looked at."""

    class Greedy(Vectors):
        def needs(self):
            return base.Needs(teacher=True, network=("base", "student"))

    c = stages.with_phase(config.parse(card()), "teacher", objective=Greedy())
    refused = [message for holds, message in config._rules(c) if not holds]
    assert any("vectors learns from a teacher" in message for message in refused)
    c = stages.with_phase(config.parse(card()), "sprint", objective=Greedy())
    assert not any("learns from a teacher" in m for holds, m in config._rules(c) if not holds)


def two_students():
    """Return a config that trains its student by sCM and goes on from it by sCM + LADD."""
    c = dataclasses.replace(tiny_config(), run=settings_of_run(2))
    sprint = dataclasses.replace(c.phases["sprint"], steps=4, batch=8)
    optimizers = {"student": sprint.optimizers["student"]}
    first = dataclasses.replace(
        sprint, seed=3, objective=alone(scm.Scm, "scm"), optimizers=optimizers
    )
    return dataclasses.replace(c, order=("scm", "sprint"), phases={"scm": first, "sprint": sprint})


def train_students(c, workdir):
    """Return (parameters of the student, rows) of the phases in a work directory."""
    workdir.mkdir(exist_ok=True)
    rows = Rows()
    job = run.Job(
        config=c,
        workdir=workdir,
        mesh=one_device(),
        data=datasets.Shapes(c),
        records=rows,
        costs=Costs(None),
        say=stage.silent,
    )
    return run.trained(job, "student", teacher=teacher()), rows.written


def test_resumed_in_the_second_of_two_student_phases(tmp_path, monkeypatch):
    """Training continues from a checkpoint of the second phase to the same bits.

    The second phase begins from the result of the first. Fails when it begins from the teacher,
    and when the first phase is trained again.
    """
    seen, train = [], loop.train

    def watched(made, *rest, **options):
        final = train(made, *rest, **options)
        seen.append((made, final))
        return final

    monkeypatch.setattr(loop, "train", watched)
    c = two_students()
    whole, rows = train_students(c, tmp_path / "whole")
    (first, after_first), (second, _) = seen
    assert [first.name, second.name] == ["scm", "sprint"] and first.init_arrays is None
    assert same_bits(second.init_arrays, first.result(after_first))
    assert [row[:2] for row in rows] == [("scm", 2), ("scm", 4), ("sprint", 2), ("sprint", 4)]
    shutil.copytree(tmp_path / "whole", tmp_path / "parted")
    (tmp_path / "parted/student.safetensors").unlink()
    shutil.rmtree(tmp_path / "parted/checkpoints/sprint/4")
    parted, again = train_students(c, tmp_path / "parted")
    assert [row[:2] for row in again] == [("sprint", 4)] and again == rows[-1:]
    assert same_bits(parted, whole)
    kept = weights.load(tmp_path / "parted/student.safetensors", weights.abstract(build.student(c)))
    assert same_bits(kept, whole)

"""Every objective on the loop: stopped and resumed bit for bit, and on prompts alone."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from helpers.arrays import normals, same_bits
from helpers.configs import card
from helpers.objectives import (
    CMT,
    DMD,
    EULERIAN,
    LAGRANGIAN,
    POLICY,
    PROXY,
    RCM,
    SEMIGROUP,
    TBCM,
)
from sprint_jax import build, config
from sprint_jax.conversion import configs
from sprint_jax.errors import UserError
from sprint_jax.objectives import rollouts
from sprint_jax.sampling import generation, loading, programs
from sprint_jax.storage import run_files, weights
from sprint_jax.training import datasets, hosts, loop, pairs, run, sharding, stages
from sprint_jax.training.records import Records

BATCH, STEPS = 4, 4
LADDER = ("regression", "repair")
CASES = {
    "regression": None,
    "repair": None,
    "cmt": CMT,
    "tbcm": TBCM,
    "eulerian": dataclasses.replace(EULERIAN, velocity="self"),
    "lagrangian": dataclasses.replace(LAGRANGIAN, states="rollout", diagonal=0.0, stored=8),
    "semigroup": SEMIGROUP,
    "dmd": DMD,
    "rcm": RCM,
    "policy": POLICY,
    "proxy_reward": PROXY,
}


def tree(name, settings):
    """Return a card of one narrow block with one phase of an objective."""
    tree = card(preset="shapes")
    tree.model.update(width=16, depth=1, heads=2, cross_heads=2, unroll=1)
    tree.model.target_embed = name in ("cmt", "eulerian", "lagrangian", "semigroup")
    tree.evaluation.update(prompts=16, samples=8, batch=16, reference=16, diversity=0)
    tree.run.update(log_every=2, checkpoint_every=2, preview_every=0, quick_compile=True)
    phase = tree.phases[name if name in LADDER else "regression"].to_dict()
    for other in LADDER:
        del tree.phases[other]
    phase |= dict(batch=BATCH, steps=STEPS)
    if settings is None:
        phase["objective"] |= dict(stored=8, route_steps=3)
    else:
        phase["objective"] = dataclasses.asdict(settings)
        student = phase["optimizers"]["student"]
        phase["optimizers"] = {role: dict(student) for role in settings.round}
        if settings.needs().group > BATCH:
            phase["batch"] = settings.needs().group
    tree.phases[name] = phase
    tree.order = ("teacher", "finetune", "control", name)
    return tree


@functools.cache
def teacher():
    c = config.parse(tree("tbcm", TBCM))
    shapes = jax.eval_shape(build.teacher(c).init, jax.random.key(0))
    leaves, kind = jax.tree.flatten(shapes)
    return jax.tree.unflatten(kind, [0.2 * normals(*a.shape, seed=i) for i, a in enumerate(leaves)])


@pytest.mark.parametrize("name", CASES)
def test_stopped_and_resumed_is_bit_equal(name, tmp_path):
    """Parameters, average, optimizer, counters and rows.

    Fails when a draw depends on when the process began, or a state is not saved.
    """
    c = config.parse(tree(name, CASES[name]))
    data, mesh, compiled = datasets.Shapes(c), sharding.mesh(1, 1), {}
    stage = stages.make(c, name, data, teacher=teacher())

    def train(folder, steps):
        one = stage
        if c.phases[name].objective.needs().stored:
            one = pairs.feed(stage, c, data, teacher(), folder, str)
        one = dataclasses.replace(one, steps=steps)
        records = Records(folder)
        state = loop.train(one, c.run, mesh, folder, records, str, compiled=compiled, bar=False)
        state = hosts.to_host(state)
        records.close()
        return state

    folders = tmp_path / "whole", tmp_path / "parts"
    for folder in folders:
        folder.mkdir()
    whole = train(folders[0], STEPS)
    train(folders[1], STEPS // 2)
    resumed = train(folders[1], STEPS)
    assert int(whole.step) == int(resumed.step) == STEPS
    assert same_bits(whole, resumed)
    rows = [(folder / run_files.METRICS).read_text().splitlines() for folder in folders]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    assert all(np.isfinite(v) for v in json.loads(rows[0][-1]).values() if type(v) is float)


PROMPTS = ["a red circle left of a blue square", "two green triangles", "a white square"] * 6


def prompts_card(tmp_path, lines, **objective):
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    changed = tree("cmt", dataclasses.replace(CMT, pairs="ends", stored=0))
    changed.model.target_embed = False
    changed.data.prompts = str(tmp_path / "prompts.txt")
    changed.evaluation.update(split="heldout")
    changed.phases.cmt.objective.update(objective)
    changed.run.preview_every = 4
    return changed


def test_prompts_alone_are_a_data_set(tmp_path):
    """A whole run: the student follows, images are drawn, and no distance needs real ones."""
    changed, weights_file = prompts_card(tmp_path, PROMPTS), tmp_path / "teacher.safetensors"
    weights.save(weights_file, teacher())
    changed.teacher.pretrained = str(weights_file)
    c, said = config.parse(changed), []
    summary = run.run(c, tmp_path / "run", said.append)
    assert summary["frechet"] == {} and "real" not in summary["scores"]
    assert set(summary["scores"]) == {
        "teacher_20",
        "teacher_1",
        "student_1",
        "student_2",
        "student_4",
    }
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"samples_teacher.png", "samples_1.png", "student.safetensors", "report.html"} <= made
    assert "samples_real.png" not in made
    assert len(list((tmp_path / "run/previews").iterdir())) == 2
    assert "score" in json.loads((tmp_path / "run/phases.json").read_text())["cmt"]
    page = (tmp_path / "run/report.html").read_text()
    assert "Parts of the run" in page and "Fréchet" not in page


def test_a_flow_map_is_trained_scored_and_drawn_by_jumps(tmp_path):
    """A whole run, and its folder as others load it: two jumps, written out here.

    Fails when the sampler denoises and renoises, forgets the second time, or takes other times.
    """
    changed, weights_file = tree("semigroup", SEMIGROUP), tmp_path / "teacher.safetensors"
    weights.save(weights_file, teacher())
    changed.teacher.pretrained = str(weights_file)
    changed.evaluation.schedule = "even"
    c = config.parse(changed)
    summary = run.run(c, tmp_path / "run", str)
    assert {"student_1", "student_2", "student_4"} <= set(summary["scores"])

    pipe = loading.load(tmp_path / "run", dtype="float32")
    assert pipe.schedule == "even"
    options = dict(steps=2, guidance_scale=1.25, output="latent")
    latents = generation.generate(pipe, ["two red circles"], seed=3, **options)
    model, params = (
        build.student(c),
        weights.load(tmp_path / "run/student.safetensors", weights.abstract(build.student(c))),
    )
    text, mask = build.text_encoder(c).encode(["two red circles"])
    x = programs.noises(np.int32(3), np.arange(1), build.latent_shape(c), 1)[0]
    w = np.float32([1.25])
    for t, r in ((1.0, 0.5), (0.5, 0.0)):
        at, to = np.float32([t]), np.float32([r])
        v = model.apply(params, x, at, text, mask, w, target=to).velocity
        x = x - (t - r) * v  # a jump in flow coordinates, between which TrigFlow only scales
    np.testing.assert_allclose(latents, x, atol=2e-5)
    with pytest.raises(UserError, match="diffusers has no network with a second time"):
        configs.transformer_json(model)


def test_rollouts_of_prompts_are_stored(tmp_path):
    """The default ladder's way, on prompts alone. Fails when making them asks for latents."""
    changed = prompts_card(tmp_path, PROMPTS)
    changed.phases.cmt.objective.stored = 8
    c = config.parse(changed)
    data = datasets.open_dataset(c, str)
    stage = stages.make(c, "cmt", data, teacher=teacher())
    stage = pairs.feed(stage, c, data, teacher(), tmp_path, str)
    with stage.batches(BATCH, 0, 1, 0, 1) as batches:
        rows = next(batches)
    assert rows["nodes"].shape == (BATCH, 5, *build.latent_shape(c))
    np.testing.assert_array_equal(rows["latent"], rows["nodes"][:, -1].astype(np.float32))


def test_prompts_are_read_in_the_same_order_by_any_number_of_processes(tmp_path):
    changed = prompts_card(tmp_path, [f"{n} red circles" for n in ("two", "three")] * 4)
    changed.evaluation.update(prompts=8)
    c = config.parse(changed)
    data = datasets.open_dataset(c, str)

    def rows(start, process=0, processes=1):
        with data.batches(4, start, start + 3, process, processes) as batches:
            return [b["text"] for b in batches]

    whole, later = rows(0), rows(1)
    np.testing.assert_array_equal(whole[1:], later[:2])
    halves = [rows(0, process, 2) for process in range(2)]
    for i, each in enumerate(whole):
        np.testing.assert_array_equal(each, np.concatenate([half[i] for half in halves]))
    assert len({r.tobytes() for r in np.concatenate(whole[:2])}) == 2  # an epoch has all rows


def test_zeros_stand_for_latents(tmp_path):
    c = config.parse(prompts_card(tmp_path, PROMPTS))
    data = datasets.open_dataset(c, str)
    with data.batches(4, 0, 1, 0, 1) as batches:
        rows = data.prepare(data.frozen, next(batches))
    assert rows["latent"].shape == (4, *build.latent_shape(c)) and not rows["latent"].any()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "config.data.prompts=.* holds no prompt"),
        (["a red circle", "a purple dragon"] * 8, "prompts.txt: word 'dragon' in prompt"),
        (["a red circle"] * 3, "has 3 prompts and config.evaluation.prompts is 16"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path, lines, words):
    c = config.parse(prompts_card(tmp_path, lines))
    with pytest.raises(UserError, match=words):
        datasets.open_dataset(c, str)


def test_objectives_on_images_refuse_prompts(tmp_path):
    changed = prompts_card(tmp_path, PROMPTS)
    changed.model.target_embed = True
    changed.phases.cmt.objective = dataclasses.asdict(EULERIAN)
    with pytest.raises(UserError, match="eulerian learns from images and config.data.prompts"):
        config.parse(changed)


def test_a_derivative_of_a_derivative_needs_plain_attention():
    """For objectives outside the package that need one; kernels have none."""
    changed = tree("cmt", CMT)
    changed.model.attention = "pallas"
    parsed = config.parse(changed)

    class Second(type(parsed.phases["cmt"].objective)):
        def needs(self):
            return dataclasses.replace(super().needs(), plain=True)

    held = dataclasses.asdict(parsed.phases["cmt"].objective)
    phase = dataclasses.replace(parsed.phases["cmt"], objective=Second(**held))
    found = [
        m for ok, m in config._needs_of_others(parsed, phase, True, "config.phases.cmt") if not ok
    ]
    assert found == [
        "config.phases.cmt: cmt differentiates a derivative, which kernels refuse: set "
        "config.model.attention=plain"
    ]
    assert isinstance(phase.objective, rollouts.RolloutTerm)

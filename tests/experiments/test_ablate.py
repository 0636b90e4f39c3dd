"""The ablations: the grid is whole, verdicts follow their rule, finished runs are not run again, reports render."""

import dataclasses
import json
import math
import re
import runpy

import jax
import numpy as np
import pytest
from PIL import Image, ImageFont

from experiments.ablations import experiments, grid, plots, report, suite, verdict
from helpers.runs import ROOT
from sprint_jax import build, config
from sprint_jax.diffusion import trigflow
from sprint_jax.errors import UserError
from sprint_jax.models.linear_dit import LinearDiT
from sprint_jax.storage import weights
from sprint_jax.training import datasets
from sprint_jax.training import run as run_lib

CARD = runpy.run_path(str(ROOT / "configs/sprint.py"))["get_config"]
SCALE = dataclasses.replace(grid.TINY, name="test")


def plain(c):
    return weights.flatten(json.loads(json.dumps(config.to_dict(c))))


@pytest.mark.parametrize("scale", grid.SCALES, ids=lambda s: s.name)
def test_every_change_is_a_key_and_changes_exactly_what_it_says(scale):
    card = CARD(scale.preset)
    by_content = {}
    for r in grid.RUNS:
        assert r.kind in grid.KINDS
        before = plain(experiments.configuration(card, scale, grid.Run("", r.kind, {}, r.size), 0))
        after = plain(experiments.configuration(card, scale, r, 0))
        assert {k for k in before if before[k] != after[k]} == set(r.changes), r.name
        assert (
            by_content.setdefault((r.kind, repr(sorted(after.items()))), r.name) == r.name
        )  # no run twice
        again = plain(experiments.configuration(card, scale, r, 2))
        assert {k for k in after if after[k] != again[k]} == {"seed", "data.seed"}


def test_an_unknown_key_is_refused():
    with pytest.raises(UserError, match="phases.sprint.objective.lamda"):
        experiments.with_changes(CARD(), {"phases.sprint.objective.lamda": 1.0})


def test_the_tables_of_the_paper_are_covered_and_every_run_is_used():
    assert {t.name for t in grid.TABLES} >= {
        "table1",
        "table3",
        "table4",
        "table5",
        "table6",
        "figure3a",
        "figure3b",
        "figure3d",
        "figure5",
        "samplers",
    }
    names = [r.name for r in grid.RUNS]
    assert len(set(names)) == len(names)
    every = [t for s in grid.SUITES for t in s.tables]
    assert {r.name for r in grid.runs_of(every)} == set(names)
    assert len({t.name for t in every}) == len(every)
    for t in every:
        labels = [row.label for row in t.rows]
        assert len(set(labels)) == len(labels)
        assert t.claims and {label for pair in t.claims for label in pair} <= set(labels)
        assert t.rule in ("paper", "better", "equal")


def test_shared_runs_are_made_once_and_table_three_comes_first():
    runs = [r.name for r in grid.runs_of(grid.TABLES)]
    assert runs[:3] == ["scm", "ladd", "base"] and runs.count("base") == 1
    assert [r.name for r in grid.runs_of([t for t in grid.TABLES if t.name == "table6"])] == [
        "max_time_0",
        "base",
        "max_time_70",
    ]


# By hand: means 3 and 1, variances 1 and 1, three seeds: SE = sqrt(2/3), 4 degrees of freedom, bound 2.1318 SE = 1.741.
HIGH, LOW = [2.0, 3.0, 4.0], [0.0, 1.0, 2.0]


def test_verdicts_by_hand():
    found = verdict.compare(HIGH, LOW, higher=True)
    assert (found.word, found.difference) == (verdict.AGREES, 2.0)
    assert found.error == pytest.approx(math.sqrt(2 / 3))
    assert verdict.compare(LOW, HIGH, higher=True).word == verdict.DISAGREES
    assert verdict.compare(LOW, HIGH, higher=False).word == verdict.AGREES
    near = [x + 1.70 for x in LOW]
    assert verdict.compare(near, LOW, higher=True).word == verdict.UNRESOLVED
    assert verdict.compare([x + 1.75 for x in LOW], LOW, higher=True).word == verdict.AGREES
    assert verdict.compare(LOW, near, higher=True).word == verdict.UNRESOLVED
    one = verdict.compare([3.0], LOW, higher=True)
    assert one.word == verdict.UNRESOLVED and math.isnan(one.error) and one.seeds is None
    assert verdict.compare([3.0, math.inf], LOW, higher=True).word == verdict.UNRESOLVED
    assert experiments.geometric_mean([1.0, 100.0, math.nan]) == pytest.approx(10.0)
    assert experiments.geometric_mean([math.nan]) == math.inf


def test_unequal_spreads_have_welchs_degrees_of_freedom():
    # Variances 0 and 1: two degrees of freedom, bound 2.9200 / sqrt(3) = 1.686 (of four it would be 1.231).
    assert verdict.compare([2.6] * 3, LOW, higher=True).word == verdict.UNRESOLVED
    assert verdict.compare([2.7] * 3, LOW, higher=True).word == verdict.AGREES


def test_equality_by_hand():
    assert verdict.equal([0.9, 1.9, 0.2], LOW, higher=True).word == verdict.AGREES
    assert (
        verdict.equal([x + 0.9 for x in LOW], LOW, higher=True).word == verdict.AGREES
    )  # one spread is 1, SE 0.816
    assert verdict.equal([x + 1.2 for x in LOW], LOW, higher=True).word == verdict.UNRESOLVED
    assert verdict.equal(HIGH, LOW, higher=True).word == verdict.DISAGREES


def test_power_is_what_simulation_finds():
    rng = np.random.RandomState(0)
    one, other = 1.5 + rng.randn(1500, 5), rng.randn(1500, 5)
    found = np.mean(
        [verdict.compare(a, b, higher=True).word == verdict.AGREES for a, b in zip(one, other)]
    )
    assert verdict.power(1.5, 2.0, 5) == pytest.approx(found, abs=0.04)
    # Difference of one standard deviation: 13.9 by Student's test (tables of two-sample sizes at 5 % one-sided, 80 %).
    assert verdict.seeds_to_resolve([0.0, math.sqrt(2)], [1.0, 1 + math.sqrt(2)]) == 14
    assert verdict.seeds_to_resolve(LOW, LOW) is None
    assert verdict.seeds_to_resolve([1.0, 1.0], [2.0, 2.0]) == 2
    assert verdict.seeds_to_resolve([0.0, 1.0], [0.001, 1.001]) is None


class Fake:
    """A runner that counts its calls; stops like a person at the call numbered `stop`."""

    def __init__(self, stop=None):
        self.calls, self._stop = [], stop

    def __call__(self, r, seed, folder, advance):
        advance(0.5)
        if len(self.calls) == self._stop:
            raise KeyboardInterrupt
        self.calls.append((r.name, seed))
        (folder / "checkpoints").mkdir()
        return {"score1": 0.1 * seed, "frechet1": 1.0, "score2": 0.2 * seed, "frechet2": 0.5}


RUNS = grid.runs_of(grid.TABLES)[:3]
ABOUT = {"commit": "0123456789", "device": "cpu", "jax": "0"}


def go(workdir, fake, seeds=2, scale=SCALE, **more):
    return suite.go(RUNS, seeds, scale, workdir, fake, about=ABOUT, say=lambda line: None, **more)


def test_a_finished_run_is_not_run_again(tmp_path):
    first, second, third = Fake(stop=3), Fake(), Fake()
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, first)
    begun = tmp_path / "runs" / "ladd_1" / "checkpoints"
    begun.mkdir()  # the run in progress keeps what it has saved
    assert not (tmp_path / "runs" / "ladd_0" / "checkpoints").exists()
    begun.rmdir()
    rows = go(tmp_path, second)
    assert first.calls + second.calls == [(r.name, seed) for r in RUNS for seed in (0, 1)]
    assert [(row["run"], row["seed"]) for row in rows] == first.calls + second.calls
    assert suite.read(tmp_path) == rows
    assert go(tmp_path, third) == rows and not third.calls
    go(tmp_path, third, seeds=3)
    assert third.calls == [(r.name, 2) for r in RUNS]


def test_a_line_cut_off_is_done_again_and_other_settings_are_refused(tmp_path):
    go(tmp_path, Fake())
    path = tmp_path / suite.RESULTS
    path.write_text(path.read_text()[:-20])
    cut = path.read_bytes()
    assert (
        len(suite.read(tmp_path)) == 5 and path.read_bytes() == cut
    )  # reading changes nothing under a running suite
    again = Fake()
    (tmp_path / "runs" / "base_1" / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "runs" / "base_1" / "checkpoints").rmdir()
    go(tmp_path, again)
    assert again.calls == [("base", 1)]
    assert len(suite.read(tmp_path)) == 6
    other = dataclasses.replace(SCALE, base=SCALE.base | {"phases.sprint.steps": 2})
    with pytest.raises(UserError, match="other settings"):
        go(tmp_path, Fake(), scale=other)


def test_after_each_configuration_the_report_is_told(tmp_path):
    seen = []
    go(tmp_path, Fake(), after=lambda rows: seen.append(len(rows)))
    assert seen == [2, 4, 6]


def recorded(numbers):
    """Rows from {run: {metric: values over seeds}}."""
    for name, metrics in numbers.items():
        for seed in range(len(next(iter(metrics.values())))):
            yield {
                "run": name,
                "seed": seed,
                "seconds": 60.0,
                "metrics": {k: v[seed] for k, v in metrics.items()},
                **ABOUT,
            }


ROWS = list(
    recorded(
        {
            "scm": {"score2": [0.30, 0.32, 0.31], "frechet2": [0.20, 0.22, 0.21]},
            "ladd": {"score2": [0.40, 0.20, 0.30], "frechet2": [0.10, 0.12, 0.11]},
            "base": {"score2": [0.50, 0.51, 0.52], "frechet2": [0.10, 0.11, 0.12]},
            "norms_narrow": {"grad_norm": [1.0, 2.0, 4.0], "tangent_norm": [1.0, 1.1, 1.2]},
            "no_qk_norm_narrow": {
                "grad_norm": [100.0, 200.0, 400.0],
                "tangent_norm": [1.0, 1.1, 1.2],
            },
            "flow_50": {"score": [0.9, 0.8], "frechet": [0.01, 0.02]},
            "trigflow_50": {"score": [0.9, 0.8], "frechet": [0.01, 0.021]},
        }
    )
)


def table(name):
    return next(t for t in grid.TABLES if t.name == name)


def test_claims_go_the_way_of_the_papers_numbers():
    found = {(m, a, b): v.word for m, a, b, v in report.judge(table("table3"), ROWS)}
    assert found == {
        ("score2", "sCM + LADD", "sCM"): verdict.AGREES,
        ("score2", "sCM + LADD", "LADD"): verdict.AGREES,
        ("score2", "sCM", "LADD"): verdict.UNRESOLVED,
        ("frechet2", "sCM + LADD", "sCM"): verdict.AGREES,
        ("frechet2", "sCM + LADD", "LADD"): verdict.UNRESOLVED,
        ("frechet2", "sCM", "LADD"): verdict.DISAGREES,
    }
    # Table 5: by FID 1 : 0.5 is better than 1 : 1, by CLIP it is the other way round.
    rows = list(
        recorded(
            {
                "lambda_05": {"score2": [0.1, 0.2], "frechet2": [1.0, 1.1]},
                "lambda_1": {"score2": [0.7, 0.8], "frechet2": [5.0, 5.1]},
            }
        )
    )
    found = [(m, a, b, v.word) for m, a, b, v in report.judge(table("table5"), rows)]
    assert found == [
        ("score2", "1 : 1", "1 : 0.5", verdict.AGREES),
        ("frechet2", "1 : 0.5", "1 : 1", verdict.AGREES),
    ]
    norms = {m: v for m, _, _, v in report.judge(table("figure3a"), ROWS)}
    assert norms["grad_norm"].word == verdict.AGREES and norms[
        "grad_norm"
    ].difference == pytest.approx(2.0)
    assert norms["tangent_norm"].word == verdict.UNRESOLVED
    assert {v.word for *_, v in report.judge(table("table1"), ROWS)} == {verdict.AGREES}
    assert [
        m for m, *_ in report.judge(table("disc_samplers"), ROWS)
    ] == []  # FID alone, and one row of three


def test_the_report_renders_from_recorded_rows(tmp_path):
    path = tmp_path / "docs" / "ablations.md"
    path.parent.mkdir()
    report.write(path, ROWS, grid.PAPER, grid.TINY)
    text = path.read_text()
    assert "| sCM + LADD |  | 51.0 ± 0.6 % |" not in text  # no empty column for one step
    assert "| sCM + LADD | 51.0 ± 0.6 % | 0.1100 ± 0.0058 | 3 | 8.11 | 28.02 |" in text
    assert (
        "| whole caption right, 2 steps | sCM + LADD better than sCM | +20.0 ± 0.8 points | agrees |"
        in text
    )
    assert (
        "| gradient norm | with, narrow better than without, narrow | factor 100 (× or ÷ 1.76) | agrees |"
        in text
    )
    assert "flow Euler equals TrigFlow" in text
    assert "Nothing to judge yet." in text and "`sprint.steps` = 320" in text
    for name in re.findall(r"\]\((ablations/[\w.]+)\)", text):
        assert Image.open(path.parent / name).width > 500
    assert (path.parent / "ablations" / "table3.png").exists()


@pytest.mark.parametrize("asked, name", zip(grid.SUITES, ("ablations", "followups"), strict=True))
def test_the_reports_in_docs_say_of_their_tables_what_the_suites_say(asked, name):
    """And of seeds no more than they have: no title promises them."""
    text = (ROOT / f"docs/results/{name}.md").read_text()
    for t in asked.tables:
        assert (
            f"## {t.title}\n\n{t.note}\n" in text
            and f"| {t.title} |" in text
            and "seeds" not in t.title
        )


def test_plots_have_letters_for_all_that_they_say():
    """Of every title and label of both suites. Fails when a box stands for a letter that the font has not."""
    font = ImageFont.load_default(22)
    said = set(
        "".join(
            [
                *report.NAMES.values(),
                *(row.label for table in grid.TABLES + grid.FOLLOW_UPS for row in table.rows),
            ]
        )
    )
    box = bytes(font.getmask("\uffff"))
    assert "é" in said
    for letter in plots.plain("".join(sorted(said))):
        assert bytes(font.getmask(letter)) != box or letter == " ", letter


def test_a_plot_shows_a_value_where_its_axis_says():
    low, high, ticks = plots.axis([1.0, 1000.0], True)
    assert low < 0 < 3 < high and (
        ticks == [0.0, 1.0, 2.0, 3.0] or ticks == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    )
    image = np.asarray(plots.dots([("t", False, [("a", [0.0, 0.0]), ("b", [1.0, 1.0])])])).astype(
        int
    )
    blue = image[..., 2] - image[..., 0] > 40
    rows = np.flatnonzero(blue.any(1))
    upper, lower = blue[: rows.mean().astype(int)], blue[rows.mean().astype(int) :]
    assert np.flatnonzero(upper.any(0)).mean() < 450 < 1000 < np.flatnonzero(lower.any(0)).mean()
    assert (
        plots.axis([math.inf, 0.0], True)[:2] == plots.axis([], True)[:2]
    )  # nothing to show is no error


def test_without_transfer_the_network_is_taken_for_a_trigflow_one():
    """F made from it is the network at the state and angle themselves."""
    model = LinearDiT(
        in_channels=2,
        text_dim=4,
        width=16,
        depth=1,
        heads=2,
        cross_heads=2,
        mlp_ratio=2.0,
        patch_size=1,
        qk_norm=True,
        time_scale=1.0,
        guidance_embed=False,
        guidance_scale_factor=0.1,
        logvar_head=False,
        remat="none",
        unroll=1,
        dtype="float32",
        residual_dtype="float32",
        attention="plain",
    )
    rng = np.random.RandomState(0)
    params = jax.tree.map(
        lambda a: np.float32(0.3 * rng.randn(*a.shape)),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    u, text = np.float32(rng.randn(3, 2, 2, 2)), np.float32(rng.randn(3, 5, 4))
    t, mask = np.float32([0.1, 0.8, 1.5]), np.ones((3, 5), np.float32)
    wrapped = experiments.Untransferred(model)

    @jax.jit
    def both(u, t):
        F = trigflow.from_flow(lambda x, s: wrapped.apply(params, x, s, text, mask).velocity)
        x, s = trigflow.to_flow_state(u, t), trigflow.to_flow_time(t)
        seen = wrapped.apply(params, x, s, text, mask, features=(0,), velocity=False)
        expected = model.apply(params, u, t, text, mask, features=(0,))
        return (F(u, t), seen.features[0]), (expected.velocity, expected.features[0])

    for ours, expected in zip(*both(u, t), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-5)


def test_runs_of_one_structure_share_programs_that_are_told_the_rest(monkeypatch):
    """What two configurations of one structure differ in reaches the steps as arguments."""
    for name in ("make_generator_step", "make_discriminator_step"):
        told = lambda nets, c, seed: lambda state, frozen, batch: (c, seed)
        monkeypatch.setattr(experiments.sprint_step, name, told)
    by_structure = {}
    for r in (r for r in grid.RUNS if r.kind == "distil"):
        for seed in (0, 1):
            c = experiments.configuration(CARD(), grid.TINY, r, seed)
            _, functions = by_structure.setdefault(
                experiments._structure(c), experiments._sprint_programs(c, True)
            )
            for function in functions:
                settings, key = function(None, {"knobs": experiments._knobs(c)}, None)
                for field in dataclasses.fields(settings):
                    value, expected = getattr(settings, field.name), getattr(c.sprint, field.name)
                    assert value == (
                        np.float32(expected) if field.name in experiments.KNOBS else expected
                    ), (r.name, field.name)
                assert key == c.seed + 1  # as run.sprint_stage has it
    # Both losses, either alone, three weights, no embedding; the follow-ups: a warm-up, two lengths, three with the head alone.
    assert len(by_structure) == 13


@pytest.mark.long
def test_a_run_takes_the_updates_of_the_main_job():
    """Seed and times as arguments of the program give what they give as constants in it."""
    c = config.parse(CARD("smoke"))
    c = dataclasses.replace(
        c,
        seed=3,
        sprint=dataclasses.replace(c.sprint, max_time=0.3, p_mean=0.1, disc_std=1.3, batch=4),
    )
    data = datasets.Shapes(c)
    teacher = build.teacher(c).init(jax.random.key(5))
    batch = {
        k: jax.random.normal(jax.random.key(9), a.shape)
        for k, a in datasets.abstract_batch(c, 4).items()
    } | {"mask": np.ones((4, 16), np.float32)}
    stage = run_lib.sprint_stage(c, data, teacher)
    start, functions = experiments._sprint_programs(c, True)
    frozen = stage.frozen | {"knobs": experiments._knobs(c)}
    ours, theirs = start(frozen, {}), stage.start(stage.frozen, {})
    for mine, main in zip(functions, stage.functions, strict=True):
        ours, metrics = jax.jit(mine)(ours, frozen, batch)
        theirs, expected = jax.jit(main)(theirs, stage.frozen, batch)
        name = "grad_norm" if "loss" in metrics else "disc"
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5),
        ours.params,
        theirs.params,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5),
        ours.heads,
        theirs.heads,
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--only=table9",), ("table9", "table3")),
        (("--seeds=0",), ("--seeds=0",)),
        (("--report_only", "--workdir=nowhere"), ("results.jsonl", "--report_only")),
        (("--report=out.txt",), ("out.txt", ".md")),
        (("--report={}.md",), ("--report=", ".md is a folder")),
    ],
)
def test_bad_input_is_one_line(command, tmp_path, flags, words):
    (tmp_path / "a.md").mkdir()
    result = command("experiments.ablations", *(flag.format(tmp_path / "a") for flag in flags))
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr

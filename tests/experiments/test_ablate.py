"""The ablations: the grid, the rule of the verdicts, resuming, and reports."""

import dataclasses
import json
import math
import re
import types

import jax
import numpy as np
import pytest
from PIL import Image, ImageFont

from experiments.ablations import experiments, grid, plots, report, suite, verdict
from helpers.configs import card
from helpers.networks import linear_dit
from helpers.runs import ROOT
from sprint_jax import build, config
from sprint_jax.diffusion import trigflow
from sprint_jax.errors import UserError
from sprint_jax.objectives import base, scm_ladd
from sprint_jax.storage import weights
from sprint_jax.training import datasets, stages

SCALE = dataclasses.replace(grid.TINY, name="test")


def flat_config(c):
    """Return {dotted key: value} of a config."""
    return weights.flatten(json.loads(json.dumps(config.to_dict(c))))


@pytest.mark.parametrize("scale", grid.SCALES, ids=lambda s: s.name)
def test_every_run_changes_exactly_its_keys(scale):
    tree = card(preset=scale.preset)
    by_content = {}
    for r in grid.RUNS:
        assert r.kind in grid.KINDS
        before = flat_config(
            experiments.configuration(tree, scale, grid.Run("", r.kind, {}, r.size), 0)
        )
        after = flat_config(experiments.configuration(tree, scale, r, 0))
        assert {k for k in before if before[k] != after[k]} == set(r.changes), r.name
        assert (
            by_content.setdefault((r.kind, repr(sorted(after.items()))), r.name) == r.name
        )  # no run occurs twice
        again = flat_config(experiments.configuration(tree, scale, r, 2))
        assert {k for k in after if after[k] != again[k]} == {"seed", "data.seed"}


def test_an_unknown_key_is_refused():
    with pytest.raises(UserError, match="phases.sprint.objective.lamda"):
        experiments.with_changes(card(preset="sprint"), {"phases.sprint.objective.lamda": 1.0})


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
        assert t.claims
        assert {label for pair in t.claims for label in pair} <= set(labels)
        assert t.rule in ("paper", "better", "equal")


def test_shared_runs_occur_once_and_table_three_comes_first():
    runs = [r.name for r in grid.runs_of(grid.TABLES)]
    assert runs[:3] == ["scm", "ladd", "base"] and runs.count("base") == 1
    assert [r.name for r in grid.runs_of([t for t in grid.TABLES if t.name == "table6"])] == [
        "max_time_0",
        "base",
        "max_time_70",
    ]


# By hand: means 3 and 1, variances 1 and 1, three seeds. SE = sqrt(2/3), 4 degrees of freedom,
# bound 2.1318 SE = 1.741.
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
    assert one.word == verdict.UNRESOLVED
    assert math.isnan(one.error)
    assert one.seeds is None
    assert verdict.compare([3.0, math.inf], LOW, higher=True).word == verdict.UNRESOLVED
    assert experiments.geometric_mean([1.0, 100.0, math.nan]) == pytest.approx(10.0)
    assert experiments.geometric_mean([math.nan]) == math.inf


def test_unequal_variances_have_welchs_degrees_of_freedom():
    # Variances 0 and 1: two degrees of freedom, bound 2.9200 / sqrt(3) = 1.686 (1.231 with four).
    assert verdict.compare([2.6] * 3, LOW, higher=True).word == verdict.UNRESOLVED
    assert verdict.compare([2.7] * 3, LOW, higher=True).word == verdict.AGREES


def test_equality_by_hand():
    assert verdict.equal([0.9, 1.9, 0.2], LOW, higher=True).word == verdict.AGREES
    assert (
        verdict.equal([x + 0.9 for x in LOW], LOW, higher=True).word == verdict.AGREES
    )  # one spread is 1, SE 0.816
    assert verdict.equal([x + 1.2 for x in LOW], LOW, higher=True).word == verdict.UNRESOLVED
    assert verdict.equal(HIGH, LOW, higher=True).word == verdict.DISAGREES


def test_power_agrees_with_simulation():
    rng = np.random.RandomState(0)
    one, other = 1.5 + rng.randn(1500, 5), rng.randn(1500, 5)
    found = np.mean(
        [verdict.compare(a, b, higher=True).word == verdict.AGREES for a, b in zip(one, other)]
    )
    assert verdict.power(1.5, 2.0, 5) == pytest.approx(found, abs=0.04)
    # Difference of one standard deviation: 13.9 by Student's test (two-sample sizes, 5 % one-sided,
    # 80 %).
    assert verdict.seeds_to_resolve([0.0, math.sqrt(2)], [1.0, 1 + math.sqrt(2)]) == 14
    assert verdict.seeds_to_resolve(LOW, LOW) is None
    assert verdict.seeds_to_resolve([1.0, 1.0], [2.0, 2.0]) == 2
    assert verdict.seeds_to_resolve([0.0, 1.0], [0.001, 1.001]) is None


class FakeRunner:
    """A runner that counts its calls and is interrupted at the call numbered `stop`."""

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


def run_suite(workdir, fake, seeds=2, scale=SCALE, **more):
    """Run the suite with a fake runner."""
    return suite.go(RUNS, seeds, scale, workdir, fake, about=ABOUT, say=lambda line: None, **more)


def test_a_finished_run_is_not_run_again(tmp_path):
    first, second, third = FakeRunner(stop=3), FakeRunner(), FakeRunner()
    with pytest.raises(KeyboardInterrupt):
        run_suite(tmp_path, first)
    begun = tmp_path / "runs" / "ladd_1" / "checkpoints"
    begun.mkdir()  # the current run keeps its files
    assert not (tmp_path / "runs" / "ladd_0" / "checkpoints").exists()
    begun.rmdir()
    rows = run_suite(tmp_path, second)
    assert first.calls + second.calls == [(r.name, seed) for r in RUNS for seed in (0, 1)]
    assert [(row["run"], row["seed"]) for row in rows] == first.calls + second.calls
    assert suite.read(tmp_path) == rows
    assert run_suite(tmp_path, third) == rows and not third.calls
    run_suite(tmp_path, third, seeds=3)
    assert third.calls == [(r.name, 2) for r in RUNS]


def test_a_truncated_row_is_run_again_and_other_settings_are_refused(tmp_path):
    run_suite(tmp_path, FakeRunner())
    path = tmp_path / suite.RESULTS
    path.write_text(path.read_text()[:-20])
    cut = path.read_bytes()
    assert len(suite.read(tmp_path)) == 5
    assert path.read_bytes() == cut  # reading does not change a running suite
    again = FakeRunner()
    (tmp_path / "runs" / "base_1" / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "runs" / "base_1" / "checkpoints").rmdir()
    run_suite(tmp_path, again)
    assert again.calls == [("base", 1)]
    assert len(suite.read(tmp_path)) == 6
    other = dataclasses.replace(SCALE, base=SCALE.base | {"phases.sprint.steps": 2})
    with pytest.raises(UserError, match="other settings"):
        run_suite(tmp_path, FakeRunner(), scale=other)


def test_the_report_is_written_after_each_configuration(tmp_path):
    seen = []
    run_suite(tmp_path, FakeRunner(), after=lambda rows: seen.append(len(rows)))
    assert seen == [2, 4, 6]


def make_rows(numbers):
    """Return rows from {run: {metric: values over seeds}}."""
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
    make_rows(
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
    """Return a table of the grid."""
    return next(t for t in grid.TABLES if t.name == name)


def test_claims_agree_with_the_papers_numbers():
    found = {(m, a, b): v.word for m, a, b, v in report.judge(table("table3"), ROWS)}
    assert found == {
        ("score2", "sCM + LADD", "sCM"): verdict.AGREES,
        ("score2", "sCM + LADD", "LADD"): verdict.AGREES,
        ("score2", "sCM", "LADD"): verdict.UNRESOLVED,
        ("frechet2", "sCM + LADD", "sCM"): verdict.AGREES,
        ("frechet2", "sCM + LADD", "LADD"): verdict.UNRESOLVED,
        ("frechet2", "sCM", "LADD"): verdict.DISAGREES,
    }
    # Table 5: by FID 1 : 0.5 is better than 1 : 1, and by CLIP it is the reverse.
    rows = list(
        make_rows(
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
    assert norms["grad_norm"].word == verdict.AGREES
    assert norms["grad_norm"].difference == pytest.approx(2.0)
    assert norms["tangent_norm"].word == verdict.UNRESOLVED
    assert {v.word for *_, v in report.judge(table("table1"), ROWS)} == {verdict.AGREES}
    assert [
        m for m, *_ in report.judge(table("disc_samplers"), ROWS)
    ] == []  # FID only, and one row of three


def test_the_report_renders_from_recorded_rows(tmp_path):
    path = tmp_path / "docs" / "ablations.md"
    path.parent.mkdir()
    report.write(path, ROWS, grid.PAPER, grid.TINY)
    text = path.read_text()
    assert "| sCM + LADD |  | 51.0 ± 0.6 % |" not in text  # no empty column for one step
    assert "| sCM + LADD | 51.0 ± 0.6 % | 0.1100 ± 0.0058 | 3 | 8.11 | 28.02 |" in text
    claim = "whole caption correct, 2 steps | sCM + LADD better than sCM"
    assert f"| {claim} | +20.0 ± 0.8 points | agrees |" in text
    claim = "gradient norm | with, narrow better than without, narrow"
    assert f"| {claim} | factor 100 (× or ÷ 1.76) | agrees |" in text
    assert "flow Euler equals TrigFlow" in text
    assert "Nothing to judge yet." in text and "`phases.sprint.steps` = `320`" in text
    for name in re.findall(r"\]\((ablations/[\w.]+)\)", text):
        assert Image.open(path.parent / name).width > 500
    assert (path.parent / "ablations" / "table3.png").exists()


@pytest.mark.parametrize("asked, name", zip(grid.SUITES, ("ablations", "followups"), strict=True))
def test_reports_in_docs_agree_with_the_suites(asked, name):
    """They promise no more seeds than they have."""
    text = " ".join((ROOT / f"docs/results/{name}.md").read_text().split())
    for t in asked.tables:
        assert f"## {t.title} {' '.join(t.note.split())} " in text
        assert f"| {t.title} |" in text
        assert "seeds" not in t.title


def test_plots_have_glyphs_for_all_their_text():
    """Check each title and label of both suites.

    Fails when a box replaces a letter that the font lacks.
    """
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
    assert low < 0 < 3 < high
    assert ticks == [0.0, 1.0, 2.0, 3.0] or ticks == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    image = np.asarray(plots.dots([("t", False, [("a", [0.0, 0.0]), ("b", [1.0, 1.0])])])).astype(
        int
    )
    blue = image[..., 2] - image[..., 0] > 40
    rows = np.flatnonzero(blue.any(1))
    upper, lower = blue[: rows.mean().astype(int)], blue[rows.mean().astype(int) :]
    assert np.flatnonzero(upper.any(0)).mean() < 450 < 1000 < np.flatnonzero(lower.any(0)).mean()
    assert (
        plots.axis([math.inf, 0.0], True)[:2] == plots.axis([], True)[:2]
    )  # an empty plot is no error


def test_without_transfer_the_network_is_a_trigflow_network():
    """Its F is the network at the state and angle themselves."""
    model = linear_dit(
        in_channels=2, text_dim=4, width=16, depth=1, heads=2, cross_heads=2, mlp_ratio=2.0
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labeled(base.Update):
    """An update that names the settings it was built from."""

    settings: scm_ladd.ScmLadd


def test_runs_of_one_structure_share_programs(monkeypatch):
    """Differences between two such configurations reach the steps as arguments."""
    built = scm_ladd.ScmLadd.objective

    def labeled(self, networks):
        objective = built(self, networks)
        updates = {
            role: Labeled(**vars(update), settings=self)
            for role, update in objective.updates.items()
        }
        return dataclasses.replace(objective, updates=updates)

    monkeypatch.setattr(scm_ladd.ScmLadd, "objective", labeled)
    monkeypatch.setattr(
        experiments.step,
        "make_step",
        lambda update, tx, *, seed, **_: lambda state, frozen, batch: (update.settings, seed),
    )
    by_structure = {}
    for r in (r for r in grid.RUNS if r.kind == "distil"):
        for seed in (0, 1):
            c = experiments.configuration(card(preset="sprint"), grid.TINY, r, seed)
            phase, structure = c.phases["sprint"], experiments._structure(c)
            if structure not in by_structure:
                stage = experiments._stage(c, "sprint", datasets.Abstract(c), True)
                by_structure[structure] = phase, stage.functions
            first, functions = by_structure[structure]
            assert dataclasses.replace(first, objective=phase.objective) == phase, r.name
            numbers = experiments._knobs(c, "sprint")
            for function in functions:
                settings, key = function(None, types.SimpleNamespace(numbers=numbers), None)
                for field in dataclasses.fields(settings):
                    value, expected = (
                        getattr(each, field.name) for each in (settings, phase.objective)
                    )
                    assert value == (
                        np.float32(expected) if field.name in experiments.KNOBS else expected
                    ), (r.name, field.name)
                assert key == c.seed + 1  # as in stages.make
    # Both losses, either alone, three weights, no embedding. Follow-ups: a warm-up, two lengths,
    # three with the head alone.
    assert len(by_structure) == 13


@pytest.mark.long
def test_a_run_takes_the_updates_of_the_main_job():
    """Seed and times as arguments of the program give the same as constants in it."""
    c = dataclasses.replace(config.parse(card()), seed=3)
    settings = dataclasses.replace(
        c.phases["sprint"].objective, max_time=0.3, p_mean=0.1, disc_std=1.3
    )
    c = stages.with_phase(c, "sprint", objective=settings, batch=4)
    data = datasets.Shapes(c)
    teacher = build.teacher(c).init(jax.random.key(5))
    batch = {
        k: jax.random.normal(jax.random.key(9), a.shape)
        for k, a in datasets.abstract_batch(c, 4).items()
    } | {"mask": np.ones((4, 16), np.float32)}
    stage = stages.make(c, "sprint", data, teacher=teacher)
    shared = experiments._stage(c, "sprint", data, True)
    frozen = stage.frozen.replace(numbers=experiments._knobs(c, "sprint"))
    ours, theirs = shared.start(frozen, None), stage.start(stage.frozen, None)
    for mine, main in zip(shared.functions, stage.functions, strict=True):
        ours, report = jax.jit(mine)(ours, frozen, batch)
        theirs, expected = jax.jit(main)(theirs, stage.frozen, batch)
        found, wanted = (r.scalars | r.norms for r in (report, expected))
        name = "grad_norm" if "loss" in found else "disc"
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4)
    for role in ("student", "heads"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5),
            ours.roles[role].params,
            theirs.roles[role].params,
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
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr

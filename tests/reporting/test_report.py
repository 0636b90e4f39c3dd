"""The report of a run: losses by time, previews, and the page that shows them."""

import base64
import dataclasses
import html.parser
import io
import json
import math
import os
import re
import signal
import time
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from helpers.configs import card
from sprint_jax import build, config
from sprint_jax.errors import UserError
from sprint_jax.objectives import by_time, step
from sprint_jax.objectives.base import Report, Role, State
from sprint_jax.reporting import page, plots
from sprint_jax.reporting import rows as rows_lib
from sprint_jax.storage import run_files
from sprint_jax.training import datasets, loop, previews, records, sharding, watch
from sprint_jax.training.stage import Stage

# --- sums by time ---


def bucket_means(t, top, value):
    """Return [(mean, count)] of each bucket, one sample after the other in float64."""
    held = [[] for _ in range(by_time.COUNT)]
    for one, v in zip(t, value, strict=True):
        held[min(int(float(one) * by_time.COUNT / top), by_time.COUNT - 1)].append(float(v))
    return [(np.mean(h) if h else None, len(h)) for h in held]


def sampled_times(n=48):
    """Return times with an empty third bucket and one at the very end, and a value that grows with
    them.
    """
    t = np.random.default_rng(0).uniform(0, math.pi / 2, n).astype(np.float32)
    width = math.pi / 2 / by_time.COUNT
    t[(t >= 2 * width) & (t < 3 * width)] = 3.5 * width
    t[0], t[1] = math.pi / 2, 0.0
    return t, (3 + t + np.random.default_rng(1).standard_normal(n)).astype(np.float32)


def to_row(sums):
    """Return the sums as entries of a row."""
    return {"stage": "sprint", "step": 2} | {
        f"by_time/{k}/{i}": float(v) for k, row in sums.items() for i, v in enumerate(row)
    }


def test_a_dropped_update_leaves_no_gap():
    """Its sums are not finite; the other rows of the same part of the run still fill the bucket."""
    row = lambda value: {
        "by_time/error/0": value,
        "by_time/share/0": 0.5,
        "by_time/error/1": 3.0,
        "by_time/share/1": 0.5,
    }
    _, means = rows_lib.by_time([row(1.0), row(math.nan), row(2.0)], "error", 1.0)
    assert means == pytest.approx([3.0, 6.0])
    assert math.isnan(rows_lib.by_time([row(math.inf)], "error", 1.0)[1][0])


def test_buckets_against_a_loop():
    """Fails when the edge of a bucket moves, when the last instant is lost, and when an empty
    bucket reads as zero.
    """
    t, value = sampled_times()
    found = jax.jit(lambda t, v: by_time.by_time(t, math.pi / 2, {"error": v}))(t, value)
    expected = bucket_means(t, math.pi / 2, value)
    np.testing.assert_allclose(found["share"] * len(t), [n for _, n in expected], atol=1e-5)
    assert expected[2][1] == 0 and found["error"][2] == 0
    times, means = rows_lib.by_time([to_row(found)], "error", math.pi / 2)
    assert rows_lib.by_time([to_row(found)], "error", 1.0)[0] == pytest.approx(
        [t * 2 / math.pi for t in times]
    )
    assert math.isnan(means[2])
    assert times[2] == pytest.approx(2.5 * math.pi / 2 / by_time.COUNT)
    for mean, (wanted, count) in zip(means, expected, strict=True):
        assert math.isnan(mean) if count == 0 else mean == pytest.approx(wanted, rel=1e-5)


def test_parts_of_a_batch_and_rows_add_up():
    """Through `step.value_and_grad` in four parts, and in two rows.

    Fails when parts report means of their own.
    """
    t, value = sampled_times()

    def loss(scale, part):
        return (scale * part["v"]).mean(), by_time.by_time(
            part["t"], math.pi / 2, {"error": part["v"]}
        )

    (_, whole), _ = step.value_and_grad(loss, jnp.float32(1), {"t": t, "v": value}, 1)
    (_, parted), _ = step.value_and_grad(loss, jnp.float32(1), {"t": t, "v": value}, 4)
    for name in ("share", "error"):
        np.testing.assert_allclose(parted[name], whole[name], rtol=1e-5, atol=1e-7)
    halves = [
        to_row(
            by_time.by_time(jnp.asarray(t[i::2]), math.pi / 2, {"error": jnp.asarray(value[i::2])})
        )
        for i in (0, 1)
    ]
    _, expected = rows_lib.by_time([to_row(whole)], "error", math.pi / 2)
    np.testing.assert_allclose(
        rows_lib.by_time(halves, "error", math.pi / 2)[1], expected, rtol=1e-5
    )


def test_a_bad_value_stays_in_its_bucket():
    t, value = sampled_times()
    value[0] = np.nan  # at pi/2
    found = by_time.by_time(jnp.asarray(t), math.pi / 2, {"error": jnp.asarray(value)})
    assert np.isnan(found["error"]).tolist() == [False] * (by_time.COUNT - 1) + [True]


# --- windows of rounds: the loop around a stage that trains nothing ---


class Killed(Exception):
    """Stands for the end of a killed process."""

    pass


def kill_after(checkpoint):
    """Raise Killed once the checkpoint is complete.

    Its writing would continue in this process, but not in a killed one.
    """
    for _ in range(600):
        if checkpoint.is_dir():
            raise Killed
        time.sleep(0.1)
    raise AssertionError(f"no {checkpoint}")


@dataclasses.dataclass
class Rows:
    """Stands in for `Records`."""

    written: list

    def rewind(self, stage, step):
        self.written[:] = [row for row in self.written if row["step"] <= step]

    def write(self, stage, step, scalars):
        self.written.append(
            {"step": step} | {k: float(v) for k, v in scalars.items() if k.startswith("by_time/")}
        )

    def images(self, step, images):
        pass


def counting_role():
    """Return a role that trains nothing."""
    return Role(
        params={"w": jnp.zeros(2)},
        ema=None,
        opt=(),
        extra=None,
        updates=jnp.int32(0),
        rejected=jnp.zeros(2, jnp.int32),
    )


def counting_step(role, finite=True):
    """Return the step of a role whose sum by time is the number of the step."""

    def one(now, frozen, batch):
        counted = now.roles[role].replace(
            rejected=step.count_rejected(now.roles[role].rejected, jnp.asarray(finite))
        )
        now = now.replace(step=now.step + 1, roles=now.roles | {role: counted})
        report = Report(
            scalars={"loss": now.step * 1.0},
            by_time={"share": jnp.full(2, 0.5), "loss": now.step * jnp.array([1.0, 0.25])},
            norms={"grad_norm": jnp.ones(())},
            rejected=counted.rejected,
        )
        return now, report

    return one


def counting_stage(preview, reading=lambda count: None):
    """Return a stage of twelve rounds whose sum by time is the number of the step.

    `reading` is called with the number of each read.
    """

    class Reader:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __next__(self):
            self.read += 1
            reading(self.read)
            return {"latent": np.zeros((1, 1), np.float32)}

    def batches(batch, start, stop, process, processes):
        reader = Reader()
        reader.read = start
        return reader

    def start(frozen, begin):
        return State(step=jnp.int32(0), roles={"network": counting_role()})

    return Stage(
        name="teacher",
        steps=12,
        start=start,
        init_arrays={},
        functions=(counting_step("network"),),
        labels=("network",),
        roles=("network",),
        frozen={},
        prepare=lambda frozen, batch: batch,
        batch=1,
        batches=batches,
        data="",
        main="network",
        result=lambda now: now.roles["network"].params,
        preview=preview,
    )


@pytest.mark.parametrize("where", ["between checkpoints", "while drawing"])
def test_rows_and_previews_survive_a_kill(tmp_path, where):
    """With rows of six steps and checkpoints of four, a run resumed inside a row writes the same
    rows and previews.

    Fails when the window is not kept beside the checkpoint, and when previews are drawn after it.
    """
    run = config.Run(
        log_every=6,
        checkpoint_every=4,
        preview_every=4,
        keep=2,
        max_rejected=10,
        quick_compile=False,
    )
    mesh = sharding.mesh(1, 1, jax.devices()[:1])
    draw = lambda params: np.full((4, 4, 3), 7, np.uint8)
    saved, left = tmp_path / "parted/checkpoints/teacher", [8, 4, 0]
    killed_at_8 = lambda params: kill_after(saved / "4") if left.pop() == 8 else draw(params)
    killed_at_11 = lambda count: kill_after(saved / "8") if count == 11 else None
    first = (
        counting_stage(draw, killed_at_11)
        if where == "between checkpoints"
        else counting_stage(killed_at_8)
    )
    whole, parted = Rows([]), Rows([])
    loop.train(counting_stage(draw), run, mesh, tmp_path / "whole", whole, print)
    (tmp_path / "parted").mkdir()
    with pytest.raises(Killed):
        loop.train(first, run, mesh, tmp_path / "parted", parted, print)
    assert [row["step"] for row in parted.written] == [6]
    loop.train(counting_stage(draw), run, mesh, tmp_path / "parted", parted, print)
    assert parted.written == whole.written
    assert [row["by_time/loss/0"] for row in whole.written] == [
        3.5,
        9.5,
    ]  # the means of 1..6 and of 7..12
    assert whole.written[1]["by_time/loss/1"] == 9.5 / 4
    names = [
        [p.name for p in sorted((tmp_path / d / "previews").iterdir())] for d in ("whole", "parted")
    ]
    assert names[0] == names[1] == [f"teacher_{step:07d}.png" for step in (0, 4, 8, 12)]


@pytest.mark.parametrize("where", ["last round", "last save", "last save, agreed a round late"])
def test_a_stop_at_the_end_of_a_stage_starts_no_other_stage(tmp_path, monkeypatch, where):
    """The state is saved, and the same command continues with the next stage.

    Several processes agree on the requests of the previous round. Fails when the answer after the
    last save is asked for only once.
    """
    run = config.Run(
        log_every=6,
        checkpoint_every=4,
        preview_every=4,
        keep=2,
        max_rejected=10,
        quick_compile=False,
    )
    mesh, left = sharding.mesh(1, 1, jax.devices()[:1]), [12, 8, 4, 0]
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)

    def drawing(params):
        if left.pop() == 12 and where == "last round":
            stop()
        return np.full((4, 4, 3), 7, np.uint8)

    wait = loop.Checkpoints.wait

    def waiting(self):
        monkeypatch.setattr(loop.Checkpoints, "wait", wait)
        stop()
        self.wait()

    def late(self):
        before, self._asked = self._asked, self._requested
        return bool(before)

    if where.startswith("last save"):
        monkeypatch.setattr(loop.Checkpoints, "wait", waiting)
    if where.endswith("late"):
        monkeypatch.setattr(watch.Stop, "agreed", late)
    with pytest.raises(watch.Interrupted, match="step 12 of 12"):
        loop.train(counting_stage(drawing), run, mesh, tmp_path, Rows([]), print)
    assert int(loop.train(counting_stage(drawing), run, mesh, tmp_path, Rows([]), print).step) == 12


def test_a_network_that_fails_in_every_round_ends_the_run(tmp_path):
    """Either counter does, however often the updates of the other network are finite.

    Fails when roles are told apart by the names of what they report.
    """
    run = config.Run(
        log_every=2,
        checkpoint_every=4,
        preview_every=0,
        keep=2,
        max_rejected=3,
        quick_compile=False,
    )

    counting = counting_stage(None)
    labels = ("student", "heads")
    roles = {name: counting_role() for name in labels}
    for failing in labels:
        stage = dataclasses.replace(
            counting,
            start=lambda frozen, begin: counting.start(frozen, begin).replace(roles=roles),
            functions=tuple(counting_step(name, finite=name != failing) for name in labels),
            labels=labels,
            roles=labels,
            main="student",
        )
        mesh = sharding.mesh(1, 1, jax.devices()[:1])
        with pytest.raises(UserError, match="3 updates in a row were not finite"):
            loop.train(stage, run, mesh, tmp_path / failing, Rows([]), print)


# --- previews ---


def test_previews_are_the_first_images_of_the_sheets(finished):
    """The last preview of the student is the first row of its one-step sheet.

    Fails for other seeds, prompts or guidance.
    """
    with (
        Image.open(finished / "previews/sprint_0000012.png") as last,
        Image.open(finished / "samples_1.png") as sheet,
    ):
        preview, row = np.asarray(last), np.asarray(sheet)[: last.height]
    assert preview.shape == row.shape and preview.shape[1] == (previews.COUNT * 34 + 2) * 3
    np.testing.assert_array_equal(preview, row)
    names = sorted(p.name for p in (finished / "previews").iterdir())
    steps = {"finetune": (0,), "sprint": (0, 6, 12), "teacher": (0, 6, 12)}
    assert names == [f"{stage}_{step:07d}.png" for stage, at in steps.items() for step in at]


def test_no_previews_without_pixels():
    c = config.parse(card())
    assert previews.make(c, datasets.Abstract(c), build.student(c), "renoise") is None


# --- plots ---


def parse_plot(svg):
    """Return {text} and the paths [[(x, y)]] of an SVG element."""
    root = xml.etree.ElementTree.fromstring(svg)
    paths = [e.get("d") for e in root.iter("path") if e.get("class") == "line"]
    points = [
        [tuple(map(float, p.split(","))) for p in re.findall(r"[ML]([\d.,-]+)", path)]
        for path in paths
    ]
    return [e.text for e in root.iter("text")], points, paths


def test_a_plot_shows_its_points():
    """Straight lines stay straight, falling values fall, and a gap stays a gap."""
    lines = [
        plots.Line("rising", [0, 10, 20], [0.0, 5.0, 10.0]),
        plots.Line("a < b", [0, 10, 20], [1.0, math.nan, 3.0]),
    ]
    words, (rising, gap), paths = parse_plot(plots.plot("x & y", lines, x_label="step"))
    (x0, y0), (x1, y1), (x2, y2) = rising
    assert x2 - x1 == pytest.approx(x1 - x0, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y2
    assert x0 < x2
    assert len(gap) == 2 and paths[1].count("M") == 2
    assert {"x & y", "step", "rising", "a < b", "0", "10", "20"} <= set(words)


def test_a_logarithmic_plot():
    """Powers of ten have equal distances, and values that are not positive are left out."""
    line = plots.Line("all", [0, 1, 2, 3, 4], [1.0, 10.0, 100.0, 0.0, 1000.0])
    words, [points], _ = parse_plot(plots.plot("norms", [line], x_label="step", log=True))
    heights = [y for _, y in points]
    assert len(points) == 4
    assert np.diff(heights) == pytest.approx([heights[1] - heights[0]] * 3, abs=0.2)
    assert {"1", "10", "100", "1e+03"} <= set(words)


@pytest.mark.parametrize("values", [[], [math.nan], [0.25], [0.25, 0.25]])
def test_plots_of_few_points(values):
    words, lines, _ = parse_plot(
        plots.plot("loss", [plots.Line("one", list(range(len(values))), values)], x_label="step")
    )
    assert ("no values" in words) == (not np.isfinite(values).any())
    assert sum(map(len, lines)) == np.isfinite(values).sum()


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 4.1), (1e-6, 1.1e-6), (12, 2400)])
def test_ticks_are_round_and_inside(low, high):
    found = plots.ticks(low, high)
    assert 3 <= len(found) <= 8
    assert min(found) >= low - 1e-9
    assert max(found) <= high + 1e-9
    step = found[1] - found[0]
    assert float(f"{step:.6e}".split("e")[0]) in (1, 2, 5)
    found = plots.log_ticks(math.log10(low + 4), math.log10(high + 4))
    assert 2 <= len(found) <= 8


# --- the page ---


class Page(html.parser.HTMLParser):
    """What a reader sees: headings, titles of plots, images with their captions, and words."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.plots, self.pictures, self.words, self.links = [], [], {}, [], []
        self._open = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.pictures[attributes["alt"]] = attributes["src"]
        if tag in ("script", "link") or (tag != "img" and "src" in attributes):
            self.links.append((tag, attributes))
        if tag not in ("img", "meta", "line", "path", "circle"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_data(self, data):
        if self._open[-1:] == ["h2"]:
            self.headings.append(data)
        if self._open[-1:] == ["title"] and "svg" in self._open:
            self.plots.append(data)
        self.words.append(data)


def decode_image(source):
    """Return the pixels of an embedded image."""
    return np.asarray(
        Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
    )


TEACHER = ["losses", "norms", "gradient norm by module", "flow loss by time"]
SPRINT = [
    "losses",
    "sCM error before weighting",
    "discriminator loss",
    "discriminator margin by head: real less fake",
    "norms",
    "gradient norm by module",
    "gradient norm of the heads by module",
    *(
        f"{name} by time"
        for name in (
            "sCM loss",
            "sCM error before weighting",
            "norm of the tangent",
            "learned log-variance",
        )
    ),
]


def test_the_page_of_a_run(finished):
    """The run writes it in one file: all stages, images bit for bit, scores as in the summary."""
    found = Page((finished / "report.html").read_text())
    assert found.headings == [
        "Held-out prompts, the same noise in each grid",
        "Scores",
        "Parts of the run",
        "teacher",
        "finetune",
        "sprint",
        "Config",
    ]
    assert found.plots == TEACHER + TEACHER + SPRINT and not found.links
    assert list(found.pictures)[:5] == [
        "real images",
        "teacher",
        "student, 1 step",
        "student, 2 steps",
        "student, 4 steps",
    ]
    np.testing.assert_array_equal(
        decode_image(found.pictures["student, 2 steps"]),
        np.asarray(Image.open(finished / "samples_2.png")),
    )
    summary, words = json.loads((finished / "summary.json").read_text()), " ".join(found.words)
    for name in ("real", "student_1"):
        assert f"{100 * summary['scores'][name]:.1f} %" in words
        assert f"{summary['frechet'][name]:.4f}" in words
    assert "teacher 12 of 12 steps, finetune 4 of 4 steps, sprint 12 of 12 steps" in words
    assert summary["commit"] in words


def copy_unfinished(finished, folder, stages, last):
    """Write a work directory as it is during a run: rows up to a step, the last of them
    truncated.
    """
    folder.mkdir()
    (folder / "config.json").write_bytes((finished / "config.json").read_bytes())
    kept = [
        line
        for line in (finished / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["stage"] in stages and json.loads(line)["step"] <= last
    ]
    (folder / "metrics.jsonl").write_text("\n".join([*kept, kept[-1][:40]]))
    return folder


def test_unfinished_runs_and_runs_without_a_student(finished, command, tmp_path):
    folder = copy_unfinished(finished, tmp_path / "a<b>", ("teacher",), 6)
    result = command("sprint_jax", "report", f"--run_dir={folder}")
    assert result.returncode == 0 and "report.html" in result.stdout, result.stderr
    found = Page((folder / "report.html").read_text())
    assert found.headings == ["teacher", "Config"]
    assert found.plots == TEACHER
    assert not found.pictures
    assert "not finished" in found.words
    assert "teacher 6 of 12 steps" in found.words
    assert "a<b>" in found.words
    (folder / "metrics.jsonl").unlink()
    assert "No row of metrics is written yet." in Page(page.render(folder)).words


def test_a_damaged_row_is_left_out_like_a_truncated_one(tmp_path):
    """By the page, and by the run that resumes."""
    rows = [{"stage": "teacher", "step": step, "loss": 0.5} for step in (2, 4, 6)]
    lines = [json.dumps(row).encode() for row in rows]
    damaged = b"\n".join([lines[0], lines[1].replace(b"loss", b"lo\xffs"), lines[2], lines[0][:9]])
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    assert rows_lib.read(tmp_path) == {"teacher": [rows[0], rows[2]]}
    writer = records.Records(tmp_path)
    writer.rewind("teacher", 4)
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines[0] + b"\n"


def test_large_images_are_linked(finished, tmp_path, monkeypatch):
    folder = copy_unfinished(finished, tmp_path / "run", ("sprint",), 12)
    (folder / run_files.PREVIEWS).mkdir()
    names = {n: f"{run_files.PREVIEWS}/sprint_{n:07d}.png" for n in (0, 12)}
    for name in names.values():
        (folder / name).write_bytes((finished / name).read_bytes())
    monkeypatch.setattr(page, "_EMBEDDED", 100)
    assert Page(page.render(folder)).pictures == {f"step {n}": name for n, name in names.items()}


def test_report_refuses_what_is_not_a_run(command, tmp_path):
    for flags, words in (
        ([], "--run_dir is missing"),
        ([f"--run_dir={tmp_path}"], "has no config.json"),
    ):
        result = command("sprint_jax", "report", *flags)
        assert result.returncode == 2
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*config.json"):
        page.write(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_values_by_time_of_a_run(finished):
    """In the rows of a real run each sample is in one bucket, and the buckets together give the
    losses.
    """
    stages = rows_lib.read(finished)
    assert {stage: rows_lib.timed(found) for stage, found in stages.items()} == {
        "teacher": ["loss"],
        "finetune": ["loss"],
        "sprint": ["error", "logvar", "scm", "tangent_norm"],
    }
    tops = {stage: rows_lib.top(found) for stage, found in stages.items()}
    assert tops == {"teacher": 1.0, "finetune": 1.0, "sprint": math.pi / 2}
    for row in (row for found in stages.values() for row in found):
        assert sum(row[f"by_time/share/{i}"] for i in range(by_time.COUNT)) == pytest.approx(
            1, abs=1e-6
        )
    for row in stages["sprint"]:  # one round in each row
        for name in ("error", "logvar", "scm", "tangent_norm"):
            total = sum(row[f"by_time/{name}/{i}"] for i in range(by_time.COUNT))
            assert total == pytest.approx(row[name], rel=1e-5, abs=1e-9)

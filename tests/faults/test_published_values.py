"""JSON that is nested or of another kind, results of hooks, statistics and judgments: one line."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest

from sprint_jax.conversion import folder
from sprint_jax.data import encode, encoded, sources
from sprint_jax.errors import UserError
from sprint_jax.evaluation import (
    checks,
    dpg,
    extractors,
    fid,
    gallery,
    geneval,
    image_sets,
    prompt_sets,
    records,
    scores,
)
from sprint_jax.evaluation.options import Options
from sprint_jax.reporting import page
from sprint_jax.sampling import loading
from sprint_jax.sampling.options import SHIPPED
from sprint_jax.serving import body
from sprint_jax.serving.refused import Refused
from sprint_jax.storage import json_files, safetensors_files
from sprint_jax.storage.settings import Keeper
from sprint_jax.training import run
from sprint_jax.training.checkpoints import Checkpoints

DEEP = {
    "lists": "[" * 100_000 + "]" * 100_000,
    "objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "open": "[" * 100_000,
    "900 levels": "[" * 900 + "]" * 900,
    "101 levels": '{"a":' * 101 + "1" + "}" * 101,
    "inside": '{"format": 1, "x": ' + "[" * 500 + "]" * 500 + "}",
}
OTHER = {
    "null": "null",
    "list": "[1]",
    "text": '"x"',
    "number": "5",
    "empty": "",
    "5000 digits": '{"x": ' + "9" * 5000 + "}",
    "NaN": '{"x": NaN}',
    "Latin-1": b'{"x": "\xe9"}',
    "comma": '{"x":1,}',
    "object": '{"x": 1}',
}
READERS = {
    "config.json of a part": lambda d: folder.read_transformer(d),
    "config.json of a run": lambda d: loading.read_config(d),
    "config.json resumed": lambda d: run.read_config(d),
    "config.json of CLIP": lambda d: extractors.load_clip(d, batch=1),
    "config.json of a report": lambda d: page.render(d),
    "model.json": lambda d: folder.describe(d, dtype=None),
    "model_index.json": lambda d: folder.describe(d, dtype=None),
    "x.safetensors.index.json": lambda d: safetensors_files.find(d, "x"),
    "protocol.json": lambda d: gallery.protocol(d),
    "metadata.jsonl": lambda d: len(sources.open_source(d)),
    "meta_data.json": lambda d: len(sources.open_source(d)),
    "wids-meta.json": lambda d: len(sources.open_source(d)),
    "manifest.jsonl": lambda d: image_sets.with_prompts(d, None),
    "manifest.json": lambda d: encoded.read_manifest(d),
    "condition.json": lambda d: Keeper(file="condition.json", flag="out").claim(d, {"a": 1}),
    "prompts.json": lambda d: prompt_sets.read(d / "prompts.json"),
    "prompts.jsonl": lambda d: prompt_sets.read(d / "prompts.jsonl"),
    "detections.jsonl": lambda d: geneval.read_detections(d / "detections.jsonl"),
    "answers.jsonl": lambda d: dpg.read_answers(d / "answers.jsonl"),
    "geneval.json": lambda d: records._read_metadata(d / "geneval.json"),
}


def fill(path, reader, text):
    """Write the text as the reader's file, with what else the reader needs."""
    path.mkdir()
    name = reader.split(" ")[0]
    (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (path / "a.png").write_bytes(b"x")
    (path / "a.txt").write_text("x")
    if "run" in reader or "report" in reader:
        shutil.copy(SHIPPED / "student.safetensors", path)


@pytest.mark.parametrize("reader", READERS)
def test_json_that_is_nested_or_of_another_kind_is_one_line(tmp_path, reader):
    """Whatever the reader: a UserError, or none where such a file is passed over or counted.

    Fails with a RecursionError where JSON is parsed elsewhere than in `json_files.parse`.
    """
    for number, (kind, text) in enumerate((DEEP | OTHER).items()):
        fill(tmp_path / str(number), reader, text)
        try:
            READERS[reader](tmp_path / str(number))
        except UserError as error:
            assert len(str(error)) < 800, kind
        else:
            passed = reader.startswith(("meta", "wids")) or kind in ("object", "NaN")
            assert passed or (kind == "empty" and ".jsonl" in reader), kind


@pytest.mark.parametrize("kind", DEEP)
def test_nesting_has_a_limit(kind):
    """Fails without `_is_deep`: what the parser takes, a walk over the value may not."""
    for text in (DEEP[kind], DEEP[kind].encode(), DEEP[kind].encode("utf-16")):
        with pytest.raises(ValueError):
            json_files.parse(text)
    assert json_files.parse("[" * 100 + "]" * 100)
    assert json_files.parse("[" + "[[]]," * 999 + '"[[["]')[-1] == "[[["
    with pytest.raises(Refused):
        body.json_object(DEEP[kind].encode())


def test_part_files_of_another_kind_are_written_again(tmp_path):
    for text in (*DEEP.values(), *OTHER.values()):
        data = text if isinstance(text, bytes) else text.encode()
        encode._part_path(tmp_path, 0).write_bytes(data)
        assert encode._read_part(tmp_path, 0, None) is None


def test_metadata_of_checkpoints_are_one_line_or_set_aside(tmp_path):
    """Each JSON file that Orbax keeps, nested: never a RecursionError."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"a": jax.ShapeDtypeStruct((3,), np.float32, sharding=place)}
    with Checkpoints(tmp_path / "good", keep=2) as kept:
        kept.save(1, {"a": jax.numpy.ones(3)})
    written = [p for p in sorted((tmp_path / "good").rglob("*")) if p.is_file()]
    damaged = [p for p in written if p.read_bytes().startswith(b"{")]
    assert len(damaged) > 3
    for number, path in enumerate(damaged):
        shutil.copytree(tmp_path / "good", tmp_path / str(number))
        (tmp_path / str(number) / path.relative_to(tmp_path / "good")).write_text(DEEP["lists"])
        with contextlib.suppress(UserError), Checkpoints(tmp_path / str(number), keep=2) as kept:
            assert kept.restore_newest(abstract)[1] in (0, 1)


HOOKS = {
    "fewer rows": lambda n: np.ones((n - 1, 4)),
    "more rows": lambda n: np.ones((n + 1, 4)),
    "one number for all": lambda n: 1.0,
    "one dimension more": lambda n: np.ones((n, 2, 2)),
    "NaN": lambda n: np.full((n, 4), np.nan),
    "infinity": lambda n: np.full((n, 4), np.inf),
    "nothing": lambda n: None,
    "no numbers of an image": lambda n: np.ones((n, 0)),
    "text": lambda n: ["a"] * n,
    "ragged": lambda n: [[1.0]] * (n - 1) + [[1.0, 2.0]],
    "complex": lambda n: np.ones((n, 4), complex),
    "an object": lambda n: {"scores": [1.0] * n},
}


@pytest.mark.parametrize("kind", HOOKS)
def test_results_of_hooks_are_checked(monkeypatch, kind):
    """Of features and of scores alike; no bar of NumPy's own errors, no wrong number."""
    images = [np.zeros((8, 8, 3), np.uint8)] * 3
    monkeypatch.setattr(extractors, "hook", lambda name: lambda *_: HOOKS[kind](3))
    with pytest.raises(UserError, match="--hook=m:f gave .* for 3 pictures: features"):
        scores._hooked("m:f")(images)
    for dimensions in (1, 2):
        with pytest.raises(UserError, match="--hook=m:f gave .* for 3 pictures"):
            extractors.hooked(HOOKS[kind](3), 3, dimensions, "m:f")
    assert extractors.hooked([1, 2, 3], 3, 1, "m:f").dtype == np.float64


def test_features_of_a_hook_keep_their_size(monkeypatch):
    """One dimension, and another number of them in a later part."""
    given = iter([np.ones((2, 3)), np.ones(2), np.ones((2, 4))])
    monkeypatch.setattr(extractors, "hook", lambda name: lambda images: next(given))
    extract = scores._hooked("m:f")
    assert extract([0, 0]).shape == (2, 3)
    with pytest.raises(UserError, match=r"gave float64 \(2,\) for 2 pictures: features \[N, D\]"):
        extract([0, 0])
    with pytest.raises(UserError, match="features of 3 and of 4 numbers: all need the same"):
        extract([0, 0])
    with pytest.raises(UserError, match="too large for a covariance"), np.errstate(all="ignore"):
        fid.Moments.of(np.array([[1e300], [-1e300]])).gaussian()


EYE = np.eye(3)
STATISTICS = {
    "text": dict(mu=np.array(["a"]), sigma=np.eye(1)),
    "complex": dict(mu=np.zeros(3, complex), sigma=EYE),
    "booleans": dict(mu=np.zeros(3, bool), sigma=EYE),
    "objects": dict(mu=np.array([None, 1]), sigma=EYE),
    "NaN": dict(mu=np.full(3, np.nan), sigma=EYE),
    "infinite sigma": dict(mu=np.zeros(3), sigma=np.full((3, 3), np.inf)),
    "huge": dict(mu=np.full(3, 1e200), sigma=EYE),
    "empty": dict(mu=np.zeros(0), sigma=np.zeros((0, 0))),
    "other shapes": dict(mu=np.zeros((1, 3)), sigma=EYE),
    "not symmetric": dict(mu=np.zeros(3), sigma=EYE + np.triu(np.ones((3, 3)), 1)),
    "negative": dict(mu=np.zeros(3), sigma=-EYE),
    "count NaN": dict(mu=np.zeros(3), sigma=EYE, count=np.array(np.nan)),
    "count infinite": dict(mu=np.zeros(3), sigma=EYE, count=np.array(np.inf)),
    "count text": dict(mu=np.zeros(3), sigma=EYE, count=np.array("3")),
    "count below 0": dict(mu=np.zeros(3), sigma=EYE, count=np.array(-3)),
    "count and a half": dict(mu=np.zeros(3), sigma=EYE, count=np.array(3.5)),
    "count of many": dict(mu=np.zeros(3), sigma=EYE, count=np.zeros(2)),
    "other names": dict(m=np.zeros(3), s=EYE),
}


@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_that_are_none_are_one_line(tmp_path, kind):
    np.savez(tmp_path / "a.npz", **STATISTICS[kind])
    with pytest.raises(UserError, match=r"a\.npz"):
        fid.load(tmp_path / "a.npz")


def test_damaged_statistics_are_one_line(tmp_path):
    """Every cut, random damage, files of other kinds; good ones of any number type are read."""
    path = tmp_path / "a.npz"
    np.savez_compressed(path, mu=np.zeros(3, np.float16), sigma=EYE.astype(int), count=3.0)
    assert fid.load(path)[0].count == 3
    good, random = path.read_bytes(), np.random.RandomState(0)
    for cut in random.randint(0, len(good), 20):
        path.write_bytes(good[:cut])
        with pytest.raises(UserError, match=r"a\.npz"):
            fid.load(path)
    for place in random.randint(0, len(good), 200):
        damaged = bytearray(good)
        damaged[place] ^= random.randint(1, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            fid.load(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n")
    with pytest.raises(UserError, match="it is a pointer of Git LFS, not the file: run git lfs"):
        fid.load(path)


GOOD = {"class": "dog", "box": [0, 0, 9, 9], "confidence": 0.97}
DETECTIONS = (
    {"confidence": 97},
    {"confidence": "0.9"},
    {"confidence": None},
    {"confidence": True},
    {"confidence": -0.1},
    {"box": [9, 9, 0, 0]},
    {"box": [0, 0, 9]},
    {"box": ["0", 0, 9, 9]},
    {"box": None},
    {"class": 5},
    {"class": ["dog"]},
    {"class": ""},
    {"color": "grey"},
    {"color": ["red"]},
    {"color": "red", "colour": "blue"},
)


def detections(path, **change):
    row = {"file": "00000/samples/00000.png", "objects": [GOOD | change]}
    path.write_text(json.dumps(row) + "\n")
    return geneval.read_detections(path)


def test_detections_are_checked(tmp_path):
    """Percent counted as certain, and a class of another name as absent."""
    assert detections(tmp_path / "d.jsonl", colour="red")
    for change in DETECTIONS:
        with pytest.raises(UserError, match=r"d.jsonl line 1 is not a detection \(.*: see"):
            detections(tmp_path / "d.jsonl", **change)
    for text in (
        '{"file": ["a"], "objects": []}',
        '{"file": "a", "objects": {}}',
        '{"file": 1e999}',
    ):
        (tmp_path / "d.jsonl").write_text(text)
        with pytest.raises(UserError, match="line 1 is not a detection"):
            geneval.read_detections(tmp_path / "d.jsonl")
    images = [("00000/samples/00000.png", {"tag": "colors", "include": [], "prompt": "x"})]
    for asked, name, right in (
        ("cat", "dog", True),
        ("fox", "fox", True),
        ("fox", "wolf", True),  # a vocabulary of the detector's own
        ("fox", "Dog", False),
        ("hot dog", "hot_dog", False),
        ("cat", "mouse", False),
        ("cat", "wolf", False),
    ):
        found = detections(tmp_path / "d.jsonl", **{"class": name})
        images[0][1]["include"] = [{"class": asked, "count": 1}]
        if right:
            assert geneval.score(found, images)["overall"] == float(name == asked)
        else:
            with pytest.raises(UserError, match=f"the class '{name}', which no prompt"):
                geneval.score(found, images)


@pytest.mark.parametrize("change", [
    {"include": 5}, {"include": {"class": "dog"}}, {"exclude": None}, {"tag": ["counting"]},
    {"include": [{"class": ["dog"], "count": 1}]}, {"include": [{"class": "dog", "count": 0}]},
    {"include": [{"class": "dog", "count": True}]}, {"include": [None]},
])  # fmt: skip
def test_metadata_of_another_type_are_one_line(change):
    good = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"}
    geneval.check_metadata(good, "prompt 1")
    with pytest.raises(UserError, match="prompt 1"):
        geneval.check_metadata(good | change, "prompt 1")


def test_answers_are_checked(tmp_path):
    path = tmp_path / "a.jsonl"
    good = {"item_id": "p0", "picture": 0, "answers": {"1": "yes", "2": 1.0, "3": False}}
    path.write_text(json.dumps(good))
    assert dpg.read_answers(path) == {("p0", 0): {1: True, 2: True, 3: False}}
    for change in (
        {"picture": 0.7}, {"picture": 7}, {"picture": -1}, {"picture": None}, {"picture": True},
        {"picture": 1e999}, {"item_id": None}, {"item_id": ["p0"]}, {"answers": ["yes"]},
        {"answers": {"1": None}}, {"answers": {"1": "yes", "01": "no"}}, {"answers": {"x": "yes"}},
    ):  # fmt: skip
        path.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=r"a.jsonl line 1 is not an answer"):
            dpg.read_answers(path)


def test_ids_that_are_too_long_for_a_file_are_refused(tmp_path):
    """Before images are drawn: also counted in bytes, and in a table."""
    for name in ("a" * 300, "a" * 151, "é" * 80):
        (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "x", "id": name}))
        (tmp_path / "p.json").write_text(json.dumps({name: {"prompt": "x"}}))
        for file in ("p.jsonl", "p.json"):
            with pytest.raises(UserError, match=f"{len(name)} letters, too many for a file's name"):
                prompt_sets.read(tmp_path / file)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "x", "id": "a" * 150}))
    assert prompt_sets.read(tmp_path / "p.jsonl")[0].id == "a" * 150


def test_protocols_and_manifests_of_another_kind_are_one_line(tmp_path):
    units = [gallery.Unit("a.png", "a fox", (0,))]
    gallery.claim(tmp_path, {"steps": 2}, units)
    good = (tmp_path / "protocol.json").read_text()
    for value in ([], {}, {"settings": None}, {"settings": {}, "made_by": 5}, {"settings": [1]}):
        (tmp_path / "protocol.json").write_text(json.dumps(value))
        with pytest.raises(UserError, match="protocol.json"):
            gallery.protocol(tmp_path)
    (tmp_path / "protocol.json").write_text(good)
    row = {"file": "a.png", "prompt": "a fox", "indices": [0]}
    for change in ({"file": ["a"]}, {"file": None}, {"prompt": 5}, {"indices": "0"}):
        (tmp_path / "manifest.jsonl").write_text(json.dumps(row | change))
        with pytest.raises(UserError, match=r"manifest.jsonl has a line of no image"):
            gallery.check(tmp_path, {"steps": 2}, units)
    (tmp_path / "a.png").touch()
    for change in ({"file": 5}, {"file": "a" * 5000}, {"prompt": None}, {"prompt": ["x"]}):
        (tmp_path / "manifest.jsonl").write_text(json.dumps(row | change))
        with pytest.raises(UserError, match=r"manifest.jsonl is not a manifest"):
            image_sets.with_prompts(tmp_path, None)


def test_reports_of_other_files_are_one_line(tmp_path):
    """Rows and summaries that no run wrote, and a config of another kind."""
    shutil.copy(SHIPPED / "config.json", tmp_path)
    row = {"stage": "sprint", "step": 2, "loss": 1.0}
    metrics, config = tmp_path / "metrics.jsonl", tmp_path / "config.json"
    metrics.write_text(json.dumps(row))
    page.render(tmp_path)
    for change in ({"stage": 5}, {"stage": ["a"]}, {"step": "2"}, {"step": None}, {"loss": "x"},
                   {"loss": None}, {"loss": [1]}, {"step": 2.5}):  # fmt: skip
        metrics.write_text(json.dumps(row | change))
        with pytest.raises(UserError, match="metrics.jsonl has a row that no run wrote"):
            page.render(tmp_path)
    metrics.write_text(json.dumps(row | {"by_time/scm/0": 1.0, "head_x/real": 1.0}))
    with pytest.raises(UserError, match="are not those of one run"):
        page.render(tmp_path)
    metrics.write_text(json.dumps(row))
    for summary in ({"frechet": {"x": "1"}}, {"seconds": "x"}, {"a": 1}):
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        with pytest.raises(UserError, match="are not those of one run"):
            page.render(tmp_path)
    (tmp_path / "summary.json").unlink()
    for other in ({}, {"phases": 5}, {"phases": {"sprint": 5}, "evaluation": None}):
        config.write_text(json.dumps(other))
        with pytest.raises(UserError, match="are not those of one run"):
            page.render(tmp_path)


def test_statistics_are_checked_before_images_are_drawn(tmp_path):
    """An unusable reference, and detections, are refused by the check of options."""
    np.savez(tmp_path / "a.npz", **STATISTICS["count NaN"])
    options = Options(
        suite="fid", model="x", out=str(tmp_path), hook="sprint_jax.toy.frechet:features",
        reference=str(tmp_path / "a.npz"), prompts=str(tmp_path / "p.txt"),
    )  # fmt: skip
    with pytest.raises(UserError, match="count nan: it is the number of images"):
        checks.check(options)

"""The door of the metrics on a finished smoke run: making, resuming, scoring, and what it refuses."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from helpers.runs import ROOT, refused
from sprint_jax.errors import UserError
from sprint_jax.evaluation import gallery
from sprint_jax.toy import frechet

DOOR = "sprint_jax.commands.evaluate"


def report(out, suite):
    assert (out / f"report-{suite}.md").read_text().startswith(f"# {suite}")
    return json.loads((out / f"report-{suite}.json").read_text())


@pytest.fixture(scope="module")
def made(command, finished, tmp_path_factory):
    """Pictures of the run's own held-out prompts and noise, as many as its evaluation had, in two steps."""
    config = json.loads((finished / "config.json").read_text())
    out = tmp_path_factory.mktemp("evaluated") / "shapes"
    flags = [
        f"--model={finished}",
        "--suite=shapes",
        f"--out={out}",
        f"--first={config['evaluation']['prompts']}",
        f"--seed={config['data']['eval_seed']}",
        "--steps=2",
        "--dtype=float32",
        f"--batch_size={config['evaluation']['batch']}",
    ]
    result = command(DOOR, *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    return out, flags


def test_shapes_scores_are_those_of_the_run(made, finished):
    """Another way through the code: from files, by `pipeline.generate`, to the run's own table."""
    out, _ = made
    summary = json.loads((finished / "summary.json").read_text())
    found = report(out, "shapes")
    assert found["scores"] == {
        "overall": summary["scores"]["student_2"],
        "tasks": summary["tasks"]["student_2"],
    }
    assert {"seed", "steps", "guidance_scale", "schedule", "model_fingerprint", "made_by"} <= found[
        "pictures"
    ].keys()
    assert (
        found["code"]["commit"] and found["code"]["jax"] and found["protocol"]["format"] == ["png"]
    )


def test_what_is_there_is_kept_and_what_lacks_is_made_again(made, command, tmp_path):
    """A folder that was interrupted ends with the bytes of the whole one; finished pictures are not touched."""
    out, flags = made
    files = sorted((out / "pictures").iterdir())
    before = {path.name: path.read_bytes() for path in files}
    times = {path.name: path.stat().st_mtime_ns for path in files}
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    lost = [files[1].name, files[-1].name]
    for name in lost:
        (copy / "pictures" / name).unlink()
    kept = {p.name: p.stat().st_mtime_ns for p in (copy / "pictures").iterdir()}
    result = command(DOOR, *[f"--out={copy}" if f.startswith("--out=") else f for f in flags])
    assert result.returncode == 0, result.stderr[-3000:]
    assert {p.name: p.read_bytes() for p in (copy / "pictures").iterdir()} == before
    assert {name: (copy / "pictures" / name).stat().st_mtime_ns for name in kept} == kept
    assert {path.name: path.stat().st_mtime_ns for path in files} == times
    assert report(copy, "shapes")["scores"] == report(out, "shapes")["scores"]


def test_another_protocol_is_refused_by_name(made, command):
    out, flags = made
    before = (out / "protocol.json").read_bytes()
    refused(
        command(DOOR, *[f for f in flags if not f.startswith("--steps")], "--steps=1"),
        "steps=2",
        "now 1",
        "--out",
    )
    assert (out / "protocol.json").read_bytes() == before


def test_other_prompts_are_refused_by_name(tmp_path):
    units = [gallery.Unit("0.png", "a red circle", (0,)), gallery.Unit("1.png", "a square", (1,))]
    gallery.claim(tmp_path, {"steps": 2}, units[:1])
    gallery.claim(tmp_path, {"steps": 2}, units)  # more of them is going on
    gallery.claim(tmp_path, {"steps": 2}, units[1:])
    assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 2
    with pytest.raises(UserError, match="0.png of 'a red circle'"):
        gallery.claim(tmp_path, {"steps": 2}, [gallery.Unit("0.png", "a blue circle", (0,))])
    with pytest.raises(UserError, match="guidance_scale=None, now 3"):
        gallery.claim(tmp_path, {"steps": 2, "guidance_scale": 3}, units)


def test_a_command_that_makes_nothing_locks_nothing(finished, command, tmp_path):
    """The corrected command may have the folder that the wrong one was to fill."""
    flags = [f"--model={finished}", "--suite=shapes", f"--out={tmp_path / 'out'}", "--first=1"]
    for wrong in (["--guidance_scale=nan"], ["--timesteps=3,0", "--steps=1"], ["--height=31"]):
        refused(command(DOOR, *flags, *wrong), wrong[0].strip("-").partition("=")[0])
        assert not (tmp_path / "out/protocol.json").exists()
    result = command(DOOR, *flags, "--steps=1")
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_folder_is_claimed_with_its_first_pictures(finished, tmp_path):
    """Of two commands the first to have pictures has the folder; the other writes none into it."""
    from sprint_jax.sampling import pipeline

    class Bar:
        n = 0

        def update(self, count):
            self.n += count

    pipe, units = (
        pipeline.load(finished, dtype="float32"),
        [gallery.Unit("0.png", "a red circle", (0,))],
    )
    options = dict(batch=1, file_format="png")
    for steps in (1, 2):
        gallery.check(tmp_path, {"steps": steps}, units)
    claim = lambda steps: lambda: gallery.claim(tmp_path, {"steps": steps}, units)
    gallery.make(tmp_path, units, pipe, {"steps": 2}, **options, bar=Bar(), claim=claim(2))
    first = (tmp_path / "pictures/0.png").read_bytes()
    with pytest.raises(UserError, match="steps=2, now 1"):
        gallery.make(tmp_path, units, pipe, {"steps": 1}, **options, bar=Bar(), claim=claim(1))
    assert (tmp_path / "pictures/0.png").read_bytes() == first


def test_shares_on_two_devices_make_the_same_pictures(made, command, tmp_path):
    """Every picture from its own noise, whoever makes it; bits may differ where a device has fewer of a batch."""
    out, flags = made
    two = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    mine = [f for f in flags if not f.startswith(("--out", "--first"))] + [
        f"--out={tmp_path}",
        "--first=5",
    ]
    for share in ("0/2", "1/2"):
        result = command(DOOR, *mine, f"--shard={share}", environment={"XLA_FLAGS": two})
        assert result.returncode == 0, result.stderr[-3000:]
    assert not (tmp_path / "report-shapes.json").exists()
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == [f"{i:05d}.png" for i in range(5)]
    for name in names:
        a, b = (
            np.asarray(Image.open(folder / "pictures" / name)).astype(int)
            for folder in (out, tmp_path)
        )
        assert np.abs(a - b).max() <= 1
    assert "2 x" in json.loads((tmp_path / "protocol.json").read_text())["made_by"][0]["devices"]


def test_pictures_of_an_earlier_command_are_scored_by_its_out(made, command, tmp_path):
    """OUT and OUT/pictures name the same pictures; their prompts are in OUT/manifest.jsonl."""
    out, _ = made
    for folder in (out, out / "pictures"):
        result = command(DOOR, "--suite=shapes", f"--folder={folder}", f"--out={tmp_path}")
        assert result.returncode == 0, result.stderr[-3000:]
        found = report(tmp_path, "shapes")
        assert found["scores"] == report(out, "shapes")["scores"] and found["pictures"] == {
            "folder": str(out / "pictures")
        }


def test_distance_on_features_of_a_hook(made, command, tmp_path):
    """fid's whole way with the untrained features: reference to npz, then distances, not called FID."""
    out, _ = made
    hook, stats = "--hook=sprint_jax.toy.frechet:features", tmp_path / "real.npz"
    common = ["--suite=fid", hook, "--scoring_batch=3"]
    result = command(
        DOOR,
        *common,
        f"--folder={out / 'pictures'}",
        f"--save_reference={stats}",
        f"--out={tmp_path}",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "singular" in result.stderr  # fewer pictures than features are said
    paths = sorted((out / "pictures").iterdir())
    expected = frechet.features(np.stack([np.asarray(Image.open(p)) for p in paths]))
    with np.load(stats) as stored:
        np.testing.assert_allclose(stored["mu"], expected.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            stored["sigma"], np.cov(expected, rowvar=False), rtol=1e-3, atol=1e-6
        )
        assert stored["count"] == len(paths) and stored["file_format"] == "png"
    result = command(
        DOOR,
        *common,
        f"--folder={out / 'pictures'}",
        f"--reference={stats}",
        f"--out={tmp_path / 'same'}",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = report(tmp_path / "same", "fid")
    assert abs(found["scores"]["frechet_distance_not_fid"]) < 1e-4
    assert found["protocol"]["reference_pictures"] == len(paths)
    result = command(
        DOOR,
        *common,
        f"--folder={out / 'pictures'}",
        f"--reference={stats}",
        f"--out={tmp_path}",
        "--picture_size=16",
    )
    refused(result, "picture_size=None", "now 16")


METADATA = [
    {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a circle"},
    {
        "tag": "colors",
        "include": [{"class": "square", "count": 1, "color": "red"}],
        "prompt": "a red square",
    },
]


def test_geneval_from_model_to_score(finished, command, tmp_path):
    """The official folders, then the score of recorded detections: 3 of 4 and 2 of 4."""
    prompts, detections, out = (
        tmp_path / "metadata.jsonl",
        tmp_path / "found.jsonl",
        tmp_path / "out",
    )
    prompts.write_text("".join(json.dumps(row) + "\n" for row in METADATA))
    flags = [
        f"--model={finished}",
        "--suite=geneval",
        f"--prompts={prompts}",
        f"--out={out}",
        "--steps=1",
        "--grid",
    ]
    result = command(DOOR, *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "--detections" in result.stdout
    assert sorted(
        p.relative_to(out / "pictures").as_posix() for p in (out / "pictures").rglob("*.*")
    ) == sorted(
        [
            f"{i:05d}/{name}"
            for i in range(2)
            for name in ("metadata.jsonl", "grid.png", *(f"samples/{j:05d}.png" for j in range(4)))
        ]
    )
    assert json.loads((out / "pictures/00001/metadata.jsonl").read_text()) == METADATA[1]
    samples = [
        np.asarray(Image.open(out / f"pictures/00000/samples/{j:05d}.png")) for j in range(4)
    ]
    assert (samples[0] != samples[1]).any()  # each its own noise
    rows = []
    for i, right in enumerate((3, 2)):
        for j in range(4):
            name = ("circle", "square")[i] if j < right else "triangle"
            one = {"class": name, "box": [0, 0, 9, 9], "confidence": 0.8, "color": "red"}
            rows.append({"file": f"{i:05d}/samples/{j:05d}.png", "objects": [one]})
    detections.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = ["--suite=geneval", f"--detections={detections}", f"--out={out}"]
    for which in (
        [*flags, f"--detections={detections}"],
        [*alone, f"--folder={out / 'pictures'}"],
        [*alone, f"--folder={out}"],
    ):
        result = command(DOOR, *which)
        assert result.returncode == 0, result.stderr[-3000:]
        assert report(out, "geneval")["scores"] == {
            "overall": 0.625,
            "tasks": {"single_object": 0.75, "colors": 0.5},
        }


def test_dpg_grids_and_score(finished, command, tmp_path):
    questions, answers, out = tmp_path / "dpg.csv", tmp_path / "answers.jsonl", tmp_path / "out"
    questions.write_text("item_id,text,proposition_id,dependency\nc,a circle,1,0\nc,a circle,2,1\n")
    flags = [
        f"--model={finished}",
        "--suite=dpg",
        f"--prompts={questions}",
        f"--out={out}",
        "--steps=1",
    ]
    result = command(DOOR, *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    size = json.loads((finished / "config.json").read_text())["data"]["size"]
    assert Image.open(out / "pictures/c.png").size == (2 * size, 2 * size)
    given = [("yes", "yes"), ("no", "yes"), ("yes", "no"), ("yes", "yes")]
    rows = [
        {"item_id": "c", "picture": n, "answers": {"1": a, "2": b}}
        for n, (a, b) in enumerate(given)
    ]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = command(DOOR, *flags, f"--answers={answers}")
    assert result.returncode == 0, result.stderr[-3000:]
    assert report(out, "dpg")["scores"] == {"dpg": 62.5}


def test_a_hook_scores_pictures_with_their_prompts(made, command, tmp_path):
    """imagereward's seam: pictures reach the function in order, with their own prompts."""
    out, _ = made
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    images = [np.asarray(Image.open(out / "pictures" / row["file"])) for row in rows]
    expected = np.mean([len(row["prompt"]) * image.mean() for row, image in zip(rows, images)])
    result = command(
        DOOR,
        "--suite=imagereward",
        "--hook=helpers.rewards:reward",
        f"--folder={out / 'pictures'}",
        f"--out={tmp_path}",
        environment={"PYTHONPATH": str(ROOT / "tests")},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert report(tmp_path, "imagereward")["scores"]["imagereward"] == pytest.approx(
        expected, rel=1e-9
    )


@pytest.fixture
def folder(tmp_path):
    """Three pictures; a.png, b.png, c.png."""
    path = tmp_path / "given"
    path.mkdir()
    for i, name in enumerate("abc"):
        Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(path / f"{name}.png")
    return path


HOOK = "--hook=sprint_jax.toy.frechet:features"


def test_damaged_pictures_and_sizes_are_counted(folder, command, tmp_path):
    flags = [
        "--suite=fid",
        HOOK,
        f"--folder={folder}",
        f"--save_reference={tmp_path / 's.npz'}",
        f"--out={tmp_path}",
    ]
    Image.fromarray(np.zeros((16, 20, 3), np.uint8)).save(folder / "d.png")
    refused(command(DOOR, *flags), "2 sizes", "1 of 16 x 20", "--picture_size")
    (folder / "e.png").write_bytes(b"no picture")
    refused(command(DOOR, *flags), "1 of 5 pictures cannot be read", "e.png")
    assert not (tmp_path / "s.npz").exists()


def test_prompts_without_pictures_are_counted(folder, command, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"id": i, "prompt": "a circle"}) + "\n" for i in "abcxy"))
    flags = ["--suite=shapes", f"--folder={folder}", f"--out={tmp_path / 'out'}"]
    refused(
        command(DOOR, *flags, f"--prompts={prompts}"), "2 of 5 prompts have no picture", "first x"
    )
    refused(command(DOOR, *flags), "manifest.jsonl", "--prompts")


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--suite"]),
        (["--suite=fid"], ["--out"]),
        (["--suite=fid", "--out=x"], ["--model", "--folder"]),
        (["--suite=fid", "--out=x", "--folder=y"], ["--weights", "--hook"]),
        (
            ["--suite=fid", "--out=x", "--folder=y", "--weights=z"],
            ["--reference", "--save_reference"],
        ),
        (["--suite=clip", "--out=x", "--folder=y"], ["--weights", "clip-vit-large-patch14"]),
        (["--suite=imagereward", "--out=x", "--folder=y"], ["--hook", "module:function"]),
        (
            ["--suite=shapes", "--out=x", "--folder=y", "--detections=z"],
            ["--detections", "geneval"],
        ),
        (["--suite=dpg", "--out=x", "--answers=z"], ["--prompts", "dpg_bench.csv"]),
        (
            ["--suite=dpg", "--out=x", "--model=m", "--prompts=p.csv", "--file_format=jpeg"],
            ["--file_format=jpeg", "dpg"],
        ),
        (["--suite=shapes", "--out=x", "--folder=y", "--first=3"], ["--first", "--prompts"]),
        (
            [
                "--suite=fid",
                "--out=x",
                "--folder=y",
                "--weights=z",
                "--save_reference=/nowhere/a.npz",
            ],
            ["--save_reference", "/nowhere"],
        ),
        (
            ["--suite=fid", "--out=x", "--folder=y", HOOK, "--save_reference=/tmp"],
            ["--save_reference=/tmp is a folder"],
        ),
        (["--suite=shapes", "--out=x", "--folder=/nowhere", "--shard=2/2"], ["--shard=2/2", "0/4"]),
    ],
)
def test_the_door_refuses(command, flags, words):
    refused(command(DOOR, *flags), *words)


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--suite=fid", "--weights=/nowhere.pth", "--reference=/"],
            ["--weights=/nowhere.pth", "pt_inception"],
        ),
        (["--suite=fid", HOOK, "--reference=/nowhere.npz"], ["/nowhere.npz"]),
        (["--suite=imagereward", "--hook=nowhere:f"], ["cannot import nowhere"]),
        (["--suite=clip", "--weights=/nowhere"], ["--weights=/nowhere", "clip-vit-large-patch14"]),
        (["--suite=geneval", "--detections=/nowhere.jsonl"], ["--detections=/nowhere.jsonl"]),
        (["--suite=dpg", "--answers=/nowhere.jsonl"], ["--answers=/nowhere.jsonl"]),
    ],
)
def test_what_scoring_reads_is_looked_for_first(command, tmp_path, flags, words):
    """Before prompts and model, neither of which is there, and so before any picture."""
    refused(
        command(
            DOOR, "--model=/nowhere", "--prompts=/nowhere.txt", f"--out={tmp_path / 'out'}", *flags
        ),
        *words,
    )


def test_missing_and_wrong_weights_are_named(folder, command, tmp_path):
    flags = ["--suite=fid", f"--folder={folder}", f"--reference={folder}", f"--out={tmp_path}"]
    refused(
        command(DOOR, *flags, "--weights=/nowhere.pth"),
        "/nowhere.pth",
        "pt_inception-2015-12-05-6726825d.pth",
    )
    import safetensors.numpy

    (tmp_path / "other.safetensors").write_bytes(
        safetensors.numpy.save({"a": np.zeros(3, np.float32)})
    )
    refused(
        command(DOOR, *flags, f"--weights={tmp_path / 'other.safetensors'}"),
        "SHA-256",
        "6726825d",
        "--unpublished_weights",
    )
    refused(command(DOOR, *flags, "--hook=sprint_jax.toy.frechet:absent"), "no absent")
    refused(command(DOOR, *flags, "--hook=nowhere:f"), "cannot import nowhere")

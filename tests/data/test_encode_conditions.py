"""Encoded data sets with a ControlNet's condition: what is stored, refused and learned from."""

import dataclasses
import io
import json
import pickle
import tarfile

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from helpers import encoding
from helpers.configs import card, smoke_config
from helpers.encoding import CODEC, SIZES, folder_contents, records_by_caption
from helpers.inputs import encode_shapes, write_images
from helpers.records import MANIFEST_FIELDS, is_readable, numbered_record
from helpers.runs import ROOT
from sprint_jax import build, config
from sprint_jax.conditioning import detector, hed, hed_weights, sketches
from sprint_jax.data import batches, encode, encode_options, encoded, sources
from sprint_jax.errors import UserError
from sprint_jax.storage import crops
from sprint_jax.toy import shapes
from sprint_jax.training import datasets, stages

EDGES = detector.Lines("edges", None, None)


def luminance(image, resolution):
    """Return brightness at the resolution of the detector, in place of the detector."""
    return sketches.resize_for_detector(image, resolution).max(-1)


FAKE = detector.Detector("0123456789abcdef", luminance)
HED = detector.Lines("hed", FAKE, None)
SCRIBBLE = detector.Lines("scribble", FAKE, sketches.PUBLISHED_THICKNESS)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder of 22 captioned images, square and wide; number 5 has no caption."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(22):
        example = shapes.example(0, i, size=64)
        Image.fromarray(example.image if i % 3 else example.image[22:42]).save(
            folder / f"{i:03d}.png"
        )
        (folder / f"{i:03d}.txt").write_text(example.text)
    (folder / "005.txt").unlink()
    return folder


def encode_with(images, out, condition, **options):
    """Encode a folder with a condition and return the folder `out`."""
    told = condition.identity if condition else "none"
    encoding.encode_folder(images, out, lines=condition, condition=told, **options)
    return out


@pytest.fixture(scope="module")
def with_edges(images, tmp_path_factory):
    """Return an encoding with edges."""
    return encode_with(images, tmp_path_factory.mktemp("encoded") / "edges", EDGES)


def fitted_images(images):
    """Return {caption: (key, image)} of the usable examples."""
    found = {}
    for i in set(range(22)) - {5}:
        image = crops.fit_bicubic(
            np.asarray(Image.open(images / f"{i:03d}.png")), *SIZES[0 if i % 3 else 1]
        )
        found[(images / f"{i:03d}.txt").read_text()] = f"{i:03d}.png", image
    return found


def all_records(folder):
    """Return {caption: record} of both splits."""
    return records_by_caption(folder, "train") | records_by_caption(folder, "heldout")


# --- what is written ---


def test_edges_are_those_of_the_fitted_image(images, with_edges, tmp_path):
    """They are encoded like the image, which is itself encoded as without a condition."""
    found, plain = (
        all_records(with_edges),
        all_records(encode_with(images, tmp_path / "plain", None)),
    )
    assert found.keys() == fitted_images(images).keys() == plain.keys()
    drawn = 0
    for caption, (_, image) in fitted_images(images).items():
        shown = sketches.to_rgb(sketches.gradient_edges(image[None]))
        assert found[caption]["control"].dtype == np.float32
        drawn += shown.any()
        np.testing.assert_array_equal(
            found[caption]["control"], CODEC.encode(shown)[0].astype(np.float16)
        )
        np.testing.assert_array_equal(found[caption]["latent"], plain[caption]["latent"])
        np.testing.assert_array_equal(found[caption]["text"], plain[caption]["text"])
    assert drawn > 15  # the others have no object in the crop
    assert encoded.read_manifest(with_edges)["condition"] == "edges"
    assert json.loads((with_edges / "settings.json").read_text())["condition"] == "edges"


def test_soft_edges_and_scribbles(images, tmp_path):
    """They are made at the detector's size and resized to the image.

    The name of an example decides the thickness.
    """
    soft, drawn = (all_records(encode_with(images, tmp_path / c.kind, c)) for c in (HED, SCRIBBLE))
    thick = set()
    for caption, (key, image) in fitted_images(images).items():
        height, width = image.shape[:2]
        seen = luminance(image, min(height, width))
        assert seen.shape == (64, 64)
        thickness = detector.draw_thickness(key, (0, 24))
        thick.add(thickness)
        strokes = sketches.scribble(seen, thickness=thickness, sigma=3.0)
        for record, expected in ((soft[caption], seen), (drawn[caption], strokes)):
            expected = np.asarray(
                Image.fromarray(expected).resize((width, height), Image.Resampling.BICUBIC)
            )
            shown = sketches.to_rgb(expected)[None]
            np.testing.assert_array_equal(
                record["control"], CODEC.encode(shown)[0].astype(np.float16)
            )
    assert len(thick) > 5


def test_thickness_depends_on_the_name_alone():
    """Each of 0 to 24 is equally frequent, also among held-out examples.

    A digest chooses the names of those too.
    """
    settings = encoding.settings_of_names(examples=20000, heldout=1000)
    keys = [f"{i}.png" for i in range(20000)]
    drawn = {split: [] for split in encoded.SPLITS}
    for key in keys:
        drawn[settings.split(key)].append(detector.draw_thickness(key, (0, 24)))
    for values in drawn.values():
        counts = np.bincount(values, minlength=25)
        expected = len(values) / 25
        assert len(counts) == 25
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    assert {detector.draw_thickness(key, (3, 3)) for key in keys[:50]} == {3}
    assert [detector.draw_thickness(f"{i}.png", (0, 24)) for i in range(4)] == [
        10,
        23,
        4,
        0,
    ]  # encodings that began are continued


def test_batches_hosts_and_interruptions_change_nothing(images, tmp_path, monkeypatch):
    expected = folder_contents(encode_with(images, tmp_path / "whole", SCRIBBLE))
    assert folder_contents(encode_with(images, tmp_path / "batch", SCRIBBLE, batch=9)) == expected
    encode_with(images, tmp_path / "hosts", SCRIBBLE, hosts=2, host=1)
    assert (
        folder_contents(encode_with(images, tmp_path / "hosts", SCRIBBLE, hosts=2, host=0))
        == expected
    )
    write, calls = encoded.write_shard, []

    def stopping(path, chosen):
        calls.append(path)
        if len(calls) == 2:
            raise encoding.Interrupted
        return write(path, chosen)

    monkeypatch.setattr(encoded, "write_shard", stopping)
    with pytest.raises(encoding.Interrupted):
        encode_with(images, tmp_path / "stopped", SCRIBBLE)
    assert not (tmp_path / "stopped/manifest.json").exists()
    assert folder_contents(encode_with(images, tmp_path / "stopped", SCRIBBLE)) == expected


def test_without_a_condition_nothing_changes(images, tmp_path):
    """The digest is that of the version without conditions.

    No file contains "condition", and a reader takes it as none.
    """
    plain = encode.Settings(
        source="s",
        encoder="e",
        examples=10,
        text="features",
        caption_field="prompt",
        sizes=((32, 32),),
        heldout=2,
        shard_records=4,
        condition="none",
    )
    assert plain.digest() == "e89052c73f2d0ee2e7a11d6bfa8e41613fa10e3a7c5847c7110627e6d9db3dde"
    assert dataclasses.replace(plain, condition="edges").digest() != plain.digest()
    out = encode_with(images, tmp_path / "out", None)
    assert not any(
        b"condition" in path.read_bytes() or b"control" in path.read_bytes()
        for path in out.iterdir()
    )
    assert encoded.read_manifest(out)["condition"] == "none"


# --- what is refused ---


@pytest.mark.parametrize(
    "begun, then, words",
    [
        (EDGES, None, "begun with condition 'edges', this command has 'none'"),
        (None, EDGES, "begun with condition 'none', this command has 'edges'"),
        (
            SCRIBBLE,
            dataclasses.replace(SCRIBBLE, thickness=(1, 1)),
            "thickness 0 to 24', this command has .*thickness 1 to 1'",
        ),
        (
            HED,
            detector.Lines("hed", detector.Detector("fedcba", luminance), None),
            "detector 0123456789abcdef', .* 'hed, detector fedcba'",
        ),
    ],
)
def test_a_folder_keeps_to_its_condition(images, tmp_path, begun, then, words):
    out = tmp_path / "out"
    encode_with(images, out, begun, hosts=3, host=2)
    before = folder_contents(out)
    with pytest.raises(UserError, match=words):
        encode_with(images, out, then)
    assert folder_contents(out) == before


def test_a_condition_that_settings_do_not_name(images, tmp_path):
    with pytest.raises(ValueError, match="the condition is edges, settings say none"):
        encoding.encode_folder(images, tmp_path / "out", lines=EDGES, condition="none")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind, weights, thickness, words",
    [
        ("hed", None, None, "--condition=hed needs --hed_weights=ControlNetHED.pth"),
        ("scribble", None, 1, "--condition=scribble needs --hed_weights"),
        ("edges", "x.pth", None, "--hed_weights does not belong to --condition=edges"),
        ("none", "x.pth", None, "--hed_weights does not belong to --condition=none"),
        ("hed", "x.pth", 0, "--thickness does not belong to --condition=hed"),
        ("scribble", "x.pth", -1, "--thickness=-1: use 0 or more"),
        ("scribble", "/nowhere.pth", None, "no HED weights at /nowhere.pth"),
    ],
)
def test_flags_of_conditions(kind, weights, thickness, words):
    options = encode_options.Options(
        source="s",
        encoder="e",
        encoded="d",
        condition=kind,
        hed_weights=weights,
        thickness=thickness,
    )
    with pytest.raises(UserError, match=words):
        encode_options.check(options)
        encode_options.condition(options)


def test_ready_latents_need_their_image(tmp_path):
    """Without an image they are skipped.

    With one, latent and condition are both computed from it.
    """
    (tmp_path / "source").mkdir()
    with tarfile.open(tmp_path / "source" / "0.tar", "w") as tar:
        for i in range(4):
            example, image, latent = shapes.example(0, i, size=32), io.BytesIO(), io.BytesIO()
            Image.fromarray(example.image).save(image, "png")
            np.save(latent, np.ones((48, 8, 8), np.float32))
            parts = {"npy": latent.getvalue(), "txt": example.text.encode()}
            if i:
                parts["png"] = image.getvalue()
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    out = encode_with(tmp_path / "source", tmp_path / "out", EDGES, heldout=0)
    found = records_by_caption(out, "train")
    assert found.keys() == {shapes.example(0, i).text for i in (1, 2, 3)}
    for i in (1, 2, 3):
        image = shapes.example(0, i, size=32).image[None]
        np.testing.assert_array_equal(
            found[shapes.example(0, i).text]["latent"], CODEC.encode(image)[0].astype(np.float16)
        )
    reason = "it has a latent and no image to make a condition of"
    assert encoded.read_manifest(out)["skipped"] == [{"key": "0.tar:0", "reason": reason}]


def test_a_condition_that_is_not_finite_is_skipped_once(images, tmp_path):
    class Pixels(type(encoding.embedded_encoders().pixels)):
        def encode(self, params, images):
            """Encode a folder with a condition and return the folder `out`."""
            gray = (images[..., 0] == images[..., 2]).all((1, 2))  # lines have three equal channels
            return super().encode(params, images) * np.where(gray, np.inf, 1)[:, None, None, None]

    encoders = dataclasses.replace(encoding.embedded_encoders(), pixels=Pixels(CODEC))
    with pytest.raises(
        UserError, match="4 of 10 examples cannot be used.*its condition is not finite in float16"
    ):
        encode_with(images, tmp_path / "out", EDGES, encoders=encoders, max_bad=0.0)


# --- what is read ---


def data_set(folder, change=lambda record: record, condition="edges"):
    """Write eight examples whose condition is minus their latent; `change` replaces the third."""
    made = [r | {"control": -r["latent"]} for r in map(numbered_record, range(8))]
    made[2] = change(made[2])
    folder.mkdir(exist_ok=True)
    entry = encoded.write_shard(folder / "train-00000.array_record", made)
    described = MANIFEST_FIELDS | ({"condition": condition} if condition else {})
    encoded.write_manifest(folder / "manifest.json", described, [entry])
    return encoded.Encoded(folder, "train")


@pytest.mark.parametrize(
    "change, condition, words",
    [
        (
            lambda r: {k: v for k, v in r.items() if k != "control"},
            "edges",
            "not latent, control, caption and tokens",
        ),
        (lambda r: r, None, "not latent, caption and tokens"),
        (
            lambda r: r | {"control": r["control"][:2]},
            "edges",
            r"a control float16 \(2, 4, 3\), not float16 \(4, 4, 3\)",
        ),
        (lambda r: r | {"control": r["control"].astype(np.float32)}, "edges", "a control float32"),
        (lambda r: r | {"control": r["control"] * np.float16(np.nan)}, "edges", "is not finite"),
    ],
)
def test_a_record_that_contradicts_the_manifest(tmp_path, change, condition, words):
    data = data_set(tmp_path, change, condition)
    with pytest.raises(encoded.BadRecord, match=words):
        data.read(2)
    assert is_readable(data, 3) == (condition is not None)


def test_a_manifest_of_another_condition(tmp_path):
    with pytest.raises(
        UserError, match="damaged.*condition is 'sketches', not one of edges, hed, scribble"
    ):
        data_set(tmp_path, condition="sketches")


def test_batches_contain_the_condition(tmp_path):
    """Row by row, as float32, also from a pickle; left out where it is not wanted."""
    data = data_set(tmp_path)
    arrays, _ = batches.BatchReader(data, seed=0, batch=4)(0)
    assert arrays["control"].dtype == np.float32
    np.testing.assert_array_equal(arrays["control"], -arrays["latent"])
    without = batches.BatchReader(data, seed=0, batch=4, control=False)
    for made in (without, pickle.loads(pickle.dumps(without))):
        assert made(0)[0].keys() == {"latent", "tokens", "mask"}
    with batches.iterate(data, seed=0, batch=4, start=0, stop=1, control=False) as read:
        assert "control" not in next(read)


# --- what learns ---


def controlnet_config(folder, **control):
    """Return the `smoke` config of the ControlNet for an encoded folder, reduced in depth."""
    tree = card("controlnet")
    tree.model.depth, tree.data.encoded = 2, str(folder)
    tree.control.update(depth=1, condition="edges", freehand=0.0)
    tree.control.update(**control)
    tree.phases.control.optimizers.network.kind = "adamw"  # compiles faster than that of the card
    return config.parse(tree)


@pytest.fixture(scope="module")
def encoded_edges(tmp_path_factory):
    """Return `shapes` images with edges, encoded as the `smoke` preset does."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "pictures").mkdir()
    source = sources.open_source(write_images(root / "pictures", 48))
    return encode_shapes(smoke_config(), source, root / "encoded", heldout=16, condition=EDGES)


def test_the_control_stage_on_an_encoded_folder(encoded_edges):
    """Three steps of `main`: the condition reaches the ControlNet, which begins to change."""
    c = controlnet_config(encoded_edges)
    data = datasets.open_dataset(c, print)
    assert data.identity.endswith(", with edges")
    rng = np.random.default_rng(0)
    random = lambda a: 0.1 * rng.standard_normal(a.shape).astype(a.dtype)  # compiles nothing
    teacher = jax.tree.map(random, jax.eval_shape(build.teacher(c).init, jax.random.key(0)))
    stage = stages.make(c, "control", data, teacher=teacher)
    state = stage.start(stage.frozen, stage.init_arrays)
    step = jax.jit(
        lambda state, frozen, batch: stage.functions[0](
            state, frozen, stage.prepare(frozen, batch)
        ),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    abstract = datasets.abstract_batch(c, stage.batch)
    with stage.batches(stage.batch, 0, 3, 0, 1) as read:
        for batch in read:
            assert {k: (a.shape, a.dtype) for k, a in batch.items()} == {
                k: (a.shape, a.dtype) for k, a in abstract.items()
            }
            state, report = step(state, stage.frozen, batch)
            assert np.isfinite(report.scalars["loss"])
    assert report.norms["grad_norm/zero_in/kernel"] > 0


def test_held_out_examples_have_their_edges(encoded_edges):
    """They are decoded from the stored arrays.

    The caption identifies the image of the first example, and its edges are those of that image.
    """
    heldout = datasets.open_dataset(controlnet_config(encoded_edges), print).heldout(4, 6)
    drawn = {
        shapes.example(3, i, size=32).text: shapes.example(3, i, size=32).image for i in range(48)
    }
    images = np.stack([drawn[caption] for caption in heldout.captions])
    edges = sketches.gradient_edges(images)
    codec = build.codec(controlnet_config(encoded_edges))
    expected = codec.encode(sketches.to_rgb(edges)).astype(np.float16)
    np.testing.assert_array_equal(heldout.cond["control"], expected.astype(np.float32))
    np.testing.assert_array_equal(heldout.cond["control_scale"], np.ones(4, np.float32))
    assert heldout.edges.shape == (4, 32, 32)
    assert heldout.edges.dtype == np.uint8
    assert len(heldout.reference) == 6
    # The codec keeps 32 of 48 numbers: lines come back blurred, in the same places.
    assert heldout.edges[edges > 0].mean() > 3 * heldout.edges[edges == 0].mean()


def test_without_a_controlnet_the_condition_is_left_out(encoded_edges):
    c = controlnet_config(encoded_edges, depth=0, condition="scribble")
    data = datasets.open_dataset(c, print)
    assert not data.identity.endswith("edges")
    with data.batches(8, 0, 1, 0, 1) as read:
        assert (
            next(read).keys() == datasets.abstract_batch(c, 8).keys() == {"latent", "text", "mask"}
        )
    heldout = data.heldout(2, 2)
    assert heldout.edges is None and heldout.cond.keys() == {"text", "mask"}


def test_another_condition_is_refused(encoded_edges, tmp_path):
    with pytest.raises(UserError) as refused:
        datasets.open_dataset(controlnet_config(encoded_edges, condition="scribble"), print)
    for words in (
        str(encoded_edges),
        "condition edges",
        "config.control.condition is scribble",
        "--condition=scribble",
        "--config.control.condition=edges",
    ):
        assert words in str(refused.value)
    manifest = json.loads((encoded_edges / "manifest.json").read_text())
    manifest.pop("condition")
    for path in encoded_edges.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    message = "with condition none, config.control.condition is edges: encode .* --condition=edges$"
    with pytest.raises(UserError, match=message):
        datasets.open_dataset(controlnet_config(tmp_path), print)


# --- the command ---


def test_the_command_writes_scribbles(command, tmp_path):
    """Scribbles have one thickness, with weights from a file.

    The detector sees an image of its own size.
    """
    # The image decides its own edges: the first stage passes its red channel and the others are 0.
    state = {row.theirs: np.zeros(row.shape, np.float32) for row in hed_weights.rows(hed.PUBLISHED)}
    for layer in ("block1.convs.0", "block1.convs.1"):
        state[f"{layer}.weight"][0, 0, 1, 1] = 1
    state["block1.projection.weight"][0, 0] = 20 / 255
    state["block1.projection.bias"][:] = -10
    (tmp_path / "hed.safetensors").write_bytes(safetensors.numpy.save(state))
    (tmp_path / "source").mkdir()
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 20:44, 0] = 255
    Image.fromarray(image).save(tmp_path / "source/bar.png")
    (tmp_path / "source/bar.txt").write_text("a red square")
    result = command(
        "sprint_jax",
        "encode",
        f"--source={tmp_path / 'source'}",
        f"--encoder={ROOT / 'configs/sprint.py'}:smoke",
        "--heldout=0",
        f"--encoded={tmp_path / 'out'}",
        "--sizes=64x64",
        "--condition=scribble",
        f"--hed_weights={tmp_path / 'hed.safetensors'}",
        "--thickness=4",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    dark, bright = (
        int(255 / (1 + np.exp(-mean))) for mean in (-10 / 5, 10 / 5)
    )  # the mean of five side outputs
    soft = np.where(image[..., 0] > 0, bright, dark).astype(np.uint8)
    strokes = sketches.scribble(soft, thickness=4, sigma=sketches.PUBLISHED_SIGMA)
    assert 0 < (strokes > 0).mean() < 1
    codec = build.codec(smoke_config())
    expected = codec.encode(sketches.to_rgb(strokes)[None])[0]
    np.testing.assert_allclose(
        records_by_caption(tmp_path / "out", "train")["a red square"]["control"],
        expected,
        rtol=1e-3,
        atol=2e-3,
    )
    assert encoded.read_manifest(tmp_path / "out")["condition"] == "scribble"
    assert json.loads((tmp_path / "out/settings.json").read_text())["condition"].endswith(
        "thickness 4 to 4"
    )

"""Inputs of training: drawn images, and encoded folders with features or with token ids."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from helpers.configs import card, smoke_config
from helpers.inputs import encode_shapes, write_images
from helpers.runs import TINY_FLAGS
from sprint_jax import build, config
from sprint_jax.data import encode, encoded, sources
from sprint_jax.encoders import pixels as pixel_codecs
from sprint_jax.encoders import words
from sprint_jax.errors import UserError
from sprint_jax.toy import shapes
from sprint_jax.training import data_encoders, datasets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return `shapes` images, encoded as the `smoke` preset does."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "pictures").mkdir()
    source = sources.open_source(write_images(root / "pictures", 96))
    return encode_shapes(smoke_config(), source, root / "encoded")


def test_encoded_batches_equal_drawn_ones(folder):
    """By caption, up to float16.

    Fails when the mask or the null prompt belongs to another example.
    """
    c = smoke_config(encoded=str(folder))
    data, codec, encoder = datasets.open_dataset(c, print), build.codec(c), build.text_encoder(c)
    drawn = {}
    for i in range(96):
        example = shapes.example(3, i, size=32)
        drawn[encoder.encode([example.text])[0].tobytes()] = encoder.encode([example.text])[1][0]
    with data.batches(8, 0, 3, 0, 1) as batches:
        seen = [next(batches) for _ in range(3)]
    for batch in seen:
        assert batch["latent"].shape == (8, *build.latent_shape(c))
        assert batch["text"].dtype == np.float32
        assert np.isin(batch["mask"], (0, 1)).all()
        assert (batch["mask"].sum(1) >= 3).all()
    text_, mask = encoder.encode([""])
    np.testing.assert_allclose(data.frozen.null_text, text_, rtol=1e-6)
    np.testing.assert_array_equal(data.frozen.null_mask, mask)
    heldout = data.heldout(4, 8)
    again, masks = encoder.encode(heldout.captions)
    np.testing.assert_allclose(
        heldout.cond["text"] * masks[..., None], again * masks[..., None], atol=2e-3
    )
    np.testing.assert_array_equal(heldout.cond["mask"], masks)
    assert heldout.meanings is None and len(heldout.reference) == 8
    decoded = np.asarray(codec.decode(codec.encode(heldout.images)), int)
    assert np.abs(decoded - heldout.images).mean() < 1


def test_two_processes_share_a_batch(folder):
    data = datasets.open_dataset(smoke_config(encoded=str(folder)), print)
    take = lambda process, processes: next(iter(data.batches(8, 5, 6, process, processes)))
    whole, first, second = take(0, 1), take(0, 2), take(1, 2)
    for name in whole:
        np.testing.assert_array_equal(whole[name], np.concatenate([first[name], second[name]]))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(codec=dict(channels=16)), "channels 32, the config 16"),
        (dict(codec=dict(scale=2.0)), "was encoded by"),
        (dict(data=dict(encoded="/nowhere")), "/nowhere"),
    ],
)
def test_a_folder_that_does_not_fit(folder, changes, words):
    c = smoke_config(encoded=str(folder))
    for section, values in changes.items():
        c = dataclasses.replace(c, **{section: dataclasses.replace(getattr(c, section), **values)})
    with pytest.raises(UserError, match=words):
        datasets.open_dataset(c, print)


def test_too_many_held_out_examples_are_refused(folder):
    """The error comes before training, because the evaluation comes after it."""
    c = smoke_config(encoded=str(folder))
    c = dataclasses.replace(c, evaluation=dataclasses.replace(c.evaluation, prompts=90))
    with pytest.raises(UserError, match="config.evaluation.prompts is 90"):
        datasets.open_dataset(c, print)


def test_a_damaged_held_out_example_is_skipped_and_reported(folder, monkeypatch):
    """The same holds in training.

    Fails when it ends the evaluation, which comes after the training.
    """
    c, said = smoke_config(encoded=str(folder)), []
    whole = datasets.open_dataset(c, print).heldout(5, 5)
    read = encoded.Encoded.read

    def damaged(self, i):
        """Raise an error for one example."""
        if self.manifest["counts"]["heldout"] == len(self) and i == 1:
            raise encoded.BadRecord("is not finite")
        return read(self, i)

    monkeypatch.setattr(encoded.Encoded, "read", damaged)
    data = datasets.open_dataset(c, said.append)
    assert data.heldout(4, 4).captions == [whole.captions[i] for i in (0, 2, 3, 4)]
    assert any(
        "1 held-out examples cannot be used, first 1 (is not finite)" in line for line in said
    )
    with pytest.raises(UserError, match="held-out examples can be used"):
        data.heldout(len(encoded.Encoded(folder, "heldout")), 1)


def test_the_main_job_on_an_encoded_folder(finished, folder, command, tmp_path):
    """The programs are those of the drawn data; only the arrays differ."""
    result = command(
        "sprint_jax.main",
        *TINY_FLAGS,
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.encoded={folder}",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["scores"] == {}
    assert set(summary["frechet"]) >= {
        "real",
        "teacher_20",
        "student_1",
    }
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    others = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows] == [(r["stage"], r["step"]) for r in others]
    assert rows[0]["loss"] != others[0]["loss"]
    assert all(np.isfinite(r["loss"]) for r in rows)


def test_any_words_are_read():
    """Fails when padding or punctuation becomes a word, and when two words share a token."""
    encoder = words.WordsText(8)
    features, mask = encoder.encode(
        ["A grinning face!", "a grinning face", "a winking face", "", "w " * 20]
    )
    np.testing.assert_array_equal(features[0], features[1])
    np.testing.assert_array_equal(mask.sum(1), [4, 4, 4, 1, 8])
    assert np.abs(features[1] - features[2])[2].max() > 0.1


def published(tmp_path_factory):
    """Return a random folder of diffusers."""
    fabricate = pytest.importorskip("helpers.fabricate", exc_type=ImportError)
    path = tmp_path_factory.mktemp("models") / "published"
    fabricate.pipeline().save_pretrained(path)
    return path


def published_card(path, out, transformer):
    """Return the `smoke` card for encoded data of a published model."""
    c = config.parse(card())
    return dataclasses.replace(
        c,
        data=dataclasses.replace(c.data, encoded=str(out), model=str(path)),
        text=config.Text(vocabulary="gemma", length=300, dim=transformer.text_dim),
        codec=dataclasses.replace(c.codec, block=32, channels=transformer.in_channels, weights=""),
        evaluation=dataclasses.replace(c.evaluation, prompts=2, samples=2),
    )


def test_token_ids_become_the_features(tmp_path_factory, tmp_path):
    """The same captions are stored as features and as ids.

    Fails when the mask of the first token is dropped.
    """
    path = published(tmp_path_factory)
    from sprint_jax.sampling import loading

    (tmp_path / "pictures").mkdir()
    source = sources.open_source(write_images(tmp_path / "pictures", 12, size=32))
    pipe = loading.load(path, dtype="float32")
    encoders = encode.Encoders(
        pixels=pipe.pixels,
        text=pipe.text,
        params={n: pipe.params[n] for n in ("pixels", "text")},
        identity=data_encoders.identity(pipe, path),
        side=32,
    )
    found = {}
    for kind in ("features", "tokens"):
        kept = encode.Settings(
            source=source.identity(),
            encoder=encoders.identity,
            examples=12,
            text=kind,
            caption_field="prompt",
            sizes=((32, 32),),
            heldout=4,
            shard_records=64,
            condition="none",
        )
        encode.encode(source, encoders, tmp_path / kind, kept, batch=4)
        data = datasets.open_dataset(
            published_card(path, tmp_path / kind, pipe.model), lambda line: None
        )
        assert isinstance(data.pixels, pixel_codecs.AutoencoderPixels)
        with data.batches(4, 0, 1, 0, 1) as batches:
            found[kind] = jax.device_get(jax.jit(data.prepare)(data.frozen, next(batches)))
    features, tokens = found["features"], found["tokens"]
    np.testing.assert_array_equal(features["mask"], tokens["mask"])
    np.testing.assert_array_equal(features["latent"], tokens["latent"])
    mask = features["mask"][..., None]
    assert (
        np.abs((features["text"] - tokens["text"]) * mask).max()
        < 2e-3 * np.abs(features["text"]).max()
    )
    assert mask.sum() > 4 * 5


def test_a_published_transformer_as_teacher(tmp_path_factory):
    """A folder of diffusers is read if the config describes it.

    Otherwise the difference is named.
    """
    from sprint_jax.conversion import folder as folders

    path = published(tmp_path_factory)
    model, params = folders.read_transformer(path)
    loaded = build.teacher_weights(str(path), dataclasses.replace(model, remat="block"))
    for a, b in zip(*map(jax.tree.leaves, (loaded, params)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match=f"depth={model.depth}, the config asks for 9"):
        build.teacher_weights(str(path), dataclasses.replace(model, depth=9))
    # A scale of a thousandth belongs to times in [0, 1] given in thousandths.
    told = tmp_path_factory.mktemp("told") / "transformer"
    shutil.copytree(path / "transformer", told)
    described = json.loads((told / "config.json").read_text())
    (told / "config.json").write_text(json.dumps(described | {"timestep_scale": 0.001}))
    build.teacher_weights(str(told), dataclasses.replace(model, time_scale=1.0))
    with pytest.raises(
        UserError,
        match="timestep_scale=0.001, .* a time_scale of 1, the config asks for 1000: change",
    ):
        build.teacher_weights(str(told), dataclasses.replace(model, time_scale=1000.0))

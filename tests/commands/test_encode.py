"""The command that encodes: what it writes, kills and hosts, and what it skips."""

import dataclasses
import io
import json
import subprocess
import sys
import tarfile
import textwrap
import types
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from helpers.encoding import (
    CODEC,
    SIZES,
    TEXT,
    Interrupted,
    embedded_encoders,
    encode_folder,
    encode_settings,
    encoders_of,
    folder_contents,
    records_by_caption,
    settings_of_names,
)
from helpers.runs import ROOT
from sprint_jax.commands import encode as encode_command
from sprint_jax.data import encode, encode_chunk, encode_options, encoded, sources
from sprint_jax.encoders import pixels as pixel_codecs
from sprint_jax.encoders import prompts
from sprint_jax.encoders import text as text_encoders
from sprint_jax.errors import UserError
from sprint_jax.runtime import cards
from sprint_jax.storage import crops
from sprint_jax.toy import shapes
from sprint_jax.training import data_encoders


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Return a folder of 44 captioned images, upright, square and wide.

    Numbers 5, 17 and 31 are unusable.
    """
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(44):
        example = shapes.example(0, i, size=64)
        Image.fromarray(example.image[: 64 if i % 3 else 20]).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(example.text)
    (folder / "005.txt").unlink()
    (folder / "017.png").write_bytes((folder / "017.png").read_bytes()[:100])
    (folder / "031.txt").write_text("a red zebra")
    return folder


@pytest.fixture(scope="session")
def encoding_folder(images, tmp_path_factory):
    """Return the folder of an uninterrupted encoding."""
    out = tmp_path_factory.mktemp("encoded") / "whole"
    encode_folder(images, out)
    return out


# --- what is written ---


def test_records_are_the_encoders_own(images, encoding_folder):
    """Each record has the latents of one image and the features of one caption, without padding."""
    found = records_by_caption(encoding_folder, "train") | records_by_caption(
        encoding_folder, "heldout"
    )
    usable = [i for i in range(44) if i not in (5, 17, 31)]
    captions = {(images / f"{i:03d}.txt").read_text(): i for i in usable}
    assert found.keys() == captions.keys()
    for caption, i in captions.items():
        size = SIZES[0] if i % 3 else SIZES[1]
        image = crops.fit_bicubic(np.asarray(Image.open(images / f"{i:03d}.png")), *size)
        np.testing.assert_array_equal(
            found[caption]["latent"], CODEC.encode(image[None])[0].astype(np.float16)
        )
        features, mask = TEXT.encode([caption])
        length = int(mask.sum())
        np.testing.assert_array_equal(
            found[caption]["text"], features[0, :length].astype(np.float16)
        )
        assert length == len(caption.split()) + 1


def test_the_manifest(images, encoding_folder):
    manifest = encoded.read_manifest(encoding_folder)
    counts = manifest["counts"]
    assert counts["train"] + counts["heldout"] == 41
    assert counts["skipped"] == 3
    assert 2 <= counts["heldout"] <= 16
    assert [entry["key"] for entry in manifest["skipped"]] == ["005.png", "017.png", "031.png"]
    reasons = [entry["reason"] for entry in manifest["skipped"]]
    assert reasons[:2] == ["missing caption", "undecodable image"]
    assert "zebra" in reasons[2]
    expected = dict(
        text="features", text_dim=TEXT.dim, text_length=16, channels=48, factor=4, model="tiny"
    )
    assert {name: manifest[name] for name in expected} == expected
    assert manifest["source"] == sources.open_source(images).identity()
    buckets = {}
    for shard in manifest["shards"]:
        for name, count in shard["buckets"].items():
            buckets[name] = buckets.get(name, 0) + count
    assert buckets == {"4x12": 15, "8x8": 26}  # 0, 3, 6, ... 42 are wide


def test_the_null_prompt_of_the_embedded_encoder(encoding_folder):
    text, mask = TEXT.encode([""])
    found = safetensors.numpy.load_file(encoding_folder / "null.safetensors")
    np.testing.assert_array_equal(found["text"], text[0])
    np.testing.assert_array_equal(found["mask"], mask[0])
    assert found["text"].dtype == found["mask"].dtype == np.float32 and mask.sum() == 1


def test_the_encoders_of_a_config(images):
    card = cards.load(f"{ROOT / 'configs/sprint.py'}:smoke")
    encoders = data_encoders.of_card(card)
    drawn = np.stack([shapes.example(0, 0, size=encoders.side).image])
    latents = encoders.pixels.encode(encoders.params["pixels"], drawn)
    assert latents.shape[-1] == encoders.pixels.channels
    assert encoders.side == encoders.pixels.factor * latents.shape[1]
    assert encoders.identity == data_encoders.of_card(card).identity
    with pytest.raises(UserError, match="no config file --encoder=configs/absent.py:smoke"):
        encode_command.run(
            encode_command.Options(
                source=str(images), encoder="configs/absent.py:smoke", encoded="y", heldout=1
            )
        )


def test_held_out_examples_are_chosen_by_name(images, encoding_folder, tmp_path):
    """The chunks do not matter, and a smaller held-out set is a part of a larger one."""
    encode_folder(images, tmp_path / "other", shard_records=7)
    chosen = records_by_caption(encoding_folder, "heldout").keys()
    assert records_by_caption(tmp_path / "other", "heldout").keys() == chosen
    encode_folder(images, tmp_path / "fewer", heldout=4)
    assert records_by_caption(tmp_path / "fewer", "heldout").keys() < chosen
    drawn = settings_of_names(examples=10000, heldout=500)
    assert 430 < sum(drawn.split(f"{i}.png") == "heldout" for i in range(10000)) < 570


def test_latents_do_not_depend_on_the_batch(images, encoding_folder, tmp_path):
    encode_folder(images, tmp_path / "out", batch=9)
    assert folder_contents(tmp_path / "out") == folder_contents(encoding_folder)


def test_one_program_for_each_size(images, tmp_path):
    """Images and captions come in whole batches, of which the last is padded."""
    seen, encoders = [], embedded_encoders()

    class Pixels(pixel_codecs.EmbeddedPixels):
        def encode(self, params, images):
            seen.append(images.shape)
            return super().encode(params, images)

    encode_folder(
        images, tmp_path / "out", encoders=dataclasses.replace(encoders, pixels=Pixels(CODEC))
    )
    assert set(seen) == {(4, 32, 32, 3), (4, 16, 48, 3)}


# --- killed, resumed, shared ---


@pytest.mark.parametrize("after", [0, 1, 4])
def test_stopped_and_resumed_is_the_same(images, encoding_folder, tmp_path, monkeypatch, after):
    """It is stopped between a shard and its part file. Finished shards are not made again."""
    out, calls, write = tmp_path / "out", [], encoded.write_shard

    def stopping(path, records):
        calls.append(path.name)
        entry = write(path, records)
        if len(calls) > after:
            raise Interrupted
        return entry

    monkeypatch.setattr(encoded, "write_shard", stopping)
    with pytest.raises(Interrupted):
        encode_folder(images, out)
    assert not (out / "manifest.json").exists()
    kept = [path.stem.split("-")[1] for path in out.glob("part-*.json")]
    calls.clear()
    after = 100
    encode_folder(images, out)
    assert folder_contents(out) == folder_contents(encoding_folder)
    assert not [name for name in calls if name.split("-")[1].split(".")[0] in kept]


KILLED = """
    import os, sys
    sys.path[:0] = [{root!r}, {tests!r}]
    import pathlib
    import safetensors.numpy
    from helpers import encoding
    save, calls = safetensors.numpy.save, []

    def killing(record):
        calls.append(record)
        if len(calls) == {after}:
            os.kill(os.getpid(), 9)
        return save(record)

    safetensors.numpy.save = killing
    encoding.encode_folder(pathlib.Path({images!r}), {out!r})
"""


@pytest.mark.parametrize("after", [3, 25])
def test_killed_in_the_middle_of_a_shard(images, encoding_folder, tmp_path, after):
    """kill -9 leaves a partial shard behind; the next run writes the same folder."""
    out = tmp_path / "out"
    names = dict(root=str(ROOT), tests=str(ROOT / "tests"), images=str(images), out=str(out))
    program = KILLED.format(**names, after=after)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert result.returncode == -9, result.stderr[-2000:]
    assert list(out.glob("*.partial")) and not (out / "manifest.json").exists()
    encode_folder(images, out)
    assert folder_contents(out) == folder_contents(encoding_folder)


def test_a_lost_shard_is_made_again(images, encoding_folder, tmp_path):
    out = tmp_path / "out"
    encode_folder(images, out)
    (out / "train-00001.array_record").unlink()
    (out / "train-00003.array_record").write_bytes(b"half")
    before = (out / "train-00000.array_record").stat().st_mtime_ns
    encode_folder(images, out)
    assert folder_contents(out) == folder_contents(encoding_folder)
    assert (out / "train-00000.array_record").stat().st_mtime_ns == before


def test_two_hosts_write_the_folder_of_one(images, encoding_folder, tmp_path):
    out, said = tmp_path / "out", []
    encode_folder(images, out, said, hosts=2, host=1)
    assert said == ["host 1 of 2 is done; 3 of 5 chunks are still to come from others"]
    assert {p.name for p in out.glob("part-*")} == {"part-00001.json", "part-00003.json"}
    encode_folder(images, out, said, hosts=2, host=0)
    assert "skipped" in said[1]
    assert folder_contents(out) == folder_contents(encoding_folder)
    encode_folder(images, out, hosts=2, host=1)  # both may find that all is done
    assert folder_contents(out) == folder_contents(encoding_folder)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(heldout=9), "begun with heldout 8, this command has 9"),
        (dict(encoder="other"), "begun with encoder 'tiny', this command has 'other'"),
        (
            dict(sizes=((32, 32),)),
            r"begun with sizes \[\[32, 32\], \[16, 48\]\], this command has \[\[32, 32\]\]",
        ),
    ],
)
def test_a_folder_keeps_to_its_settings(images, encoding_folder, changes, words):
    before = folder_contents(encoding_folder)
    with pytest.raises(UserError, match=words):
        encode_folder(images, encoding_folder, **changes)
    assert folder_contents(encoding_folder) == before


def test_hosts_with_different_settings(images, tmp_path):
    """Two may write settings.json at the same moment, and their parts must not be mixed."""
    encode_folder(images, tmp_path / "out", hosts=2, host=0)
    (tmp_path / "out" / "settings.json").unlink()
    source = sources.open_source(images)
    (tmp_path / "out" / "settings.json").write_text(
        json.dumps(encode_settings(source, heldout=3).plain())
    )
    with pytest.raises(UserError, match="part-00000.json was made with other settings"):
        encode_folder(images, tmp_path / "out", hosts=2, host=1, heldout=3)


def test_a_foreign_folder_is_left_alone(images, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="thesis.tex and no encoded data set"):
        encode_folder(images, tmp_path)
    assert folder_contents(tmp_path) == {"thesis.tex": b"years of work"}


# --- examples that cannot be used ---


def test_too_many_bad_examples_end_the_encoding(images, tmp_path):
    """Three are allowed whatever the share, and a fourth is not."""
    encode_folder(images, tmp_path / "three", max_bad=0.0)
    folder = tmp_path / "more"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "033.png").write_bytes(b"")
    encode_folder(folder, tmp_path / "four", max_bad=0.1)
    with pytest.raises(
        UserError,
        match="4 of 40 examples cannot be used.*--max_bad_share=0.09; the last is 033.png",
    ):
        encode_folder(folder, tmp_path / "out", max_bad=0.09)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(
        UserError, match="033.png: undecodable image"
    ):  # those of finished chunks still count
        encode_folder(folder, tmp_path / "out", max_bad=0.09)
    encode_folder(folder, tmp_path / "out", max_bad=0.1)
    assert folder_contents(tmp_path / "out") == folder_contents(tmp_path / "four")


def test_latents_of_a_source_are_used(tmp_path):
    """[C, h, w] is transposed, and each size is a bucket of its own.

    Skipped: one too large for float16, and one with another number of channels.
    """
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((48, 4, 6 if i % 2 else 4)).astype(np.float32) for i in range(8)]
    arrays[2][0, 0, 0] = 1e6
    arrays[5] = arrays[5][:32]
    (tmp_path / "source").mkdir()
    with tarfile.open(tmp_path / "source" / "0.tar", "w") as tar:
        for i, array in enumerate(arrays):
            buffer = io.BytesIO()
            np.save(buffer, array)
            prompt = json.dumps({"prompt": shapes.example(0, i).text}).encode()
            for suffix, data in (("npy", buffer.getvalue()), ("json", prompt)):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    encode_folder(tmp_path / "source", tmp_path / "out", heldout=0)
    found = records_by_caption(tmp_path / "out", "train")
    assert len(found) == 6
    for i in (0, 1, 3, 4, 6, 7):
        latent = found[shapes.example(0, i).text]["latent"]
        np.testing.assert_array_equal(latent, arrays[i].transpose(1, 2, 0).astype(np.float16))
    skipped = {
        entry["key"]: entry["reason"]
        for entry in encoded.read_manifest(tmp_path / "out")["skipped"]
    }
    assert skipped == {
        "0.tar:2": "its latent is not finite in float16",
        "0.tar:5": "its latent has 32 channels, the encoder's have 48",
    }


def test_a_set_without_a_training_example_is_an_error(tmp_path):
    """Three bad ones are allowed, and there are no others."""
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / f"in/{name}.png").write_bytes(b"no picture")
        (tmp_path / f"in/{name}.txt").write_text("a red circle")
    with pytest.raises(
        UserError,
        match="none of 3 examples is left to train on, 3 cannot be used .*a.png: undecodable image",
    ):
        encode_folder(tmp_path / "in", tmp_path / "out", heldout=0)
    assert not (tmp_path / "out/manifest.json").exists()


def test_features_that_are_not_finite_are_skipped(images, tmp_path):
    class Text(text_encoders.EmbeddedText):
        def features(self, params, arrays):
            features, mask = super().features(params, arrays)
            return features * np.where(np.arange(4) == 1, np.inf, 1)[:, None, None], mask

    with pytest.raises(UserError, match="its text is not finite in float16"):
        encode_folder(
            images,
            tmp_path / "out",
            encoders=dataclasses.replace(embedded_encoders(), text=Text(TEXT)),
        )


def test_tokens_need_an_encoder_that_has_them(images, tmp_path):
    with pytest.raises(UserError, match="--text=tokens"):
        encode_folder(images, tmp_path / "out", text="tokens")


# --- the published models ---


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return a folder with a random folder of diffusers and an instruction."""
    pytest.importorskip("torch")
    from helpers import fabricate

    folder = tmp_path_factory.mktemp("published")
    fabricate.pipeline().save_pretrained(folder / "model")
    (folder / "instruction.txt").write_text("an oil painting of ")
    return folder


@pytest.fixture(scope="module")
def pipe(published):
    """Return the pipeline of that folder."""
    from sprint_jax.sampling import loading

    return loading.load(
        published / "model", dtype="float32", instruction=published / "instruction.txt"
    )


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Return a folder of captioned photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    captions = [
        "a red fox in the snow",
        "gulls",
        "two cats asleep on a blue sofa next to a window",
        "word " * 400,
    ]
    for i, caption in enumerate(captions):
        Image.fromarray(shapes.example(0, i, size=96).image[: 40 if i == 1 else 96]).save(
            folder / f"{i}.jpg"
        )
        (folder / f"{i}.txt").write_text(caption)
    return folder


def test_the_command_on_a_published_model(command, published, pipe, photographs, tmp_path):
    """Compare with the parts of the pipeline, one image and one caption at a time."""
    result = command(
        "sprint_jax",
        "encode",
        f"--source={photographs}",
        f"--encoder={published / 'model'}",
        f"--encoded={tmp_path / 'out'}",
        "--sizes=32x64",
        "--heldout=0",
        "--encode_batch=2",
        f"--caption_instruction={published / 'instruction.txt'}",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "4 train and 0 heldout examples" in result.stdout
    assert "1 captions cut to 300 tokens" in result.stdout
    assert "warning: 3.jpg: prompt 0 has" in result.stderr
    assert "encode: 100%" in result.stderr
    manifest = encoded.read_manifest(tmp_path / "out")
    name = data_encoders.identity(pipe, published / "model")
    expected = dict(text_dim=48, text_length=300, channels=8, factor=32, model=name)
    assert {name: manifest[name] for name in expected} == expected
    found = records_by_caption(tmp_path / "out", "train")
    features_of = jax.jit(pipe.text.features)
    for i in range(4):
        caption = (photographs / f"{i}.txt").read_text().strip()
        image = crops.fit_bicubic(np.asarray(Image.open(photographs / f"{i}.jpg")), 32, 64)
        alone = np.asarray(pipe.pixels.encode(pipe.params["pixels"], image[None]))[0]
        assert found[caption]["latent"].shape == (1, 2, 8)
        np.testing.assert_allclose(
            found[caption]["latent"], alone, rtol=2e-3, atol=2e-4 * np.abs(alone).max()
        )
        if i < 3:
            ((_, arrays),) = pipe.text.prepare([caption])
            features, mask = features_of(
                pipe.params["text"], {k: v[None] for k, v in arrays.items()}
            )
            features = np.asarray(features)[0, : int(mask.sum())]
            np.testing.assert_allclose(
                found[caption]["text"], features, rtol=2e-3, atol=2e-4 * np.abs(features).max()
            )
    assert found[caption]["text"].shape == (300, 48)


def test_the_null_prompt_of_gemma(published, pipe):
    """Compare with transformers.

    The prompt is the empty string without instruction, padded on the right to 300 tokens.
    """
    import torch
    import transformers

    path = published / "model" / "text_encoder"
    theirs = transformers.AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    tokens, mask = torch.zeros((1, 300), dtype=torch.long), torch.zeros((1, 300), dtype=torch.long)
    tokens[0, 0], mask[0, 0] = 2, 1
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask)[0][0].numpy()
    found = encode.null_prompt(encoders_of(pipe))
    assert found["text"].shape == (300, 48)
    assert found["mask"].tolist() == [1] + [0] * 299
    assert np.abs(found["text"] - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("category, cut", [(prompts.CutWarning, 1), (UserWarning, 0)])
def test_only_warnings_of_cut_captions_are_counted(category, cut):
    """Threads that read ahead warn at any time, so that counts would differ between runs."""

    def prepare(captions):
        warnings.warn("corrupt EXIF data" if not cut else "cut off", category, stacklevel=1)
        return ["row"]

    encoder = encode_chunk.ChunkEncoder(
        **dict.fromkeys(field.name for field in dataclasses.fields(encode_chunk.ChunkEncoder))
        | {"encoders": types.SimpleNamespace(text=types.SimpleNamespace(prepare=prepare))}
    )
    made = encode_chunk.Chunk(keys={0: "a.png"}, captions={0: "a red fox"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert encoder.prepare(made, 0)
    assert made.cut == cut and made.rows == {0: "row"}


def test_stored_tokens(published, pipe, photographs, tmp_path):
    """Tokens are what `GemmaText.features` takes: without the instruction and padding."""
    encoders = encoders_of(pipe)
    source = sources.open_source(photographs)
    chosen = encode_settings(source, text="tokens", sizes=((32, 32),), heldout=0)
    with pytest.warns(UserWarning, match="3.jpg: .*cut off"):
        encode.encode(source, encoders, tmp_path / "out", chosen, batch=4)
    manifest, found = (
        encoded.read_manifest(tmp_path / "out"),
        records_by_caption(tmp_path / "out", "train"),
    )
    assert (manifest["text"], manifest["text_dim"], manifest["text_length"]) == ("tokens", 0, 299)
    for caption in ("gulls", "a red fox in the snow"):
        np.testing.assert_array_equal(
            found[caption]["tokens"], pipe.text.prompts.tokens([caption])[0]
        )
    assert found[("word " * 400).strip()]["tokens"].shape == (299,)


def test_identity_depends_on_the_content(published, pipe, tmp_path):
    """It is the same for our form of a folder, and differs by one weight or the instruction."""
    from sprint_jax.conversion import folder
    from sprint_jax.sampling import loading

    words = (published / "instruction.txt").read_text()
    folder.write_ours(
        tmp_path / "ours", folder.read_diffusers(published / "model", dtype=None, instruction=words)
    )
    ours = data_encoders.identity(
        loading.load(tmp_path / "ours", dtype="float32"), tmp_path / "ours"
    )
    name = data_encoders.identity(pipe, published / "model")
    assert ours == name and name.startswith("DCAE and Gemma2, float32, ")
    tree = pipe.params["text"]["model"]
    leaf = sorted(tree)[0]
    bent = {**tree, leaf: with_one_change(tree[leaf])}
    other = dataclasses.replace(
        pipe, params=pipe.params | {"text": pipe.params["text"] | {"model": bent}}
    )
    assert data_encoders.identity(other, published / "model") != name
    for path in (
        published / "model",
        tmp_path / "ours",
    ):  # images as in float32, text in bfloat16
        mixed = loading.load(
            path,
            dtype="bfloat16",
            pixels_dtype="float32",
            instruction=published / "instruction.txt",
        )
        assert {a.dtype.name for a in jax.tree.leaves(mixed.params["pixels"])} == {"float32"}
        assert {a.dtype.name for a in jax.tree.leaves(mixed.params["text"]["model"])} == {
            "bfloat16"
        }
        assert (mixed.model.dtype, mixed.model.residual_dtype) == ("bfloat16", "bfloat16")
        assert data_encoders.identity(mixed, path).startswith(
            "DCAE and Gemma2, float32 and bfloat16, "
        )
    bare = loading.load(tmp_path / "ours", dtype="float32", instruction="")
    assert data_encoders.identity(bare, tmp_path / "ours") != name


def with_one_change(tree):
    """Return a copy in which one number differs."""
    if isinstance(tree, dict):
        name = sorted(tree)[0]
        return {**tree, name: with_one_change(tree[name])}
    array = np.array(tree)
    array.reshape(-1)[-1] += 1
    return array


# --- the command line ---


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--source"]),
        (["--encoder=x"], ["--encoded"]),
        (["--encoder=x", "--encoded=y", "--shard_records=0"], ["--shard_records=0"]),
        (["--encoder=x", "--encoded=y", "--hosts=2", "--host=2"], ["--host=2", "0 to 1"]),
        (["--encoder=x", "--encoded=y"], ["--heldout=256", "44"]),
        (["--encoder=x", "--encoded=y", "--max_bad_share=nan"], ["--max_bad_share=nan", "0 to 1"]),
        (["--encoder=x", "--encoded=y", "--max_bad_share=-0.1"], ["--max_bad_share=-0.1"]),
        (["--encoder=/nowhere", "--encoded=y", "--heldout=1"], ["/nowhere"]),
        (["--encoder=x", "--encoded=y", "--text=words"], ["--text"]),
    ],
)
def test_the_command_refuses(command, images, tmp_path, flags, words):
    source = [f"--source={images}"] if flags else []
    result = command("sprint_jax", "encode", *source, *flags)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert all(word in line for word in words), line


def test_the_command_refuses_its_own_output(command, images):
    result = command(
        "sprint_jax",
        "encode",
        f"--source={images}",
        "--encoder=x",
        f"--encoded={images / 'out'}",
        "--heldout=1",
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert f"--encoded={images / 'out'} lies in --source={images}" in line
    assert not (images / "out").exists()


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, ((32, 32),)),
        ("64x32,32x64,64x32", ((32, 64), (64, 32))),
        ("published", 33),
        ("64", "HEIGHTxWIDTH"),
        ("64x", "HEIGHTxWIDTH"),
        ("64x30", "64x30 is not in multiples of this model's 4"),
        ("0x32", "0x32"),
    ],
)
def test_sizes_flag(text, expected):
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            encode_options.sizes(text, 4, 32)
    else:
        sizes = encode_options.sizes(text, 4, 32)
        assert sizes == expected or len(sizes) == expected

"""The command that encodes: what it writes, that it can be killed and shared, and what it skips."""

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

from helpers.encoding import CODEC, SIZES, TEXT, Stop, contents, make, records, settings, tiny
from helpers.runs import ROOT
from sprint_jax.commands import encode
from sprint_jax.data import encoded, sources
from sprint_jax.encoders import parts, prompts
from sprint_jax.errors import UserError
from sprint_jax.toy import shapes


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """44 captioned pictures, upright, square and wide; numbers 5, 17 and 31 cannot be used."""
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
def whole(pictures, tmp_path_factory):
    """The folder of an uninterrupted encoding."""
    out = tmp_path_factory.mktemp("encoded") / "whole"
    make(pictures, out)
    return out


# --- what is written ---


def test_records_are_the_encoders_own(pictures, whole):
    """Latents of each picture alone, features of each caption alone, and no padding."""
    found = records(whole, "train") | records(whole, "heldout")
    usable = [i for i in range(44) if i not in (5, 17, 31)]
    captions = {(pictures / f"{i:03d}.txt").read_text(): i for i in usable}
    assert found.keys() == captions.keys()
    for caption, i in captions.items():
        size = SIZES[0] if i % 3 else SIZES[1]
        picture = sources.fit(np.asarray(Image.open(pictures / f"{i:03d}.png")), *size)
        np.testing.assert_array_equal(
            found[caption]["latent"], CODEC.encode(picture[None])[0].astype(np.float16)
        )
        features, mask = TEXT.encode([caption])
        length = int(mask.sum())
        np.testing.assert_array_equal(
            found[caption]["text"], features[0, :length].astype(np.float16)
        )
        assert length == len(caption.split()) + 1


def test_the_manifest(pictures, whole):
    manifest = encoded.read_manifest(whole)
    counts = manifest["counts"]
    assert (
        counts["train"] + counts["heldout"] == 41
        and counts["skipped"] == 3
        and 2 <= counts["heldout"] <= 16
    )
    assert [entry["key"] for entry in manifest["skipped"]] == ["005.png", "017.png", "031.png"]
    reasons = [entry["reason"] for entry in manifest["skipped"]]
    assert reasons[:2] == ["missing caption", "undecodable image"] and "zebra" in reasons[2]
    expected = dict(
        text="features", text_dim=TEXT.dim, text_length=16, channels=48, factor=4, model="tiny"
    )
    assert {name: manifest[name] for name in expected} == expected
    assert manifest["source"] == sources.open_source(pictures).identity()
    buckets = {}
    for shard in manifest["shards"]:
        for name, count in shard["buckets"].items():
            buckets[name] = buckets.get(name, 0) + count
    assert buckets == {"4x12": 15, "8x8": 26}  # 0, 3, 6 … 42 are wide


def test_the_null_prompt_of_the_embedded_encoder(whole):
    text, mask = TEXT.encode([""])
    found = safetensors.numpy.load_file(whole / "null.safetensors")
    np.testing.assert_array_equal(found["text"], text[0])
    np.testing.assert_array_equal(found["mask"], mask[0])
    assert found["text"].dtype == found["mask"].dtype == np.float32 and mask.sum() == 1


def test_the_encoders_of_a_config():
    encoders = encode._encoders(f"{ROOT / 'configs/sprint.py'}:smoke")
    images = np.stack([shapes.example(0, 0, size=encoders.side).image])
    latents = encoders.pixels.encode(encoders.params["pixels"], images)
    assert (
        latents.shape[-1] == encoders.pixels.channels
        and encoders.side == encoders.pixels.factor * latents.shape[1]
    )
    assert encoders.identity == encode._encoders(f"{ROOT / 'configs/sprint.py'}:smoke").identity
    with pytest.raises(UserError, match="no config file --encoder=configs/absent.py:smoke"):
        encode._encoders("configs/absent.py:smoke")


def test_the_heldout_are_chosen_by_name(pictures, whole, tmp_path):
    """Whatever the chunks; and a quarter of what is asked for is a part of it."""
    make(pictures, tmp_path / "other", shard_records=7)
    chosen = records(whole, "heldout").keys()
    assert records(tmp_path / "other", "heldout").keys() == chosen
    make(pictures, tmp_path / "fewer", heldout=4)
    assert records(tmp_path / "fewer", "heldout").keys() < chosen
    drawn = encode.Settings("", "", 10000, "features", "", (), 500, 1, "none")
    assert 430 < sum(drawn.split(f"{i}.png") == "heldout" for i in range(10000)) < 570


def test_latents_do_not_depend_on_the_batch(pictures, whole, tmp_path):
    make(pictures, tmp_path / "out", batch=9)
    assert contents(tmp_path / "out") == contents(whole)


def test_one_program_for_each_size(pictures, tmp_path):
    """Pictures and captions come in whole batches, the last filled up."""
    seen, encoders = [], tiny()

    class Pixels(parts.EmbeddedPixels):
        def encode(self, params, images):
            seen.append(images.shape)
            return super().encode(params, images)

    make(pictures, tmp_path / "out", encoders=dataclasses.replace(encoders, pixels=Pixels(CODEC)))
    assert set(seen) == {(4, 32, 32, 3), (4, 16, 48, 3)}


# --- killed, resumed, shared ---


@pytest.mark.parametrize("after", [0, 1, 4])
def test_stopped_and_resumed_is_the_same(pictures, whole, tmp_path, monkeypatch, after):
    """Stopped between a shard and its part file; what was there before is not made again."""
    out, calls, write = tmp_path / "out", [], encoded.write_shard

    def stopping(path, records):
        calls.append(path.name)
        entry = write(path, records)
        if len(calls) > after:
            raise Stop
        return entry

    monkeypatch.setattr(encoded, "write_shard", stopping)
    with pytest.raises(Stop):
        make(pictures, out)
    assert not (out / "manifest.json").exists()
    kept = [path.stem.split("-")[1] for path in out.glob("part-*.json")]
    calls.clear()
    after = 100
    make(pictures, out)
    assert contents(out) == contents(whole)
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
    encoding.make(pathlib.Path({pictures!r}), {out!r})
"""


@pytest.mark.parametrize("after", [3, 25])
def test_killed_in_the_middle_of_a_shard(pictures, whole, tmp_path, after):
    """kill -9 leaves a partial shard behind; the next run makes the same folder."""
    out = tmp_path / "out"
    names = dict(root=str(ROOT), tests=str(ROOT / "tests"), pictures=str(pictures), out=str(out))
    program = KILLED.format(**names, after=after)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert result.returncode == -9, result.stderr[-2000:]
    assert list(out.glob("*.partial")) and not (out / "manifest.json").exists()
    make(pictures, out)
    assert contents(out) == contents(whole)


def test_a_shard_that_was_lost_is_made_again(pictures, whole, tmp_path):
    out = tmp_path / "out"
    make(pictures, out)
    (out / "train-00001.array_record").unlink()
    (out / "train-00003.array_record").write_bytes(b"half")
    before = (out / "train-00000.array_record").stat().st_mtime_ns
    make(pictures, out)
    assert contents(out) == contents(whole)
    assert (out / "train-00000.array_record").stat().st_mtime_ns == before


def test_two_hosts_make_what_one_makes(pictures, whole, tmp_path):
    out, said = tmp_path / "out", []
    make(pictures, out, said, hosts=2, host=1)
    assert said == ["host 1 of 2 is done; 3 of 5 chunks are still to come from others"]
    assert {p.name for p in out.glob("part-*")} == {"part-00001.json", "part-00003.json"}
    make(pictures, out, said, hosts=2, host=0)
    assert "skipped" in said[1] and contents(out) == contents(whole)
    make(pictures, out, hosts=2, host=1)  # both may see that all is done
    assert contents(out) == contents(whole)


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
def test_a_folder_keeps_to_its_settings(pictures, whole, changes, words):
    before = contents(whole)
    with pytest.raises(UserError, match=words):
        make(pictures, whole, **changes)
    assert contents(whole) == before


def test_hosts_that_began_differently(pictures, tmp_path):
    """Two may write settings.json at the same moment; their parts do not pass for each other's."""
    make(pictures, tmp_path / "out", hosts=2, host=0)
    (tmp_path / "out" / "settings.json").unlink()
    source = sources.open_source(pictures)
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings(source, heldout=3).plain()))
    with pytest.raises(UserError, match="part-00000.json was made with other settings"):
        make(pictures, tmp_path / "out", hosts=2, host=1, heldout=3)


def test_a_foreign_folder_is_left_alone(pictures, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="thesis.tex and no encoded data set"):
        make(pictures, tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


# --- examples that cannot be used ---


def test_past_the_share_it_stops(pictures, tmp_path):
    """Three are forgiven, whatever the share; a fourth is not."""
    make(pictures, tmp_path / "three", max_bad=0.0)
    folder = tmp_path / "more"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "033.png").write_bytes(b"")
    make(folder, tmp_path / "four", max_bad=0.1)
    with pytest.raises(
        UserError,
        match="4 of 40 examples cannot be used.*--max_bad_share=0.09; the last is 033.png",
    ):
        make(folder, tmp_path / "out", max_bad=0.09)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(
        UserError, match="033.png: undecodable image"
    ):  # those of finished chunks still count
        make(folder, tmp_path / "out", max_bad=0.09)
    make(folder, tmp_path / "out", max_bad=0.1)
    assert contents(tmp_path / "out") == contents(tmp_path / "four")


def test_latents_of_a_source_are_taken_as_they_are(tmp_path):
    """[C, h, w] turned round, each size its own bucket. Skipped: one too large for float16, one of other channels."""
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
    make(tmp_path / "source", tmp_path / "out", heldout=0)
    found = records(tmp_path / "out", "train")
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


def test_a_set_without_an_example_to_train_on_is_no_success(tmp_path):
    """Three bad ones are forgiven, and there are no others."""
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / f"in/{name}.png").write_bytes(b"no picture")
        (tmp_path / f"in/{name}.txt").write_text("a red circle")
    with pytest.raises(
        UserError,
        match="none of 3 examples is left to train on, 3 cannot be used .*a.png: undecodable image",
    ):
        make(tmp_path / "in", tmp_path / "out", heldout=0)
    assert not (tmp_path / "out/manifest.json").exists()


def test_features_that_are_not_finite_are_skipped(pictures, tmp_path):
    class Text(parts.EmbeddedText):
        def features(self, params, arrays):
            features, mask = super().features(params, arrays)
            return features * np.where(np.arange(4) == 1, np.inf, 1)[:, None, None], mask

    with pytest.raises(UserError, match="its text is not finite in float16"):
        make(pictures, tmp_path / "out", encoders=dataclasses.replace(tiny(), text=Text(TEXT)))


def test_tokens_need_an_encoder_that_has_some(pictures, tmp_path):
    with pytest.raises(UserError, match="--text=tokens"):
        make(pictures, tmp_path / "out", text="tokens")


# --- the published models ---


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A random diffusers folder, and an instruction."""
    pytest.importorskip("torch")
    from helpers import fabricate

    folder = tmp_path_factory.mktemp("published")
    fabricate.pipeline().save_pretrained(folder / "model")
    (folder / "instruction.txt").write_text("an oil painting of ")
    return folder


@pytest.fixture(scope="module")
def pipe(published):
    from sprint_jax.sampling import pipeline

    return pipeline.load(
        published / "model", dtype="float32", instruction=published / "instruction.txt"
    )


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
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


def test_the_command(command, published, pipe, photographs, tmp_path):
    """Against the parts of the pipeline, one picture and one caption at a time."""
    result = command(
        "sprint_jax.commands.encode",
        f"--source={photographs}",
        f"--encoder={published / 'model'}",
        f"--encoded={tmp_path / 'out'}",
        "--sizes=32x64",
        "--heldout=0",
        "--encode_batch=2",
        f"--caption_instruction={published / 'instruction.txt'}",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (
        "4 train and 0 heldout examples" in result.stdout
        and "1 captions cut to 300 tokens" in result.stdout
    )
    assert "warning: 3.jpg: prompt 0 has" in result.stderr and "encode: 100%" in result.stderr
    manifest = encoded.read_manifest(tmp_path / "out")
    name = encode.identity(pipe, published / "model")
    expected = dict(text_dim=48, text_length=300, channels=8, factor=32, model=name)
    assert {name: manifest[name] for name in expected} == expected
    found = records(tmp_path / "out", "train")
    features_of = jax.jit(pipe.text.features)
    for i in range(4):
        caption = (photographs / f"{i}.txt").read_text().strip()
        picture = sources.fit(np.asarray(Image.open(photographs / f"{i}.jpg")), 32, 64)
        alone = np.asarray(pipe.pixels.encode(pipe.params["pixels"], picture[None]))[0]
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
    """Against transformers: the empty string without instruction, padded to 300 on the right, padding included."""
    import torch
    import transformers

    path = published / "model" / "text_encoder"
    theirs = transformers.AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    tokens, mask = torch.zeros((1, 300), dtype=torch.long), torch.zeros((1, 300), dtype=torch.long)
    tokens[0, 0], mask[0, 0] = 2, 1
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask)[0][0].numpy()
    found = encode._null_prompt(encode.Encoders(pipe.pixels, pipe.text, pipe.params, "tiny", 32))
    assert found["text"].shape == (300, 48) and found["mask"].tolist() == [1] + [0] * 299
    assert np.abs(found["text"] - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("category, cut", [(prompts.CutWarning, 1), (UserWarning, 0)])
def test_only_warnings_of_cut_captions_are_counted(category, cut):
    """Threads that read pictures ahead warn as well, whenever they come to it: counts would differ from run to run."""

    def prepare(captions):
        warnings.warn("corrupt EXIF data" if not cut else "cut off", category, stacklevel=1)
        return ["row"]

    work = encode._Work.__new__(encode._Work)
    work._encoders = types.SimpleNamespace(text=types.SimpleNamespace(prepare=prepare))
    made = encode._Made(keys={0: "a.png"}, captions={0: "a red fox"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert work._prepare(made, 0)
    assert made.cut == cut and made.rows == {0: "row"}


def test_tokens(published, pipe, photographs, tmp_path):
    """What `GemmaText.features` takes: the caption's tokens without the instruction's, unpadded."""
    encoders = encode.Encoders(pipe.pixels, pipe.text, pipe.params, "tiny", 32)
    source = sources.open_source(photographs)
    chosen = settings(source, text="tokens", sizes=((32, 32),), heldout=0)
    with pytest.warns(UserWarning, match="3.jpg: .*cut off"):
        encode.encode(source, encoders, tmp_path / "out", chosen, batch=4)
    manifest, found = encoded.read_manifest(tmp_path / "out"), records(tmp_path / "out", "train")
    assert (manifest["text"], manifest["text_dim"], manifest["text_length"]) == ("tokens", 0, 299)
    for caption in ("gulls", "a red fox in the snow"):
        np.testing.assert_array_equal(
            found[caption]["tokens"], pipe.text.prompts.tokens([caption])[0]
        )
    assert found[("word " * 400).strip()]["tokens"].shape == (299,)


def test_identity_is_of_what_is_in_it(published, pipe, tmp_path):
    """The same for our form of a folder; another for one other weight or another instruction."""
    from sprint_jax.conversion import folder
    from sprint_jax.sampling import pipeline

    words = (published / "instruction.txt").read_text()
    folder.write_ours(
        tmp_path / "ours", folder.read_diffusers(published / "model", dtype=None, instruction=words)
    )
    ours = encode.identity(pipeline.load(tmp_path / "ours", dtype="float32"), tmp_path / "ours")
    name = encode.identity(pipe, published / "model")
    assert ours == name and name.startswith("DCAE and Gemma2, float32, ")
    tree = pipe.params["text"]["model"]
    leaf = sorted(tree)[0]
    bent = {**tree, leaf: _bend(tree[leaf])}
    other = dataclasses.replace(
        pipe, params=pipe.params | {"text": pipe.params["text"] | {"model": bent}}
    )
    assert encode.identity(other, published / "model") != name
    for path in (
        published / "model",
        tmp_path / "ours",
    ):  # pictures as in float32 beside text in bfloat16
        mixed = pipeline.load(
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
        assert encode.identity(mixed, path).startswith("DCAE and Gemma2, float32 and bfloat16, ")
    bare = pipeline.load(tmp_path / "ours", dtype="float32", instruction="")
    assert encode.identity(bare, tmp_path / "ours") != name


def _bend(tree):
    """A copy in which one number is another."""
    if isinstance(tree, dict):
        name = sorted(tree)[0]
        return {**tree, name: _bend(tree[name])}
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
def test_the_command_refuses(command, pictures, tmp_path, flags, words):
    source = [f"--source={pictures}"] if flags else []
    result = command("sprint_jax.commands.encode", *source, *flags)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert all(word in line for word in words), line


def test_the_command_refuses_its_own_output(command, pictures):
    result = command(
        "sprint_jax.commands.encode",
        f"--source={pictures}",
        "--encoder=x",
        f"--encoded={pictures / 'out'}",
        "--heldout=1",
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert (
        f"--encoded={pictures / 'out'} lies in --source={pictures}" in line
        and not (pictures / "out").exists()
    )


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
def test_sizes(monkeypatch, text, expected):
    monkeypatch.setattr(encode, "_SIZES", type("Flag", (), {"value": text}))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            encode._sizes(tiny())
    else:
        sizes = encode._sizes(tiny())
        assert sizes == expected or len(sizes) == expected

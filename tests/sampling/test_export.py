"""Models as one file: the same images without the code of the networks, and refusals by name."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest

from helpers.runs import ROOT
from sprint_jax.errors import UserError
from sprint_jax.sampling import export, exported, generation, loading
from sprint_jax.storage import weights

pytestmark = pytest.mark.second_pass

PROMPTS = ["a red circle", "two blue squares", "a circle"]


@pytest.fixture(scope="module")
def pipe(finished):
    return loading.load(finished, dtype="float32")


@pytest.fixture(scope="module")
def exported_file(pipe, tmp_path_factory):
    """Return an exported file of the model."""
    path = tmp_path_factory.mktemp("exported") / "model.sprint"
    export.export(pipe, path, steps=[1, 2], batch_sizes=[2])
    return path


def altered_copy(exported_file, path, change):
    """Return a copy of an exported file whose header goes through `change`."""
    with zipfile.ZipFile(exported_file) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == exported.HEADER:
                header = json.loads(data)
                change(header)
                data = json.dumps(header)
            new.writestr(name, data)
    return path


@pytest.mark.parametrize(
    "options",
    [
        dict(steps=1),
        dict(steps=2),
        dict(steps=2, schedule="paper", guidance_scale=2.25, seed=9),
        dict(steps=2, timesteps=[1.5, 0.7, 0.0], images_per_prompt=2),
    ],
)
def test_same_images_as_the_model(pipe, exported_file, options):
    """Fails when times, guidance, seed, indices or a weight reach the programs of the file
    differently.
    """
    read = exported.load(exported_file)
    expected = generation.generate(pipe, PROMPTS, batch_size=2, **options)
    np.testing.assert_array_equal(generation.generate(read, PROMPTS, **options), expected)


def test_sample_needs_no_network_code(finished, exported_file, command, tmp_path):
    """The whole command, in a process that then lists what it imported."""
    program = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules))))\n"
        "from sprint_jax import __main__\n"
        "__main__.dispatch(['sample', *sys.argv[1:]])\n"
    )
    flags = [
        "--prompt=a red circle",
        "--prompt=a circle",
        "--steps=2",
        "--seed=3",
        "--batch_size=2",
    ]
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            f"--model={exported_file}",
            *flags,
            f"--out={tmp_path / 'file'}",
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    modules = json.loads(result.stdout.splitlines()[-1])
    assert "sprint_jax.sampling.exported" in modules
    for name in (
        "sprint_jax.models",
        "sprint_jax.sampling.pipeline",
        "sprint_jax.encoders.load",
        "flax",
        "transformers",
    ):
        assert name not in modules
    direct = command(
        "sprint_jax", "sample", f"--model={finished}", *flags, f"--out={tmp_path / 'direct'}"
    )
    assert direct.returncode == 0, direct.stderr[-2000:]
    for name in ("00000.png", "00001.png", "manifest.jsonl"):
        assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()


def test_weights_are_stored_once_and_unchanged(pipe, exported_file):
    """By name and bit.

    No program contains any, and weights that only training reads are left out.
    """
    read = exported.load(exported_file)
    flat = weights.flatten(pipe.params["transformer"])
    flat.pop("inputs.logvar.kernel", None), flat.pop("inputs.logvar.bias", None)
    assert read.params.keys() == {f"transformer.{name}" for name in flat if "logvar" not in name}
    for name, array in read.params.items():
        np.testing.assert_array_equal(array, flat[name.removeprefix("transformer.")])
    with zipfile.ZipFile(exported_file) as archive:
        programs = [archive.read(p.member) for p in read.header.programs]
        kernel = np.asarray(max(flat.values(), key=lambda a: a.size)).reshape(-1)[:16].tobytes()
        assert kernel in archive.read(exported.WEIGHTS)
        assert not any(kernel in program for program in programs)


def test_equal_exports_are_equal_files(pipe, exported_file, tmp_path):
    """Fails when a file contains a date, or the lines and folders of the calling code."""
    export.export(pipe, tmp_path / "again.sprint", steps=[1, 2], batch_sizes=[2])
    assert (tmp_path / "again.sprint").read_bytes() == exported_file.read_bytes()
    assert str(ROOT).encode() not in exported_file.read_bytes()


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(steps=3), "no program for --steps=3: it has 1, 2"),
        (dict(height=64, width=32), "no program for 64 x 32 pixels: it has 32 x 32"),
        (dict(height=40), "no program for 40 x 32 pixels"),
        (dict(height=36), "height 36 is not a multiple of 8"),
        (dict(batch_size=4), "no program for --batch_size=4: it has 2"),
        (dict(image=np.zeros((32, 32, 3), np.uint8)), "no program that starts from an image"),
        (dict(output="latent"), "draws pixels from a seed"),
        (
            dict(latents=np.zeros((1, 4, 4, 32), np.float32), step_noise=[np.zeros((1, 4, 4, 32))]),
            "draws pixels from a seed",
        ),
        (dict(schedule="paper", steps=3), "'paper' has no list for 3 steps"),
    ],
)
def test_requests_without_a_program_are_refused(exported_file, options, words):
    with pytest.raises(UserError, match=words):
        generation.generate(exported.load(exported_file), ["a red circle"], **options)


def test_prompts_are_checked_as_by_the_model(exported_file):
    read = exported.load(exported_file)
    for prompt, words in (("a zebra", "zebra"), ("a " * 40, "too long"), (" ", "empty")):
        with pytest.raises(UserError, match=words):
            generation.generate(read, [prompt])


def test_damaged_files_are_refused(exported_file, tmp_path):
    """They are truncated, changed in the weights or a program, or of another kind."""
    data, broken = exported_file.read_bytes(), tmp_path / "broken.sprint"
    for size in (0, 1000, len(data) // 2, len(data) - 1):
        broken.write_bytes(data[:size])
        with pytest.raises(
            UserError, match="broken.sprint is not a whole file of sprint-jax export"
        ):
            exported.load(broken)
    with zipfile.ZipFile(exported_file) as archive:
        places = {
            info.filename: info.header_offset + info.file_size // 2 for info in archive.infolist()
        }
    flipped = lambda at: data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]
    for name in (exported.HEADER, exported.WEIGHTS):
        broken.write_bytes(flipped(places[name] + 100))
        with pytest.raises(UserError, match="not a whole file"):
            exported.load(broken)
    entry = data.index(
        b"PK\x01\x02"
    )  # the first entry of the directory; its tenth byte is the method of compression
    for method in (8, 12, 14):
        broken.write_bytes(data[: entry + 10] + bytes([method]) + data[entry + 11 :])
        with pytest.raises(UserError, match="not a whole file"):
            exported.load(broken)
    broken.write_bytes(flipped(places["programs/2_16_2_32_32.bin"] + 100))
    with pytest.raises(UserError, match="not a whole file"):
        generation.generate(exported.load(broken), ["a circle"], steps=2)
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("word/document.xml", "thesis")
    with pytest.raises(UserError, match="not a whole file"):
        exported.load(broken)


def test_out_of_memory_is_not_called_damage(exported_file, monkeypatch):
    def full(array):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(jax, "device_put", full)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        exported.load(exported_file)


def test_other_formats_and_platforms(exported_file, command, tmp_path):
    newer = altered_copy(
        exported_file,
        tmp_path / "newer.sprint",
        lambda header: header.update(format="sprint_jax exported 3"),
    )
    with pytest.raises(
        UserError,
        match="has format 'sprint_jax exported 3', this version reads 'sprint_jax exported 2'",
    ):
        exported.load(newer)
    tpu = altered_copy(
        exported_file,
        tmp_path / "tpu.sprint",
        lambda header: header.update(platforms=["tpu", "cuda"]),
    )
    result = command(
        "sprint_jax",
        "sample",
        f"--model={tpu}",
        "--prompt=a circle",
        f"--out={tmp_path / 'out'}",
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].endswith(
        "was exported for tpu, cuda and this is cpu: export it again with --platforms=cpu"
    )
    assert not (tmp_path / "out").exists()


def test_programs_of_a_jax_that_is_too_new(exported_file, tmp_path):
    """The error is that of JAX's own version check, in one line."""
    path = tmp_path / "later.sprint"
    with zipfile.ZipFile(exported_file) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.startswith("programs/"):
                known = jax.export.deserialize(bytearray(data))
                later = dict(vars(known)) | {"calling_convention_version": 10**4}
                data = bytes(jax.export.Exported(**later).serialize())
            new.writestr(name, data)
    with pytest.raises(UserError, match="later.sprint cannot be run by jax .* export it again"):
        generation.generate(exported.load(path), ["a circle"], steps=1)


def test_export_for_absent_platforms(finished, command, tmp_path):
    """CUDA, TPU and CPU in one program, with the branches of the depthwise convolution.

    CUDA alone is refused here.
    """
    pipe = loading.load(finished, dtype="bfloat16", platform="")
    both = tmp_path / "both.sprint"
    export.export(pipe, both, steps=[2], batch_sizes=[1], platforms=("cuda", "tpu", "cpu"))
    made = generation.generate(exported.load(both), ["a red circle"], steps=2)
    np.testing.assert_array_equal(
        made, generation.generate(pipe, ["a red circle"], steps=2, batch_size=1)
    )
    result = command(
        "sprint_jax",
        "export",
        f"--model={finished}",
        f"--out={tmp_path / 'cuda'}",
        "--steps=1",
        "--platforms=cuda",
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "wrote" in result.stdout and "1 programs for cuda" in result.stdout
    with zipfile.ZipFile(tmp_path / "cuda") as archive:
        header = json.loads(archive.read(exported.HEADER))
        (program,) = [name for name in archive.namelist() if name.startswith("programs/")]
        lowered = jax.export.deserialize(bytearray(archive.read(program)))
    assert header["dtype"] == "bfloat16" and lowered.platforms == ("cuda",)
    assert "stablehlo.convolution" in lowered.mlir_module()  # the branch for accelerators
    with pytest.raises(UserError, match="was exported for cuda and this is cpu"):
        exported.load(tmp_path / "cuda")


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--model"]),
        (["--model={finished}"], ["--out"]),
        (["--model={finished}", "--out={tmp}"], ["--out", "file"]),
        (["--model={finished}", "--out={tmp}/x", "--steps=two"], ["--steps=two"]),
        (["--model={finished}", "--out={tmp}/x", "--platforms=cpu,gpu"], ["cpu,gpu", "cuda"]),
        (["--model={finished}", "--out={tmp}/x", "--height=33"], ["height 33"]),
        (["--model={finished}", "--out={tmp}/x", "--width=0"], ["width 0"]),
        (
            ["--model={finished}/config.json", "--out={tmp}/x"],
            ["--model=", "config.json is no folder", "exported file cannot be exported again"],
        ),
    ],
)
def test_export_refuses(finished, command, tmp_path, flags, words):
    result = command(
        "sprint_jax",
        "export",
        *(flag.format(finished=finished, tmp=tmp_path) for flag in flags),
    )
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert lines[-1].startswith("error: ")
    for word in words:
        assert word in lines[-1]
    assert not list(tmp_path.iterdir())


def test_flags_that_a_file_has_fixed(exported_file, command, tmp_path):
    result = command(
        "sprint_jax",
        "sample",
        f"--model={exported_file}",
        "--prompt=a circle",
        "--dtype=bfloat16",
        f"--out={tmp_path / 'o'}",
    )
    assert result.returncode == 2
    assert "--dtype is settled in an exported file" in result.stderr


class TestPublishedFolder:
    """Export of a random diffusers folder.

    It has the tokens of Gemma, a cached instruction, padded lengths and DC-AE.
    """

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        """Return (folder of the model, exported file)."""
        pytest.importorskip("torch")
        fabricate = pytest.importorskip("helpers.fabricate")
        path = tmp_path_factory.mktemp("published")
        fabricate.pipeline().save_pretrained(path / "model")
        (path / "instruction.txt").write_text("Draw what is asked for, in detail:\nPrompt: ")
        return path

    def test_same_images(self, folder):
        """Prompts of two lengths in one call.

        Fails when the prefix, the state of the tokenizer or a bucket differ.
        """
        pipe = loading.load(
            folder / "model", dtype="float32", instruction=folder / "instruction.txt"
        )
        assert len(pipe.text.prompts.prefix) > 5
        path = folder / "model.sprint"
        header = export.export(pipe, path, steps=[1], height=32, width=64, longest=20)
        assert [p.length for p in header.programs] == [15, 31]
        read = exported.load(path)
        np.testing.assert_array_equal(read.text.prefix, pipe.text.prompts.prefix)
        prompts = [
            "gulls",
            "A red fox in the snow, watercolour, soft light, and a lake in autumn with mist ",
        ]
        for ours, theirs in zip(
            read.text.prepare(prompts), pipe.text.prepare(prompts), strict=True
        ):
            assert ours[0] == theirs[0]
            np.testing.assert_array_equal(ours[1]["tokens"], theirs[1]["tokens"])
        assert {length for length, _ in read.text.prepare(prompts)} == {15, 31}
        options = dict(steps=1, height=32, width=64, seed=2)
        made = generation.generate(read, prompts, **options)
        np.testing.assert_array_equal(made, generation.generate(pipe, prompts, **options))
        assert (made[0] != made[1]).any()
        assert not any(name.startswith("pixels.encoder") for name in read.params)
        with pytest.raises(UserError, match="padded to 127 tokens: it takes prompts of at most 31"):
            generation.generate(read, ["a lake in the mist, " * 8], **options)
        shutil.rmtree(folder / "model")
        np.testing.assert_array_equal(
            generation.generate(exported.load(path), prompts, **options), made
        )

"""Folders in and out: bit-equal round trips, our exports in diffusers, and refusals."""

import dataclasses
import json
import pathlib
import shutil
import struct

import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch")
fabricate = pytest.importorskip("helpers.fabricate")

from sprint_jax.conversion import configs, folder, rules  # noqa: E402
from sprint_jax.encoders import instruction  # noqa: E402
from sprint_jax.errors import UserError  # noqa: E402
from sprint_jax.models.dc_ae import DCAE_F32C32  # noqa: E402
from sprint_jax.models.gemma2 import GEMMA2_2B  # noqa: E402
from sprint_jax.models.linear_dit import SANA_600M  # noqa: E402
from sprint_jax.sampling import generation, loading  # noqa: E402
from sprint_jax.storage import json_files, safetensors_files, weights  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:prompt")
PARTS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a diffusers folder whose parts have different dtypes, the transformer in shards."""
    path = tmp_path_factory.mktemp("source") / "model"
    theirs = fabricate.pipeline()
    theirs.text_encoder.to(torch.bfloat16)
    theirs.save_pretrained(path, max_shard_size="100KB")
    assert len(list((path / "transformer").glob("*-of-*.safetensors"))) > 1
    return path


def read_raw(path, stem):
    """Return {name: (dtype, bytes)} of a part, read by the safetensors library."""
    out = {}
    for file in sorted(path.glob(f"{stem}*.safetensors")):
        for name, array in safetensors.numpy.load_file(file).items():
            out[name] = (array.dtype, array.shape, array.tobytes())
    return out


def test_round_trip_is_bit_equal_and_diffusers_loads_it(source, command, tmp_path):
    """Through the command, both ways.

    Fails when q, k and v are swapped and when a layout is not undone.
    """
    for origin, target in ((source, tmp_path / "ours"), (tmp_path / "ours", tmp_path / "back")):
        result = command("sprint_jax", "convert", f"--from={origin}", f"--to={target}")
        assert result.returncode == 0, result.stderr
    for part, stem in PARTS.items():
        first, again = read_raw(source / part, stem), read_raw(tmp_path / "back" / part, stem)
        assert first.keys() == again.keys()
        assert all(first[name] == again[name] for name in first)
    assert json.loads((tmp_path / "ours" / "model.json").read_text())["instruction"] == "\n".join(
        fabricate.INSTRUCTION
    )
    loaded = fabricate.diffusers.SanaSprintPipeline.from_pretrained(
        tmp_path / "back", local_files_only=True
    )
    loaded.set_progress_bar_config(disable=True)
    image = loaded(
        "gulls", height=64, width=64, use_resolution_binning=False, output_type="np"
    ).images
    assert np.isfinite(image).all() and image.std() > 0.01
    ours, direct = (loading.load(path, dtype="float32") for path in (tmp_path / "ours", source))
    options = dict(steps=1, height=64, width=64)
    np.testing.assert_array_equal(
        generation.generate(ours, ["gulls"], **options),
        generation.generate(direct, ["gulls"], **options),
    )


def test_run_becomes_a_transformer_that_diffusers_runs(finished, command, tmp_path):
    """The student of a run has the same velocity in diffusers."""
    result = command("sprint_jax", "convert", f"--from={finished}", f"--to={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    theirs = fabricate.diffusers.SanaTransformer2DModel.from_pretrained(
        tmp_path / "out" / "transformer"
    ).eval()
    model, params, _ = loading.read_student(finished)
    rng = np.random.default_rng(0)
    x, text = (
        rng.standard_normal(s).astype(np.float32)
        for s in ((2, 4, 4, model.in_channels), (2, 16, model.text_dim))
    )
    t, w, mask = np.float32([0.9, 0.3]), np.float32([2.0, 2.0]), np.ones((2, 16), np.float32)
    ours = np.asarray(model.apply(params, x, t, text, mask, w).velocity)
    with torch.no_grad():
        expected = (
            theirs(
                torch.tensor(x).permute(0, 3, 1, 2),
                torch.tensor(text),
                torch.tensor(t),
                guidance=torch.tensor(w) * 0.1,
                encoder_attention_mask=torch.tensor(mask),
            )
            .sample.permute(0, 2, 3, 1)
            .numpy()
        )
    assert np.linalg.norm(ours - expected) < 1e-5 * np.linalg.norm(expected)


def test_native_names(tmp_path):
    """Read the names of the official repository for the same weights.

    There q|k|v and k|v are one tensor each, and extras are dropped.
    """
    theirs = fabricate.transformer(
        num_attention_heads=36,
        attention_head_dim=32,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
        num_layers=1,
    )
    state = {name: t.numpy() for name, t in theirs.state_dict().items()}
    native = {name: state[other] for name, other in NATIVE.items()}
    block = "transformer_blocks.0"
    native["blocks.0.attn.qkv.weight"] = np.concatenate(
        [state[f"{block}.attn1.to_{p}.weight"] for p in "qkv"]
    )
    for leaf in ("weight", "bias"):
        native[f"blocks.0.cross_attn.kv_linear.{leaf}"] = np.concatenate(
            [state[f"{block}.attn2.to_{p}.{leaf}"] for p in "kv"]
        )
    native["logvar_linear.weight"], native["logvar_linear.bias"] = (
        np.zeros((1, 1152), "f"),
        np.zeros(1, "f"),
    )
    native["y_embedder.y_embedding"] = np.zeros((300, 48), "f")
    safetensors.numpy.save_file(native, tmp_path / "native.safetensors")
    theirs.save_pretrained(tmp_path / "theirs")
    read = folder.read_native(tmp_path / "native.safetensors")
    folder.write_diffusers(tmp_path / "out", read)
    assert read_raw(tmp_path / "out" / "transformer", PARTS["transformer"]) == read_raw(
        tmp_path / "theirs", PARTS["transformer"]
    )
    assert json_files.read(tmp_path / "out/transformer/config.json")["guidance_embeds"] is True


def _native_names():
    pairs = {
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
        "t_block.1": "time_embed.linear",
        "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
        "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "final_layer.linear": "proj_out",
        "blocks.0.attn.proj": "transformer_blocks.0.attn1.to_out.0",
        "blocks.0.cross_attn.q_linear": "transformer_blocks.0.attn2.to_q",
        "blocks.0.cross_attn.proj": "transformer_blocks.0.attn2.to_out.0",
        "blocks.0.mlp.inverted_conv.conv": "transformer_blocks.0.ff.conv_inverted",
        "blocks.0.mlp.depth_conv.conv": "transformer_blocks.0.ff.conv_depth",
    }
    names = {f"{a}.{leaf}": f"{b}.{leaf}" for a, b in pairs.items() for leaf in ("weight", "bias")}
    names |= {
        "attention_y_norm.weight": "caption_norm.weight",
        "final_layer.scale_shift_table": "scale_shift_table",
        "blocks.0.scale_shift_table": "transformer_blocks.0.scale_shift_table",
        "blocks.0.mlp.point_conv.conv.weight": "transformer_blocks.0.ff.conv_point.weight",
    }
    for ours, theirs in (("attn", "attn1"), ("cross_attn", "attn2")):
        for side in "qk":
            names[f"blocks.0.{ours}.{side}_norm.weight"] = (
                f"transformer_blocks.0.{theirs}.norm_{side}.weight"
            )
    return names


NATIVE = _native_names()


def test_published_configs():
    """Configs as published give the published sizes and survive the way back."""
    sprint = configs.transformer_json(dataclasses.replace(SANA_600M, logvar_head=False))
    sprint |= {"_diffusers_version": "0.33.0.dev0"}
    for absent in ("guidance_embeds_scale", "timestep_scale"):
        sprint.pop(absent)
    described = configs.transformer(sprint, "bfloat16")
    assert described == dataclasses.replace(
        SANA_600M, logvar_head=False, remat="none", residual_dtype="bfloat16"
    )
    assert configs.autoencoder(configs.autoencoder_json(DCAE_F32C32)) == DCAE_F32C32
    assert configs.text_encoder(configs.text_encoder_json(GEMMA2_2B)) == GEMMA2_2B
    newer = configs.text_encoder_json(GEMMA2_2B)
    newer.pop("rope_theta"), newer.pop("hidden_act")
    newer["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
    newer["layer_types"] = ["sliding_attention", "full_attention"] * 13
    assert configs.text_encoder(newer) == GEMMA2_2B


def test_published_counts():
    """Compare the numbers of tensors and parameters with those of the published files."""
    import jax

    from sprint_jax.conversion import tables

    expected = (
        (tables.transformer, dataclasses.replace(SANA_600M, logvar_head=False), 664, 593_501_216),
        (
            tables.transformer,
            dataclasses.replace(SANA_600M, logvar_head=False, guidance_embed=False),
            660,
            591_876_896,
        ),
        (tables.autoencoder, DCAE_F32C32, 375, 312_250_275),
        (tables.text_encoder, GEMMA2_2B, 288, 2_614_341_888),
    )
    for table, model, names, parameters in expected:
        rows = table(model)
        assert len(rows) == names and sum(row.size for row in rows) == parameters
        abstract = jax.eval_shape(model.init, jax.random.key(0))
        rules.check_cover(rows, {n: a.shape for n, a in weights.flatten(abstract).items()})


def test_instruction_is_read_without_importing_diffusers(command):
    assert instruction.published() == "\n".join(fabricate.INSTRUCTION)
    import subprocess
    import sys

    call = "from sprint_jax.encoders import instruction; instruction.published()"
    program = f"import sys; {call}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


def copy_folder(source, tmp_path):
    """Return a copy of the folder."""
    target = tmp_path / "copy"
    shutil.copytree(source, target)
    return target


def edit_json(path, **changes):
    """Change keys of a JSON file."""
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))


def first_shard(path):
    """Return the first shard of the transformer."""
    return sorted((path / "transformer").glob("*.safetensors"))[0]


def rewrite_tensors(file, change):
    """Apply `change` to the tensors of a file."""
    loaded = safetensors.numpy.load_file(file)
    change(loaded)
    safetensors.numpy.save_file(loaded, file, metadata={"format": "pt"})


def _swap_name(tensors_, old, new):
    tensors_[new] = tensors_.pop(old)


def _overflow(tensors_):
    name = next(iter(tensors_))
    tensors_[name] = np.full(tensors_[name].shape, np.inf, np.float16)


def _extra_header(file):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    file.write_bytes(data[:8] + b"x" * length + data[8 + length :])


BROKEN = {
    "no vae": (lambda p: shutil.rmtree(p / "vae"), "has no vae/"),
    "no tokenizer": (lambda p: shutil.rmtree(p / "tokenizer"), "has no tokenizer/"),
    "no weights": (
        lambda p: [f.unlink() for f in (p / "vae").glob("*.safetensors*")],
        "has no diffusion_pytorch_model",
    ),
    "truncated": (
        lambda p: first_shard(p).write_bytes(first_shard(p).read_bytes()[:-10]),
        "not a whole safetensors file",
    ),
    "empty": (lambda p: first_shard(p).write_bytes(b""), "not a whole safetensors file"),
    "header": (lambda p: _extra_header(first_shard(p)), "invalid JSON"),
    "lost shard": (lambda p: first_shard(p).unlink(), "give an existing file"),
    "other pipeline": (
        lambda p: edit_json(p / "model_index.json", _class_name="SanaPipeline"),
        "not a SANA-Sprint pipeline",
    ),
    "other class": (
        lambda p: edit_json(p / "transformer/config.json", _class_name="PixArtTransformer2DModel"),
        "only SanaTransformer2DModel",
    ),
    "other scheduler": (
        lambda p: edit_json(
            p / "scheduler/scheduler_config.json", _class_name="DPMSolverMultistepScheduler"
        ),
        "multi-step SANA",
    ),
    "position": (
        lambda p: edit_json(p / "transformer/config.json", interpolation_scale=1.0),
        "interpolation_scale=1.0",
    ),
    "unknown field": (lambda p: edit_json(p / "vae/config.json", colour="red"), "colour='red'"),
    "other width": (
        lambda p: edit_json(p / "transformer/config.json", caption_channels=64),
        "text features 64 wide",
    ),
    "other depth": (
        lambda p: edit_json(p / "transformer/config.json", num_layers=2),
        "unexpected: transformer_blocks.2",
    ),
    "missing": (
        lambda p: edit_json(p / "transformer/config.json", num_layers=4),
        "missing: transformer_blocks.3",
    ),
    "misshapen": (lambda p: edit_json(p / "transformer/config.json", mlp_ratio=2.0), "misshapen"),
    "overflow": (lambda p: rewrite_tensors(first_shard(p), _overflow), "infinite or not numbers"),
    "no JSON": (lambda p: (p / "vae/config.json").write_text("{"), "is not JSON"),
    "activation": (
        lambda p: edit_json(
            p / "text_encoder/config.json", hidden_activation="silu", hidden_act=None
        ),
        "hidden_activation='silu'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused(source, name, tmp_path):
    """One sentence names the fault, and no partial output remains."""
    change, words = BROKEN[name]
    broken = copy_folder(source, tmp_path)
    change(broken)
    with pytest.raises(UserError, match=".") as caught:
        checkpoint = folder.read_diffusers(broken, dtype=None, instruction="")
        folder.write_ours(tmp_path / "out", checkpoint)
    assert words in str(caught.value), str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_doubled_names_and_pickles_are_refused(source, tmp_path):
    broken = copy_folder(source, tmp_path)
    file = next((broken / "text_encoder").glob("*.safetensors"))
    rewrite_tensors(
        file,
        lambda t: t.update(
            {"model.norm.weight": next(a for n, a in t.items() if "norm.weight" in n).copy()}
        ),
    )
    index = broken / "text_encoder" / "model.safetensors.index.json"
    if index.exists():
        edit_json(
            index,
            weight_map=json.loads(index.read_text())["weight_map"]
            | {"model.norm.weight": file.name},
        )
    with pytest.raises(UserError, match="given twice: norm.weight and model.norm.weight"):
        folder.read_diffusers(broken, dtype=None, instruction="")
    for old in (broken / "vae").glob("*.safetensors*"):
        old.unlink()
    (broken / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match="pickled"):
        safetensors_files.find(broken / "vae", "diffusion_pytorch_model")


def test_an_export_is_complete_or_absent(source, tmp_path, monkeypatch):
    checkpoint = folder.read_diffusers(source, dtype=None, instruction="")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_files, "write", full)
    for write in (folder.write_ours, folder.write_diffusers):
        with pytest.raises(UserError, match="No space left"):
            write(tmp_path / "out", checkpoint)
        assert not list(tmp_path.iterdir())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        folder.write_ours(tmp_path / "taken", checkpoint)
    assert (tmp_path / "taken" / "file").read_text() == "precious"


def test_empty_folders_that_are_links_mounts_or_current(tmp_path, monkeypatch):
    """A conversion of hours must not be lost because of its folder's name."""
    target, link, mount, here = (tmp_path / name for name in ("target", "link", "mount", "here"))
    for empty in (target, mount, here):
        empty.mkdir()
    link.symlink_to(target)
    monkeypatch.chdir(here)
    monkeypatch.setattr(pathlib.Path, "is_mount", lambda self: self == mount)
    places = {place: place.stat().st_ino for place in (mount, here)}
    for path, place in ((link, target), (mount, mount), (".", here)):
        with folder.new_folder(path) as partial:
            (partial / "part").mkdir()
            (partial / "part" / "file").write_text("whole")
        assert (place / "part" / "file").read_text() == "whole"
    assert link.is_symlink() and not list(tmp_path.glob("*.partial"))
    assert all(place.stat().st_ino == known for place, known in places.items())
    assert list(pathlib.Path().iterdir())


def test_the_widest_of_two_half_precisions():
    """NumPy has no common dtype of bfloat16 and float16, and float32 holds both."""
    import ml_dtypes

    half, brain, double = (np.dtype(d) for d in (np.float16, ml_dtypes.bfloat16, np.float64))
    assert rules.widest({half, brain}) == np.float32
    assert rules.widest({half, brain, double}) == double
    assert rules.widest({brain}) == brain
    assert rules.widest({half, np.dtype(np.float32)}) == np.float32


def test_weights_of_integers_are_refused(source, tmp_path):
    broken = copy_folder(source, tmp_path)
    for file in (broken / "transformer").glob("*.safetensors"):
        rewrite_tensors(
            file,
            lambda t: t.update(
                {n: np.ones_like(a, np.int8) for n, a in t.items() if n == "proj_out.weight"}
            ),
        )
    with pytest.raises(
        UserError, match="proj_out.weight as I8: weights must be F64, F32, F16 or BF16"
    ):
        folder.read_diffusers(broken, dtype=None, instruction="")


def test_impossible_requests_are_refused(source):
    """Each gets one sentence before any sampling.

    These are sizes, times, latents and strengths that do not fit.
    """
    pipe = loading.load(source, dtype="float32")
    small = dict(height=64, width=64)
    image = np.zeros((64, 64, 3), np.uint8)
    for options, words in (
        (dict(height=100, width=64), "height 100 is not a multiple of 32: use 96"),
        (dict(height=0, width=64), "height 0 is not a multiple of 32: use 32"),
        (dict(steps=2, timesteps=[1.57, 0.0], **small), "2 timesteps for 2 steps"),
        (dict(steps=1, timesteps=[1.0, 0.5], **small), "must fall"),
        (dict(steps=0, **small), "steps 0"),
        (dict(steps=1, latents=np.zeros((1, 2, 3, 8)), **small), "latents has shape"),
        (dict(steps=2, latents=np.zeros((1, 2, 2, 8)), **small), "0 step noises for 2 steps"),
        (dict(image=image, strength=0.0, **small), "strength 0.0"),
        (dict(image=image[:32], **small), "resize first"),
        (dict(output="video", **small), "'pixels' or 'latent'"),
    ):
        with pytest.raises(UserError) as caught:
            generation.generate(pipe, ["gulls"], **options)
        assert words in str(caught.value), str(caught.value)
    with pytest.raises(UserError, match="list of texts"):
        generation.generate(pipe, "gulls")
    with pytest.warns(UserWarning, match="prompt 1 is empty: it draws the unconditional image"):
        assert len(generation.generate(pipe, ["gulls", " \t"], **small)) == 2


def test_long_prompts_are_cut_with_a_warning(source):
    pipe = loading.load(source, dtype="float32")
    with pytest.warns(UserWarning, match="cut off '.*the tail of it'"):
        pipe.text.prepare(["lighthouse " * 150 + "the tail of it"])


def test_the_command_warns_in_one_line(source, command, tmp_path):
    result = command(
        "sprint_jax",
        "sample",
        f"--model={source}",
        f"--prompt={'lighthouse ' * 160}",
        "--steps=1",
        "--height=32",
        "--width=32",
        f"--out={tmp_path}",
    )
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert result.returncode == 0, result.stderr
    assert len(lines) == 1, result.stderr
    assert "cut off" in lines[0], result.stderr


def test_images_do_not_depend_on_the_rest_of_the_batch(source):
    """Alone, in a batch, and beside a prompt of another length: equal to the last bit."""
    pipe = loading.load(source, dtype="float32")
    options = dict(steps=2, height=64, width=96, seed=5, batch_size=2)
    prompts = [
        "gulls",
        "a red fox in the snow, watercolour, soft light, and a lake in autumn with mist",
        "a lake",
    ]
    together = generation.generate(pipe, prompts, **options)
    assert together.shape == (3, 64, 96, 3)
    np.testing.assert_array_equal(generation.generate(pipe, prompts[:1], **options)[0], together[0])
    np.testing.assert_array_equal(generation.generate(pipe, prompts[:2], **options), together[:2])
    assert (together[0] != together[2]).any()
    twice = generation.generate(pipe, prompts[:1], images_per_prompt=2, **options)
    np.testing.assert_array_equal(twice[0], together[0])
    assert (twice[0] != twice[1]).any()


def test_sample_command_on_a_folder(source, command, tmp_path):
    start = tmp_path / "start.png"
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)).save(
        start
    )
    result = command(
        "sprint_jax",
        "sample",
        f"--model={source}",
        "--prompt=gulls",
        "--prompt=a lake",
        "--steps=2",
        "--height=64",
        "--width=96",
        f"--image={start}",
        "--strength=0.5",
        f"--out={tmp_path / 'out'}",
    )
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "out" / "00001.png").size == (96, 64)
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    ]
    assert rows[1] == {"file": "00001.png", "prompt": "a lake", "seed": 0, "index": 1, "steps": 2}
    result = command(
        "sprint_jax",
        "sample",
        f"--model={source}",
        "--prompt=x",
        "--height=65",
        f"--out={tmp_path / 'no'}",
    )
    assert result.returncode == 2
    assert "use 64" in result.stderr
    assert not list(pathlib.Path(tmp_path / "no").glob("*"))

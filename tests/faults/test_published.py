"""Published folders and weights that are wrong: refused in one line, or read as diffusers reads."""

import ast
import builtins
import io
import json
import shutil
import struct
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch")
fabricate = pytest.importorskip("helpers.fabricate")

from helpers.runs import ROOT  # noqa: E402
from sprint_jax import build  # noqa: E402
from sprint_jax.conversion import configs, folder  # noqa: E402
from sprint_jax.encoders import prompts as prompts_lib  # noqa: E402
from sprint_jax.encoders import tokenizers  # noqa: E402
from sprint_jax.errors import UserError  # noqa: E402
from sprint_jax.evaluation import extractors  # noqa: E402
from sprint_jax.sampling import exported, loading  # noqa: E402
from sprint_jax.sampling.opening import open_model  # noqa: E402
from sprint_jax.sampling.options import SHIPPED  # noqa: E402
from sprint_jax.serving import schema  # noqa: E402
from sprint_jax.serving.refused import Refused  # noqa: E402
from sprint_jax.storage import safetensors_files, torch_files, weights  # noqa: E402
from sprint_jax.training import average  # noqa: E402


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return a tiny diffusers folder with a ControlNet."""
    path = tmp_path_factory.mktemp("published") / "model"
    fabricate.pipeline().save_pretrained(path)
    fabricate.controlnet().save_pretrained(path / "controlnet")
    return path


@pytest.fixture
def copy(published, tmp_path):
    """Return a copy of the folder that a test may damage."""
    shutil.copytree(published, tmp_path / "copy")
    return tmp_path / "copy"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil(path, change):
    """Change the first tensor of a safetensors file, by name, and return the name."""
    arrays = safetensors.numpy.load_file(path)
    name = min(arrays)
    arrays[name] = change(arrays[name])
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    return name


def run_copy(path, change):
    """Return a copy of the shipped run whose student is changed, and the tensor's name."""
    shutil.copytree(SHIPPED, path)
    return path, spoil(path / "student.safetensors", change)


def export_file(path, arrays, **header):
    """Write a file of sprint-jax export without programs' code."""
    fields = json.loads(HEADER) | header
    stream = io.BytesIO()
    safetensors_files.write_stream(stream, arrays)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(exported.HEADER, json.dumps(fields))
        archive.writestr(exported.WEIGHTS, stream.getvalue())
    return path


HEADER = exported.Header(
    jax=jax.__version__,
    commit="unknown",
    platforms=("cpu",),
    dtype="float32",
    text={"kind": "shapes"},
    factor=4,
    channels=48,
    height=32,
    width=32,
    guidance_scale=4.5,
    schedule="code",
    batch_size=1,
    programs=(exported.Program(steps=1, length=16, batch_size=1, height=32, width=32),),
).to_json()

NO_NUMBERS = {
    "NaN": lambda a: np.full_like(a, np.nan),
    "infinity": lambda a: np.where(np.arange(a.size).reshape(a.shape) == a.size - 1, np.inf, a),
    "float16 infinity": lambda a: np.full(a.shape, np.inf, np.float16),
    "too large for float32": lambda a: np.full(a.shape, 1e300),
    "integers": lambda a: a.astype(np.int8),
    "wide integers": lambda a: a.astype(np.int64),
    "booleans": lambda a: a > 0,
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_weights_of_runs_that_are_no_numbers_are_named(tmp_path, kind):
    """In a student that is sampled or averaged, and in a teacher and a ControlNet by their file.

    Fails when `check_finite` or `check_dtype` returns at once, and without the check of what is
    stored (1e300 becomes infinity).
    """
    run, name = run_copy(tmp_path / "run", NO_NUMBERS[kind])
    readers = [
        lambda: loading.load(run, dtype="float32"),
        lambda: average.average([SHIPPED, run]),
        lambda: build.teacher_weights(str(run / "student.safetensors"), build.student(config)),
        lambda: build.control_weights(str(run / "student.safetensors"), build.student(config)),
    ]
    config = loading.read_config(run)
    for read in readers:
        with pytest.raises(UserError) as caught:
            read()
        assert f" {name} " in str(caught.value) and "student.safetensors" in str(caught.value)


def test_weights_too_large_for_bfloat16_are_named(tmp_path):
    """Fails when a student is cast without a check: 3.4e38 is infinity in bfloat16."""
    run, name = run_copy(tmp_path / "run", lambda a: np.full(a.shape, 3.4e38, "f"))
    loading.read_student(run)
    with pytest.raises(UserError, match=f"{name} that are infinite or not numbers in bfloat16"):
        loading.load(run, dtype="bfloat16")
    tensor = safetensors_files.scan(run / "student.safetensors")[name]
    with pytest.raises(UserError, match=f"{name} .* in bfloat16"):
        safetensors_files.read(tensor, np.zeros(tensor.shape, jax.numpy.bfloat16))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "controlnet"])
def test_published_weights_that_are_no_numbers_are_named(copy, part):
    """Every part of a folder, also alone, and converted to our form."""
    file = next((copy / part).glob("*.safetensors"))
    good = file.read_bytes()
    for change in NO_NUMBERS.values():
        file.write_bytes(good)
        name = spoil(file, change)
        with pytest.raises(UserError) as caught:
            ours = "autoencoder" if part == "vae" else part
            folder.describe(copy, dtype="float32").read([ours], dtype="float32")
        assert f" {name} " in str(caught.value)
        alone = {"transformer": folder.read_transformer, "controlnet": folder.read_controlnet}
        if part in alone:
            with pytest.raises(UserError, match=name):
                alone[part](copy)


def test_eight_bit_floats_are_named(tmp_path):
    """Files of 8-bit floats are quantized: their scales are elsewhere."""
    path = tmp_path / "a.safetensors"
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\x38\x38")
    with pytest.raises(UserError, match="holds w as F8_E4M3: weights must be"):
        weights.load(path, {"w": jax.ShapeDtypeStruct((2,), np.float32)})


def test_weights_of_other_files_that_are_no_numbers_are_named(tmp_path):
    """Exported files, and PyTorch's own, of any dtype."""
    good = {"w": np.ones(3, np.float32)}
    assert exported.load(export_file(tmp_path / "good", good)).params.keys() == {"w"}
    for dtype in (np.float32, jax.numpy.bfloat16):
        bad = {"w": np.array([1, np.nan, 1], dtype)}
        with pytest.raises(UserError, match="bad holds values of w that are infinite"):
            exported.load(export_file(tmp_path / "bad", bad))
        state = {"w": torch.tensor([1, float("inf")]).to(torch.bfloat16)}
        torch.save(state, tmp_path / "bad.pth")
        with pytest.raises(UserError, match=r"bad.pth holds values of w that are infinite"):
            extractors.load_inception(tmp_path / "bad.pth", unpublished=True)


TRANSFORMER = {
    "num_attention_heads": 36,
    "attention_head_dim": 32,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
AUTOENCODER = configs.autoencoder_json(configs.autoencoder({
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}))  # fmt: skip
TEXT_ENCODER = {
    "architectures": ["Gemma2Model"],
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
}
CLIP = {
    "model_type": "clip",
    "projection_dim": 512,
    "text_config": {"hidden_size": 512, "vocab_size": 49408, "eos_token_id": 2},
    "vision_config": {"hidden_size": 768, "patch_size": 32},
}
CONVERTERS = {
    "transformer": (lambda c: configs.transformer(c, "float32"), TRANSFORMER),
    "controlnet": (lambda c: configs.controlnet(c, "float32"), TRANSFORMER | {"num_layers": 7}),
    "autoencoder": (configs.autoencoder, AUTOENCODER),
    "text encoder": (configs.text_encoder, TEXT_ENCODER),
    "scheduler": (configs.check_scheduler, {"_class_name": "SCMScheduler", "sigma_data": 0.5}),
    "CLIP": (extractors.clip_model, CLIP),
}
# Of every config: fields that are unknown, and fields that are passed over by mistake.
UNKNOWN = {"new_field": 1, "another": None, "_sliding_window_pattern": 6}
REFUSED = {
    "text encoder": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "yarn"},
        "is_causal": False,
        "use_bidirectional_attention": True,
        "partial_rotary_factor": 0.5,
        "quantization_config": {"quant_method": "gptq"},
        "add_cross_attention": True,
        "auto_map": {"AutoModel": "own.Model"},
        "attention_bias": True,
        "head_dim": 255,
        "layer_types": ["full_attention"] * 26,
        "num_key_value_heads": 3,
    },
    "transformer": {"quantization_config": {"x": 1}, "norm_eps": 1e-5, "patch_size": True},
    "controlnet": {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
    "autoencoder": {
        "force_upcast": True,
        "decoder_conv_act_fn": "silu",
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1000],
        "encoder_qkv_multiscales": [5] * 6,
        "encoder_layers_per_block": [2, 2],
    },
    "scheduler": {"use_beta_sigmas": False, "sigma_data": 1.0},
    "CLIP": {
        "text_config": {"hidden_act": "relu"},
        "vision_config": {"num_channels": 1},
        "text_config_dict": {"hidden_size": 1024},
        "quantization_config": {},
        "model_type": "siglip",
    },
}
WRONG = (None, [], {}, "5", -1, 0, 2.5, float("nan"), float("inf"), 10**4000, 1e40, True, [[1]])


@pytest.mark.parametrize("name", CONVERTERS)
def test_fields_of_configs_are_understood_or_refused(name):
    """Fails when a field of the config is passed over, and when an unknown one is."""
    convert, base = CONVERTERS[name]
    convert(base)
    for field, value in (UNKNOWN | REFUSED[name]).items():
        with pytest.raises((UserError, ValueError)) as caught:
            convert(base | {field: value})
        line = str(caught.value)
        assert field.split("_")[0] in line or "heads" in line, line


@pytest.mark.parametrize("name", ["transformer", "controlnet", "autoencoder", "text encoder"])
def test_values_of_another_type_are_one_line_with_the_field(name):
    """Fails with a TypeError, or a network of half a head, without the kinds of fields."""
    convert, base = CONVERTERS[name]
    fields = {f for f, v in base.items() if isinstance(v, int | float | list)} - {"architectures"}
    assert len(fields) >= 6
    for field in fields:
        for value in WRONG:
            if value == 2.5 and field in ("query_pre_attn_scalar", "scaling_factor"):
                continue
            with pytest.raises(UserError) as caught:
                convert(base | {field: value})
            assert field in str(caught.value) and len(str(caught.value)) < 400


def test_a_wrong_value_in_a_folder_is_one_line_with_the_file(copy):
    """Published files, and ours."""
    for part, field, value in (
        ("transformer", "num_layers", "3"),
        ("vae", "scaling_factor", None),
        ("text_encoder", "rms_norm_eps", [1e-6]),
        ("text_encoder", "rope_scaling", {"rope_type": "linear", "factor": 8.0}),
        ("controlnet", "mlp_ratio", -2.5),
    ):
        path = copy / part / "config.json"
        good = path.read_text()
        edit_json(path, **{field: value})
        with pytest.raises(UserError, match=f"{part}/config.json: the .* config.* {field}"):
            folder.describe(copy, dtype=None)
        path.write_text(good)
    described = {"num_layers": 3}
    for model in ({}, {"transformer": None}, {"transformer": described}, {"transformer": [1]}):
        ours = {"format": "sprint_jax model 1", "instruction": "", **model}
        (copy / "ours").mkdir(exist_ok=True)
        (copy / "ours/model.json").write_text(json.dumps(ours))
        with pytest.raises(UserError, match=r"model.json does not describe a model"):
            folder.describe(copy / "ours", dtype=None)


def test_our_own_configs_are_checked_field_by_field(published, tmp_path):
    """Every number of model.json, of another type: one line that names the file."""
    checkpoint = folder.read_diffusers(published, dtype=None, instruction="")
    folder.write_ours(tmp_path / "ours", checkpoint)
    path = tmp_path / "ours/model.json"
    good = json.loads(path.read_text())
    for part in ("transformer", "autoencoder", "text_encoder"):
        for field in good[part].keys() - {"guidance_scale_factor", "dtype"}:
            for value in (None, "5", [1], -1, 1e400, {"a": 1}):
                path.write_text(json.dumps(good | {part: good[part] | {field: value}}))
                with pytest.raises(UserError, match="model.json"):
                    folder.describe(tmp_path / "ours", dtype=None)
    for value in (None, 5, ["a"]):
        path.write_text(json.dumps(good | {"instruction": value}))
        with pytest.raises(UserError, match=r"model.json does not describe a model \(instruction"):
            folder.describe(tmp_path / "ours", dtype=None)


OWN_CODE = """open({marker!r}, "w").close()
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_of_a_folder_is_never_run(copy, monkeypatch, file):
    """Nor is the person asked: an answer of "y" ran it. Of CLIP's folder as well."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    tokenizer, marker = copy / "tokenizer", copy / "ran"
    (tokenizer / "own.py").write_text(OWN_CODE.format(marker=str(marker)))
    own = {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"], "AutoConfig": "own.Own"}
    if file == "config.json":
        (tokenizer / "tokenizer_config.json").unlink()
    (tokenizer / file).touch()
    fields = json.loads((tokenizer / file).read_text() or "{}")
    fields |= {"auto_map": own, "tokenizer_class": "OwnTokenizer", "model_type": "own"}
    (tokenizer / file).write_text(json.dumps(fields))
    for load in (
        lambda: tokenizers.load(tokenizer),
        lambda: loading.load(copy, dtype="float32", instruction=""),
    ):
        with pytest.raises(UserError, match=f"code of the folder .{file}., which is never run"):
            load()
    assert not marker.exists()


def test_every_call_of_transformers_says_not_to_run_code():
    """Fails when a `from_pretrained` of the sources leaves it to the library to ask."""
    found = 0
    for path in (p for area in ("sprint_jax", "benchmarks") for p in (ROOT / area).rglob("*.py")):
        for call in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)):
            if getattr(call.func, "attr", "") == "from_pretrained":
                given = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
                assert given.get("trust_remote_code") is False, path
                found += 1
    assert found


def test_a_folder_with_code_and_a_known_tokenizer_is_read(copy):
    """As in transformers: its own class is taken, the folder's code is left alone."""
    edit_json(copy / "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]})
    assert tokenizers.load(copy / "tokenizer")("a fox")["input_ids"][0] == 2


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_files_of_a_tokenizer_of_another_kind_are_one_line(copy, file):
    """Nested, damaged, and a length that is no number."""
    path = copy / "tokenizer" / file
    good = path.read_text() if path.exists() else "{}"
    for text in ("[" * 100_000 + "]" * 100_000, "null", "[1]", "", '"x"'):
        path.write_text(text)
        with pytest.raises(UserError, match="cannot read the tokenizer in .*: download it again"):
            tokenizers.load(copy / "tokenizer")
    path.write_text(good)
    edit_json(copy / "tokenizer/tokenizer_config.json", model_max_length=[1])
    with pytest.raises(UserError, match=r"model_max_length=\[1\]: it must be a number"):
        tokenizers.load(copy / "tokenizer")


def torch_zip(path):
    torch.save({"w": torch.ones(2)}, path)


def exported_zip(path):
    export_file(path, {"w": np.ones(2, np.float32)})


FOREIGN = {
    "pth": (torch_zip, "a pickled PyTorch file"),
    "old pth": (lambda p: p.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9"), "a pickled PyTorch file"),
    "gguf": (lambda p: p.write_bytes(b"GGUF\x03\0\0\0" + bytes(64)), "GGUF file, which no command"),
    "lfs": (
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n"),
        "pointer of Git LFS, not the file: run git lfs pull",
    ),
    "html": (lambda p: p.write_text("\n<!DOCTYPE html><html>"), "a web page, not the file"),
    "json": (lambda p: p.write_text('{"weight_map":{"w":"a.safetensors"}}'), "a JSON file: give"),
    "text": (lambda p: p.write_text("Entry not found"), "begins 'Entry not found'"),
    "zip": (lambda p: zipfile.ZipFile(p, "w").close(), "a zip archive: unpack it"),
    "gz": (lambda p: p.write_bytes(b"\x1f\x8b\x08" + bytes(30)), "a gzip archive: unpack it"),
    "npz": (lambda p: np.savez(p.open("wb"), a=np.ones(2)), "NumPy arrays, which no command"),
    "hdf5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(30)), "an HDF5 file"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_other_kinds_are_called_what_they_are(tmp_path, kind):
    """As weights of any reader and as a model: "copy it again" is no help."""
    make, words = FOREIGN[kind]
    for name in ("a.safetensors", "a.ckpt", "a.pth"):
        make(tmp_path / name)
        readers = [safetensors_files.scan, folder.read_native, open_model]
        for read in readers if "torch" not in words else readers[:1]:
            with pytest.raises(UserError) as caught:
                read(tmp_path / name)
            assert words in str(caught.value) and "copy it again" not in str(caught.value)
    if "pth" not in kind:
        with pytest.raises(UserError) as caught:
            torch_files.read(tmp_path / "a.pth", "")
        assert words in str(caught.value) and "download it again" not in str(caught.value)


def test_a_safetensors_file_is_no_exported_one_and_back(tmp_path):
    """Each reader names the command that takes the file."""
    safetensors.numpy.save_file({"w": np.ones(2, np.float32)}, tmp_path / "w")
    with pytest.raises(UserError, match="it is a safetensors file: convert --from takes one"):
        open_model(tmp_path / "w")
    exported_zip(tmp_path / "e")
    with pytest.raises(UserError, match="give it as --model of sample or serve"):
        safetensors_files.scan(tmp_path / "e")


def test_folders_of_other_weights_are_called_what_they_are(tmp_path):
    for name, kind in (("a.ckpt", "pickled"), ("a.gguf", "GGUF"), ("a.msgpack", "Flax msgpack")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_bytes(b"x")
        with pytest.raises(UserError, match=f"has only {kind} weights, which are never opened"):
            safetensors_files.find(tmp_path / kind, "model")


@pytest.mark.parametrize("wording", ["", "\n".join(fabricate.INSTRUCTION)])
def test_an_empty_prompt_is_the_unconditional_one(published, wording):
    """The features of diffusers, with a note. Fails when an empty prompt is refused."""
    tokenizer = tokenizers.load(published / "tokenizer")
    theirs = fabricate.pipeline()
    described = folder.describe(published, dtype="float32")
    params = described.read(["text_encoder"], dtype="float32")["text_encoder"]
    model, prompts = described.models["text_encoder"], prompts_lib.GemmaPrompts(tokenizer, wording)
    with pytest.warns(prompts_lib.EmptyWarning, match="prompt 0 is empty: it draws the uncond"):
        (ids,) = prompts.tokens(["  "])
    states = np.asarray(model.apply(params, *(np.array([x]) for x in whole(prompts, ids))))[0]
    with torch.no_grad():
        expected, _, *_ = theirs.encode_prompt(
            [""], complex_human_instruction=fabricate.INSTRUCTION if wording else None
        )
    kept = expected[0, : 1 + bool(wording)].numpy()
    ours = states[[0, -1]] if wording else states[:1]
    np.testing.assert_allclose(ours, kept, atol=2e-4)


def whole(prompts, ids):
    """Return (tokens, mask) of a prompt after its instruction."""
    tokens = np.concatenate([prompts.prefix, ids]).astype(np.int32)
    return tokens, np.ones(len(tokens), np.float32)


def test_empty_prompts_pass_where_the_model_takes_them():
    """The server refuses blank prompts of embedded models alone."""
    limits = dict(steps=(1,), sizes=((32, 32),), guidance_scale=4.5, schedule="code")
    rest = dict(takes_image=False, takes_control=False)
    taking = schema.Limits(**limits, **rest, takes_empty=True)
    assert schema.parse(b'{"prompt": ""}', taking).prompt == ""
    assert schema.json_schema(taking)["properties"]["prompt"].get("minLength", 0) == 0
    with pytest.raises(Refused, match="prompt is empty"):
        schema.parse(b'{"prompt": " "}', schema.Limits(**limits, **rest))
    assert not loading.load(SHIPPED, dtype="float32").text.takes_empty


def test_the_side_of_truncation_is_that_of_the_tokenizer(copy):
    """Without an instruction the tokens are transformers'; with one, it would be cut: refused.

    Fails when `truncation_side` of the saved tokenizer is ignored.
    """
    long, wording = "gulls at dusk " * 200 + "the tail", "describe the image: "
    for side in ("right", "left"):
        edit_json(copy / "tokenizer/tokenizer_config.json", truncation_side=side)
        tokenizer = tokenizers.load(copy / "tokenizer")
        assert tokenizer.truncation_side == side
        with pytest.warns(prompts_lib.CutWarning, match="cut off"):
            (ours,) = prompts_lib.GemmaPrompts(tokenizer, "").tokens([long])
        tokenizer.padding_side = "right"
        theirs = tokenizer(long, padding="max_length", max_length=300, truncation=True)
        np.testing.assert_array_equal(ours, theirs["input_ids"])
    text = {"kind": "gemma", "instruction": "", "truncation_side": "left"}
    path = export_file(copy / "file", {"w": np.ones(2, np.float32)}, text=text)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(
            exported.TOKENIZER, prompts_lib.GemmaPrompts(tokenizer, "").tokenizer_json()
        )
    with pytest.warns(prompts_lib.CutWarning, match="cut off"):
        np.testing.assert_array_equal(exported.load(path).text.tokens([long])[0], ours)
    behind = prompts_lib.GemmaPrompts(tokenizer, wording)
    assert len(behind.tokens(["a fox"])[0])
    with pytest.raises(UserError, match="truncation_side=left.*shorten the prompt"):
        behind.tokens([long])


def test_a_tokenizer_that_ends_texts_is_refused(copy):
    """Fails when <eos> of add_eos_token becomes a part of the prefix."""
    tokenizer = tokenizers.load(copy / "tokenizer")

    def ending(text, add_special_tokens):
        found = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return {"input_ids": found + [1] * add_special_tokens}

    with pytest.raises(UserError, match="add_eos_token must be false"):
        prompts_lib.GemmaPrompts(ending, "")


def test_headers_of_exported_files_are_checked(tmp_path):
    """Null, other types and missing fields: one line each."""
    arrays = {"w": np.ones(2, np.float32)}
    for field in json.loads(HEADER):
        for value in (None, [], -1, "x", 1e400, {"a": {"b": None}}):
            if (field, value) in (("jax", "x"), ("commit", "x"), ("platforms", [])):
                continue
            if field == "guidance_scale" and value == -1:
                continue
            path = export_file(tmp_path / "file", arrays, **{field: value})
            with pytest.raises(UserError, match=r"export"):
                exported.load(path)
    for text in ("null", "[1]", '"x"', "{}", "[" * 100000 + "]" * 100000):
        with zipfile.ZipFile(tmp_path / "file", "w") as archive:
            archive.writestr(exported.HEADER, text)
        with pytest.raises(UserError, match="is not a whole file of sprint-jax export"):
            exported.load(tmp_path / "file")


def test_a_damaged_tokenizer_of_an_exported_file_is_one_line(tmp_path):
    """The library raises nothing more precise than Exception."""
    text = {"kind": "gemma", "instruction": ""}
    for content in ("", "null", '{"version": "1.0"}', "[" * 100000 + "]" * 100000):
        path = export_file(tmp_path / "file", {"w": np.ones(2, np.float32)}, text=text)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(exported.TOKENIZER, content)
        with pytest.raises(UserError, match="is not a whole file of sprint-jax export.*tokenizer"):
            exported.load(path)

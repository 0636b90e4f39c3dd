"""CLIP against transformers' PyTorch model on random weights, and its preprocessing."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from helpers.arrays import relative_error
from sprint_jax.errors import UserError
from sprint_jax.evaluation import extractors
from sprint_jax.evaluation.networks import clip as clip_lib

torch = pytest.importorskip("torch")
fabricate = pytest.importorskip("helpers.fabricate")
import transformers  # noqa: E402

torch.set_num_threads(1)
START, END = 60, 61


def write_tokenizer():
    """Return a tokenizer like CLIP's that knows single letters.

    It has byte pairs with </w>, and start and end tokens.
    """
    letters = [f"{c}{end}" for c in "abcdefghijklmnopqrstuvwxyz,." for end in ("", "</w>")]
    vocab = {token: i for i, token in enumerate(letters)}
    vocab |= {"<|startoftext|>": START, "<|endoftext|>": END}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[])


@pytest.fixture(scope="module", params=["own end token", "largest id"])
def folder(request, tmp_path_factory):
    """Return the folder of a random CLIP with its tokenizer, as transformers saves them."""
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    end = END if request.param == "own end token" else 2
    text = dict(
        vocab_size=62,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=12,
        eos_token_id=end,
        bos_token_id=START,
        pad_token_id=END,
        hidden_act="quick_gelu",
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        hidden_act="quick_gelu",
    )
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    )
    fabricate.randomize(model, 0, 0.3).save_pretrained(path)
    file = path / "model.safetensors"  # the published file also has integer buffers
    buffers = {
        "text_model.embeddings.position_ids": np.arange(12)[None],
        "vision_model.embeddings.position_ids": np.arange(17)[None],
    }
    safetensors.numpy.save_file(
        safetensors.numpy.load_file(file) | buffers, file, metadata={"format": "pt"}
    )
    write_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def peer(folder):
    """Return the model of transformers."""
    return transformers.CLIPModel.from_pretrained(folder).eval()


def pooled(result):
    """Return the features: transformers 5 gives an output object, earlier versions a tensor."""
    return (result if torch.is_tensor(result) else result.pooler_output).detach().numpy()


TEXTS = ["a red fox", "an oil painting of a lighthouse at dusk, with gulls", "z"]


def test_text_features_match_transformers(folder, peer):
    clip, _ = extractors.load_clip(folder, batch=2)
    tokens = clip.tokens(TEXTS)
    assert tokens.shape == (3, 12)
    assert tokens[1, 0] == START
    assert tokens[1, -1] == END  # truncated, with the end token kept
    with torch.no_grad():
        expected = pooled(peer.get_text_features(torch.tensor(tokens).long()))
    assert relative_error(clip.texts(TEXTS), expected) < 1e-5


def test_image_features_match_transformers(folder, peer):
    clip, _ = extractors.load_clip(folder, batch=2)
    images = np.random.RandomState(0).randint(0, 256, (3, 28, 28, 3)).astype(np.uint8)
    x = (images / 255 - np.array(clip_lib.MEAN)) / np.array(clip_lib.DEVIATION)
    with torch.no_grad():
        expected = pooled(
            peer.get_image_features(torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2))
        )
    assert relative_error(clip.images(list(images)), expected) < 1e-5
    assert clip.logit_scale == pytest.approx(peer.logit_scale.item())


def test_score_of_pairs_matches_transformers(folder, peer, command, tmp_path):
    """Compare scores of image files and prompts with the logits of transformers.

    Their diagonal is exp(logit_scale) x cosine.
    """
    clip, digest = extractors.load_clip(folder, batch=4)
    images = np.random.RandomState(1).randint(0, 256, (3, 28, 28, 3)).astype(np.uint8)
    x = (images / 255 - np.array(clip_lib.MEAN)) / np.array(clip_lib.DEVIATION)
    with torch.no_grad():
        out = peer(
            input_ids=torch.tensor(clip.tokens(TEXTS)).long(),
            pixel_values=torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2),
        )
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"pictures/{i:05d}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    result = command(
        "sprint_jax",
        "evaluate",
        "--suite=clip",
        f"--folder={tmp_path / 'pictures'}",
        f"--prompts={tmp_path / 'prompts.txt'}",
        f"--weights={folder}",
        "--scoring_batch=2",
        f"--out={tmp_path}",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads((tmp_path / "report-clip.json").read_text())
    scaled, logits = peer.logit_scale.exp().item(), out.logits_per_image.diagonal().mean().item()
    assert found["scores"]["clip_score"] == pytest.approx(logits, rel=1e-4)
    assert found["scores"]["clip_score_torchmetrics"] == pytest.approx(
        max(100 * logits / scaled, 0), rel=1e-4
    )
    assert (
        found["protocol"]["weights_sha256"]
        == digest
        == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    )


def test_preprocessing_matches_transformers():
    """Compare the resized shorter side and the center crop of a large image with odd sides."""
    processor = transformers.CLIPImageProcessor(do_normalize=False, do_rescale=False)
    rng = np.random.RandomState(0)
    for shape in ((301, 517, 3), (640, 333, 3), (100, 100, 3)):
        small = rng.randint(0, 256, (shape[0] // 8, shape[1] // 8, 3)).astype(np.uint8)
        image = np.asarray(Image.fromarray(small).resize((shape[1], shape[0])))
        expected = np.asarray(
            processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        ).transpose(1, 2, 0)
        found = extractors.clip_resize(image, 224)
        assert found.shape == (224, 224, 3)
        np.testing.assert_array_equal(found, expected)


def test_damaged_folders_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="config.json"):
        extractors.load_clip(tmp_path, batch=1)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config["text_config"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks 16 tensors"):
        extractors.load_clip(tmp_path, batch=1)
    config["text_config"] |= {"num_hidden_layers": 2, "intermediate_size": 50}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="mlp.fc1"):
        extractors.load_clip(tmp_path, batch=1)

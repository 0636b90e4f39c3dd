"""SANA-Sprint folders with random weights, made offline by PyTorch, diffusers and transformers.

Every parameter is moved away from its initial value, so that no zero or one hides a branch. This
file is also a command, which writes a folder of real size:

    python tests/helpers/fabricate.py DIR [tiny|0.6b]
"""

import inspect
import json
import os
import sys
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, trainers

INSTRUCTION = (
    inspect.signature(diffusers.SanaSprintPipeline.__call__)
    .parameters["complex_human_instruction"]
    .default
)

_SENTENCES = (
    "a red fox in the snow, watercolour, soft light",
    "an oil painting of a lighthouse at dusk with gulls",
    "two cats asleep on a blue sofa next to a window",
    "a photograph of a mountain lake in autumn, mist",
    "macro shot of a dew drop on a green leaf",
    "a tiny astronaut hatching from an egg on the moon",
)

TRANSFORMERS = {
    "tiny": dict(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
    ),
    "0.6b": dict(
        in_channels=32,
        out_channels=32,
        num_attention_heads=36,
        attention_head_dim=32,
        num_layers=28,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
    ),
}
_KINDS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
_AUTOENCODERS = {
    "tiny": dict(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_out_channels=[8, 16, 16, 16, 32, 32],
        decoder_block_out_channels=[8, 16, 16, 16, 32, 32],
        encoder_layers_per_block=[1, 1, 1, 1, 2, 1],
        decoder_layers_per_block=[1, 1, 1, 2, 1, 1],
    ),
    "0.6b": dict(
        latent_channels=32,
        attention_head_dim=32,
        encoder_block_out_channels=[128, 256, 512, 512, 1024, 1024],
        decoder_block_out_channels=[128, 256, 512, 512, 1024, 1024],
        encoder_layers_per_block=[2, 2, 2, 3, 3, 3],
        decoder_layers_per_block=[3] * 6,
    ),
}
_TEXT = {
    "tiny": dict(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=20,
    ),
    # The published width in one thin layer: the transformer keeps its shapes in a small folder.
    "0.6b": dict(
        hidden_size=2304,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
    ),
}


def randomize(module: torch.nn.Module, seed: int, amount: float = 0.1) -> Any:
    """Add normal noise to every parameter, in proportion to its spread if it has one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = parameter.std().item() if parameter.numel() > 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * amount * (spread if spread > 1e-8 else 1.0))
    return module.eval()


def transformer(
    size: str = "tiny", seed: int = 0, **changes: Any
) -> diffusers.SanaTransformer2DModel:
    """Return a random transformer."""
    torch.manual_seed(seed)
    fields = dict(
        caption_channels=_TEXT[size]["hidden_size"],
        mlp_ratio=2.5,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
        interpolation_scale=None,
    )
    return randomize(
        diffusers.SanaTransformer2DModel(**TRANSFORMERS[size] | fields | changes), seed
    )


def controlnet(seed: int = 1, **changes: Any) -> diffusers.SanaControlNetModel:
    """Return a random ControlNet of two blocks for the tiny transformer.

    Its zero projections are randomized as well.
    """
    torch.manual_seed(seed)
    return randomize(
        diffusers.SanaControlNetModel(
            **TRANSFORMERS["tiny"] | dict(num_layers=2, caption_channels=48) | changes
        ),
        seed,
    )


def autoencoder(size: str = "tiny", seed: int = 0, **changes: Any) -> diffusers.AutoencoderDC:
    """Return a random DC-AE."""
    torch.manual_seed(seed)
    scales = [[], [], [], [5], [5], [5]]
    fields = dict(
        encoder_block_types=_KINDS,
        decoder_block_types=_KINDS,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return randomize(diffusers.AutoencoderDC(**_AUTOENCODERS[size] | fields | changes), seed)


def text_encoder(
    vocab: int, size: str = "tiny", seed: int = 0, **changes: Any
) -> transformers.Gemma2Model:
    """Return a random Gemma-2 for `vocab` tokens."""
    torch.manual_seed(seed)
    config = transformers.Gemma2Config(
        vocab_size=vocab,
        attn_implementation="eager",
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        **_TEXT[size] | dict(sliding_window=4096) | changes,
    )
    return randomize(transformers.Gemma2Model(config), seed, 0.3)


def tokenizer() -> transformers.GemmaTokenizer:
    """Return a byte-fallback BPE tokenizer, trained on a few sentences.

    Its special tokens and its handling of spaces are those of Gemma.
    """
    raw = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Replace(" ", "\u2581")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = [
        "\u2581" * bool(i) + word
        for sentence in (*_SENTENCES, *INSTRUCTION)
        for i, word in enumerate(sentence.lower().split(" "))
    ]
    raw.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    trained = json.loads(raw.to_str())["model"]
    vocab = {token: i for i, token in enumerate([*special, *(f"<0x{i:02X}>" for i in range(256))])}
    for token in sorted(trained["vocab"], key=trained["vocab"].get):
        vocab.setdefault(token, len(vocab))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in trained["merges"]]
    return transformers.GemmaTokenizer(
        vocab=vocab, merges=merges, padding_side="left", add_bos_token=True
    )


def pipeline(size: str = "tiny") -> diffusers.SanaSprintPipeline:
    """Return a whole random pipeline."""
    tok = tokenizer()
    return diffusers.SanaSprintPipeline(
        tokenizer=tok,
        text_encoder=text_encoder(len(tok), size),
        vae=autoencoder(size),
        transformer=transformer(size),
        scheduler=diffusers.SCMScheduler(
            num_train_timesteps=1000, prediction_type="trigflow", sigma_data=0.5
        ),
    )


if __name__ == "__main__":
    pipeline(*sys.argv[2:]).save_pretrained(sys.argv[1])

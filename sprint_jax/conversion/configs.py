"""Conversion of model configs between diffusers or transformers and our model descriptions.

Every field is either supported, or accepted at a single value, or an error. A checkpoint that needs
an unsupported feature is rejected by name and never runs incorrectly.
"""

from collections.abc import Mapping
from typing import Any

from sprint_jax.errors import UserError
from sprint_jax.models.controlnet import ControlNet
from sprint_jax.models.dc_ae import DCAE, Stage
from sprint_jax.models.gemma2 import Gemma2
from sprint_jax.models.linear_dit import LinearDiT

# Versions of diffusers omit different keys. An absent key has the default of diffusers.
_TRANSFORMER = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "dropout": 0.0,
    "attention_bias": False,
    "sample_size": 32,
    "patch_size": 1,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "guidance_embeds": False,
    "guidance_embeds_scale": 0.1,
    "qk_norm": None,
    "timestep_scale": 1.0,
}
_TRANSFORMER_FIXED = {
    "attention_bias": False,
    "patch_size": 1,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
}
# diffusers' `SanaControlNetModel` has no QK-norm and receives times in [0, 1000]. Our ControlNet
# has a class name that diffusers does not know, so that neither is mistaken for the other.
_CONTROLNET = {
    k: v for k, v in _TRANSFORMER.items() if not k.startswith(("guidance_", "qk_", "timestep_"))
} | {"num_layers": 7}
_SPRINT_CONTROLNET = _CONTROLNET | {"qk_norm": "rms_norm_across_heads", "timestep_scale": 1.0}
_CONTROLNET_CLASS, _SPRINT_CONTROLNET_CLASS = "SanaControlNetModel", "SprintControlNetModel"

_QK_NORM = {"rms_norm_across_heads": True, None: False}

_AUTOENCODER = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
    "scaling_factor": 1.0,
}
_AUTOENCODER_FIXED = {
    "upsample_block_type": "interpolate",
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
}

_SCHEDULER = {"num_train_timesteps": 1000, "prediction_type": "trigflow", "sigma_data": 0.5}


def _fields(
    config: Mapping[str, Any], known: dict[str, Any], fixed: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """Fill defaults into a config. Raises UserError for an unsupported field or value.

    known: all supported fields with their defaults. fixed: fields that support one value only.
    """
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise UserError(
            f"the {what} config has {unknown[0]}={given[unknown[0]]!r}, which is not supported here"
        )
    merged = known | given
    for name, value in fixed.items():
        if merged[name] != value:
            raise UserError(
                f"the {what} config has {name}={merged[name]!r}; only {value!r} is supported"
            )
    return merged


def _check_class(config: Mapping[str, Any], expected: str, what: str) -> None:
    found = config.get("_class_name", expected)
    if found != expected:
        raise UserError(f"the {what} is a {found}; only {expected} is supported")


def transformer(config: Mapping[str, Any], dtype: str) -> LinearDiT:
    """Convert `transformer/config.json` of diffusers.

    dtype: of matrix products and of the residual stream. Raises UserError for an unsupported field.
    """
    what = "transformer"
    _check_class(config, "SanaTransformer2DModel", what)
    c = _fields(config, _TRANSFORMER, _TRANSFORMER_FIXED, what)
    width = c["num_attention_heads"] * c["attention_head_dim"]
    crossed = c["num_cross_attention_heads"] * c["cross_attention_head_dim"]
    if crossed != width or c["cross_attention_dim"] != width:
        raise UserError(
            f"the transformer config is {width} wide but its cross-attention {crossed} over "
            f"{c['cross_attention_dim']}: the three must agree"
        )
    if c["out_channels"] not in (None, c["in_channels"]):
        raise UserError(
            f"the transformer config has out_channels={c['out_channels']} and "
            f"in_channels={c['in_channels']}: they must agree"
        )
    if c["qk_norm"] not in _QK_NORM:
        raise UserError(
            f"the transformer config has qk_norm={c['qk_norm']!r}; 'rms_norm_across_heads' or null "
            "is supported"
        )
    return LinearDiT(
        in_channels=c["in_channels"],
        width=width,
        depth=c["num_layers"],
        heads=c["num_attention_heads"],
        cross_heads=c["num_cross_attention_heads"],
        mlp_ratio=c["mlp_ratio"],
        text_dim=c["caption_channels"],
        patch_size=1,
        qk_norm=_QK_NORM[c["qk_norm"]],
        time_scale=float(c["timestep_scale"]),
        guidance_embed=c["guidance_embeds"],
        guidance_scale_factor=c["guidance_embeds_scale"],
        logvar_head=False,
        remat="none",
        unroll=1,
        dtype=dtype,
        residual_dtype=dtype,
        attention="plain",
    )


def controlnet(config: Mapping[str, Any], dtype: str) -> ControlNet:
    """Convert `controlnet/config.json` of diffusers, or our variant with QK-norm or dense times.

    dtype: as in `transformer`. Raises UserError for an unsupported field.
    """
    if config.get("_class_name") == _SPRINT_CONTROLNET_CLASS:
        c = _fields(config, _SPRINT_CONTROLNET, {}, "ControlNet")
    else:
        _check_class(config, _CONTROLNET_CLASS, "ControlNet")
        c = _fields(config, _CONTROLNET, {}, "ControlNet") | {
            "qk_norm": None,
            "timestep_scale": 1000.0,
        }
    # The network that a ControlNet copies must be deeper than the copy. Its own depth is not used.
    alike = c | {"_class_name": "SanaTransformer2DModel", "num_layers": c["num_layers"] + 1}
    return ControlNet(net=transformer(alike, dtype), depth=c["num_layers"])


def controlnet_json(m: ControlNet) -> dict[str, Any]:
    """Convert back; the inverse of `controlnet`."""
    theirs = not m.net.qk_norm and m.net.time_scale == 1000.0
    known, kind = (
        (_CONTROLNET, _CONTROLNET_CLASS)
        if theirs
        else (_SPRINT_CONTROLNET, _SPRINT_CONTROLNET_CLASS)
    )
    given = {name: value for name, value in transformer_json(m.net).items() if name in known}
    return given | {"_class_name": kind, "num_layers": m.depth}


def transformer_json(m: LinearDiT) -> dict[str, Any]:
    """Convert back; the inverse of `transformer`."""
    return {
        "_class_name": "SanaTransformer2DModel",
        "attention_bias": False,
        "attention_head_dim": m.width // m.heads,
        "caption_channels": m.text_dim,
        "cross_attention_dim": m.width,
        "cross_attention_head_dim": m.width // m.cross_heads,
        "dropout": 0.0,
        "guidance_embeds": m.guidance_embed,
        "guidance_embeds_scale": m.guidance_scale_factor,
        "in_channels": m.in_channels,
        "interpolation_scale": None,
        "mlp_ratio": m.mlp_ratio,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "num_attention_heads": m.heads,
        "num_cross_attention_heads": m.cross_heads,
        "num_layers": m.depth,
        "out_channels": m.in_channels,
        "patch_size": 1,
        "qk_norm": "rms_norm_across_heads" if m.qk_norm else None,
        "sample_size": 32,
        "timestep_scale": m.time_scale,
    }


def autoencoder(config: Mapping[str, Any]) -> DCAE:
    """Convert `vae/config.json` of diffusers. Raises UserError for an unsupported field."""
    what = "autoencoder"
    _check_class(config, "AutoencoderDC", what)
    c = _fields(config, _AUTOENCODER, _AUTOENCODER_FIXED, what)
    if c["downsample_block_type"] == "pixel_unshuffle":
        raise UserError(
            "the autoencoder config has downsample_block_type='pixel_unshuffle'; only 'Conv' is "
            "supported"
        )
    for name, value in (("decoder_norm_types", "rms_norm"), ("decoder_act_fns", "silu")):
        if set(_each(c[name], 1)) != {value}:
            raise UserError(
                f"the autoencoder config has {name}={c[name]!r}; only {value!r} is supported"
            )

    try:
        return DCAE(
            in_channels=c["in_channels"],
            latent_channels=c["latent_channels"],
            head_dim=c["attention_head_dim"],
            encoder=_stages(c, "encoder"),
            decoder=_stages(c, "decoder"),
            scaling_factor=c["scaling_factor"],
        )
    except ValueError as error:
        raise UserError(f"the autoencoder config is not supported: {error}") from None


def _stages(config: Mapping[str, Any], side: str) -> tuple[Stage, ...]:
    """Return the stages of one side of an autoencoder. side: "encoder" or "decoder"."""
    channels = config[f"{side}_block_out_channels"]
    layers = config[f"{side}_layers_per_block"]
    blocks = _each(config[f"{side}_block_types"], len(channels))
    scales = config[f"{side}_qkv_multiscales"]
    columns = (channels, layers, blocks, scales)
    if len({len(column) for column in columns}) != 1 or min(layers) < 1:
        raise UserError(
            f"the autoencoder config describes its {side} by lists of different lengths, or by an "
            "empty stage"
        )
    return tuple(Stage(w, n, block, tuple(s)) for w, n, block, s in zip(*columns, strict=True))


def _each(value: str | list[str], count: int) -> list[str]:
    return [value] * count if isinstance(value, str) else value


def autoencoder_json(m: DCAE) -> dict[str, Any]:
    """Convert back; the inverse of `autoencoder`."""
    sides = {"encoder": m.encoder, "decoder": m.decoder}
    config = {
        "_class_name": "AutoencoderDC",
        "attention_head_dim": m.head_dim,
        "decoder_act_fns": "silu",
        "decoder_norm_types": "rms_norm",
        "downsample_block_type": "Conv",
        "in_channels": m.in_channels,
        "latent_channels": m.latent_channels,
        "scaling_factor": m.scaling_factor,
        "upsample_block_type": "interpolate",
    }
    for side, stages in sides.items():
        config |= {
            f"{side}_block_out_channels": [s.channels for s in stages],
            f"{side}_block_types": [s.block for s in stages],
            f"{side}_layers_per_block": [s.layers for s in stages],
            f"{side}_qkv_multiscales": [list(s.scales) for s in stages],
        }
    return config


def text_encoder(config: Mapping[str, Any]) -> Gemma2:
    """Convert `text_encoder/config.json` of transformers.

    The file may be of version 4 (flat) or 5 (with rope_parameters and layer_types). Raises
    UserError for an unsupported field.
    """
    _check_text_encoder(config)
    rope = config.get("rope_parameters") or {}
    try:
        depth = config["num_hidden_layers"]
        kinds = config.get("layer_types")
        expected = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(depth)]
        if kinds is not None and kinds != expected:
            raise UserError(
                "the text encoder config has layer_types that do not alternate between "
                "sliding_attention and full_attention"
            )
        return Gemma2(
            vocab=config["vocab_size"],
            width=config["hidden_size"],
            depth=depth,
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            hidden=config["intermediate_size"],
            query_scalar=float(config["query_pre_attn_scalar"]),
            window=config["sliding_window"],
            softcap=config.get("attn_logit_softcapping", 50.0),
            eps=config.get("rms_norm_eps", 1e-6),
            theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        )
    except KeyError as error:
        raise UserError(
            f"the text encoder config lacks {error.args[0]}: copy the folder again"
        ) from None


def _check_text_encoder(config: Mapping[str, Any]) -> None:
    """Raise UserError for a field of a text encoder that is not supported."""
    kind = config.get("model_type", "gemma2")
    if kind != "gemma2":
        raise UserError(f"the text encoder is a {kind}; only gemma2 is supported")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"the text encoder config has rope_type={rope['rope_type']!r}; only 'default' is "
            "supported"
        )
    activation = config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"
    if activation != "gelu_pytorch_tanh":
        raise UserError(
            f"the text encoder config has hidden_activation={activation!r}; only "
            "'gelu_pytorch_tanh' is supported"
        )
    if config.get("attention_bias", False):
        raise UserError(
            "the text encoder config has attention_bias=true, which is not supported here"
        )
    if config.get("attn_logit_softcapping", 50.0) is None:
        raise UserError(
            "the text encoder config has attn_logit_softcapping=null, which is not supported here"
        )


def text_encoder_json(m: Gemma2) -> dict[str, Any]:
    """Convert back, for transformers 4 and 5 alike; the inverse of `text_encoder`."""
    return {
        "architectures": ["Gemma2Model"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": m.softcap,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": m.head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": m.width,
        "intermediate_size": m.hidden,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": m.heads,
        "num_hidden_layers": m.depth,
        "num_key_value_heads": m.kv_heads,
        "pad_token_id": 0,
        "query_pre_attn_scalar": _to_int(m.query_scalar),
        "rms_norm_eps": m.eps,
        "rope_theta": m.theta,
        "sliding_window": m.window,
        "vocab_size": m.vocab,
    }


def _to_int(value: float) -> int | float:
    """Return a whole number as an int, which transformers 5 requires."""
    return int(value) if value == int(value) else value


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Raise UserError unless `scheduler/scheduler_config.json` is the one of SANA-Sprint."""
    found = config.get("_class_name", "SCMScheduler")
    if found != "SCMScheduler":
        raise UserError(
            f"the scheduler is a {found}: this folder holds a multi-step SANA, not a SANA-Sprint "
            "(SCMScheduler)"
        )
    _fields(config, _SCHEDULER, _SCHEDULER, "scheduler")


def scheduler_json() -> dict[str, Any]:
    """Return `scheduler/scheduler_config.json` of SANA-Sprint."""
    return {"_class_name": "SCMScheduler"} | _SCHEDULER

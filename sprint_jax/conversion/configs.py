"""Conversion of model configs between diffusers or transformers and our model descriptions.

Every field is either supported, or accepted at a single value, or listed as one that changes
nothing, or an error. A checkpoint that needs an unsupported feature is rejected by name and never
runs incorrectly.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from sprint_jax.errors import UserError
from sprint_jax.models.controlnet import ControlNet
from sprint_jax.models.dc_ae import DCAE, EFFICIENT_VIT, RESIDUAL, Stage
from sprint_jax.models.gemma2 import Gemma2
from sprint_jax.models.linear_dit import LinearDiT
from sprint_jax.storage import fields
from sprint_jax.storage.fields import Kind

_Known = Mapping[str, tuple[Any, Kind]]  # {field: (its default, what it may hold)}

# What diffusers and transformers note about a file, which changes nothing.
_NOTES = {
    name: fields.ANY
    for name in (
        "_class_name",
        "_diffusers_version",
        "_name_or_path",
        "_commit_hash",
        "_use_default_values",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_experts_implementation_internal",
    )
}
# Fields that every config of transformers may have. Most concern training, heads and generation,
# which are not used here.
TRANSFORMERS = (
    _NOTES
    | {
        name: fields.ANY
        for name in (
            "architectures",
            "attention_dropout",
            "bad_words_ids",
            "begin_suppress_tokens",
            "bos_token_id",
            "cache_implementation",
            "chunk_size_feed_forward",
            "cross_attention_hidden_size",
            "decoder_start_token_id",
            "diversity_penalty",
            "do_sample",
            "dtype",
            "early_stopping",
            "encoder_no_repeat_ngram_size",
            "eos_token_id",
            "exponential_decay_length_penalty",
            "finetuning_task",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "id2label",
            "initializer_factor",
            "initializer_range",
            "is_decoder",
            "label2id",
            "length_penalty",
            "max_length",
            "min_length",
            "no_repeat_ngram_size",
            "num_beam_groups",
            "num_beams",
            "num_return_sequences",
            "output_attentions",
            "output_hidden_states",
            "output_scores",
            "pad_token_id",
            "prefix",
            "problem_type",
            "remove_invalid_values",
            "repetition_penalty",
            "return_dict",
            "return_dict_in_generate",
            "sep_token_id",
            "suppress_tokens",
            "task_specific_params",
            "temperature",
            "tf_legacy_loss",
            "tie_encoder_decoder",
            "tie_word_embeddings",
            "tokenizer_class",
            "top_k",
            "top_p",
            "torch_dtype",
            "torchscript",
            "transformers_version",
            "typical_p",
            "unsloth_fixed",
            "unsloth_version",
            "use_bfloat16",
            "use_cache",
        )
    }
    | {
        "add_cross_attention": fields.only(False),
        "auto_map": fields.only(None),
        "is_encoder_decoder": fields.only(False),
        "pruned_heads": fields.only({}, None),
        "quantization_config": fields.only(None),
    }
)

RATIO = Kind("a number above 0 and at most 64", lambda v: fields.POSITIVE.accepts(v) and v <= 64)
# Versions of diffusers omit different keys. An absent key has the default of diffusers.
_TRANSFORMER: _Known = {
    "in_channels": (32, fields.SIZE),
    "out_channels": (32, fields.SIZE.or_null()),
    "num_attention_heads": (70, fields.SIZE),
    "attention_head_dim": (32, fields.SIZE),
    "num_layers": (20, fields.LAYERS),
    "num_cross_attention_heads": (20, fields.SIZE),
    "cross_attention_head_dim": (112, fields.SIZE),
    "cross_attention_dim": (2240, fields.SIZE),
    "caption_channels": (2304, fields.SIZE),
    "mlp_ratio": (2.5, RATIO),
    "dropout": (0.0, fields.NUMBER),
    "attention_bias": (False, fields.only(False)),
    "sample_size": (32, fields.SIZE.or_null()),
    "patch_size": (1, fields.only(1)),
    "norm_elementwise_affine": (False, fields.only(False)),
    "norm_eps": (1e-6, fields.only(1e-6)),
    "interpolation_scale": (None, fields.only(None)),
    "guidance_embeds": (False, fields.FLAG),
    "guidance_embeds_scale": (0.1, fields.NUMBER),
    "qk_norm": (None, fields.TEXT.or_null()),
    "timestep_scale": (1.0, fields.POSITIVE),
}
# diffusers' `SanaControlNetModel` has no QK-norm and receives times in [0, 1000]. Our ControlNet
# has a class name that diffusers does not know, so that neither is mistaken for the other.
_CONTROLNET: _Known = {
    k: v for k, v in _TRANSFORMER.items() if not k.startswith(("guidance_", "qk_", "timestep_"))
} | {"num_layers": (7, fields.LAYERS)}
_SPRINT_CONTROLNET: _Known = dict(_CONTROLNET) | {
    "qk_norm": ("rms_norm_across_heads", fields.TEXT.or_null()),
    "timestep_scale": (1.0, fields.POSITIVE),
}
_CONTROLNET_CLASS, _SPRINT_CONTROLNET_CLASS = "SanaControlNetModel", "SprintControlNetModel"

_QK_NORM = {"rms_norm_across_heads": True, None: False}

_SIZES, _COUNTS = fields.SIZE.many(), fields.LAYERS.many()
_BLOCKS = fields.only(RESIDUAL, EFFICIENT_VIT).or_many()
_SCALES = fields.ODD.many().many()
_AUTOENCODER: _Known = {
    "in_channels": (3, fields.only(3)),
    "latent_channels": (32, fields.SIZE),
    "attention_head_dim": (32, fields.SIZE),
    "encoder_block_types": (RESIDUAL, _BLOCKS),
    "decoder_block_types": (RESIDUAL, _BLOCKS),
    "encoder_block_out_channels": ([128, 256, 512, 512, 1024, 1024], _SIZES),
    "decoder_block_out_channels": ([128, 256, 512, 512, 1024, 1024], _SIZES),
    "encoder_layers_per_block": ([2, 2, 2, 3, 3, 3], _COUNTS),
    "decoder_layers_per_block": ([3, 3, 3, 3, 3, 3], _COUNTS),
    "encoder_qkv_multiscales": ([[], [], [], [5], [5], [5]], _SCALES),
    "decoder_qkv_multiscales": ([[], [], [], [5], [5], [5]], _SCALES),
    "upsample_block_type": ("pixel_shuffle", fields.only("interpolate")),
    "downsample_block_type": ("pixel_unshuffle", fields.only("Conv")),
    "decoder_norm_types": ("rms_norm", fields.only("rms_norm").or_many()),
    "decoder_act_fns": ("silu", fields.only("silu").or_many()),
    "encoder_out_shortcut": (True, fields.only(True)),
    "decoder_in_shortcut": (True, fields.only(True)),
    "decoder_conv_act_fn": ("relu", fields.only("relu")),
    "scaling_factor": (1.0, fields.POSITIVE),
}
_SCHEDULER = {"num_train_timesteps": 1000, "prediction_type": "trigflow", "sigma_data": 0.5}

_EVEN = Kind("an even number", lambda v: fields.SIZE.accepts(v) and v % 2 == 0)
_DEFAULT_ROPE = {"rope_type": fields.only("default"), "type": fields.only("default")}
_ROPE_PARAMETERS = _DEFAULT_ROPE | {
    "rope_theta": fields.POSITIVE,
    "partial_rotary_factor": fields.only(1.0, None),
}
_TEXT_ENCODER = TRANSFORMERS | {
    "attention_bias": fields.only(False),
    "attn_logit_softcapping": fields.POSITIVE,
    "final_logit_softcapping": fields.ANY,  # of a head, which is not used
    "head_dim": _EVEN,
    "hidden_act": fields.TEXT.or_null(),
    "hidden_activation": fields.TEXT.or_null(),
    "hidden_size": fields.SIZE,
    "intermediate_size": fields.SIZE,
    "is_causal": fields.only(True),
    "layer_types": fields.TEXT.many().or_null(),
    "max_position_embeddings": fields.SIZE,
    "model_type": fields.only("gemma2"),
    "num_attention_heads": fields.SIZE,
    "num_hidden_layers": fields.LAYERS,
    "num_key_value_heads": fields.SIZE,
    "partial_rotary_factor": fields.only(1.0, None),
    "query_pre_attn_scalar": fields.POSITIVE,
    "rms_norm_eps": fields.POSITIVE,
    "rope_parameters": fields.OBJECT.or_null(),
    "rope_scaling": fields.OBJECT.or_null(),
    "rope_theta": fields.POSITIVE,
    "sliding_window": fields.SIZE,
    "sliding_window_size": fields.ANY,  # of the first published files; transformers ignores it
    "use_bidirectional_attention": fields.only(False, None),
    "vocab_size": fields.SIZE,
}


def _fields(config: Mapping[str, Any], known: _Known, what: str) -> dict[str, Any]:
    """Fill defaults into a config. Raises UserError for an unsupported field or value.

    known: all supported fields.
    """
    kinds = _NOTES | {name: kind for name, (_, kind) in known.items()}
    defaults = {name: default for name, (default, _) in known.items()}
    fields.check(defaults | dict(config), kinds, f"the {what} config")
    return defaults | {name: value for name, value in config.items() if name in known}


def _check_class(config: Mapping[str, Any], expected: str, what: str) -> None:
    found = config.get("_class_name", expected)
    if found != expected:
        raise UserError(f"the {what} is a {fields.name(found)}; only {expected} is supported")


def transformer(config: Mapping[str, Any], dtype: str) -> LinearDiT:
    """Convert `transformer/config.json` of diffusers.

    dtype: of matrix products and of the residual stream. Raises UserError for an unsupported field.
    """
    what = "transformer"
    _check_class(config, "SanaTransformer2DModel", what)
    c = _fields(config, _TRANSFORMER, what)
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
            f"the transformer config has qk_norm={fields.shown(c['qk_norm'])}; only "
            "'rms_norm_across_heads' or null is supported"
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
        target_embed=False,
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
        c = _fields(config, _SPRINT_CONTROLNET, "ControlNet")
    else:
        _check_class(config, _CONTROLNET_CLASS, "ControlNet")
        c = _fields(config, _CONTROLNET, "ControlNet") | {
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
    """Convert back; the inverse of `transformer`. Raises UserError for a network that diffusers has
    no name for.
    """
    if m.target_embed:
        raise UserError(
            "diffusers has no network with a second time (model.target_embed): use "
            "sprint-jax export, or a student trained without it"
        )
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
    c = _fields(config, _AUTOENCODER, what)
    try:
        made = DCAE(
            in_channels=c["in_channels"],
            latent_channels=c["latent_channels"],
            head_dim=c["attention_head_dim"],
            encoder=_stages(c, "encoder"),
            decoder=_stages(c, "decoder"),
            scaling_factor=c["scaling_factor"],
        )
    except ValueError as error:
        raise UserError(f"the autoencoder config is not supported: {error}") from None
    _check_channels(made)
    return made


def _check_channels(m: DCAE) -> None:
    """Raise UserError for channels that the shortcuts or the heads do not divide."""
    for side, stages in (("encoder", m.encoder), ("decoder", m.decoder)):
        channels = [stage.channels for stage in stages]
        name = f"{side}_block_out_channels={fields.shown(channels)}"
        for fine, coarse in itertools.pairwise(channels):
            # A shortcut cuts 4 times the finer channels into groups, or repeats the coarser ones.
            if 4 * fine % coarse:
                raise UserError(
                    f"the autoencoder config has {name}: 4 x {fine} is no multiple of {coarse}, "
                    "which the shortcut needs"
                )
        if channels[-1] % m.latent_channels:
            raise UserError(
                f"the autoencoder config has {name} and latent_channels={m.latent_channels}: the "
                "last must be a multiple"
            )
        for stage in stages:
            if stage.block == EFFICIENT_VIT and stage.channels % m.head_dim:
                raise UserError(
                    f"the autoencoder config has {name} and attention_head_dim={m.head_dim}: the "
                    "channels of attention must be multiples"
                )


def _stages(config: Mapping[str, Any], side: str) -> tuple[Stage, ...]:
    """Return the stages of one side of an autoencoder. side: "encoder" or "decoder"."""
    channels = config[f"{side}_block_out_channels"]
    layers = config[f"{side}_layers_per_block"]
    blocks = _each(config[f"{side}_block_types"], len(channels))
    scales = config[f"{side}_qkv_multiscales"]
    columns = (channels, layers, blocks, scales)
    if len({len(column) for column in columns}) != 1 or not 1 <= len(channels) <= 16:
        names = ("block_out_channels", "layers_per_block", "block_types", "qkv_multiscales")
        lengths = zip(names, map(len, columns), strict=True)
        raise UserError(
            f"the autoencoder config has {', '.join(f'{n} {side}_{name}' for name, n in lengths)}: "
            "their lengths must be one number from 1 to 16"
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
    except ValueError as error:
        raise UserError(f"the text encoder config is not supported: {error}") from None


def _check_text_encoder(config: Mapping[str, Any]) -> None:
    """Raise UserError for a field of a text encoder that is not supported."""
    what = "the text encoder config"
    kind = config.get("model_type", "gemma2")
    if kind != "gemma2":
        raise UserError(f"the text encoder is a {fields.name(kind)}; only gemma2 is supported")
    fields.check(config, _TEXT_ENCODER, what)
    fields.check(config.get("rope_parameters") or {}, _ROPE_PARAMETERS, f"{what}: rope_parameters")
    fields.check(config.get("rope_scaling") or {}, _DEFAULT_ROPE, f"{what}: rope_scaling")
    activation = config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh"
    if activation != "gelu_pytorch_tanh":
        raise UserError(
            f"{what} has hidden_activation={fields.shown(activation)}; only 'gelu_pytorch_tanh' is "
            "supported"
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
            f"the scheduler is a {fields.name(found)}: this folder holds a multi-step SANA, not a "
            "SANA-Sprint (SCMScheduler)"
        )
    known = {name: (value, fields.only(value)) for name, value in _SCHEDULER.items()}
    _fields(config, known, "scheduler")


def scheduler_json() -> dict[str, Any]:
    """Return `scheduler/scheduler_config.json` of SANA-Sprint."""
    return {"_class_name": "SCMScheduler"} | _SCHEDULER

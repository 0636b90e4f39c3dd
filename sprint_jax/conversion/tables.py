"""Which tensor of a published checkpoint fills which of our parameters: one function per model and dialect."""

from sprint_jax.conversion.rules import Row
from sprint_jax.errors import UserError
from sprint_jax.models.controlnet import ControlNet
from sprint_jax.models.dc_ae import DCAE, EFFICIENT_VIT
from sprint_jax.models.gemma2 import Gemma2
from sprint_jax.models.linear_dit import LinearDiT


def _span(index, width):
    """Slice number `index` of `width` along the last axis."""
    return slice(index * width, (index + 1) * width)


def _linear(theirs, ours, fan_in, fan_out, bias=True):
    rows = [Row(f"{theirs}.weight", (fan_out, fan_in), f"{ours}.kernel", "dense")]
    return [*rows, Row(f"{theirs}.bias", (fan_out,), f"{ours}.bias")] if bias else rows


def transformer(m: LinearDiT) -> list[Row]:
    """diffusers' `SanaTransformer2DModel`. A model with a log-variance head must drop it first."""
    D, hidden = m.width, int(m.mlp_ratio * m.width)
    channels = m.in_channels * m.patch_size**2
    if m.patch_size != 1:
        raise UserError(
            f"a model with patch_size {m.patch_size}: the layout of diffusers has no patches larger than 1"
        )
    time = (
        "time_embed.timestep_embedder" if m.guidance_embed else "time_embed.emb.timestep_embedder"
    )
    rows = [
        *_inputs(m, time),
        Row("scale_shift_table", (2, D), "outputs.scale_shift_table"),
        *_linear("proj_out", "outputs.proj_out", D, channels),
    ]
    if m.guidance_embed:
        guidance = "time_embed.guidance_embedder"
        rows += _linear(f"{guidance}.linear_1", "inputs.guidance_embed.linear_1", 256, D)
        rows += _linear(f"{guidance}.linear_2", "inputs.guidance_embed.linear_2", D, D)
    for i in range(m.depth):
        rows += _transformer_block(m, i, D, hidden)
    return rows


def controlnet(m: ControlNet) -> list[Row]:
    """diffusers' `SanaControlNetModel`; with QK-norm the norms are named as in its transformer."""
    D = m.net.width
    rows = _inputs(m.net, "time_embed.emb.timestep_embedder") + _linear(
        "input_block", "zero_in", D, D
    )
    for i in range(m.depth):
        rows += _transformer_block(m.net, i, D, int(m.net.mlp_ratio * D))
        rows.append(Row(f"controlnet_blocks.{i}.weight", (D, D), "zero_out.kernel", "dense", (i,)))
        rows.append(Row(f"controlnet_blocks.{i}.bias", (D,), "zero_out.bias", "same", (i,)))
    return rows


def _inputs(m, time):
    """What transformer and ControlNet have before their blocks. time: where the first two layers for times are."""
    D, channels = m.width, m.in_channels * m.patch_size**2
    return [
        Row("patch_embed.proj.weight", (D, channels, 1, 1), "inputs.patch_embed.kernel", "conv1x1"),
        Row("patch_embed.proj.bias", (D,), "inputs.patch_embed.bias"),
        *_linear(f"{time}.linear_1", "inputs.time_embed.linear_1", 256, D),
        *_linear(f"{time}.linear_2", "inputs.time_embed.linear_2", D, D),
        *_linear("time_embed.linear", "inputs.time_proj", D, 6 * D),
        *_linear("caption_projection.linear_1", "inputs.caption.linear_1", m.text_dim, D),
        *_linear("caption_projection.linear_2", "inputs.caption.linear_2", D, D),
        Row("caption_norm.weight", (D,), "inputs.caption.norm.weight"),
    ]


def _transformer_block(m, i, D, hidden):
    block, at = f"transformer_blocks.{i}", (i,)
    rows = [Row(f"{block}.scale_shift_table", (6, D), "blocks.scale_shift_table", "same", at)]

    def row(theirs, shape, ours, layout="same", place=at):
        rows.append(Row(f"{block}.{theirs}", shape, f"blocks.{ours}", layout, place))

    for part, name in enumerate(("to_q", "to_k", "to_v")):
        qkv = (i, slice(None), _span(part, D))
        row(f"attn1.{name}.weight", (D, D), "attn1.to_qkv.kernel", "dense", qkv)
        row(f"attn2.{name}.weight", (D, D), f"attn2.{name}.kernel", "dense")
        row(f"attn2.{name}.bias", (D,), f"attn2.{name}.bias")
    for attention in ("attn1", "attn2"):
        row(f"{attention}.to_out.0.weight", (D, D), f"{attention}.to_out.kernel", "dense")
        row(f"{attention}.to_out.0.bias", (D,), f"{attention}.to_out.bias")
        if m.qk_norm:
            row(f"{attention}.norm_q.weight", (D,), f"{attention}.norm_q.weight")
            row(f"{attention}.norm_k.weight", (D,), f"{attention}.norm_k.weight")
    row("ff.conv_inverted.weight", (2 * hidden, D, 1, 1), "ff.conv_inverted.kernel", "conv1x1")
    row("ff.conv_inverted.bias", (2 * hidden,), "ff.conv_inverted.bias")
    row("ff.conv_depth.weight", (2 * hidden, 1, 3, 3), "ff.conv_depth_kernel", "depthwise")
    row("ff.conv_depth.bias", (2 * hidden,), "ff.conv_depth_bias")
    row("ff.conv_point.weight", (D, hidden, 1, 1), "ff.conv_point.kernel", "conv1x1")
    return rows


# Of the official repository's state, what inference has no use for.
NATIVE_DROPPED = (
    "logvar_linear.weight",
    "logvar_linear.bias",
    "y_embedder.y_embedding",
    "pos_embed",
)


def native_transformer(m: LinearDiT) -> list[Row]:
    """The official repository's names, q, k and v in one tensor as there. Leaves out NATIVE_DROPPED."""
    D, hidden = m.width, int(m.mlp_ratio * m.width)
    channels = m.in_channels * m.patch_size**2
    rows = [
        Row("x_embedder.proj.weight", (D, channels, 1, 1), "inputs.patch_embed.kernel", "conv1x1"),
        Row("x_embedder.proj.bias", (D,), "inputs.patch_embed.bias"),
        *_linear("t_embedder.mlp.0", "inputs.time_embed.linear_1", 256, D),
        *_linear("t_embedder.mlp.2", "inputs.time_embed.linear_2", D, D),
        *_linear("t_block.1", "inputs.time_proj", D, 6 * D),
        *_linear("y_embedder.y_proj.fc1", "inputs.caption.linear_1", m.text_dim, D),
        *_linear("y_embedder.y_proj.fc2", "inputs.caption.linear_2", D, D),
        Row("attention_y_norm.weight", (D,), "inputs.caption.norm.weight"),
        Row("final_layer.scale_shift_table", (2, D), "outputs.scale_shift_table"),
        *_linear("final_layer.linear", "outputs.proj_out", D, channels),
    ]
    if m.guidance_embed:
        rows += _linear("cfg_embedder.mlp.0", "inputs.guidance_embed.linear_1", 256, D)
        rows += _linear("cfg_embedder.mlp.2", "inputs.guidance_embed.linear_2", D, D)
    for i in range(m.depth):
        block, at = f"blocks.{i}", (i,)

        def row(theirs, shape, ours, layout="same", chunk=(0, 1)):
            rows.append(Row(f"{block}.{theirs}", shape, f"blocks.{ours}", layout, at, chunk=chunk))

        row("scale_shift_table", (6, D), "scale_shift_table")
        row("attn.qkv.weight", (3 * D, D), "attn1.to_qkv.kernel", "dense")
        row("attn.proj.weight", (D, D), "attn1.to_out.kernel", "dense")
        row("attn.proj.bias", (D,), "attn1.to_out.bias")
        row("cross_attn.q_linear.weight", (D, D), "attn2.to_q.kernel", "dense")
        row("cross_attn.q_linear.bias", (D,), "attn2.to_q.bias")
        for part, name in enumerate(("to_k", "to_v")):
            row(
                "cross_attn.kv_linear.weight",
                (2 * D, D),
                f"attn2.{name}.kernel",
                "dense",
                (part, 2),
            )
            row("cross_attn.kv_linear.bias", (2 * D,), f"attn2.{name}.bias", "same", (part, 2))
        row("cross_attn.proj.weight", (D, D), "attn2.to_out.kernel", "dense")
        row("cross_attn.proj.bias", (D,), "attn2.to_out.bias")
        if m.qk_norm:
            for theirs, ours in (("attn", "attn1"), ("cross_attn", "attn2")):
                row(f"{theirs}.q_norm.weight", (D,), f"{ours}.norm_q.weight")
                row(f"{theirs}.k_norm.weight", (D,), f"{ours}.norm_k.weight")
        row(
            "mlp.inverted_conv.conv.weight",
            (2 * hidden, D, 1, 1),
            "ff.conv_inverted.kernel",
            "conv1x1",
        )
        row("mlp.inverted_conv.conv.bias", (2 * hidden,), "ff.conv_inverted.bias")
        row(
            "mlp.depth_conv.conv.weight", (2 * hidden, 1, 3, 3), "ff.conv_depth_kernel", "depthwise"
        )
        row("mlp.depth_conv.conv.bias", (2 * hidden,), "ff.conv_depth_bias")
        row("mlp.point_conv.conv.weight", (D, hidden, 1, 1), "ff.conv_point.kernel", "conv1x1")
    return rows


def autoencoder(m: DCAE) -> list[Row]:
    """diffusers' `AutoencoderDC`."""
    rows = _conv("encoder.conv_in", "encoder.conv_in", m.in_channels, m.encoder[0].channels)
    last = m.encoder[-1].channels
    for i, stage in enumerate(m.encoder):
        theirs, ours = f"encoder.down_blocks.{i}", f"encoder.stage_{i}"
        for j in range(stage.layers):
            rows += _ae_block(m, stage, f"{theirs}.{j}", f"{ours}.block_{j}")
        if i + 1 < len(m.encoder):
            after = m.encoder[i + 1].channels
            rows += _conv(f"{theirs}.{stage.layers}.conv", f"{ours}.down", stage.channels, after)
    rows += _conv("encoder.conv_out", "encoder.conv_out", last, m.latent_channels)
    last = m.decoder[-1].channels
    rows += _conv("decoder.conv_in", "decoder.conv_in", m.latent_channels, last)
    for i, stage in enumerate(m.decoder):
        theirs, ours = f"decoder.up_blocks.{i}", f"decoder.stage_{i}"
        first = 0
        if i + 1 < len(m.decoder):
            rows += _conv(
                f"{theirs}.0.conv", f"{ours}.up", m.decoder[i + 1].channels, stage.channels
            )
            first = 1
        for j in range(stage.layers):
            rows += _ae_block(m, stage, f"{theirs}.{first + j}", f"{ours}.block_{j}")
    finest = m.decoder[0].channels
    rows += _norm("decoder.norm_out", "decoder.norm_out", finest)
    return rows + _conv("decoder.conv_out", "decoder.conv_out", finest, m.in_channels)


def _conv(theirs, ours, fan_in, fan_out, bias=True):
    rows = [Row(f"{theirs}.weight", (fan_out, fan_in, 3, 3), f"{ours}.kernel", "conv")]
    return [*rows, Row(f"{theirs}.bias", (fan_out,), f"{ours}.bias")] if bias else rows


def _norm(theirs, ours, width):
    return [Row(f"{theirs}.{name}", (width,), f"{ours}.{name}") for name in ("weight", "bias")]


def _ae_block(m, stage, theirs, ours):
    C, group = stage.channels, m.head_dim
    if stage.block != EFFICIENT_VIT:
        return (
            _conv(f"{theirs}.conv1", f"{ours}.conv1", C, C)
            + _conv(f"{theirs}.conv2", f"{ours}.conv2", C, C, bias=False)
            + _norm(f"{theirs}.norm", f"{ours}.norm", C)
        )
    rows = [
        Row(
            f"{theirs}.attn.{name}.weight",
            (C, C),
            f"{ours}.attn.to_qkv.kernel",
            "dense",
            (slice(None), _span(i, C)),
        )
        for i, name in enumerate(("to_q", "to_k", "to_v"))
    ]
    for i, size in enumerate(stage.scales):
        scale = f"{theirs}.attn.to_qkv_multiscale.{i}"
        rows += [
            Row(
                f"{scale}.proj_in.weight",
                (3 * C, 1, size, size),
                f"{ours}.attn.scale_{i}_depth",
                "depthwise",
            ),
            Row(
                f"{scale}.proj_out.weight",
                (3 * C, group, 1, 1),
                f"{ours}.attn.scale_{i}_point",
                "grouped",
            ),
        ]
    rows += _linear(
        f"{theirs}.attn.to_out", f"{ours}.attn.to_out", (1 + len(stage.scales)) * C, C, bias=False
    )
    rows += _norm(f"{theirs}.attn.norm_out", f"{ours}.attn.norm_out", C)
    ff, inner = f"{theirs}.conv_out", 8 * C
    return [
        *rows,
        Row(
            f"{ff}.conv_inverted.weight",
            (inner, C, 1, 1),
            f"{ours}.ff.conv_inverted.kernel",
            "conv1x1",
        ),
        Row(f"{ff}.conv_inverted.bias", (inner,), f"{ours}.ff.conv_inverted.bias"),
        Row(
            f"{ff}.conv_depth.weight", (inner, 1, 3, 3), f"{ours}.ff.conv_depth_kernel", "depthwise"
        ),
        Row(f"{ff}.conv_depth.bias", (inner,), f"{ours}.ff.conv_depth_bias"),
        Row(
            f"{ff}.conv_point.weight",
            (C, inner // 2, 1, 1),
            f"{ours}.ff.conv_point.kernel",
            "conv1x1",
        ),
        *_norm(f"{ff}.norm", f"{ours}.ff_norm", C),
    ]


def text_encoder(m: Gemma2) -> list[Row]:
    """transformers' `Gemma2Model`; names may carry the `model.` of a causal language model."""
    queries, keys = m.heads * m.head_dim, m.kv_heads * m.head_dim
    D = m.width

    def row(theirs, shape, ours, layout="same", place=()):
        return Row(theirs, shape, ours, layout, place, aliases=(f"model.{theirs}",))

    rows = [
        row("embed_tokens.weight", (m.vocab, D), "embed"),
        row("norm.weight", (D,), "norm"),
    ]
    dense = {
        "self_attn.q_proj": (queries, D, "q"), "self_attn.k_proj": (keys, D, "k"),
        "self_attn.v_proj": (keys, D, "v"), "self_attn.o_proj": (D, queries, "o"),
        "mlp.gate_proj": (m.hidden, D, "gate"), "mlp.up_proj": (m.hidden, D, "up"),
        "mlp.down_proj": (D, m.hidden, "down"),
    }  # fmt: skip
    norms = {
        "input_layernorm": "input_norm", "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "pre_feedforward_norm", "post_feedforward_layernorm": "post_feedforward_norm",
    }  # fmt: skip
    for i in range(m.depth):
        for name, (fan_out, fan_in, ours) in dense.items():
            rows.append(
                row(f"layers.{i}.{name}.weight", (fan_out, fan_in), f"layers.{ours}", "dense", (i,))
            )
        for name, ours in norms.items():
            rows.append(row(f"layers.{i}.{name}.weight", (D,), f"layers.{ours}", "same", (i,)))
    return rows

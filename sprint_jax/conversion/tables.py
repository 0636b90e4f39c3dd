"""Tables that map the tensors of published checkpoints to our parameters.

There is one function for each model and naming scheme.
"""

from sprint_jax.conversion.rules import Place, Row
from sprint_jax.errors import UserError
from sprint_jax.models.controlnet import ControlNet
from sprint_jax.models.dc_ae import DCAE, EFFICIENT_VIT, Stage
from sprint_jax.models.gemma2 import Gemma2
from sprint_jax.models.linear_dit import LinearDiT


def _span(index: int, width: int) -> slice:
    """Return slice number `index` of `width` elements."""
    return slice(index * width, (index + 1) * width)


def _linear(theirs: str, ours: str, fan_in: int, fan_out: int, bias: bool = True) -> list[Row]:
    rows = [Row(f"{theirs}.weight", (fan_out, fan_in), f"{ours}.kernel", "dense")]
    return [*rows, Row(f"{theirs}.bias", (fan_out,), f"{ours}.bias")] if bias else rows


def transformer(m: LinearDiT) -> list[Row]:
    """Return the table of diffusers' `SanaTransformer2DModel`.

    The model must not have a log-variance head. Raises UserError for a patch size above 1.
    """
    D, hidden = m.width, int(m.mlp_ratio * m.width)
    channels = m.in_channels * m.patch_size**2
    if m.patch_size != 1:
        raise UserError(
            f"a model with patch_size {m.patch_size}: the layout of diffusers has no patches "
            "larger than 1"
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
    """Return the table of diffusers' `SanaControlNetModel`.

    With QK-norm, which diffusers does not have here, the norms have the names of the transformer.
    """
    D = m.net.width
    rows = _inputs(m.net, "time_embed.emb.timestep_embedder") + _linear(
        "input_block", "zero_in", D, D
    )
    for i in range(m.depth):
        rows += _transformer_block(m.net, i, D, int(m.net.mlp_ratio * D))
        zero = f"controlnet_blocks.{i}"
        rows.append(Row(f"{zero}.weight", (D, D), "zero_out.kernel", "dense", place=(i,)))
        rows.append(Row(f"{zero}.bias", (D,), "zero_out.bias", place=(i,)))
    return rows


def _inputs(m: LinearDiT, time: str) -> list[Row]:
    """Return the rows before the blocks, shared by transformer and ControlNet.

    time: prefix of the time-embedding layers.
    """
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


def _transformer_block(m: LinearDiT, i: int, D: int, hidden: int) -> list[Row]:
    """Return the rows of block i. D: model width. hidden: gated width of the feed-forward."""
    rows = []

    def row(
        theirs: str, shape: tuple[int, ...], ours: str, layout: str = "same", place: Place = ()
    ) -> None:
        name = f"transformer_blocks.{i}.{theirs}"
        rows.append(Row(name, shape, f"blocks.{ours}", layout, place=(i, *place)))

    row("scale_shift_table", (6, D), "scale_shift_table")
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        columns = (slice(None), _span(part, D))
        row(f"attn1.{name}.weight", (D, D), "attn1.to_qkv.kernel", "dense", columns)
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


# Tensors of the official repository that inference does not use.
NATIVE_DROPPED = (
    "logvar_linear.weight",
    "logvar_linear.bias",
    "y_embedder.y_embedding",
    "pos_embed",
)


def native_transformer(m: LinearDiT) -> list[Row]:
    """Return the table of the official repository's names, without NATIVE_DROPPED."""
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
        rows += _native_block(m, i, D, hidden)
    return rows


def _native_block(m: LinearDiT, i: int, D: int, hidden: int) -> list[Row]:
    """Return the rows of block i under the native names. D, hidden: as in `_transformer_block`."""
    rows = []

    def row(
        theirs: str,
        shape: tuple[int, ...],
        ours: str,
        layout: str = "same",
        chunk: tuple[int, int] = (0, 1),
    ) -> None:
        name = f"blocks.{i}.{theirs}"
        rows.append(Row(name, shape, f"blocks.{ours}", layout, place=(i,), chunk=chunk))

    row("scale_shift_table", (6, D), "scale_shift_table")
    row("attn.qkv.weight", (3 * D, D), "attn1.to_qkv.kernel", "dense")
    row("attn.proj.weight", (D, D), "attn1.to_out.kernel", "dense")
    row("attn.proj.bias", (D,), "attn1.to_out.bias")
    row("cross_attn.q_linear.weight", (D, D), "attn2.to_q.kernel", "dense")
    row("cross_attn.q_linear.bias", (D,), "attn2.to_q.bias")
    for part, name in enumerate(("to_k", "to_v")):
        kv = "cross_attn.kv_linear"
        row(f"{kv}.weight", (2 * D, D), f"attn2.{name}.kernel", "dense", (part, 2))
        row(f"{kv}.bias", (2 * D,), f"attn2.{name}.bias", "same", (part, 2))
    row("cross_attn.proj.weight", (D, D), "attn2.to_out.kernel", "dense")
    row("cross_attn.proj.bias", (D,), "attn2.to_out.bias")
    if m.qk_norm:
        for theirs, ours in (("attn", "attn1"), ("cross_attn", "attn2")):
            row(f"{theirs}.q_norm.weight", (D,), f"{ours}.norm_q.weight")
            row(f"{theirs}.k_norm.weight", (D,), f"{ours}.norm_k.weight")
    inverted, depth, point = (f"mlp.{name}_conv.conv" for name in ("inverted", "depth", "point"))
    row(f"{inverted}.weight", (2 * hidden, D, 1, 1), "ff.conv_inverted.kernel", "conv1x1")
    row(f"{inverted}.bias", (2 * hidden,), "ff.conv_inverted.bias")
    row(f"{depth}.weight", (2 * hidden, 1, 3, 3), "ff.conv_depth_kernel", "depthwise")
    row(f"{depth}.bias", (2 * hidden,), "ff.conv_depth_bias")
    row(f"{point}.weight", (D, hidden, 1, 1), "ff.conv_point.kernel", "conv1x1")
    return rows


def autoencoder(m: DCAE) -> list[Row]:
    """Return the table of diffusers' `AutoencoderDC`."""
    rows = _conv("encoder.conv_in", "encoder.conv_in", m.in_channels, m.encoder[0].channels)
    last = m.encoder[-1].channels
    for i, stage in enumerate(m.encoder):
        theirs, ours = f"encoder.down_blocks.{i}", f"encoder.stage_{i}"
        for j in range(stage.layers):
            rows += _autoencoder_block(m, stage, f"{theirs}.{j}", f"{ours}.block_{j}")
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
            rows += _autoencoder_block(m, stage, f"{theirs}.{first + j}", f"{ours}.block_{j}")
    finest = m.decoder[0].channels
    rows += _norm("decoder.norm_out", "decoder.norm_out", finest)
    return rows + _conv("decoder.conv_out", "decoder.conv_out", finest, m.in_channels)


def _conv(theirs: str, ours: str, fan_in: int, fan_out: int, bias: bool = True) -> list[Row]:
    rows = [Row(f"{theirs}.weight", (fan_out, fan_in, 3, 3), f"{ours}.kernel", "conv")]
    return [*rows, Row(f"{theirs}.bias", (fan_out,), f"{ours}.bias")] if bias else rows


def _norm(theirs: str, ours: str, width: int) -> list[Row]:
    return [Row(f"{theirs}.{name}", (width,), f"{ours}.{name}") for name in ("weight", "bias")]


def _autoencoder_block(m: DCAE, stage: Stage, theirs: str, ours: str) -> list[Row]:
    C, group = stage.channels, m.head_dim
    if stage.block != EFFICIENT_VIT:
        return (
            _conv(f"{theirs}.conv1", f"{ours}.conv1", C, C)
            + _conv(f"{theirs}.conv2", f"{ours}.conv2", C, C, bias=False)
            + _norm(f"{theirs}.norm", f"{ours}.norm", C)
        )
    attn, our_attn, rows = f"{theirs}.attn", f"{ours}.attn", []
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        columns = (slice(None), _span(i, C))
        kernel = f"{our_attn}.to_qkv.kernel"
        rows.append(Row(f"{attn}.{name}.weight", (C, C), kernel, "dense", place=columns))
    for i, size in enumerate(stage.scales):
        scale, ours_i = f"{attn}.to_qkv_multiscale.{i}", f"{our_attn}.scale_{i}"
        depth, point = (3 * C, 1, size, size), (3 * C, group, 1, 1)
        rows.append(Row(f"{scale}.proj_in.weight", depth, f"{ours_i}_depth", "depthwise"))
        rows.append(Row(f"{scale}.proj_out.weight", point, f"{ours_i}_point", "grouped"))
    fan_in = (1 + len(stage.scales)) * C
    rows += _linear(f"{attn}.to_out", f"{our_attn}.to_out", fan_in, C, bias=False)
    rows += _norm(f"{attn}.norm_out", f"{our_attn}.norm_out", C)
    ff, our_ff, inner = f"{theirs}.conv_out", f"{ours}.ff", 8 * C
    inverted, depth, point = (f"{ff}.conv_{name}" for name in ("inverted", "depth", "point"))
    return [
        *rows,
        Row(f"{inverted}.weight", (inner, C, 1, 1), f"{our_ff}.conv_inverted.kernel", "conv1x1"),
        Row(f"{inverted}.bias", (inner,), f"{our_ff}.conv_inverted.bias"),
        Row(f"{depth}.weight", (inner, 1, 3, 3), f"{our_ff}.conv_depth_kernel", "depthwise"),
        Row(f"{depth}.bias", (inner,), f"{our_ff}.conv_depth_bias"),
        Row(f"{point}.weight", (C, inner // 2, 1, 1), f"{our_ff}.conv_point.kernel", "conv1x1"),
        *_norm(f"{ff}.norm", f"{ours}.ff_norm", C),
    ]


def text_encoder(m: Gemma2) -> list[Row]:
    """Return the table of transformers' `Gemma2Model`.

    Names may start with `model.`, as in a causal language model.
    """
    queries, keys = m.heads * m.head_dim, m.kv_heads * m.head_dim
    D = m.width

    def row(
        theirs: str, shape: tuple[int, ...], ours: str, layout: str = "same", place: Place = ()
    ) -> Row:
        return Row(theirs, shape, ours, layout, place=place, aliases=(f"model.{theirs}",))

    rows = [
        row("embed_tokens.weight", (m.vocab, D), "embed"),
        row("norm.weight", (D,), "norm"),
    ]
    dense = {
        "self_attn.q_proj": ("q", queries, D),
        "self_attn.k_proj": ("k", keys, D),
        "self_attn.v_proj": ("v", keys, D),
        "self_attn.o_proj": ("o", D, queries),
        "mlp.gate_proj": ("gate", m.hidden, D),
        "mlp.up_proj": ("up", m.hidden, D),
        "mlp.down_proj": ("down", D, m.hidden),
    }
    norms = {
        "input_layernorm": "input_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "pre_feedforward_norm",
        "post_feedforward_layernorm": "post_feedforward_norm",
    }
    for i in range(m.depth):
        for name, (ours, *shape) in dense.items():
            theirs = f"layers.{i}.{name}.weight"
            rows.append(row(theirs, tuple(shape), f"layers.{ours}", "dense", (i,)))
        for name, ours in norms.items():
            rows.append(row(f"layers.{i}.{name}.weight", (D,), f"layers.{ours}", "same", (i,)))
    return rows

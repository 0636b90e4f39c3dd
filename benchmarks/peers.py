"""The published models in PyTorch (diffusers, transformers) with our weights, inputs and device.

`benchmarks` imports this module if PyTorch is installed. Functions named like our subjects return
a `timing.Program`. They try both memory formats of PyTorch and time the faster one.
"""

# The types of these libraries are incomplete.
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAssignmentType=false

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from torch import nn

from benchmarks.harness import bench as bench_lib
from benchmarks.harness import machine, timing
from sprint_jax.conversion import tables
from sprint_jax.models.dc_ae import DCAE
from sprint_jax.models.gemma2 import Gemma2
from sprint_jax.models.linear_dit import LinearDiT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device(bench: bench_lib.Bench) -> torch.device:
    """Return the device on which JAX computes.

    Raises:
      NoPeer: if PyTorch cannot use it.
    """
    if bench.on_cpu:
        torch.set_num_threads(machine.threads())
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise bench_lib.NoPeer("no peer: this PyTorch has no CUDA")
    # JAX's defaults: float32 products in TF32, the fastest of several algorithms of convolution.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda")


def tensor(array: Any, device: torch.device) -> torch.Tensor:
    """Copy a JAX or NumPy array to a tensor."""
    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def nchw(array: Any, device: torch.device) -> torch.Tensor:
    """Copy an NHWC array to an NCHW tensor."""
    return tensor(np.moveaxis(np.asarray(array), -1, 1), device)


def numpy_nhwc(x: torch.Tensor) -> np.ndarray:
    """Copy an NCHW tensor to a float32 NHWC array."""
    return np.moveaxis(x.detach().float().cpu().numpy(), 1, -1)


def split_text_projections(blocks: list[Any], fused: Mapping[str, jax.Array]) -> list[Any]:
    """Invert `layers.fuse_text_projections` and return a list of whole blocks."""
    names = ("to_k", "to_v")
    parts = {leaf: iter(jnp.split(a, len(names) * len(blocks), -1)) for leaf, a in fused.items()}
    own = [{name: {leaf: next(a) for leaf, a in parts.items()} for name in names} for _ in blocks]
    return [block | {"attn2": block["attn2"] | its} for block, its in zip(blocks, own, strict=True)]


def filled(
    module: nn.Module, table: Sequence[Any], params: Any, device: torch.device, prefix: str = ""
) -> nn.Module:
    """Fill a module created on the meta device with our parameters, one tensor at a time.

    Args:
      module: the module.
      table: rows of its conversion.
      params: blocks stacked or as a list.
      device: of the tensors.
      prefix: fill only names that begin with it.

    Raises:
      ValueError: if a weight is missing or unexpected.
    """
    if "text" in params:
        params = params | {"blocks": split_text_projections(params["blocks"], params["text"])}
    table = [row for row in table if row.theirs.startswith(prefix)]
    state = {
        row.theirs: tensor(row.to_theirs(np.asarray(_place(params, row))), device) for row in table
    }
    missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
    absent = [name for name in missing if name.startswith(prefix)]
    if absent or unexpected:
        raise ValueError(f"weights do not fill the module: {[*absent, *unexpected][:3]}")
    return module.eval().requires_grad_(False)


def _place(params, row):
    """Return the part of our parameters that a row of a conversion table names."""
    node, place = params, row.place
    for name in row.ours.split("."):
        if isinstance(node, list):  # a list of blocks: the first index selects one
            node, place = node[place[0]], place[1:]
        node = node[name]
    return node[place]


def sana(model: LinearDiT, **changes: Any) -> nn.Module:
    """Create diffusers' transformer of our description, without weights."""
    fields = dict(
        in_channels=model.in_channels,
        out_channels=model.in_channels,
        num_attention_heads=model.heads,
        attention_head_dim=model.width // model.heads,
        num_layers=model.depth,
        num_cross_attention_heads=model.cross_heads,
        cross_attention_head_dim=model.width // model.cross_heads,
        cross_attention_dim=model.width,
        caption_channels=model.text_dim,
        mlp_ratio=model.mlp_ratio,
        guidance_embeds=model.guidance_embed,
        guidance_embeds_scale=model.guidance_scale_factor,
        qk_norm="rms_norm_across_heads" if model.qk_norm else None,
        interpolation_scale=None,
    )
    with torch.device("meta"):
        return diffusers.SanaTransformer2DModel(**fields | changes)


def autoencoder(model: DCAE) -> Any:
    """Create diffusers' DC-AE of our description, without weights."""
    lists = {}
    for part, stages in (("encoder", model.encoder), ("decoder", model.decoder)):
        lists |= {
            f"{part}_block_types": [s.block for s in stages],
            f"{part}_block_out_channels": [s.channels for s in stages],
            f"{part}_layers_per_block": [s.layers for s in stages],
            f"{part}_qkv_multiscales": [list(s.scales) for s in stages],
        }
    with torch.device("meta"):
        return diffusers.AutoencoderDC(
            in_channels=model.in_channels,
            latent_channels=model.latent_channels,
            attention_head_dim=model.head_dim,
            upsample_block_type="interpolate",
            downsample_block_type="Conv",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=model.scaling_factor,
            **lists,
        )


def waiting(on: torch.device) -> Callable[[Any], None]:
    """Return a function that waits for a result on a device."""
    return (lambda result: None) if on.type == "cpu" else (lambda result: torch.cuda.synchronize())


def inferring(function: Callable) -> Callable:
    """Run a function in PyTorch's inference mode."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.inference_mode():
            return function(*args, **kwargs)

    return run


def seconds(start: Callable[[], Any], wait: Callable[[Any], None]) -> float:
    """Return the seconds of one call, its result included."""
    begin = time.perf_counter()
    wait(start())
    return time.perf_counter() - begin


def in_faster_format(
    module: nn.Module, start: Callable[[], Any], wait: Callable[[Any], None]
) -> str:
    """Bring a module into the memory format in which `start` is faster, and return a note.

    Each format is timed once, after a first run in it.
    """
    formats = (torch.contiguous_format, torch.channels_last)
    times = []
    for memory_format in formats:
        module.to(memory_format=memory_format)
        wait(start())
        times.append(seconds(start, wait))
    faster = int(np.argmin(times))
    module.to(memory_format=formats[faster])
    return f"{('contiguous', 'channels last')[faster]} weights in PyTorch"


def _transformer(bench, model, params, on):
    make = lambda: filled(sana(model), tables.transformer(model), params, on)
    return bench.kept("their transformer", model, make)


def transformer(
    bench: bench_lib.Bench,
    model: LinearDiT,
    params: Any,
    arrays: Mapping[str, Any],
    *,
    compiled: bool,
) -> timing.Program:
    """Return one call of `SanaTransformer2DModel`.

    params: ours. arrays: x (NHWC), t, text, mask and guidance. compiled: by torch.compile.
    """
    on, dtype = device(bench), DTYPES[model.dtype]
    module = _transformer(bench, model, params, on)
    x, text = nchw(arrays["x"], on).to(dtype), tensor(arrays["text"], on).to(dtype)
    t, mask = tensor(arrays["t"], on), tensor(arrays["mask"], on).to(dtype)
    options = {"encoder_attention_mask": mask, "return_dict": False}
    if arrays["guidance"] is not None:
        guidance = tensor(arrays["guidance"], on) * model.guidance_scale_factor
        options["guidance"] = guidance.to(dtype)
    run = torch.compile(module) if compiled else module
    start = inferring(lambda: run(x, text, t, **options)[0])
    note = None if compiled else in_faster_format(module, start, waiting(on))
    return timing.Program({"": timing.Call(start, waiting(on))}, lambda: numpy_nhwc(start()), note)


def _decoder(bench, model, params, on):
    make = lambda: filled(
        autoencoder(model), tables.autoencoder(model), params, on, prefix="decoder."
    )
    key = model, np.dtype(jax.tree.leaves(params)[0].dtype).name
    return bench.kept("their decoder", key, make)


def decoder(
    bench: bench_lib.Bench, model: DCAE, params: Any, z: Any, *, compiled: bool
) -> timing.Program:
    """Return one decoding by `AutoencoderDC`.

    params: ours, {"decoder"}. z: NHWC latents in the dtype of the weights. compiled: by
    torch.compile.
    """
    on = device(bench)
    module = _decoder(bench, model, params, on)
    latents = nchw(z, on)
    run = torch.compile(module.decoder) if compiled else module.decoder
    start = inferring(lambda: run(latents))
    note = None if compiled else in_faster_format(module.decoder, start, waiting(on))
    return timing.Program({"": timing.Call(start, waiting(on))}, lambda: numpy_nhwc(start()), note)


def gemma(model: Gemma2, params: Any, on: torch.device) -> Any:
    """Create transformers' Gemma-2 with our parameters.

    It uses eager attention, the only one that has the soft cap on every device.
    """
    dtype = DTYPES[np.dtype(jax.tree.leaves(params)[0].dtype).name]
    config = transformers.Gemma2Config(
        vocab_size=model.vocab,
        hidden_size=model.width,
        intermediate_size=model.hidden,
        num_hidden_layers=model.depth,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        query_pre_attn_scalar=int(model.query_scalar),
        sliding_window=model.window,
        attn_logit_softcapping=model.softcap,
        rms_norm_eps=model.eps,
        rope_theta=model.theta,
        attn_implementation="eager",
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    with torch.device(on):  # not on meta: its rotary table is not a weight
        module = transformers.Gemma2Model(config).to(dtype)
    return filled(module, tables.text_encoder(model), params, on)


def _by_layer(module: Any, layers: Any) -> Any:
    """Copy a module and compile some of its layers, one program for similar ones.

    Layers compile in place, and the module itself is timed too, hence the copy. torch.compile takes
    minutes for whole networks of 26 or 28 layers.
    """
    places = [name for name, one in module.named_modules() if any(one is layer for layer in layers)]
    module = copy.deepcopy(module)
    for place in places:
        module.get_submodule(place).compile()
    return module


def picture(
    bench: bench_lib.Bench,
    text: tuple[Gemma2, Any],
    transformer: tuple[LinearDiT, Any],
    autoencoder: tuple[DCAE, Any],
    inputs: Mapping[str, Any],
    *,
    published_tokens: int,
    compiled: bool,
) -> timing.Program:
    """Return prompts to pixels as `SanaSprintPipeline` does, without checks and progress bars.

    Args:
      bench: the run.
      text, transformer, autoencoder: our description and our parameters.
      inputs: instruction, tokens [P]; prompts, tokens [B, T] without padding; draws
        [steps, B, h, w, c]; times, steps + 1 angles.
      published_tokens: length to which the text is padded.
      compiled: by torch.compile, transformer and text encoder layer by layer, the decoder whole.
    """
    on = device(bench)
    model, dtype = transformer[0], DTYPES[transformer[0].dtype]
    encoder = bench.kept("their text", text[0], lambda: gemma(*text, on))
    network = _transformer(bench, model, transformer[1], on)
    vae = _decoder(bench, *autoencoder, on)
    ids, mask = _padded(inputs["instruction"], inputs["prompts"], published_tokens)
    selected = [0, *range(ids.shape[1] - published_tokens + 1, ids.shape[1])]
    ids, mask = tensor(ids, on), tensor(mask, on)
    batch = len(ids)
    guidance = torch.full((batch,), 4.5 * model.guidance_scale_factor, device=on, dtype=dtype)
    run_network = _by_layer(network, network.transformer_blocks) if compiled else network
    run_decoder = torch.compile(vae.decoder) if compiled else vae.decoder
    run_encoder = _by_layer(encoder, encoder.layers) if compiled else encoder
    noises = [nchw(draw, on) for draw in np.asarray(inputs["draws"])]
    angles = torch.tensor(np.asarray(inputs["times"]), device=on)

    def velocity(x, time, features, features_mask):
        return run_network(
            x.to(dtype),
            features,
            time.expand(batch).to(dtype),
            guidance=guidance,
            encoder_attention_mask=features_mask,
            return_dict=False,
        )[0].float()

    # A prompt that is read once needs no cache of keys, and with one the compiled layers would
    # differ by their place in it.
    def start():
        features = run_encoder(ids, attention_mask=mask, use_cache=False)[0][:, selected].to(dtype)
        features_mask = mask[:, selected].to(dtype)
        clean = _sample(lambda *xt: velocity(*xt, features, features_mask), noises, angles)
        pixels = run_decoder(clean.to(dtype) / autoencoder[0].scaling_factor)
        return (255 * (pixels.float() * 0.5 + 0.5).clamp(0, 1)).round().to(torch.uint8)

    start, note = inferring(start), None
    if not compiled:
        modules = ("transformer", network), ("decoder", vae.decoder)
        notes = (f"{name}: {in_faster_format(m, start, waiting(on))}" for name, m in modules)
        note = "; ".join(notes)
    return timing.Program({"": timing.Call(start, waiting(on))}, lambda: numpy_nhwc(start()), note)


def _padded(
    instruction: np.ndarray, prompts: np.ndarray, published_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and their mask, the instruction first, padded to the published length."""
    (batch, length), begin = prompts.shape, len(instruction)
    ids = np.zeros((batch, begin + published_tokens - 1), np.int64)
    ids[:, :begin] = instruction
    ids[:, begin : begin + length] = prompts
    mask = np.zeros_like(ids)
    mask[:, : begin + length] = 1
    return ids, mask


def _sample(
    velocity: Callable, noises: Sequence[torch.Tensor], angles: torch.Tensor
) -> torch.Tensor:
    """Run the few-step sampler of a flow network (x, t) -> v. Returns latents at unit scale."""
    sigma = 0.5
    x = clean = sigma * noises[0]
    for i in range(len(angles) - 1):
        s, t = angles[i], angles[i + 1]
        time = torch.sin(s) / (torch.cos(s) + torch.sin(s))
        norm = torch.sqrt(time**2 + (1 - time) ** 2)
        u = x / sigma * norm
        F = ((1 - 2 * time) * u + (1 - 2 * time + 2 * time**2) * velocity(u, time)) / norm
        clean = torch.cos(s) * x - torch.sin(s) * sigma * F
        if i + 1 < len(noises):
            x = torch.cos(t) * clean + torch.sin(t) * sigma * noises[i + 1]
    return clean / sigma

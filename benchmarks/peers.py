"""The published models in PyTorch (diffusers, transformers) beside ours: same weights, same inputs, same device.

Imported by `benchmarks` where PyTorch is installed. Each function returns a `timing.Program`. PyTorch
may choose: memory formats are tried, and the faster one is timed.
"""

import copy
import functools
import time

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks.harness import bench as bench_lib
from benchmarks.harness import machine, timing
from sprint_jax.conversion import tables

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device(bench):
    """Where JAX computes. Raises NoPeer where PyTorch cannot."""
    if bench.on_cpu:
        torch.set_num_threads(machine.threads())
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise bench_lib.NoPeer("no peer: this PyTorch has no CUDA")
    # What JAX does unasked: float32 products in TF32, convolutions by the fastest of several algorithms.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda")


def tensor(array, device):
    """A JAX or NumPy array as a tensor of its own."""
    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def nchw(array, device):
    return tensor(np.moveaxis(np.asarray(array), -1, 1), device)


def numpy_nhwc(x):
    return np.moveaxis(x.detach().float().cpu().numpy(), 1, -1)


def split_text_projections(blocks, fused):
    """Invert `layers.fuse_text_projections` and return a list of whole blocks."""
    names = ("to_k", "to_v")
    parts = {leaf: iter(jnp.split(a, len(names) * len(blocks), -1)) for leaf, a in fused.items()}
    own = [{name: {leaf: next(a) for leaf, a in parts.items()} for name in names} for _ in blocks]
    return [block | {"attn2": block["attn2"] | its} for block, its in zip(blocks, own, strict=True)]


def filled(module, table, params, device, prefix=""):
    """A module made on the meta device, with our parameters in it; only names below `prefix` are filled.

    params: blocks stacked or as a list. One tensor at a time: a second copy of the whole tree is not needed.
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
    """The part of our parameters that a row of a conversion table names."""
    node, place = params, row.place
    for name in row.ours.split("."):
        if isinstance(node, list):  # blocks one by one: the first index says which
            node, place = node[place[0]], place[1:]
        node = node[name]
    return node[place]


def sana(model, **changes):
    """diffusers' transformer of our description, without weights."""
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


def autoencoder(model):
    """diffusers' DC-AE of our description, without weights."""
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


def _wait(on):
    return (lambda result: None) if on.type == "cpu" else (lambda result: torch.cuda.synchronize())


def inferring(function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.inference_mode():
            return function(*args, **kwargs)

    return run


def seconds(start, wait):
    """What one call takes, its result included."""
    begin = time.perf_counter()
    wait(start())
    return time.perf_counter() - begin


def in_faster_format(module, start, wait):
    """Puts the module in the memory format in which `start` takes less time, by one run of each after a first in that format."""
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


def transformer(bench, model, params, arrays, *, compiled):
    """One call of `SanaTransformer2DModel`. params: ours. arrays: x NHWC, t, text, mask, guidance."""
    on, dtype = device(bench), DTYPES[model.dtype]
    module = _transformer(bench, model, params, on)
    x, text = nchw(arrays["x"], on).to(dtype), tensor(arrays["text"], on).to(dtype)
    t, mask = tensor(arrays["t"], on), tensor(arrays["mask"], on).to(dtype)
    options = {"encoder_attention_mask": mask, "return_dict": False}
    if arrays["guidance"] is not None:
        options["guidance"] = (tensor(arrays["guidance"], on) * model.guidance_scale_factor).to(
            dtype
        )
    run = torch.compile(module) if compiled else module
    start = inferring(lambda: run(x, text, t, **options)[0])
    note = None if compiled else in_faster_format(module, start, _wait(on))
    return timing.Program({"": timing.Call(start, _wait(on))}, lambda: numpy_nhwc(start()), note)


def _decoder(bench, model, params, on):
    make = lambda: filled(
        autoencoder(model), tables.autoencoder(model), params, on, prefix="decoder."
    )
    key = model, np.dtype(jax.tree.leaves(params)[0].dtype).name
    return bench.kept("their decoder", key, make)


def decoder(bench, model, params, z, *, compiled):
    """One decoding by `AutoencoderDC`. params: ours, {"decoder"}. z: latents NHWC in the dtype of the weights."""
    on = device(bench)
    module = _decoder(bench, model, params, on)
    latents = nchw(z, on)
    run = torch.compile(module.decoder) if compiled else module.decoder
    start = inferring(lambda: run(latents))
    note = None if compiled else in_faster_format(module.decoder, start, _wait(on))
    return timing.Program({"": timing.Call(start, _wait(on))}, lambda: numpy_nhwc(start()), note)


def gemma(model, params, on):
    """transformers' Gemma-2 with our parameters, and eager attention: the only one with its soft cap on any device."""
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
    with torch.device(on):  # not on meta: its rotary table is no weight
        module = transformers.Gemma2Model(config).to(dtype)
    return filled(module, tables.text_encoder(model), params, on)


def _by_layer(module, layers):
    """The module with these layers of it compiled, one program for all that are alike ("regional compilation").

    A copy: the layers compile in place, and the module itself is timed as it is. Whole networks of 26 and 28 layers take
    torch.compile minutes each.
    """
    places = [name for name, one in module.named_modules() if any(one is layer for layer in layers)]
    module = copy.deepcopy(module)
    for place in places:
        module.get_submodule(place).compile()
    return module


def picture(
    bench,
    text,
    transformer,
    autoencoder,
    instruction,
    prompts,
    draws,
    times,
    *,
    published_tokens,
    compiled,
):
    """Prompts to pixels as `SanaSprintPipeline` goes, without its checks and progress bars.

    text, transformer, autoencoder: (our description, our parameters). instruction: tokens [P]. prompts: tokens [B, T],
    none of them padding. draws: [steps, B, h, w, c]. times: angles, steps + 1. published_tokens: length that the
    text is padded to. compiled: by torch.compile, transformer and text encoder layer by layer, the decoder whole.
    """
    on = device(bench)
    model, dtype = transformer[0], DTYPES[transformer[0].dtype]
    encoder = bench.kept("their text", text[0], lambda: gemma(*text, on))
    network = _transformer(bench, model, transformer[1], on)
    vae = _decoder(bench, *autoencoder, on)
    scaling = autoencoder[0].scaling_factor
    batch, length = prompts.shape
    ids = np.zeros((batch, len(instruction) + published_tokens - 1), np.int64)
    ids[:, : len(instruction)] = instruction
    ids[:, len(instruction) : len(instruction) + length] = prompts
    mask = np.zeros_like(ids)
    mask[:, : len(instruction) + length] = 1
    ids, mask = tensor(ids, on), tensor(mask, on)
    kept = [0, *range(ids.shape[1] - published_tokens + 1, ids.shape[1])]
    noises = [nchw(draw, on) for draw in np.asarray(draws)]
    guidance = torch.full((batch,), 4.5 * model.guidance_scale_factor, device=on, dtype=dtype)
    angles = torch.tensor(np.asarray(times), device=on)
    sigma = 0.5
    run_network = _by_layer(network, network.transformer_blocks) if compiled else network
    run_decoder = torch.compile(vae.decoder) if compiled else vae.decoder
    run_encoder = _by_layer(encoder, encoder.layers) if compiled else encoder

    # Without a cache of keys, which a prompt that is read once has no use for: compiled layers would differ by their place in it.
    def start():
        features = run_encoder(ids, attention_mask=mask, use_cache=False)[0][:, kept].to(dtype)
        features_mask = mask[:, kept].to(dtype)
        x = sigma * noises[0]
        for i in range(len(angles) - 1):
            s, t = angles[i], angles[i + 1]
            time = torch.sin(s) / (torch.cos(s) + torch.sin(s))
            norm = torch.sqrt(time**2 + (1 - time) ** 2)
            inputs = x / sigma * norm
            velocity = run_network(
                inputs.to(dtype),
                features,
                time.expand(batch).to(dtype),
                guidance=guidance,
                encoder_attention_mask=features_mask,
                return_dict=False,
            )[0].float()
            F = ((1 - 2 * time) * inputs + (1 - 2 * time + 2 * time**2) * velocity) / norm
            clean = torch.cos(s) * x - torch.sin(s) * sigma * F
            if i + 1 < len(noises):
                x = torch.cos(t) * clean + torch.sin(t) * sigma * noises[i + 1]
        pixels = run_decoder((clean / sigma).to(dtype) / scaling)
        return (255 * (pixels.float() * 0.5 + 0.5).clamp(0, 1)).round().to(torch.uint8)

    start = inferring(start)
    # The compiled copies were made of modules whose format had been chosen by then.
    note = (
        None
        if compiled
        else "; ".join(
            f"{name}: {in_faster_format(one, start, _wait(on))}"
            for name, one in (("transformer", network), ("decoder", vae.decoder))
        )
    )
    return timing.Program({"": timing.Call(start, _wait(on))}, lambda: numpy_nhwc(start()), note)

"""Our side of each comparison: models of published sizes with random weights, drawn on the device.

Every parameter is moved off its initial value, so that zeros and ones do not make a comparison
easy.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import bench as bench_lib
from benchmarks.harness import floors
from sprint_jax.diffusion import samplers
from sprint_jax.encoders import pixels as pixel_codecs
from sprint_jax.encoders import text as text_encoders
from sprint_jax.models.controlnet import Controlled, ControlNet
from sprint_jax.models.dc_ae import DCAE
from sprint_jax.models.gemma2 import Gemma2
from sprint_jax.models.linear_dit import LinearDiT
from sprint_jax.ops import backend as backends
from sprint_jax.ops import cross_attention as cross
from sprint_jax.ops import linear_attention as linear
from sprint_jax.sampling import programs

TEXT_TOKENS = 300  # published length of the text features
# Published prompts follow an instruction of about 200 tokens. A prompt of about twenty words fits
# the bucket of 32 tokens.
PREFIX_TOKENS, PROMPT_TOKENS = 200, 32
_KERNEL_SECONDS = 0.05


def drawn(model: Any, dtype: str, seed: int = 0, part: str | None = None) -> Any:
    """Draw parameters of a model, or of one part of it, on the device, one array at a time.

    One program for all of them, such as `init`, needs several times their memory.
    """
    abstract = jax.eval_shape(model.init, jax.random.key(seed))
    abstract = abstract if part is None else {part: abstract[part]}
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [
        _leaf(key, str(path[-1].key), a.shape, dtype)
        for key, (path, a) in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, made)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _leaf(key, name, shape, dtype):
    """Draw norm weights near 1, vectors near 0, and kernels that preserve the input's scale."""
    noise = jax.random.normal(key, shape)
    if name == "weight":
        return (1 + 0.1 * noise).astype(dtype)
    fan_in = 1 if len(shape) < 2 else math.prod(shape[:-1]) if len(shape) == 4 else shape[-2]
    return (noise * (0.1 if len(shape) < 2 else fan_in**-0.5)).astype(dtype)


def inference(model: LinearDiT, dtype: str, attention: str | None = None) -> LinearDiT:
    """Return the description as a pipeline runs it. attention: see `_by_kernels`."""
    model = dataclasses.replace(
        model, logvar_head=False, remat="none", dtype=dtype, residual_dtype=dtype
    )
    return _by_kernels(
        model, attention, model.width // model.heads, model.width // model.cross_heads, dtype
    )


def _by_kernels(model, attention, linear, cross, dtype):
    """Return a transformer or autoencoder with a backend of attention.

    attention: a backend, "plain" for no kernels at all, or None for the default of `loading.load`.
    linear, cross: channels of a head of each attention, or None.
    """
    here = jax.default_backend()
    attention = attention or backends.resolve(backends.fastest(here), here, linear, cross, dtype)[0]
    return dataclasses.replace(
        model, attention=attention, depthwise=backends.depthwise(here, attention)
    )


def _described(model):
    """Return the part of a description that parameters depend on."""
    return dataclasses.replace(model, attention="plain", depthwise="plain")


def _normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def _transformer(bench, model, unrolled=None):
    """Return parameters as they are run.

    unrolled: a list of blocks instead of a stack; None as in `loading.load`.
    """
    unrolled = "transformer" in backends.unrolled(None) if unrolled is None else unrolled

    def make():
        params = drawn(model, model.dtype)
        return model.unstack(params) if unrolled else params

    return bench.kept("transformer", (_described(model), unrolled), make)


def _text(model, dtype):
    params = drawn(model, dtype)
    return model.unstack(params) if "text_encoder" in backends.unrolled(None) else params


def _itemsize(dtype):
    return jnp.dtype(dtype).itemsize


def transformer(
    bench: bench_lib.Bench,
    size: LinearDiT,
    cells: int,
    *,
    dtype: str,
    batch: int = 1,
    tokens: int = TEXT_TOKENS,
    compile_peer: bool = False,
    attention: str | None = None,
    unrolled: bool | None = None,
) -> bench_lib.Subject:
    """Build the subject of one call of the transformer on cells x cells latents.

    attention: see `_by_kernels`. unrolled: see `_transformer`. With either it has no peer; compare
    its row with the default one.
    """
    model = inference(size, dtype, attention)
    params = _transformer(bench, model, unrolled)
    x = _normal(1, (batch, cells, cells, model.in_channels))
    text = _normal(2, (batch, tokens, model.text_dim), dtype)
    mask, t, w = jnp.ones((batch, tokens)), jnp.full((batch,), 0.7), jnp.full((batch,), 4.5)
    run = lambda params, *args: model.apply(params, *args).velocity
    program, seconds = bench_lib.compiled(run, params, x, t, text, mask, w)
    arrays = dict(x=x, t=t, text=text, mask=mask, guidance=w)

    def peer(compiled):
        return bench.peers("peers").transformer(bench, model, params, arrays, compiled=compiled)

    work = floors.transformer(model, cells * cells, tokens, batch=batch, itemsize=_itemsize(dtype))
    alone = attention is not None or unrolled is not None
    return bench_lib.Subject(
        program=bench_lib.program(program, params, x, t, text, mask, w),
        compile_s=seconds,
        dtype=dtype,
        work=work,
        peers=() if alone else _peers("diffusers", peer, compile_peer),
    )


def _peers(label: str, build: Callable, compile_peer: bool) -> bench_lib.Peers:
    """Return the eager peer and, if wanted, the compiled one. build: compiled -> program."""
    eager = (label, functools.partial(build, False))
    compiled = (f"{label}, torch.compile", functools.partial(build, True))
    return (eager, compiled) if compile_peer else (eager,)


def decoder(
    bench: bench_lib.Bench,
    model: DCAE,
    cells: int,
    *,
    dtype: str,
    batch: int = 1,
    compile_peer: bool = False,
) -> bench_lib.Subject:
    """Build the subject of decoding cells x cells latents to float images."""
    model = _by_kernels(model, None, model.head_dim, None, dtype)
    params = bench.kept(
        "decoder",
        (_described(model), dtype, "decoder"),
        lambda: drawn(model, dtype, part="decoder"),
    )
    z = _normal(1, (batch, cells, cells, model.latent_channels), dtype)
    program, seconds = bench_lib.compiled(model.decode_in_parts, params, z)

    def peer(compiled):
        return bench.peers("peers").decoder(bench, model, params, z, compiled=compiled)

    return bench_lib.Subject(
        program=bench_lib.program(program, params, z),
        compile_s=seconds,
        dtype=dtype,
        work=floors.decoder(model, cells, cells, batch=batch, itemsize=_itemsize(dtype)),
        peers=_peers("diffusers", peer, compile_peer),
    )


def picture(
    bench: bench_lib.Bench,
    text: Gemma2,
    size: LinearDiT,
    autoencoder: DCAE,
    cells: int,
    steps: int,
    *,
    dtype: str,
    batch: int = 1,
    prefix: int = PREFIX_TOKENS,
    tokens: int = PROMPT_TOKENS,
    published_tokens: int = TEXT_TOKENS,
    compile_peer: bool = False,
    control_depth: int = 0,
    attention: str | None = None,
    staged: bool | None = None,
) -> bench_lib.Subject:
    """Build the subject from prompt tokens to pixels, as `pipeline` computes it.

    It runs the text encoder after its cached instruction, `steps` calls of the transformer, and the
    decoder. The peer encodes instruction and prompt each time and pads to the published length, as
    the published pipeline does.

    Args:
      bench: the run.
      text, size, autoencoder: the models.
      cells: side of the latents.
      steps: calls of the transformer.
      dtype: of arithmetic.
      batch: images at a time.
      prefix, tokens: lengths of the instruction and of the prompt.
      published_tokens: length to which the peer pads.
      compile_peer: time the compiled peer too.
      control_depth: blocks of a ControlNet, whose sketch is encoded in the program as well. It has
        no peer, and the floor leaves the encoder out.
      attention: of transformer and autoencoder, see `_by_kernels`.
      staged: whether it is three programs. None as in `loading.load`. With attention or staged
        it has no peer, as in `transformer`.
    """
    alone = bool(control_depth) or attention is not None or staged is not None
    staged = backends.launches_cost(jax.default_backend()) if staged is None else staged
    model = inference(size, dtype, attention)
    autoencoder = _by_kernels(autoencoder, attention, autoencoder.head_dim, None, dtype)
    numbers = dict(batch=batch, itemsize=_itemsize(dtype))
    work = floors.picture(text, model, autoencoder, cells, tokens, steps, prefix=prefix, **numbers)
    network, transformer_params = model, _transformer(bench, model)
    if control_depth:
        network, transformer_params = _controlled(model, transformer_params, control_depth, dtype)
        net = network.control.net
        copies = floors.transformer(net, cells**2, tokens + 1, blocks=control_depth, **numbers)
        work += copies * steps
    part = None if control_depth else "decoder"
    decoder_params = bench.kept(
        "decoder",
        (_described(autoencoder), dtype, part),
        lambda: drawn(autoencoder, dtype, part=part),
    )
    text_params = bench.kept("text", (text, dtype), lambda: _text(text, dtype))
    ids = np.random.default_rng(0).integers(3, text.vocab, prefix + batch * tokens).astype(np.int32)
    instruction, prompts = ids[:prefix], ids[prefix:].reshape(batch, tokens)
    cached = jax.jit(text.prefix)(text_params, instruction)
    times = samplers.scm_times(steps)
    draws = _normal(3, (steps, batch, cells, cells, size.in_channels))
    params = {
        "transformer": transformer_params,
        "text": {"model": text_params, "prefix": cached},
        "pixels": decoder_params,
    }
    sketch = _sketch(batch, cells * autoencoder.factor) if control_depth else None
    arguments = params, prompts, np.ones(prompts.shape, np.float32), draws, sketch
    if staged:
        program, seconds = _as_stages(_stages(text, network, autoencoder, times), *arguments)
    else:
        whole = prompt_to_pixels(text, network, autoencoder, times)
        program, seconds = bench_lib.compiled(whole, *arguments)

    def peer(compiled):
        return bench.peers("peers").picture(
            bench,
            (text, text_params),
            (model, transformer_params),
            (autoencoder, decoder_params),
            dict(instruction=instruction, prompts=prompts, draws=draws, times=times),
            published_tokens=published_tokens,
            compiled=compiled,
        )

    return bench_lib.Subject(
        program=bench_lib.program(program, *arguments),
        compile_s=seconds,
        dtype=dtype,
        work=work,
        peers=() if alone else _peers("diffusers", peer, compile_peer),
    )


def _controlled(
    model: LinearDiT, params: Any, depth: int, dtype: str
) -> tuple[Controlled, dict[str, Any]]:
    """Add a ControlNet with random weights to a transformer and its parameters."""
    control = ControlNet(net=dataclasses.replace(model, guidance_embed=False), depth=depth)
    added = drawn(control, dtype)
    if "controlnet" in backends.unrolled(None):
        added = control.unstack(added)
    return Controlled(trunk=model, control=control), {"trunk": params, "control": added}


def _sketch(batch: int, side: int) -> np.ndarray:
    """Draw black and white pixels, uint8 [B, side, side, 3]."""
    return np.random.default_rng(1).integers(0, 2, (batch, side, side, 3)).astype(np.uint8) * 255


def prompt_to_pixels(
    text: Gemma2, model: LinearDiT | Controlled, autoencoder: DCAE, times: np.ndarray
) -> Callable:
    """Return a function of (params, tokens, mask, draws, sketch) to uint8 images [B, H, W, 3].

    params: {"text": {"model", "prefix"}, "transformer", "pixels"}. tokens, mask: [B, L].
    draws: [steps, B, h, w, c]. sketch: uint8 [B, H, W, 3] or None.
    """
    return _joined(*_stages(text, model, autoencoder, times))


def _joined(read, paint, decode):
    """Chain three functions, or programs, to one; see `prompt_to_pixels`."""

    def run(params, tokens, mask, draws, sketch):
        features, mask = read(params["text"], tokens, mask)
        return decode(
            params["pixels"],
            paint(params["transformer"], _encoder(params, sketch), features, mask, draws, sketch),
        )

    return run


def _encoder(params, sketch):
    """Return the parameters of the autoencoder that the second stage needs."""
    return None if sketch is None else params["pixels"]


def _stages(text, model, autoencoder, times):
    """Return three functions of parameters and arrays: text encoder, transformer and decoder."""
    no_tokenizer: Any = None  # the prompts are tokens already
    encoder = text_encoders.GemmaText(text, no_tokenizer)
    pixels = pixel_codecs.AutoencoderPixels(autoencoder, tile=False)

    def read(params, tokens, mask):
        return encoder.features(params, {"tokens": tokens, "mask": mask})

    def paint(params, pixels_params, features, mask, draws, sketch):
        batch = len(features)
        cond = {"text": features, "mask": mask}
        if isinstance(model, Controlled):
            cond |= {
                "control": pixels.encode(pixels_params, sketch),
                "control_scale": jnp.ones((batch,)),
            }
        return programs.student_latents(model, params, cond, guidance=4.5, times=times, draws=draws)

    return read, paint, pixels.decode


def _as_stages(stages, params, tokens, mask, draws, sketch):
    """Compile the stages as three programs, each launched while the previous one still runs.

    Returns the chained program and the seconds that it took.
    """
    read, paint, decode = stages
    encoder = _encoder(params, sketch)
    reader, a = bench_lib.compiled(read, params["text"], tokens, mask)
    features, mask_out = jax.eval_shape(read, params["text"], tokens, mask)
    latents = jax.eval_shape(
        paint, params["transformer"], encoder, features, mask_out, draws, sketch
    )
    painter, b = bench_lib.compiled(
        paint, params["transformer"], encoder, features, mask_out, draws, sketch
    )
    decoder, c = bench_lib.compiled(decode, params["pixels"], latents)
    return _joined(reader, painter, decoder), a + b + c


_NORM_EPS = 1e-5


def linear_attention(
    bench: bench_lib.Bench,
    size: LinearDiT,
    N: int,
    *,
    dtype: str,
    batch: int,
    derivative: str,
    backend: str,
) -> bench_lib.Subject:
    """Build the subject of self-attention with its norms at published shapes.

    All of q, k and v have a tangent. derivative: see `_attention`. backend: one of
    `ops.backend.BACKENDS`; the peer of a kernel is plain XLA.
    """
    head = size.width // size.heads
    options = dict(heads=size.heads, eps=_NORM_EPS)
    weights = [1 + 0.1 * _normal(20 + i, (size.width,)) for i in range(2)]
    plain = lambda qkv: linear.attend(qkv, *weights, **options)
    kernels = lambda qkv: linear.attend(qkv, *weights, **options, backend=backend)
    work = floors.linear_attention(N, size.width, head, batch=batch, itemsize=_itemsize(dtype))
    _, times = _DERIVATIVES[derivative]
    shapes = [(batch, N, 3 * size.width)]
    return _attention(
        plain,
        None if backend == "plain" else kernels,
        work * times[2],
        shapes,
        1,
        dtype=dtype,
        derivative=derivative,
    )


def cross_attention(
    bench: bench_lib.Bench,
    size: LinearDiT,
    N: int,
    *,
    dtype: str,
    batch: int,
    derivative: str,
    backend: str,
    tokens: int = TEXT_TOKENS,
) -> bench_lib.Subject:
    """Build the subject of cross-attention at published shapes, without masked text.

    Only q has a tangent, as in sCM. derivative and backend: as in `linear_attention`.
    """
    head = size.width // size.cross_heads
    mask = jnp.ones((batch, tokens))
    plain = lambda q, k, v: cross.attend(q, k, v, mask)
    kernels = lambda q, k, v: cross.attend(q, k, v, mask, backend=backend)
    work = floors.cross_attention(N, tokens, size.width, batch=batch, itemsize=_itemsize(dtype))
    _, times = _DERIVATIVES[derivative]
    q, kv = (batch, N, size.cross_heads, head), (batch, tokens, size.cross_heads, head)
    return _attention(
        plain,
        None if backend == "plain" else kernels,
        work * times[1],
        [q, kv, kv],
        1,
        dtype=dtype,
        derivative=derivative,
    )


def _attention(
    plain: Callable,
    kernels: Callable | None,
    work: floors.Work,
    shapes: Sequence[tuple[int, ...]],
    moving: int,
    *,
    dtype: str,
    derivative: str,
) -> bench_lib.Subject:
    """Build the subject of one attention alone.

    Args:
      plain, kernels: functions of arrays of `shapes`. With kernels None plain XLA runs alone.
      work: for the floor.
      shapes: of the arrays.
      moving: number of arrays, from the first, that have a tangent.
      dtype: of the arrays.
      derivative: "forward", "jvp" (value and tangent), or "sprint" (gradients beside a stopped
        tangent, as in sCM).
    """
    arrays = [_normal(i, s, dtype) for i, s in enumerate(shapes)]
    tangents = [_normal(9 + i, s, dtype) for i, s in enumerate(shapes[:moving])]
    derive, _ = _DERIVATIVES[derivative]
    build = lambda f: bench_lib.compiled(derive(f, len(shapes)), *arrays, *tangents)
    ready = lambda program: bench_lib.program(program, *arrays, *tangents)
    program, seconds = build(kernels or plain)
    memory = lambda program: f"{program.memory_analysis().temp_size_in_bytes / 2**20:.0f} MiB"
    note, peers = f"temporaries {memory(program)}", ()
    if kernels:
        other, _ = build(plain)
        note += f", of plain XLA {memory(other)}"
        peers = (("plain XLA", lambda: ready(other)),)
    return bench_lib.Subject(
        program=ready(program),
        compile_s=seconds,
        dtype=dtype,
        work=work,
        peers=peers,
        shortest=_KERNEL_SECONDS,
        note=note,
    )


def _forward(function, count):
    return lambda *arrays: function(*arrays[:count])


def _jvp(function, count):
    """Return the jvp as a function of `count` arrays and tangents of the first of them."""

    def derived(*arrays):
        primals, tangents = arrays[:count], arrays[count:]
        moving = len(tangents)
        return jax.jvp(lambda *p: function(*p, *primals[moving:]), primals[:moving], tangents)

    return derived


def _sprint(function, count):
    def loss(*arrays):
        out, J = _jvp(function, count)(*arrays)
        aim = jax.lax.stop_gradient(out + J)
        return jnp.square((out - aim).astype(jnp.float32)).sum()

    return jax.grad(loss, tuple(range(count)))


# (derivative, {sides of each product with a tangent: forward passes that it costs}). Both
# attentions are two products. A tangent adds one product for each moving side, a backward pass two
# for each.
_DERIVATIVES = {
    "forward": (_forward, {1: 1, 2: 1}),
    "jvp": (_jvp, {1: 2, 2: 3}),
    "sprint": (_sprint, {1: 4, 2: 5}),
}

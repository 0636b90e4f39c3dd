"""Our side of each comparison: models of published sizes with random weights, drawn on the device.

Every parameter is moved off its initial value, so that no zero or one makes a comparison easy.
"""

import dataclasses
import functools
import math

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
# Published prompts stand behind an instruction of about 200 tokens; a prompt of some twenty words fits the bucket
# of 32 that `data.prompts` gives it.
PREFIX_TOKENS, PROMPT_TOKENS = 200, 32
_KERNEL_SECONDS = 0.05


def drawn(model, dtype, seed=0, part=None):
    """Random parameters of a model, or of one part of them, on the device, one array at a time.

    Drawing them all in one program, as `init` does, needs several times their memory.
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
    """Norm weights about 1, vectors about 0, kernels that keep the size of what they multiply."""
    noise = jax.random.normal(key, shape)
    if name == "weight":
        return (1 + 0.1 * noise).astype(dtype)
    fan_in = 1 if len(shape) < 2 else math.prod(shape[:-1]) if len(shape) == 4 else shape[-2]
    return (noise * (0.1 if len(shape) < 2 else fan_in**-0.5)).astype(dtype)


def inference(model: LinearDiT, dtype, attention=None) -> LinearDiT:
    """The description as a pipeline runs it. attention: see `_by_kernels`."""
    model = dataclasses.replace(
        model, logvar_head=False, remat="none", dtype=dtype, residual_dtype=dtype
    )
    return _by_kernels(
        model, attention, model.width // model.heads, model.width // model.cross_heads, dtype
    )


def _by_kernels(model, attention, linear, cross, dtype):
    """A transformer or autoencoder with the kernels that `loading.load` takes unless told, attention None, or with attention by a backend;
    "plain" is without any kernel. linear, cross: channels of a head of each attention, or None."""
    here = jax.default_backend()
    attention = attention or backends.resolve(backends.fastest(here), here, linear, cross, dtype)[0]
    return dataclasses.replace(
        model, attention=attention, depthwise=backends.depthwise(here, attention)
    )


def _described(model):
    """What parameters depend on."""
    return dataclasses.replace(model, attention="plain", depthwise="plain")


def _normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def _transformer(bench, model, unrolled=None):
    """Parameters as they are run. unrolled: blocks one by one instead of in a loop; None as `loading.load` has it."""
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
    bench,
    size: LinearDiT,
    cells,
    *,
    dtype,
    batch=1,
    tokens=TEXT_TOKENS,
    compile_peer=False,
    attention=None,
    unrolled=None,
):
    """One call of the transformer on cells x cells latents.

    attention: see `_by_kernels`, unrolled: see `_transformer`; with either it has no peer, its row is to be read beside the one without.
    """
    model = inference(size, dtype, attention)
    params = _transformer(bench, model, unrolled)
    x, text = (
        _normal(1, (batch, cells, cells, model.in_channels)),
        _normal(2, (batch, tokens, model.text_dim), dtype),
    )
    mask, t, w = jnp.ones((batch, tokens)), jnp.full((batch,), 0.7), jnp.full((batch,), 4.5)
    run = lambda params, *args: model.apply(params, *args).velocity
    program, seconds = bench_lib.compiled(run, params, x, t, text, mask, w)
    arrays = dict(x=x, t=t, text=text, mask=mask, guidance=w)

    def peer(compiled):
        return bench.peers("peers").transformer(bench, model, params, arrays, compiled=compiled)

    return bench_lib.Subject(
        bench_lib.program(program, params, x, t, text, mask, w),
        seconds,
        dtype,
        floors.transformer(model, cells * cells, tokens, batch=batch, itemsize=_itemsize(dtype)),
        () if attention or unrolled is not None else _peers("diffusers", peer, compile_peer),
    )


def _peers(label, build, compile_peer):
    eager = (label, functools.partial(build, False))
    return (
        (eager, (f"{label}, torch.compile", functools.partial(build, True)))
        if compile_peer
        else (eager,)
    )


def decoder(bench, model: DCAE, cells, *, dtype, batch=1, compile_peer=False):
    """Decoding cells x cells latents to float pictures."""
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
        bench_lib.program(program, params, z),
        seconds,
        dtype,
        floors.decoder(model, cells, cells, batch=batch, itemsize=_itemsize(dtype)),
        _peers("diffusers", peer, compile_peer),
    )


def picture(
    bench,
    text: Gemma2,
    size: LinearDiT,
    autoencoder: DCAE,
    cells,
    steps,
    *,
    dtype,
    batch=1,
    prefix=PREFIX_TOKENS,
    tokens=PROMPT_TOKENS,
    published_tokens=TEXT_TOKENS,
    compile_peer=False,
    control_depth=0,
    attention=None,
    staged=None,
):
    """Prompt tokens to pixels: text encoder behind its cached instruction, `steps` calls, decoder, as `pipeline` does.

    The peer encodes instruction and prompt each time and pads to the published length, as the published pipeline does.
    control_depth: blocks of a ControlNet, whose sketch is encoded in the program as well; there is no peer for it, and the
    floor leaves the encoder out.
    attention: of transformer and autoencoder, see `_by_kernels`. staged: whether it is three programs. None: both as `loading.load` has
    them. With either it has no peer, as in `transformer`.
    """
    others = attention is not None or staged is not None
    staged = backends.launches_cost(jax.default_backend()) if staged is None else staged
    model, autoencoder = (
        inference(size, dtype, attention),
        _by_kernels(autoencoder, attention, autoencoder.head_dim, None, dtype),
    )
    transformer_params = _transformer(bench, model)
    part = None if control_depth else "decoder"
    decoder_params = bench.kept(
        "decoder",
        (_described(autoencoder), dtype, part),
        lambda: drawn(autoencoder, dtype, part=part),
    )
    floor = floors.picture(
        text,
        model,
        autoencoder,
        cells,
        tokens,
        steps,
        prefix=prefix,
        batch=batch,
        itemsize=_itemsize(dtype),
    )
    if control_depth:
        control = ControlNet(
            net=dataclasses.replace(model, guidance_embed=False), depth=control_depth
        )
        steering = drawn(control, dtype)
        steering = (
            control.unstack(steering) if "controlnet" in backends.unrolled(None) else steering
        )
        transformer_params = {"trunk": transformer_params, "control": steering}
        copies = floors.transformer(
            control.net,
            cells**2,
            tokens + 1,
            batch=batch,
            itemsize=_itemsize(dtype),
            blocks=control_depth,
        )
        model, floor = Controlled(trunk=model, control=control), floor + copies * steps
    text_params = bench.kept("text", (text, dtype), lambda: _text(text, dtype))
    ids = np.random.default_rng(0).integers(3, text.vocab, prefix + batch * tokens).astype(np.int32)
    instruction, prompts = ids[:prefix], ids[prefix:].reshape(batch, tokens)
    cached = jax.jit(text.prefix)(text_params, instruction)
    times = samplers.scm_times(steps)
    draws = _normal(3, (steps, batch, cells, cells, size.in_channels))
    side = cells * autoencoder.factor
    sketch = np.random.default_rng(1).integers(0, 2, (batch, side, side, 3)).astype(np.uint8) * 255

    params = {
        "transformer": transformer_params,
        "text": {"model": text_params, "prefix": cached},
        "pixels": decoder_params,
    }
    arguments = (
        params,
        prompts,
        np.ones(prompts.shape, np.float32),
        draws,
        sketch if control_depth else None,
    )
    if staged:
        program, seconds = _as_stages(_stages(text, model, autoencoder, times), *arguments)
    else:
        program, seconds = bench_lib.compiled(
            prompt_to_pixels(text, model, autoencoder, times), *arguments
        )

    def peer(compiled):
        return bench.peers("peers").picture(
            bench,
            (text, text_params),
            (model, transformer_params),
            (autoencoder, decoder_params),
            instruction,
            prompts,
            draws,
            times,
            published_tokens=published_tokens,
            compiled=compiled,
        )

    return bench_lib.Subject(
        bench_lib.program(program, *arguments),
        seconds,
        dtype,
        floor,
        () if control_depth or others else _peers("diffusers", peer, compile_peer),
    )


def prompt_to_pixels(text: Gemma2, model: LinearDiT | Controlled, autoencoder: DCAE, times):
    """(params, tokens [B, L], mask [B, L], draws [steps, B, h, w, c], sketch uint8 [B, H, W, 3] or None) -> uint8 [B, H, W, 3].

    params: {"text": {"model", "prefix"}, "transformer", "pixels"}.
    """
    return _joined(*_stages(text, model, autoencoder, times))


def _joined(read, paint, decode):
    """Three functions, or programs, as one function; see `prompt_to_pixels`."""

    def run(params, tokens, mask, draws, sketch):
        features, mask = read(params["text"], tokens, mask)
        return decode(
            params["pixels"],
            paint(params["transformer"], _encoder(params, sketch), features, mask, draws, sketch),
        )

    return run


def _encoder(params, sketch):
    """All that the second stage has of the autoencoder."""
    return None if sketch is None else params["pixels"]


def _stages(text, model, autoencoder, times):
    """Text encoder, transformer with what steers it, decoder: three functions of their parameters and arrays."""
    encoder, pixels = (
        text_encoders.GemmaText(text, None),
        pixel_codecs.AutoencoderPixels(autoencoder, tile=False),
    )

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
    """(program, seconds) of the same as three programs, each started while the one before still runs."""
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


# ---- Attention alone, forward and in the two derivatives that training takes.

_NORM_EPS = 1e-5


def linear_attention(bench, size: LinearDiT, N, *, dtype, batch, derivative, backend):
    """The self-attention with its norms of queries and keys at published shapes, all of q, k and v with a tangent.

    backend: of `ops.backend.BACKENDS`; anything but "plain" has plain XLA as its peer.
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
    bench, size: LinearDiT, N, *, dtype, batch, derivative, backend, tokens=TEXT_TOKENS
):
    """The cross-attention at published shapes, no text masked, a tangent in q alone as in sCM. backend: as above."""
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


def _attention(plain, kernels, work, shapes, moving, *, dtype, derivative):
    """One attention alone.

    plain, kernels: functions of arrays of the given shapes; kernels None times plain XLA alone. work: what it has to do.
    moving: how many of the arrays, from the first, have a tangent.
    derivative: "forward", "jvp" (value and tangent), or "sprint" (gradients beside a stopped tangent, as sCM takes).
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
        ready(program), seconds, dtype, work, peers, shortest=_KERNEL_SECONDS, note=note
    )


def _forward(function, count):
    return lambda *arrays: function(*arrays[:count])


def _jvp(function, count):
    """Of count arrays, followed by tangents of the first of them."""

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


# (derivative, {sides of each product that move: forward passes it costs}). Both attentions are two products. A tangent
# adds one of them for each side that moves, a backward pass two for each.
_DERIVATIVES = {
    "forward": (_forward, {1: 1, 2: 1}),
    "jvp": (_jvp, {1: 2, 2: 3}),
    "sprint": (_sprint, {1: 4, 2: 5}),
}

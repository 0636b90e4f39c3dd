"""Our side of each comparison: models of published sizes with random weights, drawn on the device.

Every parameter is moved off its initial value, so that no zero or one makes a comparison easy.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sprint_jax import parts
from sprint_jax.benchmarking import bench as bench_lib
from sprint_jax.benchmarking import floors
from sprint_jax.diffusion import samplers, trigflow
from sprint_jax.models import layers
from sprint_jax.models.dc_ae import DCAE
from sprint_jax.models.gemma2 import Gemma2
from sprint_jax.models.linear_dit import LinearDiT

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
    made = [_leaf(key, str(path[-1].key), a.shape, dtype) for key, (path, a) in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, made)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _leaf(key, name, shape, dtype):
    """Norm weights about 1, vectors about 0, kernels that keep the size of what they multiply."""
    noise = jax.random.normal(key, shape)
    if name == "weight":
        return (1 + 0.1 * noise).astype(dtype)
    fan_in = 1 if len(shape) < 2 else math.prod(shape[:-1]) if len(shape) == 4 else shape[-2]
    return (noise * (0.1 if len(shape) < 2 else fan_in**-0.5)).astype(dtype)


def inference(model: LinearDiT, dtype) -> LinearDiT:
    """The description as a pipeline runs it."""
    return dataclasses.replace(model, logvar_head=False, remat="none", dtype=dtype)


def _normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def _transformer(bench, model):
    """Parameters as they are run: without a loop on a CPU, as `pipeline.load` has it."""

    def make():
        params = drawn(model, model.dtype)
        return model.unstack(params) if bench.on_cpu else params

    return bench.kept("transformer", model, make)


def _itemsize(dtype):
    return jnp.dtype(dtype).itemsize


def transformer(bench, size: LinearDiT, cells, *, dtype, batch=1, tokens=TEXT_TOKENS, compile_peer=False):
    """One call of the transformer on cells x cells latents."""
    model = inference(size, dtype)
    params = _transformer(bench, model)
    x, text = _normal(1, (batch, cells, cells, model.in_channels)), _normal(2, (batch, tokens, model.text_dim), dtype)
    mask, t, w = jnp.ones((batch, tokens)), jnp.full((batch,), 0.7), jnp.full((batch,), 4.5)
    run = lambda params, *args: model.apply(params, *args).velocity
    program, seconds = bench_lib.compiled(run, params, x, t, text, mask, w)
    arrays = dict(x=x, t=t, text=text, mask=mask, guidance=w)

    def peer(compiled):
        return bench.peers("peers").transformer(bench, model, params, arrays, compiled=compiled)

    return bench_lib.Subject(
        bench_lib.program(program, params, x, t, text, mask, w), seconds, dtype,
        floors.transformer(model, cells * cells, tokens, batch=batch, itemsize=_itemsize(dtype)),
        _peers("diffusers", peer, compile_peer),
    )  # fmt: skip


def _peers(label, build, compile_peer):
    eager = (label, functools.partial(build, False))
    return (eager, (f"{label}, torch.compile", functools.partial(build, True))) if compile_peer else (eager,)


def decoder(bench, model: DCAE, cells, *, dtype, batch=1, compile_peer=False):
    """Decoding cells x cells latents to float pictures."""
    params = bench.kept("decoder", (model, dtype), lambda: drawn(model, dtype, part="decoder"))
    z = _normal(1, (batch, cells, cells, model.latent_channels), dtype)
    program, seconds = bench_lib.compiled(model.decode, params, z)

    def peer(compiled):
        return bench.peers("peers").decoder(bench, model, params, z, compiled=compiled)

    return bench_lib.Subject(
        bench_lib.program(program, params, z), seconds, dtype,
        floors.decoder(model, cells, cells, batch=batch, itemsize=_itemsize(dtype)), _peers("diffusers", peer, compile_peer),
    )  # fmt: skip


def picture(
    bench, text: Gemma2, size: LinearDiT, autoencoder: DCAE, cells, steps, *, dtype, batch=1, prefix=PREFIX_TOKENS,
    tokens=PROMPT_TOKENS, published_tokens=TEXT_TOKENS, compile_peer=False,
):  # fmt: skip
    """Prompt tokens to pixels: text encoder behind its cached instruction, `steps` calls, decoder, as `pipeline` does.

    The peer encodes instruction and prompt each time and pads to the published length, as the published pipeline does.
    """
    model = inference(size, dtype)
    transformer_params = _transformer(bench, model)
    decoder_params = bench.kept("decoder", (autoencoder, dtype), lambda: drawn(autoencoder, dtype, part="decoder"))
    text_params = bench.kept("text", (text, dtype), lambda: drawn(text, dtype))
    ids = np.random.default_rng(0).integers(3, text.vocab, prefix + batch * tokens).astype(np.int32)
    instruction, prompts = ids[:prefix], ids[prefix:].reshape(batch, tokens)
    cached = jax.jit(text.prefix)(text_params, instruction)
    encoder, pixels = parts.GemmaText(text, None), parts.AutoencoderPixels(autoencoder, tile=False)
    times = samplers.scm_times(steps)
    draws = _normal(3, (steps, batch, cells, cells, model.in_channels))

    def run(params, tokens, mask, draws):
        features, mask = encoder.features(params["text"], {"tokens": tokens, "mask": mask})
        w = jnp.full((batch,), 4.5)
        v = lambda x, t: model.apply(params["transformer"], x, t, features, mask, w).velocity
        latents = samplers.scm(trigflow.from_flow(v), draws[0], draws[1:], times)
        return pixels.decode(params["pixels"], latents)

    params = {"transformer": transformer_params, "text": {"model": text_params, "prefix": cached}, "pixels": decoder_params}
    arguments = params, prompts, np.ones(prompts.shape, np.float32), draws
    program, seconds = bench_lib.compiled(run, *arguments)

    def peer(compiled):
        return bench.peers("peers").picture(
            bench, (text, text_params), (model, transformer_params), (autoencoder, decoder_params), instruction,
            prompts, draws, times, published_tokens=published_tokens, compiled=compiled,
        )  # fmt: skip

    return bench_lib.Subject(
        bench_lib.program(program, *arguments), seconds, dtype,
        floors.picture(
            text, model, autoencoder, cells, tokens, steps, prefix=prefix, batch=batch, itemsize=_itemsize(dtype)
        ),
        _peers("diffusers", peer, compile_peer),
    )  # fmt: skip


# ---- Attention alone, forward and in the two derivatives that training takes.


def attention(bench, function, work, shapes, *, dtype, derivative, plain=None):
    """One attention alone.

    function: (q, k, v) -> out. shapes: of q, k, v. work: of one forward pass.
    derivative: "forward", "jvp" (value and tangent), or "sprint" (gradients beside a stopped tangent, as sCM takes).
    plain: the implementation to compare with; None compares with none.
    """
    arrays = [_normal(i, s, dtype) for i, s in enumerate(shapes)]
    tangents = [_normal(9 + i, s, dtype) for i, s in enumerate(shapes)]
    derive, times = _DERIVATIVES[derivative]
    build = lambda f: bench_lib.compiled(derive(f), *arrays, *tangents)
    program, seconds = build(function)
    ready = lambda program: bench_lib.program(program, *arrays, *tangents)
    peers = () if plain is None else (("plain XLA", lambda: ready(build(plain)[0])),)
    return bench_lib.Subject(ready(program), seconds, dtype, work * times, peers, shortest=_KERNEL_SECONDS)


def _jvp(function):
    return lambda q, k, v, *tangents: jax.jvp(function, (q, k, v), tangents)


def _sprint(function):
    def loss(q, k, v, *tangents):
        out, J = jax.jvp(function, (q, k, v), tangents)
        aim = jax.lax.stop_gradient(out + J)
        return jnp.square((out - aim).astype(jnp.float32)).sum()

    return jax.grad(loss, (0, 1, 2))


# (derivative, forward passes it costs). Both attentions are two products: a tangent doubles each of them twice
# over, and so does a backward pass.
_DERIVATIVES = {
    "forward": (lambda f: lambda q, k, v, *tangents: f(q, k, v), 1),
    "jvp": (_jvp, 3),
    "sprint": (_sprint, 5),
}


def linear_attention(bench, size: LinearDiT, N, *, dtype, batch, derivative, function=None):
    """The self-attention at published shapes; function: an implementation to put beside ours."""
    shape = (batch, N, size.heads, size.width // size.heads)
    work = floors.linear_attention(N, size.width, shape[-1], batch=batch, itemsize=_itemsize(dtype))
    plain = layers.linear_attention
    return attention(
        bench, function or plain, work, [shape] * 3, dtype=dtype, derivative=derivative, plain=plain if function else None
    )  # fmt: skip


def cross_attention(bench, size: LinearDiT, N, *, dtype, batch, derivative, function=None, tokens=TEXT_TOKENS):
    """The cross-attention at published shapes, no text masked; function: (q, k, v, mask) to put beside ours."""
    head = size.width // size.cross_heads
    q, kv = (batch, N, size.cross_heads, head), (batch, tokens, size.cross_heads, head)
    work = floors.cross_attention(N, tokens, size.width, batch=batch, itemsize=_itemsize(dtype))
    mask = jnp.ones((batch, tokens))
    masked = lambda f: lambda q, k, v: f(q, k, v, mask)
    plain = masked(layers.cross_attention)
    return attention(
        bench, masked(function) if function else plain, work, [q, kv, kv], dtype=dtype, derivative=derivative,
        plain=plain if function else None,
    )  # fmt: skip

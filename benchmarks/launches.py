"""Count the launches and bytes of a program compiled for an NVIDIA GPU that is not attached.

    pip install "jax[cuda12]"          at jax's version; neither a GPU nor a driver is needed
    python -m benchmarks.launches --program=picture|sketch|pair [--size=0.6b]
        [--attention=plain|pallas] [--longest=20]

"picture" is one step at 1024 px from prompt tokens to pixels, for `--batch` images (1). "sketch"
adds a ControlNet of 7 blocks and its encoder. "pair" is the published training step on 16 samples
(`--remat=cheap`). All are bfloat16. `--attention=pallas` uses kernels, for depthwise convolutions
too. On a GPU the compiler also chooses between its own products and a library's by timing them,
which is impossible here. So counts differ a little, and there are no times.
"""

import dataclasses
from unittest import mock

from benchmarks.harness import launches
from benchmarks.harness import options as options_lib
from sprint_jax.planning import gpus, hardware
from sprint_jax.storage import weights

SIDE, CONTROL_DEPTH = 32, 7  # latent cells of 1024 px; as in `benchmarks/harness/suites.py`


def main() -> None:
    """Print launches and bytes of the program that the options name."""
    parser = options_lib.parser(__doc__)
    parser.add_argument("--program", choices=("picture", "sketch", "pair"), default="picture")
    parser.add_argument("--size", choices=("0.6b", "1.6b"), default="0.6b")
    parser.add_argument("--attention", choices=("plain", "pallas"), default="plain")
    parser.add_argument("--remat", choices=("none", "block", "cheap"), default="cheap")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument(
        "--residual",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of a pair's residual streams (model.residual_dtype)",
    )
    parser.add_argument(
        "--unroll",
        type=int,
        default=1,
        help="blocks per step of a pair's loops; the depth removes the loops",
    )
    parser.add_argument("--device", choices=("h200", "h100", "a100"), default="h200")
    parser.add_argument(
        "--longest", type=int, default=0, help="list the N launches that move most bytes"
    )
    options = parser.parse_args()
    if not gpus.compiler():
        raise SystemExit(
            "error: no compiler for NVIDIA GPUs here: pip install 'jax[cuda12]' at jax's version"
        )
    gpus.prepare()
    device = next(d for d in hardware.DEVICES if d.name == options.device)
    programs = _pair(options, device) if options.program == "pair" else _pictures(options, device)
    for name, compiled in programs:
        _report(name, compiled, device, options.longest)


def _report(name, compiled, device, longest):
    found = launches.parse(compiled.as_text())
    kinds = launches.totals(found)
    count, size = (sum(column) for column in zip(*kinds.values(), strict=True))
    memory = compiled.memory_analysis().temp_size_in_bytes
    print(
        f"{name}: {count} launches, {size / 1e9:.1f} GB read and written, {memory / 2**30:.2f} GiB "
        "of temporaries"
    )
    for kind, (count, size) in kinds.items():
        print(
            f"  {kind:18} {count:6d}   {size / 1e9:7.2f} GB   "
            f"{1e3 * size / device.bandwidth:6.2f} ms at the memory's speed"
        )
    for launch in sorted(found, key=lambda launch: -launch.bytes * launch.times)[:longest]:
        print(
            f"  {launch.bytes * launch.times / 1e6:9.1f} MB in {launch.times:3d} x "
            f"{launch.kind:18} {launch.shape:28} {launch.source[-80:]}"
        )


def _pictures(options, device):
    import jax
    import jax.numpy as jnp

    from benchmarks.harness import subjects
    from sprint_jax.diffusion import samplers
    from sprint_jax.models.controlnet import Controlled, ControlNet
    from sprint_jax.models.dc_ae import DCAE_F32C32
    from sprint_jax.models.gemma2 import GEMMA2_2B as text
    from sprint_jax.models.linear_dit import SANA_600M, SANA_1600M
    from sprint_jax.training import sharding

    mesh = sharding.mesh(1, 1, gpus.devices(device, 1, 1))
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
        s, dtype, sharding=sharding.replicated(mesh)
    )
    placed = lambda tree: jax.tree.map(lambda a: shape(*a.shape, dtype=a.dtype), tree)
    by = dict.fromkeys(
        ("attention", "depthwise"), "triton" if options.attention == "pallas" else "plain"
    )
    size = SANA_600M if options.size == "0.6b" else SANA_1600M
    model = dataclasses.replace(subjects.inference(size, "bfloat16", "plain"), **by)
    autoencoder = dataclasses.replace(DCAE_F32C32, **by)

    def parameters(network):
        found = weights.abstract(network)
        return jax.tree.map(lambda a: shape(*a.shape), found)

    def unrolled(network):
        """Return abstract unstacked parameters, as `loading.load` has them on a GPU."""
        return placed(jax.eval_shape(network.unstack, parameters(network)))

    transformer, pixels, sketch = unrolled(model), parameters(autoencoder), None
    if options.program == "sketch":
        control = ControlNet(
            net=dataclasses.replace(model, guidance_embed=False), depth=CONTROL_DEPTH
        )
        transformer = {"trunk": transformer, "control": unrolled(control)}
        model, sketch = (
            Controlled(trunk=model, control=control),
            shape(options.batch, SIDE * 32, SIDE * 32, 3, dtype=jnp.uint8),
        )
    instruction = shape(subjects.PREFIX_TOKENS, dtype=jnp.int32)
    prefix = placed(jax.eval_shape(text.prefix, parameters(text), instruction))
    params = {
        "text": {"model": unrolled(text), "prefix": prefix},
        "transformer": transformer,
        "pixels": pixels,
    }
    tokens, mask = (
        shape(options.batch, subjects.PROMPT_TOKENS, dtype=d) for d in (jnp.int32, jnp.float32)
    )
    draws = shape(1, options.batch, SIDE, SIDE, size.in_channels, dtype=jnp.float32)
    run = jax.jit(subjects.prompt_to_pixels(text, model, autoencoder, samplers.scm_times(1)))
    with jax.set_mesh(mesh):
        what = (
            f"{options.program}_{options.size}_1step, batch {options.batch}, attention "
            f"{options.attention}"
        )
        yield what, run.lower(params, tokens, mask, draws, sketch).compile()


def _pair(options, device):
    import jax

    from benchmarks.harness import suites
    from sprint_jax import build
    from sprint_jax.training import datasets, sharding, stages
    from sprint_jax.training.stage import Placed

    preset = "sana_600m" if options.size == "0.6b" else "sana_1600m"
    with mock.patch.object(jax, "default_backend", lambda: "gpu"):  # kernels are chosen by it
        c = suites.published_card(
            preset,
            options.remat,
            attention=options.attention,
            unroll=options.unroll,
            residual=options.residual,
        )
        batch = c.phases["sprint"].batch
        what = (
            f"of {preset}, {batch} samples, remat {options.remat}, attention {options.attention}, "
            f"residual {options.residual}"
        )
        teacher = weights.abstract(build.distilled_teacher(c))
        stage = stages.make(c, "sprint", datasets.Abstract(c), teacher=teacher)
        placed = Placed.on(stage, sharding.mesh(1, 1, gpus.devices(device, 1, 1)))
        rows = datasets.abstract_batch(c, batch)
        for name, function in zip(stage.labels, stage.functions, strict=True):
            yield f"{name} {what}", placed.lower(function, rows).compile()


if __name__ == "__main__":
    main()

"""The cases of each suite. Names are stable, so that rows of different runs can be matched."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.harness import commands, subjects, training
from benchmarks.harness.bench import Bench, Case, Subject
from sprint_jax import config
from sprint_jax.models.dc_ae import DCAE_F32C32
from sprint_jax.models.gemma2 import GEMMA2_2B
from sprint_jax.models.linear_dit import SANA_600M, SANA_1600M
from sprint_jax.ops import backend

_SIZES = (("0.6b", SANA_600M), ("1.6b", SANA_1600M))


def case(name: str, build: Callable[..., Subject], *arguments: Any, **options: Any) -> Case:
    """Return a case whose subject is build(bench, *arguments, **options)."""
    return Case(name, lambda bench: build(bench, *arguments, **options))


def embedded_pair(bench: Bench, change: training.Change = lambda tree: None) -> Subject:
    """Build a pair of steps of the embedded card on 32 samples. change: edits the card further."""

    def changes(tree):
        training.published_losses(tree)
        tree.phases.sprint.batch = 32
        change(tree)

    return training.pair(bench, training.card("sprint", changes))


def cpu() -> list[Case]:
    """Return the cases in float32 on all cores that this process may use."""
    return [
        case("transformer_0.6b", subjects.transformer, SANA_600M, 32, dtype="float32"),
        case("dcae_decode_512", subjects.decoder, DCAE_F32C32, 16, dtype="float32"),
        case("sprint_pair_embedded", embedded_pair),
        case("sprint_pair_embedded_adamw", embedded_pair, training.with_adamw),
        case("sample_cold", commands.sample, warm=False),
        case("sample_warm", commands.sample, warm=True),
    ]


_BF16 = dict(dtype="bfloat16")
_BATCHES = (1, 10, 32)


def gpu() -> list[Case]:
    """Return the cases in bfloat16: components, prompt to pixels, and the published pair."""
    return [
        *_transformers(),
        *_decoders(),
        *_pictures(),
        *_sketches(),
        *_pairs(),
        case("sprint_pair_embedded", embedded_pair),
    ]


def _transformers() -> Iterator[Case]:
    for name, size in _SIZES:
        for side in (1024, 512):
            for batch in _BATCHES:
                compile_peer = side == 1024 and batch != 32
                one = functools.partial(subjects.transformer, compile_peer=compile_peer)
                label = f"transformer_{name}{_at(side, batch)}"
                yield case(label, one, size, side // 32, batch=batch, **_BF16)
        for batch in (1, 10):
            for change, options in (
                ("looped", {"unrolled": False}),
                ("plain", {"attention": "plain"}),
            ):
                label = f"transformer_{name}_{change}{_at(1024, batch)}"
                one = functools.partial(subjects.transformer, **options)
                yield case(label, one, size, 32, batch=batch, **_BF16)


def _decoders() -> Iterator[Case]:
    for side in (1024, 512):
        for batch in _BATCHES:
            one = functools.partial(subjects.decoder, compile_peer=side == 1024 and batch != 32)
            label = f"dcae_decode_{side}" + (f"_batch{batch}" if batch > 1 else "")
            yield case(label, one, DCAE_F32C32, side // 32, batch=batch, **_BF16)


def _pictures() -> Iterator[Case]:
    for name, size in _SIZES:
        for side in (1024, 512):
            for steps in (1, 2, 4):
                for batch in _BATCHES:
                    compile_peer = side == 1024 and batch == 1 and steps == 1
                    one = functools.partial(subjects.picture, compile_peer=compile_peer)
                    label = f"picture_{name}_{steps}step{_at(side, batch)}"
                    models = GEMMA2_2B, size, DCAE_F32C32
                    yield case(label, one, *models, side // 32, steps, batch=batch, **_BF16)


def _sketches() -> Iterator[Case]:
    """Yield one-step images from a sketch, and variants of them and of images without a sketch."""
    for name, size in _SIZES:
        for change, options in (
            ("", {}),
            ("_plain", {"attention": "plain"}),
            ("_at_once", {"staged": False}),
        ):
            whole = GEMMA2_2B, size, DCAE_F32C32, 32, 1
            picture = functools.partial(subjects.picture, **options)
            sketch = functools.partial(picture, control_depth=7)
            yield case(f"sketch_{name}_1step{change}", sketch, *whole, **_BF16)
            if change:
                yield case(f"picture_{name}_1step{change}", picture, *whole, **_BF16)


def _pairs() -> Iterator[Case]:
    for preset, (_, size) in zip(("sana_600m", "sana_1600m"), _SIZES, strict=True):
        for remat in ("none", "cheap", "block"):
            label = f"sprint_pair_{preset.removeprefix('sana_')}_remat_{remat}"
            yield case(label, published_pair, preset, remat)
            for change, options in (
                ("", {}),
                ("_bf16_residual", {"residual": "bfloat16"}),
                ("_unrolled", {"unroll": size.depth}),
            ):
                pair = functools.partial(published_pair, attention="pallas", **options)
                yield case(f"{label}_kernels{change}", pair, preset, remat)


def published_pair(bench: Bench, preset: str, remat: str, **options: Any) -> Subject:
    """Build a pair of steps of `published_card`."""
    return training.pair(bench, published_card(preset, remat, **options))


def published_card(
    preset: str,
    remat: str,
    *,
    attention: str = "plain",
    unroll: int = 1,
    residual: str = "float32",
) -> config.Config:
    """Return the preset with 16 samples, as many as the published trainer gives each device.

    attention, unroll, residual (dtype): as in the config. An unroll of the depth removes loops.
    """

    def change(tree):
        tree.phases.sprint.batch = 16
        tree.model.update(remat=remat, attention=attention, unroll=unroll, residual_dtype=residual)

    return training.card(preset, change)


def _at(side: int, batch: int) -> str:
    return f"_{side}" * (side != 1024) + f"_batch{batch}" * (batch > 1)


def kernels(platform: str) -> list[Case]:
    """Return the cases of attention alone at published shapes, forward and in both derivatives.

    If the platform has kernels, they run beside plain XLA, otherwise plain XLA runs alone.
    """
    on_cpu = platform == "cpu"
    dtype, batches = ("float32", (1,)) if on_cpu else ("bfloat16", (1, 16))
    cases = []
    for size_name, size in _SIZES:
        for kind, subject in (
            ("linear", subjects.linear_attention),
            ("cross", subjects.cross_attention),
        ):
            head_dims = (
                (size.width // size.heads, None)
                if kind == "linear"
                else (None, size.width // size.cross_heads)
            )
            chosen, _ = backend.resolve("pallas", platform, *head_dims, dtype)
            for tokens in (1024,) if on_cpu else (1024, 4096):
                for derivative in ("forward", "jvp", "sprint"):
                    for batch in batches:
                        name = f"{kind}_attention_{size_name}_{tokens}_{derivative}_batch{batch}"
                        options = dict(
                            dtype=dtype, batch=batch, derivative=derivative, backend=chosen
                        )
                        cases.append(case(name, subject, size, tokens, **options))
    return cases

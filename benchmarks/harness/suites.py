"""Which cases a suite has. Names are stable: whoever compares runs finds a row by its name and peer."""

import functools

from benchmarks.harness import commands, subjects, training
from benchmarks.harness.bench import Case
from sprint_jax.models.dc_ae import DCAE_F32C32
from sprint_jax.models.gemma2 import GEMMA2_2B
from sprint_jax.models.linear_dit import SANA_600M, SANA_1600M
from sprint_jax.ops import backend

_SIZES = (("0.6b", SANA_600M), ("1.6b", SANA_1600M))


def case(name, build, *arguments, **options) -> Case:
    """build(bench, *arguments, **options) makes the subject."""
    return Case(name, lambda bench: build(bench, *arguments, **options))


def embedded_pair(bench, change=lambda tree: None):
    """A pair of the embedded card's network on 32 samples. change: alters the card further."""

    def changes(tree):
        training.published_losses(tree)
        tree.phases.sprint.batch = 32
        change(tree)

    return training.pair(bench, training.card("shapes", changes))


def cpu() -> list[Case]:
    """float32 on all cores that this process may use."""
    return [
        case("transformer_0.6b", subjects.transformer, SANA_600M, 32, dtype="float32"),
        case("dcae_decode_512", subjects.decoder, DCAE_F32C32, 16, dtype="float32"),
        case("sprint_pair_embedded", embedded_pair),
        case("sprint_pair_embedded_adamw", embedded_pair, training.with_adamw),
        case("sample_cold", commands.sample, warm=False),
        case("sample_warm", commands.sample, warm=True),
    ]


def gpu() -> list[Case]:
    """bfloat16: components, prompt to pixels, and the published training pair."""
    bf16 = dict(dtype="bfloat16")
    cases = []
    for name, size in _SIZES:
        for side in (1024, 512):
            for batch in (1, 10, 32):
                compile_peer = side == 1024 and batch != 32
                one = functools.partial(subjects.transformer, compile_peer=compile_peer)
                cases.append(
                    case(
                        f"transformer_{name}{_at(side, batch)}",
                        one,
                        size,
                        side // 32,
                        batch=batch,
                        **bf16,
                    )
                )
        for batch in (1, 10):
            for change, options in (
                ("looped", {"unrolled": False}),
                ("plain", {"attention": "plain"}),
            ):
                label = f"transformer_{name}_{change}{_at(1024, batch)}"
                cases.append(
                    case(label, subjects.transformer, size, 32, batch=batch, **options, **bf16)
                )
    for side in (1024, 512):
        for batch in (1, 10, 32):
            one = functools.partial(subjects.decoder, compile_peer=side == 1024 and batch != 32)
            label = f"dcae_decode_{side}" + (f"_batch{batch}" if batch > 1 else "")
            cases.append(case(label, one, DCAE_F32C32, side // 32, batch=batch, **bf16))
    for name, size in _SIZES:
        for side in (1024, 512):
            for steps in (1, 2, 4):
                for batch in (1, 10, 32):
                    one = functools.partial(
                        subjects.picture, compile_peer=side == 1024 and batch == 1 and steps == 1
                    )
                    label = f"picture_{name}_{steps}step{_at(side, batch)}"
                    cases.append(
                        case(
                            label,
                            one,
                            GEMMA2_2B,
                            size,
                            DCAE_F32C32,
                            side // 32,
                            steps,
                            batch=batch,
                            **bf16,
                        )
                    )
    for name, size in _SIZES:
        for change, options in (
            ("", {}),
            ("_plain", {"attention": "plain"}),
            ("_at_once", {"staged": False}),
        ):
            whole = GEMMA2_2B, size, DCAE_F32C32, 32, 1
            steered = functools.partial(subjects.picture, control_depth=7)
            cases.append(case(f"sketch_{name}_1step{change}", steered, *whole, **options, **bf16))
            if change:
                cases.append(
                    case(
                        f"picture_{name}_1step{change}", subjects.picture, *whole, **options, **bf16
                    )
                )
    for name, (_, size) in zip(("sana_600m", "sana_1600m"), _SIZES, strict=True):
        for remat in ("none", "cheap", "block"):
            label = f"sprint_pair_{name.removeprefix('sana_')}_remat_{remat}"
            cases.append(case(label, published_pair, name, remat))
            cases.append(case(f"{label}_kernels", published_pair, name, remat, attention="pallas"))
            cases.append(
                case(
                    f"{label}_kernels_bf16_residual",
                    published_pair,
                    name,
                    remat,
                    attention="pallas",
                    residual="bfloat16",
                )
            )
            cases.append(
                case(
                    f"{label}_kernels_unrolled",
                    published_pair,
                    name,
                    remat,
                    attention="pallas",
                    unroll=size.depth,
                )
            )
    return [*cases, case("sprint_pair_embedded", embedded_pair)]


def published_pair(bench, preset, remat, **options):
    return training.pair(bench, published_card(preset, remat, **options))


def published_card(preset, remat, attention="plain", unroll=1, residual="float32"):
    """The preset with 16 samples, what the published trainer gives each device. attention, unroll, residual (dtype): as in the config; an
    unroll of the depth removes loops."""

    def change(tree):
        tree.phases.sprint.batch = 16
        tree.model.update(remat=remat, attention=attention, unroll=unroll, residual_dtype=residual)

    return training.card(preset, change)


def _at(side, batch):
    return f"_{side}" * (side != 1024) + f"_batch{batch}" * (batch > 1)


def kernels(platform) -> list[Case]:
    """Attention alone at published shapes: forward, with a tangent, and as the training step differentiates it.

    By kernels where the platform has them, beside plain XLA; elsewhere plain XLA alone.
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

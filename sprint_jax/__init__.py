"""SANA-Sprint in JAX: one-step text-to-image by continuous-time consistency distillation.

    pipe = sprint_jax.load("path/to/model")
    images = sprint_jax.generate(pipe, ["a red circle"], steps=2)  # uint8 [B, H, W, 3]

Nothing is imported, and JAX is not started, before one of these is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sprint_jax.sampling.generation import generate
    from sprint_jax.sampling.loading import load

__all__ = ["__version__", "generate", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public function when it is first used."""
    if name == "load":
        from sprint_jax.sampling.loading import load

        return load
    if name == "generate":
        from sprint_jax.sampling.generation import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

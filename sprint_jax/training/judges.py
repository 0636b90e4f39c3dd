"""Judges of a student's images: the user's function on the host, called from inside a step.

A judge that fails must not end a run half-written, nor teach anything: its verdicts become NaN, so
the update is dropped and counted as not finite, and the reason is said once.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sprint_jax.data import captions
from sprint_jax.encoders.pixels import PixelCodec
from sprint_jax.errors import UserError
from sprint_jax.evaluation import extractors

# (latents at unit scale [B, ...], captions uint8 [B, L], parameters of the decoder) -> verdicts [B]
Judge = Callable[[jax.Array, jax.Array, Any], jax.Array]


def make(name: str, pixels: PixelCodec, say: Callable[[str], None]) -> Judge:
    """Build the judge "module:function", a function of prompts and uint8 images that returns a
    number in [0, 1] for each.

    Raises UserError where it cannot be imported.
    """
    function, failed = load(name), []

    def on_host(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
        try:
            return verdicts(function, name, captions.from_rows(rows), np.asarray(images))
        except UserError as error:
            if not failed:
                say(f"WARNING: {error}; updates without verdicts are dropped")
            failed.append(1)
            return np.full(len(rows), np.nan, np.float32)

    def judge(latents: jax.Array, rows: jax.Array, params: Any) -> jax.Array:
        images = pixels.decode(params, jax.lax.stop_gradient(latents))
        shape = jax.ShapeDtypeStruct(rows.shape[:1], jnp.float32)
        return jax.pure_callback(on_host, shape, images, rows)

    return judge


def verdicts(
    function: Callable[..., Any], name: str, prompts: list[str], images: np.ndarray
) -> np.ndarray:
    """Return the function's numbers for images, float32 [B].

    Raises UserError where it fails, or gives anything else than a number in [0, 1] for each.
    """
    try:
        found = function(prompts, list(images))
    except Exception as error:  # the user's code may raise anything
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"reward {name} failed ({line})") from None
    with _named(name):
        numbers = extractors.hooked(found, len(prompts), 1, name)
    if not ((numbers >= 0) & (numbers <= 1)).all():
        raise UserError(
            f"reward {name} gave values from {numbers.min():g} to {numbers.max():g}: scale them "
            "to [0, 1]"
        )
    return numbers.astype(np.float32)


def check(name: str, size: int) -> None:
    """Ask a judge once about two gray images. Raises UserError as `verdicts` does."""
    images = np.full((2, size, size, 3), 128, np.uint8)
    verdicts(load(name), name, ["a red circle", "two blue squares"], images)


def load(name: str) -> Callable[..., Any]:
    """Import a judge. Raises UserError where it cannot be."""
    with _named(name):
        return extractors.hook(name)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Call the option by its name here: hooks of evaluations are an option --hook."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"--hook={name}", f"reward {name}")) from None

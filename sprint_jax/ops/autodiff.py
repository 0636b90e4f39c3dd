"""Linear and bilinear maps with hand-written transposes, for forward and reverse mode."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, linear_call

# Checkpoint name of results that are expensive to recompute: products with weights, attentions and
# convolutions. A backward pass that recomputes only cheap operations saves exactly these.
EXPENSIVE = "expensive"


def mark_expensive(a: Array) -> Array:
    """Return the array under the checkpoint name `EXPENSIVE`."""
    return checkpoint_name(a, EXPENSIVE)


def is_zero(tangent: Any) -> bool:
    """Return whether JAX knows a tangent to be zero without computing it."""
    return isinstance(tangent, SymbolicZero)


def linear_map(
    tangent: Callable[[Any, tuple[Array, ...]], Array],
    transpose: Callable[[Any, Array], tuple[Array, ...]],
    residuals: tuple[Array, ...],
    tangents: Sequence[Any],
) -> Array:
    """Return tangent(residuals, tangents), whose transpose is transpose(residuals, cotangent).

    The map itself has no derivative, since sCM stops the network's tangent before the loss sees
    it. Without stop_gradient every affected gradient is NaN, rather than silently missing a term.

    Args:
      tangent: (residuals, tangents) -> array, linear in tangents.
      transpose: (residuals, cotangent) -> tuple like tangents.
      residuals: tuple of arrays.
      tangents: arrays and `SymbolicZero`s, at least one of them an array. The functions get zeros
        for `SymbolicZero`s, which transposition then treats as constants.
    """
    present = tuple(i for i, d in enumerate(tangents) if not is_zero(d))
    shapes = tuple((d.shape, d.dtype) for d in tangents)

    def tangent_of_present(residuals, given):
        found = dict(zip(present, given, strict=True))
        return tangent(
            residuals,
            tuple(found[i] if i in found else jnp.zeros(*s) for i, s in enumerate(shapes)),
        )

    def transpose_of_present(residuals, cotangent):
        found = transpose(residuals, cotangent)
        return tuple(found[i] for i in present)

    given = tuple(tangents[i] for i in present)
    return _map(tangent_of_present, transpose_of_present, residuals, given)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _map(tangent, transpose, residuals, tangents):
    return linear_call(tangent, transpose, residuals, tangents)


def _refuse(tangent, transpose, primals, tangents):
    out = _map(tangent, transpose, *primals)
    asked = tuple(d for d in jax.tree.leaves(tangents, is_leaf=is_zero) if not is_zero(d))
    return out, _poison(out.shape, out.dtype, asked) if asked else jnp.zeros_like(out)


def _poison(shape, dtype, tangents):
    """Return NaN that is formally linear in the tangents.

    Its transpose gives NaN where a cotangent arrives, and zero where none does, as in a loop that
    carries unused tangents.
    """
    like = tuple((d.shape, d.dtype) for d in tangents)

    def forward(_, tangents):
        return jnp.full(shape, jnp.nan, dtype) * sum(d.ravel()[0].astype(dtype) for d in tangents)

    def backward(_, cotangent):
        value = jnp.where(jnp.any(cotangent != 0), jnp.nan, 0.0)
        return tuple(jnp.full(s, value, d) for s, d in like)

    return linear_call(forward, backward, (), tangents)


_map.defjvp(_refuse, symbolic_zeros=True)

Product = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Bilinear:
    """A map that is linear in either argument, with the rules that take cotangents back.

    Call it with two arrays. Both modes work, in any order and depth, since the derivative in one
    argument is the map itself with a tangent there. Construct a map once for each use, so that
    equal programs compare equal and are traced once.

    value: (a, b) -> array.
    to_a: (b, g) -> cotangent of a, in any dtype; it is rounded to a's.
    to_b: (a, g) -> cotangent of b, likewise.
    """

    value: Product
    to_a: Product
    to_b: Product

    def __call__(self, a: Array, b: Array) -> Array:
        """Return value(a, b)."""
        return _bilinear(self, a, b)

    def tangent(self, primals: tuple[Array, Array], tangents: Sequence[Any]) -> Array | None:
        """Return the tangent of value(a, b) at the primals (a, b).

        Tangents may be `SymbolicZero`; the result is None if all are.
        """
        return _product_rule(self, primals, tangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _bilinear(f: Bilinear, a: Array, b: Array) -> Array:
    return f.value(a, b)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _along_a(f: Bilinear, b: Array, a: Array) -> Array:
    """Return f(a, b) as a linear map of a."""
    return linear_call(lambda b, a: f.value(a, b), lambda b, g: f.to_a(b, g).astype(a.dtype), b, a)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _along_b(f: Bilinear, a: Array, b: Array) -> Array:
    """Return f(a, b) as a linear map of b."""
    return linear_call(f.value, lambda a, g: f.to_b(a, g).astype(b.dtype), a, b)


def _product_rule(f: Bilinear, primals: Sequence[Array], tangents: Sequence[Any]) -> Array | None:
    """Return the tangent of f(a, b) for primals (a, b) in this order, or None if it is zero."""
    (a, b), (da, db), terms = primals, tangents, []
    if not is_zero(da):
        terms.append(_along_a(f, b, da))
    if not is_zero(db):
        terms.append(_along_b(f, a, db))
    return cast(Array, sum(terms)) if terms else None


def _define_rule(apply, in_order):
    """Define the rule of one of the functions above. in_order: its two arguments as (a, b)."""

    def rule(f, primals, tangents):
        out = apply(f, *primals)
        tangent = _product_rule(f, in_order(primals), in_order(tangents))
        return out, jnp.zeros_like(out) if tangent is None else tangent

    apply.defjvp(rule, symbolic_zeros=True)


_define_rule(_bilinear, lambda pair: pair)
_define_rule(_along_a, lambda pair: pair[::-1])
_define_rule(_along_b, lambda pair: pair)

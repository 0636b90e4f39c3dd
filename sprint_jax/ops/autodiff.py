"""Maps with transposes of our own, which forward and reverse mode both understand: linear ones and bilinear ones."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, linear_call

# Name of what takes long to compute again - results of products with weights, of attentions, of convolutions: a backward pass that
# recomputes only cheap things keeps it.
KEPT = "kept"


def kept(a):
    """The array, by that name."""
    return checkpoint_name(a, KEPT)


def is_zero(tangent):
    """Whether JAX knows a tangent to be zero without computing it."""
    return isinstance(tangent, SymbolicZero)


def linear_map(tangent, transpose, residuals, tangents):
    """tangent(residuals, tangents), whose transpose is transpose(residuals, cotangent).

    Args:
      tangent: (residuals, tangents) -> array, linear in tangents.
      transpose: (residuals, cotangent) -> tuple like tangents.
      residuals: tuple of arrays.
      tangents: tuple of arrays and `SymbolicZero`s, not all of the latter. Functions get zeros for these: transposition
        wants to know what is linear, and a constant zero is not.

    The map itself has no derivative: sCM stops the tangent of the network before the loss sees it. Who forgets to
    stop it gets NaN in every gradient that would have come this way, rather than a gradient that lacks a term.
    """
    present = tuple(i for i, d in enumerate(tangents) if not is_zero(d))
    shapes = tuple((d.shape, d.dtype) for d in tangents)

    def filled(residuals, given):
        found = dict(zip(present, given, strict=True))
        return tangent(
            residuals,
            tuple(found[i] if i in found else jnp.zeros(*s) for i, s in enumerate(shapes)),
        )

    def chosen(residuals, cotangent):
        found = transpose(residuals, cotangent)
        return tuple(found[i] for i in present)

    return _map(filled, chosen, residuals, tuple(tangents[i] for i in present))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _map(tangent, transpose, residuals, tangents):
    return linear_call(tangent, transpose, residuals, tangents)


def _refuse(tangent, transpose, primals, tangents):
    out = _map(tangent, transpose, *primals)
    asked = tuple(d for d in jax.tree.leaves(tangents, is_leaf=is_zero) if not is_zero(d))
    return out, _poison(out.shape, out.dtype, asked) if asked else jnp.zeros_like(out)


def _poison(shape, dtype, tangents):
    """NaN, formally linear in the tangents. Its transpose gives NaN where a cotangent arrives, and zero where none
    does, as in a loop that carries tangents nobody asks after."""
    like = tuple((d.shape, d.dtype) for d in tangents)

    def forward(_, tangents):
        return jnp.full(shape, jnp.nan, dtype) * sum(d.ravel()[0].astype(dtype) for d in tangents)

    def backward(_, cotangent):
        value = jnp.where(jnp.any(cotangent != 0), jnp.nan, 0.0)
        return tuple(jnp.full(s, value, d) for s, d in like)

    return linear_call(forward, backward, (), tangents)


_map.defjvp(_refuse, symbolic_zeros=True)


@dataclasses.dataclass(frozen=True)
class Bilinear:
    """A map that is linear in either argument, and how cotangents go back. Call it with two arrays.

    value: (a, b) -> array. to_a: (b, g) -> cotangent of a, to_b: (a, g) -> cotangent of b, each in any dtype; it is rounded to
    that of its argument. A map is made once for each use, so that the same program compares equal and is traced once.

    Both modes work, in any order and depth: the derivative in one argument is the map itself with a tangent there.
    """

    value: Callable[[jax.Array, jax.Array], jax.Array]
    to_a: Callable[[jax.Array, jax.Array], jax.Array]
    to_b: Callable[[jax.Array, jax.Array], jax.Array]

    def __call__(self, a, b):
        return _bilinear(self, a, b)

    def tangent(self, primals, tangents):
        """Of value(a, b), for (a, b) and tangents of which some may be `SymbolicZero`; None where all are."""
        return _product_rule(self, primals, tangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _bilinear(f, a, b):
    return f.value(a, b)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _along_a(f, b, a):
    """f(a, b) as a linear map of a."""
    return linear_call(lambda b, a: f.value(a, b), lambda b, g: f.to_a(b, g).astype(a.dtype), b, a)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _along_b(f, a, b):
    return linear_call(f.value, lambda a, g: f.to_b(a, g).astype(b.dtype), a, b)


def _product_rule(f, primals, tangents):
    """Of f(a, b), for (a, b) in this order."""
    (a, b), (da, db), terms = primals, tangents, []
    if not is_zero(da):
        terms.append(_along_a(f, b, da))
    if not is_zero(db):
        terms.append(_along_b(f, a, db))
    return sum(terms) if terms else None


def _derived(apply, in_order):
    """The rule of one of the three functions above. in_order: its two arguments as (a, b)."""

    def rule(f, primals, tangents):
        out = apply(f, *primals)
        tangent = _product_rule(f, in_order(primals), in_order(tangents))
        return out, jnp.zeros_like(out) if tangent is None else tangent

    apply.defjvp(rule, symbolic_zeros=True)


_derived(_bilinear, lambda pair: pair)
_derived(_along_a, lambda pair: pair[::-1])
_derived(_along_b, lambda pair: pair)

"""A tangent kernel and its transpose as one linear map, which forward and reverse mode both understand."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, linear_call


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
        return tangent(residuals, tuple(found[i] if i in found else jnp.zeros(*s) for i, s in enumerate(shapes)))

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

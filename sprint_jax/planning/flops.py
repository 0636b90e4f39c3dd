"""Arithmetic of a function by its traced operations, without running or compiling it.

XLA's own count (`cost_analysis`) counts a loop's body once. Here the body of a scan counts as often
as it runs. A multiply-add counts as two.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters import partial_eval

from sprint_jax.errors import UserError

# The parameter that holds the jaxpr of a primitive that runs one jaxpr once. For custom derivatives
# and linear calls that is the forward rule; traced derivatives are ordinary equations by then.
_BODY = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "linear_call": "callee",
    "composite": "jaxpr",
}

# Primitives that compute nothing: they move, rename or convert.
_MOVES = frozenset(
    [
        "broadcast_in_dim",
        "reshape",
        "transpose",
        "squeeze",
        "expand_dims",
        "slice",
        "dynamic_slice",
        "dynamic_update_slice",
        "concatenate",
        "pad",
        "rev",
        "gather",
        "scatter",
        "copy",
        "copy_p",
        "convert_element_type",
        "bitcast_convert_type",
        "iota",
        "stop_gradient",
        "reduce_precision",
        "sharding_constraint",
        "mesh_cast",
        "reshard",
        "device_put",
        "split",
        "name",
        "optimization_barrier",
        "platform_index",
        "axis_index",
        "empty",
        "empty2",
        "create_token",
        "random_wrap",
        "random_unwrap",
        "pvary",
        "pcast",
        "all_gather",
        "all_to_all",
        "ppermute",
        "get",
        "swap",
    ]
)

_REDUCTIONS = frozenset(
    [
        "reduce_sum",
        "reduce_max",
        "reduce_min",
        "reduce_prod",
        "reduce_and",
        "reduce_or",
        "reduce_xor",
        "argmax",
        "argmin",
        "reduce",
        "cumsum",
        "cumprod",
        "cummax",
        "cummin",
        "cumlogsumexp",
    ]
)


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOP of a whole program, over all devices."""

    # Dot products, 2 for each multiply-add.
    matmul: int = 0
    # Convolutions, 2 for each tap of each output. Zeros of the border count; zeros that a
    # transposed convolution puts between its inputs do not.
    convolution: int = 0
    # Anything else that computes, 1 for each output element; reductions 1 for each input element.
    elementwise: int = 0
    # While loops whose number of trips the trace does not tell. Each counts as one trip.
    unknown_loops: int = 0

    @property
    def multiplied(self) -> int:
        """The FLOP of a matrix unit: matmul + convolution."""
        return self.matmul + self.convolution


def count(function: Callable[..., Any], *abstract_args: Any) -> Flops:
    """Return the FLOP of function(*abstract_args).

    The arguments are arrays or trees of `jax.ShapeDtypeStruct`. Operations on which no output
    depends are left out, as the compiler does. Equal computations are not merged. Raises UserError
    for matrix products inside a primitive whose number of repetitions is not known here.
    """
    closed = jax.make_jaxpr(function)(*abstract_args)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _jaxpr(jaxpr)


def _jaxpr(jaxpr):
    return _add(_equation(e) for e in jaxpr.eqns)


def _equation(equation):
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return Flops(matmul=_matmul(equation))
    if name == "conv_general_dilated":
        return Flops(convolution=_convolution(equation))
    if name in _BODY:
        return _jaxpr(_open(params[_BODY[name]]))
    if name == "scan":
        return _times(_jaxpr(_open(params["jaxpr"])), params["length"])
    if name == "while":
        trip = _add([_jaxpr(_open(params["cond_jaxpr"])), _jaxpr(_open(params["body_jaxpr"]))])
        return dataclasses.replace(trip, unknown_loops=trip.unknown_loops + 1)
    if name == "cond":
        # Count the most expensive branch. `platform_dependent` is a cond too: the platform with the
        # most products counts.
        branches = [_jaxpr(_open(b)) for b in params["branches"]]
        return max(branches, key=lambda f: (f.multiplied, f.elementwise))
    if name == "shard_map":  # the body is one device's part along the manual axes
        sizes = dict(params["mesh"].shape)
        return _times(
            _jaxpr(_open(params["jaxpr"])),
            math.prod(sizes[axis] for axis in params["newly_manual_axes"]),
        )
    if name == "pallas_call":
        return _times(_jaxpr(_open(params["jaxpr"])), math.prod(params["grid_mapping"].grid))
    if _inner(params).multiplied:
        remedy = "state in sprint_jax/planning/flops.py how often it runs"
        raise UserError(f"FLOP of primitive {name} are not known: {remedy}")
    if name in _MOVES:
        return Flops()
    variables = equation.invars if name in _REDUCTIONS else equation.outvars
    return Flops(elementwise=sum(_size(v) for v in variables))


def _matmul(equation):
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * _size(equation.outvars[0]) * math.prod(shape[a] for a in contracted)


def _convolution(equation):
    """Return the FLOP: each output element meets each tap of each input channel of its group."""
    kernel = equation.invars[1].aval.shape
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    taps = math.prod(kernel) // outputs
    # Zeros between the inputs (the gradient of a strided convolution) meet their share of the taps.
    return 2 * _size(equation.outvars[0]) * taps // math.prod(equation.params["lhs_dilation"])


def _inner(params):
    """Return the FLOP of all jaxprs among a primitive's parameters, once each."""
    values = [v for p in params.values() for v in (p if isinstance(p, (tuple, list)) else [p])]
    return _add(_jaxpr(_open(v)) for v in values if hasattr(_open(v), "eqns"))


def _open(jaxpr):
    """Return the jaxpr inside a closed one, or the jaxpr itself."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _size(variable):
    return math.prod(getattr(variable.aval, "shape", ()))


def _add(parts):
    columns = zip(*(dataclasses.astuple(p) for p in parts))
    return Flops(*map(sum, columns))


def _times(flops, n):
    """Return the FLOP of n runs; a loop of unknown length stays one loop."""
    return Flops(
        n * flops.matmul, n * flops.convolution, n * flops.elementwise, flops.unknown_loops
    )

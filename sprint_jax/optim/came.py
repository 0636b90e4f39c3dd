"""CAME, the optimizer that SANA and SANA-Sprint were trained with, as an optax transformation.

Confidence-guided Adaptive Memory Efficient Optimization (Luo et al. 2023, arXiv 2307.02047), with
the second moments as SANA uses them: matrices keep row and column means, everything else a full
second moment. With g the gradient of one tensor, means over its rows and columns and all moments
starting at zero:

    V = EMA_b2(g^2 + eps1)               rebuilt for a matrix as row col / mean(row)
    u = g / sqrt(V)                      then u / max(1, rms(u) / clip_threshold)
    m = EMA_b1(u)
    S = EMA_b3((u - m)^2 + eps2)         matrices only, rebuilt in the same way
    p <- p - lr (m / sqrt(S) + weight_decay p)      without / sqrt(S) where there is no matrix

The published networks join two projections of the text, keys and values, in one matrix; here they
are two, each with means and a clipping of its own. There is no bias correction. eps1 guards the
second moment and eps2 the instability S, as in the paper.

A leaf of a stack of layers is one tensor per layer, as in the published networks: every mean and
the clipping are taken layer by layer, so stacking changes nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class CameState(NamedTuple):
    """The state of CAME.

    count: int32, updates done. The rest have the structure of the parameters, float32.

    mu: first moment, shaped as the parameter. row [..., in] and col [..., out]: means of the
    second moment of a matrix [..., in, out] over its columns and over its rows; res_row and
    res_col: the same of the instability. nu: second moment of any other leaf, shaped as the leaf.
    Where a leaf has none of a kind stands optax.MaskedNode(), which holds no array: Orbax refuses
    arrays of size zero.
    """

    count: jax.Array
    mu: optax.Params
    row: optax.Params
    col: optax.Params
    nu: optax.Params
    res_row: optax.Params
    res_col: optax.Params


class Rules(NamedTuple):
    """How CAME sees the parameters of one network.

    factored: (path, leaf) -> whether the leaf is a matrix with row and column means. stacked:
    (path, leaf) -> how many leading axes of another leaf are layers.
    """

    factored: Callable[[tuple[str, ...], Any], bool]
    stacked: Callable[[tuple[str, ...], Any], int]


def _dit_factored(path, leaf):
    """Return whether a leaf of a LinearDiT is a matrix: kernels and the modulation tables are.

    SANA factors weights with two axes and 1x1 convolutions, so tables [6, D] and [2, D] as well,
    but no 3x3 convolution (`conv_depth_kernel`).
    """
    return path[-1] in ("kernel", "scale_shift_table")


def _dit_stacked(path, leaf):
    """Return 1 for the stacked blocks of a LinearDiT or a ControlNet, else 0."""
    return int("blocks" in path or "zero_out" in path)


# The heads' kernels are one-dimensional convolutions, which SANA does not factor; their leading
# axis counts heads.
LINEAR_DIT = Rules(_dit_factored, _dit_stacked)
HEADS = Rules(lambda path, leaf: False, lambda path, leaf: 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """Constants of `came`."""

    b1: float
    b2: float
    b3: float
    eps1: float
    eps2: float
    clip_threshold: float


class _Moments(NamedTuple):
    """The moments of one leaf: fields of `CameState` without the count."""

    mu: Any
    row: Any
    col: Any
    nu: Any
    res_row: Any
    res_col: Any


def came(
    learning_rate: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    eps1: float = 1e-30,
    eps2: float = 1e-16,
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
    factored: Callable[[tuple[str, ...], Any], bool],
    stacked: Callable[[tuple[str, ...], Any], int],
) -> optax.GradientTransformation:
    """Build CAME as described above; updates are what `optax.apply_updates` adds.

    learning_rate: a number, or a schedule of the number of updates done. weight_decay: decoupled,
    times the learning rate; needs `params` in `update`. factored, stacked: see `Rules`.
    """
    rules = Rules(factored, stacked)
    c = _Settings(b1=b1, b2=b2, b3=b3, eps1=eps1, eps2=eps2, clip_threshold=clip_threshold)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        if weight_decay and params is None:
            raise ValueError("weight_decay needs the parameters: update(gradients, state, params)")
        leaves, tree = jax.tree_util.tree_flatten_with_path(grads)
        parts = zip(*(tree.flatten_up_to(part) for part in state[1:]), strict=True)
        new: list[Any] = []
        for (path, g), part in zip(leaves, parts, strict=True):
            g, moments, names = g.astype(jnp.float32), _Moments(*part), _names(path)
            if rules.factored(names, g):
                new.append(_matrix_step(c, g, moments))
            else:
                axes = tuple(range(rules.stacked(names, g), g.ndim))
                new.append(_full_step(c, g, moments, axes))
        directions, *moments = (tree.unflatten(column) for column in zip(*new, strict=True))
        lr: Any = learning_rate(state.count) if callable(learning_rate) else learning_rate
        if weight_decay:
            directions = jax.tree.map(lambda d, p: d + weight_decay * p, directions, params)
        return jax.tree.map(lambda d: -lr * d, directions), CameState(state.count + 1, *moments)

    transform: Any = update
    return optax.GradientTransformation(lambda params: _init(params, rules), transform)


def _init(params: Any, rules: Rules) -> CameState:
    """Make the state of CAME: zeros, and nothing where a leaf has no moment of a kind."""

    def zeros(shape, matrix):
        def one(path, p):
            if _is_matrix(path, p, rules) != matrix:
                return optax.MaskedNode()
            return jnp.zeros(shape(p), jnp.float32)

        return jax.tree_util.tree_map_with_path(one, params)

    rows = lambda p: p.shape[:-1]
    cols = lambda p: p.shape[:-2] + p.shape[-1:]
    return CameState(
        count=jnp.zeros((), jnp.int32),
        mu=jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
        row=zeros(rows, True),
        col=zeros(cols, True),
        nu=zeros(lambda p: p.shape, False),
        res_row=zeros(rows, True),
        res_col=zeros(cols, True),
    )


def _is_matrix(path, p, rules: Rules) -> bool:
    names = _names(path)
    if not rules.factored(names, p):
        return False
    if p.ndim < 2:
        raise ValueError(f"{'/'.join(names)} has shape {p.shape}: only a matrix can be factored")
    return True


def _matrix_step(c: _Settings, g: jax.Array, m: _Moments) -> tuple:
    """Return (direction, moments) of a matrix, or of a stack of matrices."""
    row, col = factored_average(m.row, m.col, jnp.square(g) + c.eps1, c.b2)
    u = _clip(c, over_root(g, row, col), (-2, -1))
    mu = c.b1 * m.mu + (1 - c.b1) * u
    square = jnp.square(u - mu) + c.eps2
    res_row, res_col = factored_average(m.res_row, m.res_col, square, c.b3)
    return over_root(mu, res_row, res_col), mu, row, col, m.nu, res_row, res_col


def _full_step(c: _Settings, g: jax.Array, m: _Moments, axes: tuple[int, ...]) -> tuple:
    """Return (direction, moments) of a leaf with a full second moment."""
    nu = c.b2 * m.nu + (1 - c.b2) * (jnp.square(g) + c.eps1)
    mu = c.b1 * m.mu + (1 - c.b1) * _clip(c, g * jax.lax.rsqrt(nu), axes)
    return mu, mu, m.row, m.col, nu, m.res_row, m.res_col


def _clip(c: _Settings, u: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    rms = jnp.sqrt(jnp.square(u).mean(axes, keepdims=True))
    return u / jnp.maximum(1.0, rms / c.clip_threshold)


def factored_average(
    row: jax.Array, col: jax.Array, square: jax.Array, decay: float
) -> tuple[jax.Array, jax.Array]:
    """Move the means over columns, row [..., in], and over rows, col [..., out], towards square."""
    return decay * row + (1 - decay) * square.mean(-1), decay * col + (1 - decay) * square.mean(-2)


def over_root(x: jax.Array, row: jax.Array, col: jax.Array) -> jax.Array:
    """Return x / sqrt(row col / mean(row)) for x [..., in, out], row [..., in] and col [..., out].

    Factor by factor: the product of two small means, or a small one over a large one, leaves
    float32's range where a whole row of gradients is zero, and 0 times infinity would follow.
    """
    scale = jnp.sqrt(row.mean(-1, keepdims=True)) * jax.lax.rsqrt(row)
    return x * scale[..., None] * jax.lax.rsqrt(col)[..., None, :]


def _names(path):
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)

"""The place of every array of training: one mesh, and ordered rules from names to partitions.

The mesh has two axes. "data" holds copies of the parameters, "fsdp" cuts them; a batch is split
over both. There is no third axis for tensor parallelism: at the published sizes a block's weights
fit one device many times over, and its activations are already split by sample.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sprint_jax.errors import UserError

DATA, FSDP = "data", "fsdp"

# CAME's factored moments of parameters, which may be those of a trunk or of a ControlNet.
_FACTORED = "({0}|res_({0}))/(trunk/|control/)?({1})$".format
# First match wins; names are joined by "/" and end as the parameter does, so one rule serves the
# parameter, its average, its gradients' moments and the frozen copies. Of a matrix the axis that
# is cut is never the stack's (layers are taken one by one) and matters little else: it is gathered
# before use.
RULES = (
    (r"(step|rejected|count|updates)$", P()),
    (
        _FACTORED("row|col", "blocks/.*kernel|zero_out/kernel"),
        P(None, FSDP),
    ),  # moments [L, in] and [L, out]
    (_FACTORED("row|col", "(inputs|outputs)/.*(kernel|table)|zero_in/kernel"), P()),
    (_FACTORED("row", "blocks/scale_shift_table"), P()),
    (_FACTORED("col", "blocks/scale_shift_table"), P(None, FSDP)),
    (r"blocks/.*/kernel$", P(None, FSDP, None)),
    (r"blocks/.*conv_depth_kernel$", P(None, None, None, FSDP)),
    (r"blocks/scale_shift_table$", P(None, None, FSDP)),
    (r"blocks/.*(bias|weight)$", P(None, FSDP)),
    (r"zero_out/kernel$", P(None, FSDP, None)),  # of a ControlNet
    (r"zero_out/bias$", P(None, FSDP)),
    (r"zero_in/kernel$", P(FSDP, None)),
    (r"zero_in/bias$", P(FSDP)),
    (r"inputs/logvar/kernel$", P(FSDP, None)),
    (r"inputs/logvar/bias$", P()),
    (r"inputs/.*kernel$", P(None, FSDP)),
    (r"inputs/.*(bias|weight)$", P(FSDP)),
    (r"outputs/scale_shift_table$", P(None, FSDP)),
    (r"outputs/proj_out/kernel$", P(FSDP, None)),
    (r"outputs/proj_out/bias$", P()),
    (r"conv_(in|mid|out)/kernel$", P(None, FSDP, None)),  # heads of the discriminator, stacked
    (r"conv_out/(bias|u)$", P()),
    (r"conv_(in|mid|out)/(bias|u|v)$", P(None, FSDP)),
    (r"norm_(in|mid)/(scale|bias)$", P(None, FSDP)),
    (r"text_encoder/model/embed$", P(FSDP, None)),  # Gemma-2, where captions come as token ids
    (r"text_encoder/model/layers/(q|k|v|o|gate|up|down)$", P(None, FSDP, None)),
)
# What no rule names is replicated, and reported from this size on.
BIG = 2**24


def mesh(data: int, fsdp: int, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Make a mesh of data x fsdp over `devices` (default: all). data = -1 takes what fsdp leaves.

    Raises UserError when the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if data == -1 and count % fsdp == 0:
        data = count // fsdp
    if data * fsdp != count:
        raise UserError(
            f"config.mesh is {data} x {fsdp} (data x fsdp) and there are {count} devices: change "
            "config.mesh.fsdp, or let config.mesh.data=-1 take what is left"
        )
    axes = (jax.sharding.AxisType.Auto,) * 2
    try:
        return jax.make_mesh((data, fsdp), (DATA, FSDP), devices=devices, axis_types=axes)
    except NotImplementedError:
        # No product of a torus's sides is fsdp, as for 8 on 4 x 4 x 4: a side is cut in two, at the
        # cost of bandwidth.
        cut = mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(cut, (DATA, FSDP), axis_types=axes)


def shardings(
    tree: Any, mesh: jax.sharding.Mesh, say: Callable[[str], None] = lambda message: None
) -> Any:
    """Return a NamedSharding for every leaf of an abstract tree.

    say: called with a line for each large leaf that stays whole on every device. Raises UserError
    for a leaf that its rule does not fit.
    """

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = _spec(name, leaf, mesh)
        if spec == P() and leaf.size * leaf.dtype.itemsize >= BIG and mesh.size > 1:
            say(f"{name} {leaf.shape} stays whole on every device: no sharding rule names it")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def _spec(name, leaf, mesh):
    spec = next((spec for pattern, spec in RULES if re.search(pattern, name)), P())
    if leaf.size == 0:  # an optimizer's empty place
        return P()
    if len(spec) > leaf.ndim:
        raise UserError(
            f"{name} has shape {leaf.shape} and its sharding rule {spec} has more axes: fix the "
            f"rule"
        )
    for axis, size in zip(spec, leaf.shape):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"{name} {leaf.shape} does not divide by config.mesh.{axis}={mesh.shape[axis]}: "
                f"use a divisor of {size}, for example {math.gcd(size, mesh.shape[axis])}"
            )
    return spec


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Return the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def batch(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Return the sharding of samples over all devices."""
    return NamedSharding(mesh, P((DATA, FSDP)))


def abstract(tree: Any, placed: Any) -> Any:
    """Return ShapeDtypeStructs of a tree with the given shardings."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, placed
    )


def per_device_bytes(tree: Any) -> int:
    """Count the bytes that one device holds of a tree of arrays or ShapeDtypeStructs with
    shardings.
    """
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)

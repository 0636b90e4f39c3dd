"""Where networks split samples over devices and gather weights.

Outside a mesh (`jax.set_mesh`) nothing here has an effect, so networks run on one device as they
are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec


def split_over_devices(x: Array) -> Array:
    """Return x with its leading (sample) axis split over all devices of the mesh in use, if any.

    Without this the compiler may follow the sharding of the weights and gather whole activations.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(mesh.axis_names))


def scan_over_samples(x: Array) -> Array:
    """Reshape [B, ...] to [B / n, n, ...] for the n devices of the mesh in use, 1 outside a mesh.

    A loop over the first axis then works on all devices at once, and no sample leaves its device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    count = 1 if mesh.empty or x.shape[0] % mesh.size else mesh.size
    x = jnp.swapaxes(x.reshape(count, -1, *x.shape[1:]), 0, 1)
    if count == 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(None, mesh.axis_names))


def gather_weights(params: Any, dtype: Any) -> Any:
    """Return a tree of weights that every device of the mesh in use holds entirely.

    Stated explicitly; otherwise the compiler may shard activations like the weights. Leaves whose
    names end in "kernel" are moved in `dtype`, to which their layers cast them anyway.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params

    def gather(path, leaf):
        leaf = leaf.astype(dtype) if path[-1].key.endswith("kernel") else leaf
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec())

    return jax.tree_util.tree_map_with_path(gather, params)

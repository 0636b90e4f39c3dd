"""What a network says about devices: samples are split over them, weights are whole where they are used.

None of this does anything outside a mesh (`jax.set_mesh`), so networks run as they are on one device.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def split_over_devices(x):
    """Keeps the leading (sample) axis over all devices of the mesh in use, if there is one.

    Without it the compiler may follow the weights' partition instead and gather whole activations.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(mesh.axis_names))


def samples_first(x):
    """[B, ...] -> [B / n, n, ...] for the n devices of the mesh in use, each with its own samples; n = 1 outside.

    A loop over the first axis then works on all devices at once, and no sample leaves its device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    count = 1 if mesh.empty or x.shape[0] % mesh.size else mesh.size
    x = jnp.swapaxes(x.reshape(count, -1, *x.shape[1:]), 0, 1)
    return (
        x
        if count == 1
        else jax.lax.with_sharding_constraint(x, PartitionSpec(None, mesh.axis_names))
    )


def gathered(params, dtype):
    """Weights whole on every device of the mesh in use, if there is one: what sharded parameters are before use.

    Said outright, because the compiler may else cut activations by the weights' partition. Kernels travel
    in the compute dtype, to which their layers cast them anyway.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params

    def gather(path, leaf):
        leaf = leaf.astype(dtype) if path[-1].key.endswith("kernel") else leaf
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec())

    return jax.tree_util.tree_map_with_path(gather, params)

"""Kernels over several devices, run by test_kernels.py. Prints one line of JSON.

PYTHONPATH=tests python -m helpers.kernels_on_devices mesh
    PYTHONPATH=tests python -m helpers.kernels_on_devices tpu

`mesh` takes eight simulated devices and prints the error against one device and the gathers. `tpu`
compiles with libtpu for an absent v5e:2x2.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from helpers.arrays import normal_arrays, tree_error
from helpers.kernel_cases import (
    cross_case,
    derivatives,
    differentiation_modes,
    linear,
    linear_case,
    published_case,
    uneven_mask,
)
from sprint_jax.ops import cross_attention, depthwise, linear_attention


def mesh_of(devices: list, *sizes: int) -> jax.sharding.Mesh:
    """Return a mesh with axes data and fsdp."""
    return jax.make_mesh(sizes, ("data", "fsdp"), devices=devices, axis_types=(AxisType.Auto,) * 2)


def count_gathers(compiled: Any) -> int:
    """Return the number of all-gathers in a compiled program."""
    return compiled.as_text().count("all-gather")


def run_on_mesh() -> dict[str, dict]:
    """Return {case: error and gathers} on a mesh."""
    mesh = mesh_of(jax.devices(), 4, 2)
    split, whole = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec(mesh.axis_names), PartitionSpec())
    )
    cases = {}
    for name, batch in (("linear", 8), ("linear 3 samples", 3)):
        f = lambda q, k, v, a, b, mask: linear(linear_attention.attend, 2, backend="interpret")(
            q, k, v, a, b
        )
        cases[name] = (f, *linear_case(0, batch, 20, 2, 32, True), np.ones((batch, 1)))
    f = lambda q, k, v, mask: cross_attention.attend(q, k, v, mask, backend="interpret")
    cases["cross"] = (f, *cross_case(0, 8, 20, 11, 2, 16), uneven_mask(8, 11))
    shapes = (8, 6, 16, 32), (3, 3, 32), (32,)
    f = lambda x, w, bias, mask: depthwise.conv(x, w, bias, True, "interpret")
    cases["depthwise"] = (
        f,
        normal_arrays(*shapes, seed=0),
        normal_arrays(*shapes, seed=1),
        normal_arrays((8, 6, 16, 16), seed=2)[0],
        np.ones((8, 1)),
    )
    found = {}
    for name, (f, primals, tangents, g, mask) in cases.items():
        fits = g.shape[0] % mesh.size == 0
        place = lambda a: jax.device_put(a, split if len(a) == len(g) and fits else whole)
        expected = derivatives(lambda *p: f(*p, mask), primals, tangents, g, scan=False)

        def run(primals, tangents, g, mask):
            h = lambda *p: f(*p, mask)
            return (
                jax.jvp(h, primals, tangents),
                jax.vjp(h, *primals)[1](g),
                (),
                jax.jvp(lambda x: h(x, *primals[1:]), primals[:1], tangents[:1])[1],
            )

        arguments = jax.tree.map(place, (primals, tangents, g, jnp.asarray(mask)))
        with jax.set_mesh(mesh):
            compiled = jax.jit(run).lower(*arguments).compile()
            out = compiled(*arguments)
        found[name] = {
            "error": tree_error(jax.device_get(out), expected),
            "gathers": count_gathers(compiled),
        }
    return found


def compile_for_tpu() -> dict[str, dict]:
    """Return {case: kernels and gathers} of programs for a TPU."""
    from jax.experimental import topologies

    mesh = mesh_of(
        topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices, 2, 2
    )
    found = {}
    for kind, batch in (("linear", 2), ("linear", 4), (72, 4), (112, 4)):
        f, arguments = published_case(kind, "tpu", batch)
        place = lambda a: jax.ShapeDtypeStruct(
            a.shape,
            a.dtype,
            sharding=NamedSharding(
                mesh,
                PartitionSpec(mesh.axis_names) if a.ndim > 1 and batch == 4 else PartitionSpec(),
            ),
        )
        with jax.set_mesh(mesh):
            for mode, g in differentiation_modes(f).items():
                compiled = jax.jit(g).lower(*map(place, arguments)).compile()
                found[f"{kind} {batch} {mode}"] = {
                    "kernels": compiled.as_text().count("tpu_custom_call"),
                    "gathers": count_gathers(compiled),
                }
    return found


if __name__ == "__main__":
    print(json.dumps({"mesh": run_on_mesh, "tpu": compile_for_tpu}[sys.argv[1]]()))

"""XLA told to compile fast rather than to make fast programs: for runs of seconds on a CPU."""

import importlib.metadata
import os


def flags() -> str:
    """Options of XLA's compiler. Before jaxlib 0.11 the older of its ways to make loops is quicker too; later ones have the newer alone."""
    found = "--xla_backend_optimization_level=0"
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
        found += " --xla_cpu_use_fusion_emitters=false"
    return found


def start():
    """Sets them for this process; what XLA_FLAGS says already comes after them and wins. Without effect once JAX has met its devices."""
    os.environ["XLA_FLAGS"] = f"{flags()} {os.environ.get('XLA_FLAGS', '')}".rstrip()

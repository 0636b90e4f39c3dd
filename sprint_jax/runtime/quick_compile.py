"""XLA flags for short compilation rather than fast programs: for runs of seconds on a CPU."""

import importlib.metadata
import os


def flags() -> str:
    """Return options of XLA's compiler."""
    found = "--xla_backend_optimization_level=0"
    # The legacy loop emitter also compiles faster; jaxlib 0.11 removed it.
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
        found += " --xla_cpu_use_fusion_emitters=false"
    return found


def start() -> None:
    """Set the flags for this process. Has no effect once JAX has started its devices.

    Options that XLA_FLAGS has already come after these and win.
    """
    os.environ["XLA_FLAGS"] = f"{flags()} {os.environ.get('XLA_FLAGS', '')}".rstrip()

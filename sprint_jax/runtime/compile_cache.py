"""JAX's persistent compilation cache: a command that ran before starts without compiling.

The default folder is XDG_CACHE_HOME/sprint_jax/xla, or ~/.cache/sprint_jax/xla. JAX's own variables
win: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false turns the
cache off, JAX_COMPILATION_CACHE_MAX_SIZE bounds it in bytes.

An entry's key holds the program, the compiler's version and flags, and the device, including the
instruction sets of a CPU. So machines that share a home directory do not run each other's code.
"""

import contextlib
import importlib.util
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

MAX_BYTES = 4 * 2**30
_ORPHAN_SECONDS = 60


def start() -> None:
    """Turn the cache on for everything compiled from now on. Print a warning if that fails."""
    import jax

    config: Any = jax.config  # whose options are no attributes to a type checker
    if not config.jax_enable_compilation_cache:
        return
    if not config.jax_compilation_cache_dir:
        place = default_place()
        if place is None:
            _warn("this user has no home: name a folder by JAX_COMPILATION_CACHE_DIR")
            return
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            _warn(
                f"cannot write in {place} ({error.strerror}): name another folder by "
                "JAX_COMPILATION_CACHE_DIR"
            )
            return
        config.update("jax_compilation_cache_dir", str(place))
        # A bounded cache reads and writes under a file lock, for which JAX needs this package.
        if importlib.util.find_spec("filelock"):
            _default("jax_compilation_cache_max_size", MAX_BYTES)
        if config.jax_compilation_cache_max_size != -1:  # else JAX keeps no times of use
            _sweep(place)
    _default("jax_persistent_cache_min_compile_time_secs", 0.0)
    _default("jax_persistent_cache_min_entry_size_bytes", -1)


def default_place() -> pathlib.Path | None:
    """Return the default folder of the cache; None for a user without a home, as in containers."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(root) / "sprint_jax" / "xla" if os.path.isabs(root) else None


def _warn(why):
    print(f"warning: compiled programs are not kept, {why}", file=sys.stderr)


def _default(name, value):
    """Set an option of JAX unless its environment variable is set."""
    import jax

    if name.upper() not in os.environ:
        jax.config.update(name, value)


def _sweep(place):
    """Remove entries without a time of use.

    A process was killed while it wrote them, and JAX would never replace them.
    """
    for entry in place.glob("*-cache"):
        used = entry.with_name(entry.name.removesuffix("-cache") + "-atime")
        with contextlib.suppress(FileNotFoundError):  # another process sweeps as well
            if not used.exists() and time.time() - entry.stat().st_mtime > _ORPHAN_SECONDS:
                entry.unlink()

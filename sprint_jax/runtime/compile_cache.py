"""Compiled programs are kept on disk, so that a command that was run before starts without compiling.

JAX's persistent compilation cache, with a default place: XDG_CACHE_HOME/sprint_jax/xla, or
~/.cache/sprint_jax/xla. JAX's own variables win: JAX_COMPILATION_CACHE_DIR names another place,
JAX_ENABLE_COMPILATION_CACHE=false turns it off, JAX_COMPILATION_CACHE_MAX_SIZE bounds it in bytes.

An entry's key holds the program, the compiler's version and flags, and the device, for a CPU down to its
instruction sets, so machines that share a home directory do not run each other's code by mistake.
"""

import contextlib
import importlib.util
import os
import pathlib
import sys
import tempfile
import time

MAX_BYTES = 4 * 2**30
_ORPHAN_SECONDS = 60


def start():
    """Turns the cache on for what is compiled from here on. Where that fails it says so in a line and goes on."""
    import jax

    if not jax.config.jax_enable_compilation_cache:
        return
    if not jax.config.jax_compilation_cache_dir:
        place = default_place()
        if place is None:
            print(
                "warning: compiled programs are not kept, for this user has no home: name a place by JAX_COMPILATION_CACHE_DIR",
                file=sys.stderr,
            )
            return
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            print(
                f"warning: compiled programs are not kept, cannot write in {place} ({error.strerror}): name another "
                "place by JAX_COMPILATION_CACHE_DIR",
                file=sys.stderr,
            )
            return
        jax.config.update("jax_compilation_cache_dir", str(place))
        # With a bound entries are read and written under a file lock, for which JAX needs this package.
        if importlib.util.find_spec("filelock"):
            _default("jax_compilation_cache_max_size", MAX_BYTES)
        if (
            jax.config.jax_compilation_cache_max_size != -1
        ):  # without a bound JAX keeps no times of use
            _sweep(place)
    _default("jax_persistent_cache_min_compile_time_secs", 0.0)
    _default("jax_persistent_cache_min_entry_size_bytes", -1)


def default_place() -> pathlib.Path | None:
    """Where programs are kept unless JAX_COMPILATION_CACHE_DIR says otherwise. None for a user without a home, as containers have them."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(root) / "sprint_jax" / "xla" if os.path.isabs(root) else None


def _default(name, value):
    """Sets an option of JAX unless its variable does."""
    import jax

    if name.upper() not in os.environ:
        jax.config.update(name, value)


def _sweep(place):
    """Removes entries without a time of use: a process was killed while it wrote one, and JAX would never replace it."""
    for entry in place.glob("*-cache"):
        used = entry.with_name(entry.name.removesuffix("-cache") + "-atime")
        with contextlib.suppress(FileNotFoundError):  # another process sweeps as well
            if not used.exists() and time.time() - entry.stat().st_mtime > _ORPHAN_SECONDS:
                entry.unlink()

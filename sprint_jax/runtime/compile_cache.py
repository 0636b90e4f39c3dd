"""JAX's persistent compilation cache: a command that ran before starts without compiling.

The default folder is XDG_CACHE_HOME/sprint_jax/xla, or ~/.cache/sprint_jax/xla. JAX's own variables
win: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false turns the
cache off, JAX_COMPILATION_CACHE_MAX_SIZE bounds it in bytes.

An entry's key holds the program, the compiler's version and flags, and the device, including the
instruction sets of a CPU. So machines that share a home directory do not run each other's code.

JAX itself reads a damaged entry at every start, warns, compiles, and never replaces it. In JAX 0.10
one entry without a time of use keeps all others from being written. Here such entries are removed,
so that JAX writes them again, and that is reported once.
"""

import contextlib
import functools
import importlib.util
import os
import pathlib
import re
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from typing import Any

from sprint_jax.storage import files

MAX_BYTES = 4 * 2**30
_ENTRY, _USED = "-cache", "-atime"  # endings of JAX's files: an entry, and its time of use
_WRITING_SECONDS = 60  # an entry without a lock may be in the writing
_LOCK_SECONDS = 2.0
_READING = re.compile(r"Error reading persistent compilation cache entry for '(.+?)'")
_WRITING = re.compile(r"Error writing persistent compilation cache entry for '.+?': (.*)", re.S)
_ZSTD = b"\x28\xb5\x2f\xfd"


def start() -> None:
    """Turn the cache on for everything compiled from now on. Print a warning if that fails."""
    import jax

    config: Any = jax.config  # whose options are no attributes to a type checker
    if not config.jax_enable_compilation_cache:
        return
    chosen = config.jax_compilation_cache_dir
    place = pathlib.Path(chosen) if chosen else default_place()
    if place is None:
        _warn("this user has no home: name a folder by JAX_COMPILATION_CACHE_DIR")
        return
    if chosen and "://" in chosen:  # a bucket, which JAX reads by another package
        return
    if why := _unwritable(place):
        _warn(f"cannot write in {place} ({why}): name another folder by JAX_COMPILATION_CACHE_DIR")
        config.update("jax_compilation_cache_dir", None)
        return
    if not chosen:
        config.update("jax_compilation_cache_dir", str(place))
        # A bounded cache reads and writes under a file lock, for which JAX needs this package.
        if importlib.util.find_spec("filelock"):
            _default("jax_compilation_cache_max_size", MAX_BYTES)
    _default("jax_persistent_cache_min_compile_time_secs", 0.0)
    _default("jax_persistent_cache_min_entry_size_bytes", -1)
    cache = _Cache(place, bounded=config.jax_compilation_cache_max_size != -1)
    cache.sweep()
    cache.listen()


def _unwritable(place: pathlib.Path) -> str | None:
    """Make the folder. Return why it cannot be written, None if it can."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return error.strerror or str(error)


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


class _Cache:
    """JAX's folder of entries. bounded: JAX keeps times of use, and locks the folder."""

    def __init__(self, place: pathlib.Path, bounded: bool):
        self._place, self._bounded = place, bounded
        self._reported, self._warned = False, False

    def sweep(self) -> None:
        """Remove empty entries, and those that a killed process left half written.

        An entry from a cache without a bound gets the time of use that it lacks.
        """
        with contextlib.suppress(OSError), self._locked():
            for entry in list(self._place.glob(f"*{_ENTRY}")):
                with contextlib.suppress(FileNotFoundError):  # another process sweeps as well
                    self._check(entry)

    def _check(self, entry):
        described, used = entry.stat(), _time_of_use(entry)
        if self._bounded and not used.exists():
            if _is_whole(entry):
                with files.whole(used) as partial:
                    partial.write_bytes(described.st_mtime_ns.to_bytes(8, "little"))
            else:
                entry.unlink()
        elif not described.st_size:
            if self._bounded or time.time() - described.st_mtime > _WRITING_SECONDS:
                entry.unlink()
                self._report(entry.name)

    @contextlib.contextmanager
    def _locked(self):
        """Hold the lock under which JAX writes into a bounded cache."""
        if not self._bounded:
            yield
            return
        import filelock

        # Timeout is an OSError: another process is busy here, and the next start sweeps.
        with filelock.FileLock(self._place / ".lockfile", timeout=_LOCK_SECONDS):
            yield

    def listen(self) -> None:
        """Repair what JAX warns of, at the moment of its warning, and keep the warning quiet.

        JAX warns between reading an entry and writing it, so the entry is written by this process.
        """
        warnings.filterwarnings("always", "Error (reading|writing) persistent compilation cache")
        warnings.showwarning = functools.partial(self._show, warnings.showwarning)

    def _show(self, show: Callable[..., None], message: Any, *rest: Any, **options: Any) -> None:
        if found := _READING.match(str(message)):
            self._remove(found[1])
        elif found := _WRITING.match(str(message)):
            self.sweep()
            if not self._warned and _USED not in found[1]:  # that is repaired now
                self._warned = True
                _warn(f"cannot write in {self._place} ({' '.join(found[1].split())[:200]})")
        else:
            show(message, *rest, **options)

    def _remove(self, name):
        """Remove the entry of a program of this name that could not be read just now."""
        entries = list(self._place.glob(f"{name}-*{_ENTRY}"))
        # Of several, what is no whole file; else the one that JAX touched last.
        broken = [entry for entry in entries if not _is_whole(entry)]
        for entry in broken or sorted(entries, key=_last_use)[-1:]:
            with contextlib.suppress(OSError):
                entry.unlink()
                self._report(entry.name)

    def _report(self, name):
        if not self._reported:
            self._reported = True
            print(
                f"warning: {name} in {self._place} was damaged and is removed; damaged programs "
                "are compiled and kept again",
                file=sys.stderr,
            )


def _time_of_use(entry):
    return entry.with_name(entry.name.removesuffix(_ENTRY) + _USED)


def _last_use(entry):
    """Return the time of an entry's last use in nanoseconds; of its writing without a bound."""
    try:
        return int.from_bytes(_time_of_use(entry).read_bytes(), "little")
    except OSError:
        return entry.stat().st_mtime_ns


def _is_whole(entry):
    """Return whether an entry can be decompressed to its end."""
    try:
        data = entry.read_bytes()
        if not data.startswith(_ZSTD):
            return len(zlib.decompress(data)) > 4
        import zstandard  # pyright: ignore[reportMissingImports]

        return len(zstandard.ZstdDecompressor().decompress(data)) > 4
    except ImportError:  # of another environment, which can read it
        return True
    except Exception:  # each library has errors of its own
        return False

"""Files and folders: which of them count, and how they are written.

A file appears whole or not at all. A folder's hidden files and those that systems put beside a
person's own are never seen.
"""

import codecs
import contextlib
import errno
import fcntl
import os
import pathlib
import re
import shutil
import threading
import typing
import unicodedata
from collections.abc import Iterator
from typing import IO, Annotated, Any

from sprint_jax.errors import UserError

# Folders that systems and tools make beside a person's own files, in lower case.
_OF_SYSTEMS = frozenset(
    ("__macosx", "@eadir", "$recycle.bin", "recycler", "system volume information", "lost+found",
     "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp")
)  # fmt: skip
# Files and folders that are being written, and the lock of this set and of their renaming.
_UNFINISHED: set[pathlib.Path] = set()
_RENAMING = threading.Lock()
_REMOTE = re.compile(r"\s*([a-z][a-z0-9+.-]*)://?", re.IGNORECASE)
# The beginnings of gzip, zip, zstd and bzip2.
_COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh")
_SHOWN = 80  # characters of a path that a message shows

_IS_PATH = "path"
# The type of an option or a config value that names a file or folder. `is_path` recognizes it
# inside optional types and tuples too, and `Paths` and `config.parse` apply `given` to its values.
LocalPath = Annotated[str, _IS_PATH]


def local(path: str | os.PathLike, name: str) -> pathlib.Path:
    """Return a path that a person gave, as `given` checks and expands it."""
    return pathlib.Path(given(os.fspath(path), name))


def given(path: str | os.PathLike, name: str) -> str:
    """Return a path that a person gave, with a ~ at its beginning expanded; "" stays "".

    name: of what gave the path, such as "--out". Raises UserError for an address such as
    gs://bucket/folder, which would else become a folder of that name, for a ~ of nobody, and for
    a text that no file system takes as a path.
    """
    text = os.fspath(path)
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    if remote := _REMOTE.match(text):
        raise UserError(
            f"{name}={shown}: {remote[1]}:// is not read or written here: copy or mount it, and "
            "give the local path"
        )
    try:
        path = str(pathlib.Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        raise UserError(
            f"{name}={shown}: this user has no home here: give the whole path"
        ) from None
    try:
        os.lstat(path)
    except ValueError as error:  # a null character, or letters that this locale cannot encode
        raise UserError(f"{name}={shown!r} is no path ({error}): give another") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(
                f"{name}={shown} has {len(text)} characters, too many for a path here: give a "
                "shorter one"
            ) from None
    return path


def is_path(hint: Any) -> bool:
    """Return whether a type is LocalPath, LocalPath | None or tuple[LocalPath, ...]."""
    if _IS_PATH in getattr(hint, "__metadata__", ()):
        return True
    return any(is_path(part) for part in typing.get_args(hint))


class Paths:
    """A base of dataclasses of options: each LocalPath among them passes through `given`.

    It does so for a command line and for a Python caller alike.
    """

    def __post_init__(self) -> None:
        """Check and expand the paths. Raises UserError as `given` does."""
        for field, hint in typing.get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, field)
            if value is None or not is_path(hint):
                continue
            flag = f"--{field.rstrip('_')}"
            checked = (
                tuple(given(os.fspath(one), flag) for one in value)
                if isinstance(value, tuple | list)
                else given(os.fspath(value), flag)
            )
            object.__setattr__(self, field, checked)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is passed over.

    Its name begins with a dot (AppleDouble files, trash, caches), or a system made it.
    """
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def fold(name: str) -> str:
    """Return a name as systems see it that do not distinguish case and forms of accents."""
    return unicodedata.normalize("NFC", name).casefold()


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield a path beside `path` to write to.

    It takes the name of `path` when the context ends well, and is removed otherwise, by a signal as
    well. Several processes may write one path at once: each writes a file of its own.
    """
    path = pathlib.Path(path)
    partial, lock = _open_partial(path)
    with lock, unfinished(partial):
        yield partial
        with _RENAMING:
            os.replace(partial, path)
            _UNFINISHED.discard(partial)


def _open_partial(path: pathlib.Path) -> tuple[pathlib.Path, IO[bytes]]:
    """Return the name of a partial file and the lock that keeps other processes from it.

    PATH.partial, which a killed process may have left, unless another process writes there.
    """
    fixed = path.with_name(path.name + ".partial")
    lock = lock_file(fixed)
    if lock is not None:
        lock.truncate(0)  # a killed process may have left something
        return fixed, lock
    own = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(3).hex()}.partial")
    return own, own.open("ab")


def lock_file(path: pathlib.Path) -> IO[bytes] | None:
    """Make a file if there is none, and return it open and locked; None if another holds it.

    The lock ends with the process. A file system without locks locks nothing.
    """
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:  # no locks here, as on some network file systems
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its holder renamed or removed it in the meantime


@contextlib.contextmanager
def unfinished(path: pathlib.Path) -> Iterator[None]:
    """Remove a file or folder when the context ends, also by a signal, unless it was renamed."""
    with _RENAMING:
        _UNFINISHED.add(path)
    try:
        yield
    finally:
        with _RENAMING:
            if path in _UNFINISHED:
                _UNFINISHED.discard(path)
                _remove(path)


def rename_finished(path: pathlib.Path, target: pathlib.Path) -> None:
    """Give a folder of `unfinished` its name."""
    with _RENAMING:
        os.rename(path, target)
        _UNFINISHED.discard(path)


def stop_writing() -> None:
    """Let no file be finished in this process any more: threads that come to it wait forever."""
    _RENAMING.acquire(timeout=1.0)


def remove_unfinished() -> None:
    """Remove what `unfinished` holds. Call it after `stop_writing`, before the process ends."""
    for path in list(_UNFINISHED):
        _remove(path)


def _remove(path):
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text, whole or not at all.

    UTF-8 cannot hold lone surrogates, which come from file names that are no UTF-8 and from cut
    captions. They are written as \\udXXX, which JSON reads as the same character.
    """
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_text(path: str | os.PathLike) -> str:
    """Return UTF-8 text with \\n between lines, without the byte-order mark of some editors.

    Raises OSError, and ValueError that says which encoding the file seems to have instead.
    """
    data = pathlib.Path(path).read_bytes()
    if data.startswith(_COMPRESSED):
        raise ValueError("it is compressed: unpack it")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16 or UTF-32, by its byte-order mark: save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line} is not UTF-8, byte 0x{data[error.start]:02x}, as in Latin-1: save it as "
            "UTF-8"
        ) from None
    if "\0" in text:
        raise ValueError("it holds null characters, as UTF-16 without a mark: save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | os.PathLike) -> list[str]:
    """Return the lines of UTF-8 text; raises as `read_text` does.

    Only newlines end a line. JSON and prompts may hold U+2028 and the like, at which `splitlines`
    cuts.
    """
    return read_text(path).split("\n")


def below(root: str | os.PathLike, broken: bool = False) -> Iterator[pathlib.Path]:
    """Yield the paths of all files below a folder, through links to folders as well.

    Hidden files and folders are passed over, whatever the name of `root` itself. A folder that
    several paths reach is visited once, by its own name if that is below `root`.

    broken: also yield links that lead nowhere. Raises UserError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"cannot read the folder {error.filename} ({error.strerror}): allow it, or move it away"
        )

    seen, waiting = set(), [root]
    while waiting:
        for folder, folders, names in os.walk(waiting.pop(0), onerror=refuse):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            links = (os.path.join(folder, name) for name in folders)
            waiting += filter(os.path.islink, links)  # visited after all real folders
            shown = (pathlib.Path(folder, name) for name in names if not is_hidden(name))
            yield from (p for p in shown if p.is_file() or (broken and not p.exists()))


def children(folder: str | os.PathLike) -> list[pathlib.Path]:
    """Return the files and folders in a folder, sorted by name, without hidden ones."""
    shown = (path for path in pathlib.Path(folder).iterdir() if not is_hidden(path.name))
    return sorted(shown, key=lambda path: path.name)


def is_empty(folder: str | os.PathLike) -> bool:
    """Return whether a folder holds nothing at all, hidden files included."""
    return not any(pathlib.Path(folder).iterdir())


def append(path: str | os.PathLike, text: str) -> None:
    """Add UTF-8 text at the end of a file; make the file if there is none."""
    with pathlib.Path(path).open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)

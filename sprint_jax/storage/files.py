"""Files and folders: which of them count, and how they are written.

A file appears whole or not at all. A folder's hidden files and those that systems put beside a
person's own are never seen.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator

from sprint_jax.errors import UserError

# Folders that systems and tools make beside a person's own files.
_OF_SYSTEMS = frozenset(
    ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
_REMOTE = re.compile(r"([a-z][a-z0-9+.-]*)://?", re.IGNORECASE)


def local(path: str | os.PathLike, name: str) -> pathlib.Path:
    """Return a path that a person gave, with a ~ at its beginning expanded.

    name: of what gave the path, such as "--out". Raises UserError for an address such as
    gs://bucket/folder, which would else become a folder of that name, and for a ~ of nobody.
    """
    text = os.fspath(path)
    if remote := _REMOTE.match(text):
        raise UserError(
            f"{name}={text}: {remote[1]}:// is not read or written here: copy or mount it, and "
            "give the local path"
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{name}={text}: this user has no home here: give the whole path") from None


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is passed over.

    Its name begins with a dot (AppleDouble files, trash, caches), or a system made it.
    """
    return name.startswith(".") or name in _OF_SYSTEMS


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield a path beside `path` to write to.

    It takes the name of `path` when the context ends well, and is removed otherwise.
    """
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text, whole or not at all.

    UTF-8 cannot hold lone surrogates, which come from file names that are no UTF-8 and from cut
    captions. They are written as \\udXXX, which JSON reads as the same character.
    """
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_lines(path: str | os.PathLike) -> list[str]:
    """Return the lines of UTF-8 text, without the byte-order mark that some editors put first.

    Only newlines end a line. JSON and prompts may hold U+2028 and the like, at which `splitlines`
    cuts.
    """
    return pathlib.Path(path).read_text(encoding="utf-8-sig").split("\n")


def below(root: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield the paths of all files below a folder, through links to folders as well.

    Hidden files and folders are passed over, whatever the name of `root` itself. A folder that
    several paths reach is visited once, by its own name if that is below `root`.
    """
    seen, waiting = set(), [root]
    while waiting:
        for folder, folders, names in os.walk(waiting.pop(0)):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            links = (os.path.join(folder, name) for name in folders)
            waiting += filter(os.path.islink, links)  # visited after all real folders
            shown = (pathlib.Path(folder, name) for name in names if not is_hidden(name))
            yield from (path for path in shown if path.is_file())


def children(folder: str | os.PathLike) -> list[pathlib.Path]:
    """Return the files and folders in a folder, sorted by name, without hidden ones."""
    return sorted(p for p in pathlib.Path(folder).iterdir() if not is_hidden(p.name))


def is_empty(folder: str | os.PathLike) -> bool:
    """Return whether a folder holds nothing at all, hidden files included."""
    return not any(pathlib.Path(folder).iterdir())


def append(path: str | os.PathLike, text: str) -> None:
    """Add UTF-8 text at the end of a file; make the file if there is none."""
    with pathlib.Path(path).open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)

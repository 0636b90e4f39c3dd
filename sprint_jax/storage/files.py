"""Files that appear whole or not at all, and text in them."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


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

    A folder that several paths reach is visited once, by its own name if that is below `root`.
    """
    seen, waiting = set(), [root]
    while waiting:
        for folder, folders, names in os.walk(waiting.pop(0)):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            links = (os.path.join(folder, name) for name in folders)
            waiting += filter(os.path.islink, links)  # visited after all real folders
            yield from (path for name in names if (path := pathlib.Path(folder, name)).is_file())

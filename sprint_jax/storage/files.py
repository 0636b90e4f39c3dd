"""Files that appear whole or not at all, and text in them."""

import contextlib
import os
import pathlib


@contextlib.contextmanager
def whole(path):
    """Yields a path beside `path` to write to; it takes the name of `path` when the block ends well."""
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    """Writes UTF-8 text, whole or not at all.

    Halves of surrogate pairs, which UTF-8 has not (file names that are no UTF-8, cut captions), are written as \\udXXX: the same character in JSON.
    """
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_lines(path):
    """The lines of UTF-8 text, without the byte-order mark that some editors put first.

    Newlines alone end one: JSON and prompts may hold others, U+2028 and its like, at which `splitlines` cuts.
    """
    return pathlib.Path(path).read_text(encoding="utf-8-sig").split("\n")


def below(root):
    """Paths of all files below a folder, through links to folders as well; each folder once, by its own name where it has one below root."""
    seen, waiting = set(), [root]
    while waiting:
        for folder, folders, names in os.walk(waiting.pop(0)):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            waiting += (
                link for name in folders if os.path.islink(link := os.path.join(folder, name))
            )  # after all that is no link
            yield from (path for name in names if (path := pathlib.Path(folder, name)).is_file())

"""Damage to files, as strategies of hypothesis: bytes that changed, and JSON of another shape.

Positions and values are drawn so that headers are hit as often as bodies, and so that a failing
example shrinks to few changes.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

Files = Mapping[str, bytes]  # {path in the folder, with "/": content}


class Damage:
    """One file of a folder with other content, None if it is removed.

    No dataclass, because hypothesis prints the fields of those whole.
    """

    def __init__(self, path: str, content: bytes | None):
        self.path, self.content = path, content

    def apply(self, folder: pathlib.Path) -> None:
        """Write the content, or remove the file."""
        target = folder / self.path
        target.unlink() if self.content is None else target.write_bytes(self.content)

    def __repr__(self) -> str:
        """Return the path and the first bytes, which is what a person can read."""
        content = self.content
        shown = f"{content[:400]!r} of {len(content)} bytes" if content is not None else "removed"
        return f"{self.path}: {shown}"


_JSON = (".json", ".jsonl")
_PIECES = (b"\xff\xfe", b"\xef\xbb\xbf", b"\0" * 512, b"[" * 5000, b"{" * 20, b"\xff" * 8, b"\n\n")
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf")]),
    st.text(max_size=8),
    st.sampled_from(["", "0", "../x", "a" * 300, "\0", "\ud800", "NaN", "1e999"]),
)
VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damages(draw: st.DrawFn, files: Files) -> Damage:
    """Draw one damaged or missing file of a folder."""
    path = draw(st.sampled_from(sorted(files)))
    kinds = ["bytes"] * 5 + ["json"] * (6 if path.endswith(_JSON) else 0) + ["other", "gone"]
    match draw(st.sampled_from(kinds)):
        case "bytes":
            return Damage(path, draw(damaged_bytes(files[path])))
        case "json":
            return Damage(path, draw(damaged_json(files[path])))
        case "other":  # the content of another file
            return Damage(path, files[draw(st.sampled_from(sorted(files)))])
        case _:
            return Damage(path, None)


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw one to three changes of bytes: cuts, flips, zeros, insertions and removals."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start, length = draw(_places(len(data))), draw(st.sampled_from([1, 1, 4, 8, 512, 4096]))
        match draw(st.sampled_from(["cut", "flip", "zero", "insert", "remove", "repeat"])):
            case "cut":
                del data[start:]
            case "flip" if start < len(data):
                data[start] ^= 1 << draw(st.integers(0, 7))
            case "zero":
                data[start : start + length] = bytes(len(data[start : start + length]))
            case "insert":
                piece = draw(st.one_of(st.sampled_from(_PIECES), st.binary(max_size=16)))
                data[start:start] = piece
            case "remove":
                del data[start : start + length]
            case "repeat":
                data[start:start] = data[start : start + length]
    return bytes(data)


def _places(size: int) -> st.SearchStrategy[int]:
    """Draw a position in a file, in its first or last bytes as often as anywhere else."""
    ends = st.integers(max(0, size - 1024), size)
    return st.one_of(st.integers(0, min(size, 512)), st.integers(0, size), ends)


@st.composite
def damaged_json(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw JSON, or one line of JSON lines, in which a value or a key is another one."""
    lines = content.splitlines()
    try:
        whole = json.loads(content)
    except ValueError:
        number = draw(st.integers(0, len(lines) - 1))
        lines[number] = draw(_changed(json.loads(lines[number])))
        return b"\n".join(lines) + b"\n"
    return draw(_changed(whole))


@st.composite
def _changed(draw: st.DrawFn, value: Any) -> bytes:
    """Draw the JSON text of a value after one change of it or somewhere inside it."""
    if draw(st.integers(0, 15)) == 0:
        return b"[" * 100_000
    root = [value]
    place, key = draw(st.sampled_from(list(_nodes(root))))
    change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
    if place is root or change == "replace":
        place[key] = draw(VALUES)
    elif change == "rename" and isinstance(place, dict):
        place[draw(st.text(max_size=8))] = place.pop(key)
    else:
        del place[key]
    return json.dumps(root[0]).encode("utf-8", "backslashreplace")


def _nodes(tree: Any) -> Any:
    """Yield (container, key) of everything inside a list or a dict."""
    items = enumerate(tree) if isinstance(tree, list) else tree.items()
    for key, inner in list(items):
        yield tree, key
        if isinstance(inner, list | dict):
            yield from _nodes(inner)

"""The members of a tar: where each of them lies, and where the archive is damaged.

A tar is a row of blocks of 512 bytes: a header, then the blocks of a member's content. Two blocks
of zeros end it, and writers add zeros up to a multiple of 10240 bytes. The file is read to its end,
as GNU tar does with --ignore-zeros: joined archives are one, and after a damaged header the next
block with a valid checksum continues. The module `tarfile` stops at both without an error.
"""

import dataclasses
import os
import posixpath
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_BLOCK, _RECORD = 512, 10240
_ZEROS = bytes(_BLOCK)
_WINDOW, _WIDE_WINDOW = 8192, 2**20  # bytes that are read at once; the second to find a header
_LONGEST = 2**20  # bytes of a long name or of extended fields
# Types of members: links; devices, folders and pipes, which have no content; what is no member.
_HARD, _SYMBOLIC, _SPARSE = b"1", b"2", b"S"
_EMPTY = (_HARD, _SYMBOLIC, b"3", b"4", b"5", b"6")
_NO_FILES = (b"3", b"4", b"5", b"6", b"D", b"M", b"N", b"V", b"g")
_LINK = "link without its file"


class Member(NamedTuple):
    """A file in a tar. problem: why its content cannot be read, or ""."""

    name: str
    offset: int
    size: int
    problem: str = ""


class Damage(NamedTuple):
    """A part of a tar that cannot be read. offset: of its first byte."""

    offset: int
    reason: str


HEADER = "damaged header in the tar"
HOLE = "zeros in the tar where members should be"
CUT = "the tar is cut"
REASONS = (HEADER, HOLE, CUT)


def read(path: str | os.PathLike) -> list[Member | Damage]:
    """Return the files and the damaged parts of a tar, in its order. Raises OSError.

    Hard and symbolic links are files that lie where the file that they name does. A member may
    extend beyond the end of the file.
    """
    with open(path, "rb") as file:
        reader = _Reader(file, os.fstat(file.fileno()).st_size)
        found = list(reader.run())
    return _follow(found, reader.links) if reader.links else found


def clean(name: str) -> str:
    """Return a member's name without "./" and a "/" at its beginning."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


@dataclasses.dataclass(kw_only=True)
class _Fields:
    """What the blocks before a header say about its member."""

    name: str = ""
    link: str = ""
    size: int | None = None
    sparse: bool = False


class _Reader:
    """Reading of the blocks of one file.

    links: {position among the results: name of the file that a link names}.
    """

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size
        self._window, self._at = b"", 0
        self._begin = 0  # of the current archive, among joined ones
        self._fields = _Fields()
        self._count = 0
        self.links: dict[int, str] = {}

    def run(self) -> Iterator[Member | Damage]:
        """Yield the members and the damaged parts."""
        at, ended, found = 0, False, None
        while at + _BLOCK <= self._size:
            block = self._block(at)
            if block == _ZEROS:
                at, damage = self._zeros(at)
                ended, found = True, damage
            else:
                ended = False
                at, found = self._entry(at, block)
            if found:
                self._count += 1
                yield found
        left = self._bytes(at, self._size - at) if at < self._size else b""
        if self._size and (left.strip(b"\0") or not ended) and not isinstance(found, Damage):
            yield Damage(at if left else self._size, CUT)

    def _bytes(self, at: int, count: int, window: int = _WINDOW) -> bytes:
        start = at - self._at
        if start < 0 or start + count > len(self._window):
            self._file.seek(at)
            self._window, self._at, start = self._file.read(max(window, count)), at, 0
        return self._window[start : start + count]

    def _block(self, at: int) -> bytes:
        return self._bytes(at, _BLOCK)

    def _entry(self, at: int, block: bytes) -> tuple[int, Member | Damage | None]:
        """Read the header at a place. Returns (place of the next, what the header gives)."""
        try:
            size = _number(block[124:136]) if _is_header(block) else None
        except ValueError:
            size = None
        if size is None:
            self._fields = _Fields()
            return self._resync(at + _BLOCK), Damage(at, HEADER)
        kind = block[156:157]
        if kind in (b"L", b"K", b"x", b"X"):
            return self._extended(at, kind, size)
        fields, self._fields = self._fields, _Fields()
        size = size if fields.size is None else fields.size
        content, end = at + _BLOCK, at + _BLOCK
        if kind not in _EMPTY:
            end += -(-size // _BLOCK) * _BLOCK
        if kind == _SPARSE:  # the map of a sparse file may need blocks of its own
            more = block[482]
            while more and end + _BLOCK <= self._size:
                more, end = self._block(content)[504], end + _BLOCK
                content += _BLOCK
        name = fields.name or _name(block)
        if kind in (_HARD, _SYMBOLIC):
            target = fields.link or _text(block[157:257])
            if kind == _SYMBOLIC:
                target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
            self.links[self._count] = target
            return end, Member(name, 0, 0, _LINK)
        if kind in _NO_FILES or name.endswith("/"):
            return end, None
        problem = "sparse file in the tar" if kind == _SPARSE or fields.sparse else ""
        return end, Member(name, content, size, problem)

    def _extended(self, at: int, kind: bytes, size: int) -> tuple[int, Damage | None]:
        """Read a block that belongs to the next header: a long name, or further fields."""
        end = at + _BLOCK + -(-size // _BLOCK) * _BLOCK
        if size > _LONGEST:
            return self._resync(at + _BLOCK), Damage(at, HEADER)
        content = self._bytes(at + _BLOCK, size)
        if kind == b"L":
            self._fields.name = _text(content)
        elif kind == b"K":
            self._fields.link = _text(content)
        else:
            try:
                _read_records(content, self._fields)
            except ValueError:
                if len(content) == size:  # a cut one is reported as such
                    self._fields = _Fields()
                    return self._resync(at + _BLOCK), Damage(at, HEADER)
        return end, None

    def _resync(self, at: int) -> int:
        """Return the place of the next valid header, else the end of what is no zero."""
        last = at
        while at + _BLOCK <= self._size:
            block = self._bytes(at, _BLOCK, _WIDE_WINDOW)
            if _is_header(block):
                if at - last >= 2 * _BLOCK:
                    self._begin = at  # the end of an archive lies between
                return at
            at += _BLOCK
            if block != _ZEROS:
                last = at
        return last

    def _zeros(self, at: int) -> tuple[int, Damage | None]:
        """Pass over blocks of zeros. Returns (place of the next block, damage if they are one).

        They are no damage if they end an archive: two blocks or more, no longer than up to the
        next multiple of 10240 bytes, and then the end or another archive.
        """
        start = at
        while at + _BLOCK <= self._size:
            data = self._bytes(at, min(_WIDE_WINDOW, self._size - at), _WIDE_WINDOW)
            data = data[: len(data) // _BLOCK * _BLOCK]
            kept = 0 if data == bytes(len(data)) else len(data.lstrip(b"\0"))
            at += (len(data) - kept) // _BLOCK * _BLOCK
            if kept:
                break
        pending, self._fields = self._fields != _Fields(), _Fields()
        padded = -(-(start - self._begin + 2 * _BLOCK) // _RECORD) * _RECORD
        fits = at <= self._begin + padded and not pending
        if at + _BLOCK > self._size:  # the end, where one block of zeros is common
            return at, None if fits else Damage(start, HOLE)
        if _is_header(self._block(at)):
            if fits and at - start >= 2 * _BLOCK:
                self._begin = at
                return at, None
            return at, Damage(start, HOLE)
        if fits and at - start >= 2 * _BLOCK and (at - self._begin) % _RECORD == 0:
            return at, None  # what follows the end of the archive is the damage
        return self._resync(at), Damage(start, HEADER)


def _is_header(block: bytes) -> bool:
    """Return whether the checksum of a block is right, of unsigned or of signed bytes."""
    digits = block[148:156].split(b"\0", 1)[0].strip()
    if not digits.isdigit():
        return False
    try:
        wanted = int(digits, 8)
    except ValueError:
        return False
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if total == wanted:
        return True
    rest = block[:148] + block[156:]
    return total - 256 * sum(byte > 127 for byte in rest) == wanted


def _number(field: bytes) -> int:
    """Return a number in octal digits or, beyond 8 GiB, in binary. Raises ValueError."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(block: bytes) -> str:
    """Return the name in a header; only POSIX ones have its beginning in a field of its own."""
    name = _text(block[:100])
    beginning = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return f"{beginning}/{name}" if beginning else name


def _read_records(content: bytes, fields: _Fields) -> None:
    """Read the records "LENGTH KEY=VALUE" of a pax header. Raises ValueError."""
    while content.strip(b"\0"):
        digits, _, _ = content.partition(b" ")
        length = int(digits)
        key, mark, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if not mark or content[length - 1 : length] != b"\n":
            raise ValueError("a damaged record")
        content = content[length:]
        if key in (b"path", b"GNU.sparse.name"):
            fields.name = value.decode("utf-8", "surrogateescape")
        elif key == b"linkpath":
            fields.link = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            fields.size = int(value)
        fields.sparse |= key.startswith(b"GNU.sparse.")


def _follow(found: list[Member | Damage], links: dict[int, str]) -> list[Member | Damage]:
    """Give each link the place of the file that it names, if the tar has it."""
    members = {i: member for i, member in enumerate(found) if isinstance(member, Member)}
    files = {clean(m.name): m for number, m in members.items() if number not in links}
    names = {clean(members[number].name): clean(target) for number, target in links.items()}
    for number, target in links.items():
        target, steps = clean(target), 0
        while target not in files and target in names and steps < 40:
            target, steps = names[target], steps + 1
        if target in files:
            found[number] = files[target]._replace(name=members[number].name)
    return found

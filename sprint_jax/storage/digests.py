"""Content digests: SHA-256 in hexadecimal digits, and random numbers that depend only on a name."""

import hashlib
import os


def hash_bytes(data: bytes) -> str:
    """Return the digest of bytes, 64 digits."""
    return hashlib.sha256(data).hexdigest()


def hash_text(text: str) -> str:
    """Return the digest of text as UTF-8. Names of files may hold bytes that are not UTF-8."""
    return hash_bytes(text.encode("utf-8", "surrogateescape"))


def hash_file(path: str | os.PathLike[str]) -> str:
    """Return the digest of the content of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def draw_integer(name: str) -> int:
    """Draw an integer, uniform in [0, 2**64), from a name alone."""
    return int(hash_text(name)[:16], 16)

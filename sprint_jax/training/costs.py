"""What each part of a run cost and gained: phases.json in the work directory.

    {part: {"seconds": of wall clock, "score": of the student after it, in one step}}

Seconds of interrupted attempts count as far as they ended by themselves; a killed one leaves none.
"""

import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from sprint_jax.storage import json_files, run_files


class Costs:
    """The record of a run's parts, in the order in which they began."""

    def __init__(self, workdir: pathlib.Path | None):
        """Read the record of earlier attempts. workdir: None keeps nothing on disk."""
        self._path = workdir / run_files.PHASES if workdir else None
        self.parts: dict[str, dict[str, Any]] = {}
        if self._path is not None and self._path.exists():
            self.parts = json_files.read_object(self._path, "remove it, times begin anew")

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time inside the context to a part, however it ends."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            before = self.parts.get(part, {}).get("seconds", 0.0)
            self.note(part, seconds=round(before + time.perf_counter() - begin, 1))

    def note(self, part: str, **values: float) -> None:
        """Record values of a part."""
        self.parts[part] = self.parts.get(part, {}) | values
        if self._path is not None:
            json_files.write(self._path, self.parts)

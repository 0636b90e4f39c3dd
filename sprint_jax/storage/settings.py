"""A folder that keeps to its settings.

A command writes the settings that decide about its output into a JSON file of its output folder.
A later command with other settings is refused: one line names the first setting that differs, both
values and the remedy. Each command describes its own folder once, as a `Keeper`:

    _KEEPER = settings.Keeper(file="condition.json", flag="out")

    with _KEEPER.hold(folder):                    # if only one process may write at a time
        _KEEPER.claim(folder, {"kind": "edges"})  # or `check`, which writes nothing

`folder_claim` and `file_claim` keep a second process from the work of a command that is running.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

from sprint_jax.errors import UserError
from sprint_jax.storage import files, json_files, trees

LOCK = ".lock"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keeper:
    """How the folder of one command keeps to its settings.

    The last five fields are error lines, templates of `str.format`. All of them may use {folder},
    {path} (of the JSON file) and {flag}. Some may use more:
      refusal: {key}, {old} and {new}. Dots join the names of nested settings. A missing value is
        None.
      foreign: {found}, a name in the folder.
      unreadable, unwritable: {why}.
    """

    # Name of the JSON file in the folder.
    file: str
    # Name of the flag that gives the folder, without dashes.
    flag: str
    # Key of the JSON file that holds the settings; `claim` then leaves the file's other keys alone.
    # None if the settings are the whole file.
    section: str | None = None
    # Keys that the settings must have. A file without them belongs to another program.
    required: frozenset[str] = frozenset()
    # Values of settings that older files lack.
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Beginnings of dotted keys whose values may differ. `claim` records the new values.
    free: tuple[str, ...] = ()
    # Names in the folder that are no output, besides the JSON file and the lock.
    no_output: tuple[str, ...] = ()
    # Whether other settings may have the folder as long as it holds no output.
    reclaimable: bool = False
    refusal: str = (
        "{folder} was made with {key}={old}, now {new}: use the same, or another --{flag}"
    )
    # For a folder that has output and no JSON file; None accepts it.
    foreign: str | None = None
    unreadable: str = "{path} cannot be read ({why}): choose another --{flag}"
    unwritable: str = "cannot write in {folder} ({why}): choose another --{flag}"
    # For a folder that another process holds, with {who}; None waits for that process.
    busy: str | None = None

    @contextlib.contextmanager
    def hold(self, folder: pathlib.Path) -> Iterator[None]:
        """Make the folder, and lock it for this process while the context lasts.

        Raises UserError if the folder cannot be written, or is locked and `busy` is a text.
        """
        with self.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / LOCK).open("a+")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if self.busy else 0))
            except BlockingIOError:
                assert self.busy is not None
                raise self._error(self.busy, folder, who=_holder(folder / LOCK)) from None
            except OSError:
                raise self._error(self.unwritable, folder, why="no locks") from None
            _sign(lock)
            yield

    def check(self, folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
        """Raise UserError where `claim` would, except for a folder that cannot be written."""
        recorded = self.recorded(folder)
        output = self._output(folder)
        if recorded is None:
            if output is not None and self.foreign is not None:
                raise self._error(self.foreign, folder, found=output)
        elif output is not None or not self.reclaimable:
            kept, wanted = {**self.defaults, **recorded}, json_files.plain(settings)
            for key, old, new in _differences(kept, wanted):
                if not key.startswith(self.free):
                    raise self._error(self.refusal, folder, key=key, old=old, new=new)

    def claim(self, folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
        """Make the folder belong to these settings, which are values that JSON can hold.

        The file is written whole, through a name of this process, so several processes may claim
        one folder at once. Raises UserError for a folder of other settings, for a foreign one and
        for one that cannot be written.
        """
        with self.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.check(folder, settings)
        if self.recorded(folder) != json_files.plain(settings):
            self._write(folder, settings)
        self.check(folder, settings)  # another process may have claimed it in the meantime

    def recorded(self, folder: pathlib.Path) -> dict[str, Any] | None:
        """Return the settings that the folder keeps to, None if it has none yet.

        Raises UserError if the file is not one of this command.
        """
        path = folder / self.file
        if not path.exists():
            return None
        try:
            content = json_files.read(path)
            settings = content if self.section is None else content[self.section]
            missing = sorted(self.required - settings.keys())
            why = f"it lacks {missing[0]}" if missing else None
        except (OSError, ValueError) as error:
            why = str(error)
        except (AttributeError, KeyError, TypeError):
            why = "it holds no settings"
        if why is not None:
            raise self._error(self.unreadable, folder, why=why)
        return settings

    @contextlib.contextmanager
    def writing(self, folder: pathlib.Path) -> Iterator[None]:
        """Turn an OSError inside the context into the line for a folder that cannot be written."""
        try:
            yield
        except OSError as error:
            why = error.strerror or str(error)
            raise self._error(self.unwritable, folder, why=why) from None

    def _write(self, folder, settings):
        path = folder / self.file
        content = json_files.plain(settings)
        if self.section is not None:
            others = json_files.read(path) if path.exists() else {}
            content = {**others, self.section: content}
        own = path.with_name(f"{self.file}.{socket.gethostname()}.{os.getpid()}")
        with self.writing(folder):
            json_files.write(own, content)
            os.replace(own, path)

    def _output(self, folder):
        """Return a name in the folder that is output of a command, None if there is none."""
        if not folder.is_dir():
            return None
        known = (LOCK, *self.no_output)
        names = [child.name for child in files.children(folder)]
        return next((n for n in names if n not in known and not n.startswith(self.file)), None)

    def _error(self, template, folder, **values):
        path = folder / self.file
        return UserError(template.format(folder=folder, path=path, flag=self.flag, **values))


def _differences(old, new):
    """Yield (dotted key, old, new) of all leaves that differ, sorted; a missing value is None."""
    old, new = trees.flatten(old), trees.flatten(new)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


@contextlib.contextmanager
def folder_claim(folder: str | os.PathLike | None, flag: str, part: str = "") -> Iterator[None]:
    """Keep a folder's output for this process while the context lasts; nothing without a folder.

    flag: names the option that gave the folder, "--out" for example. part: of the work, where
    several processes share one folder. The folder is made, and removed again if nothing came into
    it. A folder that cannot be written is left to the command. Raises UserError if another process
    works there.
    """
    if not folder:
        yield
        return
    folder = files.local(folder, flag)
    new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with _claimed(folder / f".working{part}", folder, flag):
            yield
    finally:
        with contextlib.suppress(OSError):  # it holds something
            for made in new:
                made.rmdir()


def file_claim(path: str | os.PathLike, flag: str) -> contextlib.AbstractContextManager[None]:
    """Keep a path for this process, which is going to make a file or folder of that name.

    flag: names the option that gave the path. Raises UserError if another process makes it.
    """
    path = files.local(path, flag).absolute()
    return _claimed(path.with_name(f".{path.name}.working"), path, flag)


@contextlib.contextmanager
def _claimed(lock_path: pathlib.Path, path: pathlib.Path, flag: str) -> Iterator[None]:
    """Hold the lock file, which exists only while a process holds it or was killed."""
    try:
        lock = files.lock_file(lock_path)
    except OSError:  # the command itself says why nothing can be written there
        yield
        return
    if lock is None:
        raise UserError(
            f"{flag}={path} is in use by {_holder(lock_path)}: wait for it, or choose another "
            f"{flag}"
        )
    with lock, files.unfinished(lock_path):
        _sign(lock)
        yield


def _sign(lock: IO) -> None:
    """Write into a lock file which process holds it."""
    line = f"process {os.getpid()} on {socket.gethostname()}, since "
    lock.seek(0)
    lock.truncate()
    text = line + time.strftime("%Y-%m-%d %H:%M:%S")
    lock.write(text.encode() if "b" in lock.mode else text)
    lock.flush()


def _holder(lock_path: pathlib.Path) -> str:
    """Return which process holds a lock file, as it says itself."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if text := lock_path.read_text():
            return text
    return "another process"

"""Compiled programs between processes: where they are kept and found, and that they may fail."""

import os
import subprocess
import sys
import time

import pytest

from helpers.runs import ROOT
from sprint_jax.runtime import compile_cache

pytestmark = pytest.mark.second_pass

# The start of a command and one program. Prints the counts of JAX's own events.
PROGRAM = """
import jax
from sprint_jax.runtime import compile_cache
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
compile_cache.start()
jax.jit(lambda x: x * {factor} + 1)(3.0).block_until_ready()
count = lambda name: events.count("/jax/compilation_cache/cache_" + name)
print(count("hits"), count("misses"))
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.fixture
def start(tmp_path):
    """Return run(factor, **variables) -> ([hits, misses], directory or "None", stderr).

    HOME is a fresh folder.
    """
    (tmp_path / "home").mkdir()
    mine = ("JAX_", "XDG_CACHE_HOME")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(mine)}

    def run(factor=2, **variables):
        environment = clean | {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path / "home")} | variables
        words = [sys.executable, "-c", PROGRAM.format(factor=factor)]
        result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        counts, place = result.stdout.splitlines()
        return list(map(int, counts.split())), place, result.stderr

    return run


def test_the_second_process_compiles_nothing(start, tmp_path):
    """Fails when small or fast programs are left out, as JAX does by default."""
    place = tmp_path / "home/.cache/sprint_jax/xla"
    first, where, _ = start()
    assert where == str(place)
    assert first[0] == 0
    assert first[1] >= 1
    assert len(list(place.glob("*-cache"))) == first[1]
    assert start()[0] == [first[1], 0]
    other, _, _ = start(factor=3)
    assert other[1] >= 1  # another program is not mistaken for this one


def test_a_truncated_entry_is_replaced(start, tmp_path):
    """JAX keeps an unreadable entry forever.

    Ours is replaced by the next command, and later ones do not warn.
    """
    place = tmp_path / "home/.cache/sprint_jax/xla"
    start()
    for entry in place.glob("*-cache"):
        entry.write_bytes(entry.read_bytes()[:20])
        entry.with_name(entry.name.replace("-cache", "-atime")).unlink()
        os.utime(entry, (time.time() - 1000,) * 2)
    again, _, said = start()
    assert again[0] == 0
    assert again[1] >= 1
    assert said == ""
    assert start()[0][1] == 0


def test_environment_variables_take_precedence(start, tmp_path):
    _, where, _ = start(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert where == str(tmp_path / "mine") and list((tmp_path / "mine").iterdir())
    _, where, _ = start(XDG_CACHE_HOME=str(tmp_path / "xdg"))
    assert where == str(tmp_path / "xdg/sprint_jax/xla")
    assert not (tmp_path / "home/.cache").exists()
    assert (
        start(
            JAX_COMPILATION_CACHE_DIR=str(tmp_path / "slow"),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="100",
        )[0][0]
        == 0
    )
    assert not list((tmp_path / "slow").glob("*-cache"))


def test_the_cache_can_be_switched_off(start, tmp_path):
    counts, where, said = start(JAX_ENABLE_COMPILATION_CACHE="false")
    assert counts == [0, 0]
    assert where == "None"
    assert said == ""
    assert not list((tmp_path / "home").iterdir())


def test_a_folder_that_cannot_be_written(start, tmp_path):
    """One line is printed and the work continues."""
    (tmp_path / "file").write_text("")
    _counts, where, said = start(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert where == "None" and len(said.splitlines()) == 1
    assert said.startswith("warning: compiled programs are not kept, cannot write in")
    assert "JAX_COMPILATION_CACHE_DIR" in said


def test_two_processes_share_the_cache(tmp_path):
    """Two processes compile the same program at once.

    Neither fails, warns, or leaves an unreadable entry.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    for name in [n for n in environment if n.startswith("JAX_") and n != "JAX_PLATFORMS"]:
        del environment[name]
    words = [sys.executable, "-c", PROGRAM.format(factor=5)]
    options = dict(
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    running = [subprocess.Popen(words, **options) for _ in range(2)]
    for process in running:
        _, said = process.communicate()
        assert process.returncode == 0 and said == ""
    result = subprocess.run(words, **options)
    assert int(result.stdout.split()[0]) >= 1
    assert result.stdout.split()[1] == "0"
    assert result.stderr == ""


def test_sample_keeps_its_programs(finished, tmp_path):
    """The command as users run it has one program, not several small ones beside it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    words = [
        sys.executable,
        "-m",
        "sprint_jax",
        "sample",
        f"--model={finished}",
        "--prompt=a circle",
        "--steps=1",
    ]
    result = subprocess.run(
        [*words, f"--out={tmp_path / 'out'}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    kept = [entry.name for entry in (tmp_path / "cache/sprint_jax/xla").glob("*-cache")]
    assert len(kept) == 1 and kept[0].startswith("jit_sample-"), kept


def test_without_a_bound_entries_stay(start, tmp_path):
    """Without a bound JAX writes no access times.

    These tell a complete entry from a truncated one.
    """
    variables = {"JAX_COMPILATION_CACHE_MAX_SIZE": "-1"}
    first, _, _ = start(**variables)
    for entry in (tmp_path / "home/.cache/sprint_jax/xla").iterdir():
        os.utime(entry, (time.time() - 1000,) * 2)
    assert start(**variables)[0] == [first[1], 0]


def test_no_home_at_all(monkeypatch):
    """As in containers with a user id without an entry.

    No folder named ~ may appear, nor one that others can write to.
    """
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert compile_cache.default_place() is None


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compile_cache.default_place() == tmp_path / ".cache/sprint_jax/xla"

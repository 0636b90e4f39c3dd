"""Faults of processes: signals, closed pipes, two commands at once, full disks, damaged caches."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from PIL import Image

from helpers.runs import ROOT, assert_refused
from sprint_jax import __main__
from sprint_jax.conversion import folder
from sprint_jax.errors import UserError
from sprint_jax.storage import files, settings

# What stands for XLA's compiler: C code that releases Python's lock and ends after minutes.
BUSY = "__import__('hashlib').pbkdf2_hmac('sha256', b'', b'', 10**9)"
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


def start_program(program, **options):
    """Start a Python program with Python's own signal handlers, whatever the tests run under."""
    words = [sys.executable, "-c", textwrap.dedent(program)]
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | options.pop("env", {})
    return subprocess.Popen(words, cwd=ROOT, env=environment, preexec_fn=default, **pipes | options)


def end_by(process, number):
    """Signal a program after its first line; return (seconds, status, stderr)."""
    process.stdout.readline()
    begin = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    return time.monotonic() - begin, process.returncode, said


# --- signals ---


@pytest.mark.parametrize("number, status", SIGNALS)
def test_a_signal_ends_a_command_in_c_code(tmp_path, number, status):
    """Fails when a handler raises, which waits for the compiler, and when partial files stay."""
    program = f"""
        from sprint_jax.runtime import ending
        ending.start()
        import pathlib
        from sprint_jax.conversion import folder
        from sprint_jax.storage import files, settings
        here = pathlib.Path({str(tmp_path)!r})
        with (settings.folder_claim(here / "out", "--out"), files.whole(here / "a.txt") as partial,
              folder.new_folder(here / "converted") as made):
            partial.write_text("half"), (made / "part").write_text("half")
            print(len(list(here.glob("*.partial"))), flush=True)
            {BUSY}
    """
    seconds, found, said = end_by(start_program(program), number)
    assert found == status and seconds < 2, (seconds, said)
    assert len(said.splitlines()) == 1 and said.startswith("interrupted: finished files are kept")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_signal_while_xla_compiles():
    """The compiler itself, in the main thread. Fails with Python's own handlers."""
    program = """
        from sprint_jax.runtime import ending
        ending.start()
        import jax
        def slow(x):
            for i in range(3000):
                x = jax.numpy.sin(x @ x + i)
            return x
        lowered = jax.jit(slow).lower(jax.ShapeDtypeStruct((64, 64), "float32"))
        print("compiling", flush=True)
        lowered.compile()
        print("compiled", flush=True)
        lowered.compile({"xla_backend_optimization_level": 3})
    """
    seconds, status, said = end_by(start_program(program), signal.SIGINT)
    assert status == 130 and seconds < 2 and len(said.splitlines()) == 1, (seconds, said)


def test_a_signal_while_a_command_imports():
    """Fails when `start` comes after the imports, whose traceback is then the answer."""
    program = """
        import builtins, os, sys
        plain = builtins.__import__
        def hit(name, *rest):
            if name.startswith("sprint_jax.commands"):
                os.kill(os.getpid(), 2)
            return plain(name, *rest)
        builtins.__import__ = hit
        print("", flush=True)
        from sprint_jax.__main__ import main
        sys.argv = ["sprint-jax", "sample", "--help"]
        main()
        import time; time.sleep(20)
    """
    process = start_program(program)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and len(said.splitlines()) == 1, said


ASKED = f"""
    from sprint_jax.runtime import ending
    ending.start()
    import time
    asked = []
    with ending.asking("finishing the round", lambda: asked.append(1)):
        print("in", flush=True)
        while not asked:
            time.sleep(0.01)
        if FOREVER:
            {BUSY}
        time.sleep(0.6)
    print("saved", flush=True)
"""


def test_the_first_signal_asks_and_the_second_ends():
    """One line within two seconds, and a copy of the same Ctrl-C does not count as the second."""
    process = start_program(ASKED.replace("FOREVER", "False"))
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=30)
    assert (process.returncode, out, said) == (0, "saved\n", "interrupted: finishing the round\n")
    process = start_program(ASKED.replace("FOREVER", "True"))
    process.stdout.readline()
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "interrupted: finishing the round\n"
    assert time.monotonic() - begin < 2
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=2)
    assert process.returncode == 143 and len(said.splitlines()) == 1, said


def test_a_forked_child_does_not_speak_for_its_parent():
    """Fails when the child writes its signals to the pipe that both share."""
    program = """
        from sprint_jax.runtime import ending
        ending.start()
        import os, signal, time
        child = os.fork()
        if not child:
            time.sleep(20)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
        time.sleep(0.3)
        print("alive")
    """
    out, said = start_program(program).communicate(timeout=30)
    assert out == "alive\n", said


# --- output ---


def test_output_that_is_closed_or_not_unicode():
    """`| head`, and a terminal of ASCII. Fails with a traceback, or at Python's own end."""
    reader, writer = os.pipe()
    os.close(reader)
    program = "from sprint_jax.__main__ import main; import sys; sys.argv = ['s', '--help']; main()"
    process = start_program(program, stdout=writer)
    os.close(writer)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (141, "")
    program = """
        from sprint_jax.runtime import cli, ending
        ending.start()
        print("in runs/caf\\xe9")
        cli.fail("caf\\xe9\\udce9")
    """
    process = start_program(program, env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    out, said = process.communicate(timeout=30)
    assert process.returncode == 2 and out == "in runs/caf\\xe9\n", said
    assert said == "error: caf\\xe9\\udce9\n"


# --- two commands at once ---


def test_two_writers_of_one_file_are_apart(tmp_path):
    """Fails when both write to PATH.partial: the second takes away what the first wants to name."""
    path = tmp_path / "a.txt"
    with files.whole(path) as first:
        first.write_text("first")
        with files.whole(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_partial_file_of_a_killed_process_is_used_again(tmp_path):
    (tmp_path / "a.txt.partial").write_text("much more than the new text")
    with files.whole(tmp_path / "a.txt") as partial:
        with partial.open("a") as file:
            file.write("new")
    assert (tmp_path / "a.txt").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_claim_says_who_works_there_and_dies_with_its_process(tmp_path):
    """The claim leaves nothing behind; that of a killed process neither blocks nor stays."""
    out = tmp_path / "new" / "out"
    with settings.folder_claim(out, "--out"):
        with pytest.raises(UserError, match=rf"--out=.*: process {os.getpid()} on .*, since 2"):
            with settings.folder_claim(out, "--out"):
                pass
        with settings.folder_claim(out, "--out", "1of2"):  # another share
            pass
    assert not out.parent.exists()
    program = f"""
        import os
        from sprint_jax.storage import settings
        with settings.folder_claim({str(out)!r}, "--out"):
            os._exit(9)
    """
    start_program(program).communicate(timeout=30)
    assert list(out.iterdir()) == [out / ".working"]
    with settings.folder_claim(out, "--out"):
        pass
    assert not list(out.iterdir())
    with pytest.raises(UserError, match="gs://"):
        settings.folder_claim("gs://bucket/x", "--out").__enter__()


COMMANDS = {
    "sample": ["--prompt=a red circle", "--out=OUT"],
    "condition": ["--images=IMAGES", "--kind=edges", "--out=OUT"],
    "evaluate": ["--suite=shapes", "--first=1", "--out=OUT"],
    "export": ["--model=IMAGES", "--out=OUT"],
    "extract": ["--run_dir=IMAGES", "--to_file=OUT"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_command_twice_at_once(tmp_path, capsys, name):
    """One line, status 2. Fails when a command does not claim what it writes."""
    out, images = tmp_path / "out", tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(images / "a.png")
    words = [w.replace("OUT", str(out)).replace("IMAGES", str(images)) for w in COMMANDS[name]]
    claim = settings.file_claim if name in ("export", "extract") else settings.folder_claim
    with claim(out, "--out"), pytest.raises(SystemExit) as end:
        __main__.dispatch([name, *words])
    result = subprocess.CompletedProcess([], end.value.code, "", capsys.readouterr().err)
    assert end.value.code == 2
    assert_refused(result, f"={out}: process {os.getpid()} on", "is working on it: wait")


def test_a_folder_that_is_being_made_is_claimed(tmp_path):
    """`convert` and `average`. Fails when the second removes the first one's folder."""
    with folder.new_folder(tmp_path / "a" / "made") as partial:
        (partial / "x").write_text("1")
        with pytest.raises(UserError, match="is working on it: wait for that, or choose another"):
            with folder.new_folder(tmp_path / "a" / "made"):
                pass
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["made"]
    assert (tmp_path / "a" / "made" / "x").read_text() == "1"
    assert pathlib.Path(tmp_path / "a").is_dir()

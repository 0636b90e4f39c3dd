"""Faults of processes: signals, closed pipes, two commands at once, full disks, damaged caches."""

import dataclasses
import importlib.util
import itertools
import logging
import math
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from helpers.configs import card, presets
from helpers.runs import ROOT, assert_refused
from helpers.servers import (
    CLIENT,
    LIMITS,
    Gate,
    image_file,
    refusal_of,
    request_body,
    run_server,
    send_request,
    start_queue,
    to_base64,
    wait_until,
)
from sprint_jax import __main__, config
from sprint_jax.commands import plan
from sprint_jax.conversion import folder
from sprint_jax.data import captioned
from sprint_jax.encoders import prompts, words
from sprint_jax.errors import UserError
from sprint_jax.evaluation import prompt_sets
from sprint_jax.planning import hardware, topology
from sprint_jax.runtime import cards, compile_cache
from sprint_jax.sampling import sample
from sprint_jax.sampling.options import SampleOptions
from sprint_jax.serving import schema, uploads
from sprint_jax.serving.guard import Guard
from sprint_jax.serving.refused import Refused
from sprint_jax.storage import files, settings
from sprint_jax.training import sharding
from sprint_jax.training.checkpoints import Checkpoints

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


ASKED = """
    from sprint_jax.runtime import ending
    ending.start()
    import time
    asked = []
    with ending.asking("finishing the round", lambda: asked.append(1)):
        print("in", flush=True)
        while not asked:
            time.sleep(0.01)
        LATER
    print("saved", flush=True)
"""


def test_the_first_signal_asks_and_the_second_ends():
    """One line within two seconds, and a copy of the same Ctrl-C does not count as the second.

    Fails as well when a process that ends at once does so without its line.
    """
    line = "interrupted: finishing the round\n"
    for later, signals in (
        ("time.sleep(0.4)", (signal.SIGTERM, signal.SIGINT)),
        ("pass", (signal.SIGTERM,)),
    ):
        process = start_program(ASKED.replace("LATER", later))
        process.stdout.readline()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.1)
        out, said = process.communicate(timeout=30)
        assert (process.returncode, out, said) == (0, "saved\n", line)
    process = start_program(ASKED.replace("LATER", BUSY))
    process.stdout.readline()
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == line
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
        with pytest.raises(UserError, match=rf"--out=.* by process {os.getpid()} on .*, since 2"):
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
    assert_refused(result, f"={out} is in use by process {os.getpid()} on", ": wait for it")


def test_a_folder_that_is_being_made_is_claimed(tmp_path):
    """`convert` and `average`. Fails when the second removes the first one's folder."""
    with folder.new_folder(tmp_path / "a" / "made") as partial:
        (partial / "x").write_text("1")
        with pytest.raises(UserError, match="made is in use by .*: wait for it, or choose another"):
            with folder.new_folder(tmp_path / "a" / "made"):
                pass
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["made"]
    assert (tmp_path / "a" / "made" / "x").read_text() == "1"
    assert pathlib.Path(tmp_path / "a").is_dir()


# --- the server ---


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open.set()


def test_the_image_in_work_is_finished_and_new_requests_are_refused(gate):
    """Fails when closing gives up the image in work, or when the server waits for it forever."""
    queue = start_queue(gate)
    in_work, waiting = queue.submit("a"), queue.submit("b")
    wait_until(lambda: gate.seen)
    ending = threading.Thread(target=queue.finish, args=(20,))
    ending.start()
    assert waiting.exception(5).status == 503
    assert refusal_of(queue.submit, "c").status == 503
    gate.open.set()
    assert in_work.result(5).result == "a"
    ending.join(5)
    assert not ending.is_alive()


def test_an_image_that_takes_longer_than_the_grace_is_refused(gate):
    queue = start_queue(gate)
    late = queue.submit("a")
    wait_until(lambda: gate.seen)
    begin = time.monotonic()
    queue.finish(0.1)
    assert time.monotonic() - begin < 5 and late.exception(1).status == 503
    gate.open.set()
    assert queue.join(5)  # the worker outlives its late result


SERVER = """
    from sprint_jax.runtime import ending
    ending.start()
    import pathlib, sys, time
    sys.path.insert(0, "tests")
    from helpers import servers
    from sprint_jax.serving import artist, server, service
    def paint(request):
        print("drawing", flush=True)
        time.sleep(1.0)
        return servers.paint(request)
    artist.make_artist = lambda *_: paint
    artist.rehearsals, artist.examples = (lambda *_: []), (lambda *_: [])
    listener = server.listen("127.0.0.1", 0)
    service.run(None, pathlib.Path("model"), servers.LIMITS, listener, grace=5)
    print("ended")
"""


def test_the_server_ends_by_a_signal_after_its_image():
    """The image arrives, later requests get 503, status 0. Fails when uvicorn has the signal."""
    process = start_program(SERVER)
    address = process.stdout.readline().split()[0]
    assert "ready" in process.stdout.readline()
    answers = []
    drawing = threading.Thread(target=lambda: answers.append(send_request(address)))
    drawing.start()
    assert process.stdout.readline() == "drawing\n"
    process.send_signal(signal.SIGTERM)
    line = next(line for line in process.stderr if "interrupted" in line)
    assert line.startswith("interrupted: finishing the image in work, 5 s at most")
    assert send_request(address).status_code == 503
    drawing.join(10)
    out, said = process.communicate(timeout=10)
    assert answers[0].status_code == 200 and (process.returncode, out, said) == (0, "ended\n", "")


def test_a_host_with_the_port_that_browsers_leave_out():
    """A proxy writes it. Fails when the page's own requests are taken for another site's."""
    guard = Guard(None, None, local=False)
    refused = lambda origin, host: guard._refusal("POST", {"origin": origin, "host": host})
    for origin, host in (
        ("https://a.example", "a.example:443"),
        ("http://a.example", "A.example:80"),
        ("https://a.example:443", "a.example"),
        ("http://[::1]:7860", "[::1]:7860"),
    ):
        assert refused(origin, host) is None, host
    for origin, host in (
        ("https://b.example", "a.example:443"),
        ("http://a.example:7860", "a.example"),
        ("null", "a.example:443"),
    ):
        assert refused(origin, host).status == 403, host
    local = Guard(None, None, local=True)
    for host in ("localhost:443", "127.0.0.1:", "[::1]:80", "[::1]"):
        assert local._refusal("GET", {"host": host}) is None, host
    assert local._refusal("GET", {"host": "a.example:443"}).status == 403


def test_head_is_answered_as_get_without_the_body():
    with run_server() as (address, _):
        for path in ("/health", "/schema", "/options", "/openapi.json", "/", "/page.js"):
            head, full = CLIENT.head(address + path), CLIENT.get(address + path)
            assert head.status_code == full.status_code == 200, path
            assert head.content == b"" and full.content, path
            assert head.headers["content-length"] == full.headers["content-length"], path
        head = CLIENT.head(f"{address}/generate")
        assert head.status_code == 405 and head.headers["allow"] == "POST"


def test_base64_with_line_breaks():
    """As MIME and the command `base64` write it. Fails when it is called no base64."""
    data = image_file(np.zeros((8, 8, 3), np.uint8))
    text = "\r\n".join(re.findall(".{1,20}", to_base64(data))) + "\n"
    assert uploads.from_base64(text, 8, 8).shape == (8, 8, 3)
    assert uploads.from_base64(f"data:image/png;base64,{text}", 8, 8).shape == (8, 8, 3)
    with pytest.raises(Refused):
        uploads.from_base64("a*" + text, 8, 8)


def test_prompts_of_characters_without_width_are_empty(tmp_path):
    """One rule for every reader of prompts. Fails where `strip` decides, which keeps U+200B."""
    unseen = (
        "",
        " \t",
        "\u200b\u200d",
        "\ufeff",
        "\u00ad",
        "\u3164",
        "\u2800\ufe0f",
        "\u2060 \u200e",
    )
    assert all(map(prompts.is_blank, unseen))
    assert not any(map(prompts.is_blank, ("a", "\u200ba", "\u2764\ufe0f", "\u00e9", "-", "\x00")))
    empty = unseen[2]
    with pytest.raises(UserError, match="prompt 1 is empty: say what to draw"):
        words.prepare(words.ShapesText(), ["a red circle", empty])
    body = request_body(prompt=empty)
    assert "prompt is empty" in refusal_of(schema.parse, body, LIMITS).sentence
    path = tmp_path / "prompts.txt"
    path.write_text(f"a red circle\n{empty}\na square\n")
    assert [p.text for p in prompt_sets.read(path)] == ["a red circle", "a square"]
    read = sample.read_prompts(SampleOptions(prompts=str(path)))
    assert [p.text for p in read] == ["a red circle", "a square"]
    with pytest.raises(captioned.BadExample, match="missing caption"):
        captioned.decode_caption(empty.encode())
    assert captioned.first_text({"a": empty, "b": "seen"}, ("a", "b")) == "seen"


# --- JAX ---


def entry(place, name, data=b"program", used=True):
    """Write an entry of JAX's cache, compressed, and its time of use."""
    path = place / f"{name}-cache"
    path.write_bytes(zlib.compress(b"time" + data) if data else b"")
    if used:
        used_at = time.time_ns() if used is True else used
        path.with_name(f"{name}-atime").write_bytes(used_at.to_bytes(8, "little"))
    return path


@pytest.mark.second_pass
def test_damaged_programs_are_removed_and_reported_once(tmp_path, capsys, monkeypatch):
    """Fails when an entry stays that JAX reads and complains about at every start."""
    whole, empty = entry(tmp_path, "jit_a-0"), entry(tmp_path, "jit_b-0", data=b"")
    killed = entry(tmp_path, "jit_c-0", used=False)
    killed.write_bytes(killed.read_bytes()[:-3])
    unbounded = entry(tmp_path, "jit_d-0", used=False)
    cache = compile_cache._Cache(tmp_path, bounded=True)
    cache.sweep()
    assert sorted(tmp_path.glob("*-cache")) == [whole, unbounded] and not empty.exists()
    assert (tmp_path / "jit_d-0-atime").stat().st_size == 8
    said = capsys.readouterr().err
    assert said.startswith("warning: jit_b-0-cache in") and len(said.splitlines()) == 1
    shown = []
    with warnings.catch_warnings():
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(message))
        cache.listen()
        old = entry(tmp_path, "jit_e-0", used=1)  # of the same name, read without an error
        fault = entry(tmp_path, "jit_e-1")
        reading = "Error reading persistent compilation cache entry for 'jit_e': XlaError: what"
        warnings.warn(reading, stacklevel=1)
        assert old.exists() and not fault.exists()
        cut = entry(tmp_path, "jit_e-2", used=2)
        cut.write_bytes(cut.read_bytes()[:-3])
        entry(tmp_path, "jit_e-3")
        warnings.warn(reading, stacklevel=1)
        assert not cut.exists() and (tmp_path / "jit_e-3-cache").exists()
        lost = entry(tmp_path, "jit_f-0", used=False)
        lost.write_bytes(b"x")
        error = "FileNotFoundError: [Errno 2] No such file: jit_f-0-atime"
        warnings.warn(
            f"Error writing persistent compilation cache entry for 'jit_g': {error}", stacklevel=1
        )
        assert not lost.exists()
        warnings.warn("another warning", stacklevel=1)
    assert [str(message) for message in shown] == ["another warning"]
    assert capsys.readouterr().err == ""  # reported once


@pytest.mark.second_pass
@pytest.mark.parametrize(
    "name, value",
    [("JAX_COMPILATION_CACHE_MAX_SIZE", "abc"), ("JAX_ENABLE_X64", "maybe")],
)
def test_a_variable_that_jax_cannot_read(name, value):
    """One line, status 2. Fails with the traceback of `import jax`."""
    program = "from sprint_jax.runtime import cli\nwith cli.user_errors():\n    import jax"
    process = start_program(program, env={name: value})
    _, said = process.communicate(timeout=30)
    assert_refused(subprocess.CompletedProcess([], process.returncode, "", said), f"{name}={value}")
    assert process.returncode == 2 and len(said.splitlines()) == 1


def test_a_full_disk_is_one_line(tmp_path, caplog):
    """Fails when Orbax's threads log the same error, each with its traceback."""
    state = lambda step: {"w": jnp.arange(2**18, dtype=jnp.float32) * 1.7 + step}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(UserError, match="cannot write a checkpoint in .*; the checkpoint of step"):
        with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
            checkpoints.save(4, state(4))
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, hard))
            try:
                checkpoints.save(8, state(8))
                checkpoints.wait()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@dataclasses.dataclass(frozen=True)
class Device:
    """What JAX asks of a TPU to build a mesh."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0


def meshes():
    """Return {card:preset: mesh of its config} of all that are shipped."""
    return {
        f"{name}:{preset}": config.parse(card(name, preset)).mesh
        for name in cards.shipped()
        for preset in presets(name)
    }


TOPOLOGIES = re.findall(r"\b((?:v\w+|[ha]\d00):[\dx]+)", plan.__doc__)
KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}


@pytest.mark.parametrize("text", TOPOLOGIES)
def test_every_card_has_a_mesh_on_every_topology_of_the_help(text):
    """Fails when fsdp = 8 meets a torus of 4 x 4 x 4, whose sides JAX does not cut by itself."""
    device, shape, count = hardware.parse_topology(text)
    kind = KINDS.get(device.name, device.name)
    platform = "tpu" if topology.is_tpu(device) else "gpu"
    places = itertools.product(*map(range, (*shape, 1)[:3]))
    devices = [Device(i, tuple(c), kind, platform) for i, c in enumerate(places)]
    assert any(mesh.fsdp == 8 for mesh in meshes().values())
    for name, mesh in meshes().items():
        made = sharding.mesh(mesh.data, mesh.fsdp, devices)
        assert made.devices.shape == (count // mesh.fsdp, mesh.fsdp), name
        assert {d.id for d in made.devices.flat} == set(range(count)), name
    if not topology.is_tpu(device):
        return
    for fsdp in (n for n in range(1, count + 1) if not count % n):
        assert math.prod(sharding.mesh(-1, fsdp, devices).devices.shape) == count


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.parametrize("text", [t for t in TOPOLOGIES if t.startswith("v")])
def test_the_same_with_the_tpus_of_libtpu(text):
    device, shape, count = hardware.parse_topology(text)
    devices = topology.devices(device, shape)
    for name, mesh in meshes().items():
        made = sharding.mesh(mesh.data, mesh.fsdp, devices)
        assert made.devices.shape == (count // mesh.fsdp, mesh.fsdp), name

"""Serving manners: the line, what a request may say, uploads, and the API under bad clients. The drawer is a stand-in that
paints its request, so a swapped answer shows; the real model comes last, once."""

import asyncio
import base64
import concurrent.futures
import contextlib
import io
import json
import re
import signal
import socket
import struct
import threading
import time
import types
import zlib

import httpx
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from helpers.runs import free_port
from helpers.servers import LIMITS, line, paint, served, wait_until
from sprint_jax.commands import serve as door
from sprint_jax.errors import UserError
from sprint_jax.sampling import exported, generation, pipeline
from sprint_jax.serving import api, requests, uploads
from sprint_jax.serving import queue as queue_lib
from sprint_jax.serving.refused import Refused
from sprint_jax.storage import image_files


def file(array_or_image, file_format="PNG", **options):
    image = (
        array_or_image
        if isinstance(array_or_image, Image.Image)
        else Image.fromarray(array_or_image)
    )
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def encoded(data):
    return base64.b64encode(data).decode()


def body(**fields):
    return json.dumps({"prompt": "a red circle"} | fields).encode()


def refusal(function, *arguments):
    with pytest.raises(Refused) as caught:
        function(*arguments)
    return caught.value


# ---- the line ----------------------------------------------------------------------------------------------------------


def test_first_come_first_served_and_each_gets_its_own(gate):
    queue = line(gate)
    futures = [queue.submit(i) for i in range(5)]
    gate.open.set()
    answers = [future.result(5) for future in futures]
    assert [answer.result for answer in answers] == gate.seen == list(range(5))
    assert (
        all(answer.waiting >= 0 and answer.working >= 0 for answer in answers)
        and answers[4].waiting > 0
    )


def test_a_full_line_refuses_at_once_and_who_leaves_makes_room(gate):
    queue = line(gate, capacity=2)
    queue.submit("at work")
    wait_until(lambda: gate.seen)
    waiting = [queue.submit(i) for i in range(2)]
    told = refusal(queue.submit, "too many")
    assert told.status == 429 and told.retry_after and "2 requests are waiting" in told.sentence
    assert refusal(queue.check).status == 429
    assert waiting[0].cancel() and queue.length == 1
    last = queue.submit("now there is room")
    gate.open.set()
    last.result(5)
    assert gate.seen == ["at work", 1, "now there is room"]


def test_the_newest_of_a_session_takes_the_place_of_the_one_before(gate):
    queue = line(gate, capacity=3)
    queue.submit("at work")
    wait_until(lambda: gate.seen)
    old, other, new = (
        queue.submit("old", "mine"),
        queue.submit("other"),
        queue.submit("new", "mine"),
    )
    queue.submit("no session")
    newest = queue.submit("newest", "mine")  # although the line is full
    for dropped in (old, new):
        with pytest.raises(Refused, match="newer") as caught:
            dropped.result(5)
        assert caught.value.status == 409
    gate.open.set()
    newest.result(5), other.result(5)
    assert gate.seen[:3] == ["at work", "newest", "other"]


def test_a_fault_belongs_to_who_asked_and_the_worker_lives_on():
    queue = line(lambda item: 1 // item)
    with pytest.raises(ZeroDivisionError):
        queue.submit(0).result(5)
    assert queue.submit(1).result(5).result == 1


def test_who_is_told_that_it_is_ready_may_fail():
    """Such as a closed stdout: those who ask are served all the same."""

    def told(error):
        raise BrokenPipeError("nobody reads")

    queue = queue_lib.Queue(lambda item: 2 * item, 4, prepared=told)
    queue.start()
    wait_until(lambda: queue.ready)
    assert queue.submit(21, "").result(10).result == 42
    queue.close()


def test_nothing_is_served_before_it_is_prepared():
    ready, failures = threading.Event(), []

    def prepare(say):
        say(3, 8)
        ready.wait(10)

    ends = []
    queue = queue_lib.Queue(
        lambda item: item, 2, prepare, lambda error: ends.append((error, queue.ready))
    )
    queue.start()
    wait_until(lambda: queue.total)
    told = refusal(queue.submit, 1)
    assert told.status == 503 and "3 of 8" in told.sentence and told.retry_after
    ready.set()
    wait_until(lambda: queue.ready)
    assert queue.submit(1).result(5).result == 1 and ends == [(None, True)]

    queue = queue_lib.Queue(lambda item: item, 2, lambda say: 1 // 0, failures.append)
    queue.start()
    wait_until(lambda: failures)
    assert isinstance(failures[0], ZeroDivisionError) and not queue.ready


def test_who_waits_when_it_closes_is_told(gate):
    queue = line(gate)
    at_work = queue.submit(1)
    wait_until(lambda: gate.seen)
    waiting = queue.submit(2)
    queue.close()
    with pytest.raises(Refused, match="stopping"):
        waiting.result(5)
    assert refusal(queue.submit, 3).status == 503
    gate.open.set()
    assert at_work.result(5).result == 1


# ---- what a request may say --------------------------------------------------------------------------------------------


def test_a_request_in_full_and_its_defaults():
    start = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    wanted = requests.parse(
        body(
            steps=3,
            seed=7,
            guidance_scale=2,
            height=32,
            width=48,
            schedule="paper",
            image=encoded(file(start)),
            strength=0.5,
        ),
        LIMITS,
    )
    assert (wanted.steps, wanted.seed, wanted.guidance_scale, wanted.height, wanted.width) == (
        3,
        7,
        2.0,
        32,
        48,
    )
    np.testing.assert_array_equal(wanted.image, start)
    wanted = requests.parse(body(image=None, control=None, seed=None, width=None), LIMITS)
    assert (wanted.steps, wanted.seed, wanted.guidance_scale, wanted.schedule) == (
        2,
        0,
        1.5,
        "code",
    )
    assert (wanted.height, wanted.width, wanted.image, wanted.control) == (32, 32, None, None)
    assert (
        requests.parse(body(width=48), LIMITS).height == 32
        and requests.parse(body(steps=2.0), LIMITS).steps == 2
    )
    assert (
        requests.parse('{"prompt": "ein Bär\\n\\tim 🌲"}'.encode(), LIMITS).prompt
        == "ein Bär\n\tim 🌲"
    )


@pytest.mark.parametrize(
    "sent, words",
    [
        (b"", ["not JSON"]),
        (b"{", ["not JSON"]),
        (b"\xff\xfe", ["UTF-8"]),
        (b"[" * 100_000, ["not JSON"]),
        (b'{"seed": ' + b"9" * 10_000 + b"}", ["not JSON"]),
        (b"[1]", ["list", "object"]),
        (b"null", ["null"]),
        (b"{}", ["prompt is missing"]),
        (b'{"prompt": "a", "prompt": "b"}', ["prompt", "twice"]),
        (b'{"prompt": "a", "guidance_scale": NaN}', ["NaN"]),
        (b'{"prompt": "a", "strength": Infinity}', ["Infinity"]),
        (b'{"prompt": "a", "guidance_scale": 1e999}', ["guidance_scale"]),
        (b'{"prompt": "\\ud800"}', ["U+D800"]),
        (body(promt="a"), ["'promt'", "prompt"]),
        (body(prompt=3), ["prompt is a number"]),
        (body(prompt=" \n"), ["prompt is empty"]),
        (body(prompt="x" * 100_000), ["100000", "2000"]),
        (body(prompt="a\x00b"), ["U+0000"]),
        (body(prompt="a\x1b[31m"), ["U+001B"]),
        (body(steps=0), ["steps is 0", "1, 2, 3, 4"]),
        (body(steps=5), ["steps is 5"]),
        (body(steps=True), ["steps is True"]),
        (body(steps="2"), ["steps is '2'"]),
        (body(steps=[[2]]), ["steps is a list"]),
        (body(seed=-1), ["seed is -1"]),
        (body(seed=2**31), ["seed"]),
        (body(seed=1.5), ["seed is 1.5"]),
        (body(seed=False), ["seed is False"]),
        (body(guidance_scale=-1), ["guidance_scale"]),
        (body(guidance_scale="4"), ["guidance_scale is a string"]),
        (body(height=48), ["48 x 32", "32 x 32, 32 x 48"]),
        (body(height=10**9, width=10**9), ["height"]),
        (body(height=0), ["height is 0"]),
        (body(schedule="fast"), ["schedule", "code, paper"]),
        (body(strength=0), ["strength is 0"]),
        (body(strength=1.01), ["strength"]),
        (body(image=3), ["image is a number"]),
        (body(image="@@@"), ["image is not base64"]),
        (body(image="é"), ["image is not base64"]),
        (body(image=encoded(b"")), ["image", "empty"]),
        (body(image=encoded(b"hello there")), ["image", "not a PNG"]),
        (body(control=encoded(b"x")), ["control", "ControlNet"]),
        (body(control_scale=9), ["control_scale"]),
    ],
)
def test_what_is_refused_is_named(sent, words):
    told = refusal(requests.parse, sent, LIMITS)
    assert told.status in (400, 415) and "\n" not in told.sentence and len(told.sentence) < 400
    for word in words:
        assert word in told.sentence


def test_millions_of_values_are_refused_before_they_are_parsed():
    """Parsing them would hold every other client up. A prompt may hold as many commas as it has characters."""
    for sent in (
        b'{"prompt": [' + b"[]," * 300_000 + b"1]}",
        b"{" + b'"a":1,' * 300_000 + b'"b":1}',
    ):
        assert "more than 200000 values" in refusal(requests.parse, sent, LIMITS).sentence
    assert requests.parse(body(prompt="," * 500), LIMITS).prompt == "," * 500


def test_what_the_model_cannot_do_is_refused():
    import dataclasses

    plain = dataclasses.replace(LIMITS, starts=False)
    assert (
        "cannot start"
        in refusal(
            requests.parse, body(image=encoded(file(Image.new("RGB", (4, 4))))), plain
        ).sentence
    )
    control = dataclasses.replace(LIMITS, control=True)
    lines = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    wanted = requests.parse(body(control=encoded(file(lines)), control_scale=0.5), control)
    assert (
        wanted.control_scale == 0.5 and not wanted.control.any()
    )  # what is transparent is black, as no line is


# ---- uploads -----------------------------------------------------------------------------------------------------------


def test_a_picture_is_what_its_bytes_say():
    """Fails where a file's declared type is believed."""
    array = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    for file_format, options, most in (
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 100, "subsampling": 0}, 3),
    ):
        got = uploads.picture(file(array, file_format, **options), 20, 20)
        assert got.shape == (20, 20, 3) and got.dtype == np.uint8
        assert np.abs(got.astype(int) - array).max() <= most
    disguised = "data:image/jpeg;base64," + encoded(file(array))
    assert requests.parse(body(image=disguised), LIMITS).image.shape == (32, 32, 3)
    for file_format in ("GIF", "BMP", "TIFF", "PPM", "ICO", "PDF"):
        assert (
            refusal(uploads.picture, file(Image.new("RGB", (16, 16)), file_format), 8, 8).status
            == 415
        )
    for text in (
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"PK\x03\x04",
        b"\x00" * 100,
    ):
        assert refusal(uploads.picture, text, 8, 8).status == 415


def png_of(width, height, *chunks):
    """A PNG's bytes by hand. chunks: (name, data)."""
    chunk = lambda name, data: (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*one) for one in ((b"IHDR", header), *chunks, (b"IEND", b""))
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_by_their_header():
    for side in (5000, 12_000, 65_000, 2**31 - 1):
        begin = time.perf_counter()
        told = refusal(
            uploads.picture, png_of(side, side, (b"IDAT", zlib.compress(b"\0" * 10_000))), 32, 32
        )
        assert (
            told.status == 413 and "pixels" in told.sentence and time.perf_counter() - begin < 0.5
        )
    bomb = zlib.compress(b"\0" * 100_000_000, 9)
    for name in (b"zTXt", b"iCCP"):
        assert (
            refusal(
                uploads.picture,
                png_of(8, 8, (name, b"k\0\0" + bomb), (b"IDAT", zlib.compress(b"\0" * 200))),
                8,
                8,
            ).status
            == 400
        )
    assert refusal(uploads.picture, b"\x89PNG" + b"x" * uploads.MOST_BYTES, 8, 8).status == 413


def test_a_thin_picture_is_not_blown_up():
    """Scaled to cover before it is cut, one row of a million pixels would need terabytes."""
    begin = time.perf_counter()
    assert uploads.picture(file(np.zeros((1, 1_000_000, 3), np.uint8)), 32, 32).shape == (32, 32, 3)
    assert time.perf_counter() - begin < 2


def test_damaged_files_are_refused_or_read_but_never_fail_otherwise():
    rng = np.random.default_rng(1)
    for name in (b"pHYs", b"acTL"):  # too short: PIL raises ValueError, not OSError
        assert (
            refusal(
                uploads.picture,
                png_of(8, 8, (name, b"\0"), (b"IDAT", zlib.compress(b"\0" * 200))),
                8,
                8,
            ).status
            == 400
        )
    for file_format in ("PNG", "JPEG", "WEBP"):
        whole = file(Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)), file_format)
        assert refusal(uploads.picture, whole[: len(whole) // 2], 8, 8).status == 400
        for _ in range(100):
            data = bytearray(whole)
            for _ in range(3):
                data[rng.integers(len(data))] = rng.integers(256)
            try:
                assert uploads.picture(bytes(data), 8, 8).shape == (8, 8, 3)
            except Refused as told:
                assert told.status in (400, 413, 415)


def test_orientation_alpha_depth_and_animation():
    half = np.zeros((20, 20, 3), np.uint8)
    half[:10] = 255  # white above black
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = uploads.picture(file(half, "JPEG", exif=exif, quality=100), 20, 20)
    assert turned[:, 15:].mean() > 240 and turned[:, :5].mean() < 15

    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (uploads.picture(file(clear), 8, 8) == 255).all()
    assert (uploads.picture(file(clear), 8, 8, image_files.BLACK) == 0).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert (uploads.picture(file(palette, transparency=1), 8, 8) == 255).all()
    assert (uploads.picture(file(palette), 8, 8)[0, 0] == [0, 0, 255]).all()

    deep = np.full((8, 8), 0x8040, np.uint16)
    assert (uploads.picture(file(deep), 8, 8) == 0x80).all()  # PIL's own conversion gives 255
    assert (
        uploads.picture(file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), 8, 8)[..., 0]
        > 200
    ).all()

    frames = [Image.new("RGB", (8, 8), colour) for colour in ((0, 255, 0), (255, 0, 0))]
    for file_format in ("PNG", "WEBP"):
        moving = file(
            frames[0], file_format, save_all=True, append_images=frames[1:], lossless=True
        )
        assert (uploads.picture(moving, 8, 8)[0, 0] == [0, 255, 0]).all()


# ---- the API -----------------------------------------------------------------------------------------------------------


CLIENT = httpx.Client(
    verify=False, timeout=60
)  # certificates take longer to read than all that these tests do


def ask(address, headers=None, **fields):
    if headers is None:
        headers = {}
    return CLIENT.post(
        f"{address}/generate",
        content=body(**fields),
        headers={"content-type": "application/json"} | headers,
    )


def drawn(response):
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(response.content)))


def test_a_picture_over_http():
    with served() as (address, _):
        response = ask(address, seed=3)
        np.testing.assert_array_equal(drawn(response), paint(requests.parse(body(seed=3), LIMITS)))
        assert (
            response.headers["content-type"] == "image/png"
            and response.headers["cache-control"] == "no-store"
        )
        for stage in ("waiting", "drawing", "encoding"):
            assert f"{stage};dur=" in response.headers["server-timing"]
        assert CLIENT.get(f"{address}/schema").json() == requests.schema(LIMITS)
        assert CLIENT.get(f"{address}/health").json()["ready"] is True
        described = CLIENT.get(f"{address}/openapi.json").json()
        assert described["paths"]["/generate"]["post"]["requestBody"]["content"][
            "application/json"
        ]["schema"]["required"] == ["prompt"]


def test_errors_are_a_sentence_and_the_server_lives_on():
    with served() as (address, _):
        post = lambda content, **headers: CLIENT.post(
            f"{address}/generate",
            content=content,
            headers={"content-type": "application/json"} | headers,
        )
        for response, status, word in (
            (ask(address, prompt="a zebra"), 400, "zebra"),
            (ask(address, prompt="fire"), 500, "log"),
            (post(b"{"), 400, "JSON"),
            (post(body(), **{"content-type": "text/plain"}), 415, "application/json"),
            (post(b"x" * (requests.MOST_BODY + 1)), 413, str(requests.MOST_BODY)),
            (
                post(iter([b"x" * 2**20] * (requests.MOST_BODY // 2**20 + 1))),
                413,
                str(requests.MOST_BODY),
            ),
            (post(body(), **{"x-session": "s" * 100}), 400, "X-Session"),
            (CLIENT.get(f"{address}/generate"), 405, "POST"),
            (CLIENT.get(f"{address}/nothing"), 404, "/generate"),
        ):
            assert response.status_code == status and word in response.json()["error"], (
                response.text
            )
        assert CLIENT.get(f"{address}/generate").headers["allow"] == "POST"
        with connection(
            address, b"", length=requests.MOST_BODY + 1
        ) as announced:  # refused before any of it is sent
            assert b"413" in announced.recv(65536).split(b"\r\n")[0]
        drawn(ask(address))


def test_the_password_and_other_sites():
    with served(password="swördfish", with_page=True) as (address, _):
        for path in ("/", "/health", "/schema", "/theme.css"):
            response = CLIENT.get(address + path)
            assert response.status_code == 401 and response.headers["www-authenticate"].startswith(
                "Basic"
            )
        assert ask(address).status_code == 401
        for bad in (
            "Basic",
            "Basic !!!",
            "Bearer x",
            "Basic " + encoded(b"x:wrong"),
            "Basic " + encoded(b"no colon"),
        ):
            assert ask(address, headers={"authorization": bad}).status_code == 401
        good = {"authorization": "Basic " + encoded("anybody:swördfish".encode())}
        drawn(ask(address, headers=good))
        assert CLIENT.get(address, headers=good).status_code == 200
        assert ask(address, headers=good | {"origin": "http://evil.example"}).status_code == 403
        drawn(ask(address, headers=good | {"origin": address}))


def test_other_names_are_refused_where_only_this_machine_may_ask():
    """A name that another site made to lead here; with a password, or on a network, any name is right."""
    queue = line(paint, 8)
    for options, named in (
        (dict(local=True), 403),
        (dict(local=True, password="secret"), 200),
        ({}, 200),
    ):
        with TestClient(api.make(queue, LIMITS, **options)) as client:
            login = {"authorization": "Basic " + base64.b64encode(b"x:secret").decode()}
            for host, status in (
                ("evil.example:7860", named),
                ("localhost:7860", 200),
                ("127.0.0.1", 200),
                ("[::1]:7860", 200),
            ):
                assert (
                    client.get("/health", headers={"host": host} | login).status_code == status
                ), (options, host)
    queue.close()


def test_nothing_of_the_server_is_read_or_written_through_the_page(tmp_path):
    """Gradio brings uploads, files, proxies and queues; the guard lets none of them through."""
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    with served(with_page=True) as (address, _):
        host, port = address.removeprefix("http://").split(":")
        paths = [
            f"{prefix}{secret}"
            for prefix in (
                "/file=",
                "/gradio_api/file=",
                "/gradio_api/file/",
                "/file/",
                "/assets/",
                "/static/",
                "/svelte/",
            )
        ]
        paths += [
            f"{folder}{'../' * 12}{str(secret)[1:]}" for folder in ("/", "/assets/", "/static/")
        ]
        paths += [path.replace("..", "%2e%2e").replace("/s", "%2fs") for path in paths]
        paths += [
            "/gradio_api/proxy=http://127.0.0.1/",
            "/gradio_api/info",
            "/gradio_api/openapi.json",
            "/gradio_api/queue/data",
            "/docs",
            "/monitoring",
            "/vibe-code",
            "/login",
        ]
        for path in paths:
            with socket.create_connection(
                (host, int(port)), 10
            ) as raw:  # clients would clean the path
                raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                reply = b"".join(iter(lambda: raw.recv(65536), b""))
            assert b"a secret" not in reply and reply.split()[1] in (b"404", b"403", b"400"), (
                path,
                reply[:200],
            )
        for path in (
            "/gradio_api/upload",
            "/upload",
            "/gradio_api/queue/join",
            "/gradio_api/run/predict",
            "/gradio_api/component_server",
            "/gradio_api/vibe-edit",
            "/gradio_api/reset",
            "/",
            "/login",
        ):
            assert CLIENT.post(address + path, files={"files": ("x.txt", b"x")}).status_code in (
                404,
                405,
            ), path


def test_a_full_line_is_told_at_once(gate):
    with served(lambda request: paint(gate(request)), capacity=1) as (address, queue):
        with concurrent.futures.ThreadPoolExecutor(2) as clients:
            first = clients.submit(ask, address, seed=1)
            wait_until(lambda: gate.seen)
            second = clients.submit(ask, address, seed=2)
            wait_until(lambda: queue.length == 1)
            begin = time.perf_counter()
            response = ask(address, seed=3)
            assert (
                response.status_code == 429
                and response.headers["retry-after"]
                and "waiting" in response.json()["error"]
            )
            assert time.perf_counter() - begin < 1
            gate.open.set()
            for future, seed in ((first, 1), (second, 2)):
                np.testing.assert_array_equal(
                    drawn(future.result()), paint(requests.parse(body(seed=seed), LIMITS))
                )


def connection(address, content, length=None):
    """A client that has sent its request and can go away."""
    host, port = address.removeprefix("http://").split(":")
    raw = socket.create_connection((host, int(port)), 10)
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length or len(content)}\r\n\r\n"
    raw.sendall(head.encode() + content)
    return raw


def test_a_client_that_goes_away_frees_its_place(gate):
    with served(lambda request: paint(gate(request)), capacity=1) as (address, queue):
        at_work = connection(address, body(seed=1))
        wait_until(lambda: gate.seen)
        waiting = connection(address, body(seed=2))
        wait_until(lambda: queue.length == 1)
        waiting.close()
        wait_until(lambda: queue.length == 0)
        at_work.close()  # in the middle of the drawing: its picture is thrown away
        connection(address, body()[:5], length=100).close()  # in the middle of the body
        connection(address, b"")
        gate.open.set()
        drawn(ask(address, seed=3))
        assert [request.seed for request in gate.seen] == [1, 3]


def test_a_slow_client_keeps_nobody_out(monkeypatch):
    monkeypatch.setattr(api, "_READ_SECONDS", 0.5)
    with served(capacity=1) as (address, _):
        slow = [connection(address, b"{", length=1000) for _ in range(20)]
        drawn(ask(address))
        for raw in slow:
            reply = raw.recv(65536)
            assert b"408" in reply.split(b"\r\n")[0] and b"within 0.5 seconds" in reply
        monkeypatch.setattr(api, "_READERS", 1)
        monkeypatch.setattr(api, "_READ_SECONDS", 5)
        held = []

        def full():
            held.append(
                connection(address, b"{", length=1000)
            )  # another, where the one before came while others still had the place
            answer = ask(address)
            return answer.status_code == 429 and "being read" in answer.text

        wait_until(full)
        for raw in held:
            raw.close()
        wait_until(lambda: ask(address).status_code == 200)
        for raw in slow:
            raw.close()


def test_a_connection_without_a_request_is_closed(monkeypatch):
    monkeypatch.setattr(door, "_HEAD_SECONDS", 0.3)
    with served() as (address, _):
        host, port = address.removeprefix("http://").split(":")
        silent, slow = (socket.create_connection((host, int(port)), 10) for _ in range(2))
        slow.sendall(b"POST /generate HTTP/1.1\r\nHost:")
        for raw in (silent, slow):
            assert raw.recv(100) == b""
        drawn(ask(address))


def test_a_connection_without_another_request_is_closed(monkeypatch):
    """Bytes after an answer that are no request hold it no longer than bytes before the first one."""
    monkeypatch.setattr(door, "_HEAD_SECONDS", 0.5)
    with served() as (address, _):
        host, port = address.removeprefix("http://").split(":")
        for request in (
            b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
        ):
            with socket.create_connection((host, int(port)), 10) as raw:
                raw.sendall(request)
                assert b"HTTP/1.1" in raw.recv(100_000)
                raw.sendall(b"P")
                begin, more = time.perf_counter(), b"more"
                while more:
                    more = raw.recv(100_000)
                assert time.perf_counter() - begin < 4
        drawn(ask(address))


def test_an_answer_that_is_not_taken_is_thrown_away(monkeypatch):
    """Where the system's own buffers end, the server's would be held for ever. One that is taken slowly is sent whole."""
    monkeypatch.setattr(api, "SEND_SECONDS", 0.5)
    noise = np.random.default_rng(0).integers(0, 256, (2048, 2048, 3), np.uint8)
    whole = len(api.png(noise))
    with served(lambda request: noise) as (address, _):
        for wait, part in ((2.0, 2**24), (0.002, 2**16)):
            raw = connection(address, body())
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
            taken, more = 0, b"more"
            with contextlib.suppress(ConnectionResetError):
                while more:
                    time.sleep(wait)
                    more = raw.recv(part)
                    taken += len(more)
                    wait = min(wait, 0.05)
                    if taken > whole:
                        break
            assert taken > whole if part < 2**20 else taken < whole
            raw.close()


def test_strokes_of_one_session_replace_each_other(gate):
    with served(lambda request: paint(gate(request)), capacity=4) as (address, queue):
        with concurrent.futures.ThreadPoolExecutor(3) as clients:
            futures = [clients.submit(ask, address, seed=0, headers={"x-session": "other"})]
            wait_until(lambda: gate.seen)
            futures.append(clients.submit(ask, address, seed=1, headers={"x-session": "mine"}))
            wait_until(lambda: queue.length == 1)
            futures.append(clients.submit(ask, address, seed=2, headers={"x-session": "mine"}))
            assert futures[1].result().status_code == 409
            gate.open.set()
            drawn(futures[0].result()), drawn(futures[2].result())
        assert [request.seed for request in gate.seen] == [0, 2]


def test_many_clients_get_their_own_pictures():
    """A short form of benchmarks/serving.py: 50 at once, a line of 8; every answer is right or a refusal."""

    async def run(address):
        async with httpx.AsyncClient(
            verify=False, timeout=60, limits=httpx.Limits(max_connections=50)
        ) as client:
            one = lambda seed: client.post(
                f"{address}/generate",
                content=body(seed=seed),
                headers={"content-type": "application/json"},
            )
            return await asyncio.gather(*(one(seed) for seed in range(150)))

    with served(lambda request: (time.sleep(0.002), paint(request))[1]) as (address, queue):
        replies = asyncio.run(run(address))
        right = 0
        for seed, response in enumerate(replies):
            assert response.status_code in (200, 429)
            if response.status_code == 200:
                np.testing.assert_array_equal(
                    drawn(response), paint(requests.parse(body(seed=seed), LIMITS))
                )
                right += 1
        assert right > 8 and queue.length == 0


# ---- fuzz from the published schema ------------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
PICTURES = [
    encoded(file(Image.new(mode, size), file_format))
    for mode, size, file_format in (
        ("RGB", (8, 8), "PNG"),
        ("L", (3, 50), "JPEG"),
        ("RGBA", (20, 20), "WEBP"),
        ("1", (1, 1), "PNG"),
    )
]


def of_schema(name, described):
    """Values that a property's schema allows."""
    if "enum" in described:
        return st.sampled_from(described["enum"])
    if described["type"] == "null":
        return st.none()
    if described.get("contentEncoding") == "base64":
        return st.none() | st.sampled_from(PICTURES)
    if described["type"] == "string":
        patterns = [re.compile(one["pattern"]) for one in described["allOf"]]
        texts = st.text(st.characters(codec="utf-8"), min_size=described["minLength"], max_size=60)
        return texts.filter(lambda text: all(p.search(text) for p in patterns)) | st.just(
            "x" * described["maxLength"]
        )
    if "integer" in described["type"]:
        return st.none() | st.integers(described["minimum"], described["maximum"])
    low, excluded = (
        described.get("minimum", described.get("exclusiveMinimum")),
        "exclusiveMinimum" in described,
    )
    return st.none() | st.floats(low, described["maximum"], exclude_min=excluded)


@st.composite
def bodies(draw):
    """(bytes, whether the schema allows them): a valid request, or one with a field of any value or a key too many."""
    properties = requests.schema(LIMITS)["properties"]
    fields = {"prompt": draw(of_schema("prompt", properties["prompt"]))}
    for name in draw(st.sets(st.sampled_from(sorted(properties)))):
        fields[name] = draw(of_schema(name, properties[name]))
    valid = True
    if draw(st.booleans()):
        valid = None  # unknown: anything may happen to be allowed
        for name in draw(
            st.lists(
                st.sampled_from(sorted(properties)) | st.text(max_size=8), min_size=1, max_size=3
            )
        ):
            fields[name] = draw(ANYTHING)
    data = json.dumps(fields).encode()
    if draw(st.integers(0, 9)) == 0:
        valid, place = None, draw(st.integers(0, len(data) - 1))
        data = data[:place] + draw(st.binary(max_size=4)) + data[place + draw(st.integers(0, 4)) :]
    return data, valid


@pytest.fixture(scope="module")
def client():
    queue = line(paint)
    with TestClient(api.make(queue, LIMITS)) as client:
        yield client
    queue.close()


@hypothesis.settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(bodies())
def test_fuzz_from_the_schema(client, case):
    """Whatever is sent: a picture, or a 4xx with a sentence; what the schema allows, with pictures that are some: a picture."""
    data, valid = case
    response = client.post("/generate", content=data, headers={"content-type": "application/json"})
    hypothesis.target(float(response.status_code))
    if response.status_code == 200:
        assert Image.open(io.BytesIO(response.content)).size in ((32, 32), (48, 32))
        return
    sentence = response.json()["error"]
    assert 400 <= response.status_code < 500 and sentence and "\n" not in sentence, response.text
    assert not valid, sentence


# ---- the real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(finished):
    return pipeline.load(finished, dtype="float32")


def test_the_same_request_is_the_same_picture_whatever_else_is_served(pipe, finished):
    """Equal to `generation.generate` alone, byte by byte, while other sizes, seeds and starts are drawn between."""
    limits = door.limits_of(pipe)
    assert (
        limits.steps == (1, 2, 3, 4)
        and limits.sizes == ((32, 32),)
        and limits.starts
        and not limits.control
    )
    assert len(door.rehearsals(pipe, limits)) == 8
    start = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    cases = [dict(seed=seed, steps=steps) for seed in (0, 5) for steps in (1, 4)]
    cases += [
        dict(seed=1, steps=4, image=encoded(file(start)), strength=0.25),
        dict(guidance_scale=1.0, schedule="paper"),
    ]
    alone = []
    for case in cases:
        options = {"image": start} if "image" in case else {}
        options = {"steps": 2} | {k: v for k, v in case.items() if k != "image"} | options
        alone.append(generation.generate(pipe, ["a red circle"], batch_size=1, **options)[0])
    assert len({picture.tobytes() for picture in alone}) == len(cases)
    with served(door.artist(pipe, finished), capacity=64, limits=limits) as (address, _):
        with concurrent.futures.ThreadPoolExecutor(8) as clients:
            futures = [
                (i % len(cases), clients.submit(ask, address, **cases[i % len(cases)]))
                for i in range(36)
            ]
            for case, future in futures:
                np.testing.assert_array_equal(drawn(future.result()), alone[case])
        told = ask(address, prompt="a zebra").json()["error"]
        assert "zebra" in told and str(finished) not in told
        assert "paper" in ask(address, steps=3, schedule="paper").json()["error"]


def test_a_path_is_left_out_of_what_strangers_are_told(pipe, finished, monkeypatch):
    def fail(*_, **__):
        raise UserError(f"{finished} has no such program")

    monkeypatch.setattr(generation, "generate", fail)
    with pytest.raises(UserError, match="^the model has no such program"):
        door.artist(pipe, finished)(requests.parse(body(), LIMITS))


def test_examples_are_in_words_that_the_model_knows(pipe):
    pipe.text.prepare(door._examples(pipe))
    assert len(door._prompts(pipe, None)) == 1


def test_a_file_is_rehearsed_at_its_own_lengths(monkeypatch):
    """A file exported with --longest_prompt has programs for short prompts alone."""
    text = types.SimpleNamespace(
        prepare=lambda prompts: [(15 if len(prompts[0]) < 30 else 63, None)]
    )
    short, long = door._prompts(types.SimpleNamespace(text=text), None)
    assert len(short) < 30 <= len(long)
    program = exported.Program(steps=1, length=15, batch_size=1, height=32, width=32)
    monkeypatch.setattr(exported, "Exported", types.SimpleNamespace)
    file = types.SimpleNamespace(text=text, header=types.SimpleNamespace(programs=(program,)))
    assert door._prompts(file, None) == [short]


def test_a_port_is_taken_from_the_start():
    """While the model is read as well. Fails when the socket is bound and does not listen."""
    with door._listener("127.0.0.1", 0) as taken:
        with pytest.raises(UserError, match="cannot listen"):
            door._listener("127.0.0.1", taken.getsockname()[1])


def test_limits_of_sizes(pipe):
    assert door.limits_of(pipe, [(32, 32), (32, 64)], max_steps=2).sizes == ((32, 32), (32, 64))
    with pytest.raises(UserError, match="multiple of 8"):
        door.limits_of(pipe, [(33, 32)])


def test_the_door_starts_serves_and_ends(command, finished):
    """From the command line: progress, ready, a picture, SIGTERM with status 0; a second one on its port is refused."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    process = command(
        "sprint_jax.commands.serve",
        f"--model={finished}",
        f"--port={port}",
        "--max_steps=1",
        background=True,
    )
    try:
        states = []

        def ready():
            assert process.poll() is None, process.stderr.read()
            with contextlib.suppress(httpx.TransportError):
                states.append(CLIENT.get(f"{address}/health").json())
            return states and states[-1]["ready"]

        wait_until(ready, 120)
        assert states[-1]["compiled"] == states[-1]["programs"] == 2
        assert drawn(ask(address, steps=1)).shape == (32, 32, 3)
        assert ask(address, steps=2).status_code == 400
        second = command("sprint_jax.commands.serve", f"--model={finished}", f"--port={port}")
        assert second.returncode == 2 and f"--port={port}" in second.stderr.splitlines()[-1]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0 and f"ready: {address}" in out and "Traceback" not in err, (
            err
        )
    finally:
        process.kill()


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--model"]),
        (["--model=/nowhere"], ["/nowhere"]),
        (["--model=x", "--port=70000"], ["--port"]),
        (["--model=x", "--queue=0"], ["--queue"]),
        (["--model=x", "--host=300.1.1.1"], ["--host"]),
        (["--model=x", "--sizes=big"], ["--sizes"]),
    ],
)
def test_the_door_refuses(command, flags, words):
    result = (
        command("sprint_jax.commands.serve", *flags, "--port=0")
        if not any("port" in flag for flag in flags)
        else command("sprint_jax.commands.serve", *flags)
    )
    line = result.stderr.strip().splitlines()[-1]
    assert (
        result.returncode == 2
        and line.startswith("error: ")
        and all(word in line for word in words)
    ), line

"""The API with good and bad clients. A stand-in draws each request, so swapped answers show."""

import asyncio
import base64
import concurrent.futures
import contextlib
import socket
import time

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from helpers.servers import (
    CLIENT,
    LIMITS,
    image_of,
    open_connection,
    paint,
    request_body,
    run_server,
    send_request,
    start_queue,
    to_base64,
    wait_until,
)
from sprint_jax.errors import UserError
from sprint_jax.serving import app, schema, server
from sprint_jax.serving import body as body_lib
from sprint_jax.serving.app import make_app, png


def test_an_image_over_http():
    with run_server() as (address, _):
        response = send_request(address, seed=3)
        np.testing.assert_array_equal(
            image_of(response), paint(schema.parse(request_body(seed=3), LIMITS))
        )
        assert response.headers["content-type"] == "image/png"
        assert response.headers["cache-control"] == "no-store"
        for stage in ("waiting", "drawing", "encoding"):
            assert f"{stage};dur=" in response.headers["server-timing"]
        assert CLIENT.get(f"{address}/schema").json() == schema.json_schema(LIMITS)
        assert CLIENT.get(f"{address}/health").json()["ready"] is True
        described = CLIENT.get(f"{address}/openapi.json").json()
        assert described["paths"]["/generate"]["post"]["requestBody"]["content"][
            "application/json"
        ]["schema"]["required"] == ["prompt"]


def test_errors_are_one_sentence_and_the_server_continues():
    with run_server() as (address, _):
        post = lambda content, **headers: CLIENT.post(
            f"{address}/generate",
            content=content,
            headers={"content-type": "application/json"} | headers,
        )
        for response, status, word in (
            (send_request(address, prompt="a zebra"), 400, "zebra"),
            (send_request(address, prompt="fire"), 500, "log"),
            (post(b"{"), 400, "JSON"),
            (post(request_body(), **{"content-type": "text/plain"}), 415, "application/json"),
            (post(b"x" * (body_lib.MOST_BYTES + 1)), 413, str(body_lib.MOST_BYTES)),
            (
                post(iter([b"x" * 2**20] * (body_lib.MOST_BYTES // 2**20 + 1))),
                413,
                str(body_lib.MOST_BYTES),
            ),
            (post(request_body(), **{"x-session": "s" * 100}), 400, "X-Session"),
            (CLIENT.get(f"{address}/generate"), 405, "POST"),
            (CLIENT.get(f"{address}/nothing"), 404, "/generate"),
        ):
            assert response.status_code == status, response.text
            assert word in response.json()["error"], response.text
        assert CLIENT.get(f"{address}/generate").headers["allow"] == "POST"
        with open_connection(
            address, b"", length=body_lib.MOST_BYTES + 1
        ) as announced:  # refused before any of it is sent
            assert b"413" in announced.recv(65536).split(b"\r\n")[0]
        image_of(send_request(address))


def test_a_fault_of_the_server_has_the_form_of_every_error(monkeypatch):
    """Send JSON. Fails when the plain text of the framework comes through."""
    queue = start_queue(paint, 8)
    monkeypatch.setattr(schema, "parse", lambda *_: 1 // 0)
    with TestClient(make_app(queue, LIMITS), raise_server_exceptions=False) as client:
        reply = client.post("/generate", json={"prompt": "a circle"})
        assert reply.status_code == 500 and "log" in reply.json()["error"]
    queue.close()


def test_openapi_is_of_the_same_model_as_the_checks():
    """Every error status has the form of an error, and a password is described."""
    queue = start_queue(paint, 8)
    described = make_app(queue, LIMITS, password="secret").openapi()
    post = described["paths"]["/generate"]["post"]
    sent = post["requestBody"]["content"]["application/json"]["schema"]
    published = schema.json_schema(LIMITS)
    for one in published["properties"].values():
        if one.get("default", 0) is None:  # OpenAPI leaves these out
            del one["default"]
    assert sent == published
    form = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    assert list(post["responses"].pop("200")["content"]) == ["image/png"]
    assert {"400", "408", "409", "413", "415", "429", "503", "default"} == set(post["responses"])
    assert all(response["content"] == form for response in post["responses"].values())
    assert described["components"]["schemas"]["Error"]["required"] == ["error"]
    assert [each["name"] for each in post["parameters"]] == ["x-session"]
    assert described["components"]["securitySchemes"]["password"]["scheme"] == "basic"
    assert "securitySchemes" not in make_app(queue, LIMITS).openapi()["components"]
    queue.close()


def test_the_password_and_other_sites():
    with run_server(password="swördfish") as (address, _):
        for path in ("/", "/health", "/schema", "/page.css"):
            response = CLIENT.get(address + path)
            assert response.status_code == 401
            assert response.headers["www-authenticate"].startswith("Basic")
        assert send_request(address).status_code == 401
        for bad in (
            "Basic",
            "Basic !!!",
            "Bearer x",
            "Basic " + to_base64(b"x:wrong"),
            "Basic " + to_base64(b"no colon"),
        ):
            assert send_request(address, headers={"authorization": bad}).status_code == 401
        good = {"authorization": "Basic " + to_base64("anybody:swördfish".encode())}
        image_of(send_request(address, headers=good))
        page = CLIENT.get(address, headers=good)
        assert page.status_code == 200 and "page.js" in page.text
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert (
            send_request(address, headers=good | {"origin": "http://evil.example"}).status_code
            == 403
        )
        image_of(send_request(address, headers=good | {"origin": address}))


def test_other_host_names_are_refused_on_a_local_server():
    """Refuse a name that another site points here, unless a password or a network is used."""
    queue = start_queue(paint, 8)
    for options, named in (
        (dict(local=True), 403),
        (dict(local=True, password="secret"), 200),
        ({}, 200),
    ):
        with TestClient(make_app(queue, LIMITS, **options)) as client:
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


def test_no_other_files_are_read_or_written(tmp_path):
    """Hand out the page's three files only. Fails when their folder is mounted as a whole."""
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    with run_server() as (address, _):
        host, port = address.removeprefix("http://").split(":")
        paths = [
            f"{prefix}{secret}"
            for prefix in (
                "/file=",
                "/page.js/",
                "/page.css/",
                "/file/",
                "/assets/",
                "/static/",
                "/page.html/",
            )
        ]
        paths += [
            f"{folder}{'../' * 12}{str(secret)[1:]}" for folder in ("/", "/assets/", "/static/")
        ]
        paths += [path.replace("..", "%2e%2e").replace("/s", "%2fs") for path in paths]
        paths += [
            "/app.py",
            "/page.html",
            "/serving/page.js",
            "/proxy=http://127.0.0.1/",
            "/docs",
            "/redoc",
            "/docs/oauth2-redirect",
            "/login",
        ]
        for path in paths:
            with socket.create_connection(
                (host, int(port)), 10
            ) as raw:  # clients would clean the path
                raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                reply = b"".join(iter(lambda: raw.recv(65536), b""))
            assert b"a secret" not in reply, (
                path,
                reply[:200],
            )
            assert reply.split()[1] in (b"404", b"403", b"400"), (
                path,
                reply[:200],
            )
        for path in (
            "/upload",
            "/page.js",
            "/page.css",
            "/options",
            "/health",
            "/schema",
            "/openapi.json",
            "/",
            "/login",
        ):
            assert CLIENT.post(address + path, files={"files": ("x.txt", b"x")}).status_code in (
                404,
                405,
            ), path


def test_a_full_queue_refuses_at_once(gate):
    with run_server(lambda request: paint(gate(request)), capacity=1) as (address, queue):
        with concurrent.futures.ThreadPoolExecutor(2) as clients:
            first = clients.submit(send_request, address, seed=1)
            wait_until(lambda: gate.seen)
            second = clients.submit(send_request, address, seed=2)
            wait_until(lambda: queue.length == 1)
            begin = time.perf_counter()
            response = send_request(address, seed=3)
            assert response.status_code == 429
            assert response.headers["retry-after"]
            assert "waiting" in response.json()["error"]
            assert time.perf_counter() - begin < 1
            gate.open.set()
            for future, seed in ((first, 1), (second, 2)):
                np.testing.assert_array_equal(
                    image_of(future.result()), paint(schema.parse(request_body(seed=seed), LIMITS))
                )


def test_a_client_that_goes_away_frees_its_place(gate):
    with run_server(lambda request: paint(gate(request)), capacity=1) as (address, queue):
        at_work = open_connection(address, request_body(seed=1))
        wait_until(lambda: gate.seen)
        waiting = open_connection(address, request_body(seed=2))
        wait_until(lambda: queue.length == 1)
        waiting.close()
        wait_until(lambda: queue.length == 0)
        at_work.close()  # in the middle of the drawing: its image is thrown away
        # in the middle of the body
        open_connection(address, request_body()[:5], length=100).close()
        open_connection(address, b"")
        gate.open.set()
        image_of(send_request(address, seed=3))
        assert [request.seed for request in gate.seen] == [1, 3]


def test_slow_clients_block_nobody(monkeypatch):
    monkeypatch.setattr(body_lib, "READ_SECONDS", 0.5)
    with run_server(capacity=1) as (address, _):
        slow = [open_connection(address, b"{", length=1000) for _ in range(20)]
        image_of(send_request(address))
        for raw in slow:
            reply = b""
            while not reply.endswith(b"}"):  # head and body may come apart
                reply += raw.recv(65536)
            assert b"408" in reply.split(b"\r\n")[0] and b"within 0.5 seconds" in reply
        monkeypatch.setattr(app, "READERS", 1)
        monkeypatch.setattr(body_lib, "READ_SECONDS", 5)
        held = []

        def full():
            held.append(
                open_connection(address, b"{", length=1000)
            )  # another request, since the last one came while others had the place
            answer = send_request(address)
            return answer.status_code == 429 and "being read" in answer.text

        wait_until(full)
        for raw in held:
            raw.close()
        wait_until(lambda: send_request(address).status_code == 200)
        for raw in slow:
            raw.close()


def test_a_connection_without_a_request_is_closed(monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)
    with run_server() as (address, _):
        host, port = address.removeprefix("http://").split(":")
        silent, slow = (socket.create_connection((host, int(port)), 10) for _ in range(2))
        slow.sendall(b"POST /generate HTTP/1.1\r\nHost:")
        for raw in (silent, slow):
            assert raw.recv(100) == b""
        image_of(send_request(address))


def test_a_connection_without_another_request_is_closed(monkeypatch):
    """Bytes after an answer that are no request keep it open no longer than bytes before it."""
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    with run_server() as (address, _):
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
        image_of(send_request(address))


def test_an_answer_that_nobody_reads_is_dropped(monkeypatch):
    """The server would hold it forever, beyond the system's buffers. Slow readers get all."""
    monkeypatch.setattr(server, "SEND_SECONDS", 0.5)
    noise = np.random.default_rng(0).integers(0, 256, (2048, 2048, 3), np.uint8)
    whole = len(png(noise))
    with run_server(lambda request: noise) as (address, _):
        for wait, part in ((2.0, 2**24), (0.002, 2**16)):
            raw = open_connection(address, request_body())
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


def test_requests_of_one_session_replace_each_other(gate):
    with run_server(lambda request: paint(gate(request)), capacity=4) as (address, queue):
        with concurrent.futures.ThreadPoolExecutor(3) as clients:
            futures = [
                clients.submit(send_request, address, seed=0, headers={"x-session": "other"})
            ]
            wait_until(lambda: gate.seen)
            futures.append(
                clients.submit(send_request, address, seed=1, headers={"x-session": "mine"})
            )
            wait_until(lambda: queue.length == 1)
            futures.append(
                clients.submit(send_request, address, seed=2, headers={"x-session": "mine"})
            )
            assert futures[1].result().status_code == 409
            gate.open.set()
            image_of(futures[0].result()), image_of(futures[2].result())
        assert [request.seed for request in gate.seen] == [0, 2]


def test_many_clients_get_their_own_images():
    """50 clients, 8 places: every answer is right or a refusal. See benchmarks/serving.py."""

    async def run(address):
        async with httpx.AsyncClient(
            verify=False, timeout=60, limits=httpx.Limits(max_connections=50)
        ) as client:
            one = lambda seed: client.post(
                f"{address}/generate",
                content=request_body(seed=seed),
                headers={"content-type": "application/json"},
            )
            return await asyncio.gather(*(one(seed) for seed in range(150)))

    with run_server(lambda request: (time.sleep(0.002), paint(request))[1]) as (address, queue):
        replies = asyncio.run(run(address))
        right = 0
        for seed, response in enumerate(replies):
            assert response.status_code in (200, 429)
            if response.status_code == 200:
                np.testing.assert_array_equal(
                    image_of(response), paint(schema.parse(request_body(seed=seed), LIMITS))
                )
                right += 1
        assert right > 8 and queue.length == 0


def test_a_port_is_taken_from_the_start():
    """Hold the port while the model loads. Fails when the socket is bound and does not listen."""
    with server.listen("127.0.0.1", 0) as taken:
        with pytest.raises(UserError, match="cannot listen"):
            server.listen("127.0.0.1", taken.getsockname()[1])

"""Many clients at once: are the answers right, how fast are refusals, does memory grow?

    python -m benchmarks.serving --model=runs/sprint [--clients=200] [--seconds=60] [--queue=64]

Starts `sprint-jax serve` on loopback, waits until it is ready, and sends some requests alone. Then
all clients send these at random, each waiting for its answer before the next. An answer is right if
it equals the image of that request byte by byte. A refused client waits as Retry-After says. One
request in fifty is given up in the middle. Server and clients share the machine's cores.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import pathlib
import random
import re
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np

CASES = [
    {"prompt": prompt, "seed": seed, "steps": steps}
    for prompt in ("a red circle", "a blue square above a white circle")
    for seed in range(4)
    for steps in (1, 2, 4)
]


@contextlib.contextmanager
def server(model, *flags):
    """Start `sprint-jax serve` and wait until it is ready. Yields (port, process)."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sprint_jax",
            "serve",
            f"--model={model}",
            f"--port={port}",
            *flags,
        ]
    )
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit("the server did not start")
            with contextlib.suppress(OSError):
                if json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/health"))["ready"]:
                    break
            time.sleep(0.5)
        yield port, process
    finally:
        process.terminate()
        process.wait(30)


def memory(process):
    """Return the resident MB of a process (Linux)."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(_found(re.search(r"VmRSS:\s+(\d+)", status))[1]) / 1024


def _found(match: re.Match | None) -> re.Match:
    """Return the match. Raises AssertionError without one."""
    assert match is not None
    return match


async def ask(port, case, vanish=False):
    """Return (status, body, headers) of one request on its own connection, None if given up."""
    content = json.dumps(case).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [
        f"Host: localhost:{port}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        "Connection: close",
    ]
    head = "\r\n".join(["POST /generate HTTP/1.1", *lines, "", ""])
    try:
        writer.write(head.encode() + content)
        await writer.drain()
        if vanish:
            await asyncio.sleep(random.random() / 10)
            return None
        head, _, body = (await asyncio.wait_for(reader.read(-1), 60)).partition(b"\r\n\r\n")
        return int(head.split()[1]), body, head
    finally:
        writer.close()


async def client(port, right, end, counts, seconds):
    """Send requests until `end`. counts: outcomes. seconds: {"answered", "refused"} -> times."""
    while time.perf_counter() < end:
        number, vanish, begin = (
            random.randrange(len(CASES)),
            random.random() < 0.02,
            time.perf_counter(),
        )
        try:
            reply = await ask(port, CASES[number], vanish)
        except (OSError, TimeoutError, IndexError) as error:
            counts[f"lost ({type(error).__name__})"] += 1
            continue
        if reply is None:
            counts["given up"] += 1
            continue
        status, body, head = reply
        if status == 200:
            counts[
                "right" if body == right[number] else "swapped" if body in right else "broken"
            ] += 1
            seconds["answered"].append(time.perf_counter() - begin)
        elif status in (429, 503):
            counts[f"refused ({status})"] += 1
            seconds["refused"].append(time.perf_counter() - begin)
            await asyncio.sleep(
                int(_found(re.search(rb"retry-after: (\d+)", head))[1]) * random.uniform(0.8, 1.2)
            )
        else:
            counts[f"other ({status})"] += 1


async def watched(process, end, said):
    while time.perf_counter() < end:
        said.append(memory(process))
        await asyncio.sleep(0.5)


async def image_of(port, case):
    """Return the bytes of the image of a case. Raises AssertionError without an answer."""
    answer = await ask(port, case)
    assert answer is not None
    return answer[1]


async def measure(port, process, options):
    right = [await image_of(port, case) for case in CASES]
    counts, seconds, said = collections.Counter(), {"answered": [], "refused": []}, []
    end = time.perf_counter() + options.seconds
    clients = [client(port, right, end, counts, seconds) for _ in range(options.clients)]
    await asyncio.gather(watched(process, end, said), *clients)
    for case, image in zip(CASES, right, strict=True):  # it still draws, and the same
        assert await image_of(port, case) == image
    return counts, seconds, said


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--queue", type=int, default=64)
    options = parser.parse_args()
    with server(options.model, f"--queue={options.queue}") as (port, process):
        counts, seconds, said = asyncio.run(measure(port, process, options))
        alive = process.poll() is None
    state = "lives" if alive else "is gone"
    print(
        f"{options.clients} clients, {options.seconds:g} s, places in the queue {options.queue}; "
        f"the server {state}"
    )
    for name, count in sorted(counts.items()):
        print(f"{name:>20} {count}")
    for name, times in seconds.items():
        if times:
            p50, p95, p99 = 1000 * np.percentile(times, (50, 95, 99))
            print(
                f"{name:>20} p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms, most "
                f"{1000 * max(times):.0f} ms"
            )
    tenth = max(1, len(said) // 10)
    first, last = np.mean(said[:tenth]), np.mean(said[-tenth:])
    print(
        f"memory of the server: {first:.0f} MB in the first tenth, {last:.0f} MB in the last, at "
        f"most {max(said):.0f} MB"
    )


if __name__ == "__main__":
    main()

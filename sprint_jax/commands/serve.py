"""A page to draw on, and a JSON API: python -m sprint_jax serve --model=DIR [--port=7860]

DIR is what sprint-jax sample takes: a published or converted folder, the --workdir of a run, or an exported file. The
page has text to image, image to image and sketch to image; programs ask POST /generate, whose schema GET /schema
publishes. Both stand in one line before the device, and a request gives the picture that sprint-jax sample makes of the
same prompt, seed and options with --batch_size=1, whatever else is being served.
"""

import os
import pathlib
import signal
import socket
import sys
import warnings

import numpy as np
from absl import app, flags

from sprint_jax.errors import UserError
from sprint_jax.runtime import cli, compile_cache

# Named as in sprint-jax sample where it is the same thing; one process runs one of the commands.
_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Diffusers folder, converted folder, run directory, or exported file.",
    allow_override=True,
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["bfloat16", "float32"],
    "Of weights and arithmetic; default: bfloat16, on a CPU float32.",
    allow_override=True,
)
_ATTENTION = flags.DEFINE_enum(
    "attention",
    None,
    ["plain", "pallas"],
    "Attention and depthwise convolutions compiled by XLA, or kernels where the device has them; default: kernels on an NVIDIA GPU.",
    allow_override=True,
)
_TILE = flags.DEFINE_bool(
    "tile",
    False,
    "Decode in overlapping tiles of 1024 px: less memory for large pictures.",
    allow_override=True,
)
_INSTRUCTION = flags.DEFINE_string(
    "instruction_file",
    None,
    "Text before each prompt of a published model; '' for none; default: see README.",
    allow_override=True,
)
_HOST = flags.DEFINE_string(
    "host",
    "127.0.0.1",
    "Address to listen at; 0.0.0.0 lets other machines in: then set a password.",
    allow_override=True,
)
_PORT = flags.DEFINE_integer("port", 7860, "Port to listen at; 0 takes a free one.")
_PASSWORD = flags.DEFINE_string(
    "password",
    None,
    "Asked of everybody, with any user name; the variable SPRINT_JAX_PASSWORD keeps it out of lists of processes.",
)
_QUEUE = flags.DEFINE_integer(
    "queue", 64, "Most requests that wait; further ones are refused at once."
)
_MAX_STEPS = flags.DEFINE_integer("max_steps", 4, "Most network calls per picture.")
_MAX_PROMPT = flags.DEFINE_integer("max_prompt", 2000, "Most characters of a prompt.")
_SIZES = flags.DEFINE_list(
    "sizes",
    None,
    "HEIGHTxWIDTH on offer, each compiled before the start; default: the model's own.",
    allow_override=True,
)
_READY_TOKENS = flags.DEFINE_integer(
    "ready_tokens",
    None,
    "Compile for prompts of at most so many tokens before the start, longer ones when they come; default: all.",
)

_HEAD_SECONDS = 10.0

_SHAPES = (
    "a red circle left of a blue square",
    "a green triangle on a yellow background",
    "three purple circles",
    "a white square above a red triangle",
    "two blue triangles",
)
_PICTURES = (
    "a lighthouse at dusk, oil on canvas",
    "a fox in the snow, early morning light",
    "a bowl of ripe figs, still life",
    "a small wooden boat on a calm lake",
    "an old library full of plants",
    "a paper-cut city at night",
)


def main(argv):
    with cli.user_errors():
        cli.no_arguments(argv)
        _check_flags()
        sizes = _sizes()
        listener = _listener(
            _HOST.value, _PORT.value
        )  # before the model, whose loading may take minutes
        pipe = _load(pathlib.Path(_MODEL.value))
        limits = limits_of(pipe, sizes, _MAX_STEPS.value, _MAX_PROMPT.value)
        _serve(pipe, limits, listener)


def limits_of(pipe, sizes=None, max_steps=4, max_prompt=2000):
    """What is on offer (`serving.requests.Limits`) with a model.

    sizes: (height, width) tuples, None for the model's own. Raises UserError for a size that does not fit the model.
    """
    from sprint_jax.sampling import exported, generation
    from sprint_jax.serving import requests

    own = (pipe.height, pipe.width)
    steps, starts = range(1, max_steps + 1), True
    if isinstance(pipe, exported.Exported):
        batch_size, starts = _batch_size(pipe), False
        programs = [
            p for p in pipe.header.programs if p.batch_size == batch_size and p.steps <= max_steps
        ]
        if sizes is None:  # its own first
            sizes = sorted(
                {(p.height, p.width) for p in programs}, key=lambda size: (size != own, size)
            )
        there = lambda count: {(p.height, p.width) for p in programs if p.steps == count}
        steps = [
            count for count in sorted({p.steps for p in programs}) if there(count) >= set(sizes)
        ]
        if not steps:
            listed = sorted({(p.steps, p.height, p.width) for p in pipe.header.programs})
            raise UserError(
                f"--sizes and --max_steps leave no program of {pipe.path}: it has (steps, height, width) {listed}"
            )
    sizes = tuple(sizes or [own])
    for height, width in sizes:
        generation.latent_shape(pipe, height, width)
    return requests.Limits(
        tuple(steps),
        sizes,
        float(pipe.guidance_scale),
        pipe.schedule,
        starts,
        pipe.control,
        max_prompt,
    )


def artist(pipe, path):
    """draw(request) -> uint8 [height, width, 3], equal to `generation.generate` of that prompt alone.

    path: of the model, whose name is left out of what strangers are told.
    """
    from sprint_jax.sampling import generation

    batch_size = _batch_size(
        pipe
    )  # of one size always, or a picture's last bits would depend on its company

    def draw(request):
        control = (
            {}
            if request.control is None
            else dict(control=request.control, control_scale=request.control_scale)
        )
        try:
            return generation.generate(
                pipe,
                [request.prompt],
                steps=request.steps,
                guidance_scale=request.guidance_scale,
                height=request.height,
                width=request.width,
                seed=request.seed,
                image=request.image,
                strength=request.strength,
                schedule=request.schedule,
                batch_size=batch_size,
                **control,
            )[0]
        except UserError as error:
            raise UserError(str(error).replace(str(path), "the model")) from None

    return draw


def rehearsals(pipe, limits, ready_tokens=None):
    """Requests that need every program on offer: each size, padded prompt length, number of steps, with and without a start."""
    from sprint_jax.serving import requests

    grey = lambda there, height, width: (
        np.full((height, width, 3), 128, np.uint8) if there else None
    )
    controls = (False, True) if limits.control else (False,)
    starts = (False, True) if limits.starts else (False,)
    # At strength 1 no step is dropped, so these are all numbers of steps that a start can leave.
    return [
        requests.Request(
            prompt,
            steps,
            0,
            limits.guidance_scale,
            height,
            width,
            "code",
            grey(start, height, width),
            1.0,
            grey(control, height, width),
            1.0,
        )
        for height, width in limits.sizes
        for prompt in _prompts(pipe, ready_tokens)
        for control in controls
        for start in starts
        for steps in limits.steps
    ]


def _prompts(pipe, ready_tokens):
    """One prompt for each padded length that there can be; of an exported file, that it has programs for."""
    from sprint_jax.sampling import exported

    found, words = {}, 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the longest are cut
        while words < 600:
            prompt = " ".join(["a"] * words)
            try:
                found.setdefault(pipe.text.prepare([prompt])[0][0], prompt)
            except UserError:  # too long for this model
                break
            words = words + 1 + words // 8
    least = min(found)
    if isinstance(pipe, exported.Exported):
        there = {program.length for program in pipe.header.programs}
        found = {length: prompt for length, prompt in found.items() if length in there}
    return [
        prompt
        for length, prompt in found.items()
        if length == least or ready_tokens is None or length <= ready_tokens
    ]


def _batch_size(pipe):
    """Pictures per program run: one, or the least that an exported file has programs for."""
    from sprint_jax.sampling import exported

    return (
        min(p.batch_size for p in pipe.header.programs)
        if isinstance(pipe, exported.Exported)
        else 1
    )


def _examples(pipe):
    """Prompts to show, in words that the model knows."""
    try:
        pipe.text.prepare(list(_PICTURES))
    except UserError:
        return list(_SHAPES)
    return list(_PICTURES)


def _check_flags():
    if not _MODEL.value:
        raise UserError(
            "--model is missing: give a diffusers folder, a converted one, the --workdir of a run, or an exported file"
        )
    for flag, low, high in (
        (_PORT, 0, 65535),
        (_QUEUE, 1, 10_000),
        (_MAX_STEPS, 1, 50),
        (_MAX_PROMPT, 1, 100_000),
    ):
        if not low <= flag.value <= high:
            raise UserError(f"--{flag.name}={flag.value}: use {low} to {high}")


def _sizes():
    """--sizes as (height, width) tuples, or None."""
    if _SIZES.value is None:
        return None
    try:
        sizes = [tuple(map(int, size.lower().split("x"))) for size in _SIZES.value]
    except ValueError:
        sizes = []
    if not sizes or any(len(size) != 2 for size in sizes):
        raise UserError(
            f"--sizes={','.join(_SIZES.value)}: give HEIGHTxWIDTH, for example 1024x1024,768x1344"
        )
    return sizes


def _listener(host, port):
    """A socket that listens already, so that a port in use is told before the model is read."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # a port that is bound and not listened at can be bound again
    except OSError as error:
        raise UserError(
            f"cannot listen at --host={host} --port={port} ({error.strerror or error}): choose others, or --port=0"
        ) from None
    return listener


def _load(path):
    from sprint_jax.sampling import exported, pipeline

    compile_cache.start()
    say = lambda message: print(message, file=sys.stderr, flush=True)
    if path.is_file():
        for flag in (_DTYPE, _ATTENTION, _INSTRUCTION, _TILE):
            if flag.present:
                raise UserError(
                    f"--{flag.name} is settled in an exported file: give it to sprint-jax export"
                )
        return exported.load(path, say=say)
    dtype = _DTYPE.value or pipeline.default_dtype()
    return pipeline.load(
        path,
        dtype=dtype,
        attention=_ATTENTION.value,
        instruction=_INSTRUCTION.value,
        tile=_TILE.value,
        say=say,
    )


def server_config(application):
    """uvicorn's configuration, with two limits that it leaves to proxies.

    A connection that brings no request within `_HEAD_SECONDS` of its beginning or of the last answer is closed, and one whose
    answer is not being taken, for `api.SEND_SECONDS`, is cut.
    """
    import uvicorn
    from uvicorn.protocols.http import h11_impl

    from sprint_jax.serving import api

    class Impatient(h11_impl.H11Protocol):
        _wanting = _sending = None

        def connection_made(self, transport):
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # tells of every byte that is not taken
            self._want()

        def on_response_complete(self):
            super().on_response_complete()
            self._want()

        def _want(self):
            if self._wanting:
                self._wanting.cancel()
            self._wanting = self.loop.call_later(_HEAD_SECONDS, self._close_without_request)

        def _close_without_request(self):
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

        def pause_writing(self):
            super().pause_writing()
            if not self._sending:
                self._watch_sending()

        def _watch_sending(self):
            left = self.transport.get_write_buffer_size()
            self._sending = self.loop.call_later(api.SEND_SECONDS, self._cut_unless_taken, left)

        def _cut_unless_taken(self, before):
            if self.transport.get_write_buffer_size() >= before:
                self.transport.abort()
            else:  # slowly, but it is taken
                self._watch_sending()

        def resume_writing(self):
            super().resume_writing()
            self._sent()

        def _sent(self):
            if self._sending:
                self._sending.cancel()
                self._sending = None

        def connection_lost(self, exc):
            self._sent()
            super().connection_lost(exc)

    return uvicorn.Config(
        application,
        http=Impatient,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=1000,
        timeout_graceful_shutdown=2,
    )


def _serve(pipe, limits, listener):
    """Until a signal ends it. The page answers while the model is still being compiled."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = (
        "False"  # before Gradio is imported: it would report to its makers
    )
    import tqdm
    import uvicorn

    from sprint_jax.serving import api, page
    from sprint_jax.serving import queue as queue_lib

    draw = artist(pipe, _MODEL.value)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    password = _PASSWORD.value or os.environ.get("SPRINT_JAX_PASSWORD")
    failures = []

    def prepare(say):
        wanted = rehearsals(pipe, limits, _READY_TOKENS.value)
        say(0, len(wanted))
        for done, request in enumerate(tqdm.tqdm(wanted, unit="program", desc="compile"), 1):
            draw(request)
            say(done, len(wanted))

    def prepared(error):
        if error is None:
            return print(f"ready: {address}", flush=True)
        failures.append(error)
        server.should_exit = True

    queue = queue_lib.Queue(draw, _QUEUE.value, prepare, prepared)
    local = host in ("127.0.0.1", "::1")
    application = page.mount(
        api.make(queue, limits, password, local=local),
        limits,
        pathlib.Path(_MODEL.value).name,
        _examples(pipe),
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            queue.start()  # "ready" is said of an address that answers

    server = Server(server_config(application))
    if not password and not local:
        print(
            f"warning: {address} is open to other machines without a password: set --password",
            file=sys.stderr,
        )
    print(f"{address} (compiling; the page says when it is ready)", flush=True)
    # uvicorn ends well on these two and then raises them again, for which an exit status of its own is no use here.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    queue.close()
    if failures:
        raise failures[0]


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags, argv=sys.argv)

"""The real model behind the server."""

import concurrent.futures
import types
import warnings

import numpy as np
import pytest

from helpers.servers import (
    LIMITS,
    image_file,
    image_of,
    request_body,
    run_server,
    send_request,
    to_base64,
)
from sprint_jax import build
from sprint_jax.errors import UserError
from sprint_jax.sampling import generation, loading
from sprint_jax.sampling.exported import Program
from sprint_jax.serving import artist, schema


@pytest.fixture(scope="module")
def pipe(finished):
    return loading.load(finished, dtype="float32")


def test_a_student_of_one_guidance_scale_says_so(pipe):
    """The shipped student, by a warning and to the page; one of several scales says nothing."""
    shipped = loading.load(build.asset("package:shapes_codec").parent / "shapes", dtype="float32")
    assert artist.limits_of(shipped).fixed_guidance
    assert not artist.limits_of(pipe).fixed_guidance
    draw = lambda model, scale: generation.generate(
        model, ["a red circle"], steps=1, seed=0, guidance_scale=scale
    )
    with pytest.warns(UserWarning, match=r"trained at 1\.5 alone"):
        draw(shipped, 3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(shipped, 1.5)
        draw(pipe, 3.0)


def test_the_same_request_is_the_same_image_whatever_else_is_served(pipe, finished):
    """Equal `generation.generate` alone, byte by byte, between other sizes, seeds and images."""
    limits = artist.limits_of(pipe)
    assert limits.steps == (1, 2, 3, 4)
    assert limits.sizes == ((32, 32),)
    assert limits.takes_image
    assert not limits.takes_control
    assert len(artist.rehearsals(pipe, limits)) == 8
    start = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    cases = [dict(seed=seed, steps=steps) for seed in (0, 5) for steps in (1, 4)]
    cases += [
        dict(seed=1, steps=4, image=to_base64(image_file(start)), strength=0.25),
        dict(guidance_scale=1.0, schedule="paper"),
    ]
    alone = []
    for case in cases:
        options = {"image": start} if "image" in case else {}
        options = {"steps": 2} | {k: v for k, v in case.items() if k != "image"} | options
        alone.append(generation.generate(pipe, ["a red circle"], batch_size=1, **options)[0])
    assert len({image.tobytes() for image in alone}) == len(cases)
    with run_server(artist.make_artist(pipe, finished), capacity=64, limits=limits) as (address, _):
        with concurrent.futures.ThreadPoolExecutor(8) as clients:
            futures = [
                (i % len(cases), clients.submit(send_request, address, **cases[i % len(cases)]))
                for i in range(36)
            ]
            for case, future in futures:
                np.testing.assert_array_equal(image_of(future.result()), alone[case])
        told = send_request(address, prompt="a zebra").json()["error"]
        assert "zebra" in told and str(finished) not in told
        assert "paper" in send_request(address, steps=3, schedule="paper").json()["error"]


def test_messages_hide_the_path_of_the_model(pipe, finished, monkeypatch):
    def fail(*_, **__):
        raise UserError(f"{finished} has no such program")

    monkeypatch.setattr(generation, "generate", fail)
    with pytest.raises(UserError, match="^the model has no such program"):
        artist.make_artist(pipe, finished)(schema.parse(request_body(), LIMITS))


def test_examples_are_in_words_that_the_model_knows(pipe):
    pipe.text.prepare(artist.examples(pipe))
    assert len(artist.prompts_by_length(pipe, None)) == 1


def test_a_file_is_rehearsed_at_its_own_lengths(monkeypatch):
    """Cover a file exported with --longest_prompt, which has programs for short prompts only."""
    text = types.SimpleNamespace(
        prepare=lambda prompts: [(15 if len(prompts[0]) < 30 else 63, None)]
    )
    short, long = artist.prompts_by_length(types.SimpleNamespace(text=text), None)
    assert len(short) < 30 <= len(long)
    program = Program(steps=1, length=15, batch_size=1, height=32, width=32)
    monkeypatch.setattr(artist, "Exported", types.SimpleNamespace)
    file = types.SimpleNamespace(text=text, header=types.SimpleNamespace(programs=(program,)))
    assert artist.prompts_by_length(file, None) == [short]


def test_limits_of_sizes(pipe):
    assert artist.limits_of(pipe, [(32, 32), (32, 64)], max_steps=2).sizes == ((32, 32), (32, 64))
    with pytest.raises(UserError, match="multiple of 8"):
        artist.limits_of(pipe, [(33, 32)])

"""Requests and refusals, and a fuzz from the published schema."""

import dataclasses
import io
import json
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from helpers.servers import (
    LIMITS,
    image_file,
    paint,
    refusal_of,
    request_body,
    start_queue,
    to_base64,
)
from sprint_jax.serving import schema
from sprint_jax.serving.app import make_app


def test_a_request_in_full_and_its_defaults():
    start = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    wanted = schema.parse(
        request_body(
            steps=3,
            seed=7,
            guidance_scale=2,
            height=32,
            width=48,
            schedule="paper",
            image=to_base64(image_file(start)),
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
    wanted = schema.parse(request_body(image=None, control=None, seed=None, width=None), LIMITS)
    assert (wanted.steps, wanted.seed, wanted.guidance_scale, wanted.schedule) == (
        2,
        0,
        1.5,
        "code",
    )
    assert (wanted.height, wanted.width, wanted.image, wanted.control) == (32, 32, None, None)
    assert schema.parse(request_body(width=48), LIMITS).height == 32
    assert schema.parse(request_body(steps=2.0), LIMITS).steps == 2
    assert (
        schema.parse('{"prompt": "ein Bär\\n\\tim 🌲"}'.encode(), LIMITS).prompt
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
        (request_body(promt="a"), ["'promt'", "prompt"]),
        (request_body(prompt=3), ["prompt is a number"]),
        (request_body(prompt=" \n"), ["prompt is empty"]),
        (request_body(prompt="x" * 100_000), ["100000", "2000"]),
        (request_body(prompt="a\x00b"), ["U+0000"]),
        (request_body(prompt="a\x1b[31m"), ["U+001B"]),
        (request_body(steps=0), ["steps is 0", "1, 2, 3, 4"]),
        (request_body(steps=5), ["steps is 5"]),
        (request_body(steps=True), ["steps is True"]),
        (request_body(steps="2"), ["steps is '2'"]),
        (request_body(steps=[[2]]), ["steps is a list"]),
        (request_body(seed=-1), ["seed is -1"]),
        (request_body(seed=2**31), ["seed"]),
        (request_body(seed=1.5), ["seed is 1.5"]),
        (request_body(seed=False), ["seed is False"]),
        (request_body(guidance_scale=-1), ["guidance_scale"]),
        (request_body(guidance_scale="4"), ["guidance_scale is a string"]),
        (request_body(height=48), ["48 x 32", "32 x 32, 32 x 48"]),
        (request_body(height=10**9, width=10**9), ["height"]),
        (request_body(height=0), ["height is 0"]),
        (request_body(schedule="fast"), ["schedule", "code, paper"]),
        (request_body(strength=0), ["strength is 0"]),
        (request_body(strength=1.01), ["strength"]),
        (request_body(image=3), ["image is a number"]),
        (request_body(image="@@@"), ["image is not base64"]),
        (request_body(image="é"), ["image is not base64"]),
        (request_body(image=to_base64(b"")), ["image", "empty"]),
        (request_body(image=to_base64(b"hello there")), ["image", "not a PNG"]),
        (request_body(control=to_base64(b"x")), ["control", "ControlNet"]),
        (request_body(control_scale=9), ["control_scale"]),
    ],
)
def test_refusals_name_the_field_and_the_remedy(sent, words):
    told = refusal_of(schema.parse, sent, LIMITS)
    assert told.status in (400, 415)
    assert "\n" not in told.sentence
    assert len(told.sentence) < 400
    for word in words:
        assert word in told.sentence


def test_millions_of_values_are_refused_before_they_are_parsed():
    """Parsing them would block every other client. A prompt may be all commas."""
    for sent in (
        b'{"prompt": [' + b"[]," * 300_000 + b"1]}",
        b"{" + b'"a":1,' * 300_000 + b'"b":1}',
    ):
        assert "more than 200000 values" in refusal_of(schema.parse, sent, LIMITS).sentence
    assert schema.parse(request_body(prompt="," * 500), LIMITS).prompt == "," * 500


def test_what_the_model_cannot_do_is_refused():
    plain = dataclasses.replace(LIMITS, takes_image=False)
    assert (
        "cannot start"
        in refusal_of(
            schema.parse, request_body(image=to_base64(image_file(Image.new("RGB", (4, 4))))), plain
        ).sentence
    )
    control = dataclasses.replace(LIMITS, takes_control=True)
    lines = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    wanted = schema.parse(
        request_body(control=to_base64(image_file(lines)), control_scale=0.5), control
    )
    assert wanted.control_scale == 0.5
    assert not wanted.control.any()  # transparency is black, which is no line


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
IMAGES = [
    to_base64(image_file(Image.new(mode, size), file_format))
    for mode, size, file_format in (
        ("RGB", (8, 8), "PNG"),
        ("L", (3, 50), "JPEG"),
        ("RGBA", (20, 20), "WEBP"),
        ("1", (1, 1), "PNG"),
    )
]


def values_of(described):
    """Return a strategy for the values that the schema of a property allows."""
    if "anyOf" in described:
        return st.one_of(*map(values_of, described["anyOf"]))
    if "enum" in described:
        return st.sampled_from(described["enum"])
    if described["type"] == "null":
        return st.none()
    if described.get("contentEncoding") == "base64":
        return st.sampled_from(IMAGES)
    if described["type"] == "string":
        patterns = [re.compile(one["pattern"]) for one in described["allOf"]]
        texts = st.text(st.characters(codec="utf-8"), min_size=described["minLength"], max_size=60)
        return texts.filter(lambda text: all(p.search(text) for p in patterns)) | st.just(
            "x" * described["maxLength"]
        )
    if described["type"] == "integer":
        return st.integers(described["minimum"], described["maximum"])
    low = described.get("minimum", described.get("exclusiveMinimum"))
    return st.floats(low, described["maximum"], exclude_min="exclusiveMinimum" in described)


@st.composite
def bodies(draw):
    """Draw (body, valid): a valid request, or one with any values and keys (None: maybe valid)."""
    properties = schema.json_schema(LIMITS)["properties"]
    fields = {"prompt": draw(values_of(properties["prompt"]))}
    for name in draw(st.sets(st.sampled_from(sorted(properties)))):
        fields[name] = draw(values_of(properties[name]))
    valid = True
    if draw(st.booleans()):
        valid = None  # unknown: any value may happen to be allowed
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
    queue = start_queue(paint)
    with TestClient(make_app(queue, LIMITS)) as client:
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
    """Answer anything with an image, or a 4xx with a sentence; what the schema allows, an image."""
    data, valid = case
    response = client.post("/generate", content=data, headers={"content-type": "application/json"})
    hypothesis.target(float(response.status_code))
    if response.status_code == 200:
        assert Image.open(io.BytesIO(response.content)).size in ((32, 32), (48, 32))
        return
    sentence = response.json()["error"]
    assert 400 <= response.status_code < 500, response.text
    assert sentence, response.text
    assert "\n" not in sentence, response.text
    assert not valid, sentence

"""What can be asked for: the JSON of a request, its schema, and a checked `Request`.

The schema is the one description: it is published, the page builds its controls from the same `Limits`, and `parse`
refuses all that it does not allow, by a sentence that names the field. A key that is null counts as left out.
"""

import base64
import binascii
import dataclasses
import json
import math
import unicodedata

import numpy as np

from sprint_jax.serving import uploads
from sprint_jax.serving.refused import Refused
from sprint_jax.storage import image_files

MOST_BODY = 3 * uploads.MOST_BYTES  # two pictures in base64, which makes four bytes of three
_MOST_MARKS = 200_000  # brackets and commas, some of which a prompt may hold
SCHEDULES = ("code", "paper")
STRENGTH = 0.6
_MOST_SEED = 2**31 - 1
_MOST_GUIDANCE = 20.0
_MOST_CONTROL = 2.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is on offer, settled when the server starts.

    steps: numbers of network calls. sizes: (height, width) in pixels; the first of them is drawn unless told, and nothing
    that was not compiled before is, so that no request can make the others wait for the compiler. guidance_scale,
    schedule: used unless told. starts: whether a picture can be started from. control: whether a condition is taken.
    prompt: most characters.
    """

    steps: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    guidance_scale: float
    schedule: str
    starts: bool
    control: bool
    prompt: int = 2000

    @property
    def usual_steps(self) -> int:
        return 2 if 2 in self.steps else self.steps[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One picture to draw, checked.

    image: uint8 [height, width, 3] to start from, or None; strength says how much of it may change. control: a
    condition of that shape (white lines on black), or None; control_scale says how much it counts.
    """

    prompt: str
    steps: int
    seed: int
    guidance_scale: float
    height: int
    width: int
    schedule: str
    image: np.ndarray | None
    strength: float
    control: np.ndarray | None
    control_scale: float


def schema(limits: Limits) -> dict:
    """JSON Schema (2020-12) of the body of POST /generate."""
    heights, widths = ([size[axis] for size in limits.sizes] for axis in (0, 1))
    number = lambda low, high, default: {
        "type": ["number", "null"],
        "minimum": low,
        "maximum": high,
        "default": default,
    }
    absent = {"type": "null", "description": "This model takes none."}
    picture = lambda what: {
        "type": ["string", "null"],
        "contentEncoding": "base64",
        "maxLength": 4 * uploads.MOST_BYTES // 3 + 64,
        "description": f"A PNG, JPEG or WebP file in base64 (a data: URL is taken too), cut to the size of the picture: {what}.",
    }
    one_of = lambda values, default: {"enum": [*dict.fromkeys(values), None], "default": default}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Request",
        "type": "object",
        "additionalProperties": False,
        "required": ["prompt"],
        "properties": {
            "prompt": {
                "type": "string",
                "minLength": 1,
                "maxLength": limits.prompt,
                "allOf": [
                    {"pattern": r"\S"},
                    {"pattern": r"^[^\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f]*$"},
                ],
                "description": "What to draw. No control characters but tab and line breaks.",
            },
            "steps": one_of(limits.steps, limits.usual_steps) | {"description": "Network calls."},
            "seed": {
                "type": ["integer", "null"],
                "minimum": 0,
                "maximum": _MOST_SEED,
                "default": 0,
                "description": "Names the noise: the same request with the same seed is the same picture.",
            },
            "guidance_scale": number(0, _MOST_GUIDANCE, limits.guidance_scale),
            "height": one_of(heights, heights[0])
            | {"description": "Pixels, together with width one of the sizes on offer."},
            "width": one_of(widths, widths[0]),
            "schedule": one_of(SCHEDULES, limits.schedule)
            | {"description": "Times of the steps; paper: 1, 2 or 4 steps."},
            "image": picture("to start from") if limits.starts else absent,
            "strength": {
                "type": ["number", "null"],
                "exclusiveMinimum": 0,
                "maximum": 1,
                "default": STRENGTH,
                "description": "How much of image may change; not looked at without one.",
            },
            "control": picture("white lines on black that the drawing follows")
            if limits.control
            else absent,
            "control_scale": number(0, _MOST_CONTROL, 1.0)
            | {"description": "How much control counts; not looked at without one."},
        },
    }


def parse(body: bytes, limits: Limits) -> Request:
    """A request from the bytes of its JSON. Raises Refused for anything that the schema does not allow."""
    fields = _object(body)
    known = [field.name for field in dataclasses.fields(Request)]
    for name in fields:
        if name not in known:
            raise Refused(400, f"unknown key {_short(name)}: the keys are {', '.join(known)}")
    fields = {name: value for name, value in fields.items() if value is not None}
    height, width = _size(fields, limits)
    # Pictures are decoded last: nothing is spent on a request that is wrong elsewhere.
    wanted = dict(
        prompt=_prompt(fields, limits),
        steps=_one_of(fields, "steps", limits.steps, limits.usual_steps),
        seed=_integer(fields, "seed", 0, _MOST_SEED, default=0),
        guidance_scale=_number(
            fields, "guidance_scale", 0, _MOST_GUIDANCE, default=limits.guidance_scale
        ),
        schedule=_one_of(fields, "schedule", SCHEDULES, limits.schedule),
        strength=_number(fields, "strength", 0, 1, default=STRENGTH),
        control_scale=_number(fields, "control_scale", 0, _MOST_CONTROL, default=1.0),
    )
    if wanted["strength"] == 0:
        raise Refused(400, "strength is 0: use more than 0 and at most 1")
    if "image" in fields and not limits.starts:
        raise Refused(
            400, "image is given and this model cannot start from a picture: leave it out"
        )
    if "control" in fields and not limits.control:
        raise Refused(
            400,
            "control is given and this model has no ControlNet: leave it out, or send it as image",
        )
    image = _picture(fields, "image", height, width, image_files.WHITE)
    control = _picture(fields, "control", height, width, image_files.BLACK)
    return Request(height=height, width=width, image=image, control=control, **wanted)


def _object(body):
    """The JSON object in the bytes; no key twice, no NaN."""
    # Parsing holds all other threads up, and millions of values take seconds. Pictures, in base64, have none of these.
    if sum(body.count(mark) for mark in (b"[", b"{", b",")) > _MOST_MARKS:
        raise Refused(
            400,
            f'the body has more than {_MOST_MARKS} values: send an object such as {{"prompt": "a red circle"}}',
        )
    try:
        found = json.loads(body.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant)
    except UnicodeDecodeError:
        raise Refused(400, "the body is not UTF-8: send a JSON object in UTF-8") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: also integers of thousands of digits
        reason = (
            str(error)
            if isinstance(error, json.JSONDecodeError)
            else "numbers too long or brackets too deep"
        )
        raise Refused(
            400,
            f'the body is not JSON ({reason}): send an object such as {{"prompt": "a red circle"}}',
        ) from None
    if not isinstance(found, dict):
        raise Refused(
            400,
            f'the body is a JSON {_kind(found)}: send an object such as {{"prompt": "a red circle"}}',
        )
    return found


def _pairs(pairs):
    fields = {}
    for name, value in pairs:  # once over all of them: there may be millions
        if name in fields:
            raise Refused(400, f"key {_short(name)} is there twice: give it once")
        fields[name] = value
    return fields


def _constant(name):
    raise Refused(400, f"{name} is not a number of JSON: give a finite one")


def _prompt(fields, limits):
    if "prompt" not in fields:
        raise Refused(400, "prompt is missing: say what to draw")
    prompt = fields["prompt"]
    if not isinstance(prompt, str):
        raise Refused(400, f"prompt is a {_kind(prompt)}: give a string")
    if not prompt.strip():
        raise Refused(400, "prompt is empty: say what to draw")
    if len(prompt) > limits.prompt:
        raise Refused(400, f"prompt has {len(prompt)} characters: use at most {limits.prompt}")
    for place, character in enumerate(prompt):
        # Cc: control characters; Cs: halves of surrogate pairs, which no tokenizer can encode.
        if character not in "\t\n\r" and unicodedata.category(character) in ("Cc", "Cs"):
            raise Refused(
                400,
                f"prompt has the character U+{ord(character):04X} at {place}: use letters, digits and punctuation",
            )
    return prompt


def _size(fields, limits):
    """(height, width): the side that is left out is that of the first size with the other."""
    heights, widths = ([size[axis] for size in limits.sizes] for axis in (0, 1))
    height, width = (
        _integer(fields, name, 1, 2**16, default=None) if name in fields else None
        for name in ("height", "width")
    )
    offered = [
        size for size in limits.sizes if height in (None, size[0]) and width in (None, size[1])
    ]
    if not offered:
        listed = ", ".join(f"{h} x {w}" for h, w in limits.sizes)
        asked = f"{height or heights[0]} x {width or widths[0]}"
        raise Refused(400, f"height x width is {asked}: this server draws {listed}")
    return offered[0]


def _one_of(fields, name, values, default):
    value = fields.get(name, default)
    if isinstance(value, bool) or value not in values:
        raise Refused(400, f"{name} is {_short(value)}: use {', '.join(map(str, values))}")
    return values[values.index(value)]  # 2.0 is 2


def _number(fields, name, low, high, *, default):
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refused(400, f"{name} is a {_kind(value)}: give a number")
    if not low <= value <= high or not math.isfinite(value):
        raise Refused(400, f"{name} is {_short(value)}: use {low:g} to {high:g}")
    return float(value)


def _integer(fields, name, low, high, *, default):
    value = fields.get(name, default)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        raise Refused(400, f"{name} is {_short(value)}: give a whole number")
    if not low <= value <= high:
        raise Refused(400, f"{name} is {_short(value)}: use {low} to {high}")
    return int(value)


def _picture(fields, name, height, width, ground):
    """A picture of the request, decoded: uint8 [height, width, 3], or None."""
    if name not in fields:
        return None
    text = fields[name]
    if not isinstance(text, str):
        raise Refused(400, f"{name} is a {_kind(text)}: give a picture file in base64")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(
            400, f"{name} is not base64: encode the bytes of a PNG, JPEG or WebP file"
        ) from None
    try:
        return uploads.picture(data, height, width, ground)
    except Refused as refusal:
        raise Refused(refusal.status, f"{name}: {refusal.sentence}") from None


def _kind(value):
    """JSON's name of a value's type."""
    names = {
        type(None): "null",
        bool: "boolean",
        int: "number",
        float: "number",
        str: "string",
        list: "list",
        dict: "object",
    }
    return names[type(value)]


def _short(value):
    """A value as a sentence can hold it: printable, and cut."""
    if isinstance(value, (list, dict)):  # whose text may be endless, or nested too deep to be made
        return "a list" if isinstance(value, list) else "an object"
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."

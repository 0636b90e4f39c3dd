"""The request of POST /generate: one pydantic model is its schema, validation and OpenAPI text.

The model depends on `Limits`, which the server fixes at its start. A key that is null counts as
left out. `parse` checks a body and decodes its images.
"""

import dataclasses
import functools
import re
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from sprint_jax.encoders.prompts import is_blank
from sprint_jax.sampling import generation
from sprint_jax.serving import body as bodies
from sprint_jax.serving import uploads
from sprint_jax.serving.refused import Refused
from sprint_jax.storage import image_files

SCHEDULES = ("code", "paper", "even")
_MOST_SEED = 2**31 - 1
_MOST_GUIDANCE = 20
_MOST_CONTROL = 2
_MOST_SIDE = 2**16
_NO_IMAGE = "this model cannot start from an image"
_NO_CONTROL = "this model has no ControlNet"
_CONTROL_CHARACTERS = r"\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f"  # not tab, line breaks
# Halves of surrogate pairs as well, which no tokenizer can encode.
_UNREADABLE = re.compile(rf"[{_CONTROL_CHARACTERS}\ud800-\udfff]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server offers, fixed at its start.

    steps: allowed numbers of network calls. sizes: (height, width) in pixels, the default first.
    Only these are compiled, so that no request makes the others wait for the compiler.
    guidance_scale, schedule: defaults. fixed_guidance: whether the model knows that scale alone.
    takes_image: whether a request may bring an image to start from. takes_control: whether it may
    bring a sketch for the ControlNet. takes_empty: whether its prompt may be empty. max_prompt:
    characters.
    """

    steps: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    guidance_scale: float
    schedule: str
    takes_image: bool
    takes_control: bool
    takes_empty: bool = False
    fixed_guidance: bool = False
    max_prompt: int = 2000

    @property
    def default_steps(self) -> int:
        """The number of steps of a request that names none."""
        return 2 if 2 in self.steps else self.steps[0]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """One image to draw, checked.

    image: uint8 [height, width, 3] to start from, or None. strength: how much of it may change, in
    (0, 1]. control: white lines on black of the same shape, or None. control_scale: its weight.
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


class Error(pydantic.BaseModel):
    """The body of every response with a status of 400 or above."""

    error: str = Field(description="One sentence: what is wrong, and the remedy.")


@functools.lru_cache(maxsize=8)
def request_model(limits: Limits) -> type[pydantic.BaseModel]:
    """Return the pydantic model of a request body under `limits`."""
    heights, widths = (list(dict.fromkeys(side)) for side in zip(*limits.sizes, strict=True))
    seed = Annotated[int, Field(ge=0, le=_MOST_SEED), BeforeValidator(_whole)]
    guidance = Annotated[float, Field(ge=0, le=_MOST_GUIDANCE)]
    strength = Annotated[float, Field(gt=0, le=1)]
    control = Annotated[float, Field(ge=0, le=_MOST_CONTROL)]
    fields: dict[str, Any] = {
        "prompt": (_prompt(limits), Field(description="What to draw.")),
        "steps": _optional(_choice(limits.steps), limits.default_steps, "Network calls."),
        "seed": _optional(seed, 0, "The same request with the same seed is the same image."),
        "guidance_scale": _optional(guidance, limits.guidance_scale, "Embedded guidance."),
        "height": _optional(_side(heights), heights[0], "Pixels, with width one of the sizes."),
        "width": _optional(_side(widths), widths[0], "Pixels."),
        "schedule": _optional(
            _choice(SCHEDULES), limits.schedule, "Times of the steps. paper takes 1, 2 or 4 steps."
        ),
        "image": _image("to start from") if limits.takes_image else _absent(_NO_IMAGE),
        "strength": _optional(strength, generation.STRENGTH, "How much of image may change."),
        "control": (
            _image("of white lines on black to follow")
            if limits.takes_control
            else _absent(_NO_CONTROL)
        ),
        "control_scale": _optional(control, 1.0, "How closely control is followed."),
    }
    config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    return pydantic.create_model("Request", __config__=config, **fields)


def json_schema(limits: Limits) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a request body."""
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **request_model(limits).model_json_schema()}


def parse(body: bytes, limits: Limits) -> Request:
    """Return the request in a body. Raises Refused for anything that the schema does not allow."""
    fields = bodies.json_object(body)
    model = request_model(limits)
    for name in fields:  # before pydantic, which would list every one of many
        if name not in model.model_fields:
            known = ", ".join(model.model_fields)
            raise Refused(400, f"unknown key {bodies.short(name)}: the keys are {known}")
    try:
        checked = model.model_validate({k: v for k, v in fields.items() if v is not None})
    except pydantic.ValidationError as error:
        raise Refused(400, sentence(error.errors()[0], json_schema(limits))) from None
    values: dict[str, Any] = dict(checked)
    height, width = _size(checked, limits)
    # Images are decoded last, so that nothing is spent on a request that is wrong elsewhere.
    for name, background in (("image", image_files.WHITE), ("control", image_files.BLACK)):
        if values[name] is not None:
            values[name] = uploads.from_base64(
                values[name], height, width, name=name, background=background
            )
    values |= {"height": height, "width": width}
    return Request(**values)


def sentence(error: Any, schema: dict[str, Any]) -> str:
    """Return one of pydantic's errors as a sentence: the field, its value, and the remedy.

    error: an item of `ValidationError.errors()`. schema: the JSON Schema of the model.
    """
    name, value, wrong = str(error["loc"][-1]), error["input"], error["type"]
    described = schema["properties"].get(name, {})
    if wrong == "problem":
        return f"{name} {error['msg']}"
    if wrong == "none_required":
        return f"{name} is given, and {described['description']}: leave it out"
    if wrong == "missing":
        return f"{name} is missing: say what to draw"
    if wrong == "string_too_long":
        return f"{name} has {len(value)} characters: {_remedy(described)}"
    kind = bodies.kind(value)
    if wrong == "string_type" or (wrong == "float_type" and kind != "number"):
        return f"{name} is a {kind}: {_remedy(described)}"
    return f"{name} is {bodies.short(value)}: {_remedy(described)}"


def _remedy(described: dict[str, Any]) -> str:
    """Return what to send instead, by the JSON Schema of a property."""
    described = described.get("anyOf", [described])[0]
    choices = [described["const"]] if "const" in described else described.get("enum")
    if choices:
        return "use " + ", ".join(map(str, choices))
    if "contentEncoding" in described:
        return "give a PNG, JPEG or WebP file in base64"
    if described["type"] == "string":
        return f"use a string of at most {described['maxLength']} characters"
    what = "a whole number" if described["type"] == "integer" else "a number"
    if "exclusiveMinimum" in described:
        return f"use {what} above {described['exclusiveMinimum']}, at most {described['maximum']}"
    return f"use {what} from {described['minimum']} to {described['maximum']}"


def _optional(kind: Any, default: Any, text: str) -> tuple[Any, Any]:
    return kind | None, Field(default, description=text)


def _prompt(limits: Limits) -> Any:
    patterns = [{"pattern": f"^[^{_CONTROL_CHARACTERS}]*$"}]
    if limits.takes_empty:
        allowed: Any = {"allOf": patterns}
        bounds = Field(max_length=limits.max_prompt, json_schema_extra=allowed)
        return Annotated[str, bounds, BeforeValidator(_readable)]
    extra: Any = {"allOf": [{"pattern": r"\S"}, *patterns]}
    bounds = Field(min_length=1, max_length=limits.max_prompt, json_schema_extra=extra)
    return Annotated[str, bounds, BeforeValidator(_not_blank)]


def _choice(values: tuple[Any, ...]) -> Any:
    one_of: Any = Literal
    return Annotated[one_of[values], BeforeValidator(_whole)]  # pyright: ignore


def _side(offered: list[int]) -> Any:
    # Any side passes here: `_size` names the sizes that both sides make.
    published = WithJsonSchema({"type": "integer", "enum": offered})
    return Annotated[int, Field(ge=1, le=_MOST_SIDE), BeforeValidator(_whole), published]


def _image(what: str) -> tuple[Any, Any]:
    # The length is checked after decoding, where the refusal can name bytes.
    longest: Any = {"contentEncoding": "base64", "maxLength": 4 * uploads.MOST_BYTES // 3 + 64}
    text = f"A PNG, JPEG or WebP file {what}, in base64 or as a data: URL, cropped to the size."
    return _optional(Annotated[str, Field(json_schema_extra=longest)], None, text)


def _absent(why: str) -> tuple[Any, Any]:
    return None, Field(None, description=why)


def _whole(value: Any) -> Any:
    """Return 2.0 as 2, as JSON Schema does. Refuse booleans, which Python counts as integers."""
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "not a number")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _not_blank(value: Any) -> Any:
    """Refuse a blank prompt, and what `_readable` refuses."""
    if isinstance(value, str) and is_blank(value):
        raise PydanticCustomError("problem", "is empty: say what to draw")
    return _readable(value)


def _readable(value: Any) -> Any:
    """Refuse unreadable characters in a prompt; leave other types to pydantic."""
    if isinstance(value, str) and (found := _UNREADABLE.search(value)):
        raise PydanticCustomError(
            "problem",
            "has the character U+{code} at {place}: use letters, digits and punctuation",
            {"code": f"{ord(found[0]):04X}", "place": found.start()},
        )
    return value


def _size(checked: Any, limits: Limits) -> tuple[int, int]:
    """Return (height, width). A missing side is that of the first size with the other."""
    height, width = (
        getattr(checked, side) if side in checked.model_fields_set else None
        for side in ("height", "width")
    )
    for size in limits.sizes:
        if height in (None, size[0]) and width in (None, size[1]):
            return size
    listed = ", ".join(f"{h} x {w}" for h, w in limits.sizes)
    asked = f"{height or limits.sizes[0][0]} x {width or limits.sizes[0][1]}"
    raise Refused(400, f"height x width is {asked}: this server draws {listed}")

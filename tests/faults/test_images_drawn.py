"""Faults that public reports show in drawn images: numbers that are not finite, options too far."""

import asyncio
import dataclasses
import json
import math
import re
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.configs import card, presets
from sprint_jax import build, config
from sprint_jax.diffusion import limits, samplers
from sprint_jax.encoders import pixels as pixel_codecs
from sprint_jax.errors import UserError
from sprint_jax.evaluation import checks, gallery
from sprint_jax.evaluation import options as evaluation_options
from sprint_jax.evaluation import run as evaluation
from sprint_jax.runtime import cards
from sprint_jax.sampling import export, exported, generation, loading, programs, sample
from sprint_jax.sampling.options import SHIPPED, ExportOptions, SampleOptions
from sprint_jax.serving import app, artist
from sprint_jax.serving.schema import Request
from sprint_jax.training import loop, previews

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def pipe():
    return loading.load(SHIPPED, dtype="float32")


def damaged(pipe):
    """Return the pipeline with a NaN in one weight of its last layer."""
    leaves, tree = jax.tree.flatten(pipe.params["transformer"])
    leaves[-1] = jnp.full_like(leaves[-1], jnp.nan)
    params = pipe.params | {"transformer": jax.tree.unflatten(tree, leaves)}
    return dataclasses.replace(pipe, params=params)


@pytest.fixture(scope="module")
def bad(pipe):
    return damaged(pipe)


LINE = "the image of prompt 'a red circle' with seed 7 is not finite .NaN or infinity.: use dtype"


@pytest.mark.parametrize("output", ["pixels", "latent"])
def test_an_image_that_is_not_finite_is_an_error(bad, pipe, output):
    """Fails when NaN becomes a black image."""
    with pytest.raises(generation.NotFinite, match=LINE):
        generation.generate(bad, [PROMPT], steps=1, seed=7, output=output)
    assert generation.generate(pipe, [PROMPT], steps=1, seed=7).any()


def test_one_bad_image_of_a_batch_is_named(pipe):
    """Fails when only whole batches are looked at, or padding is."""
    noise = np.random.default_rng(0).normal(size=(2, 4, 4, 32)).astype(np.float32)
    shape = generation.latent_shape(pipe, pipe.height, pipe.width)
    noise = np.resize(noise, (2, *shape))
    noise[1, 0, 0, 0] = np.inf
    with pytest.raises(generation.NotFinite, match="'a blue square'"):
        generation.generate(pipe, [PROMPT, "a blue square"], steps=1, latents=noise)


def test_no_command_writes_an_image_that_is_not_finite(bad, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *a, **k: bad)
    with pytest.raises(UserError, match=LINE):
        sample.sample(SampleOptions(prompt=[PROMPT], seed=7, steps=1, out=str(tmp_path / "s")))
    (tmp_path / "p.txt").write_text(PROMPT)
    asked = evaluation_options.Options(
        suite="imagereward", hook="helpers.rewards:reward", model=str(SHIPPED), seed=7, steps=1,
        prompts=str(tmp_path / "p.txt"), out=str(tmp_path / "e")
    )  # fmt: skip
    with pytest.raises(UserError, match=LINE):
        evaluation.run(asked)
    assert not list(tmp_path.rglob("*.png")) and not (tmp_path / "e" / gallery.PROTOCOL).exists()


def test_the_server_answers_500_with_the_line(bad, monkeypatch):
    monkeypatch.setattr(artist, "_batch_size", lambda pipe: 16)  # that program is compiled already
    draw = artist.make_artist(bad, SHIPPED)
    request = Request(
        prompt=PROMPT, steps=1, seed=7, guidance_scale=1.5, height=bad.height, width=bad.width,
        schedule="code", image=None, strength=0.6, control=None, control_scale=1.0
    )  # fmt: skip
    with pytest.raises(generation.NotFinite, match=LINE) as error:
        draw(request)
    handler = app._HANDLERS[UserError]
    answer = asyncio.run(handler(None, error.value))
    assert answer.status_code == 500 and b"is not finite" in answer.body
    assert asyncio.run(handler(None, UserError("x"))).status_code == 400


def test_an_exported_file_tells_as_well(pipe, tmp_path):
    """Its programs return whether images are finite; those of format 1 return images alone."""
    export.export(pipe, tmp_path / "file", steps=[1], batch_sizes=[1])
    found = exported.load(tmp_path / "file")
    good = generation.generate(pipe, [PROMPT], steps=1, seed=7, batch_size=1)
    drawn = generation.generate(found, [PROMPT], steps=1, seed=7)
    np.testing.assert_array_equal(drawn, good)
    name = sorted(name for name in found.params if found.params[name].size > 1)[-1]
    params = found.params | {name: jnp.full_like(found.params[name], jnp.nan)}
    with pytest.raises(generation.NotFinite, match=LINE):
        generation.generate(dataclasses.replace(found, params=params), [PROMPT], steps=1, seed=7)
    given = json.loads(found.header.to_json())
    header = exported._header("f", given | {"format": exported._OLDER})
    assert header.jax == jax.__version__
    shape = generation.latent_shape(pipe, pipe.height, pipe.width)
    kind = generation.Kind(output="pixels", steps=1, length=16, batch_size=1, draws=False,
        start=False, control=False, shape=shape)  # fmt: skip
    older = dataclasses.replace(found)
    older.__dict__["_programs"] = lambda wanted: lambda *arguments: jnp.zeros((1, 2, 2, 3))
    images, finite = older.program(kind)({}, {}, 0, 0, 0, np.arange(1))
    assert images.shape == (1, 2, 2, 3) and finite.all()


def test_a_decoder_that_overflows_is_seen_before_clipping():
    """Clipping makes 255 of infinity, and a byte of NaN is 0."""

    class Overflowing:
        latent_channels, factor, scaling_factor = 4, 1, 1.0

        def decode_in_parts(self, params, z):
            return z.at[0, 0, 0, 0].set(jnp.inf)[..., :3]

    codec = pixel_codecs.AutoencoderPixels(model=Overflowing(), tile=False)
    images, finite = codec.checked({"w": jnp.zeros(1)}, jnp.zeros((2, 4, 4, 4)))
    assert images.dtype == jnp.uint8 and finite.tolist() == [False, True]


def test_previews_warn_and_training_goes_on(bad, pipe, tmp_path):
    c = loading.read_config(SHIPPED)
    text, mask = build.text_encoder(c).encode([PROMPT, "a blue square"])
    heldout = types.SimpleNamespace(cond={"text": text, "mask": mask})
    frozen = types.SimpleNamespace(null_text=text[:1], null_mask=mask[:1])
    data = types.SimpleNamespace(
        pixels=pipe.pixels, pixels_params=pipe.params["pixels"], frozen=frozen,
        heldout=lambda *a: heldout
    )  # fmt: skip
    c = dataclasses.replace(c, evaluation=dataclasses.replace(c.evaluation, prompts=2))
    preview = previews.make(c, data, pipe.model, "renoise")
    assert preview(pipe.params["transformer"]).any()
    assert preview(bad.params["transformer"]) is None
    stage = types.SimpleNamespace(
        name="sprint", preview=preview, result=lambda state: bad.params["transformer"]
    )
    records = types.SimpleNamespace(images=lambda *a: pytest.fail("a black image is recorded"))
    with pytest.warns(UserWarning, match="sprint: no preview of step 4, its images are not finite"):
        loop._preview(stage, types.SimpleNamespace(preview_every=2), tmp_path, records, 4, None)
    assert not list(tmp_path.rglob("*.png"))
    sampler = programs.student_sampler(
        pipe.model, pipe.pixels, build.latent_shape(c), samplers.scm_times(1)
    )
    with pytest.warns(programs.NotFiniteWarning, match="2 of 2 images are not finite"):
        programs.run(sampler, bad.params, {}, heldout.cond, guidance=1.5, seed=0, batch=4)


TOO_FAR = [
    ("guidance_scale", 1e39), ("guidance_scale", -math.inf), ("guidance_scale", math.nan),
    ("guidance_scale", 101.0), ("steps", 0), ("steps", 10**9), ("images_per_prompt", 0),
    ("batch_size", 10**6), ("batch_size", -1), ("seed", 2**31), ("height", 2**40), ("width", 0),
]  # fmt: skip
OF_IMAGES = [
    ("control_scale", math.nan), ("control_scale", math.inf), ("control_scale", -0.5),
    ("control_scale", 1e30), ("strength", math.nan), ("strength", 0.0), ("strength", 1.5),
]  # fmt: skip


@pytest.mark.parametrize("name, value", TOO_FAR + OF_IMAGES)
def test_options_that_are_out_of_range_are_refused_alike(pipe, name, value):
    """By sample, evaluate and generate, with the same words, before anything is drawn."""
    advice = limits.advice(name, value)
    assert advice
    with pytest.raises(UserError, match=re.escape(f"--{name}={value}: {advice}")):
        sample.check(SampleOptions(prompt=[PROMPT], image="a", control="b", **{name: value}))
    if (name, value) in TOO_FAR:
        asked = evaluation_options.Options(suite="shapes", model="m", out="x", **{name: value})
        with pytest.raises(UserError, match=re.escape(f"--{name}={value}: {advice}")):
            checks.check(asked)
    with pytest.raises(UserError, match=re.escape(f"{name} {value}")):
        generation.generate(pipe, [PROMPT], **{name: value})


@pytest.mark.parametrize(
    "key, value",
    [
        ("evaluation.student_guidance", 1e39),
        ("evaluation.teacher_guidance", math.nan),
        ("evaluation.teacher_steps", 10**6),
        ("evaluation.batch", 0),
        ("data.size", 2**20),
    ],
)
def test_config_values_have_the_same_ranges(key, value):
    with pytest.raises(UserError, match=rf"config\.{key} .*: use "):
        config.parse(cards.override(card(), [f"{key}={value!r}"]))


def test_sizes_of_the_server_and_of_exports_are_bounded(pipe):
    with pytest.raises(UserError, match=f"height {2**30}: use 1 to {limits.SIDE}"):
        artist.limits_of(pipe, [(2**30, 32)])
    for changes in (dict(steps=(1, 10**9)), dict(height=2**30), dict(batch_sizes=(10**7,))):
        with pytest.raises(UserError, match=": use 1 to "):
            export.check(ExportOptions(model=str(SHIPPED), out="x", **changes))


def test_the_ranges_hold_what_is_used():
    """The published models' own values are within, and negative guidance."""
    limits.check({"guidance_scale": 4.5, "control_scale": 0.0, "strength": 1, "height": 4096})
    limits.check({"guidance_scale": -2, "steps": 50, "seed": 0, "batch_size": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for preset in presets():
            config.parse(card(preset=preset))

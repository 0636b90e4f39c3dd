"""The published models against diffusers and transformers in PyTorch, float32, random weights.

The weights come from `fabricate`, which leaves no parameter at a value that hides a branch. A wrong
statement about the architecture gives an error near 1e-2, and a right one about 1e-6.
"""

import dataclasses
import functools
import pathlib
import tempfile

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.arrays import normals, relative_error
from helpers.compiler import UNOPTIMIZED

torch = pytest.importorskip("torch")
fabricate = pytest.importorskip("helpers.fabricate")

from helpers.torch_models import converted, from_torch, to_torch  # noqa: E402
from sprint_jax.conversion import configs  # noqa: E402
from sprint_jax.models.dc_ae import tiled  # noqa: E402
from sprint_jax.sampling import generation, loading  # noqa: E402

pytestmark = pytest.mark.second_pass

torch.set_num_threads(1)


def describe_transformer(config):
    return configs.transformer(config, "float32")


TRANSFORMER_VARIANTS = {
    "student": {},
    "teacher": dict(guidance_embeds=False),
    "no QK-norm": dict(guidance_embeds=False, qk_norm=None),
    "other widths": dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=6,
        cross_attention_head_dim=8,
        cross_attention_dim=48,
        caption_channels=20,
        mlp_ratio=1.5,
    ),
}


@pytest.mark.parametrize("variant", TRANSFORMER_VARIANTS)
def test_transformer(variant, tmp_path):
    """Take three samples, padded prompts and latents that are not square.

    Fails when value and gate of the Mix-FFN are swapped, when shift and scale are, and when masks
    are ignored.
    """
    theirs = fabricate.transformer(**TRANSFORMER_VARIANTS[variant])
    model, params = converted(theirs, "transformer", describe_transformer, tmp_path)
    x, text = normals(3, 4, 6, model.in_channels), normals(3, 9, model.text_dim, seed=1)
    mask = (np.arange(9) < np.array([9, 4, 1])[:, None]).astype(np.float32)
    t, w = (
        np.float32([1.0, 0.4, 0.03]),
        np.float32([4.5, 1.0, 7.0]) if model.guidance_embed else None,
    )
    ours = jax.jit(model.apply, compiler_options=UNOPTIMIZED)(params, x, t, text, mask, w).velocity
    with torch.no_grad():
        expected = theirs(
            to_torch(x),
            torch.tensor(text),
            torch.tensor(t),
            encoder_attention_mask=torch.tensor(mask),
            guidance=None if w is None else torch.tensor(w) * theirs.config.guidance_embeds_scale,
        ).sample
    assert relative_error(ours, from_torch(expected)) < 1e-5


@pytest.mark.parametrize(
    "layers", [pytest.param(4, marks=pytest.mark.slow), pytest.param(28, marks=pytest.mark.long)]
)
def test_transformer_at_published_size(tmp_path, layers):
    """Compare one forward pass of the 0.6B transformer, or of its first blocks, on 8x12 latents."""
    theirs = fabricate.transformer("0.6b", num_layers=layers)
    model, params = converted(theirs, "transformer", describe_transformer, tmp_path)
    x, text = normals(1, 8, 12, 32), normals(1, 20, 2304, seed=1)
    mask = (np.arange(20) < 13).astype(np.float32)[None]
    t, w = np.float32([0.7]), np.float32([4.5])
    ours = jax.jit(model.apply)(params, x, t, text, mask, w).velocity
    with torch.no_grad():
        expected = theirs(
            to_torch(x),
            torch.tensor(text),
            torch.tensor(t),
            encoder_attention_mask=torch.tensor(mask),
            guidance=torch.tensor(w) * 0.1,
        ).sample
    assert relative_error(ours, from_torch(expected)) < 1e-5


def test_transformer_in_bfloat16(tmp_path):
    """Our bfloat16 is no farther from our float32 than PyTorch's from its own.

    Two kinds are compared: everything in bfloat16, as diffusers samples, and products alone, as
    under the autocast of training, which is nearer to float32.
    """
    import ml_dtypes

    theirs = fabricate.transformer()
    model, params = converted(theirs, "transformer", describe_transformer, tmp_path)
    half = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), params)
    x, text, mask = normals(4, 6, 6, 8), normals(4, 9, 48, seed=1), np.ones((4, 9), np.float32)
    t, w = np.float32([0.9, 0.5, 0.2, 0.7]), np.float32([4.5] * 4)
    run = lambda m, p: (
        jax.jit(m.apply, compiler_options=UNOPTIMIZED)(p, x, t, text, mask, w).velocity
    )
    computed = lambda residual: dataclasses.replace(
        model, dtype="bfloat16", residual_dtype=residual
    )
    ours = relative_error(run(computed("bfloat16"), half), run(model, params))
    trained = relative_error(run(computed("float32"), params), run(model, params))

    def reference(dtype):
        with torch.no_grad():
            return theirs.to(dtype)(
                to_torch(x).to(dtype),
                torch.tensor(text).to(dtype),
                torch.tensor(t),
                encoder_attention_mask=torch.tensor(mask).to(dtype),
                guidance=torch.tensor(w).to(dtype) * 0.1,
            ).sample

    full = from_torch(reference(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        autocast = relative_error(from_torch(reference(torch.float32)), full)
    half = relative_error(from_torch(reference(torch.bfloat16)), full)
    assert ours <= half, (ours, half, trained, autocast)
    assert trained <= autocast < 0.9 * half, (ours, half, trained, autocast)


def halved(params):
    """Return the parameters in bfloat16."""
    return jax.tree.map(lambda a: np.asarray(a).astype(jax.numpy.bfloat16), params)


def test_decoder_in_bfloat16(tmp_path):
    """The same bound as for the transformer."""
    theirs = fabricate.autoencoder()
    model, params = converted(theirs, "autoencoder", configs.autoencoder, tmp_path)
    z = normals(2, 4, 4, 8)
    run = jax.jit(model.decode, compiler_options=UNOPTIMIZED)
    lost = relative_error(
        np.asarray(run(halved(params), jax.numpy.bfloat16(z)), np.float32), run(params, z)
    )
    with torch.no_grad():
        full = from_torch(theirs.decode(to_torch(z)).sample)
        half = from_torch(theirs.bfloat16().decode(to_torch(z).bfloat16()).sample)
    assert lost <= relative_error(half, full)


def test_encoder_in_bfloat16(tmp_path):
    """The same bound, over several networks: the figure of one alone varies by a third."""
    ours, theirs = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        network = fabricate.autoencoder()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
        model, params = converted(network, "autoencoder", configs.autoencoder, tmp_path / str(seed))
        x = 0.5 * normals(8, 4 * model.factor, 4 * model.factor, 3, seed=seed)
        run = jax.jit(model.encode, compiler_options=UNOPTIMIZED)
        half = np.asarray(run(halved(params), jax.numpy.bfloat16(x)), np.float32)
        ours.append(relative_error(half, run(params, x)))
        with torch.no_grad():
            full = from_torch(network.encode(to_torch(x)).latent)
            theirs.append(
                relative_error(
                    from_torch(network.bfloat16().encode(to_torch(x).bfloat16()).latent), full
                )
            )
    assert np.mean(ours) <= np.mean(theirs)


def test_text_encoder_in_bfloat16(tmp_path):
    theirs = fabricate.text_encoder(300)
    model, params = converted(theirs, "text_encoder", configs.text_encoder, tmp_path)
    tokens = np.random.default_rng(0).integers(3, 300, (8, 24)).astype(np.int32)
    run = jax.jit(model.apply, compiler_options=UNOPTIMIZED)
    ones = np.ones((8, 24), np.float32)
    lost = relative_error(
        np.asarray(run(halved(params), tokens, ones), np.float32), run(params, tokens, ones)
    )
    with torch.no_grad():
        full = theirs(torch.tensor(tokens)).last_hidden_state.numpy()
        half = theirs.bfloat16()(torch.tensor(tokens)).last_hidden_state.float().numpy()
    assert lost <= relative_error(half, full)


AUTOENCODER_VARIANTS = {
    "sana": {},
    "two scales": dict(
        encoder_qkv_multiscales=[[], [], [], [5], [3, 5], [5]],
        decoder_qkv_multiscales=[[], [], [], [3, 7], [], [5]],
    ),
    "four stages": dict(
        encoder_block_types=["ResBlock", "EfficientViTBlock"] * 2,
        decoder_block_types=["ResBlock", "EfficientViTBlock"] * 2,
        encoder_block_out_channels=[8, 16, 16, 32],
        decoder_block_out_channels=[16, 16, 32, 64],
        encoder_layers_per_block=[1, 2, 1, 1],
        decoder_layers_per_block=[2, 1, 1, 1],
        encoder_qkv_multiscales=[[], [], [], [5]],
        decoder_qkv_multiscales=[[], [5], [], []],
    ),
}


@pytest.mark.parametrize("variant", AUTOENCODER_VARIANTS)
def test_autoencoder(variant, tmp_path):
    """Fails when attention heads are q, k, v of `to_q`, `to_k`, `to_v`, and when pixel-unshuffle
    orders (dy, dx, c).
    """
    theirs = fabricate.autoencoder(**AUTOENCODER_VARIANTS[variant])
    model, params = converted(theirs, "autoencoder", configs.autoencoder, tmp_path)
    z, x = normals(2, 3, 5, 8), np.tanh(normals(2, 3 * model.factor, 2 * model.factor, 3))
    with torch.no_grad():
        decoded, encoded = theirs.decode(to_torch(z)).sample, theirs.encode(to_torch(x)).latent
    assert (
        relative_error(
            jax.jit(model.decode, compiler_options=UNOPTIMIZED)(params, z), from_torch(decoded)
        )
        < 1e-5
    )
    assert (
        relative_error(
            jax.jit(model.encode, compiler_options=UNOPTIMIZED)(params, x), from_torch(encoded)
        )
        < 1e-5
    )


def test_autoencoder_tiles(tmp_path):
    """Tiles have unequal sizes and are blended as diffusers blends them."""
    theirs = fabricate.autoencoder(**AUTOENCODER_VARIANTS["four stages"])
    model, params = converted(theirs, "autoencoder", configs.autoencoder, tmp_path)
    factor = model.factor
    theirs.enable_tiling(8 * factor, 8 * factor, 6 * factor, 6 * factor)
    z = normals(1, 11, 14, 8)
    with torch.no_grad():
        decoded = theirs.tiled_decode(to_torch(z)).sample
        encoded = theirs.tiled_encode(decoded[:, :, : 10 * factor]).latent
    decode = jax.jit(functools.partial(model.decode, params), compiler_options=UNOPTIMIZED)
    encode = jax.jit(functools.partial(model.encode, params), compiler_options=UNOPTIMIZED)
    ours = tiled(decode, z, tile=8, stride=6, scale=factor)
    assert relative_error(ours, from_torch(decoded)) < 1e-5
    pixels = from_torch(decoded)[:, : 10 * factor]
    ours = tiled(encode, pixels, tile=8 * factor, stride=6 * factor, scale=1 / factor)
    assert relative_error(ours, from_torch(encoded)) < 1e-5


def test_text_encoder_and_prefix(tmp_path):
    """Take right padding and a window shorter than the text; compare the prefix with the full pass.

    Both in a loop and without one. Fails when the norm weights are not offset by 1, when even and
    odd layers change roles, and when the positions after a prefix start at 0.
    """
    theirs = fabricate.text_encoder(300, sliding_window=5)
    model, params = converted(theirs, "text_encoder", configs.text_encoder, tmp_path)
    tokens = np.random.default_rng(0).integers(3, 300, (3, 17)).astype(np.int32)
    tokens[:, :6] = tokens[0, :6]
    mask = np.arange(17) < np.array([17, 12, 8])[:, None]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), torch.tensor(mask).long()).last_hidden_state.numpy()
    apply = jax.jit(model.apply, compiler_options=UNOPTIMIZED)
    assert relative_error(np.asarray(apply(params, tokens, mask))[mask], expected[mask]) < 1e-5
    for tree in (params, model.unstack(params)):
        prefix = jax.jit(model.prefix, compiler_options=UNOPTIMIZED)(tree, tokens[0, :6])
        after = np.asarray(apply(tree, tokens[:, 6:], mask[:, 6:], prefix))
        assert relative_error(after[mask[:, 6:]], expected[:, 6:][mask[:, 6:]]) < 1e-5
        assert relative_error(prefix.first, expected[0, 0]) < 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return (diffusers pipeline, its folder)."""
    folder = tmp_path_factory.mktemp("tiny")
    theirs = fabricate.pipeline()
    theirs.save_pretrained(folder)
    theirs.text_encoder.set_attn_implementation("eager")
    theirs.set_progress_bar_config(disable=True)
    return theirs, folder


def call_diffusers(theirs, prompt, steps, latents, noise_seed, output, **options):
    """Return the output of diffusers' pipeline for given initial noise.

    The draws between steps come from a seeded generator.
    """
    return theirs(
        prompt,
        num_inference_steps=steps,
        intermediate_timesteps=1.3 if steps == 2 else None,
        height=96,
        width=160,
        use_resolution_binning=False,
        guidance_scale=4.5,
        latents=to_torch(latents),
        output_type=output,
        generator=torch.Generator().manual_seed(noise_seed),
        **options,
    ).images


def step_noise(noise_seed, shape, count):
    """Return what that generator draws, one NCHW array for each step."""
    generator = torch.Generator().manual_seed(noise_seed)
    batch, height, width, channels = shape
    return [
        from_torch(torch.randn(batch, channels, height, width, generator=generator))
        for _ in range(count)
    ]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_whole_pipeline(tiny, steps):
    """Compare latents and pixels from the same prompts and noise."""
    theirs, folder = tiny
    ours = loading.load(folder, dtype="float32")
    prompts = ["  A tiny Astronaut hatching from an egg ", "gulls"]
    latents = normals(2, 3, 5, 8, seed=steps)
    options = dict(
        steps=steps,
        height=96,
        width=160,
        latents=latents,
        step_noise=step_noise(7, latents.shape, steps),
    )
    expected = from_torch(call_diffusers(theirs, prompts, steps, latents, 7, "latent"))
    assert (
        relative_error(generation.generate(ours, prompts, output="latent", **options), expected)
        < 1e-4
    )
    pixels = np.round(255 * call_diffusers(theirs, prompts, steps, latents, 7, "np"))
    made = generation.generate(ours, prompts, **options).astype(np.float64)
    assert made.std() > 10 and (np.abs(made - pixels) <= 1).mean() > 0.999


PROMPTS = (
    "",
    " ",
    "a",
    "a red fox in the snow, watercolour, soft light",
    "  Two CATS  asleep ",
    "gulls\nand rain",
    "123 456",
    "émigré café naïve",
    "一只红色的狐狸",
    "ثعلب أحمر في الثلج",
    "שועל אדום",
    "🦊❄️ fox",
    "\u200bhidden",
    "fox " * 400,
    "lighthouse" * 80,
    "-- !!",
    "a\tb",
    "User Prompt: again",
    "日本の冬 and a lake",
    "x" * 3,
)


@pytest.mark.filterwarnings("ignore:prompt")
def test_prompt_handling_is_the_published_one(tiny):
    """Compare text features of twenty prompts.

    Ours use the keys and values of the instruction, and diffusers takes the full pass.
    """
    theirs, folder = tiny
    ours = loading.load(folder, dtype="float32")
    for prompt in PROMPTS:
        with torch.no_grad():
            expected, kept = theirs.encode_prompt(
                [prompt], complex_human_instruction=fabricate.INSTRUCTION
            )
        ((_, arrays),) = ours.text.prepare([prompt])
        features, mask = ours.text.features(
            ours.params["text"], {name: a[None] for name, a in arrays.items()}
        )
        count = int(kept.sum())
        assert int(mask.sum()) == count and bool(kept[0, :count].all()), prompt
        assert relative_error(features[0, :count], expected[0, :count]) < 1e-5, prompt


def test_without_instruction(tiny, tmp_path):
    theirs, folder = tiny
    ours = loading.load(folder, dtype="float32", instruction="")
    with torch.no_grad():
        expected, kept = theirs.encode_prompt(["a blue sofa"], complex_human_instruction=None)
    ((_, arrays),) = ours.text.prepare(["a blue sofa"])
    features, mask = ours.text.features(
        ours.params["text"], {name: a[None] for name, a in arrays.items()}
    )
    count = int(kept.sum())
    assert int(mask.sum()) == count
    assert relative_error(features[0, :count], expected[0, :count]) < 1e-5


def test_image_to_image(tiny):
    """Take an initial image and a strength where the times of both pipelines agree."""
    from PIL import Image

    theirs, folder = tiny
    components = {name: part for name, part in theirs.components.items()}
    img2img = fabricate.diffusers.SanaSprintImg2ImgPipeline(**components)
    img2img.set_progress_bar_config(disable=True)
    ours = loading.load(folder, dtype="float32")
    image = np.random.default_rng(0).integers(0, 256, (96, 160, 3)).astype(np.uint8)
    noise = step_noise(3, (1, 3, 5, 8), 2)  # the initial noise, then the draw of the only step
    expected = img2img(
        "a lake",
        image=Image.fromarray(image),
        strength=0.5,
        num_inference_steps=2,
        height=96,
        width=160,
        use_resolution_binning=False,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images
    made = generation.generate(
        ours,
        ["a lake"],
        steps=2,
        height=96,
        width=160,
        image=image,
        strength=0.5,
        latents=noise[0],
        output="latent",
    )
    assert relative_error(made, from_torch(expected)) < 1e-4
    other = generation.generate(
        ours,
        ["a lake"],
        steps=2,
        height=96,
        width=160,
        image=255 - image,
        latents=noise[0],
        output="latent",
    )  # at the default strength the image matters, unlike in diffusers
    assert relative_error(other, from_torch(expected)) > 0.01


FEW = settings(
    max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@FEW
@given(
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([3, 4, 16]),
    cross=st.integers(1, 4),
    depth=st.integers(1, 4),
    ratio=st.sampled_from([1.0, 1.5, 2.5]),
    sides=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    length=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_any_transformer(heads, head_dim, cross, depth, ratio, sides, length, seed):
    width = 12 * heads * head_dim  # divisible by all the numbers of cross heads
    theirs = fabricate.transformer(
        seed=seed,
        in_channels=5,
        out_channels=5,
        num_attention_heads=12 * heads,
        attention_head_dim=head_dim,
        num_cross_attention_heads=cross,
        cross_attention_head_dim=width // cross,
        cross_attention_dim=width,
        num_layers=depth,
        caption_channels=7,
        mlp_ratio=ratio,
    )
    with tempfile.TemporaryDirectory() as folder:
        model, params = converted(theirs, "transformer", describe_transformer, pathlib.Path(folder))
    x, text = normals(2, *sides, 5, seed=seed), normals(2, length, 7, seed=seed + 1)
    mask = (np.arange(length) < np.array([length, (length + 1) // 2])[:, None]).astype(np.float32)
    t, w = np.float32([0.8, 0.2]), np.float32([4.5, 2.0])
    ours = jax.jit(model.apply, compiler_options=UNOPTIMIZED)(params, x, t, text, mask, w).velocity
    with torch.no_grad():
        expected = theirs(
            to_torch(x),
            torch.tensor(text),
            torch.tensor(t),
            encoder_attention_mask=torch.tensor(mask),
            guidance=torch.tensor(w) * 0.1,
        ).sample
    assert relative_error(ours, from_torch(expected)) < 1e-5


@FEW
@given(
    groups=st.integers(1, 3),
    queries=st.integers(1, 3),
    head_dim=st.sampled_from([2, 8, 16]),
    depth=st.integers(1, 5),
    window=st.integers(1, 9),
    length=st.integers(2, 14),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_text_encoder(groups, queries, head_dim, depth, window, length, seed, data):
    """A prefix of any length gives the result of the full pass."""
    theirs = fabricate.text_encoder(
        50,
        seed=seed,
        hidden_size=36,
        intermediate_size=40,
        num_hidden_layers=depth,
        num_attention_heads=groups * queries,
        num_key_value_heads=groups,
        head_dim=head_dim,
        sliding_window=window,
        query_pre_attn_scalar=seed + 1,
    )
    with tempfile.TemporaryDirectory() as folder:
        model, params = converted(
            theirs, "text_encoder", configs.text_encoder, pathlib.Path(folder)
        )
    tokens = np.random.default_rng(seed).integers(3, 50, (2, length)).astype(np.int32)
    start = data.draw(st.integers(1, length - 1))
    tokens[1, :start] = tokens[0, :start]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).last_hidden_state.numpy()
    apply = jax.jit(model.apply, compiler_options=UNOPTIMIZED)
    assert relative_error(apply(params, tokens, np.ones((2, length))), expected) < 1e-5
    prefix = jax.jit(model.prefix, compiler_options=UNOPTIMIZED)(params, tokens[0, :start])
    after = apply(params, tokens[:, start:], np.ones((2, length - start)), prefix)
    assert relative_error(after, expected[:, start:]) < 1e-5

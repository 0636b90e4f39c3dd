"""Parts of a pipeline, without PyTorch: times of img2img, sizes, tiles, sub-pixel convolutions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from helpers.arrays import normals
from sprint_jax.data import aspect_ratios
from sprint_jax.diffusion import samplers
from sprint_jax.encoders import pixels as pixel_codecs
from sprint_jax.encoders import prompts as prompts_lib
from sprint_jax.errors import UserError
from sprint_jax.models import dc_ae
from sprint_jax.ops import conv3x3
from sprint_jax.planning import flops
from sprint_jax.sampling import generation, loading
from sprint_jax.storage import crops, image_files

pytestmark = pytest.mark.second_pass


@pytest.mark.parametrize(
    "steps, strength, expected",
    [
        (2, 1.0, [1.5708, 1.3, 0]),  # full strength: noise alone
        (2, 0.6, [1.3, 0]),  # the published default; diffusers starts at 1.5708
        (2, 0.5, [1.3, 0]),
        (2, 0.3, [1.3, 0]),
        (1, 0.6, [1.3, 0]),  # the only step starts where the image still matters
        (4, 0.5, [0.7854, 0.3927, 0]),
        (4, 0.75, [1.1781, 0.7854, 0.3927, 0]),
        (4, 0.1, [0.3927, 0]),
        (8, 0.9, [1.3, 1.1781, 0.9817, 0.7854, 0.589, 0.3927, 0.1963, 0]),
        (20, 0.99, [1.3, *(np.pi / 40 * np.arange(16, -1, -1))]),  # several times above 1.3
    ],
)
def test_image_times(steps, strength, expected):
    times = generation.image_times(samplers.scm_times(steps), strength)
    np.testing.assert_allclose(times, expected, atol=1e-4)


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5])
def test_strength_out_of_range(strength):
    with pytest.raises(UserError, match="strength"):
        generation.image_times(samplers.scm_times(2), strength)


def test_an_initial_image_is_mixed_with_the_noise():
    """With F = 0 one step from s multiplies the state by cos(s).

    The state is cos(s) start + sin(s) noise, at unit scale.
    """
    start, noise, s = normals(3, 2), normals(3, 2, seed=1), 1.1
    zero = lambda u, t: jnp.zeros_like(u)
    got = samplers.scm(
        zero, noise, np.zeros((0, 3, 2), np.float32), np.float32([s, 0]), start=start
    )
    np.testing.assert_allclose(got, np.cos(s) * (np.cos(s) * start + np.sin(s) * noise), rtol=1e-5)


def test_bins():
    """33 sizes of about a megapixel, multiples of 32; each is its own nearest size."""
    assert len(aspect_ratios.BINS_1024) == len(set(aspect_ratios.BINS_1024)) == 33
    for height, width in aspect_ratios.BINS_1024:
        assert height % 32 == width % 32 == 0 and 0.9 < height * width / 2**20 < 1.1
        assert aspect_ratios.nearest_bin(2 * height, 2 * width) == (height, width)
    assert aspect_ratios.nearest_bin(128, 128) == (1024, 1024)
    assert aspect_ratios.nearest_bin(720, 1280) == (768, 1344)
    assert aspect_ratios.nearest_bin(9000, 100) == (
        2048,
        512,
    )


def test_fit_covers_and_crops_the_center():
    """A ramp keeps its middle, and an image of the right size is returned as it is."""
    ramp = np.broadcast_to(np.arange(80, dtype=np.uint8)[:, None, None], (80, 40, 3))[None]
    fitted = crops.fit_bilinear(ramp, 20, 20)
    assert fitted.shape == (1, 20, 20, 3)
    np.testing.assert_allclose(fitted[0, :, 0, 0], 20.5 + 2 * np.arange(20), atol=0.51)
    assert crops.fit_bilinear(ramp, 80, 40) is ramp


def test_fit_is_never_short_of_a_pixel():
    """832 times 480 / 832 is below 480 in floating point."""
    for have, want in (((832, 1152), (480, 640)), ((704, 1408), (480, 960))):
        image = np.broadcast_to(
            np.arange(have[1], dtype=np.uint16)[:, None] // 8, (1, *have, 3)
        ).astype(np.uint8)
        assert crops.fit_bilinear(image, *want).shape == (1, *want, 3)


def test_images_of_users(tmp_path):
    """Check transparency, 16 bits, cropping and damage.

    Transparency shows the background, the upper eight of sixteen bits count, and damage is one
    sentence.
    """
    clear = np.zeros((8, 8, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (image_files.load(tmp_path / "clear.png", 8, 8) == 255).all()
    assert (image_files.load(tmp_path / "clear.png", 8, 8, image_files.BLACK) == 0).all()
    Image.fromarray(np.full((8, 8), 0x4000, np.uint16)).save(tmp_path / "deep.png")
    assert (image_files.load(tmp_path / "deep.png", 8, 8) == 0x40).all()
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (image_files.load(tmp_path / "wide.png", 8, 8) == 200).all()
    data = (tmp_path / "wide.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(data.replace(b"IDAT", b"ID\xff\xff"))
    with pytest.raises(UserError, match="bad.png"):
        image_files.load(tmp_path / "bad.png", 8, 8)


def test_a_grid_of_images_wider_than_high():
    images = np.arange(3 * 2 * 4 * 3, dtype=np.uint8).reshape(3, 2, 4, 3)
    sheet = image_files.grid(images, columns=2, gap=1)
    assert sheet.shape == (7, 11, 3)
    np.testing.assert_array_equal(sheet[4:6, 1:5], images[2])


def test_upsample_is_nearest_then_convolution():
    """Compare with the two separate operations.

    Fails when two phases are swapped and when a tap enters the wrong sum.
    """
    x, kernel = normals(2, 3, 5, 4), normals(3, 3, 4, 6, seed=1)
    doubled = np.repeat(np.repeat(x, 2, 1), 2, 2)
    expected = conv3x3.conv(jnp.asarray(doubled), jnp.asarray(kernel))
    got = conv3x3.upsample_conv(jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape,channels", [((2, 6, 10), 5), ((1, 32, 4), 256), ((1, 10, 6), 256)])
def test_winograd_is_the_direct_sum(shape, channels):
    """Compare with float64, in strips and whole.

    Fails when a transform has a wrong sign and when outputs are joined wrongly.
    """
    x, kernel = normals(*shape, channels), normals(3, 3, channels, 4, seed=1) / 3 / channels**0.5
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [(i, j) for i in range(3) for j in range(3)]
    expected = sum(
        padded[:, i : i + shape[1], j : j + shape[2]] @ kernel[i, j].astype(np.float64)
        for i, j in taps
    )
    np.testing.assert_allclose(jax.jit(conv3x3.winograd)(x, kernel), expected, atol=5e-6)
    np.testing.assert_allclose(jax.jit(conv3x3.conv)(x, kernel), expected, atol=5e-6)


def test_wide_convolutions_are_winograd_where_they_can_be():
    """On a CPU, for wide float32 images with even sides.

    It needs 16 products for four outputs, not 36.
    """
    array = lambda side, channels, dtype: jax.ShapeDtypeStruct((1, side, side, channels), dtype)
    kernel = jax.ShapeDtypeStruct((3, 3, 256, 8), "float32")
    counted = flops.count(conv3x3.winograd, array(8, 256, "float32"), kernel)
    assert counted.matmul == 2 * 16 * (8 * 8 // 4) * 256 * 8
    assert counted.convolution == 0

    def lowered(side, channels, dtype):
        """Return the text of the lowered program."""
        narrow = jax.ShapeDtypeStruct((3, 3, channels, 8), "float32")
        return jax.jit(conv3x3.conv).lower(array(side, channels, dtype), narrow).as_text()

    assert "convolution" not in lowered(8, 256, "float32")
    for other in ((8, 128, "float32"), (9, 256, "float32"), (8, 256, "bfloat16")):
        assert "convolution" in lowered(*other)


def test_space_to_channels_is_invertible():
    x = normals(1, 4, 6, 3)
    folded = dc_ae.space_to_channels(x)
    np.testing.assert_array_equal(dc_ae.channels_to_space(folded), x)
    np.testing.assert_array_equal(folded[0, 1, 2].reshape(3, 2, 2)[:, 1, 0], x[0, 3, 4])


def test_a_batch_is_split_into_parts():
    """The parts are equal, in order and within the limit; a batch within the limit stays whole.

    Fails when the parts are joined wrongly.
    """
    seen, x = [], jnp.arange(12.0).reshape(6, 2)

    def double(part):
        seen.append(len(part))
        return 2 * part

    for most, size in ((6, 6), (5, 3), (3, 3), (1, 1), (100, 6)):
        np.testing.assert_array_equal(dc_ae.map_in_parts(double, x, most), 2 * x)
        assert seen.pop() == size
    # At 1024 px the last stage has 2^20 x 128 elements for each image; at 4096 px one image is too
    # large.
    assert [dc_ae.images_at_once(dc_ae.DCAE_F32C32, side**2) for side in (512, 1024, 4096)] == [
        63,
        15,
        1,
    ]


def test_a_large_batch_is_decoded_and_encoded_in_parts(monkeypatch):
    """Images and latents are the same.

    Fails when a batch beyond the limit stays whole, and when arrays of a batch that is spread over
    devices are split.
    """
    stage = dc_ae.Stage(8, 1, dc_ae.RESIDUAL, ())
    model = dc_ae.DCAE(
        in_channels=3,
        latent_channels=4,
        head_dim=8,
        encoder=(stage,) * 2,
        decoder=(stage,) * 2,
        scaling_factor=0.5,
    )
    params, z = model.init(jax.random.key(0)), normals(4, 4, 4, 4)
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)

    def both(**changes):
        pixels = pixel_codecs.AutoencoderPixels(model, tile=False, **changes)
        text = str(jax.make_jaxpr(pixels.decode)(params, z)) + str(
            jax.make_jaxpr(pixels.encode)(params, images)
        )
        return (
            np.int32(pixels.decode(params, z)),
            pixels.encode(params, images),
            text.count("scan["),
        )

    *whole, none = both()
    monkeypatch.setattr(dc_ae, "MOST_ELEMENTS", 2 * 64 * 8 + 1)  # two images of 8 x 8
    *cut, two = both()
    assert (none, two, both(over_devices=True)[2]) == (0, 2, 0)
    assert np.abs(whole[0] - cut[0]).max() <= 1
    np.testing.assert_allclose(whole[1], cut[1], rtol=1e-5, atol=1e-5)


def test_tiles_of_a_local_function_are_seamless():
    """Nearest doubling has no context.

    So blending equal values gives exactly the untiled result.
    """
    x = normals(1, 13, 9, 2)
    double = lambda a: jnp.repeat(jnp.repeat(a, 2, 1), 2, 2)
    got = dc_ae.tiled(double, jnp.asarray(x), tile=5, stride=3, scale=2)
    np.testing.assert_allclose(got, double(x), rtol=1e-6)


def test_tiles_fade_linearly():
    """Two tiles of constants: the overlap goes from one value to the other in even steps."""
    seen = []

    def constant(a):
        seen.append(a.shape[1])
        return jnp.full(a.shape, float(len(seen)))

    got = dc_ae.tiled(constant, jnp.zeros((1, 6, 1, 1)), tile=5, stride=3, scale=1)
    assert seen == [5, 3]
    np.testing.assert_allclose(got[0, :, 0, 0], [1, 1, 1, 1, 1.5, 2])


def test_buckets_and_padding():
    lengths = [prompts_lib.bucket(n) for n in (0, 15, 16, 299, 300)]
    assert lengths == [15, 15, 31, 299, 300]
    tokens, mask = prompts_lib.pad([np.int32([5, 6]), np.int32([])], 3)
    np.testing.assert_array_equal(tokens, [[5, 6, 0], [0, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 0], [0, 0, 0]])


def test_a_tokenizer_without_bos_is_refused():
    tokenizer = lambda text, add_special_tokens: {"input_ids": [ord(c) for c in text]}
    with pytest.raises(UserError, match="add_bos_token"):
        prompts_lib.GemmaPrompts(tokenizer, "")


def test_a_prompt_that_merges_with_the_instruction_is_refused():
    """Otherwise cached keys would belong to tokens other than those of the prompt."""

    def tokenizer(text, add_special_tokens):
        ids = [9] if text.startswith("ab c~") else [ord(c) for c in text]
        return {"input_ids": [2] * add_special_tokens + ids}

    assert prompts_lib.GemmaPrompts(tokenizer, "ab c").tokens(["x"])[0].tolist() == [
        ord("c"),
        ord("x"),
    ]
    with pytest.raises(UserError, match="merge"):
        prompts_lib.GemmaPrompts(tokenizer, "ab c").tokens(["~"])
    with pytest.raises(UserError, match="prompt 1 holds half of a surrogate pair"):
        prompts_lib.GemmaPrompts(tokenizer, "ab c").tokens(["x", "half \ud83d"])


def test_initial_images(tmp_path):
    path = tmp_path / "turned.png"
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(path, exif=exif)
    np.testing.assert_array_equal(image_files.load(path, 2, 4), np.asarray(image)[::-1, ::-1])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="cannot read the image"):
        image_files.load(tmp_path / "text.png", 2, 4)


def test_reading_a_model_of_unknown_kind(tmp_path):
    with pytest.raises(UserError, match="no directory"):
        loading.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="model_index.json"):
        loading.load(tmp_path)
    with pytest.raises(UserError, match="dtype 'float16'"):
        loading.load(tmp_path, dtype="float16")


def test_autoencoder_sides():
    model = dc_ae.DCAE_F32C32
    with pytest.raises(ValueError, match="multiples of 32"):
        jax.eval_shape(
            model.encode, jax.eval_shape(model.init, jax.random.key(0)), jnp.zeros((1, 40, 32, 3))
        )


@pytest.mark.parametrize("output", ["pixels", "latent"])
def test_three_programs_give_the_same_image(finished, output):
    """As on an NVIDIA GPU.

    Fails when one of them gets the parameters of another, and when latents are decoded although
    they are the output.
    """
    pipe = loading.load(finished, dtype="float32")
    staged = dataclasses.replace(pipe, staged=True)
    one, three = (
        generation.generate(p, ["a red circle", "two blue squares"], steps=2, output=output, seed=3)
        for p in (pipe, staged)
    )
    assert one.shape == three.shape
    assert one.dtype == three.dtype == (np.uint8 if output == "pixels" else np.float32)
    assert np.abs(one.astype(float) - three.astype(float)).max() <= (
        1 if output == "pixels" else 1e-4
    )

"""ControlNet's edge detector against PyTorch layers from its published description, random
weights.
"""

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from sprint_jax.conditioning import hed, hed_weights, sketches
from sprint_jax.conversion import rules
from sprint_jax.errors import UserError

SMALL = hed.HED(widths=(4, 6, 8, 8, 8), convs=(2, 2, 3, 3, 3))


def random_state(model, seed=0):
    """Return a state dict with the published names, float32.

    Every value is random, with side outputs near one.
    """
    rng, state = np.random.RandomState(seed), {}
    for row in hed_weights.rows(model):
        if row.theirs == "norm":
            value = rng.uniform(100, 150, row.shape)
        elif row.theirs.endswith("bias"):
            value = rng.uniform(-0.3, 0.3, row.shape)
        else:
            value = rng.randn(*row.shape) * np.sqrt(2 / np.prod(row.shape[1:]))
        state[row.theirs] = value.astype(np.float32)
    state["block1.convs.0.weight"] /= 75  # pixels deviate by this much from the offset
    return state


def params_of(state, model):
    """Return our parameters for a state dict."""
    return rules.from_arrays(
        hed_weights.rows(model), state, jax.eval_shape(model.init, jax.random.key(0)), "test"
    )


@pytest.fixture
def torch():
    """Return PyTorch; skip the test without it."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


def peer(torch, state, convs, images):
    """Return the probabilities [B, H, W] of images [B, H, W, 3] in 0..255 from PyTorch's
    functions.
    """
    F, s = torch.nn.functional, {name: torch.tensor(value) for name, value in state.items()}
    x = torch.tensor(images).permute(0, 3, 1, 2).float() - s["norm"]
    size, sides = x.shape[2:], []
    for block, count in enumerate(convs, 1):
        x = F.max_pool2d(x, 2) if block > 1 else x
        for j in range(count):
            x = F.relu(
                F.conv2d(
                    x,
                    s[f"block{block}.convs.{j}.weight"],
                    s[f"block{block}.convs.{j}.bias"],
                    padding=1,
                )
            )
        side = F.conv2d(x, s[f"block{block}.projection.weight"], s[f"block{block}.projection.bias"])
        sides.append(F.interpolate(side, size=size, mode="bilinear", align_corners=False))
    return torch.sigmoid(torch.cat(sides, 1).mean(1)).numpy()


@pytest.mark.parametrize(
    "model, height, width",
    [(hed.PUBLISHED, 48, 64), (SMALL, 67, 90)],
    ids=["published", "odd sides"],
)
def test_edges_match_pytorch(torch, model, height, width):
    """Fails when the offset is added (0.5), when a maximum is left out (0.1), and when sides are
    resized by nearest neighbor (0.03).
    """
    state = random_state(model)
    images = np.random.RandomState(1).randint(0, 256, (2, height, width, 3)).astype(np.uint8)
    with torch.no_grad():
        expected = peer(torch, state, model.convs, images)
    found = np.asarray(jax.jit(model.apply)(params_of(state, model), images))
    assert found.shape == (2, height, width) and found.dtype == np.float32
    assert np.std(expected) > 0.03
    assert expected.min() > 0.01
    assert expected.max() < 0.99  # the edges are not all alike
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5
    assert np.abs(found - expected).max() < 1e-5


def test_published_shapes():
    """ControlNetHED.pth has 13 convolutions and 5 side outputs:

    14 716 168 numbers, with the three of the offset.
    """
    shapes = jax.eval_shape(hed.PUBLISHED.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 14_716_168
    assert len(hed_weights.rows(hed.PUBLISHED)) == 2 * (13 + 5) + 1


def test_init_gives_parameters_for_apply():
    """Random networks keep the scale of activations: logits neither vanish nor explode."""
    params = SMALL.init(jax.random.key(0))
    images = np.random.RandomState(0).randint(0, 256, (1, 32, 48, 3)).astype(np.uint8)
    edges = np.asarray(jax.jit(SMALL.apply)(params, images))
    assert edges.shape == (1, 32, 48)
    assert np.isfinite(edges).all()
    assert edges.min() >= 0
    assert edges.max() <= 1
    jax.tree.map(np.testing.assert_array_equal, params, SMALL.init(jax.random.key(0)))


def test_pth_and_safetensors_give_equal_parameters(torch, tmp_path):
    """Published names -> ours -> published names, every bit, from either kind of file."""
    state = random_state(SMALL)
    pth, ours = tmp_path / hed_weights.FILE, tmp_path / "hed.safetensors"
    torch.save({name: torch.tensor(value) for name, value in state.items()}, pth)
    hed_weights.save(pth, ours, SMALL)
    again = safetensors.numpy.load_file(ours)
    assert again.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(again[name], value)
    jax.tree.map(
        np.testing.assert_array_equal, hed_weights.load(pth, SMALL), hed_weights.load(ours, SMALL)
    )
    kernel = state["block2.convs.1.weight"]
    np.testing.assert_array_equal(
        hed_weights.load(ours, SMALL)["stages"]["1"]["convs"]["1"]["kernel"],
        kernel.transpose(2, 3, 1, 0),
    )


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda s: s.pop("block3.convs.2.bias"), ["missing: block3.convs.2.bias"]),
        (lambda s: s.update(fc=np.zeros(3, np.float32)), ["unexpected: fc"]),
        (lambda s: s.update(norm=np.zeros(3, np.float32)), ["norm is (3,)", "(1, 3, 1, 1)"]),
        (lambda s: s["norm"].fill(np.nan), ["norm", "not numbers"]),
    ],
)
def test_other_weights_are_refused(torch, tmp_path, spoil, words):
    state = random_state(SMALL)
    spoil(state)
    pth, safe = tmp_path / "other.pth", tmp_path / "other.safetensors"
    torch.save({name: torch.tensor(value) for name, value in state.items()}, pth)
    safe.write_bytes(safetensors.numpy.save(state))
    for path in (pth, safe):
        with pytest.raises(UserError) as raised:
            hed_weights.load(path, SMALL)
        for word in (*words, str(path), hed_weights.FILE):
            assert word in str(raised.value)


def test_damaged_files_are_refused(torch, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors.numpy.save(random_state(SMALL))[:-10])
    with pytest.raises(UserError, match="a.safetensors is not a whole safetensors file"):
        hed_weights.load(path, SMALL)
    path = tmp_path / "a.pth"
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="a.pth is not a state dict of PyTorch"):
        hed_weights.load(path, SMALL)
    with pytest.raises(UserError, match="no HED weights at .*b.pth: give ControlNetHED.pth"):
        hed_weights.load(tmp_path / "b.pth", SMALL)


def test_command_with_weights(command, tmp_path):
    """hed writes the output of the network in bytes, and scribble its strokes."""
    # The image decides its own edges: the first stage passes its red channel and the others are 0.
    state = {row.theirs: np.zeros(row.shape, np.float32) for row in hed_weights.rows(hed.PUBLISHED)}
    for layer in ("block1.convs.0", "block1.convs.1"):
        state[f"{layer}.weight"][0, 0, 1, 1] = 1
    state["block1.projection.weight"][0, 0] = 20 / 255
    state["block1.projection.bias"][:] = -10
    weights = tmp_path / "hed.safetensors"
    weights.write_bytes(safetensors.numpy.save(state))
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 20:44, 0] = 255
    (tmp_path / "in").mkdir()
    Image.fromarray(image).save(tmp_path / "in/bar.png")
    flags = [f"--images={tmp_path / 'in'}", f"--weights={weights}", "--detect_resolution=64"]
    result = command("sprint_jax", "condition", *flags, "--kind=hed", f"--out={tmp_path / 'hed'}")
    assert result.returncode == 0, result.stderr[-3000:]
    found = np.asarray(Image.open(tmp_path / "hed/bar.png"))
    dark, bright = (
        int(255 / (1 + np.exp(-mean))) for mean in (-10 / 5, 10 / 5)
    )  # the mean of five side outputs
    np.testing.assert_array_equal(found, np.where(image[..., :1] > 0, bright, dark).repeat(3, -1))
    result = command(
        "sprint_jax",
        "condition",
        *flags,
        "--kind=scribble",
        "--thickness=4",
        f"--out={tmp_path / 'strokes'}",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    strokes = np.asarray(Image.open(tmp_path / "strokes/bar.png"))
    expected = sketches.scribble(found[..., 0], thickness=4, sigma=sketches.PUBLISHED_SIGMA)
    np.testing.assert_array_equal(strokes, sketches.to_rgb(expected))
    assert 0 < (strokes > 0).mean() < 1

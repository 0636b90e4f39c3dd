"""The FID Inception against PyTorch layers from its published description, on random weights."""

import hashlib
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from helpers.runs import assert_refused
from sprint_jax.errors import UserError
from sprint_jax.evaluation import extractors, fid
from sprint_jax.evaluation.networks import inception

torch = pytest.importorskip("torch")
F = torch.nn.functional
torch.set_num_threads(1)


def random_state(seed=0):
    """Return a state dict with the names of pytorch-fid, float32.

    Activations stay near one through the whole depth.
    """
    rng, state = np.random.RandomState(seed), {}
    for layer, (height, width, into, out) in inception.layer_shapes().items():
        draw = lambda low, high: rng.uniform(low, high, out).astype(np.float32)
        kernel = rng.randn(out, into, height, width) * np.sqrt(2 / (into * height * width))
        state[f"{layer}.conv.weight"] = kernel.astype(np.float32)
        state |= {f"{layer}.bn.weight": draw(0.7, 1.3), f"{layer}.bn.bias": draw(-0.3, 0.3)}
        state |= {
            f"{layer}.bn.running_mean": draw(-0.2, 0.2),
            f"{layer}.bn.running_var": draw(0.4, 1.6),
        }
    return state


@pytest.fixture(scope="module")
def state():
    return random_state()


class Peer:
    """The network in functions of PyTorch, for x [B, 3, H, W] in -1..1."""

    def __init__(self, state):
        self.state = {name: torch.tensor(value) for name, value in state.items()}

    def conv(self, x, layer, **options):
        s = lambda part: self.state[f"{layer}.{part}"]
        x = F.conv2d(x, s("conv.weight"), **options)
        x = F.batch_norm(
            x, s("bn.running_mean"), s("bn.running_var"), s("bn.weight"), s("bn.bias"), eps=0.001
        )
        return F.relu(x)

    def chain(self, x, block, *layers):
        """Apply layers given as (name, padding) or (name, padding, stride)."""
        for name, padding, *stride in layers:
            x = self.conv(x, f"{block}.{name}", padding=padding, stride=stride[0] if stride else 1)
        return x

    def mean_pool(self, x):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def features(self, x):
        """Return the pooled features [B, 2048]."""
        x = self.conv(x, "Conv2d_1a_3x3", stride=2)
        x = self.conv(self.conv(x, "Conv2d_2a_3x3"), "Conv2d_2b_3x3", padding=1)
        x = self.conv(F.max_pool2d(x, 3, stride=2), "Conv2d_3b_1x1")
        x = F.max_pool2d(self.conv(x, "Conv2d_4a_3x3"), 3, stride=2)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.mixed_5(x, block)
        x = self.mixed_6a(x)
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self.mixed_6(x, block)
        x = self.mixed_7a(x)
        for block in ("Mixed_7b", "Mixed_7c"):
            x = self.mixed_7(x, block)
        return x.mean((2, 3))

    def mixed_5(self, x, b):
        double = ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1), ("branch3x3dbl_3", 1)
        branches = [
            self.chain(x, b, ("branch1x1", 0)),
            self.chain(x, b, ("branch5x5_1", 0), ("branch5x5_2", 2)),
            self.chain(x, b, *double),
            self.chain(self.mean_pool(x), b, ("branch_pool", 0)),
        ]
        return torch.cat(branches, 1)

    def mixed_6a(self, x):
        double = ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1), ("branch3x3dbl_3", 0, 2)
        branches = [
            self.chain(x, "Mixed_6a", ("branch3x3", 0, 2)),
            self.chain(x, "Mixed_6a", *double),
            F.max_pool2d(x, 3, stride=2),
        ]
        return torch.cat(branches, 1)

    def mixed_6(self, x, b):
        row, column = (0, 3), (3, 0)
        single = ("branch7x7_1", 0), ("branch7x7_2", row), ("branch7x7_3", column)
        double = [("1", 0), ("2", column), ("3", row), ("4", column), ("5", row)]
        branches = [
            self.chain(x, b, ("branch1x1", 0)),
            self.chain(x, b, *single),
            self.chain(x, b, *((f"branch7x7dbl_{n}", padding) for n, padding in double)),
            self.chain(self.mean_pool(x), b, ("branch_pool", 0)),
        ]
        return torch.cat(branches, 1)

    def mixed_7a(self, x):
        seven = [(f"branch7x7x3_{n}", p) for n, p in (("1", 0), ("2", (0, 3)), ("3", (3, 0)))]
        branches = [
            self.chain(x, "Mixed_7a", ("branch3x3_1", 0), ("branch3x3_2", 0, 2)),
            self.chain(x, "Mixed_7a", *seven, ("branch7x7x3_4", 0, 2)),
            F.max_pool2d(x, 3, stride=2),
        ]
        return torch.cat(branches, 1)

    def mixed_7(self, x, b):
        three = self.chain(x, b, ("branch3x3_1", 0))
        double = self.chain(x, b, ("branch3x3dbl_1", 0), ("branch3x3dbl_2", 1))
        mean = b == "Mixed_7b"
        pooled = self.mean_pool(x) if mean else F.max_pool2d(x, 3, stride=1, padding=1)
        branches = [
            self.chain(x, b, ("branch1x1", 0)),
            self.chain(three, b, ("branch3x3_2a", (0, 1))),
            self.chain(three, b, ("branch3x3_2b", (1, 0))),
            self.chain(double, b, ("branch3x3dbl_3a", (0, 1))),
            self.chain(double, b, ("branch3x3dbl_3b", (1, 0))),
            self.chain(pooled, b, ("branch_pool", 0)),
        ]
        return torch.cat(branches, 1)


def test_features_match_pytorch(state):
    """Fails when the maximum of Mixed_7c becomes a mean, and when average pooling counts padding
    (each 1e-2).
    """
    x = np.random.RandomState(1).uniform(-1, 1, (2, 107, 91, 3)).astype(np.float32)
    with torch.no_grad():
        expected = Peer(state).features(torch.tensor(x).permute(0, 3, 1, 2)).numpy()
    found = np.asarray(jax.jit(inception.features)(inception.params_of(state), x))
    assert found.shape == (2, inception.FEATURES)
    assert np.std(expected) > 0.05  # the features are not all zero
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5


@pytest.mark.parametrize("height, width", [(32, 32), (299, 299), (512, 437), (1024, 300)])
def test_resize_matches_pytorch(height, width):
    images = np.random.RandomState(0).randint(0, 256, (1, height, width, 3)).astype(np.uint8)
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    expected = 2 * F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1
    np.testing.assert_allclose(
        jax.jit(inception.resized)(images), expected.permute(0, 2, 3, 1).numpy(), atol=1e-4
    )


def test_statistics_of_a_folder_match_pytorch(state, command, tmp_path):
    """Compare mu and sigma of image files, as the command computes them.

    The batches do not divide the images.
    """
    images = np.random.RandomState(2).randint(0, 256, (3, 24, 40, 3)).astype(np.uint8)
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"pictures/{i}.png")
    weights, stats = tmp_path / "w.safetensors", tmp_path / "stats.npz"
    weights.write_bytes(safetensors.numpy.save(state))
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        resized = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        expected = Peer(state).features(2 * resized - 1).double().numpy()
    result = command(
        "sprint_jax",
        "evaluate",
        "--suite=fid",
        f"--folder={tmp_path / 'pictures'}",
        f"--weights={weights}",
        "--unpublished_weights",
        "--scoring_batch=2",
        f"--save_reference={stats}",
        f"--out={tmp_path}",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "3 pictures give a singular covariance" in result.stderr
    gaussian, protocol = fid.load(stats)
    assert (
        np.linalg.norm(gaussian.mean - expected.mean(0)) / np.linalg.norm(expected.mean(0)) < 1e-4
    )
    covariance = np.cov(expected, rowvar=False)
    assert np.linalg.norm(gaussian.covariance - covariance) / np.linalg.norm(covariance) < 1e-3
    assert protocol["features"] == "Inception of other weights"
    assert protocol["resize"] == "pytorch-fid"
    assert protocol["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    result = command(
        "sprint_jax",
        "evaluate",
        "--suite=fid",
        f"--folder={tmp_path / 'pictures'}",
        f"--weights={weights}",
        "--unpublished_weights",
        "--fid_resize=clean-fid",
        f"--reference={stats}",
        f"--out={tmp_path}",
    )
    assert_refused(result, "resize=pytorch-fid", "now clean-fid")


def test_published_files_are_recognized(tmp_path, monkeypatch, state):
    """A .pth file and the safetensors made of it give equal parameters.

    Another digest is refused.
    """
    full = {k: torch.tensor(v) for k, v in state.items()} | {
        "fc.weight": torch.zeros(1008, 2048),
        "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(0),
    }
    path, ours = tmp_path / extractors.INCEPTION_FILE, tmp_path / "inception.safetensors"
    torch.save(full, path)
    with pytest.raises(UserError, match="6726825d"):
        extractors.load_inception(path)
    with pytest.raises(UserError, match="6726825d"):
        extractors.save_inception(path, ours)
    assert not ours.exists()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(extractors, "_INCEPTION_SHA256", digest[:8])
    extractors.save_inception(path, ours)
    first, a = extractors.load_inception(path)
    second, b = extractors.load_inception(ours)
    assert a == b == digest
    jax.tree.map(np.testing.assert_array_equal, first, second)
    pathlib.Path(ours).write_bytes(ours.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        extractors.load_inception(ours)


def test_missing_and_misshapen_layers_are_named(state):
    lacking = {k: v for k, v in state.items() if k != "Mixed_6c.branch7x7_2.conv.weight"}
    with pytest.raises(ValueError, match="Mixed_6c.branch7x7_2.conv.weight is missing"):
        inception.params_of(lacking)
    with pytest.raises(ValueError, match="shape"):
        inception.params_of(state | {"Mixed_7c.branch_pool.bn.bias": np.zeros(3)})

"""PyTorch modules beside ours: arrays and weights from one to the other."""

import jax
import numpy as np
import torch

from sprint_jax.conversion import configs, rules, tables
from sprint_jax.storage import tensors


def relative(value, expected):
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    assert value.shape == expected.shape
    return np.linalg.norm(value - expected) / np.linalg.norm(expected)


def to_torch(x):
    """NHWC NumPy -> NCHW PyTorch."""
    return torch.tensor(np.moveaxis(x, -1, 1).copy())


def from_torch(x):
    return np.moveaxis(x.detach().float().numpy(), 1, -1)


def converted(module, part, describe, tmp_path, dtype=np.float32):
    """(our description, our parameters) of a PyTorch module, through a file on disk."""
    module.save_pretrained(tmp_path)
    model = describe(configs.read_json(tmp_path / "config.json"))
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    found = tensors.find(tmp_path, stem)
    return model, rules.load(getattr(tables, part)(model), found, abstract, dtype, part)

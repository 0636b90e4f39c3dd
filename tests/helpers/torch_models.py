"""PyTorch modules beside ours: conversion of arrays and of weights."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from numpy.typing import DTypeLike

from sprint_jax.conversion import rules, tables
from sprint_jax.storage import json_files, safetensors_files


def to_torch(x: np.ndarray) -> torch.Tensor:
    """Return an array [B, H, W, C] as a tensor [B, C, H, W]."""
    return torch.tensor(np.moveaxis(x, -1, 1).copy())


def from_torch(x: torch.Tensor) -> np.ndarray:
    """Return a tensor [B, C, ...] as a float32 array [B, ..., C]."""
    return np.moveaxis(x.detach().float().numpy(), 1, -1)


def converted(
    module: Any,
    part: str,
    describe: Callable[[dict], Any],
    tmp_path: pathlib.Path,
    dtype: DTypeLike = np.float32,
) -> tuple[Any, Any]:
    """Return (model, parameters) of ours for a module of diffusers or transformers.

    The weights go through a file in `tmp_path`. `part` names a conversion table, and `describe`
    makes our model from the module's config.json.
    """
    module.save_pretrained(tmp_path)
    model = describe(json_files.read(tmp_path / "config.json"))
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    found = safetensors_files.find(tmp_path, stem)
    return model, rules.load(getattr(tables, part)(model), found, abstract, dtype, part)

"""CLIP-Score of pairs of image and text features, as two toolkits define it. NumPy, float64."""

import numpy as np
from numpy.typing import ArrayLike


def cosines(image_features: ArrayLike, text_features: ArrayLike) -> np.ndarray:
    """Return the cosine of each pair of features [N, D] and [N, D], float64 [N]."""
    image, text = (np.asarray(a, np.float64) for a in (image_features, text_features))
    if image.shape != text.shape:
        raise ValueError(
            f"image features {image.shape} and text features {text.shape} do not pair up"
        )
    image, text = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (image, text))
    return (image * text).sum(-1)


def sana(cosines: ArrayLike, logit_scale: float) -> float:
    """Return the mean of exp(logit_scale) times the cosine, as SANA's metrics toolkit does.

    logit_scale: the model's logarithm of the scale; published scales are 100.
    """
    return float(np.exp(np.float64(logit_scale)) * np.mean(np.asarray(cosines)))


def torchmetrics(cosines: ArrayLike) -> float:
    """Return max(mean of 100 times the cosine, 0), as torchmetrics' CLIPScore does.

    The mean is clipped, not each pair.
    """
    return float(max(100 * np.mean(np.asarray(cosines)), 0.0))

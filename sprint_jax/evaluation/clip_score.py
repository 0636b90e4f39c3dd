"""CLIP-Score of pairs of image and text features, as two toolkits define it. Pure NumPy, float64."""

import numpy as np


def cosines(image_features, text_features):
    """[N, D], [N, D] -> cosine of each pair, float64 [N]."""
    image, text = (np.asarray(a, np.float64) for a in (image_features, text_features))
    if image.shape != text.shape:
        raise ValueError(
            f"image features {image.shape} and text features {text.shape} do not pair up"
        )
    image, text = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (image, text))
    return (image * text).sum(-1)


def sana(cosines, logit_scale) -> float:
    """Mean of exp(logit_scale) times the cosine (SANA's metrics toolkit; published scales are 100)."""
    return float(np.exp(np.float64(logit_scale)) * np.mean(cosines))


def torchmetrics(cosines) -> float:
    """max(mean of 100 times the cosine, 0): the mean is clipped, not each pair (torchmetrics' CLIPScore)."""
    return float(max(100 * np.mean(cosines), 0.0))

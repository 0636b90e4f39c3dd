"""PNG files: single pictures and grids, written whole or not at all."""

import os
import pathlib

import numpy as np
from PIL import Image


def grid(images, columns, gap=2):
    """uint8 [N, S, S, 3] -> one picture, row by row, on a grey ground."""
    count, size = images.shape[:2]
    rows = -(-count // columns)
    sheet = np.full((rows * (size + gap) + gap, columns * (size + gap) + gap, 3), 96, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (size + gap), gap + i % columns * (size + gap)
        sheet[top : top + size, left : left + size] = image
    return sheet


def save(path, image, zoom=1):
    """Writes uint8 [H, W, 3] as PNG, each pixel repeated `zoom` times."""
    path = pathlib.Path(path)
    image = np.repeat(np.repeat(image, zoom, 0), zoom, 1)
    temporary = path.with_name(path.name + ".partial")
    Image.fromarray(image).save(temporary, format="PNG")
    os.replace(temporary, path)

"""A picture that is drawn, not photographed, and a mask of a thing in it."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 300, 200


def drawn_picture() -> Image.Image:
    """A red disc and a blue box before a grey ramp, without antialiasing: the same pixels everywhere."""
    ramp_HW = np.tile(np.linspace(60, 200, WIDTH).astype(np.uint8), (HEIGHT, 1))
    picture = Image.fromarray(np.stack([ramp_HW] * 3, axis=2))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((60, 40, 160, 140), fill=(200, 30, 30))
    draw.rectangle((190, 90, 270, 180), fill=(20, 60, 190))
    return picture


def coarse_disc() -> np.ndarray:
    """[H, W] the disc in cells of 20 pixels."""
    mask_HW = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for row, (left, right) in enumerate(((80, 140), (60, 160), (60, 160), (60, 160), (80, 140)), start=2):
        mask_HW[20 * row : 20 * row + 20, left:right] = True
    return mask_HW


def disc() -> np.ndarray:
    """[H, W] the disc itself."""
    red_HW = np.asarray(drawn_picture()).astype(int)
    return (red_HW[..., 0] == 200) & (red_HW[..., 1] == 30)

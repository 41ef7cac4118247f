"""SAM's square frame: a picture with its longest side scaled to the frame's, padding on the right and at the bottom.

Legend: H rows and W columns of the picture; S the frame's side (1024), M the side of SAM's mask logits (256).

Everything here is linear and separable, so each direction is one matrix a side, applied in float32. No mask is ever an
8-bit picture on its way: the published code (mc-lan/Text4Seg) sends its float mask through torchvision's
`to_pil_image`, which from 0.17 on multiplies by 255 and casts, and the logits then say "foreground" everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from relay_models.errors import RelayModelsError

Floats = npt.NDArray[np.float32]
AnyMask = npt.NDArray[np.bool_] | npt.NDArray[np.uint8]

SIDE = 1024
MASK_SIDE = 256
_ROWS_AT_ONCE = 1024  # of a picture turned into floats


@dataclass(frozen=True)
class Frame:
    """How a picture of [height, width] lies in a square of ``side``."""

    height: int
    width: int
    side: int = SIDE

    def __post_init__(self) -> None:
        for name in ("height", "width", "side"):
            if getattr(self, name) < 1:
                raise RelayModelsError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def inner(self) -> tuple[int, int]:
        """Rows and columns of the frame that the picture covers."""
        return inner_size(self.height, self.width, self.side)

    def view(self, picture: Image.Image) -> Image.Image:
        """An upright RGB picture as it lies in the frame, without the padding."""
        if picture.size != (self.width, self.height):
            raise RelayModelsError(f"picture is {picture.width}x{picture.height}, not {self.width}x{self.height}")
        height, width = self.inner
        return (
            picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.BILINEAR)
        )

    def points(self, points_P2: npt.NDArray[np.integer] | Floats) -> Floats:
        """[P, 2] (x, y) of the picture in the frame."""
        height, width = self.inner
        scale = np.array([width / self.width, height / self.height])
        return (np.asarray(points_P2, dtype=np.float64) * scale).astype(np.float32)

    def restore(self, logits_MM: Floats) -> Floats:
        """[H, W] the frame's logits at the picture's size: bilinear to the frame, padding cut off, bilinear on."""
        if logits_MM.ndim != 2 or logits_MM.shape[0] != logits_MM.shape[1]:
            raise RelayModelsError(f"logits_MM must be square, got shape {logits_MM.shape}")
        height, width = self.inner
        mask_side = logits_MM.shape[0]
        rows_HM = _restoring(mask_side, self.side, height, self.height)
        columns_WM = _restoring(mask_side, self.side, width, self.width)
        if self.height <= self.width:  # the wide step over few rows
            restored_HW = rows_HM @ (logits_MM @ columns_WM.T)
        else:
            restored_HW = (rows_HM @ logits_MM) @ columns_WM.T
        return restored_HW.astype(np.float32, copy=False)


def inner_size(height: int, width: int, side: int) -> tuple[int, int]:
    """The longest side becomes ``side``, the other one is rounded, and is never less than a pixel."""
    scale = side / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def shrink_mask(mask_HW: AnyMask, side: int = MASK_SIDE) -> Floats:
    """[inner height, inner width] the share of foreground, 0 to 1, with the longest side at ``side``."""
    height, width = mask_HW.shape
    inner_height, inner_width = inner_size(height, width, side)
    columns_WX = np.ascontiguousarray(smoothing(width, inner_width).T)
    rows_YH = smoothing(height, inner_height)
    shrunk_YX = np.zeros((inner_height, inner_width), dtype=np.float32)
    for start in range(0, height, _ROWS_AT_ONCE):
        band_BW = (mask_HW[start : start + _ROWS_AT_ONCE] != 0).astype(np.float32)
        shrunk_YX += rows_YH[:, start : start + _ROWS_AT_ONCE] @ (band_BW @ columns_WX)
    return shrunk_YX


@lru_cache(maxsize=16)
def smoothing(num_in: int, num_out: int) -> Floats:
    """[num_out, num_in] a triangle filter, widened when it shrinks; Pillow's and antialiasing torch's bilinear."""
    scale = num_in / num_out
    support = max(scale, 1.0)
    centres = (np.arange(num_out) + 0.5) * scale
    distances = np.abs(np.arange(num_in)[None, :] + 0.5 - centres[:, None]) / support
    weights = np.maximum(1.0 - distances, 0.0)
    return _frozen(weights / weights.sum(axis=1, keepdims=True))


@lru_cache(maxsize=16)
def _restoring(mask_side: int, side: int, inner: int, size: int) -> Floats:
    """[size, mask_side] both bilinear steps of one side in one matrix."""
    return _frozen(interpolation(inner, size) @ interpolation(mask_side, side)[:inner])


def interpolation(num_in: int, num_out: int) -> npt.NDArray[np.float64]:
    """[num_out, num_in] bilinear between the two nearest centres, without antialiasing, as SAM restores its masks."""
    positions = np.maximum((np.arange(num_out) + 0.5) * num_in / num_out - 0.5, 0.0)
    low = np.minimum(np.floor(positions).astype(np.int64), num_in - 1)
    high = np.minimum(low + 1, num_in - 1)
    weights = np.zeros((num_out, num_in))
    rows = np.arange(num_out)
    np.add.at(weights, (rows, low), 1.0 - (positions - low))
    np.add.at(weights, (rows, high), positions - low)
    return weights


def _frozen(matrix: npt.NDArray[np.float64]) -> Floats:
    floats = np.ascontiguousarray(matrix, dtype=np.float32)
    floats.flags.writeable = False  # the caches hand it to everybody
    return floats

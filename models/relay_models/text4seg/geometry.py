"""From a grid to picture size and back, both by the nearest cell, because the picture is squashed onto the grid.

Legend: n rows of the grid, m columns, H rows of the picture, W columns.

A picture is never letterboxed for segmentation (arXiv 2410.09855), so cell (r, c) covers the pixels
[r*H/n, (r+1)*H/n) x [c*W/m, (c+1)*W/m), and height and width are scaled apart. The two directions follow two rules:
    `upsample` computes in exact integers. The published code asks torch for nearest in float64, which is the same for
        every picture with H + W > 128; below, torch computes in float32 and misses one or two rows at a few sizes.
    `reduce_to_grid` repeats Pillow's nearest resize, with which every published ground truth was made, its rounding
        included: for grids of 12, 20 and 24 it is one pixel off the exact rule at a few sizes.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from relay_models.errors import RelayModelsError

Scalar = TypeVar("Scalar", bound=np.generic)
Indices = npt.NDArray[np.int64]


def upsample(grid_nm: npt.NDArray[Scalar], height: int, width: int) -> npt.NDArray[Scalar]:
    """[n, m] cells to [height, width] pixels: pixel (y, x) is cell (floor(y*n/height), floor(x*m/width)).

    Works towards smaller sizes too, and keeps the dtype.

    Raises:
        RelayModelsError: the grid is empty or not two-dimensional, or a size is below 1.
    """
    num_rows, num_columns = _checked_shape("grid_nm", grid_nm)
    _check_size(height=height, width=width)
    # Columns first: the wide step then runs over the few rows of the grid, and pixel rows are copied whole.
    wide_nW = grid_nm.take(_cell_of_each_pixel(num_columns, width), axis=1)
    return wide_nW.take(_cell_of_each_pixel(num_rows, height), axis=0)


def reduce_to_grid(mask_HW: npt.NDArray[Scalar], num_rows: int, num_columns: int) -> npt.NDArray[Scalar]:
    """[H, W] pixels to [num_rows, num_columns] cells: the pixel nearest to each cell's centre, as Pillow picks it.

    That is pixel floor((i + 0.5) * W / n), with Pillow's rounding. Keeps the dtype.

    Raises:
        RelayModelsError: the mask is empty or not two-dimensional, or a number of cells is below 1.
    """
    height, width = _checked_shape("mask_HW", mask_HW)
    _check_size(num_rows=num_rows, num_columns=num_columns)
    return mask_HW[np.ix_(_pixel_of_each_cell(num_rows, height), _pixel_of_each_cell(num_columns, width))]


def _cell_of_each_pixel(num_cells: int, num_pixels: int) -> Indices:
    return np.arange(num_pixels, dtype=np.int64) * num_cells // num_pixels


def _pixel_of_each_cell(num_cells: int, num_pixels: int) -> Indices:
    steps = np.full(num_cells, num_pixels / num_cells)
    steps[0] *= 0.5
    # Pillow walks from centre to centre adding up its step, and so does cumsum, one float64 after the other.
    positions: Indices = np.cumsum(steps).astype(np.int64)
    return np.minimum(positions, num_pixels - 1)


def _checked_shape(name: str, array: npt.NDArray[Any]) -> tuple[int, int]:
    if array.ndim != 2 or array.size == 0:
        raise RelayModelsError(f"{name} must have rows and columns, got shape {array.shape}")
    return array.shape[0], array.shape[1]


def _check_size(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise RelayModelsError(f"{name} must be at least 1, got {size}")

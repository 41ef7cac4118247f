"""Nearest in both directions: against the golden vectors, a definition in plain Python, and Pillow itself."""

from __future__ import annotations

import numpy as np
import pytest
from codec_cases import golden, golden_json
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from relay_models.errors import RelayModelsError
from relay_models.text4seg.geometry import reduce_to_grid, upsample


@pytest.fixture(scope="module")
def golden_indices():
    return load_file(golden("upsampling", "outputs.safetensors"))


def numbers_in(name):
    """``gt.n24.size640`` -> 24, 640."""
    cells, size = name.removeprefix("gt.").split(".")
    return int(cells.removeprefix("n")), int(size.removeprefix("size"))


def test_upsampling_picks_the_golden_cells(golden_indices):
    names = [name for name in golden_indices if not name.startswith("gt.")]
    assert len(names) > 200
    for name in names:
        num_cells, size = numbers_in(name)
        column = np.arange(num_cells, dtype=np.int32)[:, None]
        assert upsample(column, size, 1)[:, 0].tolist() == golden_indices[name].tolist(), name
        assert upsample(column.T, 1, size)[0].tolist() == golden_indices[name].tolist(), name


def test_reducing_picks_the_golden_pixels(golden_indices):
    names = [name for name in golden_indices if name.startswith("gt.")]
    assert len(names) > 100
    for name in names:
        num_cells, size = numbers_in(name)
        column = np.arange(size, dtype=np.int32)[:, None]
        assert reduce_to_grid(column, num_cells, 1)[:, 0].tolist() == golden_indices[name].tolist(), name
        assert reduce_to_grid(column.T, 1, num_cells)[0].tolist() == golden_indices[name].tolist(), name


def test_upsampled_maps_are_the_golden_pictures():
    for case in golden_json("upsampling", "maps.json"):
        grid = np.array(case["cells"], dtype=np.uint8)
        expected = np.asarray(Image.open(golden("upsampling", case["expected"])))
        assert np.array_equal(upsample(grid, case["image_height"], case["image_width"]), expected), case["expected"]


@settings(max_examples=200, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    num_columns=st.integers(1, 40),
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
)
def test_upsampling_is_its_definition(num_rows, num_columns, height, width, seed):
    grid = np.random.default_rng(seed).integers(0, 60_000, (num_rows, num_columns)).astype(np.uint16)
    picture = upsample(grid, height, width)
    assert picture.dtype == grid.dtype
    assert picture.flags.c_contiguous
    expected = [[grid[y * num_rows // height, x * num_columns // width] for x in range(width)] for y in range(height)]
    assert np.array_equal(picture, np.array(expected))


@settings(max_examples=200, deadline=None)
@given(
    num_rows=st.integers(1, 70),
    num_columns=st.integers(1, 70),
    height=st.integers(1, 700),
    width=st.integers(1, 700),
    seed=st.integers(0, 2**32 - 1),
)
def test_reducing_is_pillows_nearest(num_rows, num_columns, height, width, seed):
    mask = np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)
    expected = Image.fromarray(mask).resize((num_columns, num_rows), Image.Resampling.NEAREST)
    grid = reduce_to_grid(mask, num_rows, num_columns)
    assert grid.dtype == mask.dtype
    assert np.array_equal(grid, np.asarray(expected))


@pytest.mark.parametrize("num_cells", [16, 32, 64])
def test_reducing_to_a_power_of_two_is_the_exact_rule(num_cells):
    for size in range(num_cells, 2000, 7):
        exact = [(2 * cell + 1) * size // (2 * num_cells) for cell in range(num_cells)]
        assert reduce_to_grid(np.arange(size)[None, :], 1, num_cells)[0].tolist() == exact


@pytest.mark.parametrize("size", [(480, 640), (4032, 3024), (1, 640), (480, 1), (16, 16), (61, 59)])
def test_a_grid_comes_back_from_any_picture_that_has_a_pixel_for_each_cell(size):
    num_rows, num_columns = min(16, size[0]), min(24, size[1])
    grid = np.random.default_rng(0).integers(0, 2, (num_rows, num_columns)).astype(np.uint8)
    assert np.array_equal(reduce_to_grid(upsample(grid, *size), num_rows, num_columns), grid)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: upsample(np.zeros((2, 2)), 0, 5), "height must be at least 1, got 0"),
        (lambda: upsample(np.zeros((2, 2)), 5, -3), "width must be at least 1, got -3"),
        (lambda: upsample(np.zeros((2, 0)), 5, 5), r"grid_nm .* shape \(2, 0\)"),
        (lambda: upsample(np.zeros(4), 5, 5), r"grid_nm .* shape \(4,\)"),
        (lambda: reduce_to_grid(np.zeros((2, 2, 3)), 1, 1), r"mask_HW .* shape \(2, 2, 3\)"),
        (lambda: reduce_to_grid(np.zeros((2, 2)), 0, 1), "num_rows must be at least 1, got 0"),
        (lambda: reduce_to_grid(np.zeros((2, 2)), 1, 0), "num_columns must be at least 1, got 0"),
    ],
)
def test_what_has_no_pixels_is_refused_by_name(call, named):
    with pytest.raises(RelayModelsError, match=named):
        call()

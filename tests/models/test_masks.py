"""Every form of a mask tells the same pixels, area and box."""

from __future__ import annotations

import io
import json
import random
from collections import deque
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from relay_models.errors import RelayModelsError
from relay_models.masks import (
    Polygon,
    area,
    box,
    coco_rle,
    components,
    from_coco_rle,
    label_map_png,
    png_bytes,
    polygons,
)

SEG_TINY = Path(__file__).parents[3] / "shared/data/seg-tiny"

# pycocotools 2.0.11 has not learnt NumPy 2's copy keyword; only these tests use its decoder.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def drawn(text: str) -> np.ndarray:
    """[H, W] bool from rows of '#' and '.'."""
    return np.array([[letter == "#" for letter in row] for row in text.split()])


HAND_MADE = {
    "one": drawn("#"),
    "none": drawn("."),
    "row": drawn(".##.#..###"),
    "row-full": drawn("#######"),
    "column": drawn(". # # . # . . # # #"),
    "column-empty": drawn(". . . . ."),
    "empty": drawn(".... .... ...."),
    "full": drawn("#### #### ####"),
    "hole": drawn("##### #...# #.#.# #...# #####"),
    "two-holes-at-a-corner": drawn("#### #.## ##.# ####"),
    "diagonal": drawn("#... .#.. ..#. ...#"),
    "diagonal-back": drawn("...# ..#. .#.. #..."),
    "checkerboard": drawn("#.#.# .#.#. #.#.# .#.#. #.#.#"),
    "ring-by-corners": drawn(".#. #.# .#."),
    "corner-pixels": drawn("#..# .... #..#"),
    "open-hole": drawn("#.# #.# ###"),
    "cross": drawn(".#. ### .#."),
    "stairs": drawn("##.. .##. ..## #..#"),
}


def ellipses(seed: int, width: int, height: int) -> np.ndarray:
    """[H, W] bool: some ellipses, and holes in them."""
    rng = random.Random(seed)
    image = Image.new("L", (width, height))
    for number in range(7):
        x, y = rng.randrange(width), rng.randrange(height)
        reach_x, reach_y = rng.randrange(1, 2 + width // 3), rng.randrange(1, 2 + height // 3)
        bounds = (x - reach_x, y - reach_y, x + reach_x, y + reach_y)
        ImageDraw.Draw(image).ellipse(bounds, fill=0 if number % 3 == 2 else 255)
    return np.asarray(image) > 0


def grid_mask(seed: int, height: int, width: int) -> np.ndarray:
    """[H, W] bool as a descriptor gives it: cells of a 16 x 16 grid."""
    cells = np.random.default_rng(seed).random((16, 16)) < 0.4
    return cells[np.arange(height) * 16 // height][:, np.arange(width) * 16 // width]


EXAMPLES = {
    **HAND_MADE,
    **{f"ellipses-{seed}": ellipses(seed, 90 + 7 * seed, 60 + 5 * seed) for seed in range(6)},
    **{f"grid-{seed}": grid_mask(seed, 37 + seed, 111) for seed in range(3)},
    "noise": np.random.default_rng(5).random((41, 63)) < 0.5,
}
every_example = pytest.mark.parametrize("mask", EXAMPLES.values(), ids=EXAMPLES)

sides = st.integers(1, 14)
shapes = st.one_of(st.tuples(sides, sides), st.tuples(st.just(1), sides), st.tuples(sides, st.just(1)))
dense = shapes.flatmap(lambda shape: arrays(np.bool_, shape))
blocky = st.builds(
    lambda cells, down, right: cells.repeat(down, axis=0).repeat(right, axis=1),
    dense,
    st.integers(1, 4),
    st.integers(1, 4),
)
masks = st.one_of(dense, blocky)


# ---------------------------------------------------------------- references, in plain Python


def runs_of(mask: np.ndarray) -> list[int]:
    """Column-major run lengths, background first."""
    runs, value = [0], False
    for pixel in mask.ravel(order="F").tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def parts_of(mask: np.ndarray, *, diagonal: bool) -> list[set[tuple[int, int]]]:
    """The connected parts as sets of (row, column), in the order of their first pixels."""
    steps = [(-1, 0), (1, 0), (0, -1), (0, 1)] + ([(-1, -1), (-1, 1), (1, -1), (1, 1)] if diagonal else [])
    unseen = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    parts = []
    for start in sorted(unseen):
        if start not in unseen:
            continue
        part, queue = {start}, deque([start])
        unseen.discard(start)
        while queue:
            y, x = queue.popleft()
            for dy, dx in steps:
                if (neighbour := (y + dy, x + dx)) in unseen:
                    unseen.discard(neighbour)
                    part.add(neighbour)
                    queue.append(neighbour)
        parts.append(part)
    return parts


def rings_of(parts: list[Polygon]) -> list[list[list[int]]]:
    return [ring for part in parts for ring in (part["exterior"], *part["holes"])]


def winding(parts: list[Polygon], shape: tuple[int, int]) -> np.ndarray:
    """[H, W] how often the outlines wind around each pixel's centre, counting edges to its right."""
    around = np.zeros(shape, dtype=int)
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]] + 0.5
    for ring in rings_of(parts):
        for i, ((x0, y0), (x1, y1)) in enumerate(zip(ring, ring[1:] + ring[:1], strict=True)):
            assert (x0 == x1) != (y0 == y1), "an edge is neither upright nor level, or has no length"
            assert (x0 == x1) == ((ring[0][0] == ring[1][0]) ^ (i % 2 == 1)), "a corner is none"
            if x0 == x1:
                around += ((y > min(y0, y1)) & (y < max(y0, y1)) & (x < x0)) * (1 if y0 > y1 else -1)
    return around


def signed_area(ring: list[list[int]]) -> int:
    x, y = np.array(ring).T
    return int((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) // 2


def near_an_edge(mask: np.ndarray) -> np.ndarray:
    """[H, W] pixels with one of the other kind, or the frame, among their eight neighbours."""
    around = np.lib.stride_tricks.sliding_window_view(np.pad(mask.astype(int), 1, constant_values=-1), (3, 3))
    return (around != mask.astype(int)[..., None, None]).any(axis=(2, 3))


def filled_by_cv2(parts: list[Polygon], shape: tuple[int, int]) -> np.ndarray:
    canvas = np.zeros(shape, dtype=np.uint8)
    for part in parts:
        cv2.fillPoly(canvas, [np.array(ring, dtype=np.int32) for ring in (part["exterior"], *part["holes"])], 1)
    return canvas > 0


def filled_by_coco(parts: list[Polygon], shape: tuple[int, int]) -> np.ndarray:
    canvas = np.zeros(shape, dtype=np.bool_)
    for part in parts:
        rings = [np.ravel(ring).astype(float).tolist() for ring in (part["exterior"], *part["holes"])]
        outside, *inside = [coco_mask.decode(rle) > 0 for rle in coco_mask.frPyObjects(rings, *shape)]
        for hole in inside:
            outside &= ~hole
        canvas |= outside
    return canvas


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    assert image.format == "PNG"
    return image


# ---------------------------------------------------------------- all forms agree


def check_all_forms(mask: np.ndarray) -> None:
    expected_area = int(mask.sum())
    ys, xs = np.nonzero(mask)
    expected_box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1) if expected_area else None
    assert (area(mask), box(mask)) == (expected_area, expected_box)

    rle = coco_rle(mask)
    assert (rle["size"], type(rle["counts"])) == (list(mask.shape), str)
    np.testing.assert_array_equal(from_coco_rle(rle), mask)
    np.testing.assert_array_equal(from_coco_rle({"size": list(mask.shape), "counts": runs_of(mask)}), mask)
    np.testing.assert_array_equal(coco_mask.decode(rle), mask)
    assert coco_mask.area(rle) == expected_area
    x, y, width, height = coco_mask.toBbox(rle)
    assert ((x, y, x + width, y + height) if expected_area else None) == expected_box

    eight, one = opened(png_bytes(mask)), opened(png_bytes(mask, bits=1))
    assert (eight.mode, one.mode) == ("L", "1")
    np.testing.assert_array_equal(np.asarray(eight), mask * 255)
    np.testing.assert_array_equal(np.asarray(one), mask)
    np.testing.assert_array_equal(np.asarray(opened(label_map_png(mask.astype(np.uint8)))), mask)

    parts = components(mask, max_components=1000)
    expected_parts = sorted(parts_of(mask, diagonal=True), key=lambda part: -len(part))
    assert parts.dropped == 0
    assert [part.id for part in parts.parts] == list(range(1, len(expected_parts) + 1))
    for part, pixels in zip(parts.parts, expected_parts, strict=True):
        part_mask = part.mask()
        assert {(int(y), int(x)) for y, x in np.argwhere(part_mask)} == pixels
        assert (part.area, part.box) == (len(pixels), box(part_mask))
        assert from_coco_rle(part.rle()).sum() == part.area

    outlines = polygons(mask)
    json.dumps([outlines, rle, expected_box])
    around = winding(outlines, mask.shape)
    np.testing.assert_array_equal(around, mask)  # 1 inside, 0 outside: even-odd and non-zero filling agree
    assert -sum(signed_area(ring) for ring in rings_of(outlines)) == expected_area
    assert len(outlines) == len(expected_parts)
    holes = [part for part in parts_of(np.pad(~mask, 1, constant_values=True), diagonal=False) if (0, 0) not in part]
    assert sum(len(part["holes"]) for part in outlines) == len(holes)
    if expected_box:
        corners = np.concatenate([np.array(part["exterior"]) for part in outlines])
        assert (*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist()) == expected_box


@every_example
def test_all_forms_of_an_example_agree(mask):
    check_all_forms(mask)


@settings(max_examples=300, deadline=None)
@given(masks)
def test_all_forms_of_any_mask_agree(mask):
    check_all_forms(mask)


@every_example
def test_polygons_filled_by_others_differ_only_along_edges(mask):
    parts, uncertain = polygons(mask), near_an_edge(mask)
    for fill in (filled_by_cv2, filled_by_coco):
        differs = fill(parts, mask.shape) != mask
        assert not (differs & ~uncertain).any(), fill.__name__


@settings(max_examples=300, deadline=None)
@given(masks)
def test_polygons_of_any_mask_filled_by_others_differ_only_along_edges(mask):
    parts, uncertain = polygons(mask), near_an_edge(mask)
    for fill in (filled_by_cv2, filled_by_coco):
        assert not ((fill(parts, mask.shape) != mask) & ~uncertain).any(), fill.__name__


def test_masks_of_photos_agree_byte_for_byte_with_coco():
    if not SEG_TINY.exists():
        pytest.skip("needs the masks of ../shared/data/seg-tiny")
    rows = [json.loads(line) for line in (SEG_TINY / "val.jsonl").read_text().splitlines()]
    instances = [instance for row in rows for instance in row["instances"]]
    for instance in instances:
        mask = from_coco_rle(instance["mask"])
        assert coco_rle(mask) == instance["mask"]
        assert list(box(mask)) == instance["box"]
        assert -sum(signed_area(ring) for ring in rings_of(polygons(mask))) == area(mask)
    assert len(instances) > 700


# ---------------------------------------------------------------- what a mask may be


@pytest.mark.parametrize("function", [area, box, coco_rle, components, png_bytes, polygons])
@pytest.mark.parametrize(
    "mask",
    [
        np.zeros((3, 4), dtype=np.float32),
        np.zeros((3, 4), dtype=np.int64),
        np.zeros((3, 4, 1), dtype=np.bool_),
        np.zeros(3, dtype=np.bool_),
        np.zeros((0, 4), dtype=np.bool_),
        np.zeros((4, 0), dtype=np.uint8),
    ],
    ids=lambda mask: f"{mask.dtype}-{'x'.join(map(str, mask.shape))}",
)
def test_another_shape_or_dtype_is_refused(function, mask):
    with pytest.raises(RelayModelsError, match=r"mask must be bool or uint8 \[H, W\].* got .*\["):
        function(mask)


def test_any_layout_and_any_foreground_value_is_taken():
    mask = ellipses(1, 60, 40)
    values = mask * np.random.default_rng(0).integers(1, 256, mask.shape).astype(np.uint8)
    for same in (mask.astype(np.uint8), values, np.asfortranarray(mask), np.repeat(mask, 2, axis=1)[:, ::2]):
        assert coco_rle(same) == coco_rle(mask)
        assert polygons(same) == polygons(mask)
        assert png_bytes(same) == png_bytes(mask)
        assert components(same).parts == components(mask).parts
        assert (area(same), box(same)) == (area(mask), box(mask))


def test_a_mask_is_not_changed():
    mask = ellipses(2, 60, 40)
    before = mask.copy()
    check_all_forms(mask)
    np.testing.assert_array_equal(mask, before)


# ---------------------------------------------------------------- components


def test_components_are_ordered_by_area_then_by_first_pixel():
    mask = drawn("..#.#.. #.###.# ....... ##...## #.....# ....... #..#..#")
    found = [(part.area, part.box) for part in components(mask).parts]
    assert found == [
        (5, (2, 0, 5, 2)),
        (3, (0, 3, 2, 5)),
        (3, (5, 3, 7, 5)),
        (1, (0, 1, 1, 2)),
        (1, (6, 1, 7, 2)),
        (1, (0, 6, 1, 7)),
        (1, (3, 6, 4, 7)),
        (1, (6, 6, 7, 7)),
    ]


def test_parts_of_equal_area_and_top_are_told_apart_by_their_first_pixel():
    """Not by their boxes: that of the second reaches further left."""
    found = components(drawn(".######.# .######.# ........# #########")).parts
    assert [(part.area, part.box) for part in found] == [(12, (1, 0, 7, 2)), (12, (0, 0, 9, 4))]


@pytest.mark.parametrize("limit", [0, 1, 3, 25])
def test_the_largest_are_kept_and_the_number_left_out_is_told(limit):
    mask = np.zeros((50, 101), dtype=np.bool_)
    for size in range(1, 25):
        mask[2 * size, : 4 * size] = True
    found = components(mask, max_components=limit)
    assert [part.area for part in found.parts] == [4 * size for size in range(24, 24 - min(limit, 24), -1)]
    assert found.dropped == 24 - min(limit, 24)


def test_a_negative_limit_is_an_error():
    with pytest.raises(RelayModelsError, match="max_components must not be negative, got -1"):
        components(drawn("#"), max_components=-1)


def test_components_do_not_depend_on_the_number_of_threads():
    mask = np.random.default_rng(3).random((300, 400)) < 0.3
    threads = cv2.getNumThreads()
    try:
        found = []
        for count in (1, 2, 4):
            cv2.setNumThreads(count)
            found.append(components(mask, max_components=500).parts)
    finally:
        cv2.setNumThreads(threads)
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 500


# ---------------------------------------------------------------- label maps


@pytest.mark.parametrize(
    ("ids", "dtype", "mode"),
    [
        ([0, 1, 255], np.uint8, "L"),
        ([0, 1, 255], np.uint16, "L"),
        ([0, 1, 256], np.uint16, "I;16"),
        ([0, 256, 65_535], np.uint16, "I;16"),
        ([0, 0, 0], np.uint16, "L"),
    ],
)
def test_a_label_map_keeps_its_ids(ids, dtype, mode):
    label_map = np.array([ids, ids[::-1]], dtype=dtype)
    image = opened(label_map_png(label_map))
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(image), label_map)
    np.testing.assert_array_equal(np.asarray(opened(label_map_png(np.asfortranarray(label_map)))), label_map)


@pytest.mark.parametrize("label_map", [np.zeros((2, 2)), np.zeros((2, 2), np.int32), np.zeros((0, 2), np.uint8)])
def test_another_label_map_is_refused(label_map):
    with pytest.raises(RelayModelsError, match="label_map must be uint8 or uint16"):
        label_map_png(label_map)


def test_other_depths_are_refused():
    with pytest.raises(RelayModelsError, match="bits must be 1 or 8, got 4"):
        png_bytes(drawn("#"), bits=4)


# ---------------------------------------------------------------- RLE from outside

RLE_LETTERS = [chr(48 + code) for code in range(64)]


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({}, "size must be"),
        ({"size": [3], "counts": ""}, "size must be"),
        ({"size": [3, -4], "counts": ""}, "size must be"),
        ({"size": [0, 4], "counts": ""}, "size must be"),
        ({"size": [3.0, 4], "counts": ""}, "size must be"),
        ({"size": [True, 4], "counts": ""}, "size must be"),
        ({"size": "34", "counts": ""}, "size must be"),
        ({"size": [100_000, 100_000], "counts": "0"}, "10000000000 pixels, more than 178956970"),
        ({"size": [10**30, 1], "counts": "0"}, "more than"),
        ({"size": [3, 4]}, "counts must be a string or a list of integers, got NoneType"),
        ({"size": [3, 4], "counts": 12}, "counts must be .* got int"),
        ({"size": [3, 4], "counts": [12.0]}, "counts must be .* got list"),
        ({"size": [3, 4], "counts": ""}, "adds up to 0 pixels, not to the 12 of size 3x4"),
        ({"size": [3, 4], "counts": []}, "adds up to 0 pixels"),
        ({"size": [3, 4], "counts": [5, 6]}, "adds up to 11 pixels"),
        ({"size": [3, 4], "counts": [5, 8]}, "adds up to 13 pixels"),
        ({"size": [3, 4], "counts": [13, -1]}, "a run of -1 pixels"),
        ({"size": [3, 4], "counts": [10**40, 1]}, "a run of 10{40} pixels"),
        ({"size": [3, 4], "counts": "5"}, "adds up to 5 pixels"),
        ({"size": [3, 4], "counts": "L1"}, "a run of -4 pixels"),
        ({"size": [3, 4], "counts": "\\"}, "cut short after 1 characters"),
        ({"size": [3, 4], "counts": "5 7"}, "' '.* no character of a COCO RLE"),
        ({"size": [3, 4], "counts": "5é"}, "'é'.* no character of a COCO RLE"),
        ({"size": [3, 4], "counts": b"5\xff"}, "no character of a COCO RLE"),
        ({"size": [3, 4], "counts": "P" * 8 + "0"}, "a number of 9 characters"),
        ({"size": [3, 4], "counts": "0" * 1_000}, "1000 characters, too many for 12 pixels"),
    ],
)
def test_a_malformed_rle_is_refused_with_its_field(rle, message):
    with pytest.raises(RelayModelsError, match=message):
        from_coco_rle(rle)


def test_a_limit_of_pixels_may_be_given():
    rle = coco_rle(np.ones((3, 4), dtype=np.bool_))
    assert from_coco_rle(rle, max_pixels=12).all()
    with pytest.raises(RelayModelsError, match="12 pixels, more than 11"):
        from_coco_rle(rle, max_pixels=11)


def test_bytes_are_read_like_text():
    rle = coco_rle(ellipses(3, 50, 40))
    np.testing.assert_array_equal(from_coco_rle({**rle, "counts": rle["counts"].encode()}), ellipses(3, 50, 40))


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=2),
    st.one_of(
        st.binary(max_size=60),
        st.text(alphabet=RLE_LETTERS, max_size=60),
        st.text(max_size=9),
    ),
)
def test_any_string_gives_a_mask_or_an_error(size, counts):
    try:
        mask = from_coco_rle({"size": size, "counts": counts})
    except RelayModelsError:
        return
    np.testing.assert_array_equal(coco_mask.decode({"size": size, "counts": counts}), mask)


@settings(max_examples=200, deadline=None)
@given(masks, st.data())
def test_a_cut_or_changed_string_gives_a_mask_or_an_error(mask, data):
    rle = coco_rle(mask)
    at = data.draw(st.integers(0, len(rle["counts"]) - 1))
    new = data.draw(st.sampled_from(RLE_LETTERS))
    for counts in (rle["counts"][:at], rle["counts"][:at] + new + rle["counts"][at + 1 :]):
        try:
            changed = from_coco_rle({**rle, "counts": counts})
        except RelayModelsError:
            continue
        assert changed.shape == mask.shape
        np.testing.assert_array_equal(coco_mask.decode({**rle, "counts": counts}), changed)


def test_a_large_mask_goes_through_every_form():
    mask = ellipses(4, 1_500, 1_100)
    np.testing.assert_array_equal(from_coco_rle(coco_rle(mask)), mask)
    assert -sum(signed_area(ring) for ring in rings_of(polygons(mask))) == area(mask)
    assert sum(part.area for part in components(mask).parts) == area(mask)

"""Masks in the forms that tools, browsers and people read: COCO RLE, PNG, label map, polygons, boxes, components.

Legend: H rows and W columns of the picture, upright, in its own pixels. A mask is a bool or uint8 array [H, W] in which
anything but 0 is foreground. Pixel (x, y) is the square [x, x+1) x [y, y+1); boxes are half-open in x and in y.

What it promises:
    - RLE, PNG and label map are exact: reading them back gives every pixel. Empty and full masks are ordinary masks.
    - Polygons run along the edges of pixels. Whoever fills them by the centres of pixels gets the mask back exactly.
      Other rasterisers round edges their own way, so polygons count as lossy: cv2's and COCO's were tested to differ
      only in pixels that touch, at an edge or a corner, a pixel of the other kind (or the frame).
    - Foreground that touches at a corner is connected (8-connectivity), in components and in polygons alike, and
      background then is not: two holes that touch at a corner are two.
    - RLE from outside is checked before anything is allocated.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask  # type: ignore[import-untyped]

from relay_models.errors import RelayModelsError

BoolMask = npt.NDArray[np.bool_]
AnyMask = npt.NDArray[np.bool_] | npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]
Box = tuple[int, int, int, int]

MAX_PIXELS = 178_956_970  # as many as `relay_models.images.ImageLimits` lets in
MAX_COMPONENTS = 256


class CocoRle(TypedDict):
    """COCO's compressed run lengths: column-major, background first. ``size`` is [H, W]."""

    size: list[int]
    counts: str


class Polygon(TypedDict):
    """One connected part: its outline and the outlines of its holes, each a list of corners [x, y] of pixels.

    Corners are integers from [0, 0] to [W, H]; consecutive ones share x or y, and the last one is joined to the first.
    An outline touches itself where foreground touches itself at a corner only. On the screen outlines run
    anticlockwise and holes clockwise, so that both usual filling rules leave the holes empty.
    """

    exterior: list[list[int]]
    holes: list[list[list[int]]]


@dataclass(frozen=True)
class Component:
    """One connected part of a mask. A part is not an instance: an object cut in two is two parts.

    Attributes:
        id: from 1 on, by descending area, then by its first pixel, row by row.
        box: x0, y0, x1, y1, half-open.
        area: in pixels.
    """

    id: int
    box: Box
    area: int
    _label: int = field(repr=False, compare=False)
    _labels: Labels = field(repr=False, compare=False)  # [H, W]

    def mask(self) -> BoolMask:
        """[H, W] this part alone."""
        x0, y0, x1, y1 = self.box
        mask_HW = np.zeros(self._labels.shape, dtype=np.bool_)
        mask_HW[y0:y1, x0:x1] = self._labels[y0:y1, x0:x1] == self._label
        return mask_HW

    def rle(self) -> CocoRle:
        """This part alone."""
        return coco_rle(self.mask())


@dataclass(frozen=True)
class Components:
    """The largest parts of a mask, in the order of their ids, and how many smaller ones were left out."""

    parts: tuple[Component, ...]
    dropped: int


# ---------------------------------------------------------------- measures


def area(mask: AnyMask) -> int:
    """Foreground pixels."""
    return int(np.count_nonzero(_checked(mask)))


def box(mask: AnyMask) -> Box | None:
    """The smallest x0, y0, x1, y1 that holds the foreground, half-open; None if there is none."""
    mask_HW = _checked(mask)
    rows = np.flatnonzero(mask_HW.any(axis=1))
    if not len(rows):
        return None
    y0, y1 = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask_HW[y0:y1].any(axis=0))
    return int(columns[0]), y0, int(columns[-1]) + 1, y1


def components(mask: AnyMask, *, max_components: int = MAX_COMPONENTS) -> Components:
    """The connected parts of a mask (8-connectivity), largest first, at most ``max_components`` of them.

    Needs 4 bytes a pixel for as long as the result is kept.

    Raises:
        RelayModelsError: the mask has another shape or dtype, or ``max_components`` is negative.
    """
    if max_components < 0:
        raise RelayModelsError(f"max_components must not be negative, got {max_components}")
    mask_HW = _checked(mask)
    found = cv2.connectedComponentsWithStats(mask_HW.view(np.uint8), connectivity=8, ltype=cv2.CV_32S)
    labels_HW, stats = np.asarray(found[1], dtype=np.int32), np.asarray(found[2], dtype=np.int64)
    areas, tops = stats[1:, cv2.CC_STAT_AREA], stats[1:, cv2.CC_STAT_TOP]
    order = np.lexsort((_first_columns(labels_HW, len(stats)), tops, -areas))[:max_components]
    parts = tuple(_component(i, int(label) + 1, stats, labels_HW) for i, label in enumerate(order, start=1))
    return Components(parts, dropped=len(stats) - 1 - len(parts))


def _first_columns(labels_HW: Labels, num_labels: int) -> Indices:
    """For each label but the background's, the column of its first pixel in row-major order."""
    starts_run_HW = labels_HW != 0
    starts_run_HW[:, 1:] &= labels_HW[:, 1:] != labels_HW[:, :-1]
    pixels = np.flatnonzero(starts_run_HW)[::-1]
    first = np.zeros(num_labels, dtype=np.int64)
    first[labels_HW.ravel()[pixels]] = pixels  # of repeated indices the last assignment stays, hence the reversal
    columns: Indices = first[1:] % labels_HW.shape[1]
    return columns


def _component(number: int, label: int, stats: Indices, labels_HW: Labels) -> Component:
    left, top, width, height, pixels = (int(value) for value in stats[label])
    return Component(number, (left, top, left + width, top + height), pixels, label, labels_HW)


# ---------------------------------------------------------------- COCO RLE


def coco_rle(mask: AnyMask) -> CocoRle:
    """COCO's run-length encoding by COCO's own code, ``counts`` as str, ready for JSON."""
    mask_HW = _checked(mask).view(np.uint8)
    # Turning a mask to columns takes most of the time, and of a list of classes most masks are empty.
    columns_HW = np.asfortranarray(mask_HW) if mask_HW.any() else np.zeros(mask_HW.shape, np.uint8, order="F")
    rle = coco_mask.encode(columns_HW)
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def from_coco_rle(rle: Mapping[str, Any], *, max_pixels: int = MAX_PIXELS) -> BoolMask:
    """[H, W] from a COCO RLE, which may come from a stranger.

    ``counts`` is the compressed string (str or bytes) or a plain list of runs. The string is read here and not by
    pycocotools, whose reader runs past the end of one that is cut short.

    Raises:
        RelayModelsError: a field is missing or malformed, the mask is larger than ``max_pixels``, or the runs do not
            add up to it.
    """
    height, width = _rle_size(rle, max_pixels)
    counts = rle.get("counts")
    if isinstance(counts, str | bytes):
        runs = _parse_counts(counts, height * width)
        _check_runs(runs, height * width)
    elif isinstance(counts, list) and all(type(run) is int for run in counts):
        _check_runs(counts, height * width)
        runs = np.array(counts, dtype=np.int64)
    else:
        raise RelayModelsError(f"counts must be a string or a list of integers, got {type(counts).__name__}")
    if (total := int(runs.sum())) != height * width:
        raise RelayModelsError(
            f"counts adds up to {total} pixels, not to the {height * width} of size {height}x{width}"
        )
    is_foreground = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(is_foreground, runs).reshape(width, height).T)


def _rle_size(rle: Mapping[str, Any], max_pixels: int) -> tuple[int, int]:
    size = rle.get("size")
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise RelayModelsError(f"size must be [height, width], two positive integers, got {size!r:.80}")
    height, width = size
    if height * width > max_pixels:
        raise RelayModelsError(f"size {height}x{width} is {height * width} pixels, more than {max_pixels}")
    return height, width


def _check_runs(runs: list[int] | Indices, num_pixels: int) -> None:
    extremes = () if not len(runs) else (min(runs), max(runs)) if isinstance(runs, list) else (runs.min(), runs.max())
    for run in extremes:
        if not 0 <= run <= num_pixels:
            raise RelayModelsError(f"counts holds a run of {run} pixels, not of 0 to {num_pixels}")


def _parse_counts(counts: str | bytes, num_pixels: int) -> Indices:
    """The runs of COCO's compressed string.

    Each number is written in characters of six bits above "0": five bits, low ones first, and one that says whether
    more follow; the highest bit written is the sign. From the fourth number on, a number is the difference to the run
    two before.
    """
    try:
        text = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError as error:
        raise RelayModelsError(f"counts holds {counts[error.start]!r}, which is no character of a COCO RLE") from error
    if len(text) > 7 * (num_pixels + 2):
        raise RelayModelsError(f"counts holds {len(text)} characters, too many for {num_pixels} pixels")
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if not len(codes):
        return codes
    if codes.min() < 0 or codes.max() > 63:
        wrong = int(np.argmax((codes < 0) | (codes > 63)))
        raise RelayModelsError(f"counts holds {text[wrong : wrong + 1]!r}, which is no character of a COCO RLE")
    is_last = codes & 0x20 == 0
    if not is_last[-1]:
        raise RelayModelsError(f"counts is cut short after {len(text)} characters")
    ends = np.flatnonzero(is_last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise RelayModelsError(f"counts holds a number of {lengths.max()} characters, more than 7")
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((codes & 0x1F) << 5 * places, starts)
    numbers -= (codes[ends] & 0x10 > 0) * (np.int64(1) << 5 * lengths)
    for parity in (1, 2):
        numbers[parity::2] = np.cumsum(numbers[parity::2])
    return numbers


# ---------------------------------------------------------------- PNG


def png_bytes(mask: AnyMask, *, bits: Literal[1, 8] = 8) -> bytes:
    """A greyscale PNG, 255 (or 1) where the mask is foreground and 0 elsewhere."""
    if bits not in (1, 8):
        raise RelayModelsError(f"bits must be 1 or 8, got {bits}")
    mask_HW = _checked(mask)
    image = Image.fromarray(mask_HW) if bits == 1 else Image.fromarray(mask_HW.view(np.uint8) * np.uint8(255))
    return _png(image)


def label_map_png(label_map: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> bytes:
    """A greyscale PNG without palette whose samples are the ids of ``label_map`` [H, W]: 8 bits, or 16 above 255."""
    if label_map.ndim != 2 or 0 in label_map.shape or label_map.dtype not in (np.uint8, np.uint16):
        raise RelayModelsError(
            f"label_map must be uint8 or uint16 [H, W] with H and W at least 1, got {label_map.dtype} "
            f"{list(label_map.shape)}"
        )
    sample = np.uint8 if int(label_map.max()) <= 255 else np.uint16
    return _png(Image.fromarray(np.ascontiguousarray(label_map.astype(sample))))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # masks are runs: higher levels take longer and save little
    return buffer.getvalue()


# ---------------------------------------------------------------- polygons


def polygons(mask: AnyMask) -> list[Polygon]:
    """The connected parts of a mask as outlines with holes, ordered by their first corner, row by row.

    Follows the edges of pixels: cv2 traces the centres of border pixels, which loses half a pixel on every side and
    leaves a thin part without an inside, so it is given each pixel as 2x2 and its points are moved to the edge.
    """
    mask_HW = _checked(mask)
    bounds = box(mask_HW)
    if bounds is None:
        return []
    x0, y0, x1, y1 = bounds
    doubled = mask_HW[y0:y1, x0:x1].view(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    outlines = _outlines([np.asarray(contour, dtype=np.int64).reshape(-1, 2) for contour in contours], x0, y0)
    parts: dict[int, Polygon] = {}
    parents = [int(link[3]) for link in hierarchy[0]]
    for i, parent in enumerate(parents):
        if parent < 0:
            parts[i] = {"exterior": outlines[i], "holes": []}
    for i, parent in enumerate(parents):
        if parent >= 0:
            parts[parent]["holes"].append(outlines[i])
    for part in parts.values():
        part["holes"].sort(key=_first_corner)
    return sorted(parts.values(), key=lambda part: _first_corner(part["exterior"]))


def _outlines(contours: list[Indices], x0: int, y0: int) -> list[list[list[int]]]:
    """The corners of each outline, from all points of the contours of the doubled mask whose origin is (x0, y0).

    Half-pixel 2x lies on the left edge of pixel x and 2x+1 on its right one, which is corner x+1: (2x + 1) // 2 and
    (2x + 2) // 2. Where a contour cuts across a corner both of its points become that corner. An outline begins with
    its first corner row by row.
    """
    corners_N2 = (np.concatenate(contours) + 1) // 2 + (x0, y0)
    ends = np.cumsum([len(contour) for contour in contours])
    for is_needed in (_moves, _turns):
        before, after = _ring_neighbours(ends, len(corners_N2))
        is_kept_N = is_needed(corners_N2, before, after)
        corners_N2 = corners_N2[is_kept_N]
        ends = np.cumsum(is_kept_N)[ends - 1]

    starts = np.concatenate(([0], ends[:-1]))
    places_N = corners_N2[:, 1] * (int(corners_N2.max()) + 1) + corners_N2[:, 0]
    outlines = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        first = start + int(places_N[start:end].argmin())
        outlines.append(corners_N2[first:end].tolist() + corners_N2[start:first].tolist())
    return outlines


def _ring_neighbours(ends: Indices, num_points: int) -> tuple[Indices, Indices]:
    """For each point the indices of those before and after it on its own closed outline."""
    starts = np.concatenate(([0], ends[:-1]))
    before, after = np.arange(num_points) - 1, np.arange(num_points) + 1
    before[starts], after[ends - 1] = ends - 1, starts
    return before, after


def _moves(corners_N2: Indices, before: Indices, after: Indices) -> BoolMask:
    """Which corners are not the one before again."""
    is_new_N: BoolMask = (corners_N2 != corners_N2[before]).any(axis=1)
    return is_new_N


def _turns(corners_N2: Indices, before: Indices, after: Indices) -> BoolMask:
    """At which corners the outline changes its direction."""
    arriving_N2, leaving_N2 = np.sign(corners_N2 - corners_N2[before]), np.sign(corners_N2[after] - corners_N2)
    is_turn_N: BoolMask = (arriving_N2 != leaving_N2).any(axis=1)
    return is_turn_N


def _first_corner(outline: list[list[int]]) -> tuple[int, int]:
    x, y = outline[0]
    return y, x


def _checked(mask: AnyMask) -> BoolMask:
    """The mask as contiguous bool [H, W]."""
    if mask.ndim != 2 or 0 in mask.shape or mask.dtype not in (np.bool_, np.uint8):
        raise RelayModelsError(
            f"mask must be bool or uint8 [H, W] with H and W at least 1, got {mask.dtype} {list(mask.shape)}"
        )
    return np.ascontiguousarray(mask if mask.dtype == np.bool_ else mask != 0)

"""What a promptable segmenter is told about a coarse mask: its logits, points of it, its box.

Legend: H rows and W columns of the picture; M the side of the mask logits (256); P points, as (x, y).

Text4Seg (arXiv 2410.09855) prompts SAM with the mask's logits and 10 points in it and 10 outside, three times, each
time with the logits of the time before. Written from that description; three things are done otherwise than in
the published code (mc-lan/Text4Seg at d6540b6): the logits never pass through an 8-bit picture, they lie where SAM's
frame has the picture and not stretched over its padding, and the points are drawn with a seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from relay_models import masks
from relay_models.errors import RelayModelsError
from relay_models.refine.frame import MASK_SIDE, AnyMask, Floats, Frame, inner_size, shrink_mask

CONFIDENCE = 0.999
LARGEST_LOGIT = math.log(CONFIDENCE / (1.0 - CONFIDENCE))  # 6.9068
POINTS_A_KIND = 10
FOREGROUND, BACKGROUND = 1, 0


class Style(Enum):
    """Which prompts are given, and how many times the logits are fed back."""

    POINTS_LOGITS = ("points+logits", True, False, True, 3)  # as published
    POINTS_LOGITS_ONCE = ("points+logits, 1 pass", True, False, True, 1)
    BOX_LOGITS = ("box+logits", False, True, True, 1)
    POINTS_BOX_LOGITS = ("points+box+logits", True, True, True, 3)
    POINTS = ("points", True, False, False, 1)
    BOX = ("box", False, True, False, 1)

    def __init__(self, label: str, has_points: bool, has_box: bool, has_logits: bool, passes: int) -> None:
        self.label = label
        self.has_points = has_points
        self.has_box = has_box
        self.has_logits = has_logits
        self.passes = passes


@dataclass(frozen=True)
class Prompt:
    """One mask's prompts, in pixels of the frame.

    Attributes:
        points_P2: (x, y), or None.
        labels_P: FOREGROUND or BACKGROUND of each point.
        box: x0, y0, x1, y1, the first and the last pixel of the mask, or None.
        logits_MM: or None.
        passes: how often to predict, each time with the logits of the time before.
    """

    points_P2: Floats | None  # noqa: N815
    labels_P: npt.NDArray[np.int64] | None  # noqa: N815
    box: Floats | None
    logits_MM: Floats | None  # noqa: N815
    passes: int


@dataclass(frozen=True)
class Prediction:
    """A segmenter's answer to a prompt.

    Attributes:
        logits_MM: in the frame; above 0 is foreground.
        score: the IoU with the truth that the segmenter expects.
    """

    logits_MM: Floats  # noqa: N815
    score: float


def prompt_of(
    mask_HW: AnyMask, frame: Frame, style: Style, *, seed: int = 0, mask_side: int = MASK_SIDE
) -> Prompt | None:
    """None where the mask is empty: there is nothing to point at.

    Raises:
        RelayModelsError: the mask has another size than the frame's picture.
    """
    if mask_HW.shape != (frame.height, frame.width):
        raise RelayModelsError(
            f"mask is {'x'.join(map(str, mask_HW.shape))}, not {frame.height}x{frame.width} as its picture"
        )
    corners = masks.box(mask_HW)
    if corners is None:
        return None
    points = labels = box = logits = None
    if style.has_points:
        drawn, labels = draw_points(mask_HW, seed=seed)
        points = frame.points(drawn)
    if style.has_box:
        x0, y0, x1, y1 = corners
        box = frame.points(np.array([[x0, y0], [x1 - 1, y1 - 1]])).reshape(4)
    if style.has_logits:
        logits = mask_logits(mask_HW, side=mask_side)
    return Prompt(points, labels, box, logits, style.passes)


def mask_logits(mask_HW: AnyMask, *, side: int = MASK_SIDE) -> Floats:
    """[side, side] +-6.91 inside and outside the mask, in between along its edge, 0 in the frame's padding."""
    logits_MM = np.zeros((side, side), dtype=np.float32)
    height, width = inner_size(mask_HW.shape[0], mask_HW.shape[1], side)
    logits_MM[:height, :width] = (2.0 * shrink_mask(mask_HW, side) - 1.0) * LARGEST_LOGIT
    return logits_MM


def draw_points(
    mask_HW: AnyMask, *, count: int = POINTS_A_KIND, seed: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Points of the mask, then points outside, (x, y) [P, 2], and their labels [P].

    ``count`` of each without repetition, or all there are where a side has fewer pixels. The same seed draws the same.
    """
    rng = np.random.default_rng(seed)
    is_inside_HW = mask_HW != 0
    inside_P2 = _drawn(is_inside_HW, count, rng)
    outside_P2 = _drawn(~is_inside_HW, count, rng)
    labels = np.repeat(np.array([FOREGROUND, BACKGROUND], dtype=np.int64), [len(inside_P2), len(outside_P2)])
    return np.concatenate([inside_P2, outside_P2]), labels


def _drawn(wanted_HW: npt.NDArray[np.bool_], count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """By rank, row by row: a list of all pixels of a large picture would take 16 bytes each."""
    before_H = np.concatenate([[0], np.cumsum(np.count_nonzero(wanted_HW, axis=1))])
    total = int(before_H[-1])
    ranks = rng.choice(total, size=min(count, total), replace=False) if total else np.zeros(0, dtype=np.int64)
    rows = np.searchsorted(before_H, ranks, side="right") - 1
    columns = [int(np.flatnonzero(wanted_HW[y])[rank - before_H[y]]) for y, rank in zip(rows, ranks, strict=True)]
    return np.stack([np.array(columns, dtype=np.int64), rows.astype(np.int64)], axis=1)

"""One interface to every refiner: a photo and its coarse masks in, sharper masks out.

    prompt_all -> Sam.embed, Sam.predict -> finish

A server runs the middle step in another process, the library in one go (`Refiner`). A refined mask is taken only where
it can be right; else the coarse one stays, and the outcome says so. No mask is ever lost to refining:
    SKIPPED   the coarse mask is empty, so there is nothing to point at
    KEPT      the segmenter's mask is empty, or shares too little with the coarse one to be of the same thing, or lost
              so much to other masks that it does
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from relay_models.errors import RelayModelsError
from relay_models.refine.frame import AnyMask, Floats, Frame
from relay_models.refine.prompts import Prediction, Prompt, Style, prompt_of

if TYPE_CHECKING:
    from relay_models.refine.sam import Sam

# What gained most on ground-truth grids, measured by `vllm-relay bench refining`: box+logits loses cIoU there.
DEFAULT_STYLE = Style.POINTS_LOGITS
LEAST_AGREEMENT = 0.3  # IoU with the coarse mask
MOST_ROUNDS = 3  # in which masks that lost too much are put back; after that, all of them are
NOBODY = -1

BoolMask = npt.NDArray[np.bool_]
_NO_LOGITS: Floats = np.zeros(0, dtype=np.float32)


class Outcome(StrEnum):
    REFINED = "refined"
    SKIPPED = "skipped"
    KEPT = "kept"


@dataclass(frozen=True)
class RefinedMask:
    """A mask at the picture's size, and where it comes from; the score is the IoU that the segmenter expects."""

    mask_HW: BoolMask  # noqa: N815
    outcome: Outcome
    score: float | None = None


class Refiner:
    """Refines the masks of one picture after the other.

    Args:
        sam: the segmenter.
        style: how it is prompted.
        seed: of the points; the same picture and masks give the same result.
    """

    def __init__(self, sam: Sam, *, style: Style = DEFAULT_STYLE, seed: int = 0) -> None:
        self._sam = sam
        self._style = style
        self._seed = seed

    def refine(self, picture: Image.Image, coarse: Sequence[AnyMask], *, disjoint: bool = False) -> list[RefinedMask]:
        """One mask for each coarse one, in order; the picture is encoded once, or not at all if all are empty.

        Args:
            picture: upright, RGB.
            coarse: [H, W] each, of the picture's size; anything but 0 is foreground.
            disjoint: see `finish`.

        Raises:
            RelayModelsError: the picture is not RGB, or a mask has another size.
        """
        if picture.mode != "RGB":
            raise RelayModelsError(f"picture must be RGB, got {picture.mode}")
        frame = Frame(picture.height, picture.width, self._sam.side)
        prompts = prompt_all(coarse, frame, self._style, seed=self._seed, mask_side=self._sam.mask_side)
        asked = [prompt for prompt in prompts if prompt is not None]
        found = iter(self._sam.predict(self._sam.embed(frame.view(picture)), asked)) if asked else iter(())
        predictions = [None if prompt is None else next(found) for prompt in prompts]
        return finish(coarse, predictions, frame, disjoint=disjoint)


def prompt_all(
    coarse: Sequence[AnyMask], frame: Frame, style: Style, *, seed: int = 0, mask_side: int
) -> list[Prompt | None]:
    """A prompt for each mask; None for an empty one. Raises RelayModelsError."""
    return [prompt_of(mask, frame, style, seed=seed, mask_side=mask_side) for mask in coarse]


def finish(
    coarse: Sequence[AnyMask],
    predictions: Sequence[Prediction | None],
    frame: Frame,
    *,
    disjoint: bool = False,
    least_agreement: float = LEAST_AGREEMENT,
) -> list[RefinedMask]:
    """Predictions at the picture's size, with the coarse mask where there is none or it cannot be right.

    Args:
        disjoint: where refined masks overlap, a pixel goes to the one with the largest logit, and to the first of
            equals. A coarse mask that stays keeps its pixels, as does one whose refined mask would lose so much to
            others that too little is left of it; of coarse masks that overlap, the first has them.
        least_agreement: IoU with the coarse mask below which a refined one is not taken.
    """
    coarse_bool = [mask_HW != 0 for mask_HW in coarse]
    if not disjoint or len(coarse) == 1:
        return [
            _chosen(mask_HW, prediction, frame, least_agreement)[1]
            for mask_HW, prediction in zip(coarse_bool, predictions, strict=True)
        ]
    kept: set[int] = set()
    for _ in range(MOST_ROUNDS):
        refined, lost = _shared_out(coarse_bool, predictions, frame, least_agreement, kept)
        if not lost:
            return refined
        kept |= lost
    return _shared_out(coarse_bool, predictions, frame, least_agreement, set(range(len(coarse))))[0]


def _shared_out(
    coarse: Sequence[BoolMask],
    predictions: Sequence[Prediction | None],
    frame: Frame,
    least_agreement: float,
    kept: set[int],
) -> tuple[list[RefinedMask], set[int]]:
    """Masks of which no two have a pixel in common, and those of which too little is left."""
    outcomes: list[tuple[Outcome, float | None]] = []
    best_HW = np.zeros((frame.height, frame.width), dtype=np.float32)
    owner_HW = np.full((frame.height, frame.width), NOBODY, dtype=np.int32)
    for index, (mask_HW, prediction) in enumerate(zip(coarse, predictions, strict=True)):
        logits_HW, found = _chosen(mask_HW, prediction, frame, math.inf if index in kept else least_agreement)
        outcomes.append((found.outcome, found.score))
        if found.outcome is not Outcome.REFINED:
            logits_HW = np.where(mask_HW, np.float32(math.inf), np.float32(0))
        better_HW = logits_HW > best_HW
        owner_HW[better_HW] = index
        best_HW[better_HW] = logits_HW[better_HW]
    masks = [owner_HW == index for index in range(len(coarse))]
    lost = {
        index
        for index, (outcome, _) in enumerate(outcomes)
        if outcome is Outcome.REFINED and iou(masks[index], coarse[index]) < least_agreement
    }
    return [RefinedMask(mask_HW, *outcome) for mask_HW, outcome in zip(masks, outcomes, strict=True)], lost


def _chosen(
    coarse_HW: BoolMask, prediction: Prediction | None, frame: Frame, least_agreement: float
) -> tuple[Floats, RefinedMask]:
    """The logits of a mask that is taken, none otherwise; and the mask."""
    if prediction is None:
        return _NO_LOGITS, RefinedMask(coarse_HW, Outcome.SKIPPED)
    if math.isinf(least_agreement):
        return _NO_LOGITS, RefinedMask(coarse_HW, Outcome.KEPT, prediction.score)
    logits_HW = frame.restore(prediction.logits_MM)
    mask_HW = logits_HW > 0
    if not mask_HW.any() or iou(mask_HW, coarse_HW) < least_agreement:
        return _NO_LOGITS, RefinedMask(coarse_HW, Outcome.KEPT, prediction.score)
    return logits_HW, RefinedMask(mask_HW, Outcome.REFINED, prediction.score)


def iou(first_HW: BoolMask, second_HW: BoolMask) -> float:
    """Intersection over union; 1 for two empty masks."""
    union = int(np.count_nonzero(first_HW | second_HW))
    return int(np.count_nonzero(first_HW & second_HW)) / union if union else 1.0

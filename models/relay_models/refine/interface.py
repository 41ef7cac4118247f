"""One interface to every refiner: a photo and its coarse masks in, sharper masks out.

    prompt_all -> Sam.embed, Sam.predict -> finish

A server runs the middle step in another process, the library in one go (`Refiner`). A refined mask is taken only where
it can be right; else the coarse one stays, and the outcome says so. No mask is ever lost to refining:
    SKIPPED   the coarse mask is empty, so there is nothing to point at
    KEPT      the segmenter's mask is empty, or shares too little with the coarse one to be of the same thing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from relay_models.errors import RelayModelsError
from relay_models.refine.frame import AnyMask, Floats, Frame
from relay_models.refine.prompts import LARGEST_LOGIT, Prediction, Prompt, Style, prompt_of

if TYPE_CHECKING:
    from relay_models.refine.sam import Sam

# What gained most on ground-truth grids, measured by `vllm-relay bench refining`: box+logits loses cIoU there.
DEFAULT_STYLE = Style.POINTS_LOGITS
LEAST_AGREEMENT = 0.3  # IoU with the coarse mask

BoolMask = npt.NDArray[np.bool_]


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
            equals; a coarse mask that stayed counts as a logit of 6.91, with which it was the prompt. A mask may so
            lose pixels to another one, even all of them.
        least_agreement: IoU with the coarse mask below which a refined one is not taken.
    """
    refined: list[RefinedMask] = []
    best_HW = np.zeros((frame.height, frame.width), dtype=np.float32) if disjoint else None
    owner_HW = np.full((frame.height, frame.width), -1, dtype=np.int32) if disjoint else None
    for index, (mask_HW, prediction) in enumerate(zip(coarse, predictions, strict=True)):
        logits_HW, found = _chosen(mask_HW != 0, prediction, frame, least_agreement)
        refined.append(found)
        if best_HW is not None and owner_HW is not None:
            better_HW = logits_HW > best_HW
            owner_HW[better_HW] = index
            best_HW[better_HW] = logits_HW[better_HW]
    if owner_HW is None:
        return refined
    return [RefinedMask(owner_HW == i, found.outcome, found.score) for i, found in enumerate(refined)]


def _chosen(
    coarse_HW: BoolMask, prediction: Prediction | None, frame: Frame, least_agreement: float
) -> tuple[Floats, RefinedMask]:
    if prediction is None:
        return _as_logits(coarse_HW), RefinedMask(coarse_HW, Outcome.SKIPPED)
    logits_HW = frame.restore(prediction.logits_MM)
    mask_HW = logits_HW > 0
    if not mask_HW.any() or iou(mask_HW, coarse_HW) < least_agreement:
        return _as_logits(coarse_HW), RefinedMask(coarse_HW, Outcome.KEPT, prediction.score)
    return logits_HW, RefinedMask(mask_HW, Outcome.REFINED, prediction.score)


def _as_logits(mask_HW: BoolMask) -> Floats:
    return np.where(mask_HW, np.float32(LARGEST_LOGIT), np.float32(-LARGEST_LOGIT))


def iou(first_HW: BoolMask, second_HW: BoolMask) -> float:
    """Intersection over union; 1 for two empty masks."""
    union = int(np.count_nonzero(first_HW | second_HW))
    return int(np.count_nonzero(first_HW & second_HW)) / union if union else 1.0

"""Scores of predicted masks as the papers count them, and how sure they are.

Legend: H rows and W columns of a picture. "Foreground" and "area" are pixels of the picture, not cells.

Each prediction is reduced to an `Outcome`, a few counts of pixels, and each score is a ratio of two sums over
outcomes (`Ratio`), so that a score over any part of them, and its bootstrap, needs no mask again.

    CIOU      sum of intersections / sum of unions
    GIOU      mean of intersection / union; 1 where both are empty
    N_ACC     of what is not there, how much was answered with an empty mask
    T_ACC     of what covers at least `VISIBLE_SHARE` of the frame, how much was answered with a mask that is not empty
    T_ACC_ALL the same of whatever is there, as GRES defines it
    REC_ACC   of what is there, how often the boxes of the two masks meet with an IoU above 0.5
    mIoU      over classes, from label maps (`ClassCounts`)

Where published code and published definition differ, the docstring says so; "upstream" is mc-lan/Text4Seg at d6540b6.
Intervals are percentile bootstraps over photos, because the questions about one photo are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from relay_models.errors import RelayModelsError
from relay_models.masks import AnyMask, BoolMask, Box, box
from relay_models.text4seg.geometry import reduce_to_grid, upsample

Counts = npt.NDArray[np.int64]

VISIBLE_SHARE = 0.01  # of the frame: on a 16x16 grid most of what is smaller vanishes
BOX_THRESHOLD = 0.5
LEVEL = 0.95
NUM_RESAMPLES = 2_000
AREA_BUCKETS = (("<1 %", 0.01), ("1-5 %", 0.05), ("5-20 %", 0.2), (">=20 %", float("inf")))
NO_AREA = "empty"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """What became of one question, in pixels.

    Attributes:
        photo: of which photo; what the bootstrap draws.
        intersection, union, truth, prediction: areas.
        frame: of the picture, less what was left out.
        box_iou: of the boxes of prediction and truth; 0 where one of them is empty.
        label, kind: to group by.
    """

    photo: str
    intersection: int
    union: int
    truth: int
    prediction: int
    frame: int
    box_iou: float
    label: str = ""
    kind: str = ""

    @property
    def iou(self) -> float:
        """1 where both are empty."""
        return self.intersection / self.union if self.union else 1.0

    @property
    def truth_share(self) -> float:
        return self.truth / self.frame if self.frame else 0.0


def compare(
    prediction_HW: AnyMask,
    truth_HW: AnyMask,
    *,
    photo: str,
    label: str = "",
    kind: str = "",
    ignore_HW: AnyMask | None = None,
) -> Outcome:
    """Count the pixels of a prediction and a truth of equal shape.

    Args:
        ignore_HW: pixels that are left out of both, because their truth is unknown.

    Raises:
        RelayModelsError: shapes or dtypes are not as said.
    """
    if prediction_HW.shape != truth_HW.shape or (ignore_HW is not None and ignore_HW.shape != truth_HW.shape):
        shapes = [list(mask.shape) for mask in (prediction_HW, truth_HW, ignore_HW) if mask is not None]
        raise RelayModelsError(f"prediction, truth and ignore must have one shape, got {shapes} ({photo}, {label})")
    prediction, truth = _as_bool(prediction_HW), _as_bool(truth_HW)
    frame = truth.size
    if ignore_HW is not None:
        is_counted = ~_as_bool(ignore_HW)
        prediction, truth, frame = prediction & is_counted, truth & is_counted, int(is_counted.sum())
    return Outcome(
        photo,
        intersection=int((prediction & truth).sum()),
        union=int((prediction | truth).sum()),
        truth=int(truth.sum()),
        prediction=int(prediction.sum()),
        frame=frame,
        box_iou=box_iou(box(prediction), box(truth)),
        label=label,
        kind=kind,
    )


def _as_bool(mask_HW: AnyMask) -> BoolMask:
    return np.asarray(mask_HW != 0, dtype=np.bool_)


def ceiling_mask(truth_HW: BoolMask, grid: int) -> BoolMask:
    """[H, W] the best that a grid can say of a mask: the truth on the grid, and back."""
    height, width = truth_HW.shape
    return upsample(reduce_to_grid(truth_HW, grid, grid), height, width)


def box_iou(first: Box | None, second: Box | None) -> float:
    """Of half-open boxes; 0 where there is none."""
    if first is None or second is None:
        return 0.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (first, second)]
    return shared / (sum(areas) - shared)


def area_bucket(outcome: Outcome) -> str:
    """Which of `AREA_BUCKETS` the truth is in, by its share of the frame, or `NO_AREA`."""
    if not outcome.truth:
        return NO_AREA
    return next(name for name, limit in AREA_BUCKETS if outcome.truth_share < limit)


# ---------------------------------------------------------------- the scores


@dataclass(frozen=True)
class Ratio:
    """A score: over outcomes, the sum of numerators by the sum of denominators.

    Attributes:
        name: for reports.
        parts: numerator and denominator of one outcome; both 0 where it does not count.
    """

    name: str
    parts: Callable[[Outcome], tuple[float, float]]

    def __call__(self, outcomes: Iterable[Outcome]) -> float | None:
        """The score, or None where nothing counts."""
        sums = np.array([self.parts(outcome) for outcome in outcomes], dtype=np.float64).reshape(-1, 2).sum(axis=0)
        return float(sums[0] / sums[1]) if sums[1] else None

    def counted(self, outcomes: Iterable[Outcome]) -> list[Outcome]:
        """The outcomes that count: those it is defined for, though they may add nothing."""
        return [outcome for outcome in outcomes if self._is_defined(outcome)]

    def _is_defined(self, outcome: Outcome) -> bool:
        return self.parts(outcome)[1] > 0


CIOU = Ratio("cIoU", lambda outcome: (outcome.intersection, outcome.union))
"""Cumulative IoU (RefCOCO's "overall IoU"; arXiv 2306.00968, section 5.1; upstream's eval_refer_seg.py): large objects
weigh more. A mask for what is not there adds its pixels to the union; an empty one adds nothing."""

GIOU = Ratio("gIoU", lambda outcome: (outcome.iou, 1))
"""Generalised IoU (arXiv 2306.00968, section 5.1; upstream's eval_refer_seg.py): the mean over questions, where an
empty prediction for what is not there counts 1, and any other 0."""

N_ACC = Ratio("N-acc", lambda outcome: (0, 0) if outcome.truth else (not outcome.prediction, 1))
"""No-target accuracy (arXiv 2306.00968, section 5.1). An empty mask is one without a single pixel: upstream has no code
for it, and GRES's own baseline reads it from a classifier."""

T_ACC = Ratio("T-acc", lambda outcome: (outcome.prediction > 0, 1) if outcome.truth_share >= VISIBLE_SHARE else (0, 0))
"""Target accuracy over what a coarse grid can show: the truth covers at least `VISIBLE_SHARE` of the frame. A model
that answers everything with an empty mask has N-acc 1 and T-acc 0, so neither is told without the other."""

T_ACC_ALL = Ratio("T-acc (all)", lambda outcome: (outcome.prediction > 0, 1) if outcome.truth else (0, 0))
"""Target accuracy as defined (arXiv 2306.00968, section 5.1), over all that is there, however small."""

REC_ACC = Ratio("REC acc@0.5", lambda outcome: (outcome.box_iou > BOX_THRESHOLD, 1) if outcome.truth else (0, 0))
"""Accuracy of comprehension (upstream's eval_refer_comprehen.py): the box of the mask against the box of the true mask,
not against an annotated box; an empty mask is wrong. Boxes are half-open here and end at the last pixel upstream, which
differs where a side has a few pixels only."""


def confusion(
    prediction_HW: npt.NDArray[np.integer[Any]], truth_HW: npt.NDArray[np.integer[Any]], num_classes: int
) -> Counts:
    """[K, K] pixels by truth and prediction, of label maps [H, W] with values below ``num_classes``.

    Raises:
        RelayModelsError: shapes differ, or a value is not a class.
    """
    if prediction_HW.shape != truth_HW.shape:
        raise RelayModelsError(f"label maps must have one shape, got {prediction_HW.shape} and {truth_HW.shape}")
    for name, map_HW in (("prediction", prediction_HW), ("truth", truth_HW)):
        if map_HW.size and not (map_HW.min() >= 0 and map_HW.max() < num_classes):
            raise RelayModelsError(f"{name} must hold classes below {num_classes}, got up to {map_HW.max()}")
    index_N = truth_HW.astype(np.int64).ravel() * num_classes + prediction_HW.astype(np.int64).ravel()
    return np.bincount(index_N, minlength=num_classes**2).reshape(num_classes, num_classes)


class ClassCounts:
    """What label maps add up to, class by class: all that mIoU takes of them.

    Legend: K classes, 0 (`others`) being one of them; A those that one photo was asked about.
    """

    def __init__(self, num_classes: int) -> None:
        # Pixels: rightly answered, true, answered, and answered where `others` is true.
        self._hits_K, self._true_K, self._answered_K, self._invented_K = np.zeros((4, num_classes), np.int64)

    def add(self, confusion_AA: Counts, classes_A: Sequence[int] | None = None) -> None:
        """One photo's `confusion`; ``classes_A`` says which classes it is about, `others` first, if not all."""
        place_A = range(len(self._hits_K)) if classes_A is None else classes_A
        np.add.at(self._hits_K, place_A, confusion_AA.diagonal())
        np.add.at(self._true_K, place_A, confusion_AA.sum(axis=1))
        np.add.at(self._answered_K, place_A, confusion_AA.sum(axis=0))
        np.add.at(self._invented_K, place_A, confusion_AA[0])

    def mean_iou(self, *, as_published: bool = False) -> float | None:
        """The mean over classes of sum of intersections / sum of unions.

        Args:
            as_published: as upstream's eval_semantic_seg.py counts: where the truth is 0 whatever was predicted counts
                as 0, so that false foreground on background costs nothing, while class 0 is still part of the mean.

        Classes of which there is neither truth nor prediction are left out. None where there is no pixel.
        """
        hits_K, answered_K = self._hits_K.copy(), self._answered_K.copy()
        if as_published:
            answered_K -= self._invented_K
            answered_K[0] += self._true_K[0]
            hits_K[0] = self._true_K[0]
        unions_K = self._true_K + answered_K - hits_K
        is_met_K = unions_K > 0
        return float((hits_K[is_met_K] / unions_K[is_met_K]).mean()) if is_met_K.any() else None


# ---------------------------------------------------------------- how sure


@dataclass(frozen=True)
class Score:
    """A value and its 95 % interval; None where there is nothing to count.

    `n` is how many outcomes count.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def score(ratio: Ratio, outcomes: Sequence[Outcome], *, seed: int = 0, resamples: int = NUM_RESAMPLES) -> Score:
    """A score with its interval."""
    return _bootstrapped(
        [(ratio, outcomes)], lambda ratios_BK: ratios_BK[:, 0], len(ratio.counted(outcomes)), seed, resamples
    )


def score_of_ceiling(
    ratio: Ratio,
    outcomes: Sequence[Outcome],
    ceilings: Sequence[Outcome],
    *,
    seed: int = 0,
    resamples: int = NUM_RESAMPLES,
) -> Score:
    """A score divided by the score of its ceilings, resampled together.

    Args:
        outcomes, ceilings: about the same questions, in the same order.

    Raises:
        RelayModelsError: they are not.
    """
    keys = [[(item.photo, item.label, item.kind, item.truth) for item in items] for items in (outcomes, ceilings)]
    if keys[0] != keys[1]:
        raise RelayModelsError("ceilings must be about the same questions as outcomes, in the same order")
    return _bootstrapped(
        [(ratio, outcomes), (ratio, ceilings)],
        lambda ratios_BK: _divided(ratios_BK[:, 0], ratios_BK[:, 1]),
        len(ratio.counted(outcomes)),
        seed,
        resamples,
    )


def macro(
    ratio: Ratio, groups: Mapping[str, Sequence[Outcome]], *, seed: int = 0, resamples: int = NUM_RESAMPLES
) -> Score:
    """The plain mean of the scores of several groups, such as classes; `n` is how many groups there are.

    Photos are resampled once for all groups. A resample that misses a group takes the mean of the others.
    """
    if not groups:
        return Score(None, None, None, 0)
    return _bootstrapped(
        [(ratio, outcomes) for outcomes in groups.values()], _mean_over_groups, len(groups), seed, resamples
    )


def _mean_over_groups(ratios_BK: Floats) -> Floats:
    is_known_BK = ~np.isnan(ratios_BK)
    return _divided(np.where(is_known_BK, ratios_BK, 0).sum(axis=1), is_known_BK.sum(axis=1).astype(np.float64))


def _bootstrapped(
    terms: Sequence[tuple[Ratio, Sequence[Outcome]]],
    combined: Callable[[Floats], Floats],
    n: int,
    seed: int,
    resamples: int,
) -> Score:
    """``combined`` takes [B, K] ratios, one of each term, to [B] values; NaN where there is nothing to count."""
    photos = sorted({outcome.photo for _, outcomes in terms for outcome in outcomes})
    place = {photo: index for index, photo in enumerate(photos)}
    sums_PK2 = np.zeros((len(photos), len(terms), 2))
    for index, (ratio, outcomes) in enumerate(terms):
        for outcome in outcomes:
            sums_PK2[place[outcome.photo], index] += ratio.parts(outcome)
    value = _valued(np.ones((1, len(photos))), sums_PK2, combined)[0]
    if np.isnan(value):
        return Score(None, None, None, n)
    # Sorted photos and a generator of its own: the interval does not depend on the order of the outcomes.
    draws_BP = np.random.default_rng(seed).multinomial(len(photos), np.full(len(photos), 1 / len(photos)), resamples)
    values_B = _valued(draws_BP.astype(np.float64), sums_PK2, combined)
    values_B = values_B[~np.isnan(values_B)]
    if not len(values_B):
        return Score(float(value), None, None, n)
    low, high = np.quantile(values_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Score(float(value), float(low), float(high), n)


def _valued(draws_BP: Floats, sums_PK2: Floats, combined: Callable[[Floats], Floats]) -> Floats:
    sums_BK2: Floats = np.asarray(np.tensordot(draws_BP, sums_PK2, axes=1), dtype=np.float64)
    return combined(_divided(sums_BK2[..., 0], sums_BK2[..., 1]))


def _divided(numerator: Floats, denominator: Floats) -> Floats:
    """NaN for a denominator of 0."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0)

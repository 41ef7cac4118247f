"""Scores against counts by hand, against the published rules written out plainly, and intervals that hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from relay_models.errors import RelayModelsError
from relay_models.recipes.text4seg.metrics import (
    CIOU,
    GIOU,
    N_ACC,
    REC_ACC,
    T_ACC,
    T_ACC_ALL,
    ClassCounts,
    Outcome,
    area_bucket,
    box_iou,
    ceiling_mask,
    compare,
    confusion,
    macro,
    score,
    score_of_ceiling,
)


def mask(*rows: str) -> np.ndarray:
    return np.array([[letter == "x" for letter in row] for row in rows])


NOTHING = mask("....", "....", "....")
LEFT = mask("xx..", "xx..", "....")
SHIFTED = mask(".xx.", ".xx.", "....")
ALL = mask("xxxx", "xxxx", "xxxx")


def outcomes(*pairs: tuple[np.ndarray, np.ndarray]) -> list[Outcome]:
    return [compare(first, second, photo=f"p{index}") for index, (first, second) in enumerate(pairs)]


# ---------------------------------------------------------------- by hand


def test_pixels_are_counted():
    outcome = compare(SHIFTED, LEFT.astype(np.uint8) * 7, photo="p", label="cat", kind="class")
    assert outcome == Outcome("p", 2, 6, 4, 4, 12, 1 / 3, "cat", "class")
    assert outcome.iou == 1 / 3
    assert outcome.truth_share == 1 / 3


def test_pixels_of_unknown_truth_are_left_out_of_both():
    outcome = compare(ALL, LEFT, photo="p", ignore_HW=mask("x...", "x...", "xxxx"))
    assert (outcome.intersection, outcome.union, outcome.truth, outcome.prediction) == (2, 6, 2, 6)
    assert outcome.frame == 6
    assert compare(ALL, ALL, photo="p", ignore_HW=ALL).truth_share == 0


def test_each_score_by_hand():
    found = outcomes((SHIFTED, LEFT), (NOTHING, NOTHING), (LEFT, NOTHING), (NOTHING, LEFT), (ALL, ALL))
    assert CIOU(found) == (2 + 0 + 0 + 0 + 12) / (6 + 0 + 4 + 4 + 12)
    assert GIOU(found) == pytest.approx((1 / 3 + 1 + 0 + 0 + 1) / 5)
    assert N_ACC(found) == 1 / 2
    assert T_ACC_ALL(found) == 2 / 3
    assert REC_ACC(found) == 1 / 3


def test_small_truths_count_for_plain_target_accuracy_only():
    large = np.zeros((40, 40), bool)
    small, limit = large.copy(), large.copy()
    small[0, :15] = True
    limit[0, :16] = True  # exactly 1 % of the frame
    found = outcomes((large, small), (large, limit), (limit, limit))
    assert T_ACC(found) == 1 / 2
    assert T_ACC_ALL(found) == 1 / 3
    assert len(T_ACC.counted(found)) == 2


def test_where_nothing_counts_there_is_no_score():
    assert CIOU([]) is None
    assert CIOU(outcomes((NOTHING, NOTHING))) is None
    assert N_ACC(outcomes((ALL, ALL))) is None
    assert score(N_ACC, outcomes((ALL, ALL))).value is None
    assert str(score(N_ACC, [])) == "-"


def test_boxes_are_half_open_and_must_overlap_by_more_than_half():
    assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == 1 / 3
    assert box_iou((0, 0, 2, 2), (2, 0, 3, 2)) == 0
    assert box_iou(None, (0, 0, 1, 1)) == 0
    half = outcomes((mask("xx..", "....", "...."), mask("xxxx", "....", "....")))
    assert half[0].box_iou == 0.5
    assert REC_ACC(half) == 0
    # The boxes agree although the masks do not: comprehension is of boxes.
    corners = outcomes((mask("x...", "....", "...x"), ALL))
    assert REC_ACC(corners) == 1
    assert REC_ACC(outcomes((NOTHING, LEFT))) == 0


@pytest.mark.parametrize(
    ("side", "bucket"), [(9, "<1 %"), (10, "1-5 %"), (22, "1-5 %"), (30, "5-20 %"), (45, ">=20 %")]
)
def test_area_buckets(side, bucket):
    truth = np.zeros((100, 100), bool)
    truth[:side, :side] = True
    assert area_bucket(compare(truth, truth, photo="p")) == bucket


def test_an_empty_truth_has_a_bucket_of_its_own():
    assert area_bucket(compare(ALL, NOTHING, photo="p")) == "empty"


def test_the_ceiling_is_what_the_grid_can_say():
    truth = np.zeros((32, 48), bool)
    truth[8:24, 12:36] = True
    np.testing.assert_array_equal(ceiling_mask(truth, 16), truth)
    truth[8:24, 12:36] = False
    truth[0, 0] = True  # the nearest pixel of the cell is another
    assert not ceiling_mask(truth, 16).any()


def test_shapes_must_agree():
    with pytest.raises(RelayModelsError, match=r"\[3, 4\], \[1, 4\].*here, cat"):
        compare(LEFT, LEFT[:1], photo="here", label="cat")
    with pytest.raises(RelayModelsError, match="one shape"):
        compare(LEFT, LEFT, photo="here", ignore_HW=LEFT[:1])


# ---------------------------------------------------------------- mIoU


def plain_mean_iou(pairs, num_classes: int, as_published: bool) -> float:
    """The rule written out, class by class."""
    scores = []
    for number in range(num_classes):
        intersection = union = 0
        for prediction, truth in pairs:
            if as_published:
                prediction = np.where(truth == 0, 0, prediction)
            intersection += ((prediction == number) & (truth == number)).sum()
            union += ((prediction == number) | (truth == number)).sum()
        if union:
            scores.append(intersection / union)
    return float(np.mean(scores))


def mean_iou(pairs, num_classes: int, **how: bool) -> float | None:
    counts = ClassCounts(num_classes)
    for prediction, truth in pairs:
        counts.add(confusion(prediction, truth, num_classes))
    return counts.mean_iou(**how)


@pytest.mark.parametrize("as_published", [False, True])
def test_mean_iou_is_the_rule_written_out(as_published):
    rng = np.random.default_rng(0)
    for _ in range(20):
        pairs = [(rng.integers(0, 4, (6, 7)), rng.integers(0, 4, (6, 7))) for _ in range(3)]
        assert mean_iou(pairs, 6, as_published=as_published) == pytest.approx(plain_mean_iou(pairs, 6, as_published))


def test_published_mean_iou_forgives_false_foreground_but_counts_the_background():
    truth = np.array([[0, 0, 0, 0, 1, 1]])
    prediction = np.array([[1, 1, 0, 0, 0, 1]])
    assert mean_iou([(prediction, truth)], 2) == pytest.approx((2 / 5 + 1 / 4) / 2)
    assert mean_iou([(prediction, truth)], 2, as_published=True) == pytest.approx((4 / 5 + 1 / 2) / 2)


def test_mean_iou_refuses_what_is_no_class():
    with pytest.raises(RelayModelsError, match="below 2, got up to 2"):
        mean_iou([(np.array([[2]]), np.array([[0]]))], 2)
    with pytest.raises(RelayModelsError, match="one shape"):
        mean_iou([(np.zeros((1, 2), int), np.zeros((2, 1), int))], 2)
    assert mean_iou([], 3) is None


# ---------------------------------------------------------------- intervals


def made(rng: np.random.Generator, count: int, chance: float, photos: int | None = None) -> list[Outcome]:
    """Outcomes of which each is right with a chance: intersection 1 of union 1, or 0 of 1."""
    return [
        Outcome(f"p{index % (photos or count)}", int(rng.random() < chance), 1, 1, 1, 10, 0.0) for index in range(count)
    ]


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = [score(CIOU, made(rng, 80, 0.6), seed=seed, resamples=400) for seed in range(200)]
    share = np.mean([one.low <= 0.6 <= one.high for one in held])
    assert 0.90 <= share <= 0.985


def test_an_interval_is_the_same_for_a_seed_and_in_any_order():
    found = made(np.random.default_rng(1), 40, 0.5)
    assert score(CIOU, found, seed=3) == score(CIOU, found[::-1], seed=3)
    assert score(CIOU, found, seed=3, resamples=9) != score(CIOU, found, seed=4, resamples=9)


def test_an_interval_is_the_same_in_any_process():
    """Sets of names are in another order in each; the figures of a report must not be."""
    found = [Outcome(f"p{index}", index, 20 + index * index, 1, 1, 999, 0.0) for index in range(12)]
    one = score(CIOU, found)
    assert one.value == 66 / (240 + 506)
    assert (round(one.low, 6), round(one.high, 6)) == (0.079591, 0.097726)


def test_photos_are_drawn_and_not_questions():
    """Ten equal questions about each photo say no more than one."""
    few = made(np.random.default_rng(2), 30, 0.5)
    many = [replace(outcome, label=str(index)) for outcome in few for index in range(10)]
    one, ten = score(CIOU, few, seed=0), score(CIOU, many, seed=0)
    assert (one.low, one.high) == (ten.low, ten.high)
    assert (one.n, ten.n) == (30, 300)


def test_a_score_of_its_ceiling_is_surer_than_its_parts():
    rng = np.random.default_rng(3)
    best = [Outcome(f"p{index}", int(rng.integers(50, 100)), 100, 100, 100, 999, 0.0) for index in range(30)]
    half = [replace(outcome, intersection=outcome.intersection // 2) for outcome in best]
    ratio = score_of_ceiling(CIOU, half, best)
    assert ratio.value == pytest.approx(0.5, abs=0.01)
    assert ratio.high - ratio.low < 0.02
    assert ratio.low <= ratio.value <= ratio.high
    with pytest.raises(RelayModelsError, match="same questions"):
        score_of_ceiling(CIOU, half, best[::-1])


def test_macro_is_the_plain_mean_and_draws_photos_once():
    groups = {
        "cat": [Outcome("a", 1, 2, 1, 1, 10, 0.0), Outcome("b", 1, 2, 1, 1, 10, 0.0)],
        "dog": [Outcome("a", 90, 100, 1, 1, 999, 0.0)],
    }
    found = macro(CIOU, groups)
    assert found.value == pytest.approx((0.5 + 0.9) / 2)
    assert found.n == 2
    # A resample without photo `a` has cats only.
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.7)
    assert macro(CIOU, {}).value is None


def test_a_score_is_written_with_its_interval():
    assert str(score(CIOU, [Outcome("a", 1, 2, 1, 1, 10, 0.0)])) == "0.500 [0.500, 0.500]"

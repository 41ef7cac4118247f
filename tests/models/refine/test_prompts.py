"""Points, boxes and logits of coarse masks, the odd ones included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from relay_models.errors import RelayModelsError
from relay_models.refine.frame import Frame
from relay_models.refine.prompts import (
    BACKGROUND,
    FOREGROUND,
    LARGEST_LOGIT,
    Style,
    draw_points,
    mask_logits,
    prompt_of,
)

small_masks = arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@settings(deadline=None)
@given(small_masks, st.integers(0, 3))
def test_points_lie_where_their_labels_say_and_none_is_drawn_twice(mask_HW, seed):
    points_P2, labels_P = draw_points(mask_HW, seed=seed)
    inside, outside = int(mask_HW.sum()), int((~mask_HW).sum())
    assert list(labels_P) == [FOREGROUND] * min(10, inside) + [BACKGROUND] * min(10, outside)
    for (x, y), label in zip(points_P2, labels_P, strict=True):
        assert mask_HW[y, x] == (label == FOREGROUND)
    assert len({tuple(point) for point in points_P2.tolist()}) == len(points_P2)


def test_a_seed_draws_the_same_and_another_one_does_not():
    mask_HW = np.zeros((90, 120), dtype=bool)
    mask_HW[20:60, 30:90] = True
    first, again, other = (draw_points(mask_HW, seed=seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_every_pixel_of_the_mask_can_be_drawn():
    mask_HW = np.zeros((3, 4), dtype=bool)
    mask_HW[0, 3] = mask_HW[2, 0] = mask_HW[2, 2] = True
    drawn = {tuple(point) for seed in range(40) for point in draw_points(mask_HW, count=1, seed=seed)[0][:1].tolist()}
    assert drawn == {(3, 0), (0, 2), (2, 2)}


def test_the_mask_of_one_pixel_is_a_prompt():
    mask_HW = np.zeros((40, 64), dtype=bool)
    mask_HW[7, 9] = True
    prompt = prompt_of(mask_HW, Frame(40, 64), Style.POINTS_BOX_LOGITS)
    assert prompt is not None
    assert prompt.labels_P.sum() == 1
    np.testing.assert_allclose(prompt.points_P2[0], [144, 112])  # 16 times as large
    np.testing.assert_allclose(prompt.box, [144, 112, 144, 112])
    assert 3 < prompt.logits_MM.max() < LARGEST_LOGIT  # enlarged fourfold, its peak lies between centres


def test_a_full_mask_has_no_points_outside():
    prompt = prompt_of(np.ones((40, 64), dtype=bool), Frame(40, 64), Style.POINTS_LOGITS)
    assert set(prompt.labels_P) == {FOREGROUND}
    inside = prompt.logits_MM[:160]
    np.testing.assert_allclose(inside, LARGEST_LOGIT, atol=1e-4)
    assert not prompt.logits_MM[160:].any()


def test_an_empty_mask_is_no_prompt():
    assert prompt_of(np.zeros((40, 64), dtype=bool), Frame(40, 64), Style.BOX) is None


def test_a_style_gives_what_it_says():
    mask_HW = np.ones((40, 64), dtype=bool)
    for style in Style:
        prompt = prompt_of(mask_HW, Frame(40, 64), style)
        given = (prompt.points_P2 is not None, prompt.box is not None, prompt.logits_MM is not None)
        assert given == tuple(word in style.label for word in ("points", "box", "logits"))
    assert Style.POINTS_LOGITS.passes == 3


def test_bytes_count_as_bools():
    mask_HW = np.zeros((40, 64), dtype=bool)
    mask_HW[5:9, 5:50] = True
    np.testing.assert_array_equal(mask_logits(mask_HW), mask_logits(mask_HW.astype(np.uint8) * 255))


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(RelayModelsError, match="mask is 3x4, not 4x3 as its picture"):
        prompt_of(np.ones((3, 4), dtype=bool), Frame(4, 3), Style.BOX)

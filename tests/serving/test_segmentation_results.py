"""From descriptors to results: scores of each label, masks one at a time, answers that are all background."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from relay_models.text4seg.codec import Answer, decode_answer
from relay_serving.schemas.segmentation import MaskFormat
from relay_serving.segmentation.results import MaskOptions, label_probability, masks_of, result_of

BLOCK = "<seg>cat *1| dog *1\n others *1| cat *1\n</seg>"
RLE = MaskOptions(MaskFormat.COCO_RLE, components=False)


def answer_of(text: str) -> Answer:
    return decode_answer(text, height=2, width=2)


def scored(pieces: list[tuple[str, float]], label: str | None, block: int = 0) -> float | None:
    return label_probability(pieces, answer_of("".join(text for text, _ in pieces)), block, label)


PIECES = [
    ("It is a cat:", 0.01), ("<seg>", 0.02), ("cat", 0.9), (" *", 0.03), ("1", 0.03), ("| ", 0.03),
    ("do", 0.4), ("g", 0.6), (" *1", 0.03), ("\n ", 0.03), ("others", 0.2), (" *1", 0.03), ("|", 0.03), (" cat", 0.7),
    (" *1\n", 0.03), ("</seg>", 0.04),
]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "expected"), [("cat", 0.8), ("dog", 0.5), ("bird", 0.2), (None, 0.2), ("others", 0.2)]
)
def test_a_label_is_scored_by_its_own_tokens(label: str | None, expected: float) -> None:
    """And one that is nowhere by those of the background."""
    assert scored(PIECES, label) == expected


def test_a_token_of_half_a_character_counts_with_the_character() -> None:
    pieces = [("<seg>", 0.1), ("", 0.2), ("", 0.4), ("猫", 0.6), (" *2\n 猫", 0.8), (" *2\n</seg>", 0.1)]
    assert scored(pieces, "猫") == 0.5


def test_a_second_descriptor_is_scored_by_its_own_tokens() -> None:
    once = [("<seg>", 0.1), ("cat", 0.9), (" *2\n ", 0.1), ("cat", 0.9), (" *2\n</seg>", 0.1)]
    again = [("<seg>", 0.1), ("cat", 0.3), (" *2\n ", 0.1), ("cat", 0.3), (" *2\n</seg>", 0.1)]
    assert [scored(once + again, "cat", block) for block in (0, 1)] == [0.9, 0.3]


def test_an_answer_that_is_all_background_is_an_empty_mask_with_its_grid_and_repairs() -> None:
    (descriptor,) = answer_of("<seg>others *1\n others *2\n</seg>").descriptors
    (found,) = masks_of(descriptor, 6, 4, None)
    result = result_of(found, descriptor, RLE, index=0, image_index=0, query_index=0)
    assert (result.label, result.empty, result.area, result.box, result.grid) == (None, True, 0, None, (2, 2))
    assert result.mask is not None
    assert result.mask["size"] == [6, 4]
    assert (result.status, result.repairs) == ("repaired", ["row_short"])


def test_masks_are_made_one_at_a_time() -> None:
    (descriptor,) = answer_of(BLOCK).descriptors
    found = masks_of(descriptor, 4, 4, None)
    assert isinstance(found, Iterator)
    first, second = found
    assert (first.label, second.label) == ("cat", "dog")
    np.testing.assert_array_equal(first.mask_HW[::2, ::2], [[1, 0], [0, 1]])

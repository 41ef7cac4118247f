"""How relay-seg's answers tell their rows apart: by tokens, not by text.

A descriptor (arXiv 2410.09855) says no row numbers, and small models learn to count slowly. So the number is in how
` others` is cut into tokens: whole in the first row, as `ROW_MARKS` says in the rows after it. The text is the same; a
model reads off its last row how far it is. Rows without background say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from relay_models.text4seg.labels import BACKGROUND

ROW_MARKS = (
    " others",
    " |others",
    " ot|hers",
    " other|s",
    " |ot|hers",
    " |oth|ers",
    " |othe|rs",
    " |other|s",
    " o|t|hers",
    " o|th|ers",
    " o|the|rs",
    " o|ther|s",
    " ot|h|ers",
    " ot|he|rs",
    " ot|her|s",
)

assert {mark.replace("|", "") for mark in ROW_MARKS} == {f" {BACKGROUND}"}


def pieces_of(mark: str) -> list[str]:
    return mark.split("|")


def mark_tokens(vocabulary: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
    """The tokens of each mark: ``[0]`` those of the second row.

    Args:
        vocabulary: of a byte-level BPE, in which a space is written as U+0120; KeyError where a piece is no token.
    """
    return tuple(tuple(vocabulary[piece.replace(" ", "\u0120")] for piece in pieces_of(mark)) for mark in ROW_MARKS)

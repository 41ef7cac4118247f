"""What the tests of the codec share: golden vectors, grids, labels, and a second writer of the three formats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from relay_models.errors import LabelError
from relay_models.text4seg.codec import Answer, Descriptor, DescriptorFormat
from relay_models.text4seg.labels import check_label, match_key

GOLDEN = Path(__file__).parents[3].parent / "shared" / "golden" / "text4seg"

Cells = list[list[str]]


def golden(*path: str) -> Path:
    """A file of the golden vectors; skips the test where they are absent."""
    file = GOLDEN.joinpath(*path)
    if not file.exists():
        pytest.skip(f"the golden vectors are not beside this checkout: {file} is missing")
    return file


def golden_json(*path: str) -> Any:
    return json.loads(golden(*path).read_text())


def cells_of(descriptor: Descriptor) -> Cells:
    """The label of every cell."""
    return [[descriptor.labels[index] for index in row] for row in descriptor.grid_HW.tolist()]


def facts_of(answer: Answer) -> list[tuple[Any, ...]]:
    """Everything an answer says, comparable."""
    return [
        (answer.text, answer.status, answer.num_dropped_blocks),
        *[
            (
                found.labels,
                cells_of(found),
                found.status,
                found.repairs,
                found.text,
                found.preamble,
                found.num_rows_read,
            )
            for found in answer.descriptors
        ],
    ]


def written(cells: Cells, format: DescriptorFormat) -> str:
    """The body for these cells, straight from the definition of the format and without its encoder."""
    if format is DescriptorFormat.R_RLE:
        return "".join(("\n " if number else "") + _runs(row) for number, row in enumerate(cells)) + "\n"
    flat = [label for row in cells for label in row]
    return _runs(flat) if format is DescriptorFormat.I_RLE else "| ".join(flat)


def _runs(cells: Sequence[str]) -> str:
    text, count = "", 0
    for position, label in enumerate(cells):
        count += 1
        if position + 1 == len(cells) or cells[position + 1] != label:
            text += ("| " if text else "") + label + " *" + str(count)
            count = 0
    return text


def is_carried(label: str) -> bool:
    try:
        check_label(label)
    except LabelError:
        return False
    return True


# Every character that means something to the format, and some that change under NFKC, case folding or whitespace rules.
_LABEL_CHARACTERS = "ab*|<>/seg 0129,%'\\\n\t\u00a0\u2028éßＡ４½²ﬁİ狗🐕¦∗‹↵⧵;"
raw_labels = st.one_of(st.text(_LABEL_CHARACTERS, max_size=12), st.text(max_size=8))
carried_labels = raw_labels.filter(is_carried)

sides = st.sampled_from((1, 2, 3, 5, 7, 13, 16, 24, 32, 64))


@st.composite
def labelled_grids(draw: st.DrawFn, max_side: int = 64) -> tuple[np.ndarray, list[str]]:
    """A grid, square or not, in patches or speckled, and labels of which `others` may be one."""
    height, width = (min(draw(sides), max_side) for _ in range(2))
    objects = draw(st.lists(carried_labels, min_size=1, max_size=5, unique_by=match_key))
    labels = [label for label in objects if match_key(label) != "others"]
    if not labels or draw(st.booleans()):
        labels.insert(draw(st.integers(0, len(labels))), "others")
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cells = random.integers(0, len(labels), (height, width))
    patch = draw(st.sampled_from((1, 1, 4, 64)))
    return cells[np.ix_(np.arange(height) // patch, np.arange(width) // patch)], labels


def text_cells(cells_HW: np.ndarray, labels: Sequence[str]) -> Cells:
    return [[labels[index] for index in row] for row in cells_HW.tolist()]

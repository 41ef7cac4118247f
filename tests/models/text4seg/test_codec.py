"""The codec: byte for byte on good text, row for row on bad text, the same from a stream, bounded on hostile text."""

from __future__ import annotations

import sys
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from codec_cases import cells_of, facts_of, golden_json, is_carried, labelled_grids, text_cells, written
from decode_benchmark import masks_and_seconds, sample_descriptors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay_models.errors import LabelError, RelayModelsError
from relay_models.text4seg.codec import (
    BACKGROUND,
    CLOSE_TAG,
    MAX_BLOCKS,
    MAX_SIDE,
    OPEN_TAG,
    DescriptorFormat,
    DescriptorStatus,
    Repair,
    StreamDecoder,
    decode,
    decode_answer,
    decode_on_its_own_grid,
    encode,
    infer_grid,
)
from relay_models.text4seg.geometry import upsample
from relay_models.text4seg.labels import MAX_LABEL_LENGTH, match_key

FORMATS = list(DescriptorFormat)
GOOD_ROWS = ["others *4", "cat *2| others *2", "others *1| cat *2| dog, brown *1", "others *2| dog, brown *2"]
GOOD_BODY = "\n ".join(GOOD_ROWS) + "\n"
GOOD_CELLS = [
    ["others"] * 4,
    ["cat", "cat", "others", "others"],
    ["others", "cat", "cat", "dog, brown"],
    ["others", "others", "dog, brown", "dog, brown"],
]


def with_row(row: str, number: int = 1) -> str:
    """The good body with one row written differently."""
    return "\n ".join([*GOOD_ROWS[:number], row, *GOOD_ROWS[number + 1 :]]) + "\n"


# ---------------------------------------------------------------- golden vectors


@pytest.mark.parametrize("format", FORMATS)
def test_golden_maps_and_their_text_are_one(format):
    maps, texts = golden_json("codec_valid", "maps.json"), golden_json("codec_valid", "strings.json")
    assert len(maps) == 60
    for case in maps:
        text = texts[case["id"]][format.value]
        cells = np.array(case["grid"])
        assert encode(cells, case["labels"], format) == text, case["id"]
        descriptor = decode(text, height=case["h"], width=case["w"], format=format)
        assert descriptor.status is DescriptorStatus.COMPLETE, case["id"]
        assert cells_of(descriptor) == text_cells(cells, case["labels"]), case["id"]
        assert encode(descriptor.grid_HW, descriptor.labels, format) == text, case["id"]


def test_published_answers_are_read_and_written_byte_for_byte():
    for case in golden_json("published_examples", "examples.json"):
        answer = decode_answer(case["response"], height=case["h"], width=case["w"])
        (descriptor,) = answer.descriptors
        assert answer.status is DescriptorStatus.COMPLETE
        assert cells_of(descriptor) == text_cells(np.array(case["grid"]), case["labels"])
        body = encode(descriptor.grid_HW, descriptor.labels)
        assert f"{descriptor.preamble}{OPEN_TAG}{body}{CLOSE_TAG}" == case["response"]
        assert infer_grid(body) == (case["h"], case["w"])
        for label in case["labels"]:
            expected = [[name == label for name in row] for row in cells_of(descriptor)]
            assert descriptor.mask(label).tolist() == expected


# The golden vectors leave these open; COMPLETE is for exact text only.
OUR_READING = {"a25": ["separator"], "a50": ["label_normalised"]}


def test_golden_faults_are_repaired_as_they_should_be():
    cases = golden_json("malformed", "cases.json")
    assert len(cases) == 51
    for case in cases:
        expected = case["robust"]
        answer = decode_answer(case["text"], height=case["h"], width=case["w"], labels=case["requested_labels"] or None)
        free = {(row, column) for row, column in expected["free_cells"]}
        for descriptor, grid in zip(answer.descriptors, expected["grids"], strict=True):
            for row, column in np.ndindex(case["h"], case["w"]):
                if (row, column) not in free:
                    assert cells_of(descriptor)[row][column] == grid[row][column], (case["id"], row, column)
        repairs = {repair.value for descriptor in answer.descriptors for repair in descriptor.repairs}
        assert sorted(repairs) == OUR_READING.get(case["id"], expected["flags"]), case["id"]
        assert (answer.status is DescriptorStatus.NONE) == (expected["status"] == "no_segmentation"), case["id"]
        assert (answer.status is DescriptorStatus.COMPLETE) == (not repairs and bool(answer.descriptors)), case["id"]


# ---------------------------------------------------------------- good text


@settings(max_examples=150, deadline=None)
@given(grid=labelled_grids(), format=st.sampled_from(FORMATS), is_closed_set=st.booleans())
def test_a_grid_comes_back_from_its_text(grid, format, is_closed_set):
    cells, labels = grid
    text = encode(cells, labels, format)
    requested = labels if is_closed_set else None
    descriptor = decode(text, height=cells.shape[0], width=cells.shape[1], labels=requested, format=format)
    assert cells_of(descriptor) == text_cells(cells, labels)
    assert (descriptor.status, descriptor.repairs) == (DescriptorStatus.COMPLETE, ())
    assert descriptor.num_rows_read == len(cells)
    if is_closed_set:
        assert descriptor.labels == (BACKGROUND, *[label for label in labels if label != BACKGROUND])


@settings(max_examples=150, deadline=None)
@given(grid=labelled_grids(), format=st.sampled_from(FORMATS))
def test_text_comes_back_from_its_grid(grid, format):
    cells, labels = grid
    text = written(text_cells(cells, labels), format)
    descriptor = decode(text, height=cells.shape[0], width=cells.shape[1], format=format)
    assert encode(descriptor.grid_HW, descriptor.labels, format) == text
    if format is DescriptorFormat.R_RLE:
        assert infer_grid(text) == cells.shape


def test_the_background_is_class_0_wherever_it_stands_and_nothing_else_is():
    assert decode("cat *2\n OTHERS *2\n", height=2, width=2).labels == ("others", "cat")
    full = decode("cat *2\n cat *2\n", height=2, width=2)
    assert full.labels == ("others", "cat")
    assert full.mask("CAT").tolist() == [[1, 1], [1, 1]]
    assert full.mask("others").tolist() == [[0, 0], [0, 0]]
    closed = decode("zebra *1| grass *1\n", height=1, width=2, labels=["grass", "Others", "zebra"])
    assert closed.labels == ("others", "grass", "zebra")
    assert closed.grid_HW.tolist() == [[2, 1]]


def test_a_requested_label_is_found_by_name_and_reported_as_requested():
    descriptor = decode("ＤＯＧ,  brown *2| cow *1\n", height=1, width=3, labels=["Dog, Brown", "cat"])
    assert cells_of(descriptor) == [["Dog, Brown", "Dog, Brown", "others"]]
    assert descriptor.repairs == (Repair.LABEL_NORMALISED, Repair.UNKNOWN_LABEL)
    assert descriptor.index_of("dog, BROWN") == 1
    assert descriptor.index_of("cow") is None
    assert descriptor.mask("cow").sum() == 0


def test_a_label_stands_as_it_was_first_written_and_keeps_its_compatibility_form():
    descriptor = decode("m² of  sea *1| M2 OF SEA *1\n", height=1, width=2)
    assert descriptor.labels == ("others", "m² of sea")
    assert descriptor.grid_HW.tolist() == [[1, 1]]
    assert descriptor.repairs == (Repair.LABEL_NORMALISED,)
    exact = decode("m² *2\n", height=1, width=2)
    assert (exact.labels, exact.status) == (("others", "m²"), DescriptorStatus.COMPLETE)


def test_a_descriptor_is_a_value_that_nobody_can_change():
    descriptor = decode(GOOD_BODY, height=4, width=4)
    assert descriptor.grid_HW.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        descriptor.grid_HW[0, 0] = 1
    assert descriptor.mask("cat").dtype == np.uint8


@pytest.mark.parametrize(
    ("cells", "labels", "refusal"),
    [
        (np.array([[0, 1]]), ["cat", "a|b"], "'a|b' contains"),
        (np.array([[0, 1]]), ["cat", "Cat"], "'cat' and 'Cat' are the same class"),
        (np.array([[0, 1]]), ["cat", "OTHERS"], "'OTHERS' is read as the background"),
        (np.array([[0, 1]]), "cat", "got the string 'cat'"),
        (np.array([[0, 2]]), ["others", "cat"], "index 2 labels, got values from 0 to 2"),
        (np.array([[-1, 0]]), ["others", "cat"], "got values from -1 to 0"),
        (np.array([0, 1]), ["others", "cat"], r"grid of integers, got shape \(2,\)"),
        (np.array([[0.0, 1.0]]), ["others", "cat"], "dtype float64"),
        (np.zeros((0, 4), dtype=int), ["others"], "height of the grid .* got 0"),
        (np.zeros((4, 256), dtype=int), ["others"], "width of the grid .* got 256"),
    ],
)
def test_what_would_not_come_back_is_not_written(cells, labels, refusal):
    with pytest.raises(RelayModelsError, match=refusal):
        encode(cells, labels)


@pytest.mark.parametrize(
    ("height", "width", "named"), [(0, 4, "height"), (4, -1, "width"), (MAX_SIDE + 1, 4, "height")]
)
def test_a_grid_that_is_none_is_refused_by_name(height, width, named):
    for call in (decode, decode_answer):
        with pytest.raises(RelayModelsError, match=named):
            call("", height=height, width=width)
    with pytest.raises(RelayModelsError, match=named):
        StreamDecoder(height, width)


@pytest.mark.parametrize(
    ("labels", "refusal"),
    [
        ("cat", "got the string 'cat'"),
        ([f"label {number}" for number in range(MAX_SIDE**2 + 1)], "at most 65025, one for each cell, got 65026"),
    ],
)
def test_labels_that_are_no_list_of_classes_are_refused(labels, refusal):
    for call in (decode, decode_answer):
        with pytest.raises(LabelError, match=refusal):
            call("", height=4, width=4, labels=labels)
    with pytest.raises(LabelError, match=refusal):
        StreamDecoder(4, 4, labels)


# ---------------------------------------------------------------- bad text


@pytest.mark.parametrize("count", ["0", "-1", "1_6", "４", "+4", "²", "٤", "1e3", "0x4", "four", "", "4.0", "4 4"])
def test_a_count_is_ascii_digits_and_nothing_else(count):
    descriptor = decode(with_row(f"dog *{count}| cat *2| others *2"), height=4, width=4)
    assert cells_of(descriptor) == GOOD_CELLS
    assert descriptor.repairs == (Repair.BAD_RUN,)


@pytest.mark.parametrize("count", ["5", "99", "65536", "1000000000", "9" * 5000, "18446744073709551617"])
def test_a_count_beyond_the_row_is_capped(count):
    descriptor = decode(with_row(f"cat *{count}"), height=4, width=4)
    assert cells_of(descriptor) == [GOOD_CELLS[0], ["cat"] * 4, *GOOD_CELLS[2:]]
    assert descriptor.repairs == (Repair.ROW_LONG,)


def test_the_count_follows_the_last_star():
    assert cells_of(decode("5 *3 sign *2| a*1 *1| 7 * 1\n", height=1, width=4)) == [
        ["5 *3 sign", "5 *3 sign", "a*1", "7"]
    ]


@pytest.mark.parametrize(
    ("row", "repairs"),
    [
        ("cat *2| others *2", ()),
        ("cat *1| cat *1| others *2", (Repair.SEPARATOR,)),
        ("cat *02| others *2", (Repair.SEPARATOR,)),
        ("cat *2|others *2", (Repair.SEPARATOR,)),
        ("cat *2 | others *2", (Repair.SEPARATOR,)),
        ("cat *2|  others *2", (Repair.SEPARATOR,)),
        (" cat *2| others *2", (Repair.SEPARATOR,)),
        ("cat*2| others* 2", (Repair.SEPARATOR,)),
        ("cat *2|| others *2|", (Repair.SEPARATOR,)),
        ("cat *2| others *2\r", (Repair.SEPARATOR,)),
        ("cat *2| others *2\n", (Repair.SEPARATOR,)),
        ("cat *2| Others *2", (Repair.LABEL_NORMALISED,)),
        ("cat *2| others *1", (Repair.ROW_SHORT,)),
        ("cat *2| others *2| dog *1", (Repair.ROW_LONG,)),
        ("cat *2| others *2| nonsense", (Repair.ROW_LONG,)),
        ("cat *2| *1| others *2", (Repair.BAD_RUN,)),
        ("cat *1| dog *0| cat *1| others *2", (Repair.BAD_RUN,)),
        ("cat *2| " + "x" * (MAX_LABEL_LENGTH + 1) + " *1| others *2", (Repair.BAD_RUN,)),
    ],
)
def test_a_row_that_means_the_same_says_how_it_differs(row, repairs):
    descriptor = decode(with_row(row), height=4, width=4)
    assert cells_of(descriptor) == GOOD_CELLS
    assert descriptor.repairs == repairs


@pytest.mark.parametrize(
    ("body", "repairs"),
    [
        (GOOD_BODY + " ", (Repair.SEPARATOR,)),
        (GOOD_BODY + "\n", (Repair.SEPARATOR,)),
        (" " + GOOD_BODY, (Repair.SEPARATOR,)),
        ("\n" + GOOD_BODY, (Repair.SEPARATOR,)),
        (GOOD_BODY[:-1], (Repair.SEPARATOR,)),
        (GOOD_BODY + " cat *4\n", (Repair.ROWS_EXTRA,)),
        (GOOD_BODY + "nonsense", (Repair.ROWS_EXTRA,)),
    ],
)
def test_a_body_that_means_the_same_says_how_it_differs(body, repairs):
    descriptor = decode(body, height=4, width=4)
    assert cells_of(descriptor) == GOOD_CELLS
    assert descriptor.repairs == repairs
    assert descriptor.status is DescriptorStatus.REPAIRED


@settings(max_examples=300, deadline=None)
@given(
    grid=labelled_grids(max_side=16),
    row=st.text("cat others*|0159 -\t\rＡ", max_size=30),
    data=st.data(),
)
def test_a_bad_row_changes_no_other(grid, row, data):
    """Nor is it lost: unless it is blank, the rows below it keep their places."""
    cells, labels = grid
    height, width = cells.shape
    lines = written(text_cells(cells, labels), DescriptorFormat.R_RLE).split("\n")
    number = data.draw(st.integers(0, height - 1))
    lines[number] = row if row.strip() else "x"
    descriptor = decode("\n".join(lines), height=height, width=width, labels=data.draw(st.sampled_from((None, labels))))
    kept = [position for position in range(height) if position != number]
    canonical = [[_first_spelling(label, labels) for label in cells_of(descriptor)[position]] for position in kept]
    assert canonical == [text_cells(cells, labels)[position] for position in kept]
    assert descriptor.num_rows_read == height


def _first_spelling(label: str, labels: list[str]) -> str:
    """The bad row may be the first to spell a label, and then its spelling is the one reported."""
    return next((name for name in labels if match_key(name) == match_key(label)), label)


def test_short_rows_repeat_their_own_label_and_missing_rows_are_background():
    descriptor = decode("cat *4\n dog *1\n nonsense\n", height=5, width=4)
    assert cells_of(descriptor) == [["cat"] * 4, ["dog"] * 4, *[["others"] * 4] * 3]
    assert descriptor.repairs == (Repair.ROW_SHORT, Repair.ROWS_MISSING, Repair.BAD_RUN)
    assert descriptor.num_rows_read == 3


@pytest.mark.parametrize(
    ("end", "last_row", "repairs"),
    [
        ("\n", None, ()),
        ("\n ", None, ()),
        ("\n othe", ["others"] * 2, (Repair.PARTIAL_RUN_DROPPED,)),
        ("\n cat *", ["others"] * 2, (Repair.PARTIAL_RUN_DROPPED,)),
        ("\n cat *1", ["others"] * 2, (Repair.PARTIAL_RUN_DROPPED,)),
        ("\n cat *2", ["cat"] * 2, ()),
        ("\n cat *20", ["cat"] * 2, (Repair.ROW_LONG,)),
        ("\n cat *1| ", ["cat", "others"], (Repair.PARTIAL_RUN_DROPPED,)),
        ("\n cat *1| do", ["cat", "others"], (Repair.PARTIAL_RUN_DROPPED,)),
        ("\n cat *1| dog *1", ["cat", "dog"], ()),
    ],
)
def test_text_that_was_cut_keeps_what_is_certain(end, last_row, repairs):
    descriptor = decode("cat *2" + end, height=3, width=2, is_closed=False)
    assert cells_of(descriptor)[0] == ["cat"] * 2
    assert cells_of(descriptor)[1] == (last_row or ["others"] * 2)
    assert set(descriptor.repairs) == {Repair.TRUNCATED, Repair.ROWS_MISSING, *repairs}
    assert descriptor.status is DescriptorStatus.TRUNCATED
    assert descriptor.num_rows_read == (2 if last_row else 1)


@settings(max_examples=100, deadline=None)
@given(grid=labelled_grids(max_side=16), format=st.sampled_from(FORMATS), data=st.data())
def test_wherever_text_is_cut_no_cell_is_wrong(grid, format, data):
    """Each is as it would have been, or background."""
    cells, labels = grid
    text = written(text_cells(cells, labels), format)
    cut = data.draw(st.integers(0, len(text)))
    descriptor = decode(
        text[:cut], height=cells.shape[0], width=cells.shape[1], labels=labels, format=format, is_closed=False
    )
    for read, meant in zip(cells_of(descriptor), text_cells(cells, labels), strict=True):
        assert all(got in (want, BACKGROUND) for got, want in zip(read, meant, strict=True))
    assert descriptor.status is DescriptorStatus.TRUNCATED


@pytest.mark.parametrize(
    ("body", "is_closed", "status"),
    [
        ("", True, "malformed"),
        ("\n \n", True, "malformed"),
        ("I cannot do that.", True, "malformed"),
        ("cat *0\n", True, "malformed"),
        ("", False, "truncated"),
        ("othe", False, "truncated"),
        ("I cannot\ndo that.", False, "malformed"),
        ("cat *1\n", False, "truncated"),
        ("cat *1\n", True, "repaired"),
    ],
)
def test_malformed_is_text_of_which_nothing_could_be_read(body, is_closed, status):
    descriptor = decode(body, height=3, width=2, is_closed=is_closed)
    assert descriptor.status.value == status
    assert Repair.ROWS_MISSING in descriptor.repairs
    assert (Repair.TRUNCATED in descriptor.repairs) is not is_closed


@pytest.mark.parametrize(
    ("format", "body", "cells", "repairs"),
    [
        ("i_rle", "cat *3| dog *1", ["cat", "cat", "cat", "dog"], ()),
        ("i_rle", "\ncat *3|\ndog*1\n", ["cat", "cat", "cat", "dog"], (Repair.SEPARATOR,)),
        ("i_rle", "cat *3", ["cat", "cat", "cat", "others"], (Repair.ROWS_MISSING,)),
        ("i_rle", "cat *3| dog *7", ["cat", "cat", "cat", "dog"], (Repair.ROWS_EXTRA,)),
        ("i_rle", "cat *4| dog *1", ["cat"] * 4, (Repair.ROWS_EXTRA,)),
        ("full", "cat| cat| dog| x *2", ["cat", "cat", "dog", "x *2"], ()),
        ("full", "cat|cat| dog | Cat", ["cat", "cat", "dog", "cat"], (Repair.SEPARATOR, Repair.LABEL_NORMALISED)),
        ("full", "cat| | dog", ["cat", "dog", "others", "others"], (Repair.ROWS_MISSING, Repair.SEPARATOR)),
        ("full", "cat| cat| cat| cat| dog", ["cat"] * 4, (Repair.ROWS_EXTRA,)),
    ],
)
def test_formats_without_rows_are_repaired_too(format, body, cells, repairs):
    descriptor = decode(body, height=2, width=2, format=format)
    assert cells_of(descriptor) == [cells[:2], cells[2:]]
    assert descriptor.repairs == repairs


@pytest.mark.parametrize(
    ("format", "body", "cells", "num_rows"),
    [
        ("i_rle", "cat *3| dog *1", ["cat", "cat", "cat", "dog"], 2),
        ("i_rle", "cat *2| dog *1", ["cat", "cat", "others", "others"], 1),
        ("full", "cat| cat| cat| do", ["cat", "cat", "cat", "others"], 1),
        ("full", "cat| ca", ["cat", "others", "others", "others"], 0),
    ],
)
def test_formats_without_rows_keep_what_is_certain(format, body, cells, num_rows):
    """The last cell of the full format could be half a label, however many cells there are."""
    descriptor = decode(body, height=2, width=2, format=format, is_closed=False)
    assert cells_of(descriptor) == [cells[:2], cells[2:]]
    assert descriptor.num_rows_read == num_rows
    dropped = (Repair.PARTIAL_RUN_DROPPED, Repair.ROWS_MISSING) if num_rows < 2 else ()
    assert descriptor.repairs == (Repair.TRUNCATED, *dropped)


def edited(text: str, edits: list[tuple[int, int, str]]) -> str:
    for position, length, replacement in edits:
        start = position % (len(text) + 1)
        text = text[:start] + replacement + text[start + length :]
    return text


replacements = st.one_of(
    st.sampled_from(
        ("", "\n", "\n ", "| ", "|", " *", "*", "0", "16", " ", "<seg>", "</seg>", "<", "others", "Cat", "\r")
    ),
    st.text(max_size=4),
)
edits = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 6), replacements), max_size=3)


@settings(max_examples=500, deadline=None)
@given(grid=labelled_grids(max_side=13), format=st.sampled_from(FORMATS), edits=edits)
@example(grid=(np.array([[0, 0]]), ["cat"]), format=DescriptorFormat.R_RLE, edits=[(0, 6, "cat *1| Cat *1")])
def test_complete_is_exactly_the_text_that_is_written(grid, format, edits):
    cells, labels = grid
    height, width = cells.shape
    text = edited(written(text_cells(cells, labels), format), edits)
    descriptor = decode(text, height=height, width=width, format=format)
    is_complete = descriptor.status is DescriptorStatus.COMPLETE
    assert is_complete == (not descriptor.repairs)
    if all(map(is_carried, descriptor.labels)):
        assert is_complete == (encode(descriptor.grid_HW, descriptor.labels, format) == text)


# ---------------------------------------------------------------- answers


def test_every_block_is_read_with_what_was_said_before_it():
    text = f"One:\n<seg>{GOOD_BODY}</seg> two:\n<seg>cat *4\n</seg> done </seg> *3| x *4"
    answer = decode_answer(text, height=4, width=4)
    assert [found.preamble for found in answer.descriptors] == ["One:\n", " two:\n"]
    assert [found.text for found in answer.descriptors] == [GOOD_BODY, "cat *4\n"]
    assert [found.status.value for found in answer.descriptors] == ["complete", "repaired"]
    assert (answer.status, answer.text) == (DescriptorStatus.REPAIRED, text)


def test_a_block_ends_where_the_next_begins():
    answer = decode_answer(f"<seg>cat *4\n cat *4\n do<seg>{GOOD_BODY}</seg>", height=4, width=4)
    first, second = answer.descriptors
    assert cells_of(first) == [["cat"] * 4] * 2 + [["others"] * 4] * 2
    assert first.status is DescriptorStatus.TRUNCATED
    assert cells_of(second) == GOOD_CELLS
    assert (second.status, second.preamble) == (DescriptorStatus.COMPLETE, "")
    assert answer.status is DescriptorStatus.TRUNCATED


@pytest.mark.parametrize("part", [CLOSE_TAG[:length] for length in range(1, len(CLOSE_TAG))])
def test_half_a_closing_tag_is_no_part_of_the_text(part):
    (descriptor,) = decode_answer(f"<seg>{GOOD_BODY}{part}", height=4, width=4).descriptors
    assert descriptor.text == GOOD_BODY
    assert descriptor.repairs == (Repair.TRUNCATED,)


@pytest.mark.parametrize("text", ["", "I'm sorry, but I cannot segment the image.", "<se", "</seg>", "<SEG>cat *4"])
def test_an_answer_without_a_block_is_no_error(text):
    answer = decode_answer(text, height=4, width=4)
    assert (answer.status, answer.descriptors, answer.text) == (DescriptorStatus.NONE, (), text)


def test_the_number_of_blocks_is_bounded_and_the_rest_is_counted():
    block = f"<seg>{GOOD_BODY}</seg>"
    exactly = decode_answer(block * MAX_BLOCKS, height=4, width=4)
    assert (exactly.status, exactly.num_dropped_blocks) == (DescriptorStatus.COMPLETE, 0)
    more = decode_answer(block * (MAX_BLOCKS + 3), height=4, width=4)
    assert (more.status, more.num_dropped_blocks) == (DescriptorStatus.REPAIRED, 3)
    assert len(more.descriptors) == MAX_BLOCKS


@pytest.mark.parametrize(
    ("body", "grid"),
    [
        (GOOD_BODY, (4, 4)),
        ("\r\n\n cat*2|dog *1 \r\ncat *03", (2, 3)),
        ("cat *4\n cat *3\n", None),
        ("cat *4\n nonsense\n", None),
        ("cat *0\n", None),
        (f"cat *{MAX_SIDE}\n" * MAX_SIDE, (MAX_SIDE, MAX_SIDE)),
        (f"cat *{MAX_SIDE + 1}\n", None),
        ("cat *1\n" * (MAX_SIDE + 1), None),
        ("cat *" + "9" * 5000 + "\n", None),
        ("", None),
    ],
)
def test_the_grid_is_inferred_where_all_rows_agree(body, grid):
    assert infer_grid(body) == grid


# ---------------------------------------------------------------- hostile text

KILOBYTES = 1024
HOSTILE = {
    "pipes": "|" * 60_000,
    "bad runs": "ab|" * 20_000,
    "newlines": "\n" * 60_000,
    "rows": "cat *1\n" * 10_000,
    "spaces": " " * 60_000,
    "one long label": "a" * 60_000 + " *4\n",
    "a label that grows under NFKC": "\ufdfa" * 60_000 + " *4\n",
    "many digits": "cat *" + "7" * 60_000 + "\n",
    "many zeros": "cat *" + "0" * 60_000 + "4\n",
    "stars": "*" * 60_000,
    "a billion": "cat *1000000000\n" * 4_000,
    "labels": "".join(f"label {number} *1| " for number in range(5_000)),
    "labels in rows": "".join(f"label {number} *1\n" for number in range(5_000)),
    "labels that are too long": ("b" * (MAX_LABEL_LENGTH + 1) + " *1| ") * 100,
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", HOSTILE)
def test_memory_is_bounded_by_the_grid_and_the_text(name, format):
    """Two or three copies of the text, as long as it is one piece, and a grid; never a list of its pieces."""
    body = HOSTILE[name]
    tracemalloc.start()
    try:
        descriptor = decode(body, height=64, width=64, format=format)
        infer_grid(body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * sys.getsizeof(body) + 2 * 64 * 64 + 400 * len(descriptor.labels) + 16 * KILOBYTES
    assert descriptor.grid_HW.shape == (64, 64)
    assert len(descriptor.labels) <= 64 * 64 + 1


@pytest.mark.parametrize("block", [OPEN_TAG, OPEN_TAG + CLOSE_TAG, OPEN_TAG + "cat *9\n"])
def test_memory_is_bounded_for_any_number_of_blocks(block):
    text = block * 20_000
    tracemalloc.start()
    try:
        answer = decode_answer(text, height=MAX_SIDE, width=MAX_SIDE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MAX_BLOCKS * (2 * MAX_SIDE**2 + 100 * KILOBYTES)
    assert answer.num_dropped_blocks == 20_000 - MAX_BLOCKS


def test_a_class_for_every_cell_of_the_largest_grid():
    body = "| ".join(f"{number} *1" for number in range(MAX_SIDE**2))
    descriptor = decode(body, height=MAX_SIDE, width=MAX_SIDE, format=DescriptorFormat.I_RLE)
    assert descriptor.status is DescriptorStatus.COMPLETE
    assert descriptor.grid_HW.ravel().tolist() == list(range(1, MAX_SIDE**2 + 1))


# ---------------------------------------------------------------- streaming


def streamed(text: str, cuts: list[int], height: int, width: int, labels=None):
    decoder = StreamDecoder(height, width, labels)
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    events = [event for start, end in pairwise(ends) for event in decoder.feed(text[start:end])]
    return events, decoder.finish()


def answers() -> st.SearchStrategy[tuple[str, int, int]]:
    """An answer of one or two blocks, edited or not, cut or not, and the size of its grid."""

    @st.composite
    def draw_answer(draw):
        cells, labels = draw(labelled_grids(max_side=7))
        body = written(text_cells(cells, labels), DescriptorFormat.R_RLE)
        text = draw(st.sampled_from(("", "Sure:\n", "a <se g> 3 > 2\n"))) + OPEN_TAG + body + CLOSE_TAG
        text = edited(text * draw(st.sampled_from((1, 1, 2))), draw(edits))
        return text[: draw(st.one_of(st.just(len(text)), st.integers(0, len(text))))], *cells.shape

    return draw_answer()


@settings(max_examples=500, deadline=None)
@given(answer=answers(), data=st.data(), is_closed_set=st.booleans())
def test_a_stream_ends_as_the_whole_text_however_it_is_cut(answer, data, is_closed_set):
    text, height, width = answer
    labels = ["cat", "a"] if is_closed_set else None
    whole = decode_answer(text, height=height, width=width, labels=labels)
    by_character, _ = streamed(text, list(range(len(text))), height, width, labels)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    events, final = streamed(text, cuts, height, width, labels)
    assert facts_of(final) == facts_of(whole)
    assert [(event.block, event.row, event.runs) for event in events] == [
        (event.block, event.row, event.runs) for event in by_character
    ]
    for event in events:
        descriptor = whole.descriptors[event.block]
        assert event.cells_W.tolist() == descriptor.grid_HW[event.row].tolist()
        assert event.labels == descriptor.labels[: len(event.labels)]
        assert sum(count for _, count in event.runs) == width
    reported = [(event.block, event.row) for event in events]
    # The row in which an open block ends is the only one that may never be reported.
    for block, descriptor in enumerate(whole.descriptors):
        num_reported = sum(event.block == block for event in events)
        is_open = Repair.TRUNCATED in descriptor.repairs
        assert descriptor.num_rows_read - is_open <= num_reported <= descriptor.num_rows_read
        assert [row for number, row in reported if number == block] == list(range(num_reported))


def test_a_row_is_reported_with_its_newline_or_its_closing_tag_and_not_before():
    text = "Sure:\n<seg>cat *16\n cat *1| dog *15\n others *16</seg> > \n"
    decoder = StreamDecoder(3, 16)
    arrived = [(position, event) for position, sign in enumerate(text) for event in decoder.feed(sign)]
    first, second = (position for position, sign in enumerate(text) if sign == "\n" and 10 < position < len(text) - 1)
    assert [position for position, _ in arrived] == [first, second, text.index(CLOSE_TAG) + len(CLOSE_TAG) - 1]
    assert [event.runs for _, event in arrived] == [
        (("cat", 16),),
        (("cat", 1), ("dog", 15)),
        (("others", 16),),
    ]
    assert [event.row for _, event in arrived] == [0, 1, 2]


@pytest.mark.parametrize(
    "deltas",
    [
        ("<se", "g>cat *4\n</se", "g>"),
        ("<seg>cat *", "4\n", "</", "seg>"),
        ("<seg>c", "at *4\n</seg", ">"),
        ("<", "s", "e", "g", ">cat *4\n<", "/seg>"),
        ("x>\n<seg>cat *4\n</seg>\n", ""),
    ],
)
def test_half_tokens_wait_for_their_other_half(deltas):
    decoder = StreamDecoder(1, 4)
    events = [event for delta in deltas for event in decoder.feed(delta)]
    assert [event.runs for event in events] == [(("cat", 4),)]
    assert decoder.finish().status is DescriptorStatus.COMPLETE


@pytest.mark.parametrize("cut", range(1, len(CLOSE_TAG) + 1))
def test_a_tag_that_arrives_in_two_pieces_completes_its_row_at_once(cut):
    text = "<seg>cat *4" + CLOSE_TAG
    decoder = StreamDecoder(1, 4)
    assert decoder.feed(text[:-cut]) == ()
    (event,) = decoder.feed(text[-cut:])
    assert event.runs == (("cat", 4),)


def test_a_stream_reports_no_row_beyond_the_grid_or_the_last_block():
    decoder = StreamDecoder(1, 1)
    events = [event for delta in ["<seg>cat *1\n cat *1\n</seg>"] * (MAX_BLOCKS + 2) for event in decoder.feed(delta)]
    assert [event.block for event in events] == list(range(MAX_BLOCKS))
    assert decoder.finish().num_dropped_blocks == 2


# ---------------------------------------------------------------- from text to a mask at picture size


@pytest.mark.slow
def test_what_the_benchmark_times_is_the_mask():
    descriptors = sample_descriptors(200)
    assert len({text for text, _, _ in descriptors}) == 200
    masks, seconds = masks_and_seconds(descriptors)
    assert len(seconds) == 200
    for mask, (_, _, grid) in zip(masks, descriptors, strict=True):
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, upsample(grid, 480, 640))
        assert 0 < mask.mean() < 1


@pytest.mark.parametrize(
    ("rows", "columns", "grid"),
    [
        (24, 24, (24, 24)),
        (16, 16, (16, 16)),
        (8, 8, (8, 8)),
        (15, 16, (16, 16)),
        (16, 15, (16, 16)),
        (17, 16, (16, 16)),
    ],
)
def test_a_grid_of_the_same_proportions_is_read_as_it_is(rows: int, columns: int, grid: tuple[int, int]) -> None:
    """24 rows of a "16" profile are a grid; 15 rows of 16 are one row too few."""
    cells_HW = np.zeros((rows, columns), dtype=np.int64)
    cells_HW[: rows // 2] = 1
    text = f"<seg>{encode(cells_HW, ['others', 'cat'])}</seg>"
    (descriptor,) = decode_on_its_own_grid(text, height=16, width=16).descriptors
    assert descriptor.grid_HW.shape == grid
    assert (descriptor.status is DescriptorStatus.COMPLETE) == (grid == (rows, columns))
    assert int(descriptor.mask("cat").sum()) >= min(rows // 2, 16) * min(columns, 16)


def test_an_open_descriptor_is_read_on_the_grid_that_is_due() -> None:
    text = "<seg>cat *24\n cat *24\n"
    (descriptor,) = decode_on_its_own_grid(text, height=16, width=16).descriptors
    assert descriptor.grid_HW.shape == (16, 16)
    assert descriptor.status is DescriptorStatus.TRUNCATED


def test_other_grids_are_found_block_by_block() -> None:
    body = encode(np.ones((4, 4), dtype=np.int64), ["others", "cat"])
    text = f"<seg>{body}</seg> and <seg>{encode(np.ones((8, 8), dtype=np.int64), ['others', 'cat'])}</seg>"
    answer = decode_on_its_own_grid(text, height=8, width=8)
    assert [descriptor.grid_HW.shape for descriptor in answer.descriptors] == [(4, 4), (8, 8)]
    assert answer.status is DescriptorStatus.COMPLETE

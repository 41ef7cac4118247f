r"""Semantic descriptors: a label for each cell of a grid, written as text and read back from whatever a model wrote.

Legend: H rows of the grid, W columns, N cells in a stretch of text (W for a row, H*W where a text has no rows).

Text4Seg (arXiv 2410.09855) writes a mask as the labels of its cells, between `<seg>` and `</seg>`, in three formats:
    R-RLE   `others *4\n cat *2| others *2\n`   runs of each row; the one that published checkpoints write
    I-RLE   `others *4| cat *2| others *2`      runs of the picture in reading order
    full    `others| others| others| ...`       cell by cell

What a model wrote is untrusted and often cut short, so decoding keeps four promises:
    total: any text gives a descriptor, with a status and with what had to be repaired. COMPLETE means that the text
        is byte for byte what `encode` writes for the decoded cells.
    bounded: counts are capped before they are used, and a text costs O(H*W) memory beyond its own size, for at most
        `MAX_BLOCKS` descriptors of at most one label a cell.
    row-safe: a row that is short, long or unreadable changes no cell of another row.
    by name: labels are the same class when their `match_key` is, never by where they stand. `others` is the
        background and class 0, also where it does not occur, and no other label is ever background.

Written from the format, not from the published code (mc-lan/Text4Seg at d6540b6, non-commercial licence), which shifts
every row after a short one, spreads the last label over missing rows, makes the first label it meets the background,
expands any count, and returns an empty mask for a text that it cannot read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from relay_models.errors import LabelError, RelayModelsError
from relay_models.text4seg.labels import BACKGROUND, MAX_LABEL_LENGTH, check_label, match_key

__all__ = [
    "BACKGROUND",
    "CLOSE_TAG",
    "MAX_BLOCKS",
    "MAX_SIDE",
    "OPEN_TAG",
    "Answer",
    "Descriptor",
    "DescriptorFormat",
    "DescriptorStatus",
    "Repair",
    "RowEvent",
    "StreamDecoder",
    "decode",
    "decode_answer",
    "encode",
    "infer_grid",
]

OPEN_TAG = "<seg>"
CLOSE_TAG = "</seg>"
MAX_BLOCKS = 32  # descriptors read from one answer; each costs a grid
MAX_SIDE = 255  # rows or columns: a class for every cell, and the background, still fit in uint16

# A count has to be compared with a width only, and int() refuses thousands of digits.
_COUNT_DIGITS = 6
_ENDLESS = 10**_COUNT_DIGITS

_TAG = re.compile("</?seg>")
_TAG_OR_LINE_END = re.compile("</?seg>|\n")
_TAIL_LENGTH = len(CLOSE_TAG) - 1
_NOT_BLANK = re.compile(r"\S")
_LINE = re.compile(r"[^\n]+")

Grid = npt.NDArray[np.uint16]
Mask = npt.NDArray[np.uint8]


class DescriptorFormat(StrEnum):
    R_RLE = "r_rle"
    I_RLE = "i_rle"
    FULL = "full"


class DescriptorStatus(StrEnum):
    COMPLETE = "complete"  # byte for byte what `encode` writes
    REPAIRED = "repaired"  # closed, and read with the repairs listed
    TRUNCATED = "truncated"  # the closing tag is missing; what stood before it was read
    MALFORMED = "malformed"  # not one run could be read, and not because the text was cut
    NONE = "none"  # no `<seg>` in the answer


class Repair(StrEnum):
    TRUNCATED = "truncated"  # no closing tag
    PARTIAL_RUN_DROPPED = "partial_run_dropped"  # the text ends inside a run, which was left out
    ROW_SHORT = "row_short"  # the row's last label was repeated to its end
    ROW_LONG = "row_long"  # the row was cut
    ROWS_MISSING = "rows_missing"  # filled with background
    ROWS_EXTRA = "rows_extra"  # left out
    SEPARATOR = "separator"  # white space, line ends, zeros or a divided run that `encode` would write differently
    BAD_RUN = "bad_run"  # no label, or no count of at least 1 in ASCII digits: left out
    LABEL_NORMALISED = "label_normalised"  # matched in spite of its white space, case or compatibility form
    UNKNOWN_LABEL = "unknown_label"  # none of the requested ones: background


_FROM_GOOD_TO_BAD = (
    DescriptorStatus.COMPLETE,
    DescriptorStatus.REPAIRED,
    DescriptorStatus.TRUNCATED,
    DescriptorStatus.MALFORMED,
)


@dataclass(frozen=True, eq=False)
class Descriptor:
    """One decoded grid.

    Attributes:
        labels: the classes; 0 is always `others`. Requested labels stand as requested, in that order, whether they
            occur or not. Without requested labels, those that occur stand as first written, white space collapsed.
        grid_HW: uint16 [H, W], an index into labels for each cell. Read-only.
        status: what the text was.
        repairs: what had to be repaired, each kind once, in the order of `Repair`.
        text: what was decoded, as it was written.
        preamble: the text between the previous descriptor, or the start, and this one's tag.
        num_rows_read: rows for which there was text; the other `H - num_rows_read` are missing. In a format without
            rows, the rows that its cells fill.
    """

    labels: tuple[str, ...]
    grid_HW: Grid  # noqa: N815
    status: DescriptorStatus
    repairs: tuple[Repair, ...]
    text: str
    preamble: str = ""
    num_rows_read: int = 0

    def index_of(self, label: str) -> int | None:
        """The class of this label, compared as decoding compares, or None."""
        key = match_key(label)
        return next((index for index, name in enumerate(self.labels) if match_key(name) == key), None)

    def mask(self, label: str) -> Mask:
        """uint8 [H, W]: 1 where the cell has this label; all 0 for a label that does not occur."""
        index = self.index_of(label)
        if index is None:
            return np.zeros(self.grid_HW.shape, dtype=np.uint8)
        return (self.grid_HW == index).view(np.uint8)


@dataclass(frozen=True, eq=False)
class Answer:
    """All descriptors of one answer, in order.

    Attributes:
        descriptors: one for each `<seg>`, at most `MAX_BLOCKS`.
        status: the worst of them; NONE where there is none. An answer of which blocks were dropped is not COMPLETE.
        text: the whole answer.
        num_dropped_blocks: `<seg>` tags beyond `MAX_BLOCKS`.
    """

    descriptors: tuple[Descriptor, ...]
    status: DescriptorStatus
    text: str
    num_dropped_blocks: int = 0


@dataclass(frozen=True, eq=False)
class RowEvent:
    """A row that is there for good while its answer is still being written.

    Attributes:
        block: which descriptor of the answer, from 0.
        row: which row of its grid, from 0.
        cells_W: uint16 [W], indices into labels. Read-only.
        labels: the classes so far; the final labels begin with them.
    """

    block: int
    row: int
    cells_W: Grid  # noqa: N815
    labels: tuple[str, ...]

    @property
    def runs(self) -> tuple[tuple[str, int], ...]:
        """The row as (label, count) from left to right, repairs included: the counts add up to its width."""
        return tuple((self.labels[index], sum(1 for _ in run)) for index, run in groupby(self.cells_W.tolist()))


# ---------------------------------------------------------------- encoding


def encode(
    cells_HW: npt.NDArray[np.integer[Any]],
    labels: Sequence[str],
    format: DescriptorFormat = DescriptorFormat.R_RLE,
) -> str:
    """Write a grid as the body of a descriptor, without its tags.

    Args:
        cells_HW: [H, W] integers, an index into labels for each cell.
        labels: their names; the background is `others`, wherever it stands.

    Raises:
        LabelError: a label would not come back (see `check_label`), or two labels are the same class.
        RelayModelsError: the grid has another shape, dtype or content than that, or is larger than `MAX_SIDE`.
    """
    format = DescriptorFormat(format)
    names = _checked_names(labels)
    rows = _checked_cells(cells_HW, len(names)).tolist()
    if format is DescriptorFormat.R_RLE:
        return "\n ".join(_runs(row, names) for row in rows) + "\n"
    cells = [index for row in rows for index in row]
    if format is DescriptorFormat.I_RLE:
        return _runs(cells, names)
    return "| ".join(names[index] for index in cells)


def _runs(cells: Sequence[int], names: Sequence[str]) -> str:
    return "| ".join(f"{names[index]} *{sum(1 for _ in run)}" for index, run in groupby(cells))


def _checked_names(labels: Sequence[str]) -> Sequence[str]:
    _check_labels(labels)
    name_of_key: dict[str, str] = {}
    for label in labels:
        check_label(label)
        key = match_key(label)
        if key in name_of_key:
            raise LabelError(
                f"labels {name_of_key[key]!r} and {label!r} are the same class when read: keep one of them"
            )
        if key == BACKGROUND and label != BACKGROUND:
            raise LabelError(f"label {label!r} is read as the background: write it {BACKGROUND!r}")
        name_of_key[key] = label
    return labels


def _checked_cells(cells_HW: npt.NDArray[np.integer[Any]], num_labels: int) -> npt.NDArray[np.integer[Any]]:
    if cells_HW.ndim != 2 or cells_HW.dtype.kind not in "iu":
        raise RelayModelsError(
            f"cells_HW must be a grid of integers, got shape {cells_HW.shape} and dtype {cells_HW.dtype}"
        )
    _check_grid(*cells_HW.shape)
    if cells_HW.min() < 0 or cells_HW.max() >= num_labels:
        raise RelayModelsError(
            f"cells_HW must index {num_labels} labels, got values from {cells_HW.min()} to {cells_HW.max()}"
        )
    return cells_HW


def _check_grid(height: int, width: int) -> None:
    for name, side in (("height", height), ("width", width)):
        if not 1 <= side <= MAX_SIDE:
            raise RelayModelsError(f"{name} of the grid must be from 1 to {MAX_SIDE}, got {side}")


def _check_labels(labels: Sequence[str] | None) -> None:
    if isinstance(labels, str):
        raise LabelError(f"labels must be a sequence of labels, got the string {labels!r}")
    if labels is not None and len(labels) > MAX_SIDE**2:
        raise LabelError(f"labels must be at most {MAX_SIDE**2}, one for each cell, got {len(labels)}")


# ---------------------------------------------------------------- decoding


def decode_answer(
    text: str,
    *,
    height: int,
    width: int,
    labels: Sequence[str] | None = None,
    format: DescriptorFormat = DescriptorFormat.R_RLE,
) -> Answer:
    """Read every descriptor of an answer.

    A block goes from `<seg>` to `</seg>`. Where the next `<seg>` or the end of the text comes first it is truncated,
    and the beginning of a closing tag at the very end of the text is no part of it.

    Args and raises as `decode`.
    """
    return _decode_answer(text, lambda _body, _is_closed: (height, width), height, width, labels, format)


def decode_on_its_own_grid(text: str, *, height: int, width: int, labels: Sequence[str] | None = None) -> Answer:
    """As `decode_answer` of R-RLE, for a text that no grammar held to the grid.

    A closed descriptor whose rows agree on another grid of the same proportions, such as 24 rows of 24 cells where 16
    of 16 are due, is read on that one. Of other proportions it is one with rows that are short, long or missing.
    """

    def own_grid(body: str, is_closed: bool) -> tuple[int, int]:
        inferred = infer_grid(body) if is_closed else None
        fits = inferred is not None and inferred[0] * width == inferred[1] * height
        return inferred if inferred is not None and fits else (height, width)

    return _decode_answer(text, own_grid, height, width, labels, DescriptorFormat.R_RLE)


def _decode_answer(
    text: str,
    grid_of: Callable[[str, bool], tuple[int, int]],
    height: int,
    width: int,
    labels: Sequence[str] | None,
    format: DescriptorFormat,
) -> Answer:
    _check_grid(height, width)
    _check_labels(labels)
    descriptors: list[Descriptor] = []
    num_dropped = 0
    for preamble, body, is_closed in _blocks(text):
        if len(descriptors) == MAX_BLOCKS:
            num_dropped += 1
            continue
        grid = grid_of(body, is_closed)
        descriptors.append(
            _decode(body, *grid, labels, DescriptorFormat(format), is_closed=is_closed, preamble=preamble)
        )
    statuses = {descriptor.status for descriptor in descriptors}
    if num_dropped:
        statuses.add(DescriptorStatus.REPAIRED)
    status = max(statuses, key=_FROM_GOOD_TO_BAD.index, default=DescriptorStatus.NONE)
    return Answer(tuple(descriptors), status, text, num_dropped)


def decode(
    body: str,
    *,
    height: int,
    width: int,
    labels: Sequence[str] | None = None,
    format: DescriptorFormat = DescriptorFormat.R_RLE,
    is_closed: bool = True,
) -> Descriptor:
    """Read the body of one descriptor, without its tags. Total: whatever the text, there is a descriptor.

    Args:
        body: the text.
        height: rows of the grid. The text does not tell them reliably (see `infer_grid`).
        width: columns of the grid.
        labels: the requested labels; a label that is none of them becomes background. None: every label is a class.
        is_closed: whether a closing tag followed. If not, the last run may be half a run, and is used only where it
            fills its row.

    Raises:
        RelayModelsError: height or width is not from 1 to `MAX_SIDE`, or labels is a string, or too many.
    """
    _check_grid(height, width)
    _check_labels(labels)
    return _decode(body, height, width, labels, DescriptorFormat(format), is_closed=is_closed, preamble="")


def infer_grid(body: str) -> tuple[int, int] | None:
    """The rows and columns that an R-RLE body spells out, or None.

    None where a run cannot be read, where rows differ in width, or where a side is not from 1 to `MAX_SIDE`.
    """
    num_rows, width = 0, 0
    for line in _LINE.finditer(body):
        if not _NOT_BLANK.search(line.group()):
            continue
        row_width = 0
        for piece, _ in _pieces(line.group()):
            run = _parse_run(piece)
            row_width += run[1] if run else _ENDLESS
        num_rows += 1
        if row_width > MAX_SIDE or num_rows > MAX_SIDE or row_width != (width or row_width):
            return None
        width = row_width
    return (num_rows, width) if num_rows else None


def _decode(
    body: str,
    height: int,
    width: int,
    labels: Sequence[str] | None,
    format: DescriptorFormat,
    *,
    is_closed: bool,
    preamble: str,
) -> Descriptor:
    reader = _GridReader(height, width, labels)
    if format is DescriptorFormat.R_RLE:
        reader.read_rows(body, is_closed=is_closed)
    else:
        reader.read_picture(body, has_counts=format is DescriptorFormat.I_RLE, is_closed=is_closed)
    if not is_closed:
        reader.repairs.add(Repair.TRUNCATED)
    reader.grid_HW.flags.writeable = False
    return Descriptor(
        labels=tuple(reader.classes.names),
        grid_HW=reader.grid_HW,
        status=_status(reader, is_closed),
        repairs=tuple(repair for repair in Repair if repair in reader.repairs) if reader.repairs else (),
        text=body,
        preamble=preamble,
        num_rows_read=reader.num_rows_read,
    )


def _status(reader: _GridReader, is_closed: bool) -> DescriptorStatus:
    if not reader.num_runs_read and (is_closed or Repair.BAD_RUN in reader.repairs):
        return DescriptorStatus.MALFORMED
    if not is_closed:
        return DescriptorStatus.TRUNCATED
    return DescriptorStatus.REPAIRED if reader.repairs else DescriptorStatus.COMPLETE


class _Classes:
    """The classes of one descriptor, found by name."""

    def __init__(self, requested: Sequence[str] | None) -> None:
        self.names = [BACKGROUND]
        self._is_open = requested is None
        self._index_of_key = {BACKGROUND: 0}
        # Every spelling met, with what it takes to match it; no more of them than cells, for each has one.
        self._met: dict[str, tuple[int, Repair | None]] = {BACKGROUND: (0, None)}
        for label in requested or ():
            key = match_key(label)
            if key not in self._index_of_key:
                self._met[label] = (self._add(label, key), None)

    def find(self, spelling: str) -> tuple[int, Repair | None]:
        """The class of a label as it was written, and the repair that this takes, if any."""
        found = self._met.get(spelling)
        if found is None:
            found = self._met[spelling] = self._match(spelling)
        return found

    def _match(self, spelling: str) -> tuple[int, Repair | None]:
        key = match_key(spelling)
        if key in self._index_of_key:
            return self._index_of_key[key], Repair.LABEL_NORMALISED
        if not self._is_open:
            return 0, Repair.UNKNOWN_LABEL
        name = " ".join(spelling.split())
        return self._add(name, key), None if name == spelling else Repair.LABEL_NORMALISED

    def _add(self, name: str, key: str) -> int:
        index = self._index_of_key[key] = len(self.names)
        self.names.append(name)
        return index


class _GridReader:
    """Fills a grid from text, a stretch at a time, and keeps account of what it repaired."""

    def __init__(self, height: int, width: int, labels: Sequence[str] | None) -> None:
        self.grid_HW: Grid = np.zeros((height, width), dtype=np.uint16)
        self.classes = _Classes(labels)
        self.repairs: set[Repair] = set()
        self.num_rows_read = 0
        self.num_runs_read = 0
        self._lead = ""  # what `encode` puts before a run: nothing at first, then the space of each separator

    def read_rows(self, body: str, *, is_closed: bool) -> None:
        """The body of an R-RLE descriptor: a row on each line."""
        start = 0
        while start < len(body) and self.num_rows_read < len(self.grid_HW):
            end = body.find("\n", start)
            is_ended = end >= 0
            line = body[start:end] if is_ended else body[start:]
            is_row = self.read_row(line, is_cut=not is_ended and not is_closed)
            if is_closed and not (is_row and is_ended):
                self.repairs.add(Repair.SEPARATOR)
            start = end + 1 if is_ended else len(body)
        if self.num_rows_read < len(self.grid_HW):
            self.repairs.add(Repair.ROWS_MISSING)
        elif _NOT_BLANK.search(body, start):
            self.repairs.add(Repair.ROWS_EXTRA)
        elif start < len(body) and is_closed:
            self.repairs.add(Repair.SEPARATOR)

    def read_row(self, line: str, *, is_cut: bool) -> bool:
        """The next row of the grid, if the line is not blank and there is one; says so."""
        if self.num_rows_read == len(self.grid_HW) or not _NOT_BLANK.search(line):
            return False
        cells_W = self.grid_HW[self.num_rows_read]
        self.num_rows_read += 1
        num_filled, last_index, is_over = self._fill(cells_W, line, has_counts=True, is_cut=is_cut)
        if is_over:
            self.repairs.add(Repair.ROW_LONG)
        if num_filled == len(cells_W):
            return True
        if is_cut:
            self.repairs.add(Repair.PARTIAL_RUN_DROPPED)
        else:
            self.repairs.add(Repair.ROW_SHORT)
            cells_W[num_filled:] = last_index
        return True

    def read_picture(self, body: str, *, has_counts: bool, is_closed: bool) -> None:
        """The body of an I-RLE or full descriptor: all cells in reading order. What is missing stays background."""
        cells_N = self.grid_HW.reshape(-1)
        num_filled, _, is_over = self._fill(cells_N, body, has_counts=has_counts, is_cut=not is_closed)
        self.num_rows_read = num_filled // self.grid_HW.shape[1]
        if is_over:
            self.repairs.add(Repair.ROWS_EXTRA)
        if num_filled == len(cells_N):
            return
        self.repairs.add(Repair.ROWS_MISSING)
        if not is_closed:
            self.repairs.add(Repair.PARTIAL_RUN_DROPPED)

    def _fill(self, cells_N: Grid, text: str, *, has_counts: bool, is_cut: bool) -> tuple[int, int, bool]:
        """Runs into cells that are all background: how many cells they filled, with which class last, and whether
        they were for more cells than there are."""
        num_cells = len(cells_N)
        num_filled, index = 0, 0
        previous_label = None
        for piece, is_last in _pieces(text):
            if num_filled == num_cells and _NOT_BLANK.search(piece):
                return num_filled, index, True
            run = _parse_run(piece) if has_counts else _parse_cell(piece)
            if is_cut and is_last and not (has_counts and run and num_filled + run[1] >= num_cells):
                # Perhaps half a label, or half a count that would have become a larger one.
                return num_filled, index, False
            lead, self._lead = self._lead, " "
            if run is None:
                self.repairs.add(Repair.BAD_RUN if _NOT_BLANK.search(piece) else Repair.SEPARATOR)
                previous_label = None
                continue
            label, count, exact_text = run
            if piece != lead + exact_text or (has_counts and label == previous_label):
                self.repairs.add(Repair.SEPARATOR)
            previous_label = label
            index, repair = self.classes.find(label)
            if repair is not None:
                self.repairs.add(repair)
            self.num_runs_read += 1
            if count > num_cells - num_filled:
                cells_N[num_filled:] = index
                return num_cells, index, True
            cells_N[num_filled : num_filled + count] = index
            num_filled += count
        return num_filled, index, False


def _parse_run(piece: str) -> tuple[str, int, str] | None:
    """Label, count (at most `_ENDLESS`) and how `encode` would write them, or None where one of them is missing."""
    label, _, digits = piece.rpartition("*")
    label = label.strip()
    digits = digits.strip()
    if not (digits.isascii() and digits.isdigit()):
        return None
    digits = digits.lstrip("0")
    if not digits or not label or len(label) > MAX_LABEL_LENGTH:
        return None
    count = int(digits) if len(digits) <= _COUNT_DIGITS else _ENDLESS
    return label, count, f"{label} *{digits}"


def _parse_cell(piece: str) -> tuple[str, int, str] | None:
    """What `_parse_run` returns, for one cell of a format without counts."""
    label = piece.strip()
    return (label, 1, label) if label and len(label) <= MAX_LABEL_LENGTH else None


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """What stands between the pipes, one at a time, and whether it is the last."""
    start = 0
    while (end := text.find("|", start)) >= 0:
        yield text[start:end], False
        start = end + 1
    yield text[start:], True


def _blocks(text: str) -> Iterator[tuple[str, str, bool]]:
    """The preamble, the body and whether it is closed, for each opening tag."""
    preamble, preamble_start, body_start = "", 0, -1
    for tag in _TAG.finditer(text):
        is_inside = body_start >= 0
        if tag.group() == OPEN_TAG:
            if is_inside:
                yield preamble, text[body_start : tag.start()], False
            preamble = "" if is_inside else text[preamble_start : tag.start()]
            body_start = tag.end()
        elif is_inside:
            yield preamble, text[body_start : tag.start()], True
            preamble_start, body_start = tag.end(), -1
    if body_start >= 0:
        yield preamble, _without_partial_tag(text[body_start:]), False


def _without_partial_tag(body: str) -> str:
    for length in range(len(CLOSE_TAG) - 1, 0, -1):
        if body.endswith(CLOSE_TAG[:length]):
            return body[:-length]
    return body


# ---------------------------------------------------------------- streaming


class StreamDecoder:
    """Reads an R-RLE answer while it is being written.

    A row is reported once it can no longer change: when its newline has arrived, or its closing tag. Half a tag, half a
    label and half a count (` *1` that becomes ` *16`) wait. A row that the end of the text cuts is in the final answer
    only, and so are rows for which there was no text.
    """

    def __init__(self, height: int, width: int, labels: Sequence[str] | None = None) -> None:
        """As `decode_answer`, with what it raises."""
        _check_grid(height, width)
        _check_labels(labels)
        self._height, self._width, self._labels = height, width, labels
        self._reader: _GridReader | None = None
        self._num_blocks = 0
        self._deltas: list[str] = []
        self._unread: list[str] = []  # since the last tag or newline
        self._tail = ""  # of these, enough to find a tag that a later delta completes

    def feed(self, delta: str) -> tuple[RowEvent, ...]:
        """Take the next piece of the answer, of any length, and return the rows that it completed."""
        self._deltas.append(delta)
        self._unread.append(delta)
        if not _TAG_OR_LINE_END.search(window := self._tail + delta):
            self._tail = window[-_TAIL_LENGTH:]
            return ()
        text = "".join(self._unread)
        events: list[RowEvent] = []
        start = 0
        for mark in _TAG_OR_LINE_END.finditer(text):
            if mark.group() == OPEN_TAG:
                self._open_block()
            elif self._reader is not None:
                if self._reader.read_row(text[start : mark.start()], is_cut=False):
                    events.append(self._last_row(self._reader))
                if mark.group() == CLOSE_TAG:
                    self._reader = None
            start = mark.end()
        self._unread = [text[start:]]
        self._tail = text[start:][-_TAIL_LENGTH:]
        return tuple(events)

    def finish(self) -> Answer:
        """What `decode_answer` reads in all that has arrived."""
        text = "".join(self._deltas)
        return decode_answer(text, height=self._height, width=self._width, labels=self._labels)

    def _open_block(self) -> None:
        self._num_blocks += 1
        is_read = self._num_blocks <= MAX_BLOCKS
        self._reader = _GridReader(self._height, self._width, self._labels) if is_read else None

    def _last_row(self, reader: _GridReader) -> RowEvent:
        row = reader.num_rows_read - 1
        cells_W = reader.grid_HW[row].copy()
        cells_W.flags.writeable = False
        return RowEvent(self._num_blocks - 1, row, cells_W, tuple(reader.classes.names))

"""Drafts for speculative decoding of R-RLE descriptors: what a model that is writing a mask will probably write next.

Rows of a mask resemble the row above, and much of a row follows from what stands before it. So inside a `<seg>` block
of an answer the next tokens are guessed, and the engine checks many of them in one pass.

    `guess_text`       how a half-written descriptor goes on, piece by piece, each with its chance of being right
    `Vocabulary`       tokens to text and text to tokens, for any fast tokenizer
    `OpenBlock`        one unfinished block: its tokens, its rows, how good its guesses have been
    `RowDrafter`       a whole batch, told apart by token ids alone; what an engine's proposer calls once a step

It promises that a draft is only ever a guess: the engine verifies each token, so a wrong grid, a wrong row or a block
taken for its twin costs time and never an answer. Outside of a block nothing is drafted, and a request that is in none
costs a dictionary look-up and a set intersection a step. A block is open when the answer itself has completed its tag:
one that stands in the prompt is not drafted.

The format is that of Text4Seg (arXiv 2410.09855, section 3.2) as `codec` writes it. Chances are frequencies in masks of
COCO classes (seg-tiny's training photos) on grids of 16 x 16. Tried there, and no better than repeating the place where
the run above ends: going on with the slope of the last two or three rows, and moving a run's end along with its start.
Of the runs with one above, two thirds end in the same place either way.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from relay_models.errors import RelayModelsError
from relay_models.text4seg.codec import CLOSE_TAG, MAX_SIDE, OPEN_TAG
from relay_models.text4seg.labels import BACKGROUND, MAX_LABEL_LENGTH
from relay_models.text4seg.row_marks import mark_tokens

IntArray = npt.NDArray[np.integer[Any]]

CERTAIN = 1.0
# Of 100 runs with one above that ends inside the row: how far from there they end.
END_MOVES = (63.0, 15.0, 2.6, 1.0, 0.5, 0.3, 0.2)
# Of 100 runs of background before an object this wide in the row above: how many reach the end of the row instead.
OBJECT_ENDS = {1: 28.0, 2: 14.0, 3: 6.0}
OBJECT_ENDS_WIDE = 2.0
# Of 100 first rows of an object: how many are this wide.
FIRST_WIDTHS = (0.0, 43.0, 26.0, 15.0, 7.0, 4.0, 2.0, 1.0)
STAYS_PLAIN = 0.87  # a row of one label, below such a row
STAYS_LAST = 0.91  # the last run, below the last run
BACKGROUND_GOES_ON = 0.6  # to the end of the row, where nothing above says otherwise
SAME_FIRST_LABEL = {1: 0.82, 2: 0.95}  # by the width of the first run above
SAME_LABEL = 0.98
ONLY_NAME, ONE_OF_NAMES = 0.9, 0.2  # a label that the text before the block may have named


class Grid(NamedTuple):
    """Rows and columns of a descriptor, as far as they are known before its end."""

    height: int = 16
    width: int = 16


class Run(NamedTuple):
    """Cells ``[start, end)`` of a row."""

    label: str
    start: int
    end: int


Row = tuple[Run, ...]


class Guess(NamedTuple):
    """The next piece of a descriptor, and its chance of being right where all pieces before it were."""

    text: str
    chance: float


# ---------------------------------------------------------------- what comes next, as text

_RUN = re.compile(r" ?([^|]*?\S) \*([1-9][0-9]{0,2})")
_BEGUN_COUNT = re.compile(r" ?([^|]*?\S) \*([0-9]{0,3})")
_QUOTED = re.compile(r"(?<!\w)['\"‘“](.+?)['\"’”](?!\w)")
_NAMED = re.compile(
    r"\b(?:of|on|only|segment|is|for|highlight(?:ing)?|category|class):? "
    r"(?=((?:[^'\"‘“\n]|(?<=\w)'(?=\w))+?)(?: in th|[:.?!\n]|$))"
)
_END_OF_NAME = re.compile(r"['\"’”|:.?!\n]| in th| \*")


def parse_row(line: str) -> Row | None:
    """The runs of one line of a descriptor, without its line end; None if it is no row."""
    runs: list[Run] = []
    start = 0
    for text in line.split("|"):
        match = _RUN.fullmatch(text)
        if not match:
            return None
        runs.append(Run(match[1], start, start + int(match[2])))
        start = runs[-1].end
    return tuple(runs)


def guess_text(
    rows: Sequence[Row], line: str, grid: Grid, names: Names | None = None, *, counts_are_whole: bool = False
) -> Iterator[Guess]:
    """How a descriptor goes on after ``rows`` and the beginning ``line`` of the next one.

    Ends after the closing tag, or where there is nothing to go by: a line that is no beginning of a row, a label that
    nobody has named.

    Args:
        rows: the rows so far; an empty one stands for a line that could not be read.
        line: the text after the last line end, or after the tag.
        grid: where rows end and the block closes. With more rows than it has, no end is guessed.
        names: labels that may occur without having occurred.
        counts_are_whole: the digits at the end of ``line`` are a whole count, because a token holds all of its digits.
    """
    above, num_rows = rows[-1] if rows else (), len(rows)
    finder = (names or Names()).after(rows)
    while num_rows != grid.height if line == "" else not CLOSE_TAG.startswith(line):
        row = _RowGuesser(above, grid.width, finder, is_first=num_rows == 0)
        guesses = []
        for guess in row.complete(line, counts_are_whole):
            guesses.append(guess)
            yield guess
        if not row.is_whole:
            return
        num_rows += 1
        # A row that is guessed to be like the one above it is guessed again for every row below.
        while line == "" and above == tuple(row.runs) and num_rows != grid.height:
            yield from guesses
            num_rows += 1
        above, line, counts_are_whole = tuple(row.runs), "", False
    yield Guess(CLOSE_TAG[len(line) :], CERTAIN)


class Names:
    """Labels that the text before a block names, in quotation marks or as what is to be segmented."""

    def __init__(self, context: str = "") -> None:
        self._context = context
        found: dict[str, None] = {}
        for match in reversed([*_NAMED.finditer(context), *_QUOTED.finditer(context)]):
            for label in map(str.strip, match[1].split("|")):
                if 0 < len(label) <= MAX_LABEL_LENGTH and label != BACKGROUND:
                    found.setdefault(label)
        self.listed = tuple(found)

    def after(self, rows: Sequence[Row]) -> _NameFinder:
        """These names behind the labels of a block's rows."""
        seen: dict[str, None] = {}
        for row in reversed(rows):
            seen.update((run.label, None) for run in reversed(row) if run.label != BACKGROUND)
        return _NameFinder(list(seen), self)

    def going_on(self, beginning: str) -> str | None:
        """A name that begins so, from anywhere in the context."""
        place = self._context.rfind(beginning) if beginning.strip() else -1
        if place < 0:
            return None
        end = _END_OF_NAME.search(self._context, place + len(beginning))
        name = self._context[place : end.start() if end else None].rstrip()
        return name if len(beginning) < len(name) <= MAX_LABEL_LENGTH else None


class _NameFinder:
    """Which label comes where the row above does not tell: the object seen last, then what the context named."""

    def __init__(self, seen: list[str], names: Names) -> None:
        self._seen = seen
        self._names = names

    def saw(self, label: str) -> None:
        if label != BACKGROUND and self._seen[:1] != [label]:
            self._seen = [label, *(other for other in self._seen if other != label)]

    def find(self, beginning: str, excluded: str | None) -> tuple[str, float] | None:
        """A label and its chance."""
        if beginning and excluded != BACKGROUND and BACKGROUND.startswith(beginning):
            return BACKGROUND, ONLY_NAME
        for label in self._seen:
            if label != excluded and label.startswith(beginning):
                return label, SAME_LABEL if len(self._seen) == 1 else ONE_OF_NAMES
        listed = [label for label in self._names.listed if label != excluded and label.startswith(beginning)]
        if listed:
            return listed[0], ONLY_NAME if len(listed) == 1 else ONE_OF_NAMES
        name = self._names.going_on(beginning)
        return (name, ONLY_NAME) if name else None


class _BegunRun(NamedTuple):
    """A run up to the digits of its count, of which some may stand there.

    Attributes:
        rest: what is missing of the label and the sign behind it.
        chance: of the rest.
        target: place of the run above that it stands for, if any.
    """

    label: str
    rest: str
    chance: float
    digits: str
    target: int | None


class _RowGuesser:
    """Completes one row from the row above."""

    def __init__(self, above: Row, width: int, finder: _NameFinder, *, is_first: bool) -> None:
        self.runs: list[Run] = []
        self.is_whole = False
        self._above = above
        self._width = width
        self._finder = finder
        self._is_first = is_first
        self._below: int | None = -1  # the run above that the last run stands for; None if there is none

    def complete(self, line: str, counts_are_whole: bool) -> Iterator[Guess]:
        """The rest of the row and its line end; `is_whole` says whether it came to that."""
        *whole, part = line.split("|")
        if whole:
            row = parse_row("|".join(whole))
            if row is None:
                return
            for run in row:
                self._add(run, self._find_above(run))
        while self._start < self._width:
            begun = self._begin_run(part)
            if begun is None:
                return
            if begun.rest:
                yield Guess(begun.rest, begun.chance)
            room = self._width - self._start
            if begun.digits and counts_are_whole:
                count, chance = int(begun.digits), CERTAIN
            else:
                count, chance = self._guess_count(begun, room)
            if not 1 <= count <= room:
                return
            # Digits that stand there may be all of the count: then the separator is what was in doubt.
            rest = str(count)[len(begun.digits) :]
            separator = "\n" if count == room else "|"
            yield from (Guess(rest, chance), Guess(separator, CERTAIN)) if rest else (Guess(separator, chance),)
            self._add(Run(begun.label, self._start, self._start + count), begun.target)
            if count == room:
                self.is_whole = True
                return
            part, counts_are_whole = "", False

    @property
    def _start(self) -> int:
        return self.runs[-1].end if self.runs else 0

    def _add(self, run: Run, target: int | None) -> None:
        self.runs.append(run)
        self._below = target
        self._finder.saw(run.label)

    def _find_above(self, run: Run) -> int | None:
        """The run above with this label that this one stands for: the nearest to the right of the last one's."""
        first = 0 if self._below is None else self._below + 1
        same = [i for i in range(first, len(self._above)) if self._above[i].label == run.label]
        return min(
            same,
            key=lambda i: abs(self._above[i].start - run.start) + abs(self._above[i].end - run.end),
            default=None,
        )

    def _begin_run(self, part: str) -> _BegunRun | None:
        """The run that begins with ``part``, up to the digits of its count; None if it may be any."""
        begun = _BEGUN_COUNT.fullmatch(part)
        if begun:
            return _BegunRun(begun[1], "", CERTAIN, begun[2], self._target(begun[1]))
        lead = "" if self._is_first and not self.runs else " "
        label, chance, target = self._next_label()
        if label is None or not f"{lead}{label} *".startswith(part):
            found = self._finder.find(part[len(lead) :], self.runs[-1].label if self.runs else None)
            if found is None or not f"{lead}{found[0]} *".startswith(part):
                return None
            label, chance = found
            target = self._target(label)
        rest = f"{lead}{label} *"[len(part) :]
        return _BegunRun(label, rest, CERTAIN if rest == "*" else chance, "", target)

    def _next_label(self) -> tuple[str | None, float, int | None]:
        """(label, its chance, the run above that it stands for)."""
        above, last = self._above, self.runs[-1] if self.runs else None
        if last is None:
            if not above:
                return BACKGROUND, SAME_FIRST_LABEL[2], None
            return above[0].label, SAME_FIRST_LABEL.get(above[0].end, SAME_LABEL), 0
        first = 0 if self._below is None else self._below + 1
        for i in range(first, len(above)):
            if above[i].end > last.end and above[i].label != last.label:
                return above[i].label, SAME_LABEL, i
        if last.label != BACKGROUND:
            return BACKGROUND, SAME_LABEL, self._target(BACKGROUND)
        found = self._finder.find("", BACKGROUND)
        return (*found, self._target(found[0])) if found else (None, 0.0, None)

    def _target(self, label: str) -> int | None:
        """The run above that a run of this label, beginning here, stands for."""
        first = 0 if self._below is None else max(self._below, 0)
        same = [i for i in range(first, len(self._above)) if self._above[i].label == label]
        ahead = [i for i in same if self._above[i].end > self._start]
        return min(ahead, key=lambda i: abs(self._above[i].start - self._start), default=None)

    def _guess_count(self, run: _BegunRun, room: int) -> tuple[int, float]:
        """The likeliest count and its chance; a count of 0 where there is none."""
        if not run.digits:
            return (1, CERTAIN) if room == 1 else self._likeliest_count(run, room)
        fitting = list(_counts_beginning(run.digits, room))
        if not fitting:
            return 0, 0.0
        weights = [self._weight(count, run, room) for count in fitting]
        best = max(range(len(fitting)), key=weights.__getitem__)
        return fitting[best], weights[best] / sum(weights) if len(fitting) > 1 else CERTAIN

    def _likeliest_count(self, run: _BegunRun, room: int) -> tuple[int, float]:
        if run.target is not None:
            end = self._above[run.target].end
            if end < self._width:
                return end - self._start, END_MOVES[0] / 100
            return room, STAYS_PLAIN if len(self._above) == 1 and not self.runs else STAYS_LAST
        if run.label == BACKGROUND:
            return room, BACKGROUND_GOES_ON
        return 1, FIRST_WIDTHS[1] / 100

    def _weight(self, count: int, run: _BegunRun, room: int) -> float:
        """How often a count is this one, of 100, for comparing counts that begin with the same digit."""
        reaches_end = count == room
        if run.target is None:
            if run.label == BACKGROUND:
                return 100 * BACKGROUND_GOES_ON if reaches_end else 100 * (1 - BACKGROUND_GOES_ON) / room
            return FIRST_WIDTHS[min(count, len(FIRST_WIDTHS) - 1)]
        end = self._above[run.target].end
        if end >= self._width:
            return 100 * STAYS_LAST if reaches_end else 100 * (1 - STAYS_LAST) / room
        move = abs(self._start + count - end)
        weight = END_MOVES[min(move, len(END_MOVES) - 1)]
        if reaches_end and run.label == BACKGROUND and run.target + 1 < len(self._above):
            following = self._above[run.target + 1]
            weight += OBJECT_ENDS.get(following.end - following.start, OBJECT_ENDS_WIDE)
        return weight


def _counts_beginning(digits: str, room: int) -> Iterator[int]:
    """Counts of 1 to ``room`` that begin with these digits."""
    first = int(digits)
    last = first
    while 0 < first <= room:
        yield from range(first, min(last, room) + 1)
        first, last = first * 10, last * 10 + 9


# ---------------------------------------------------------------- tokens

MAX_CACHED_LENGTH = 256  # characters of a text whose tokens are kept


class Vocabulary:
    """Tokens to text and back, for one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers, or a `tokenizers.Tokenizer`.
        marks_rows: the model tells rows apart by how it cuts ` others`, see `row_marks`.

    Attributes:
        tag_ends: tokens with a ``>`` in them: only these can complete a tag.
        counts_are_whole: a count of two digits is one token, so what stands after a sign is never half a count.

    Raises:
        RelayModelsError: the tokenizer is not a fast one, or it has no tokens to mark rows with.
    """

    # Text is decoded and encoded behind a digit, so that no tokenizer takes it for the beginning of a document. A digit
    # stands before a line end in every descriptor.
    _ANCHOR = "1"

    def __init__(self, tokenizer: Any, *, marks_rows: bool = False) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not all(hasattr(backend, name) for name in ("encode", "decode", "get_vocab", "token_to_id")):
            raise RelayModelsError(
                f"tokenizer must be a fast one, which tells where its tokens end, got {type(tokenizer).__name__}: "
                "serve without row drafts"
            )
        self._backend = backend
        self._pieces: dict[int, str] = {}
        self._anchor = self._encode_plain(self._ANCHOR).ids[-1:]
        self.encode = lru_cache(maxsize=4096)(self._encode)
        self._marks: tuple[tuple[int, ...], ...] = ()
        if marks_rows:
            try:
                self._marks = mark_tokens(backend.get_vocab())
            except KeyError as error:
                raise RelayModelsError(f"the tokenizer has no token {error}, which rows are marked with") from error
            (self._background,) = self.encode(f" {BACKGROUND}")[0]
        self.tag_ends = frozenset(token for text, token in backend.get_vocab().items() if ">" in text)
        self.counts_are_whole = len(self.encode("\n a *16")[0]) == len(self.encode("\n a *1")[0])

    def piece(self, token: int) -> str:
        """The text of one token inside a text. A part of a character is U+FFFD."""
        text = self._pieces.get(token)
        if text is None:
            text = self._pieces[token] = self.decode([token])
        return text

    def decode(self, tokens: Sequence[int]) -> str:
        anchored: str = self._backend.decode([*self._anchor, *tokens], skip_special_tokens=False)
        return anchored[len(self._ANCHOR) :]

    def _encode(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens of a text, and for each the number of characters up to its end. No tokens if its beginning is none."""
        encoding = self._encode_plain(self._ANCHOR + text)
        ends = [end for _, end in encoding.offsets]
        first = _num_tokens_to(len(self._ANCHOR), ends)
        if first is None:
            return (), ()
        return tuple(encoding.ids[first:]), tuple(end - len(self._ANCHOR) for end in ends[first:])

    def _encode_plain(self, text: str) -> Any:
        return self._backend.encode(text, add_special_tokens=False)

    def encode_rest(self, line: str, rest: str, limit: int, row: int = 0) -> list[int]:
        """At most ``limit`` tokens that write ``rest`` behind ``line``, which begins with a line end or a tag.

        ``row`` is the number of the line's row, from 0.

        None at all if ``line`` ends inside of one: the model has then written otherwise than the tokenizer would.
        A line end is taken to begin a token, as it does after a digit.
        """
        first, *others = rest.split("\n")
        tokens, ends = self._marked(line + first, row)
        num_written = _num_tokens_to(len(line), ends)
        if num_written is None:
            return []
        drafts = list(tokens[num_written:])
        for number, text in enumerate(others, start=row + 1):
            if len(drafts) >= limit:
                break
            drafts += self._marked("\n" + text, number)[0]
        return drafts[:limit]

    def _marked(self, line: str, row: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """As `encode`, with the marks of this row."""
        tokens, ends = self.encode(line) if len(line) <= MAX_CACHED_LENGTH else self._encode(line)
        if not 0 < row <= len(self._marks):
            return tokens, ends
        mark = self._marks[row - 1]
        marked: list[tuple[int, int]] = []
        for token, end in zip(tokens, ends, strict=True):
            if token != self._background:
                marked.append((token, end))
                continue
            place = end - sum(len(self.piece(piece)) for piece in mark)
            for piece in mark:
                place += len(self.piece(piece))
                marked.append((piece, place))
        return tuple(token for token, _ in marked), tuple(end for _, end in marked)


def _num_tokens_to(place: int, ends: Sequence[int]) -> int | None:
    """How many tokens it takes to this place in their text; None if it lies inside of one.

    The parts of a character all end where the character does, and so may an empty token.
    """
    count = bisect_right(ends, place)
    return count if place == (ends[count - 1] if count else 0) else None


# ---------------------------------------------------------------- one block, and a batch of them

TAG_REACH = 8  # tokens before a step's own in which a tag may have begun
CONTEXT_TOKENS = 256  # tokens before a tag in which a label may have been named
MAX_CONTEXT_LENGTH = 2048  # characters of them
MAX_LINE_LENGTH = 2048  # characters of a line that is drafted from or to; usual ones have a tenth of that
MAX_OPEN_LENGTH = 1 << 14  # characters of a line that may yet end; 255 runs are shorter unless labels are odd
MAX_OPEN_BLOCKS = 1024  # of requests that went away in the middle of a block, most of them
LEAST_CHANCE = 0.1  # a token that is less likely to be kept is not drafted
PRIOR_GUESSES = 4.0
FADING = 0.95


class OpenBlock:
    """An unfinished `<seg>` block of one answer.

    Attributes:
        begin: place of its first token in the request.
        tokens: all tokens from there on; the first ones are the tag and what stood before it.
        rows: its whole rows; an empty one for a line that could not be read, or is too long to be.
        is_closed: its closing tag was written, or it has become something that is no descriptor.
    """

    def __init__(self, vocabulary: Vocabulary, begin: int, tokens: list[int], names: Names, grid: Grid) -> None:
        self.begin = begin
        self.tokens = tokens
        self.rows: list[Row] = []
        self.is_closed = False
        self.last_step = 0
        self._vocabulary = vocabulary
        self._names = names
        self._grid = grid
        self._line = ""
        self._half_character: list[int] = []
        self._expected: list[Guess] = []
        self._hits = self._chances = PRIOR_GUESSES

    @property
    def grid(self) -> Grid:
        """The width that its first row has, and the height that goes with it."""
        if not self.rows or not self.rows[0]:
            return self._grid
        width = self.rows[0][-1].end
        return self._grid if width == self._grid.width else Grid(width, width)

    @property
    def trust(self) -> float:
        """How often guesses were right, over how often they should have been; lately counts more."""
        return self._hits / self._chances

    def feed(self, tokens: Iterable[int]) -> None:
        """Take what the model wrote next, and learn from it how good the last guesses were."""
        text = "".join(map(self._text_of, tokens))
        self._learn(text)
        self._expected = []
        self.read(text)

    def read(self, text: str) -> None:
        """Take text of the block."""
        *lines, self._line = (self._line + text).split("\n")
        self.rows += map(_read_row, lines)
        is_endless = len(self.rows) > MAX_SIDE or len(self._line) > MAX_OPEN_LENGTH
        self.is_closed = is_endless or CLOSE_TAG in self._line

    def draft(self, limit: int) -> list[int]:
        """At most ``limit`` tokens that probably come next."""
        if self.is_closed or self._half_character or len(self._line) > MAX_LINE_LENGTH:
            return []
        rest = "".join(self._likely_pieces(limit))
        head = "\n" if self.rows else OPEN_TAG
        return self._vocabulary.encode_rest(head + self._line, rest, limit, len(self.rows)) if rest else []

    def _likely_pieces(self, limit: int) -> Iterator[str]:
        """Pieces until the draft is long enough or too unlikely. The one that was too unlikely is watched as well."""
        self._expected = []
        chance, num_tokens, length = CERTAIN, 0, 0
        whole = self._vocabulary.counts_are_whole
        for guess in guess_text(self.rows, self._line, self.grid, self._names, counts_are_whole=whole):
            self._expected.append(guess)
            if guess.chance < CERTAIN:
                chance *= min(guess.chance * self.trust, SAME_LABEL)
            length += len(guess.text)
            if chance < LEAST_CHANCE or length > MAX_LINE_LENGTH:
                return
            yield guess.text
            num_tokens += 1 + guess.text.endswith(" *")
            if num_tokens >= limit:
                return

    def _learn(self, text: str) -> None:
        place = 0
        for guess in self._expected:
            is_right = text.startswith(guess.text, place)
            if not is_right and guess.text.startswith(text[place:]):
                return  # not written yet
            if guess.chance < CERTAIN:
                self._hits = FADING * self._hits + is_right
                self._chances = FADING * self._chances + guess.chance
            if not is_right:
                return
            place += len(guess.text)

    def _text_of(self, token: int) -> str:
        """The text of the next token; of several tokens that make up one character, with the last of them."""
        piece = self._vocabulary.piece(token)
        if not self._half_character and "\ufffd" not in piece:
            return piece
        self._half_character.append(token)
        text = self._vocabulary.decode(self._half_character)
        if "\ufffd" in text and len(self._half_character) < 4:
            return ""
        self._half_character = []
        return text


def _read_row(line: str) -> Row:
    """An empty one for what is none, or could not be one of a grid, or is too long to draft from."""
    row = parse_row(line) if len(line) <= MAX_LINE_LENGTH else None
    return row if row and row[-1].end <= MAX_SIDE else ()


class RowDrafter:
    """Drafts for the requests of a batch. It is told no request ids: a request is known again by its tokens.

    Args:
        vocabulary: the served model's.
        max_tokens: the longest draft.
        grid: the grid to expect until a block has shown another one.
    """

    def __init__(self, vocabulary: Vocabulary, max_tokens: int, grid: Grid | None = None) -> None:
        if max_tokens < 1:
            raise RelayModelsError(f"max_tokens must be at least 1, got {max_tokens}")
        self._vocabulary = vocabulary
        self._max_tokens = max_tokens
        self._grid = grid or Grid()
        self._blocks: dict[int, list[OpenBlock]] = {}  # by the length of their request
        self._step = 0

    @property
    def num_open_blocks(self) -> int:
        return sum(map(len, self._blocks.values()))

    def propose(
        self, sampled: Sequence[Sequence[int]], num_tokens_R: Sequence[int] | IntArray, token_ids: IntArray
    ) -> list[list[int]]:
        """A draft for each request; an empty one outside of a block.

        Args:
            sampled: the tokens that each of R requests has written in this step; none where it is still reading.
            num_tokens_R: [R] or longer, tokens of each request, these included.
            token_ids: [R, N] or larger, all tokens of each request; what lies past its end is never read.
        """
        self._step += 1
        drafts: list[list[int]] = []
        for request, (tokens, num_tokens) in enumerate(
            zip(sampled, _integers(num_tokens_R, len(sampled)), strict=True)
        ):
            block = self._follow(token_ids[request], num_tokens, tokens) if tokens else None
            drafts.append(block.draft(self._max_tokens) if block else [])
        if self.num_open_blocks > MAX_OPEN_BLOCKS:
            self._forget_oldest()
        return drafts

    def _follow(self, token_ids_N: IntArray, num_tokens: int, written: Sequence[int]) -> OpenBlock | None:
        """The block that the request is in after it has written these tokens."""
        block = self._take(token_ids_N, num_tokens - len(written))
        if block:
            block.tokens += written
            block.feed(written)
            if block.is_closed:
                self._remember_grid(block)
                block = None
        if not block and not self._vocabulary.tag_ends.isdisjoint(written):
            block = self._open(token_ids_N, num_tokens, len(written))
        if block:
            block.last_step = self._step
            self._blocks.setdefault(num_tokens, []).append(block)
        return block

    def _take(self, token_ids_N: IntArray, num_tokens: int) -> OpenBlock | None:
        """The open block that a request of so many tokens ends with: one with the very same tokens."""
        blocks = self._blocks.get(num_tokens, ())
        for i, block in enumerate(blocks):
            if token_ids_N[block.begin : num_tokens].tolist() == block.tokens:
                found = self._blocks[num_tokens].pop(i)
                if not self._blocks[num_tokens]:
                    del self._blocks[num_tokens]
                return found
        return None

    def _open(self, token_ids_N: IntArray, num_tokens: int, num_written: int) -> OpenBlock | None:
        """A new block, if the tokens just written complete its tag and do not close it again."""
        begin = max(0, num_tokens - num_written - TAG_REACH)
        tokens = token_ids_N[begin:num_tokens].tolist()
        pieces = list(map(self._vocabulary.piece, tokens))
        text = "".join(pieces)
        tag_end = text.rfind(OPEN_TAG) + len(OPEN_TAG)
        if tag_end < len(OPEN_TAG) or tag_end <= len("".join(pieces[: len(pieces) - num_written])):
            return None
        before = self._vocabulary.decode(token_ids_N[max(0, begin - CONTEXT_TOKENS) : begin].tolist())
        names = Names((before + text[: tag_end - len(OPEN_TAG)])[-MAX_CONTEXT_LENGTH:])
        block = OpenBlock(self._vocabulary, begin, tokens, names, self._grid)
        place = 0
        for token, piece in zip(tokens, pieces, strict=True):
            if place >= tag_end:
                block.feed([token])
            elif place + len(piece) > tag_end:
                block.read(piece[tag_end - place :])
            place += len(piece)
        return None if block.is_closed else block

    def _remember_grid(self, block: OpenBlock) -> None:
        """Expect the next block to be like this one, if it was whole."""
        widths = {row[-1].end if row else 0 for row in block.rows}
        if len(block.rows) <= MAX_SIDE and len(widths) == 1 and 1 <= min(widths) <= MAX_SIDE:
            self._grid = Grid(len(block.rows), widths.pop())

    def _forget_oldest(self) -> None:
        blocks = sorted(
            ((block, length) for length, found in self._blocks.items() for block in found),
            key=lambda pair: pair[0].last_step,
            reverse=True,
        )
        self._blocks = {}
        for block, length in blocks[: MAX_OPEN_BLOCKS // 2]:
            self._blocks.setdefault(length, []).append(block)


def _integers(values: Sequence[int] | IntArray, count: int) -> list[int]:
    taken = values[:count]
    return taken.tolist() if isinstance(taken, np.ndarray) else list(taken)

"""Grammars that a descriptor cannot leave: handed to structured output, they make a malformed mask impossible.

Legend: H rows of the grid, W columns, L labels of a closed set, n cells of a row that are still to be named.

`seg_grammar` writes the EBNF that xgrammar reads (vLLM: `structured_outputs.grammar`) for one grid, one set of labels
and one kind of preamble. Text4Seg (arXiv 2410.09855) decodes without one. What it promises:
    exact: between the tags stand H rows of runs whose counts add up to W, of labels from the set, written as `encode`
        writes them, and after the last `</seg>` nothing but a stop token.
    bounded: text, labels, rows and blocks all have an end, so no sampler, however it draws, writes more than
        `worst_case_bytes` tokens and a stop token. What a smaller `max_tokens` cuts is the one incomplete descriptor
        left, and decoding calls it truncated.
    small: a row needs O(W) rules and O(W^2 + L) alternatives. Its labels are written once, for all places they may
        stand at, and not once for each count that may follow.

Neighbouring runs with different labels are part of the format, but a rule that knows the label before and the cells to
come exists W*L times, with W alternatives each. `GrammarSpec.keeps_runs_apart` says whether the set is small enough
for that (`MAX_APART`). In larger sets and in open ones a model may divide a run (`cat *2| cat *3`): decoding reads the
same cells, and reports `Repair.SEPARATOR`.

A grammar forces: a model that would have refused draws a mask all the same. `allow_refusal` leaves it the choice to end
its answer without one.

Free text and open labels are written as `Regex(...)`, which xgrammar 0.2 makes one automaton of. As plain character
classes they compile three times as long, and tokens of several characters are parsed anew at every step, for up to
30 milliseconds. The other grammars use no macro, and llguidance reads them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

from relay_models.errors import GrammarError, LabelError
from relay_models.text4seg.codec import BACKGROUND, CLOSE_TAG, MAX_BLOCKS, OPEN_TAG, DescriptorFormat
from relay_models.text4seg.labels import check_label, match_key

MAX_SIDE = 64  # rows or columns: the largest grid that was published
MAX_LABELS = 1024  # the largest published class list, ADE20K's, has 847
MAX_LABEL_CHARACTERS = 32_768  # of all labels of a set together
# Alternatives of a row up to which neighbouring runs are kept apart; as many compile in half a second. That is 40
# labels on a grid of 16, 22 on 24 (Pascal has 20 and the background), 14 on 32 and 4 on 64.
MAX_APART = 9_000
MAX_SENTENCES = 64
MAX_SENTENCE_CHARACTERS = 1024
# xgrammar 0.2 compiles no more repetitions of a group than these, and says so only in the engine.
MAX_FREE_CHARACTERS = 128
MAX_LABEL_LETTERS = 64

UTF8_BYTES = 4  # of one character, at most

# Code points, inclusive.
_CONTROLS = ((0x00, 0x09), (0x0B, 0x1F), (0x7F, 0x7F))  # but for the line feed
_SPACES = (
    (0x0A, 0x0A), (0x20, 0x20), (0x80, 0xA0), (0x1680, 0x1680), (0x2000, 0x200B), (0x2028, 0x202F), (0x205F, 0x205F),
    (0x3000, 0x3000), (0xFEFF, 0xFEFF),
)  # fmt: skip
_SURROGATES = (0xD800, 0xDFFF)
_END = 0x110000
# Where UTF-8 takes another byte.
_UTF8_LENGTHS = (0, 0x80, 0x800, 0x10000, _END)

_TAG = re.compile("</?seg>")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class FreeText:
    """Any text of at least one character without ``<``.

    The first grammar with free text costs an engine about ``6 * max_characters`` milliseconds of one core, for each
    character is a state in which every token is tried; it keeps what it found, for all grammars with the same limit.

    Attributes:
        max_characters: after so many the descriptor has to begin, or the answer to end.
    """

    max_characters: int = MAX_FREE_CHARACTERS

    def __post_init__(self) -> None:
        _check_integer("max_characters", self.max_characters, MAX_FREE_CHARACTERS)


@dataclass(frozen=True)
class GrammarSpec:
    """What an answer may be.

    Attributes:
        height: rows of the grid.
        width: columns of the grid.
        labels: the labels that may occur, `others` among them where it may, or None for any label (an open set).
        preamble: what may stand before a descriptor: free text or nothing, or else one of these sentences, each
            written to the last character before the tag, its newline included. A tokenizer's space before the first
            word of the answer is always permitted.
        format: R-RLE or full. I-RLE is refused: counts that add up to H*W need a grammar of that many rules.
        max_blocks: descriptors in one answer, each with its preamble.
        allow_refusal: whether the answer may also be free text without a descriptor.
        max_label_letters: of a label of an open set, the single spaces between its words not counted.

    Raises:
        GrammarError: a field has a value for which there is no grammar; the message names both.
    """

    height: int
    width: int
    labels: tuple[str, ...] | None
    preamble: FreeText | tuple[str, ...] = field(default_factory=FreeText)
    format: DescriptorFormat = DescriptorFormat.R_RLE
    max_blocks: int = 1
    allow_refusal: bool = False
    max_label_letters: int = 24

    def __post_init__(self) -> None:
        _check_integer("height", self.height, MAX_SIDE)
        _check_integer("width", self.width, MAX_SIDE)
        _check_integer("max_blocks", self.max_blocks, MAX_BLOCKS)
        _check_integer("max_label_letters", self.max_label_letters, MAX_LABEL_LETTERS)
        if not isinstance(self.allow_refusal, bool):
            raise GrammarError(f"allow_refusal must be true or false, got {self.allow_refusal!r}")
        if not isinstance(self.format, DescriptorFormat) or self.format is DescriptorFormat.I_RLE:
            raise GrammarError(
                f"format must be {DescriptorFormat.R_RLE} or {DescriptorFormat.FULL}, got {_shown(self.format)}: "
                f"decode other formats without a grammar"
            )
        if self.labels is not None:
            _check_labels(self.labels)
        if not isinstance(self.preamble, FreeText):
            _check_sentences(self.preamble)

    @classmethod
    def referring(cls, expression: str, *, height: int, width: int, **others: Any) -> GrammarSpec:
        """One referred expression and the background; ``others`` are the remaining fields."""
        return cls(height, width, (BACKGROUND, expression), **others)

    @property
    def keeps_runs_apart(self) -> bool:
        """Whether the grammar lets no run follow one of the same label. Closed sets then always decode as complete."""
        if self.format is DescriptorFormat.FULL or self.width == 1:
            return True
        if self.labels is None:
            return False
        num_labels = len(self.labels)
        return self.width * num_labels * (self.width // 2 + num_labels.bit_length()) <= MAX_APART


@lru_cache(maxsize=128)
def seg_grammar(spec: GrammarSpec) -> str:
    """The grammar of all answers that the spec allows, as EBNF whose root rule is `root`.

    At most 200 kB beside its labels and sentences, and pure: equal specs give the same string, so that the engine's
    cache of compiled grammars hits.
    """
    return "\n".join(_rules(spec)) + "\n"


@lru_cache(maxsize=32)
def body_grammar(spec: GrammarSpec) -> str:
    """The grammar of what stands between the tags alone: of a spec, its grid, labels and format.

    For a structural tag, which leaves the text around descriptors free and without bounds.
    """
    return "\n".join(_body("root", spec)) + "\n"


def worst_case_characters(spec: GrammarSpec) -> int:
    """Characters of the longest answer: preambles, tags and descriptors, or the refusal."""
    return _longest_answer(spec, len, free_character=1)


def worst_case_bytes(spec: GrammarSpec) -> int:
    """Bytes (UTF-8) of the longest answer, and so the most tokens before the stop token that any sampler can draw."""
    return _longest_answer(spec, lambda text: len(text.encode()), free_character=UTF8_BYTES)


def worst_case_tokens(spec: GrammarSpec, count_tokens: Callable[[str], int]) -> int:
    """Tokens of the longest answer as a tokenizer writes it, the stop token not counted.

    The longest descriptor is a checkerboard: W runs a row, of the labels that take the most tokens. Text that the spec
    leaves free, preambles and the labels of an open set, counts a token a byte, which for an open set is far more than
    any model writes: there it is a limit to generate under, and no ground to refuse a request. A model may also spell
    a label in more tokens than its tokenizer would; `worst_case_bytes` bounds that.

    Args:
        count_tokens: how many tokens a text has, no special tokens added.
    """
    return _longest_answer(spec, count_tokens, free_character=UTF8_BYTES)


# ---------------------------------------------------------------- rules


def _rules(spec: GrammarSpec) -> Iterator[str]:
    has_free_preamble = isinstance(spec.preamble, FreeText)
    # Free text may begin with a space anyway.
    space = "" if has_free_preamble else '" "? '
    part = f"part{{1,{spec.max_blocks}}}" if spec.max_blocks > 1 else "part"
    yield f"root ::= {space}{part}" + (" | text" if spec.allow_refusal else "")
    block = f"body {_literal(CLOSE_TAG)}"
    if isinstance(spec.preamble, FreeText):
        # The tag follows the text in one rule: what xgrammar computes for the text then serves all grids and labels.
        yield f"part ::= {_literal(OPEN_TAG)} {block} | opening {block}"
        yield f"opening ::= text {_literal(OPEN_TAG)}"
    else:
        yield f"part ::= opening {block}"
        yield f"opening ::= {_choice(_literal(sentence + OPEN_TAG) for sentence in spec.preamble)}"
    if has_free_preamble or spec.allow_refusal:
        any_text = f"{_any_but(('<', '<'), *_CONTROLS)}{{1,{_free_text(spec).max_characters}}}"
        yield f"text ::= Regex({_literal(any_text)})"
    yield from _body("body", spec)


def _body(name: str, spec: GrammarSpec) -> Iterator[str]:
    """What stands between the tags. A row rule ends with its newline, for the last row has one too."""
    if spec.format is DescriptorFormat.FULL:
        yield f"{name} ::= label{_repeated('next', spec.height * spec.width - 1)}"
        yield 'next ::= "| " label'
        yield f"label ::= {_any_label(spec)}"
        return
    yield f"{name} ::= row{_repeated('next', spec.height - 1)}"
    yield 'next ::= " " row'
    if spec.labels is None or not spec.keeps_runs_apart or spec.width == 1:
        yield from _row_of_any_runs(spec)
    elif len(spec.labels) == 1:
        yield f"row ::= {_literal(f'{spec.labels[0]} *')} {_line_end(spec.width)}"
    else:
        yield from _row_of_runs_apart(spec.width, spec.labels)


def _free_text(spec: GrammarSpec) -> FreeText:
    return spec.preamble if isinstance(spec.preamble, FreeText) else FreeText()


def _row_of_any_runs(spec: GrammarSpec) -> Iterator[str]:
    """`rest{n}` is a count and what follows it, where n cells are to be named.

    Labels are in the one rule `run`, and so is the space before them in `more`: whatever tokens may stand after a space
    is then found out once, and not once for each count.
    """
    yield f"row ::= run rest{spec.width}"
    yield f"run ::= {_any_label(spec, ' *')}"
    yield 'more ::= "| " run'
    for n in range(1, spec.width + 1):
        counts = [f'"{count}" more rest{n - count}' for count in range(1, n)]
        yield f"rest{n} ::= {_choice([*counts, _line_end(n)])}"


def _row_of_runs_apart(width: int, labels: tuple[str, ...]) -> Iterator[str]:
    """Rules that know n, the cells to be named, and i, the label before.

    `rest{n}x{i}` is the count of label i and what follows it, `not{n}x{i}` a run of another label and what follows.
    "Another label" is a handful of ranges of labels, those beside the path to i in a binary tree, so that n and i meet
    in log L alternatives and not in L. The rules in which characters stand, `run`, `more` and `last`, know nothing.
    """
    for i, label in enumerate(labels):
        yield f"run{i} ::= {_literal(f'{label} *')}"
    for count in range(1, width + 1):
        yield f"last{count} ::= {_line_end(count)}"
        yield f'more{count} ::= "{count}| "'
    yield f"row ::= {_range(width, 0, len(labels))}"
    for n in range(1, width + 1):
        for start, middle, end in _tree(0, len(labels)):
            yield f"any{n}x{start}to{end} ::= {_range(n, start, middle)} | {_range(n, middle, end)}"
        for i in range(len(labels)):
            counts = [f"more{count} not{n - count}x{i}" for count in range(1, n)]
            yield f"rest{n}x{i} ::= {_choice([*counts, f'last{n}'])}"
            if n < width:
                yield f"not{n}x{i} ::= {_choice(_range(n, *ends) for ends in _beside(i, 0, len(labels)))}"


def _range(n: int, start: int, end: int) -> str:
    """A run of one of the labels ``[start, end)``, and what follows it in n cells."""
    return f"any{n}x{start}to{end}" if end - start > 1 else f"run{start} rest{n}x{start}"


def _tree(start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The inner nodes of a binary tree over ``[start, end)``: start, middle, end."""
    if end - start > 1:
        middle = (start + end) // 2
        yield start, middle, end
        yield from _tree(start, middle)
        yield from _tree(middle, end)


def _beside(i: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Nodes of that tree that hold all of ``[start, end)`` but i."""
    while end - start > 1:
        middle = (start + end) // 2
        if i < middle:
            yield middle, end
            end = middle
        else:
            yield start, middle
            start = middle


def _any_label(spec: GrammarSpec, end: str = "") -> str:
    """A label and what ends it: in one automaton where the set is open, for there a space may end it or go on.

    Open labels have no character that ends a run or a tag begins with, and white space only as single spaces between
    words. A word does not begin with `*`, for ` *` begins the count.
    """
    if spec.labels is not None:
        return _choice(_literal(label + end) for label in spec.labels)
    no_letters = (("|", "|"), ("<", "<"), *_CONTROLS, *_SPACES)
    letter, first_letter = _any_but(*no_letters), _any_but(("*", "*"), *no_letters)
    label = f"{first_letter}({letter}| {first_letter}){{0,{spec.max_label_letters - 1}}}"
    return f"Regex({_literal(label + re.escape(end))})"


def _any_but(*excluded: tuple[int | str, int | str]) -> str:
    """Any character but those in these ranges, as a regular expression.

    It has a class for each length in UTF-8: a class across two lengths, xgrammar 0.2 reads as if any bytes might follow
    the first, and would let through what is no text.
    """
    ranges = sorted((_code_point(first), _code_point(last)) for first, last in (*excluded, _SURROGATES))
    classes = []
    for low, high in pairwise(_UTF8_LENGTHS):
        allowed, start = "", low
        for first, last in [*ranges, (high, high)]:
            if start < min(first, high):
                allowed += f"{_in_class(start)}-{_in_class(min(first, high) - 1)}"
            start = max(start, last + 1)
        classes.append(f"[{allowed}]")
    return f"({'|'.join(classes)})"


def _code_point(character: int | str) -> int:
    return ord(character) if isinstance(character, str) else character


def _in_class(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x80 else chr(code)


def _repeated(rule: str, count: int) -> str:
    return f" {rule}{{{count}}}" if count else ""


def _choice(alternatives: Iterable[str]) -> str:
    return " | ".join(alternatives)


def _literal(text: str) -> str:
    """The text as a string of the grammar: what can be printed as it is, everything else by its code point."""
    return f'"{"".join(map(_escaped, text))}"'


def _line_end(count: int) -> str:
    """The last count of a row."""
    return _literal(f"{count}\n")


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character == "\n":
        return "\\n"
    if character.isprintable():
        return character
    # Not \x, which takes as many hexadecimal digits as follow.
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


# ---------------------------------------------------------------- lengths


def _longest_answer(spec: GrammarSpec, measure: Callable[[str], int], *, free_character: int) -> int:
    """The length of the longest answer, a sum over its pieces."""
    free = _free_text(spec).max_characters * free_character
    preamble = free if isinstance(spec.preamble, FreeText) else max(map(measure, spec.preamble))
    block = measure(OPEN_TAG) + _longest_body(spec, measure, free_character) + measure(CLOSE_TAG)
    space = 0 if isinstance(spec.preamble, FreeText) else measure(" ")
    answer = space + spec.max_blocks * (preamble + block)
    return max(answer, free) if spec.allow_refusal else answer


def _longest_body(spec: GrammarSpec, measure: Callable[[str], int], free_character: int) -> int:
    """The length of the checkerboard, or of single runs where a set has but one label and a row so one run."""
    if spec.format is DescriptorFormat.FULL:
        rows, columns, count = 1, spec.height * spec.width, ""
    elif spec.keeps_runs_apart and spec.labels is not None and len(spec.labels) == 1:
        rows, columns, count = spec.height, 1, f" *{spec.width}"
    else:
        rows, columns, count = spec.height, spec.width, " *1"
    is_divided = spec.format is DescriptorFormat.FULL or not spec.keeps_runs_apart

    def longest_runs(lead: str) -> tuple[int, int]:
        """What the longest run takes, and what a neighbour of it takes."""
        if spec.labels is None:
            letters = spec.max_label_letters
            longest = measure(f"{lead}{count}") + letters * free_character + (letters - 1) * measure(" ")
            return longest, longest
        lengths = sorted((measure(f"{lead}{label}{count}") for label in spec.labels), reverse=True)
        return lengths[0], lengths[0 if is_divided else min(1, len(lengths) - 1)]

    starts = longest_runs("")[0] + (rows - 1) * longest_runs("\n ")[0]
    longest, neighbour = longest_runs("| ")
    following = (columns // 2) * neighbour + ((columns - 1) // 2) * longest
    return starts + rows * following + (measure("\n") if count else 0)


# ---------------------------------------------------------------- checks


def _check_integer(name: str, value: Any, largest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise GrammarError(f"{name} must be an integer from 1 to {largest}, got {_shown(value)}")


def _check_labels(labels: Any) -> None:
    _check_strings("labels", labels, MAX_LABELS)
    spelling_of_key: dict[str, str] = {}
    for i, label in enumerate(labels):
        try:
            check_label(label)
        except LabelError as error:
            raise GrammarError(f"labels[{i}]: {error}") from error
        key = match_key(label)
        if key in spelling_of_key:
            raise GrammarError(
                f"labels[{i}] is {_shown(label)}, the same class as {_shown(spelling_of_key[key])}: keep one of them"
            )
        if key == BACKGROUND and label != BACKGROUND:
            raise GrammarError(f"labels[{i}] is {_shown(label)}, which is the background: write it {BACKGROUND!r}")
        spelling_of_key[key] = label
    num_characters = sum(map(len, labels))
    if num_characters > MAX_LABEL_CHARACTERS:
        raise GrammarError(
            f"labels must have at most {MAX_LABEL_CHARACTERS} characters together, got {num_characters}: ask for fewer "
            f"classes at a time"
        )


def _check_sentences(sentences: Any) -> None:
    _check_strings("preamble", sentences, MAX_SENTENCES)
    for i, sentence in enumerate(sentences):
        if len(sentence) > MAX_SENTENCE_CHARACTERS:
            raise GrammarError(
                f"preamble[{i}] must have at most {MAX_SENTENCE_CHARACTERS} characters, got {len(sentence)}"
            )
        if _TAG.search(sentence):
            raise GrammarError(f"preamble[{i}] must not contain a tag, which the grammar adds, got {_shown(sentence)}")
        if _SURROGATE.search(sentence):
            raise GrammarError(f"preamble[{i}] must be text, got half of a surrogate pair in {_shown(sentence)}")


def _check_strings(name: str, values: Any, largest: int) -> None:
    if not isinstance(values, tuple) or not all(isinstance(value, str) for value in values):
        raise GrammarError(f"{name} must be a tuple of strings, got {_shown(values)}")
    if not 1 <= len(values) <= largest:
        raise GrammarError(f"{name} must hold from 1 to {largest} strings, got {len(values)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"

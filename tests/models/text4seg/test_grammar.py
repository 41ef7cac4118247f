"""The grammars, through xgrammar: they accept what the format allows and nothing else, and end however one samples.

What the format allows is decided here by `is_exact`, which shares nothing with the grammar, the encoder or the decoder.
The vocabulary is made up: every byte, and pieces that straddle whatever a grammar keeps apart.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import llguidance
import numpy as np
import pytest
import xgrammar
from codec_cases import golden_json, labelled_grids, text_cells, written
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_models.errors import GrammarError
from relay_models.text4seg import grammar as grammar_module
from relay_models.text4seg.codec import DescriptorFormat, DescriptorStatus, Repair, decode_answer
from relay_models.text4seg.grammar import (
    MAX_FREE_CHARACTERS,
    FreeText,
    GrammarSpec,
    body_grammar,
    seg_grammar,
    worst_case_bytes,
    worst_case_characters,
    worst_case_tokens,
)

R_RLE, FULL = DescriptorFormat.R_RLE, DescriptorFormat.FULL
NOTHING = ("",)
SENTENCE = ("Sure, here is the segmentation mask for 'dog':\n",)
HOSTILE_LABELS = (
    "others", 'say "hi"', "back\\slash", "\\n", "[a-z]+", "a{2}", "# no // comment", "5* hotel", "*", "a * b",
    "::= root", "Straße", "狗", "dog 🐕", "é", "x<y>", "it's 50% (off)", "<seg", "\\u0041", "a",
)  # fmt: skip

STOP = 0
PIECES = (
    "| ", "|", " *", "*1", " *1", "*16", "16", "11", "1|", "2| ", "\n ", "\n", "1\n", "1\n ", " others", "others",
    "ers *", "hers", " dog", "dog *", "dog house", " house", "red", "<seg>", "<se", "g>others", ">", "</seg>", "</",
    "seg>", "\n</", "\n<seg>", "| dog", " *1| ", " *1| others *2", "Sure", " Sure", ", here", ":\n", "sorry", "I'm",
    " cannot", "狗", "é",
)  # fmt: skip
VOCABULARY = [b"<stop>", *(bytes([byte]) for byte in range(256)), *(piece.encode() for piece in PIECES)]


@lru_cache(maxsize=1)
def compiler() -> xgrammar.GrammarCompiler:
    info = xgrammar.TokenizerInfo(
        VOCABULARY, vocab_type=xgrammar.VocabType.RAW, vocab_size=len(VOCABULARY), stop_token_ids=[STOP]
    )
    return xgrammar.GrammarCompiler(info, max_threads=2)


@lru_cache(maxsize=256)
def compiled(grammar: str) -> xgrammar.CompiledGrammar:
    return compiler().compile_grammar(grammar)


def accepts(grammar: str | GrammarSpec, answer: str) -> bool:
    """Whether this is a whole answer: after its last character a stop token may follow."""
    if isinstance(grammar, GrammarSpec):
        grammar = seg_grammar(grammar)
    matcher = xgrammar.GrammarMatcher(compiled(grammar))
    return (not answer or matcher.accept_string(answer)) and matcher.accept_token(STOP)


# ---------------------------------------------------------------- what the format allows


def is_exact(body: str, spec: GrammarSpec) -> bool:
    """Whether the body is one that the spec allows, decided row by row without a grammar."""
    if spec.format is FULL:
        cells = body.split("| ")
        return len(cells) == spec.height * spec.width and all(is_label(cell, spec) for cell in cells)
    if not body.endswith("\n"):
        return False
    rows = body[:-1].split("\n ")
    return len(rows) == spec.height and all(is_exact_row(row, spec) for row in rows)


def is_exact_row(row: str, spec: GrammarSpec) -> bool:
    runs = [re.fullmatch(r"(.*) \*([1-9][0-9]{0,2})", run, re.DOTALL) for run in row.split("| ")]
    if not all(runs):
        return False
    labels = [run[1] for run in runs if run]
    is_apart = all(left != right for left, right in itertools.pairwise(labels))
    return (
        sum(int(run[2]) for run in runs if run) == spec.width
        and all(is_label(label, spec) for label in labels)
        and (is_apart or not spec.keeps_runs_apart)
    )


def is_label(label: str, spec: GrammarSpec) -> bool:
    if spec.labels is not None:
        return label in spec.labels
    words = label.split(" ")
    return (
        all(word and not word.startswith("*") and re.fullmatch(r"[^|<\s\x00-\x1f\x7f-\xa0]+", word) for word in words)
        and len(label.replace(" ", "")) <= spec.max_label_letters
    )


def answer_of(body: str, preamble: str = "") -> str:
    return f"{preamble}<seg>{body}</seg>"


# ---------------------------------------------------------------- the golden vectors


def golden_grids() -> Iterator[tuple[dict, dict[str, str]]]:
    strings = golden_json("codec_valid", "strings.json")
    for case in golden_json("codec_valid", "maps.json"):
        yield case, strings[case["id"]]


def test_golden_descriptors_are_accepted_with_their_own_labels() -> None:
    seen = 0
    for case, strings in golden_grids():
        for format in (R_RLE, FULL):
            spec = GrammarSpec(case["h"], case["w"], tuple(case["labels"]), NOTHING, format=format)
            assert accepts(spec, answer_of(strings[format])), (case["id"], format)
            seen += 1
    assert seen == 120


def test_golden_descriptors_are_accepted_by_open_grammars() -> None:
    for case, strings in golden_grids():
        if case["w"] < 64:
            spec = GrammarSpec(case["h"], case["w"], None, NOTHING)
            assert accepts(spec, answer_of(strings[R_RLE])), case["id"]


def test_published_answers_are_accepted_after_free_text_and_after_their_sentence() -> None:
    for case in golden_json("published_examples", "examples.json"):
        sentence = case["response"].split("<seg>")[0]
        for preamble in (FreeText(), (sentence,), ("Another sentence.\n", sentence)):
            spec = GrammarSpec(16, 16, tuple(case["labels"]), preamble)
            assert accepts(spec, case["response"]), (sentence, preamble)
            assert accepts(spec, " " + case["response"]), "a tokenizer's leading space"


def mutations(body: str) -> Iterator[tuple[str, str]]:
    """What is wrong, and the golden body with it, in the middle row and in the last."""
    rows = body[:-1].split("\n ")
    for i in {len(rows) // 2, len(rows) - 1}:
        label, count = rows[i].rsplit(" *", 1)
        changed = {
            "row short": f"{label} *{int(count) - 1}" if count != "1" else rows[i].rsplit("| ", 1)[0],
            "row long": f"{label} *{int(count) + 1}",
            "count 0": f"{label} *0| {rows[i]}",
            "leading zero": f"{label} *0{count}",
            "no count": label,
            "negative count": f"{label} *-1| {rows[i]}",
            "full-width count": f"{label} *{count}".translate({ord(str(d)): chr(0xFF10 + d) for d in range(10)}),
            "unknown label": f"no such label *{count}",
            "label begun": f"{label[:-1]} *{count}" if len(label.rsplit("| ")[-1]) > 1 else f"{label}s *{count}",
            "capital label": f"{label.upper() if label.upper() != label else f'{label}A'} *{count}",
            "no space before the count": f"{label}*{count}",
            "two spaces before the count": f"{label}  *{count}",
            "space after the count": f"{rows[i]} ",
            "comma": f"{rows[i]}, ",
            "bar at the end": f"{rows[i]}| ",
            "bar without a space": f"{rows[i]}|{rows[i]}",
            "row empty": "",
            "row twice": f"{rows[i]}| {rows[i]}",
        }
        for fault, row in changed.items():
            yield fault, "\n ".join([*rows[:i], row, *rows[i + 1 :]]) + "\n"
    yield "missing newline at the end", body[:-1]
    yield "two newlines at the end", body + "\n"
    yield "space at the end", body + " "
    yield "space at the start", " " + body
    yield "newline at the start", "\n" + body
    yield "extra row", body + f" {rows[0]}\n"
    yield "missing row", "\n ".join(rows[:-1]) + "\n"
    yield "empty", ""
    if len(rows) > 1:
        yield "missing newline", body.replace("\n ", "| ", 1)
        yield "newline without a space", body.replace("\n ", "\n", 1)
        yield "carriage return", body.replace("\n", "\r\n", 1)


def test_every_mutation_of_a_golden_descriptor_is_rejected() -> None:
    faults = set()
    for case, strings in golden_grids():
        if case["h"] * case["w"] > 600 or case["w"] == 1:
            continue
        closed = GrammarSpec(case["h"], case["w"], tuple(case["labels"]), NOTHING)
        for fault, body in mutations(strings[R_RLE]):
            assert not is_exact(body, closed), (case["id"], fault)
            assert not accepts(closed, answer_of(body)), (case["id"], fault)
            faults.add(fault)
    assert len(faults) == 29


def test_every_mutation_is_rejected_by_the_grammar_that_does_not_keep_runs_apart(monkeypatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_APART", 0)
    seg_grammar.cache_clear()
    case, strings = next((case, strings) for case, strings in golden_grids() if len(case["labels"]) == 6)
    spec = GrammarSpec(case["h"], case["w"], tuple(case["labels"]), NOTHING)
    assert not spec.keeps_runs_apart
    assert accepts(spec, answer_of(strings[R_RLE]))
    for fault, body in mutations(strings[R_RLE]):
        assert not accepts(spec, answer_of(body)), fault
    seg_grammar.cache_clear()


def test_open_grammars_reject_what_is_wrong_whatever_the_labels() -> None:
    """A begun, an unknown and a capital label are labels of an open set."""
    allowed = {"unknown label", "label begun", "capital label", "row twice"}
    case, strings = next((case, strings) for case, strings in golden_grids() if case["id"] == "a43")
    spec = GrammarSpec(case["h"], case["w"], None, NOTHING)
    for fault, body in mutations(strings[R_RLE]):
        assert accepts(spec, answer_of(body)) == is_exact(body, spec), fault
        assert fault in allowed or not is_exact(body, spec), fault


@pytest.mark.parametrize(
    "around",
    [
        "{}",
        "{}</seg> ",
        "{}</seg>\n",
        "<seg>{}</seg><seg>{}</seg>",
        "{}</seg></seg>",
        "{}<seg>",
        " {}</seg>",
        "{}</seg",
    ],
)
def test_nothing_stands_around_a_descriptor(around: str) -> None:
    body = "dog *2\n others *2\n"
    spec = GrammarSpec.referring("dog", height=2, width=2, preamble=NOTHING)
    assert accepts(spec, f"<seg>{body}</seg>")
    answer = around.format(body, body)
    assert not accepts(spec, answer if answer.startswith("<seg>") else f"<seg>{answer}")


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("width", [4, 30], ids=["apart", "together"])
def test_labels_stand_in_the_grammar_as_they_are_written(width: int) -> None:
    """Quotes, backslashes, brackets, comments and characters of several bytes mean nothing to the grammar."""
    spec = GrammarSpec(1, width, HOSTILE_LABELS, NOTHING)
    assert spec.keeps_runs_apart == (width == 4)
    for label, neighbour in itertools.pairwise(HOSTILE_LABELS):
        assert accepts(spec, f"<seg>{label} *1| {neighbour} *{width - 1}\n</seg>"), label
        assert not accepts(spec, f"<seg>{label}{neighbour} *1| {neighbour} *{width - 1}\n</seg>"), label
        assert not accepts(spec, f"<seg>{label[1:]}? *{width}\n</seg>"), label


@pytest.mark.parametrize("label", ["狗" * 12, "a" * 24, "a b c d e f g h i j k l", "5* hotel", "a>b", "x*", "dog 🐕"])
def test_open_grammars_accept_labels_of_any_script(label: str) -> None:
    assert accepts(GrammarSpec(1, 2, None, NOTHING), f"<seg>{label} *2\n</seg>")


@pytest.mark.parametrize(
    "label",
    ["", " ", " a", "a ", "a  b", "a|b", "a<b", "*a", "a *b", "a\tb", "a\nb", "a\u00a0b", "a\u3000b", "a\u2028b",
     "\x7f", "a\ufeff", "a" * 25],
)  # fmt: skip
def test_open_grammars_reject_labels_that_are_lost_or_ambiguous(label: str) -> None:
    assert not accepts(GrammarSpec(1, 2, None, NOTHING), f"<seg>{label} *2\n</seg>")


def test_open_labels_have_as_many_letters_as_the_spec_says() -> None:
    spec = GrammarSpec(1, 1, None, NOTHING, max_label_letters=3)
    assert accepts(spec, "<seg>a b c *1\n</seg>")
    assert not accepts(spec, "<seg>abcd *1\n</seg>")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_grammar_and_format_agree_on_any_small_change(data: st.DataObject) -> None:
    """A valid descriptor of any labels is accepted; changed by a character or a piece, only if it is still valid."""
    cells_HW, labels = data.draw(labelled_grids(max_side=5))
    known = tuple(labels) if data.draw(st.booleans()) else None
    format = data.draw(st.sampled_from((R_RLE, FULL)))
    spec = GrammarSpec(*cells_HW.shape, known, NOTHING, format=format, max_label_letters=12)
    body = written(text_cells(cells_HW, labels), format)
    assert accepts(spec, answer_of(body)) == is_exact(body, spec)
    assert known is None or is_exact(body, spec)
    start = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(start, min(len(body), start + 3)))
    piece = data.draw(st.sampled_from(["", "1", "0", "| ", "\n ", "\n", " ", "*", " *", body[start - 4 : start], "a"]))
    changed = body[:start] + piece + body[end:]
    assert accepts(spec, answer_of(changed)) == is_exact(changed, spec), repr(changed)


# ---------------------------------------------------------------- preambles, blocks and refusals

DOG = "dog *1| others *1\n dog *2\n"


def test_a_sentence_is_written_to_the_letter() -> None:
    spec = GrammarSpec.referring("dog", height=2, width=2, preamble=(*SENTENCE, 'A "dog"\\:\n'))
    for preamble in spec.preamble:
        assert accepts(spec, answer_of(DOG, preamble))
        assert not accepts(spec, answer_of(DOG, preamble[:-1]))
    for wrong in ("", "Sure", "sure" + SENTENCE[0][4:], SENTENCE[0] * 2, "  " + SENTENCE[0]):
        assert not accepts(spec, answer_of(DOG, wrong))


def test_free_text_is_optional_bounded_and_opens_no_tag() -> None:
    spec = GrammarSpec.referring("dog", height=2, width=2, preamble=FreeText(12))
    for preamble in ("", "a", "狗" * 12, "line\nline:\n", " Sure", "a>b"):
        assert accepts(spec, answer_of(DOG, preamble)), preamble
    for preamble in ("a" * 13, "a < b", "<seg", "bell\a", "return\r"):
        assert not accepts(spec, answer_of(DOG, preamble)), preamble
    assert accepts(GrammarSpec.referring("dog", height=2, width=2), answer_of(DOG, "a" * MAX_FREE_CHARACTERS))


@pytest.mark.parametrize("preamble", [SENTENCE, FreeText()], ids=["sentence", "free"])
def test_only_a_grammar_that_allows_a_refusal_ends_without_a_descriptor(preamble: FreeText | tuple[str, ...]) -> None:
    refusal = "I'm sorry, but I cannot segment the dog."
    for may_refuse in (False, True):
        spec = GrammarSpec.referring("dog", height=2, width=2, preamble=preamble, allow_refusal=may_refuse)
        assert accepts(spec, refusal) == may_refuse
        assert accepts(spec, answer_of(DOG, SENTENCE[0]))
        for answer in ("", "<", "I <cannot>", f"I cannot. <seg>{DOG}", "a" * (MAX_FREE_CHARACTERS + 1)):
            assert not accepts(spec, answer), answer
    # Where text is free, it may also precede the mask.
    assert accepts(spec, answer_of(DOG, refusal)) == isinstance(preamble, FreeText)


def test_an_answer_has_as_many_blocks_as_the_spec_says() -> None:
    spec = GrammarSpec.referring("dog", height=2, width=2, max_blocks=3)
    block = answer_of(DOG, "Look:\n")
    assert [accepts(spec, block * count) for count in range(5)] == [False, True, True, True, False]
    assert not accepts(spec, block + "and so on")


def test_the_body_grammar_is_what_stands_between_the_tags() -> None:
    grammar = body_grammar(GrammarSpec.referring("dog", height=2, width=2))
    assert accepts(grammar, DOG)
    assert not accepts(grammar, answer_of(DOG))
    assert not accepts(grammar, DOG.replace("dog *2", "dog *1"))


# ---------------------------------------------------------------- random sampling


def sample(grammar: str, seed: int, info: xgrammar.TokenizerInfo | None = None) -> tuple[bytes, int]:
    """What random logits draw under the grammar's masks, without its stop token, and how many tokens that took."""
    matcher = xgrammar.GrammarMatcher(compiled(grammar))
    mask = xgrammar.allocate_token_bitmask(1, len(VOCABULARY))
    random = np.random.default_rng(seed)
    drawn: list[bytes] = []
    while True:
        matcher.fill_next_token_bitmask(mask)
        bits = np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")[: len(VOCABULARY)]
        allowed = np.flatnonzero(bits)
        assert len(allowed), f"stuck after {b''.join(drawn)!r}"
        token = int(allowed[random.normal(size=len(allowed)).argmax()])
        assert matcher.accept_token(token)
        if token == STOP:
            assert matcher.is_terminated()
            return b"".join(drawn), len(drawn)
        drawn.append(VOCABULARY[token])


SAMPLED = {
    "expression": GrammarSpec.referring("dog house", height=5, width=6),
    "sentence": GrammarSpec.referring("dog", height=6, width=5, preamble=SENTENCE),
    "closed": GrammarSpec(4, 12, ("others", *(f"class {i}" for i in range(19))), NOTHING),
    "hostile labels": GrammarSpec(4, 12, HOSTILE_LABELS, NOTHING),
    "one label": GrammarSpec(12, 12, ("others",), NOTHING),
    "one column": GrammarSpec(7, 1, ("others", "dog"), NOTHING),
    "large set": GrammarSpec(5, 24, ("others", *(f"class {i}" for i in range(59))), NOTHING),
    "open": GrammarSpec(4, 7, None, NOTHING, max_label_letters=6),
    "full": GrammarSpec(4, 5, ("others", "dog", "狗"), FreeText(8), format=FULL),
    "blocks or refusal": GrammarSpec(2, 3, ("others", "dog"), FreeText(8), max_blocks=3, allow_refusal=True),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_random_logits_draw_exact_answers_that_end(name: str) -> None:
    spec = SAMPLED[name]
    grammar, limit = seg_grammar(spec), worst_case_bytes(spec)
    answers = set()
    for seed in range(500):
        drawn, num_tokens = sample(grammar, seed)
        assert num_tokens <= len(drawn) <= limit
        answers.add(check_answer(drawn.decode(), spec))
    # Not always the same: the grammar leaves open what it should.
    assert len(answers) == 2 if name == "one label" else len(answers) > 60
    if spec.allow_refusal:
        assert {answer.count("<seg>") for answer in answers} == {0, 1, 2, 3}


def check_answer(answer: str, spec: GrammarSpec) -> str:
    """The answer is exact by this file's judgement and by the decoder's, and both read the same cells."""
    bodies = re.findall(r"<seg>(.*?)</seg>", answer, re.DOTALL)
    assert bodies or spec.allow_refusal
    decoded = decode_answer(answer, height=spec.height, width=spec.width, labels=spec.labels, format=spec.format)
    assert len(decoded.descriptors) == len(bodies) == answer.count("<seg>") == answer.count("</seg>")
    for body, descriptor in zip(bodies, decoded.descriptors, strict=True):
        assert is_exact(body, spec), body
        cells = expand(body, spec)
        found = [descriptor.labels[index] for index in descriptor.grid_HW.ravel().tolist()]
        if spec.labels is not None:
            assert found == cells
        if spec.keeps_runs_apart:
            assert descriptor.status is DescriptorStatus.COMPLETE, (body, descriptor.repairs)
        else:
            assert set(descriptor.repairs) <= {Repair.SEPARATOR, Repair.LABEL_NORMALISED}
    return answer


def expand(body: str, spec: GrammarSpec) -> list[str]:
    if spec.format is FULL:
        return body.split("| ")
    runs = [run.rsplit(" *", 1) for row in body[:-1].split("\n ") for run in row.split("| ")]
    return [label for label, count in runs for _ in range(int(count))]


# ---------------------------------------------------------------- lengths


def longest(spec: GrammarSpec) -> str:
    """The checkerboard of the longest labels."""
    assert spec.labels is not None
    first, second = sorted(spec.labels, key=len, reverse=True)[:2]
    cells = [[second if j % 2 else first for j in range(spec.width)] for _ in range(spec.height)]
    return answer_of(written(cells, spec.format))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (3, 4), (5, 3), (16, 16), (24, 24)])
def test_the_longest_answer_is_the_checkerboard(height: int, width: int) -> None:
    spec = GrammarSpec(height, width, ("others", "a man in a red shirt", "狗"), NOTHING)
    assert spec.keeps_runs_apart
    assert worst_case_characters(spec) == len(" " + longest(spec))
    assert worst_case_bytes(spec) == len(longest(spec).encode()) + 1
    assert accepts(spec, " " + longest(spec))


def test_the_longest_answer_counts_preamble_blocks_and_refusal() -> None:
    def characters(**fields: object) -> int:
        return worst_case_characters(GrammarSpec.referring("dog", height=2, width=2, **fields))

    block = len("<seg>others *1| dog *1\n others *1| dog *1\n</seg>")
    assert characters(preamble=NOTHING) == block + 1
    assert characters(preamble=("a", "four")) == block + 5
    assert characters(preamble=FreeText(20), max_blocks=3) == 3 * (block + 20)
    assert characters(preamble=NOTHING, allow_refusal=True) == max(block + 1, MAX_FREE_CHARACTERS)
    assert characters(preamble=NOTHING, format=FULL) == len(" <seg>others| others| others| others</seg>")
    assert worst_case_characters(GrammarSpec(2, 9, ("dog",), NOTHING)) == len(" <seg>dog *9\n dog *9\n</seg>")


def test_the_longest_answer_of_an_open_set_has_labels_of_all_letters() -> None:
    spec = GrammarSpec(2, 2, None, NOTHING, max_label_letters=2)
    assert worst_case_characters(spec) == len(" <seg>a b *1| a b *1\n a b *1| a b *1\n</seg>")
    assert accepts(spec, "<seg>a b *1| a b *1\n a b *1| a b *1\n</seg>")
    assert worst_case_bytes(spec) == worst_case_characters(spec) + 4 * 2 * 3


def count_words(text: str) -> int:
    """Tokens as a byte-pair encoder splits text before it merges: words with their space, digits, signs."""
    return len(re.findall(r" ?[^\W\d]+|\d| ?[^\w\s]+|\s", text))


@settings(max_examples=100, deadline=None)
@given(labelled_grids(max_side=8))
def test_no_descriptor_takes_more_tokens_than_the_bound(drawn: tuple[np.ndarray, list[str]]) -> None:
    cells_HW, labels = drawn
    spec = GrammarSpec(*cells_HW.shape, tuple(labels), NOTHING)
    answer = answer_of(written(text_cells(cells_HW, labels), R_RLE))
    assert count_words(answer) <= worst_case_tokens(spec, count_words)
    assert len(answer) <= worst_case_characters(spec)


def test_the_token_bound_is_near_the_checkerboard() -> None:
    spec = GrammarSpec.referring("a man in a red shirt", height=16, width=16, preamble=NOTHING)
    tokens = count_words(longest(spec))
    assert tokens <= worst_case_tokens(spec, count_words) <= 1.05 * tokens


# ---------------------------------------------------------------- size and compilation


def test_equal_specs_share_one_grammar() -> None:
    def spec(height: int) -> GrammarSpec:
        return GrammarSpec(height, 16, ("others", "dog"), ("Here:\n",))

    assert seg_grammar(spec(16)) is seg_grammar(spec(16))
    assert seg_grammar(spec(16)) != seg_grammar(spec(15))


def test_a_row_of_a_large_set_is_linear_in_its_labels() -> None:
    def size(num_labels: int) -> int:
        return len(seg_grammar(GrammarSpec(32, 32, tuple(f"class {i:03}" for i in range(num_labels)), NOTHING)))

    per_label = len(' | "class 000 *"')
    assert size(1000) - size(100) == 900 * per_label


def test_no_grammar_is_larger_than_promised() -> None:
    labels = tuple(f"class {i:03}" for i in range(1024))
    for width, num_labels in ((2, 340), (4, 200), (8, 90), (16, 40), (24, 22), (32, 14), (64, 4), (64, 1024)):
        assert len(seg_grammar(GrammarSpec(64, width, labels[:num_labels]))) < 200_000, (width, num_labels)


@pytest.mark.parametrize(
    "spec",
    [
        GrammarSpec(64, 64, ("others", *(f"class {i}" for i in range(1023))), max_blocks=32, allow_refusal=True),
        GrammarSpec(64, 64, None, tuple(f"{i}:\n" for i in range(64)), max_label_letters=64, allow_refusal=True),
        GrammarSpec(64, 64, ("others", "dog"), FreeText(1), format=FULL),
    ],
    ids=["labels and blocks", "letters and sentences", "cells"],
)
def test_the_limits_themselves_compile(spec: GrammarSpec) -> None:
    """What xgrammar refuses beyond them, it refuses in the engine only."""
    body = written([["others"] * 64] * 64, spec.format)
    opening = "" if isinstance(spec.preamble, FreeText) else spec.preamble[-1]
    assert accepts(spec, answer_of(body, opening) * spec.max_blocks)


def class_names(count: int) -> tuple[str, ...]:
    colours, things = ("red", "green", "blue", "old", "new", "tall"), ("dog", "cat", "man", "bus", "tree", "boat")
    names = (
        " ".join(words) for words in itertools.product(colours, things, ("left", "right", "above", "below", "near"))
    )
    return ("others", *itertools.islice(names, count - 1))


@pytest.mark.parametrize("labels", [HOSTILE_LABELS, class_names(150)], ids=["apart", "together"])
def test_grammars_without_free_text_are_read_by_llguidance_too(labels: tuple[str, ...]) -> None:
    """vLLM's other backend; it knows no `Regex(...)`."""
    readable = llguidance.grammar_from("grammar", seg_grammar(GrammarSpec(16, 16, labels, SENTENCE)))
    assert not llguidance.LLMatcher.validate_grammar(readable)


@lru_cache(maxsize=1)
def real_tokenizer() -> xgrammar.TokenizerInfo:
    from transformers import AutoTokenizer

    from relay_serving import embedded_model

    folder: Path = embedded_model.folder()
    if not embedded_model.is_ready(folder):
        pytest.skip(f"no tokenizer of a real model: {folder} is not prepared")
    return xgrammar.TokenizerInfo.from_huggingface(AutoTokenizer.from_pretrained(folder))


def seconds_to_compile(spec: GrammarSpec, compile_grammar: Callable[[str], object]) -> float:
    grammar = seg_grammar(spec)
    began = time.process_time()
    compile_grammar(grammar)
    return time.process_time() - began


@pytest.mark.parametrize(
    ("side", "labels", "limit"),
    [
        (16, ("others", "dog"), 0.05),
        (32, class_names(150), 1.0),
        (16, class_names(32), 1.0),
        (64, ("others", "dog"), 1.0),
    ],
    ids=["16x16 expression", "32x32 150 labels", "16x16 32 labels apart", "64x64 expression"],
)
def test_grammars_compile_in_time(side: int, labels: Sequence[str], limit: float) -> None:
    """Seconds of CPU with a vocabulary of 49,152 tokens, and nothing cached; the best of three."""
    spec = GrammarSpec(side, side, tuple(labels), SENTENCE)
    seconds = [
        seconds_to_compile(spec, xgrammar.GrammarCompiler(real_tokenizer(), max_threads=2).compile_grammar)
        for _ in range(3)
    ]
    assert min(seconds) <= limit


def test_free_text_is_compiled_once_for_all_labels() -> None:
    compile_grammar = xgrammar.GrammarCompiler(real_tokenizer(), max_threads=2).compile_grammar
    first, *others = (
        seconds_to_compile(GrammarSpec.referring(label, height=16, width=16), compile_grammar)
        for label in ("dog", "cat", "tree", "house")
    )
    assert min(others) < first / 4


# ---------------------------------------------------------------- refused specs


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"height": 0}, "height must be an integer from 1 to 64, got 0"),
        ({"width": 65}, "width must be an integer from 1 to 64, got 65"),
        ({"width": 16.0}, "width must be an integer from 1 to 64, got 16.0"),
        ({"height": True}, "height must be an integer from 1 to 64, got True"),
        ({"labels": ()}, "labels must hold from 1 to 1024 strings, got 0"),
        ({"labels": "dog"}, "labels must be a tuple of strings, got 'dog'"),
        ({"labels": ["others"]}, "labels must be a tuple of strings, got ['others']"),
        ({"labels": ("others", 3)}, "labels must be a tuple of strings, got ('others', 3)"),
        ({"labels": tuple(map(str, range(1025)))}, "labels must hold from 1 to 1024 strings, got 1025"),
        ({"labels": ("others", "a|b")}, "labels[1]: label 'a|b' contains '|'"),
        ({"labels": ("dog", "Dog")}, "labels[1] is 'Dog', the same class as 'dog'"),
        ({"labels": ("Others", "dog")}, "labels[0] is 'Others', which is the background: write it 'others'"),
        ({"labels": tuple(f"{i:0500}" for i in range(70))}, "labels must have at most 32768 characters"),
        ({"preamble": ()}, "preamble must hold from 1 to 64 strings, got 0"),
        ({"preamble": "Sure:\n"}, "preamble must be a tuple of strings, got 'Sure:\\n'"),
        ({"preamble": ("Sure:\n<seg>",)}, "preamble[0] must not contain a tag"),
        ({"preamble": ("", "\ud800")}, "preamble[1] must be text, got half of a surrogate pair in '\\ud800'"),
        ({"preamble": ("a" * 1025,)}, "preamble[0] must have at most 1024 characters, got 1025"),
        ({"format": DescriptorFormat.I_RLE}, "format must be r_rle or full, got <DescriptorFormat.I_RLE: 'i_rle'>"),
        ({"format": "full"}, "format must be r_rle or full, got 'full'"),
        ({"max_blocks": 33}, "max_blocks must be an integer from 1 to 32, got 33"),
        ({"allow_refusal": 1}, "allow_refusal must be true or false, got 1"),
        ({"max_label_letters": 65}, "max_label_letters must be an integer from 1 to 64, got 65"),
    ],
)  # fmt: skip
def test_what_has_no_grammar_is_refused_with_field_and_value(fields: dict[str, object], words: str) -> None:
    good = {"height": 16, "width": 16, "labels": ("others", "dog")}
    with pytest.raises(GrammarError, match=re.escape(words)):
        GrammarSpec(**{**good, **fields})


def test_free_text_longer_than_an_automaton_is_refused() -> None:
    with pytest.raises(GrammarError, match="max_characters must be an integer from 1 to 128, got 129"):
        FreeText(129)

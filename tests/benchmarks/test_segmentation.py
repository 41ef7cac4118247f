"""The comparison of two running servers, without servers: what is read, and what a row says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from relay_benchmarks.errors import BenchArgumentError
from relay_benchmarks.segmentation import (
    SEGMENTATION_COLUMNS,
    Pair,
    Parting,
    Server,
    Spoken,
    read_questions,
    report,
    result_row,
)

OPTIONS = argparse.Namespace(dtype="float32", data=Path("val.jsonl"), label="--flag")


def photos(folder: Path, *lines: object) -> Path:
    (folder / "a.jpg").write_bytes(b"\xff\xd8\xff")
    data = folder / "val.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines))
    return data


def test_a_question_is_the_first_expression_of_a_photo(tmp_path: Path) -> None:
    with_words = {"file": "images/a.jpg", "expressions": [{"text": "the dog"}, {"text": "the cat"}]}
    data = photos(tmp_path, {"file": "a.jpg", "expressions": []}, with_words, with_words, with_words)
    questions = read_questions(data, tmp_path, 2)
    assert len(questions) == 2
    assert "the dog" in questions[0].text
    assert questions[0].image == "data:image/jpeg;base64,/9j/"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ({"file": "a.jpg"}, "line 1"),
        ({"file": "b.jpg", "expressions": [{"text": "x"}]}, "b.jpg"),
        ({"file": "a.jpg", "expressions": []}, "no expressions"),
        ([], "line 1"),
    ],
)
def test_what_is_no_photo_is_named(tmp_path: Path, line: object, named: str) -> None:
    with pytest.raises(BenchArgumentError, match=named):
        read_questions(photos(tmp_path, line), tmp_path, 2)


def test_an_address_where_nothing_listens_is_named() -> None:
    with pytest.raises(BenchArgumentError, match=r"127\.0\.0\.1:9 is no running server"):
        Server("http://127.0.0.1:9")


def spoken(text: str, whole_ms: float, decode_ms: float, steps: int) -> Spoken:
    return Spoken(text, tokens=10, steps=steps, whole_ms=whole_ms, decode_ms=decode_ms)


def test_a_parting_is_held_against_its_own_noise() -> None:
    answers = [Pair(spoken("a", 1.0, 1.0, 1), spoken("b", 1.0, 1.0, 1))] * 3
    parted = [Parting(0, 0.02, 0.5), Parting(1, 0.2, 0.1), Parting(2, 0.0, 0.0)]
    row = result_row(OPTIONS, "m", answers, answers, parted)
    assert (row["largest_gap"], row["noise"], row["beyond_noise"]) == (0.2, 0.5, 1)


def test_a_row_holds_medians_of_pairs_and_totals() -> None:
    answers = [
        Pair(spoken("a", 100.0, 80.0, 10), spoken("a", 50.0, 20.0, 4)),
        Pair(spoken("b", 200.0, 100.0, 10), spoken("c", 150.0, 50.0, 5)),
        Pair(spoken("d", 300.0, 0.0, 10), spoken("d", 270.0, 0.0, 6)),
    ]
    chats = [Pair(spoken("", 10.0, 9.0, 1), spoken("", 11.0, 9.0, 1))]
    row = result_row(OPTIONS, "m", answers, chats, [Parting(1, 0.02, 0.03)])
    assert set(row) == set(SEGMENTATION_COLUMNS)
    assert (row["whole_ms"], row["other_whole_ms"], row["whole_ratio"]) == (200.0, 150.0, 0.75)
    assert row["decode_ratio"] == 0.375, "what had nothing to decode has no ratio"
    assert (row["steps"], row["other_steps"], row["tokens"]) == (30, 15, 30)
    assert (row["equal_answers"], row["largest_gap"], row["noise"], row["beyond_noise"]) == (2, 0.02, 0.03, 0)
    assert row["chat_ratio"] == 1.1
    assert "0.375" in report(row)

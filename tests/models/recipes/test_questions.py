"""What is asked of a photo, what is answered, and which characters of an answer no loss may see."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from relay_models.errors import RelayModelsError
from relay_models.recipes.text4seg.dataset import Expression, Instance, Photo, load_jsonl
from relay_models.recipes.text4seg.questions import (
    QUESTION_KINDS,
    Question,
    QuestionMix,
    class_question,
    ignored_spans,
    instance_cells,
    known_absent,
    label_map,
    questions_of,
)
from relay_models.text4seg.codec import CLOSE_TAG, OPEN_TAG, DescriptorStatus, decode_answer, encode
from relay_models.text4seg.prompts import TEMPLATES

SEG_TINY = Path(__file__).parents[4] / "shared/data/seg-tiny"
GRID = 4
SIDE = 8  # pixels: two to a cell
EVERY_KIND = QuestionMix(num_absent=9, multi_class_share=1, everything_share=1, max_ignored=1)


def cells(*rows: str) -> np.ndarray:
    return np.array([[int(letter) if letter.isdigit() else letter == "x" for letter in row] for row in rows])


def instance(id: int, label: str, *rows: str, **flags: bool) -> Instance:
    mask_HW = cells(*rows).astype(bool).repeat(2, axis=0).repeat(2, axis=1)
    return Instance.of(id, label, mask_HW, **flags)


CAT = instance(0, "cat", "xx..", "xx..", "....", "....")
LEFT_DOG = instance(1, "dog", "....", "....", "....", "x...")
RIGHT_DOG = instance(2, "dog", "....", "....", "....", "...x")
CROWD = instance(3, "dog", "....", "....", "..xx", "..xx", is_crowd=True)


def photo(*instances: Instance, **fields) -> Photo:
    return Photo("a.jpg", SIDE, SIDE, instances, **fields)


def ask(photo: Photo, mix: QuestionMix = EVERY_KIND, seed: int = 0) -> list[Question]:
    return questions_of(photo, GRID, np.random.default_rng(seed), mix)


def only(questions: list[Question], kind: str) -> Question:
    (found,) = [item for item in questions if item.kind == kind]
    return found


def masked(question: Question) -> list[str]:
    return [question.answer[start:end] for start, end in ignored_spans(question)]


def test_a_class_is_the_union_of_its_masks():
    question = only(ask(photo(LEFT_DOG, RIGHT_DOG)), "class")
    assert question.labels == ("others", "dog")
    np.testing.assert_array_equal(question.cells_GG, cells("0000", "0000", "0000", "1001"))
    assert not question.ignore_GG.any()
    assert ignored_spans(question) == ()
    assert question.answer == (
        "The segmentation mask for 'dog' is shown below:\n<seg>others *4\n others *4\n others *4\n"
        " dog *1| others *2| dog *1\n</seg>"
    )
    assert question.prompt in [text.replace("[class_name]", "dog") for text in TEMPLATES["QUESTION_PARTIAL"]]


def test_a_crowd_is_part_of_its_class():
    question = only(ask(photo(LEFT_DOG, CROWD)), "class")
    np.testing.assert_array_equal(question.cells_GG, cells("0000", "0000", "0011", "1011"))
    assert not question.ignore_GG.any()


def test_masks_are_reduced_as_pillow_does():
    mask_HW = np.random.default_rng(0).random((37, 53)) < 0.5
    nearest = Image.fromarray(mask_HW.astype(np.uint8)).resize((12, 12), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(instance_cells(Instance.of(0, "a", mask_HW), 12), np.asarray(nearest))


@pytest.mark.parametrize("flag", ["is_crowd", "is_group"])
@pytest.mark.parametrize("kind", ["position", "size", "relation"])
def test_what_was_not_told_apart_is_unknown_where_one_is_meant(kind, flag):
    untold = instance(3, "dog", "....", "....", "..xx", "..xx", **{flag: True})
    expression = Expression("the leftmost dog", (1,), kind)
    question = only(ask(photo(CAT, LEFT_DOG, untold, expressions=(expression,))), kind)
    np.testing.assert_array_equal(question.cells_GG, cells("0000", "0000", "0000", "1000"))
    np.testing.assert_array_equal(question.ignore_GG, cells("....", "....", "..xx", "..xx"))
    # Row 2: its label is known from its first cell, its length is not. Row 3: where the gap ends is unknown.
    assert question.answer.endswith("\n others *4\n the leftmost dog *1| others *3\n</seg>")
    assert masked(question) == [" *4", " *3"]


def test_a_crowd_of_another_class_is_no_matter():
    expression = Expression("the cat on the left", (0,), "position")
    question = only(ask(photo(CAT, CROWD, expressions=(expression,))), "position")
    assert not question.ignore_GG.any()


def test_the_mask_asked_for_is_known_even_where_a_crowd_covers_it():
    expression = Expression("the dog on the right", (2,), "position")
    question = only(ask(photo(RIGHT_DOG, CROWD, expressions=(expression,))), "position")
    assert not (question.ignore_GG & (question.cells_GG == 1)).any()
    assert question.ignore_GG.sum() == 3


def test_a_class_in_unsure_is_not_asked_for_by_its_class():
    shown = photo(
        CAT,
        LEFT_DOG,
        unsure=("dog", "zebra"),
        absent=("zebra", "kite"),
        expressions=(Expression("all dogs", (1,), "class"), Expression("the leftmost dog", (1,), "position")),
    )
    for seed in range(20):
        found = ask(shown, seed=seed)
        asked = [(item.kind, item.labels[1:]) for item in found if item.kind not in ("everything", "absent")]
        assert {labels for kind, labels in asked if kind == "class"} == {("cat",)}
        assert ("position", ("the leftmost dog",)) in asked
        for kind, labels in asked:
            assert kind != "classes" or {"cat"} <= set(labels) <= {"cat", "kite"}
        assert all("kite" in only(found, "absent").labels[1] for _ in "1")


def test_outside_of_the_labelled_classes_nothing_is_asked():
    shown = photo(CAT, LEFT_DOG, labelled_classes=("cat",), expressions=(Expression("the dog", (1,), "class"),))
    found = ask(shown)
    assert [item.labels[1] for item in found if item.kind == "class"] == ["cat"]
    assert only(found, "classes").labels == ("others", "cat")


def test_absent_is_what_the_photo_says_is_absent_and_no_more():
    """It may say so of a class outside of the labelled ones. That a labelled one has no mask is not said to be that."""
    shown = photo(CAT, labelled_classes=("cat", "bus"), absent=("kite", "cat", "dog"), unsure=("dog",))
    assert known_absent(shown) == ("kite",)
    assert only(ask(shown, replace(EVERY_KIND, absent_expression_share=0)), "absent").labels[1] in ("kite", "the kite")


def test_an_absent_class_is_answered_with_nothing():
    shown = photo(CAT, absent=("kite",))
    texts = set()
    for seed in range(60):
        question = only(ask(shown, seed=seed), "absent")
        assert not question.cells_GG.any()
        assert decode_answer(question.answer, height=GRID, width=GRID).status is DescriptorStatus.COMPLETE
        texts.add(question.labels[1])
    assert {"kite", "the kite", "the leftmost kite"} <= texts
    assert all("kite" in text for text in texts)
    assert not [item for item in ask(shown, replace(EVERY_KIND, num_absent=0)) if item.kind == "absent"]


def test_several_classes_at_once():
    shown = photo(CAT, LEFT_DOG, absent=("kite", "bus"))
    seen = Counter()
    for seed in range(60):
        question = only(ask(shown, seed=seed), "classes")
        assert question.labels[0] == "others"
        assert "|".join(question.labels) in question.prompt
        seen.update(question.labels)
        for index, label in enumerate(question.labels[1:], start=1):
            truth = {"cat": CAT, "dog": LEFT_DOG}.get(label)
            expected = instance_cells(truth, GRID) if truth else np.zeros((GRID, GRID), bool)
            np.testing.assert_array_equal(question.cells_GG == index, expected)
        assert not question.ignore_GG.any()
    assert seen["cat"] > 40
    assert seen["dog"] > 40
    assert seen["kite"] > 10
    assert any("dog" not in only(ask(shown, seed=seed), "classes").labels for seed in range(60))


def test_everything_is_unknown_outside_of_masks_where_a_class_may_lack_some():
    shown = photo(CAT, LEFT_DOG)
    certain = only(ask(shown), "everything")
    assert certain.labels == ("others", "cat", "dog")
    np.testing.assert_array_equal(certain.cells_GG, cells("1100", "1100", "0000", "2000"))
    assert not certain.ignore_GG.any()
    for limits in ({"unsure": ("dog",)}, {"labelled_classes": ("cat", "dog")}):
        question = only(ask(replace(shown, **limits)), "everything")
        np.testing.assert_array_equal(question.ignore_GG, question.cells_GG == 0)
        assert masked(question) == [" *2", "others *2"] * 2 + ["others *4", " *1", "others *3"]


def test_a_question_of_which_too_much_is_unknown_is_not_asked():
    shown = photo(CAT, unsure=("dog",))
    kinds = {item.kind for item in ask(shown, replace(EVERY_KIND, max_ignored=0.5))}
    assert "everything" not in kinds
    assert "class" in kinds


def test_a_negative_photo_is_certainly_empty():
    question = only(ask(photo(absent=("kite",), is_negative=True)), "everything")
    assert question.labels == ("others",)
    assert not question.ignore_GG.any()


def test_what_vanishes_on_the_grid_is_not_asked_for():
    mask_HW = np.zeros((SIDE, SIDE), bool)
    mask_HW[0, 0] = True  # the nearest pixel of a cell of two is its second
    speck = Instance.of(5, "ant", mask_HW)
    found = ask(photo(CAT, speck, expressions=(Expression("the ant", (5,), "class"),)))
    assert not any("ant" in label for item in found for label in item.labels)


def test_where_masks_meet_the_smaller_is_in_front():
    large, small = (
        cells("xxxx", "xxxx", "....", "....").astype(bool),
        cells("....", ".x..", "....", "....").astype(bool),
    )
    expected = cells("1111", "1211", "0000", "0000")
    np.testing.assert_array_equal(label_map([(1, large), (2, small)], GRID), expected)
    np.testing.assert_array_equal(label_map([(2, small), (1, large)], GRID), expected)


def test_equal_seeds_ask_the_same_and_others_do_not():
    shown = photo(CAT, LEFT_DOG, RIGHT_DOG, absent=("kite", "bus", "zebra"))

    def texts(seed: int) -> list[tuple[str, str]]:
        return [(item.prompt, item.answer) for item in ask(shown, QuestionMix(), seed)]

    assert texts(1) == texts(1)
    assert len({tuple(texts(seed)) for seed in range(20)}) > 10


def test_the_canonical_template_on_request():
    shown = photo(CAT, LEFT_DOG)
    mix = replace(EVERY_KIND, varies_templates=False)
    prompts = {item.prompt for seed in range(20) for item in ask(shown, mix, seed) if item.kind == "class"}
    assert prompts == {class_question("cat"), class_question("dog")}
    assert class_question("dog") == "Please segment only the dog in the image."


def test_no_more_questions_than_wanted():
    shown = photo(CAT, LEFT_DOG, absent=("kite", "bus"))
    assert len(ask(shown)) > 2
    assert len(ask(shown, replace(EVERY_KIND, max_questions=2))) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_absent", -1), ("multi_class_share", 1.5), ("max_ignored", -0.1), ("max_questions", 0)],
)
def test_a_mix_that_cannot_be_is_refused(field, value):
    with pytest.raises(RelayModelsError, match=f"{field} must.*{value}"):
        QuestionMix(**{field: value})


# ---------------------------------------------------------------- spans


def asked(cells_GG: np.ndarray, ignore_GG: np.ndarray, labels: tuple[str, ...]) -> Question:
    answer = f"Here <seg> is said, not: it is.\n{OPEN_TAG}{encode(cells_GG, labels)}{CLOSE_TAG}".replace(
        "<seg> is", "is"
    )
    return Question("?", answer, cells_GG, ignore_GG, labels, "classes")


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.uint8, (3, 6), elements=st.integers(0, 2)),
    hnp.arrays(np.bool_, (3, 6)),
    hnp.arrays(np.uint8, (3, 6), elements=st.integers(0, 2)),
)
def test_what_is_not_ignored_does_not_depend_on_unknown_cells(cells_GG, ignore_GG, other_GG):
    """Put anything into the unknown cells: what counts for the loss is still written wherever a run begins."""
    labels = ("others", "a cat *x", "dog")
    question = asked(cells_GG, ignore_GG, labels)
    spans = ignored_spans(question)
    counted = certain_statements(question, spans)
    changed = asked(np.where(ignore_GG, other_GG, cells_GG).astype(np.uint8), ignore_GG, labels)
    written = all_statements(changed)
    for row, column, label, count in counted:
        if starts_run(changed.cells_GG, row, column):
            assert written[row][column][0] == label
            assert count is None or written[row][column][1] == count
    assert all(end < start for (_, end), (start, _) in pairwise(spans))


def starts_run(cells_GG: np.ndarray, row: int, column: int) -> bool:
    return column == 0 or cells_GG[row, column] != cells_GG[row, column - 1]


def all_statements(question: Question) -> list[dict[int, tuple[str, int]]]:
    """For each row, by column: the label and the count of the run that begins there."""
    body = question.answer.split(OPEN_TAG)[1].split(CLOSE_TAG)[0]
    rows = []
    for line in body.split("\n")[:-1]:
        runs, column = {}, 0
        for run in line.strip().split("| "):
            label, _, count = run.rpartition(" *")
            runs[column] = (label, int(count))
            column += int(count)
        rows.append(runs)
    return rows


def certain_statements(question: Question, spans) -> list[tuple[int, int, str, int | None]]:
    """Row, column, label and, where it counts too, count, of each run whose label counts, read from the text."""
    found = []
    at = question.answer.index(OPEN_TAG) + len(OPEN_TAG)
    hidden = {place for start, end in spans for place in range(start, end)}
    for row, runs in enumerate(all_statements(question)):
        for column, (label, count) in runs.items():
            at = question.answer.index(f"{label} *{count}", at)
            count_at = at + len(label)
            if at not in hidden:
                found.append((row, column, label, None if count_at in hidden else count))
            assert ({*range(at, count_at)} <= hidden) == (at in hidden)
            at = count_at
    return found


def test_spans_of_a_row_by_hand():
    """Unknown: the third cell. It cuts what is said of the run before it, begins the second, and ends nothing else."""
    cells_GG, ignore_GG = np.array([[1, 1, 0, 0, 2, 2]], np.uint8), np.array([[0, 0, 1, 0, 0, 0]], bool)
    question = asked(cells_GG, ignore_GG, ("others", "cat", "dog"))
    assert question.answer.split("\n")[1] == "<seg>cat *2| others *2| dog *2"
    assert masked(question) == [" *2", "others *2"]
    start, end = ignored_spans(question)[0]
    assert question.answer[:start].endswith("<seg>cat")
    assert question.answer[end:].startswith("| others")


def test_everything_unknown_leaves_only_structure():
    question = asked(np.zeros((2, 3), np.uint8), np.ones((2, 3), bool), ("others", "cat"))
    assert masked(question) == ["others *3", "others *3"]


# ---------------------------------------------------------------- the real set


def test_every_answer_about_seg_tiny_says_what_its_cells_say():
    if not SEG_TINY.exists():
        pytest.skip("needs ../shared/data/seg-tiny")
    photos = load_jsonl(SEG_TINY / "train.jsonl", SEG_TINY)[::6]
    rng = np.random.default_rng(0)
    kinds = Counter()
    for shown in photos:
        for item in questions_of(shown, 16, rng, EVERY_KIND):
            kinds[item.kind] += 1
            answer = decode_answer(item.answer, height=16, width=16, labels=item.labels)
            assert answer.status is DescriptorStatus.COMPLETE
            np.testing.assert_array_equal(answer.descriptors[0].grid_HW, item.cells_GG)
            assert (item.kind == "absent") == (item.kind not in ("everything", "classes") and not item.cells_GG.any())
            spans = ignored_spans(item)
            assert bool(spans) == bool(item.ignore_GG.any())
            asked_for = set(item.labels[1:]) if item.kind in ("class", "classes") else set()
            assert not asked_for & set(shown.unsure)
    assert set(kinds) == set(QUESTION_KINDS) - {"other"}, "seg-tiny has none of those"

"""What is asked of a model, how its answers are counted, and that the report says so."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

from relay_models.errors import RelayModelsError
from relay_models.recipes.text4seg.dataset import Expression, Instance, Photo, load_jsonl
from relay_models.recipes.text4seg.evaluation import (
    EvaluationSettings,
    Query,
    Reply,
    ceilings,
    evaluate,
    from_texts,
    mean_ceiling,
    queries_of,
    truth_of,
)
from relay_models.recipes.text4seg.metrics import ClassCounts, ceiling_mask, confusion
from relay_models.text4seg.codec import encode

SEG_TINY = Path(__file__).parents[4] / "shared/data/seg-tiny"
SIDE = 8
QUICK = EvaluationSettings(grid=4, min_photos=2, resamples=50)


def instance(id: int, label: str, x0: int, y0: int, x1: int, y1: int, **flags: bool) -> Instance:
    mask_HW = np.zeros((SIDE, SIDE), dtype=bool)
    mask_HW[y0:y1, x0:x1] = True
    return Instance.of(id, label, mask_HW, **flags)


CAT = instance(0, "cat", 0, 0, 4, 4)
DOG = instance(1, "dog", 4, 4, 6, 8)
CROWD = instance(2, "dog", 6, 4, 8, 8, is_crowd=True)
PHOTO = Photo(
    "a.jpg",
    SIDE,
    SIDE,
    (CAT, DOG, CROWD),
    (Expression("all dogs", (1, 2), "class"), Expression("the leftmost dog", (1,), "position")),
    absent=("kite", "bus"),
)
OTHER = Photo("b.jpg", SIDE, SIDE, (replace(CAT, id=4),), absent=("dog",))


def perfect(photo: Photo, queries: list[Query]) -> list[Reply]:
    return [Reply(truth_of(photo, query)[0]) for query in queries]


def silent(photo: Photo, queries: list[Query]) -> list[Reply]:
    return [Reply(np.zeros((SIDE, SIDE), bool), "none") for _ in queries]


def all_over(photo: Photo, queries: list[Query]) -> list[Reply]:
    return [Reply(np.ones((SIDE, SIDE), np.uint8)) for _ in queries]


# ---------------------------------------------------------------- what is asked


def test_what_is_asked_of_a_photo():
    assert [(query.text, query.kind, query.label, query.ids) for query in queries_of(PHOTO)] == [
        ("cat", "class", "cat", (0,)),
        ("dog", "class", "dog", (1, 2)),
        ("kite", "absent", "kite", ()),
        ("bus", "absent", "bus", ()),
        ("all dogs", "class expression", "dog", (1, 2)),
        ("the leftmost dog", "position", "dog", (1,)),
    ]
    assert queries_of(PHOTO)[0].prompt == "Please segment only the cat in the image."


def test_an_expression_that_means_nothing_is_asked_for_in_vain():
    """As gRefCOCO has them: no-targets count in N-acc, gIoU and cIoU beside the others."""
    said = (*PHOTO.expressions, Expression("the red cat", (), "other"), Expression("a cat", (0,), "other"))
    shown = replace(PHOTO, expressions=said)
    assert [(query.text, query.kind, query.ids) for query in queries_of(shown)[-2:]] == [
        ("the red cat", "absent expression", ()),
        ("a cat", "other", (0,)),
    ]
    for answer, n_acc in ((perfect, 1.0), (all_over, 0.0)):
        report = evaluate([shown], answer, settings=QUICK)
        assert (report.expression_n_acc.value, report.expression_n_acc.n) == (n_acc, 1)
        assert (report.expression_t_acc_all.value, report.expression_t_acc_all.n) == (1.0, 3)
    totals = {row.name: row for row in report.totals}
    assert {name: row.n for name, row in totals.items()} == {
        "classes": 2,
        "classes, and absent ones": 4,
        "expressions": 3,
        "expressions, and absent ones": 4,
    }
    frame = SIDE * SIDE
    cat, dogs, dog = 16, 16, 8  # the crowd is not counted for one dog
    assert totals["expressions"].ciou.value == pytest.approx((cat + dogs + dog) / (2 * frame + frame - 8))
    assert totals["expressions, and absent ones"].ciou.value == pytest.approx((cat + dogs + dog) / (4 * frame - 8))
    assert totals["expressions, and absent ones"].giou.value == pytest.approx((16 / 64 + 16 / 64 + 8 / 56 + 0) / 4)
    assert "| N-acc, expressions | 1 | 0.000" in report.to_markdown()
    assert "N-acc, expressions" not in evaluate([PHOTO], perfect, settings=QUICK).to_markdown()


def test_what_was_not_answered_is_wrong_by_every_figure():
    def broken(photo: Photo, queries: list[Query]) -> list[Reply]:
        return [Reply(truth_of(photo, query)[0], "error") for query in queries]

    report = evaluate([PHOTO, OTHER], broken, settings=QUICK)
    assert (report.n_acc.value, report.t_acc.value, report.t_acc_all.value, report.macro_ciou.value) == (0, 0, 0, 0)
    assert all(row.giou.value == 0 for row in (*report.kinds, *report.totals))
    assert report.to_markdown().startswith("**8 questions were not answered, and count as wrong.**")


def test_a_class_that_may_lack_masks_is_not_asked_for():
    for limit in ({"unsure": ("dog", "bus")}, {"labelled_classes": ("cat", "kite"), "absent": ("kite",)}):
        found = queries_of(replace(PHOTO, **limit))
        assert [query.text for query in found] == ["cat", "kite", "the leftmost dog"]


def test_only_the_kinds_wanted_and_no_more_absent_ones_than_wanted():
    assert {query.kind for query in queries_of(PHOTO, replace(QUICK, kinds=("class",)))} == {"class"}
    many = replace(PHOTO, absent=tuple(f"thing {index}" for index in range(30)))
    chosen = [query.text for query in queries_of(many) if query.kind == "absent"]
    assert len(chosen) == 2
    assert chosen == [query.text for query in queries_of(many) if query.kind == "absent"]
    elsewhere = {
        tuple(query.text for query in queries_of(replace(many, file=f"{index}.jpg")) if query.kind == "absent")
        for index in range(9)
    }
    assert len(elsewhere) > 4


def test_a_crowd_is_part_of_a_class_and_unknown_to_one_instance():
    by_text = {query.text: truth_of(PHOTO, query) for query in queries_of(PHOTO)}
    np.testing.assert_array_equal(by_text["dog"][0], DOG.mask_HW | CROWD.mask_HW)
    assert by_text["dog"][1] is None
    np.testing.assert_array_equal(by_text["the leftmost dog"][0], DOG.mask_HW)
    np.testing.assert_array_equal(by_text["the leftmost dog"][1], CROWD.mask_HW)
    assert not by_text["kite"][0].any()


def test_the_instance_asked_for_counts_even_under_a_crowd():
    crowd = instance(2, "dog", 4, 4, 8, 8, is_crowd=True)
    truth_HW, ignore_HW = truth_of(replace(PHOTO, instances=(DOG, crowd)), Query("the dog", "position", "dog", (1,)))
    np.testing.assert_array_equal(truth_HW, DOG.mask_HW)
    np.testing.assert_array_equal(ignore_HW, CROWD.mask_HW)


HORSE = instance(3, "horse", 0, 4, 4, 8)
TEAM = instance(5, "horse", 4, 0, 8, 4, is_group=True)
RIDE = replace(
    PHOTO,
    instances=(DOG, HORSE, TEAM, CROWD),
    expressions=(
        Expression("all dogs and horses", (1, 2, 3, 5), "class"),
        Expression("the dog and its horse", (1, 3), "relation"),
    ),
)


@pytest.mark.parametrize("limit", [{"unsure": ("horse",)}, {"labelled_classes": ("dog",)}, {"unsure": ("dog",)}])
def test_an_expression_for_two_classes_needs_all_masks_of_both(limit):
    settings = replace(QUICK, kinds=("class expression",))
    assert [query.text for query in queries_of(RIDE, settings)] == ["all dogs and horses"]
    assert queries_of(replace(RIDE, **limit), settings) == []


def test_crowds_and_groups_of_each_class_that_is_meant_are_left_out():
    (query,) = queries_of(RIDE, replace(QUICK, kinds=("relation",)))
    truth_HW, ignore_HW = truth_of(RIDE, query)
    np.testing.assert_array_equal(truth_HW, DOG.mask_HW | HORSE.mask_HW)
    np.testing.assert_array_equal(ignore_HW, CROWD.mask_HW | TEAM.mask_HW)


# ---------------------------------------------------------------- how it is counted


def test_the_truth_scores_one():
    report = evaluate([PHOTO, OTHER], perfect, settings=QUICK)
    assert (report.num_photos, report.num_queries) == (2, 8)
    assert {row.ciou.value for row in (*report.classes, *report.areas)} == {1.0}
    assert (report.macro_classes, report.macro_ciou.value, report.macro_ciou.n) == (("cat",), 1.0, 1)
    assert (report.n_acc.value, report.t_acc.value, report.n_acc.n, report.t_acc.n) == (1.0, 1.0, 3, 3)
    assert report.statuses == (("complete", 8),)


def test_silence_is_right_about_what_is_not_there_only():
    report = evaluate([PHOTO, OTHER], silent, settings=QUICK)
    assert (report.n_acc.value, report.t_acc.value, report.t_acc_all.value) == (1.0, 0.0, 0.0)
    assert report.macro_ciou.value == 0
    assert report.statuses == (("none", 8),)


def test_a_mask_all_over_the_picture_is_counted():
    report = evaluate([PHOTO, OTHER], all_over, settings=QUICK)
    assert (report.n_acc.value, report.t_acc.value) == (0.0, 1.0)
    assert report.row("cat").ciou.value == (16 + 16) / (64 + 64)
    assert report.row("dog").ciou.value == 16 / 64
    by_kind = {row.name: row for row in report.kinds}
    # The crowd is left out: 8 pixels of the dog, and 56 of the frame.
    assert by_kind["position"].ciou.value == 8 / 56
    assert by_kind["absent"].giou.value == 0
    assert list(by_kind) == ["class", "absent", "class expression", "position"]


def test_classes_stand_beside_their_ceilings():
    odd = instance(3, "cat", 0, 0, 3, 3)  # the nearest pixels of its cells are 1 and 3: on the grid it is 2x2
    photo = Photo("c.jpg", SIDE, SIDE, (odd,))
    row = evaluate([photo], perfect, settings=QUICK).row("cat")
    assert row.ceiling_ciou == 4 / 9
    assert row.ciou_of_ceiling.value == 9 / 4
    found = ceilings([photo, OTHER], 4)
    assert (found["cat"].n, found["cat"].num_vanished) == (2, 0)
    assert found["cat"].ciou == (4 + 16) / (9 + 16)
    assert found["cat"].giou == (4 / 9 + 1) / 2


def test_what_vanishes_on_the_grid_is_counted_in_the_ceiling():
    speck = Photo("d.jpg", SIDE, SIDE, (instance(0, "ant", 0, 0, 1, 1),))
    found = ceilings([speck], 4)["ant"]
    assert (found.n, found.num_vanished, found.ciou) == (1, 1, 0.0)


def test_the_mean_ceiling_counts_each_class_once():
    found = ceilings([PHOTO, OTHER, Photo("c.jpg", SIDE, SIDE, (instance(3, "cat", 0, 0, 3, 3),))], 4)
    assert mean_ceiling(found, ["cat", "dog"]) == (found["cat"].ciou + found["dog"].ciou) / 2
    with pytest.raises(RelayModelsError, match="zebra"):
        mean_ceiling(found, ["cat", "zebra"])


def test_rows_by_area():
    rows = {row.name: row.n for row in evaluate([PHOTO, OTHER], perfect, settings=QUICK).areas}
    assert rows == {">=20 %": 3}


# ---------------------------------------------------------------- texts


def written(cells_GG: np.ndarray, label: str) -> str:
    return f"Here:\n<seg>{encode(cells_GG.astype(np.uint8), ('others', label))}</seg>"


def test_texts_are_read_by_label_and_put_back_to_size():
    seen = []

    def write(photo: Photo, prompts: list[str]) -> list[str]:
        seen.extend(prompts)
        cells_GG = np.zeros((4, 4), int)
        cells_GG[:2, :2] = 1
        return [written(cells_GG, "cat"), written(cells_GG, "horse"), "I cannot.", *["<seg>bus *4\n bus"] * 3]

    report = evaluate([PHOTO], from_texts(write, 4), settings=QUICK)
    assert seen == [query.prompt for query in queries_of(PHOTO)]
    assert report.row("cat").ciou.value == 1
    assert report.row("dog").ciou.value == 0  # somebody else's label is no dog
    # Nothing for the kite, and for the bus the first row of an answer cut short.
    assert report.n_acc.value == 0.5
    assert dict(report.statuses) == {"complete": 1, "repaired": 1, "none": 1, "truncated": 3}


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (lambda photo, queries: perfect(photo, queries)[1:], r"a\.jpg: 6 queries were asked, 5 replies"),
        (
            lambda photo, queries: [Reply(np.zeros((4, 4), bool))] * len(queries),
            r"a\.jpg: the mask for 'cat' must be of shape \[8, 8\], got \[4, 4\]",
        ),
        (from_texts(lambda photo, prompts: [], 4), "6 prompts were given, 0 answers"),
    ],
)
def test_an_answerer_that_does_not_answer_is_named(answer, problem):
    with pytest.raises(RelayModelsError, match=problem):
        evaluate([PHOTO], answer, settings=QUICK)


# ---------------------------------------------------------------- several classes at once


def test_multi_class_questions_give_mean_iou():
    asked = []

    def answer_classes(photo: Photo, classes: list[str]) -> np.ndarray:
        asked.append(list(classes))
        answer_HW = np.zeros((SIDE, SIDE), np.uint8)
        answer_HW[CAT.mask_HW] = 1 + classes.index("cat")
        answer_HW[0, 7] = 1 + classes.index("cat")
        return answer_HW

    report = evaluate([PHOTO, OTHER], perfect, settings=QUICK, answer_classes=answer_classes)
    assert asked == [["cat", "dog", "kite", "bus"], ["cat", "dog"]]
    # others: 32 + 48 true, one lost to a cat in each photo, 16 won of the dogs; cats: 32 of 34; dogs: 0 of 16.
    assert report.mean_iou == pytest.approx((78 / 96 + 32 / 34 + 0) / 3)
    assert report.mean_iou_as_published == pytest.approx((80 / 96 + 32 / 32 + 0) / 3)
    assert "mIoU" in report.to_markdown()
    assert evaluate([PHOTO], perfect, settings=QUICK).mean_iou is None


def test_many_multi_class_questions_take_no_more_memory_than_one():
    side, maps = 256, []
    rng = np.random.default_rng(0)
    halves_HW = np.zeros((side, side), bool)
    halves_HW[:, : side // 2] = True
    instances = (Instance.of(0, "cat", halves_HW), Instance.of(1, "dog", ~halves_HW))
    photos = [Photo(f"{index}.jpg", side, side, instances) for index in range(24)]
    truth_HW = np.where(halves_HW, 1, 2)

    def answer_classes(photo: Photo, classes: list[str]) -> np.ndarray:
        answer_HW = rng.integers(0, 3, (side, side))
        maps.append((answer_HW.astype(np.uint8), truth_HW))
        return answer_HW

    settings = replace(QUICK, kinds=("absent",))
    tracemalloc.start()
    report = evaluate(photos, perfect, settings=settings, answer_classes=answer_classes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    num_bytes = 8 * side**2  # of one label map
    assert peak < 10 * num_bytes + sum(answer_HW.nbytes for answer_HW, _ in maps)
    counts = ClassCounts(3)
    for answer_HW, true_HW in maps:
        counts.add(confusion(answer_HW, true_HW, 3))
    assert report.mean_iou == counts.mean_iou()
    assert report.mean_iou_as_published == counts.mean_iou(as_published=True)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_where_true_masks_meet_the_smaller_is_in_front(order):
    pair = (instance(0, "cat", 0, 0, 8, 8), instance(1, "dog", 2, 2, 4, 4))
    photo = Photo("a.jpg", SIDE, SIDE, tuple(pair[index] for index in order))

    def answer_classes(photo: Photo, classes: list[str]) -> np.ndarray:
        answer_HW = np.full((SIDE, SIDE), 1 + classes.index("cat"))
        answer_HW[2:4, 2:4] = 1 + classes.index("dog")
        return answer_HW

    assert evaluate([photo], perfect, settings=QUICK, answer_classes=answer_classes).mean_iou == 1


def test_a_label_map_that_fits_nothing_is_refused():
    with pytest.raises(RelayModelsError, match=r"a\.jpg: the label map .* up to 4, got \[8, 8\] and up to 9"):
        evaluate([PHOTO], perfect, settings=QUICK, answer_classes=lambda photo, classes: np.full((SIDE, SIDE), 9))


# ---------------------------------------------------------------- the report


def test_a_report_is_the_same_twice_and_reads_back():
    def report():
        return evaluate([PHOTO, OTHER], all_over, settings=QUICK, model="m", conditions={"grammar": "on"})

    assert report() == report()
    value = json.loads(report().to_json())
    assert value["conditions"] == [["grammar", "on"]]
    assert value["classes"][0]["name"] == "cat"
    assert value["classes"][0]["ciou"] == {"value": 0.25, "low": 0.25, "high": 0.25, "n": 2}


def test_the_table_tells_the_figures_and_how_they_were_got():
    text = evaluate(
        [PHOTO, OTHER], all_over, settings=QUICK, model="m", data="d", conditions={"grammar": "on"}
    ).to_markdown()
    assert "m on d, grammar: on. 2 photos, 8 questions ('Please segment only the X in the image.'), 4x4 grid" in text
    assert "(50 resamples, seed 0)" in text
    assert "| macro cIoU, classes with at least 2 photos | 1 | 0.250 [0.250, 0.250] | 1.000 |" in text
    assert "| N-acc | 3 | 0.000 [0.000, 0.000] | |" in text
    assert "| cat | 2 | 1.000 | 0.250 [0.250, 0.250] | 0.250 [0.250, 0.250] |" in text
    assert "| class (fewer photos) |" in text
    assert "Answers: 8 complete." in text
    header_width = {line.count("|") for line in text.splitlines() if line.startswith("| ")}
    assert header_width == {5, 8}


def test_photos_may_be_asked_about_at_a_time():
    photos = [replace(PHOTO, file=f"{number}.jpg") for number in range(9)]
    together, asked = Barrier(3), []

    def answer(photo: Photo, queries: list[Query]) -> list[Reply]:
        together.wait(timeout=60)  # broken where three photos are not asked about at a time
        asked.append(photo.file)
        return one_by_one(photo, queries)

    def one_by_one(photo: Photo, queries: list[Query]) -> list[Reply]:
        return perfect(photo, queries) if photo.file < "5" else silent(photo, queries)

    expected = evaluate(photos, one_by_one, settings=QUICK)
    assert evaluate(photos, answer, settings=QUICK, concurrency=3) == expected
    assert sorted(asked) == [photo.file for photo in photos]
    with pytest.raises(RelayModelsError, match="concurrency must be at least 1, got 0"):
        evaluate(photos, answer, settings=QUICK, concurrency=0)


def test_progress_is_told():
    told = []
    evaluate([PHOTO, OTHER], perfect, settings=QUICK, progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("grid", 0, "must be at least 1, got 0"),
        ("max_absent", -1, "must be at least 0, got -1"),
        ("min_photos", 0, "must be at least 1, got 0"),
        ("resamples", 0, "must be at least 1, got 0"),
        ("seed", -1, "must not be negative, got -1"),
        ("kinds", ("colour",), "must be of .*'colour'"),
    ],
)
def test_settings_that_cannot_be_are_refused(field, value, problem):
    with pytest.raises(RelayModelsError, match=f"{field} {problem}"):
        EvaluationSettings(**{field: value})


def test_no_photo_is_refused():
    with pytest.raises(RelayModelsError, match="at least one photo"):
        evaluate([], perfect)


# ---------------------------------------------------------------- the real set


@pytest.fixture(scope="module")
def val() -> list[Photo]:
    if not SEG_TINY.exists():
        pytest.skip("needs ../shared/data/seg-tiny")
    return load_jsonl(SEG_TINY / "val.jsonl", SEG_TINY)


def test_the_known_ceilings_of_seg_tiny(val):
    """cIoU over the val photos of each class, crowds included; five classes are the plain mean of their cIoU."""
    found = ceilings(val, 16)
    assert found["person"].n == 58
    assert round(found["person"].ciou, 2) == 0.78
    assert round(mean_ceiling(found, ["person", "dog", "bird", "car", "cup"]), 2) == 0.56


def test_the_truth_through_the_grid_reaches_its_ceiling_and_not_more(val):
    def best(photo: Photo, queries: list[Query]) -> list[Reply]:
        return [Reply(ceiling_mask(truth_of(photo, query)[0], 16)) for query in queries]

    report = evaluate(val, best, settings=EvaluationSettings(resamples=100))
    assert report.macro_classes == ("person", "dining table", "car", "chair", "cup", "tie")
    assert report.macro_ciou.value == report.macro_ceiling
    assert report.row("person").ciou_of_ceiling.value == 1
    small = next(row for row in report.areas if row.name == "<1 %")
    assert small.ciou.value < 0.3
    assert report.n_acc.value == 1
    assert report.t_acc.value > 0.99

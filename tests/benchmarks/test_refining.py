"""The measurement of a refiner, with a segmenter that always says the same: which questions are scored, and how often.

Photos show a dog on the left, another on the right, and a cat between them.
"""

from __future__ import annotations

import argparse
import json
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from relay_benchmarks import refining
from relay_benchmarks.errors import BenchArgumentError
from relay_models.masks import coco_rle
from relay_models.refine.prompts import Prediction

WIDTH, HEIGHT = 48, 32
BOXES = {0: ("dog", 0, 16), 1: ("dog", 32, 48), 2: ("cat", 16, 32)}  # id: class, columns
ALL_DOGS = {"text": "all dogs", "ids": [0, 1], "kind": "class"}
LEFT_DOG = {"text": "the dog on the left", "ids": [0], "kind": "position"}
THE_CAT = {"text": "the cat", "ids": [2], "kind": "class"}


class SilentSam:
    """Finds nothing, so that every coarse mask stays."""

    side, mask_side = 64, 16

    def embed(self, view: Image.Image) -> None:
        assert max(view.size) == self.side

    def predict(self, embedding: None, prompts: list[Any]) -> list[Prediction]:
        return [Prediction(np.full((self.mask_side, self.mask_side), -1, np.float32), 0.5) for _ in prompts]


@pytest.fixture(autouse=True)
def silent_sam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refining, "_load", lambda options: SilentSam())


def mask(*ids: int) -> dict[str, Any]:
    mask_HW = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for number in ids:
        _, left, right = BOXES[number]
        mask_HW[:, left:right] = True
    return dict(coco_rle(mask_HW))


def photo(name: str = "a", pseudo: tuple[int, ...] = (), **more: Any) -> dict[str, Any]:
    instances = [
        {"id": number, "label": label, "mask": mask(number), "provenance": "pseudo" if number in pseudo else "gt"}
        for number, (label, _, _) in BOXES.items()
    ]
    expressions = [ALL_DOGS, LEFT_DOG, THE_CAT]
    size = {"width": WIDTH, "height": HEIGHT}
    return {"file": f"{name}.png", **size, "instances": instances, "expressions": expressions, **more}


def measured(
    folder: Path,
    photos: list[dict[str, Any]],
    answers: list[dict[str, Any]] | None = None,
    num_photos: int | None = None,
) -> refining.Outcome:
    for line in photos:
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / line["file"])
    files = {"val.jsonl": photos, "predictions.jsonl": answers or []}
    for name, lines in files.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = argparse.Namespace(
        data=folder / "val.jsonl",
        predictions=None if answers is None else folder / "predictions.jsonl",
        refiner="silent",
        grid=16,
        prompts=["box"],
        photos=num_photos,
        seed=0,
        threads=None,
        output=None,
    )
    return refining.run(options)


def areas(outcome: refining.Outcome) -> list[int]:
    """Of the questions, in thirds of a picture."""
    scores = next(iter(outcome.measured.scores.values()))
    return [round(3 * score.area) for score in scores]


def test_a_set_is_asked_for_once(tmp_path: Path) -> None:
    """Dogs and cat by their class, the left dog by its expression; "all dogs" are the dogs again."""
    assert areas(measured(tmp_path, [photo()])) == [2, 1, 1]


@pytest.mark.parametrize("limit", [{"unsure": ["dog"]}, {"labelled_classes": ["cat"]}])
def test_a_class_that_may_lack_masks_is_not_scored(tmp_path: Path, limit: dict[str, Any]) -> None:
    outcome = measured(tmp_path, [photo(**limit)])
    assert areas(outcome) == [1], "the cat"
    assert "questions left out: 2 of classes that may lack masks" in refining.report(outcome)
    answers = [
        {"file": "a.png", "label": "dog", "mask": mask(0, 1)},
        {"file": "a.png", "ids": [0, 1], "mask": mask(0, 1)},
        {"file": "a.png", "ids": [0], "mask": mask(0)},
        {"file": "a.png", "label": "cat", "mask": mask(2)},
    ]
    outcome = measured(tmp_path, [photo(**limit)], answers)
    assert areas(outcome) == [1]
    assert "questions left out: 3 of classes that may lack masks" in refining.report(outcome)


def test_a_pseudo_labelled_mask_is_no_truth(tmp_path: Path) -> None:
    """The left dog is, and all dogs are not, of which a model made up one."""
    outcome = measured(tmp_path, [photo(pseudo=(1,))])
    assert areas(outcome) == [1, 1], "the cat and the left dog"
    assert "questions left out: 1 of pseudo-labelled masks" in refining.report(outcome)
    answers = [
        {"file": "a.png", "label": "dog", "mask": mask(0, 1)},
        {"file": "a.png", "ids": [1], "mask": mask(1)},
        {"file": "a.png", "ids": [0], "mask": mask(0)},
    ]
    outcome = measured(tmp_path, [photo(pseudo=(1,))], answers)
    assert areas(outcome) == [1]
    assert "questions left out: 2 of pseudo-labelled masks" in refining.report(outcome)


def test_predictions_for_photos_after_the_first_ones_are_left_alone(tmp_path: Path) -> None:
    answers = [{"file": f"{name}.png", "ids": [2], "mask": mask(2)} for name in "abc"]
    outcome = measured(tmp_path, [photo(name) for name in "abc"], answers, num_photos=2)
    assert areas(outcome) == [1, 1]


def test_a_prediction_far_from_the_truth_is_left_alone(tmp_path: Path) -> None:
    answers = [{"file": "a.png", "ids": [2], "mask": mask(2)}, {"file": "a.png", "ids": [2], "mask": mask(1)}]
    assert areas(measured(tmp_path, [photo()], answers)) == [1]


def test_what_was_asked_for_in_vain_is_left_alone(tmp_path: Path) -> None:
    in_vain = {"file": "a.png", "ids": [], "label": "kite", "kind": "absent", "mask": mask(1)}
    assert areas(measured(tmp_path, [photo()], [in_vain, {"file": "a.png", "ids": [2], "mask": mask(2)}])) == [1]


def test_a_set_that_was_answered_in_several_words_counts_once(tmp_path: Path) -> None:
    """As an evaluation asks: for the class, for "all dogs", and for the dogs one by one."""
    answers = [
        {"file": "a.png", "ids": [0, 1], "label": "dog", "mask": mask(0, 1)},
        {"file": "a.png", "ids": [1, 0], "label": "dog", "mask": mask(0, 1)},
        {"file": "a.png", "label": "dog", "mask": mask(0, 1)},
        {"file": "a.png", "ids": [0], "mask": mask(0)},
        {"file": "b.png", "ids": [0, 1], "label": "dog", "mask": mask(0, 1)},
    ]
    assert areas(measured(tmp_path, [photo(), photo("b")], answers)) == [2, 1, 2]


def test_an_expression_that_means_nothing_is_no_question(tmp_path: Path) -> None:
    nothing = {"text": "the red dog", "ids": [], "kind": "other"}
    assert areas(measured(tmp_path, [photo(expressions=[nothing])])) == [2, 1]
    in_vain = {"file": "a.png", "ids": [], "label": "dog", "kind": "absent expression", "mask": mask(1)}
    found = {"file": "a.png", "ids": [2], "mask": mask(2)}
    assert areas(measured(tmp_path, [photo()], [in_vain, found])) == [1]


def test_encoding_is_timed_over_the_pictures_that_were_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(refining.time, "perf_counter", lambda: float(next(ticks)))
    outcome = measured(tmp_path, [photo("a"), photo("b", instances=[], expressions=[]), photo("c")])
    assert (outcome.measured.num_photos, outcome.measured.embed_seconds) == (2, 1.0)


def test_a_photo_without_expressions_is_asked_for_its_classes(tmp_path: Path) -> None:
    line = photo()
    del line["expressions"]
    assert areas(measured(tmp_path, [line])) == [2, 1]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({"file": "b.png", "ids": [0], "mask": mask(0)}, r"line 1.*names 'b\.png'"),
        ({"file": "a.png", "ids": [7], "mask": mask(0)}, r"line 1.*\[7\]"),
        ({"file": "a.png", "label": "kite", "mask": mask(0)}, r"line 1.*'kite'"),
        ({"file": "a.png", "mask": mask(0)}, r"line 1.*ids or label"),
        ({"file": "a.png", "ids": [0]}, r"line 1.*mask"),
        ({"file": "a.png", "ids": [0], "mask": dict(coco_rle(np.ones((2, 3), bool)))}, r"line 1.*3x2"),
        ([], "line 1"),
    ],
)
def test_a_prediction_that_fits_no_photo_is_named(tmp_path: Path, answer: Any, problem: str) -> None:
    with pytest.raises(BenchArgumentError, match=problem):
        measured(tmp_path, [photo()], [answer])


def test_data_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchArgumentError, match=r"val\.jsonl:1: instances\[0\]\.mask"):
        measured(tmp_path, [photo(instances=[{"id": 0, "label": "dog"}], expressions=[])])
    with pytest.raises(BenchArgumentError, match="holds nothing to refine; questions left out: 3 of classes"):
        measured(tmp_path, [photo(unsure=["dog", "cat"])])


def scores(*refined: tuple[int, int]) -> list[refining.Score]:
    """Questions about photos of their own, with coarse masks that meet half of the truth."""
    return [refining.Score(number, 0.5, (50, 100), overlap, True) for number, overlap in enumerate(refined)]


def test_ways_to_prompt_are_compared_on_the_same_questions() -> None:
    """Each question is won by the same margin, so the lead is sure, however much questions differ."""
    points, box = scores(*[(50 + 4 * i, 100) for i in range(10)]), scores(*[(40 + 4 * i, 100) for i in range(10)])
    g_iou, c_iou = refining.leads(points, box)
    for gain in (g_iou, c_iou):
        assert (gain.refined - gain.coarse, gain.low, gain.high) == pytest.approx((0.1, 0.1, 0.1))
    gain, _ = refining.gains(points)
    assert gain.low < 0.15 < gain.high < 0.3


def test_a_line_stands_beside_the_best_other_way_of_the_same_agreement(tmp_path: Path) -> None:
    first, second, third = list(refining.Style)[:3]
    found = {
        (first, 0.0): scores((90, 100), (80, 100)),
        (second, 0.0): scores((60, 100), (60, 100)),
        (third, 0.0): scores((70, 100), (60, 100)),
        (second, 0.3): scores((99, 100), (99, 100)),
    }
    lines = refining.lines_of(refining.Measured(found, 2, 0.1, dict.fromkeys((first, second, third), 0.1)))
    of_all = {(line.style, line.least_agreement): line for line in lines if line.area == "all"}
    assert [(line.style, line.least_agreement) for line in lines] == [key for key in found for _ in range(2)]
    lead = of_all[first, 0.0].lead
    assert lead is not None
    assert (lead.other, lead.g_iou.coarse, lead.g_iou.refined) == (third, pytest.approx(0.65), pytest.approx(0.85))
    assert of_all[third, 0.0].lead.other is first
    assert of_all[third, 0.0].lead.g_iou.high < 0
    assert of_all[second, 0.3].lead is None
    options = argparse.Namespace(data=Path("val.jsonl"), refiner="silent", predictions=None, grid=16, seed=0)
    measured = refining.Measured(found, 2, 0.1, dict.fromkeys((first, second, third), 0.1))
    rows = refining.result_rows(measured, lines, options)
    file = refining.ResultsFile(tmp_path / "rows.csv", refining.REFINING_COLUMNS)
    file.prepare()
    file.append(rows)
    assert (rows[0]["best_other"], rows[0]["other_giou"], rows[-1]["best_other"]) == (third.label, 0.65, "")
    assert third.label in refining.result_table(lines)

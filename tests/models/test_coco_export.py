"""What is exported is what COCO's own tools load: the same pixels as in the PNG, boxes, areas, categories."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from relay_models.coco_export import CocoImage, CocoMask, coco_dataset, coco_results
from relay_models.errors import RelayModelsError
from relay_models.masks import area, box, coco_rle, png_bytes

# pycocotools 2.0.11 has not learnt NumPy 2's copy keyword; only these tests use its decoder.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CATEGORIES = ["others", "dog laying down", "a man, number 23"]


def a_picture_of(height: int, width: int, number: int) -> tuple[CocoImage, list[CocoMask]]:
    """An image and its masks: a ring, a diagonal, nothing, everything."""
    ring = np.zeros((height, width), dtype=np.bool_)
    ring[height // 8 : height // 2 + 1, width // 6 : width // 2 + 1] = True
    ring[height // 4 : height // 3, width // 4 : width // 3] = False
    diagonal = np.eye(height, width, dtype=np.uint8)
    masks = [
        CocoMask(number, CATEGORIES[1], ring, score=0.75),
        CocoMask(number, CATEGORIES[2], diagonal, score=0.5),
        CocoMask(number, CATEGORIES[1], np.zeros((height, width), dtype=np.bool_), score=0.0),
        CocoMask(number, CATEGORIES[0], np.ones((height, width), dtype=np.bool_), score=1.0),
    ]
    return CocoImage(number, f"images/{number} ü.jpg", width, height), masks


PICTURES = [a_picture_of(*sides, number) for number, sides in ((7, (40, 60)), (3, (1, 9)), (90, (9, 1)), (4, (1, 1)))]
IMAGES = [image for image, _ in PICTURES]
MASKS = [mask for _, masks in PICTURES for mask in masks]


def loaded(folder: Path, dataset: dict[str, Any]) -> COCO:
    path = folder / "instances.json"
    path.write_text(json.dumps(dataset))
    return COCO(str(path))


def from_png(mask: CocoMask) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png_bytes(mask.mask)))) > 0


def test_a_data_set_goes_through_a_file_and_comes_back_pixel_by_pixel(tmp_path):
    coco = loaded(tmp_path, coco_dataset(IMAGES, CATEGORIES, MASKS, description="a test"))
    assert sorted(coco.getImgIds()) == [3, 4, 7, 90]
    assert coco.imgs[7] == {"id": 7, "file_name": "images/7 ü.jpg", "width": 60, "height": 40}
    assert [(category["id"], category["name"]) for category in coco.loadCats(coco.getCatIds())] == [
        (1, "others"),
        (2, "dog laying down"),
        (3, "a man, number 23"),
    ]
    assert coco.getCatIds(catNms=["dog laying down"]) == [2]
    assert coco.dataset["info"]["description"] == "a test"
    annotations = [coco.anns[number] for number in range(1, len(MASKS) + 1)]
    assert len(annotations) == len(coco.anns)
    for annotation, mask in zip(annotations, MASKS, strict=True):
        np.testing.assert_array_equal(coco.annToMask(annotation), from_png(mask))
        assert annotation["image_id"] == mask.image_id
        assert coco.cats[annotation["category_id"]]["name"] == mask.category
        assert annotation["area"] == area(mask.mask)
        x, y, width, height = annotation["bbox"]
        assert (x, y, x + width, y + height) == (box(mask.mask) or (0, 0, 0, 0))
        assert annotation["iscrowd"] == 0
        assert annotation["score"] == mask.score
        assert isinstance(annotation["segmentation"]["counts"], str)
    assert [annotation["id"] for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[90]))] == [9, 10, 11, 12]


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda shape: arrays(np.bool_, shape)))
def test_any_mask_is_loaded_as_it_is(mask):
    image = CocoImage(1, "a.jpg", width=mask.shape[1], height=mask.shape[0])
    coco = COCO()
    coco.dataset = json.loads(json.dumps(coco_dataset([image], ["a"], [CocoMask(1, "a", mask)])))
    coco.createIndex()
    np.testing.assert_array_equal(coco.annToMask(coco.anns[1]), mask)
    assert "score" not in coco.anns[1]


def test_results_load_with_the_areas_and_boxes_of_their_masks(tmp_path):
    coco = loaded(tmp_path, coco_dataset(IMAGES, CATEGORIES, MASKS))
    path = tmp_path / "results.json"
    path.write_text(json.dumps(coco_results(IMAGES, CATEGORIES, MASKS)))
    results = coco.loadRes(str(path))
    for number, mask in enumerate(MASKS, start=1):
        result = results.anns[number]
        np.testing.assert_array_equal(results.annToMask(result), from_png(mask))
        assert result["area"] == area(mask.mask)
        assert result["score"] == mask.score
        assert (result["image_id"], coco.cats[result["category_id"]]["name"]) == (mask.image_id, mask.category)
        if (bounds := box(mask.mask)) is not None:
            x0, y0, x1, y1 = bounds
            assert list(result["bbox"]) == [x0, y0, x1 - x0, y1 - y0]


def evaluated(folder: Path, truth: list[CocoMask], answers: list[CocoMask]) -> float:
    """Mean average precision of masks."""
    coco = loaded(folder, coco_dataset(IMAGES, CATEGORIES, truth))
    results = coco.loadRes(json.loads(json.dumps(coco_results(IMAGES, CATEGORIES, answers, missing_score=1.0))))
    evaluation = COCOeval(coco, results, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


def test_cocos_evaluation_finds_right_answers_right_and_wrong_ones_wrong(tmp_path):
    truth = [mask for mask in MASKS if area(mask.mask)]
    assert evaluated(tmp_path, truth, truth) == 1.0
    moved = [CocoMask(mask.image_id, mask.category, np.roll(mask.mask, 17, axis=1)) for mask in truth]
    assert evaluated(tmp_path, truth, moved) < 0.9


def test_a_mask_may_be_its_rle():
    rle = [CocoMask(mask.image_id, mask.category, coco_rle(mask.mask), mask.score) for mask in MASKS]
    assert coco_dataset(IMAGES, CATEGORIES, rle) == coco_dataset(IMAGES, CATEGORIES, MASKS)
    assert coco_results(IMAGES, CATEGORIES, rle) == coco_results(IMAGES, CATEGORIES, MASKS)
    with pytest.raises(RelayModelsError, match=r"masks\[0\].mask has shape \[1, 2\]"):
        coco_dataset(IMAGES, CATEGORIES, [CocoMask(4, "others", coco_rle(np.ones((1, 2), dtype=np.bool_)))])


def test_a_score_that_is_missing_must_be_stood_in_for():
    masks = [CocoMask(4, "others", np.ones((1, 1), dtype=np.bool_))]
    with pytest.raises(RelayModelsError, match=r"masks\[0\].score is None; give missing_score"):
        coco_results(IMAGES, CATEGORIES, masks)
    (result,) = coco_results(IMAGES, CATEGORIES, masks, missing_score=0.25)
    assert result["score"] == 0.25
    assert "bbox" not in result


def one_pixel(**changes: Any) -> CocoMask:
    return CocoMask(
        **{"image_id": 4, "category": "others", "mask": np.ones((1, 1), dtype=np.bool_), "score": 1.0, **changes}
    )


@pytest.mark.parametrize("build", [coco_dataset, coco_results])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 5}, r"masks\[1\].image_id, 5, is the id of no image"),
        ({"category": "cat"}, r"masks\[1\].category, 'cat', is not in categories"),
        ({"mask": np.ones((2, 1), dtype=np.bool_)}, r"masks\[1\].mask has shape \[2, 1\], but image 4 has .* \[1, 1\]"),
        ({"mask": np.ones((1, 1))}, "mask must be bool or uint8"),
        ({"score": 1.5}, r"masks\[1\].score must be from 0 to 1, got 1.5"),
        ({"score": float("nan")}, r"masks\[1\].score must be from 0 to 1, got nan"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(build, changes, message):
    with pytest.raises(RelayModelsError, match=message):
        build(IMAGES, CATEGORIES, [one_pixel(), one_pixel(**changes)])


@pytest.mark.parametrize("build", [coco_dataset, coco_results])
def test_an_id_or_a_category_twice_is_refused(build):
    with pytest.raises(RelayModelsError, match=r"images\[1\].id, 7, appears twice"):
        build([IMAGES[0], IMAGES[0]], CATEGORIES, [])
    with pytest.raises(RelayModelsError, match=r"categories\[2\], 'a', appears twice"):
        build(IMAGES, ["a", "b", "a"], [])


def test_the_ids_of_categories_follow_the_list_and_not_the_answers():
    masks = [one_pixel(category=CATEGORIES[2]), one_pixel(category=CATEGORIES[0])]
    dataset = coco_dataset(IMAGES, CATEGORIES, masks)
    assert [annotation["category_id"] for annotation in dataset["annotations"]] == [3, 1]
    assert [result["category_id"] for result in coco_results(IMAGES, CATEGORIES, masks)] == [3, 1]


def test_nothing_is_a_data_set_too(tmp_path):
    coco = loaded(tmp_path, coco_dataset([], [], []))
    assert coco.getAnnIds() == []
    assert coco_results([], [], []) == []

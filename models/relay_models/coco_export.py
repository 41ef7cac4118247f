"""COCO files from masks: a data set that ``pycocotools.coco.COCO`` loads, and results that its ``loadRes`` takes.

Segmentations are compressed RLE, so masks come back pixel by pixel. Category ids are 1, 2, ... in the order of the
category list that the caller gives: never by order of appearance in answers. Images and categories are named by the
caller; a mask that names another, or whose size is not its image's, is an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from relay_models.errors import RelayModelsError
from relay_models.masks import AnyMask, CocoRle, area, box, coco_rle, from_coco_rle


@dataclass(frozen=True)
class CocoImage:
    """A picture of a data set: its id, its file, and its upright size in pixels."""

    id: int
    file_name: str
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class CocoMask:
    """One mask of a picture.

    Attributes:
        image_id: of the `CocoImage` it belongs to.
        category: one of the category list.
        mask: [H, W] bool or uint8, of the image's size, or its `coco_rle`, which takes less memory. It may be empty:
            then area is 0 and bbox [0, 0, 0, 0].
        score: from 0 to 1, or None where nobody knows.
    """

    image_id: int
    category: str
    mask: AnyMask | CocoRle
    score: float | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """(H, W), where the mask is one."""
        return tuple(self.mask["size"] if isinstance(self.mask, dict) else self.mask.shape)

    @property
    def pixels(self) -> AnyMask:
        """[H, W]."""
        return from_coco_rle(self.mask) if isinstance(self.mask, dict) else self.mask


def coco_dataset(
    images: Sequence[CocoImage], categories: Sequence[str], masks: Sequence[CocoMask], *, description: str = ""
) -> dict[str, Any]:
    """A COCO instances file, ready for `json.dump`: info, licenses, images, categories, annotations.

    Annotations are numbered from 1 in the order of ``masks``. bbox is [x, y, width, height]; iscrowd is 0 although the
    segmentation is RLE, so evaluations count it as an object. A known score is kept in the field ``score``.

    Raises:
        RelayModelsError: an id or a category appears twice, or a mask does not fit; the message names which.
    """
    sizes, category_ids = _sizes(images), _category_ids(categories)
    return {
        "info": {"description": description},
        "licenses": [],
        "images": [
            {"id": image.id, "file_name": image.file_name, "width": image.width, "height": image.height}
            for image in images
        ],
        "categories": [{"id": number, "name": name, "supercategory": ""} for name, number in category_ids.items()],
        "annotations": [
            {"id": number, **_located(mask, number - 1, sizes, category_ids), **_shape(mask), **_known_score(mask)}
            for number, mask in enumerate(masks, start=1)
        ],
    }


def coco_results(
    images: Sequence[CocoImage],
    categories: Sequence[str],
    masks: Sequence[CocoMask],
    *,
    missing_score: float | None = None,
) -> list[dict[str, Any]]:
    """COCO results for ``COCO(...).loadRes``: image_id, category_id, segmentation, score.

    There is no bbox: `loadRes` would take its area for the mask's.

    Args:
        images, categories, masks: as in `coco_dataset`, and with the same ids.
        missing_score: what a mask without a score is given; evaluations need a number.

    Raises:
        RelayModelsError: as in `coco_dataset`, or a score is missing and ``missing_score`` is None.
    """
    sizes, category_ids = _sizes(images), _category_ids(categories)
    results = []
    for index, mask in enumerate(masks):
        score = missing_score if mask.score is None else mask.score
        if score is None:
            raise RelayModelsError(f"masks[{index}].score is None; give missing_score to stand in for it")
        located = _located(mask, index, sizes, category_ids)
        results.append({**located, "segmentation": coco_rle(mask.pixels), "score": float(score)})
    return results


def _sizes(images: Sequence[CocoImage]) -> dict[int, tuple[int, int]]:
    """(H, W) by image id."""
    sizes: dict[int, tuple[int, int]] = {}
    for index, image in enumerate(images):
        if image.id in sizes:
            raise RelayModelsError(f"images[{index}].id, {image.id}, appears twice")
        sizes[image.id] = image.height, image.width
    return sizes


def _category_ids(categories: Sequence[str]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for number, name in enumerate(categories, start=1):
        if name in ids:
            raise RelayModelsError(f"categories[{number - 1}], {name!r}, appears twice")
        ids[name] = number
    return ids


def _located(
    mask: CocoMask, index: int, sizes: dict[int, tuple[int, int]], category_ids: dict[str, int]
) -> dict[str, int]:
    """Where a mask belongs, once it is known to fit there."""
    if mask.image_id not in sizes:
        raise RelayModelsError(f"masks[{index}].image_id, {mask.image_id}, is the id of no image")
    if mask.category not in category_ids:
        raise RelayModelsError(f"masks[{index}].category, {mask.category!r}, is not in categories")
    if mask.size != sizes[mask.image_id]:
        raise RelayModelsError(
            f"masks[{index}].mask has shape {list(mask.size)}, but image {mask.image_id} has [height, width] "
            f"{list(sizes[mask.image_id])}"
        )
    if mask.score is not None and not (math.isfinite(mask.score) and 0 <= mask.score <= 1):
        raise RelayModelsError(f"masks[{index}].score must be from 0 to 1, got {mask.score}")
    return {"image_id": mask.image_id, "category_id": category_ids[mask.category]}


def _shape(mask: CocoMask) -> dict[str, Any]:
    pixels_HW = mask.pixels
    x0, y0, x1, y1 = box(pixels_HW) or (0, 0, 0, 0)
    return {
        "segmentation": coco_rle(pixels_HW),
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": area(pixels_HW),
        "iscrowd": 0,
    }


def _known_score(mask: CocoMask) -> dict[str, float]:
    return {} if mask.score is None else {"score": float(mask.score)}

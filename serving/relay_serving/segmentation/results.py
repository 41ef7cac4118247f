"""From a descriptor and a picture's size to what the API returns: masks, boxes, components, COCO."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from relay_models import masks
from relay_models.refine.interface import Outcome, RefinedMask
from relay_models.text4seg import labels
from relay_models.text4seg.codec import BACKGROUND, Answer, Descriptor, DescriptorStatus, RowEvent
from relay_models.text4seg.geometry import upsample
from relay_serving.schemas.segmentation import Component, LabelMap, MaskFormat, SegmentationResult

Mask = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class MaskOptions:
    """How masks are written."""

    format: MaskFormat
    components: bool


@dataclass(frozen=True)
class FoundMask:
    """The part of a descriptor that carries one label, in a picture's own pixels."""

    label: str | None  # None: the background alone was found
    value: int  # index of the label in the descriptor
    mask_HW: Mask  # noqa: N815
    refiner: str | None = None  # see SegmentationResult


def masks_of(descriptor: Descriptor, height: int, width: int, wanted: Sequence[str] | None) -> Iterator[FoundMask]:
    """One mask for each wanted label, empty where the descriptor has none; without a list, for each label it has.

    One at a time: there may be hundreds, of millions of pixels each. A descriptor that has no label but the background
    is one empty mask with no label.
    """
    names = descriptor.labels[1:] if wanted is None else wanted
    for name in names:
        mask_HW = upsample(descriptor.mask(name), height, width)
        yield FoundMask(name, descriptor.index_of(name) or 0, mask_HW)
    if not names:
        yield FoundMask(None, 0, np.zeros((height, width), np.uint8))


def refined(coarse: FoundMask, new: RefinedMask, refiner: str) -> FoundMask:
    """What a refiner made of a mask."""
    origin = refiner if new.outcome is Outcome.REFINED else new.outcome.value
    return replace(coarse, mask_HW=new.mask_HW.view(np.uint8), refiner=origin)


def result_of(
    found: FoundMask,
    descriptor: Descriptor,
    options: MaskOptions,
    *,
    index: int,
    image_index: int,
    query_index: int,
    block: int = 0,
) -> SegmentationResult:
    """Everything about one mask that needs only its pixels and its descriptor."""
    box = masks.box(found.mask_HW)
    result = SegmentationResult(
        index=index,
        image_index=image_index,
        query_index=query_index,
        block=block,
        label=None if found.label is None else labels.restore(found.label),
        status=descriptor.status.value,
        repairs=[repair.value for repair in descriptor.repairs],
        mask=write_mask(found, options.format),
        box=box,
        area=masks.area(found.mask_HW),
        empty=box is None,
        refiner=found.refiner,
        grid=(descriptor.grid_HW.shape[0], descriptor.grid_HW.shape[1]),
        text=descriptor.text,
        answer=descriptor.preamble,
    )
    if options.components:
        parts = masks.components(found.mask_HW)
        result.components = [Component(id=part.id, box=part.box, area=part.area) for part in parts.parts]
        result.components_dropped = parts.dropped
    return result


def nothing_found(
    label: str | None, text: str, *, index: int, image_index: int, query_index: int
) -> SegmentationResult:
    """The model answered without a mask: not an error."""
    return SegmentationResult(
        index=index,
        image_index=image_index,
        query_index=query_index,
        label=label,
        status=DescriptorStatus.NONE.value,
        answer=text,
    )


def write_mask(found: FoundMask, mask_format: MaskFormat) -> dict[str, Any]:
    """A mask as the request wants it; every format names itself, and its size."""
    height, width = found.mask_HW.shape
    head: dict[str, Any] = {"format": mask_format.value, "size": [height, width]}
    if mask_format is MaskFormat.COCO_RLE:
        return {**head, "counts": masks.coco_rle(found.mask_HW)["counts"]}
    if mask_format is MaskFormat.PNG:
        return {**head, "png": _base64(masks.png_bytes(found.mask_HW))}
    if mask_format is MaskFormat.POLYGONS:
        return {**head, "lossy": True, "polygons": masks.polygons(found.mask_HW)}
    return {**head, "value": found.value}


def label_map_of(
    descriptor: Descriptor,
    height: int,
    width: int,
    *,
    refined: Iterable[FoundMask] | None = None,
    image_index: int,
    query_index: int,
    block: int = 0,
) -> LabelMap:
    """``refined`` are all of the descriptor's masks, no two of which overlap; without them, the grid is drawn."""
    label_map = upsample(descriptor.grid_HW, height, width)
    if refined is not None:
        label_map[:] = 0
        for found in refined:
            label_map[found.mask_HW != 0] = found.value
    return LabelMap(
        image_index=image_index,
        query_index=query_index,
        block=block,
        labels=[labels.restore(label) for label in descriptor.labels],
        png=_base64(masks.label_map_png(label_map)),
    )


def runs_of(event: RowEvent) -> tuple[tuple[str, int], ...]:
    """A finished row as (label, cells) runs."""
    return tuple(
        (labels.restore(event.labels[index]), sum(1 for _ in run)) for index, run in groupby(event.cells_W.tolist())
    )


def label_probability(
    pieces: Sequence[tuple[str, float]], answer: Answer, block: int, label: str | None
) -> float | None:
    """Mean probability of the tokens that spell a label in one of an answer's descriptors, wherever it stands there.

    Of those that spell `others`, where the label is nowhere. None where no token does.

    Args:
        pieces: the answer's tokens as text, each with its probability; together they hold the descriptors' texts.
        label: as it stands in the descriptor.
    """
    descriptor = answer.descriptors[block]
    text = "".join(piece for piece, _ in pieces)
    start = 0
    for before in answer.descriptors[:block]:
        start = text.find(before.text, start) + len(before.text)
    start = text.find(descriptor.text, start)
    if start < 0:
        return None
    spans_of = _label_spans(descriptor)
    spans = spans_of.get(label or BACKGROUND) or spans_of.get(BACKGROUND, [])
    position, span, inside = -start, 0, []
    for piece, probability in pieces:
        end = position + len(piece)
        while span < len(spans) and spans[span][1] <= position:
            span += 1
        if span < len(spans) and spans[span][0] < max(end, position + 1):
            inside.append(probability)
        position = end
    return round(sum(inside) / len(inside), 6) if inside else None


def _label_spans(descriptor: Descriptor) -> dict[str, list[tuple[int, int]]]:
    """Where each of a descriptor's labels stands in its text, as [start, end) in order."""
    spans: dict[str, list[tuple[int, int]]] = {}
    position = 0
    for piece in descriptor.text.replace("\n", "|").split("|"):
        spelled = piece.rpartition("*")[0]
        index = descriptor.index_of(spelled) if spelled.strip() else None
        if index is not None:
            start, end = position + len(spelled) - len(spelled.lstrip()), position + len(spelled.rstrip())
            spans.setdefault(descriptor.labels[index], []).append((start, end))
        position += len(piece) + 1
    return spans


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")

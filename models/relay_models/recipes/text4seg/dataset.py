"""Photos with masks, from the three forms people keep them in: JSON lines, COCO JSON, folders of PNG masks.

Legend: H rows and W columns of the photo, upright, in its own pixels.

What it promises:
    - Everything is checked while loading, pictures excepted: a fault is a `DatasetError` that names the file, the line
      or the field, and the value. Nothing is left out in silence.
    - Files are untrusted. A picture's name must lie inside its folder, masks are bounded by the photo's size, and
      pictures are opened through `relay_models.images` only (`Photo.open`).
    - Masks are kept as COCO's compressed runs and decoded each time `Instance.mask_HW` is asked for: a data set of
      thousands of photos fits in memory.

What is *not* known is part of the data, and the questions made from a photo must honour it:
    `unsure`            classes that may be in the photo without all of their masks
    `labelled_classes`  where given, only these classes are annotated at all; the rest is unlabelled, not background
    `is_crowd`          a region of many objects that were not told apart
    `is_group`          one mask that holds several objects, or for which one / several could not be told
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask  # type: ignore[import-untyped]

from relay_models.errors import DatasetError, ImageError, LabelError, RelayModelsError
from relay_models.images import ImageLimits, open_image
from relay_models.masks import AnyMask, BoolMask, coco_rle, from_coco_rle
from relay_models.text4seg.labels import BACKGROUND, check_label, match_key

logger = logging.getLogger(__name__)

EXPRESSION_KINDS = ("class", "position", "size", "relation", "other")
PROVENANCES = ("gt", "pseudo")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_SIDE = 65_535  # of a photo, as in `relay_models.images.ImageLimits`
MAX_PIXELS = 178_956_970
MAX_INSTANCES = 10_000  # of one photo
MAX_OUTLINE = 2_000_000  # of one annotation's polygons, in pixels along their edges; 100 bytes each while it is drawn

_SHOWN_CHARACTERS = 80
_PNG_BIT_DEPTH, _PNG_COLOUR_TYPE = 24, 25  # where a PNG's header says so
_PNG_COLOUR_TYPES_WITH_ALPHA = (4, 6)
_PNG_PALETTE = 3

Value = TypeVar("Value")


@dataclass(frozen=True)
class Instance:
    """One mask of one photo.

    Attributes:
        id: unique in its photo.
        label: its class.
        size: H, W.
        counts: COCO's compressed runs.
        is_crowd, is_group: see the module.
        is_pseudo: made by a model, not by a person.
    """

    id: int
    label: str
    size: tuple[int, int]
    counts: str
    is_crowd: bool = False
    is_group: bool = False
    is_pseudo: bool = False

    @classmethod
    def of(
        cls,
        id: int,
        label: str,
        mask_HW: AnyMask,
        *,
        is_crowd: bool = False,
        is_group: bool = False,
        is_pseudo: bool = False,
    ) -> Instance:
        """The instance that covers ``mask_HW``, bool or uint8 [H, W]."""
        rle = coco_rle(mask_HW)
        height, width = rle["size"]
        return cls(id, label, (height, width), rle["counts"], is_crowd, is_group, is_pseudo)

    @property
    def mask_HW(self) -> BoolMask:  # noqa: N802
        """[H, W], decoded anew each time."""
        return from_coco_rle({"size": list(self.size), "counts": self.counts})

    @property
    def is_one_object(self) -> bool:
        return not (self.is_crowd or self.is_group)


@dataclass(frozen=True)
class Expression:
    """Words for some of a photo's instances.

    Attributes:
        text: as one would say it.
        ids: of the instances meant; none where nothing in the photo is.
        kind: one of `EXPRESSION_KINDS`. "class" names all instances of a class, the others single ones.
    """

    text: str
    ids: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Photo:
    """One picture and what is known about it.

    Attributes:
        file: as the data set names it, with slashes; unique in the data set.
        width, height: in pixels, upright.
        instances: may overlap; ids are unique.
        expressions: each about instances of this photo.
        absent: classes known not to be in the photo, be they annotated in it or not.
        unsure: classes that may be in it without all of their masks.
        labelled_classes: the only classes annotated at all, or None where all of the data set's are.
        is_negative: known to show no object of the data set's classes.
        source: where it comes from, for reports.
        folder: what `file` is relative to.
        marked_by_hand: whether people marked every object in it, as far as classes are annotated; None where its
            instances tell.
    """

    file: str
    width: int
    height: int
    instances: tuple[Instance, ...] = ()
    expressions: tuple[Expression, ...] = ()
    absent: tuple[str, ...] = ()
    unsure: tuple[str, ...] = ()
    labelled_classes: tuple[str, ...] | None = None
    is_negative: bool = False
    source: str = ""
    folder: Path = Path()
    marked_by_hand: bool | None = None

    @property
    def path(self) -> Path:
        return self.folder / self.file

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes that have a mask, in the order of their first instance."""
        return tuple(dict.fromkeys(instance.label for instance in self.instances))

    def is_complete(self, label: str) -> bool:
        """Whether the masks of this class are all there, if only there are none."""
        return label not in self.unsure and (self.labelled_classes is None or label in self.labelled_classes)

    @property
    def is_all_by_hand(self) -> bool:
        """Whether people marked every object in it. Where nothing is marked, that is not known."""
        if self.marked_by_hand is not None:
            return self.marked_by_hand
        return bool(self.instances) and not any(instance.is_pseudo for instance in self.instances)

    def surely_lacks(self, label: str) -> bool:
        """Whether it says that this class is not in it, or people marked all of it and there is no mask of this class.

        A model that found nothing is no proof.
        """
        if label in self.labels or label in self.unsure:
            return False
        return label in self.absent or (self.is_all_by_hand and self.is_complete(label))

    def class_mask(self, label: str) -> BoolMask:
        """[H, W]: the union of the masks of this class, crowds and groups included."""
        return self.union(instance.id for instance in self.instances if instance.label == label)

    def union(self, ids: Iterator[int] | Sequence[int]) -> BoolMask:
        """[H, W]: the union of the instances with these ids; all False for none."""
        wanted = set(ids)
        union_HW = np.zeros((self.height, self.width), dtype=np.bool_)
        for instance in self.instances:
            if instance.id in wanted:
                union_HW |= instance.mask_HW
        return union_HW

    def open(self, limits: ImageLimits | None = None) -> Image.Image:
        """The picture: RGB, upright, of the size annotated.

        Raises:
            DatasetError: it cannot be opened, or has another size.
        """
        try:
            opened = open_image(self.path.read_bytes(), limits=limits or ImageLimits(), name=str(self.path))
        except OSError as error:
            raise DatasetError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        except ImageError as error:
            raise DatasetError(str(error)) from error
        if (opened.width, opened.height) != (self.width, self.height):
            raise DatasetError(
                f"{self.path}: is {opened.width}x{opened.height} upright, but is annotated as "
                f"{self.width}x{self.height}"
            )
        return opened.rgb


# ---------------------------------------------------------------- withholding


def withhold_pseudo(
    photos: Sequence[Photo], labels: Sequence[str], share: float = 0.1, seed: int = 10
) -> tuple[list[Photo], list[Photo]]:
    """The photos to train on, and those to keep back: of each class ``share`` of those with a pseudo-labelled mask.

    Of each class at least one is kept back, unless the share is 0. Which ones depends on the files, the class and the
    seed, not on the order of photos or of other classes. Both lists keep the order given.

    Raises:
        DatasetError: the share is not from 0 to 1, or a class has no pseudo-labelled mask.
    """
    if not 0 <= share <= 1:
        raise DatasetError(f"share must be from 0 to 1, got {share}")
    withheld: set[str] = set()
    for label in labels:
        files = sorted(photo.file for photo in photos if _has_pseudo(photo, label))
        if not files:
            raise DatasetError(f"labels names {label!r}, of which no photo has a pseudo-labelled mask")
        order = np.random.default_rng([seed, len(files)]).permutation(len(files))
        num_withheld = max(1, round(share * len(files))) if share else 0
        withheld.update(files[index] for index in order[:num_withheld])
    kept = [photo for photo in photos if photo.file not in withheld]
    return kept, [photo for photo in photos if photo.file in withheld]


def _has_pseudo(photo: Photo, label: str) -> bool:
    return any(instance.is_pseudo and instance.label == label for instance in photo.instances)


# ---------------------------------------------------------------- JSON lines


def load_jsonl(path: str | Path, image_folder: str | Path) -> list[Photo]:
    """Photos from a file of one JSON object a line.

    An object has `file` (relative to ``image_folder``), `width`, `height`, and may have
        `instances`: each `id`, `label`, `mask` (COCO RLE of the photo's size), optional `provenance` ("gt" or
            "pseudo"), `crowd`, `group`
        `expressions`: each `text`, `ids` (an empty list where it means nothing), `kind` (one of `EXPRESSION_KINDS`)
        `absent`, `unsure`, `labelled_classes`: lists of classes
        `negative`: true or false
        `marked_by_hand`: true or false: whether people marked every object; told by `provenance` where it is missing
        `source`: text
    Other fields are not read. Blank lines are skipped.

    Raises:
        DatasetError: the file cannot be read, or anything in it is not as above.
    """
    path, image_folder = Path(path), Path(image_folder)
    photos = [
        _jsonl_photo(_Record(_parsed(line, f"{path}:{number}"), f"{path}:{number}"), image_folder)
        for number, line in enumerate(_read_bytes(path).split(b"\n"), start=1)
        if line.strip()
    ]
    _check_files(photos, path)
    return photos


def _jsonl_photo(record: _Record, image_folder: Path) -> Photo:
    file = record.file("file", image_folder)
    width, height = record.side("width"), record.side("height")
    record.check_pixels(width, height)
    instances = tuple(_jsonl_instance(item, width, height) for item in record.records("instances"))
    record.check_unique("instances", "id", [instance.id for instance in instances])
    known = {instance.id for instance in instances}
    photo = Photo(
        file,
        width,
        height,
        instances,
        tuple(_jsonl_expression(item, known) for item in record.records("expressions")),
        record.classes("absent") or (),
        record.classes("unsure") or (),
        record.classes("labelled_classes"),
        record.flag("negative"),
        record.text("source", default=""),
        image_folder,
        marked_by_hand=record.flag("marked_by_hand") if "marked_by_hand" in record.value else None,
    )
    _check_consistent(photo, record)
    return photo


def _jsonl_instance(record: _Record, width: int, height: int) -> Instance:
    provenance = record.text("provenance", default="gt")
    if provenance not in PROVENANCES:
        raise record.error("provenance", f"must be one of {', '.join(PROVENANCES)}, got {_shown(provenance)}")
    return Instance.of(
        record.integer("id"),
        record.label("label"),
        record.rle("mask", width, height),
        is_crowd=record.flag("crowd"),
        is_group=record.flag("group"),
        is_pseudo=provenance == "pseudo",
    )


def _jsonl_expression(record: _Record, known: set[int]) -> Expression:
    text, kind = record.label("text"), record.text("kind")
    if kind not in EXPRESSION_KINDS:
        raise record.error("kind", f"must be one of {', '.join(EXPRESSION_KINDS)}, got {_shown(kind)}")
    ids = record.get("ids")
    if not (isinstance(ids, list) and all(type(item) is int for item in ids) and len(set(ids)) == len(ids)):
        raise record.error("ids", f"must be a list of ids, each once, got {_shown(ids)}")
    if unknown := [item for item in ids if item not in known]:
        raise record.error("ids", f"names {_shown(unknown[0])}, the id of no instance of this photo")
    return Expression(text, tuple(ids), kind)


def _check_consistent(photo: Photo, record: _Record) -> None:
    """What a line says about a class must not contradict what it says elsewhere."""
    for label in photo.absent:
        if label in photo.labels:
            raise record.error("absent", f"names {label!r}, of which the photo has an instance")
        if label in photo.unsure:
            raise record.error("absent", f"names {label!r}, which `unsure` names too")
    if photo.is_negative and photo.instances:
        raise record.error("negative", f"is true, but the photo has {len(photo.instances)} instances")


# ---------------------------------------------------------------- COCO JSON


def load_coco(path: str | Path, image_folder: str | Path) -> list[Photo]:
    """Photos from a COCO instances file, one for each entry of `images`, in that order.

    Segmentations may be lists of polygons, compressed RLE, or RLE with plain counts. Every category counts as annotated
    in every photo, which is what COCO promises: a category without an annotation in a photo is absent there, and a
    photo without annotations is negative. There are no expressions. An annotation that covers no pixel, as COCO's own
    files hold some, is left out with a warning, and its class is `unsure` in its photo.

    Raises:
        DatasetError: the file cannot be read, a field is missing or malformed, an id is met twice or belongs to
            nothing, a polygon lies far outside of its picture, polygons are longer than `MAX_OUTLINE`, or none of the
            annotations covers a pixel.
    """
    path, image_folder = Path(path), Path(image_folder)
    record = _Record(_parsed(_read_bytes(path), str(path)), str(path))
    names = _coco_categories(record)
    images = record.records("images", is_required=True)
    record.check_unique("images", "id", [image.integer("id") for image in images])
    sizes = {image.integer("id"): (image.side("width"), image.side("height")) for image in images}
    instances: dict[int, list[Instance]] = {number: [] for number in sizes}
    unsure: dict[int, dict[str, None]] = {number: {} for number in sizes}
    annotations = record.records("annotations", is_required=True)
    record.check_unique("annotations", "id", [annotation.integer("id") for annotation in annotations])
    without_mask: list[_Record] = []
    for annotation in annotations:
        number = annotation.one_of("image_id", sizes, "image")
        label = names[annotation.one_of("category_id", names, "category")]
        instance = _coco_instance(annotation, label, *sizes[number])
        if instance is None:
            unsure[number][label] = None
            without_mask.append(annotation)
        else:
            instances[number].append(instance)
    _warn_of_lost(path, without_mask, len(annotations))
    photos = [
        _coco_photo(image, image_folder, names, instances[image.integer("id")], tuple(unsure[image.integer("id")]))
        for image in images
    ]
    _check_files(photos, path)
    return photos


def _warn_of_lost(path: Path, without_mask: Sequence[_Record], num_annotations: int) -> None:
    if not without_mask:
        return
    first = without_mask[0].integer("id")
    if len(without_mask) == num_annotations:
        raise DatasetError(f"{path}: none of its {num_annotations} annotations covers a pixel; masks are needed")
    logger.warning(
        "%s: %d of %d annotations cover no pixel, the first is that with id %d; they are left out, and their classes "
        "count as unsure in their photos",
        path,
        len(without_mask),
        num_annotations,
        first,
    )


def _coco_categories(record: _Record) -> dict[int, str]:
    categories = record.records("categories", is_required=True)
    record.check_unique("categories", "id", [category.integer("id") for category in categories])
    names = [category.label("name") for category in categories]
    record.check_unique("categories", "name", [match_key(name) for name in names])
    return {category.integer("id"): name for category, name in zip(categories, names, strict=True)}


def _coco_photo(
    image: _Record, image_folder: Path, names: dict[int, str], instances: list[Instance], unsure: tuple[str, ...]
) -> Photo:
    image.check_pixels(image.side("width"), image.side("height"))
    shown = {*unsure, *(instance.label for instance in instances)}
    return Photo(
        image.file("file_name", image_folder),
        image.side("width"),
        image.side("height"),
        tuple(instances),
        absent=tuple(name for name in names.values() if name not in shown),
        unsure=unsure,
        is_negative=not shown,
        source="coco",
        folder=image_folder,
    )


def _coco_instance(annotation: _Record, label: str, width: int, height: int) -> Instance | None:
    """None where it covers no pixel."""
    annotation.check_pixels(width, height)
    segmentation = annotation.get("segmentation")
    if segmentation is None:
        return None
    if isinstance(segmentation, list):
        mask_HW = _filled_polygons(annotation, segmentation, width, height)
    else:
        mask_HW = annotation.rle("segmentation", width, height)
    if not mask_HW.any():
        return None
    return Instance.of(annotation.integer("id"), label, mask_HW, is_crowd=annotation.flag("iscrowd"))


def _filled_polygons(annotation: _Record, polygons: list[Any], width: int, height: int) -> BoolMask:
    """COCO's own rasteriser, given only what it can draw in bounded time. Points and lines cover nothing."""
    for index, polygon in enumerate(polygons):
        field = f"segmentation[{index}]"
        if not isinstance(polygon, list) or len(polygon) % 2:
            raise annotation.error(field, f"must be x, y of corners, got {_shown(polygon)}")
        for place, value in enumerate(polygon):
            side = height if place % 2 else width
            is_number = type(value) is float or type(value) is int
            if not is_number or not -side <= value <= 2 * side:  # NaN is nowhere
                raise annotation.error(
                    f"{field}[{place}]", f"must be a coordinate in the {width}x{height} picture, got {_shown(value)}"
                )
    polygons = [polygon for polygon in polygons if len(polygon) >= 6]
    if not polygons:
        return np.zeros((height, width), dtype=np.bool_)
    length = sum(map(_outline_length, polygons))
    if length > MAX_OUTLINE:
        raise annotation.error(
            "segmentation",
            f"has outlines of {length} pixels in all, more than {MAX_OUTLINE}: simplify them, or give a COCO RLE",
        )
    return from_coco_rle(_merged(coco_mask.frPyObjects(polygons, height, width)))


def _outline_length(polygon: list[float]) -> int:
    """In pixels: the longer of the width and the height of each edge, and at least one for each corner."""
    corners_N2 = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    edges_N2 = np.abs(corners_N2 - np.roll(corners_N2, 1, axis=0))
    return int(np.ceil(edges_N2.max(axis=1)).clip(1).sum())


def _merged(rles: list[dict[str, Any]]) -> dict[str, Any]:
    """Their union. Two by two, because COCO's code takes one after the other, in time quadratic in their number."""
    while len(rles) > 1:
        rles = [coco_mask.merge(rles[start : start + 2]) for start in range(0, len(rles), 2)]
    return rles[0]


# ---------------------------------------------------------------- PNG masks


def load_png_masks(folder: str | Path) -> list[Photo]:
    """Photos from a folder of pictures and PNG masks.

    The layout:
        images/<stem>.<jpg, png, ...>       the pictures, one of each stem
        masks/<stem>.<label>.png            all of one class in one picture
        masks/<stem>.<label>.<number>.png   one object, numbered as you like; then there is none without a number
        classes.txt                         optional: the classes, one a line

    A mask has its picture's upright size; any value but 0 (in any channel) is foreground. It is an 8-bit PNG or one of
    fewer bits, grey, RGB or with a palette, without transparency. A palette's index 0 must be black, and no other that
    the mask holds may be: else index and colour disagree on what is foreground. A label may hold spaces, and no dot.

    With `classes.txt` each of its classes counts as annotated in every picture: without a mask it is absent, and a mask
    of another class is refused. Without it only the classes that have a mask count as annotated, picture by picture.
    A mask without foreground says, either way, that the class is absent. A mask without a number may hold several
    objects (`is_group`). There are no expressions. Photos are sorted by file name.

    Raises:
        DatasetError: a folder or picture is missing, a name cannot be understood, or a mask is no such PNG.
    """
    folder = Path(folder)
    pictures = _pictures_by_stem(folder / "images")
    classes = _listed_classes(folder / "classes.txt")
    masks: dict[str, dict[str, list[tuple[int | None, Path]]]] = {stem: {} for stem in pictures}
    for path in _listed(folder / "masks"):
        stem, label, number = _mask_name(path, pictures)
        if classes is not None and label not in classes:
            raise DatasetError(f"{path}: is of {label!r}, which {folder / 'classes.txt'} does not list")
        masks[stem].setdefault(label, []).append((number, path))
    photos = [_png_photo(folder, pictures[stem], masks[stem], classes) for stem in sorted(pictures)]
    _check_files(photos, folder)
    return photos


def _png_photo(
    folder: Path, picture: Path, masks: Mapping[str, list[tuple[int | None, Path]]], classes: tuple[str, ...] | None
) -> Photo:
    file = picture.relative_to(folder).as_posix()
    width, height = _upright_size(picture)
    instances: list[Instance] = []
    for label, numbered in sorted(masks.items()):
        if len(numbered) > 1 and any(number is None for number, _ in numbered):
            path = next(path for number, path in numbered if number is None)
            raise DatasetError(f"{path}: stands beside numbered masks of {label!r}: number all of them, or none")
        for number, path in sorted(numbered, key=lambda pair: pair[0] or 0):
            mask_HW = _png_mask(path, width, height)
            if mask_HW.any():
                instances.append(Instance.of(len(instances), label, mask_HW, is_group=number is None))
    present = {instance.label for instance in instances}
    annotated = classes if classes is not None else tuple(sorted(masks))
    return Photo(
        file,
        width,
        height,
        tuple(instances),
        absent=tuple(label for label in annotated if label not in present),
        labelled_classes=None if classes is not None else annotated,
        is_negative=classes is not None and not instances,
        source="png",
        folder=folder,
    )


def _upright_size(picture: Path) -> tuple[int, int]:
    try:
        opened = open_image(picture.read_bytes(), limits=ImageLimits(), name=str(picture))
    except OSError as error:
        raise DatasetError(f"{picture}: cannot be read: {error.strerror or error}") from error
    except ImageError as error:
        raise DatasetError(str(error)) from error
    return opened.width, opened.height


def _png_mask(path: Path, width: int, height: int) -> BoolMask:
    data = _read_bytes(path)
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) <= _PNG_COLOUR_TYPE:
        raise DatasetError(f"{path}: is no PNG; masks must not be compressed with loss")
    if data[_PNG_BIT_DEPTH] > 8:
        raise DatasetError(f"{path}: has {data[_PNG_BIT_DEPTH]} bits a sample, save it with 8")
    has_key = b"tRNS" in data[: max(data.find(b"IDAT"), 0)]
    if data[_PNG_COLOUR_TYPE] in _PNG_COLOUR_TYPES_WITH_ALPHA or has_key:
        raise DatasetError(f"{path}: has transparency, save it without")
    try:
        opened = open_image(data, limits=ImageLimits(), name=str(path))
    except ImageError as error:
        raise DatasetError(str(error)) from error
    if (opened.width, opened.height) != (width, height):
        raise DatasetError(f"{path}: is {opened.width}x{opened.height}, but its picture is {width}x{height}")
    mask_HW = np.asarray(np.asarray(opened.rgb).any(axis=2), dtype=np.bool_)
    if data[_PNG_COLOUR_TYPE] == _PNG_PALETTE:
        with Image.open(io.BytesIO(data)) as picture:
            index_HW = np.asarray(ImageOps.exif_transpose(picture))
        if not np.array_equal(index_HW != 0, mask_HW):
            raise DatasetError(
                f"{path}: has a palette in which index 0 is not black, or another one is: save it in grey, with 0 for "
                "the background"
            )
    return mask_HW


def _pictures_by_stem(folder: Path) -> dict[str, Path]:
    pictures: dict[str, Path] = {}
    for path in _listed(folder):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise DatasetError(f"{path}: is no picture; images/ may hold {', '.join(IMAGE_SUFFIXES)}")
        if "\\" in path.name or not path.name.isprintable():
            raise DatasetError(f"{path}: has a backslash or a character that cannot be shown in its name: rename it")
        if path.stem in pictures:
            raise DatasetError(f"{path}: has the same stem as {pictures[path.stem].name}; rename one of them")
        pictures[path.stem] = path
    if not pictures:
        raise DatasetError(f"{folder}: holds no picture")
    return pictures


def _mask_name(path: Path, pictures: Mapping[str, Path]) -> tuple[str, str, int | None]:
    """Stem, label and number. Of stems that fit, such as `a` and `a.b`, the longest."""
    if path.suffix != ".png":
        raise DatasetError(f"{path}: must end in .png")
    parts = path.name[: -len(".png")].split(".")
    number = None
    if len(parts) > 2 and parts[-1].isascii() and parts[-1].isdigit() and len(parts[-1]) <= 9:
        number = int(parts.pop())
    stem, label = ".".join(parts[:-1]), parts[-1]
    if not stem:
        raise DatasetError(f"{path}: must be named <stem>.<label>.png or <stem>.<label>.<number>.png")
    if stem not in pictures:
        raise DatasetError(f"{path}: belongs to no picture; there is no images/{stem}.<jpg, png, ...>")
    _check_class(label, str(path))
    return stem, label, number


def _listed_classes(path: Path) -> tuple[str, ...] | None:
    if not path.exists():
        return None
    try:
        lines = _read_bytes(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
    classes: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        label = line.strip()
        if not label:
            continue
        _check_class(label, f"{path}:{number}")
        if match_key(label) in classes:
            raise DatasetError(f"{path}:{number}: names {label!r} twice")
        classes[match_key(label)] = label
    if not classes:
        raise DatasetError(f"{path}: names no class; list one a line, or remove the file")
    return tuple(classes.values())


def _listed(folder: Path) -> list[Path]:
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be listed: {error.strerror or error}") from error
    return [path for path in paths if not path.name.startswith(".")]


# ---------------------------------------------------------------- reading JSON that strangers wrote


@dataclass(frozen=True)
class _Record:
    """A JSON object, and where it stands, so that each complaint can say so."""

    value: Mapping[str, Any]
    place: str  # file, file:line, or either with a field
    prefix: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.value, dict):
            where = f": {self.prefix.rstrip('.')}" if self.prefix else ""
            raise DatasetError(f"{self.place}{where}: must be a JSON object, got {_shown(self.value)}")

    def error(self, field: str, problem: str) -> DatasetError:
        return DatasetError(f"{self.place}: {self.prefix}{field} {problem}")

    def get(self, field: str) -> Any:
        if field not in self.value:
            raise self.error(field, "is missing")
        return self.value[field]

    def text(self, field: str, default: str | None = None) -> str:
        value = self.get(field) if default is None else self.value.get(field, default)
        if not isinstance(value, str):
            raise self.error(field, f"must be text, got {_shown(value)}")
        return value

    def integer(self, field: str) -> int:
        value = self.get(field)
        if type(value) is not int:
            raise self.error(field, f"must be an integer, got {_shown(value)}")
        return value

    def side(self, field: str) -> int:
        value = self.integer(field)
        if not 1 <= value <= MAX_SIDE:
            raise self.error(field, f"must be from 1 to {MAX_SIDE}, got {_shown(value)}")
        return value

    def check_pixels(self, width: int, height: int) -> None:
        if width * height > MAX_PIXELS:
            raise self.error("width", f"and height are {width}x{height}, more than {MAX_PIXELS} pixels")

    def flag(self, field: str) -> bool:
        value = self.value.get(field, False)
        if not (type(value) is bool or (type(value) is int and value in (0, 1))):
            raise self.error(field, f"must be true or false, got {_shown(value)}")
        return bool(value)

    def label(self, field: str) -> str:
        value = self.text(field)
        _check_class(value, self.place, f"{self.prefix}{field}")
        return value

    def classes(self, field: str) -> tuple[str, ...] | None:
        value = self.value.get(field)
        if value is None:
            return None
        if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise self.error(field, f"must be a list of classes, got {_shown(value)}")
        for index, item in enumerate(value):
            _check_class(item, self.place, f"{self.prefix}{field}[{index}]")
        if len(set(value)) < len(value):
            raise self.error(field, f"names a class twice: {_shown(value)}")
        return tuple(value)

    def records(self, field: str, *, is_required: bool = False) -> list[_Record]:
        value = self.get(field) if is_required else self.value.get(field, [])
        if not isinstance(value, list):
            raise self.error(field, f"must be a list, got {_shown(value)}")
        return [_Record(item, self.place, f"{self.prefix}{field}[{index}].") for index, item in enumerate(value)]

    def one_of(self, field: str, known: Mapping[int, Any], noun: str) -> int:
        value = self.integer(field)
        if value not in known:
            raise self.error(field, f"is {_shown(value)}, the id of no {noun}")
        return value

    def check_unique(self, field: str, key: str, values: Sequence[Any]) -> None:
        first: dict[Any, int] = {}
        for index, value in enumerate(values):
            if value in first:
                raise self.error(f"{field}[{index}].{key}", f"is {_shown(value)}, as {field}[{first[value]}].{key} is")
            first[value] = index

    def file(self, field: str, folder: Path) -> str:
        """A file below ``folder``; it has to be there, but is not opened."""
        value = self.text(field)
        name = PurePosixPath(value)
        if not value or "\0" in value or "\\" in value or name.is_absolute() or ".." in name.parts:
            raise self.error(field, f"must be a relative path without '..', got {_shown(value)}")
        try:
            is_there = (folder / name).is_file()
        except OSError as error:
            raise self.error(
                field, f"is {_shown(value)}, which cannot be looked up: {error.strerror or error}"
            ) from error
        if not is_there:
            raise self.error(field, f"is {_shown(value)}, but there is no file {folder / name}")
        return value

    def rle(self, field: str, width: int, height: int) -> BoolMask:
        value = self.get(field)
        if not isinstance(value, dict):
            raise self.error(field, f"must be a COCO RLE, got {_shown(value)}")
        if value.get("size") != [height, width]:
            raise self.error(
                f"{field}.size",
                f"must be [height, width] of the photo, [{height}, {width}], got {_shown(value.get('size'))}",
            )
        try:
            return from_coco_rle(value)
        except RelayModelsError as error:
            raise self.error(field, f"cannot be read: {error}") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parsed(text: bytes, place: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DatasetError(f"{place}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise DatasetError(f"{place}: is not JSON: {str(error) or type(error).__name__}") from error


def _check_class(label: str, place: str, field: str = "") -> None:
    where = f"{place}: {field}" if field else f"{place}:"
    try:
        check_label(label)
    except LabelError as error:
        raise DatasetError(f"{where} cannot be used: {error}") from error
    if match_key(label) == match_key(BACKGROUND):
        raise DatasetError(f"{where} is {label!r}, the name of the background: name it differently")


def _check_files(photos: Sequence[Photo], path: Path) -> None:
    """What must hold among the photos of a set: each file once, each class spelt in one way."""
    first: dict[str, int] = {}
    spelling: dict[str, str] = {}
    seen: set[str] = set()
    for index, photo in enumerate(photos):
        if photo.file in first:
            raise DatasetError(f"{path}: photo {index + 1} is {photo.file!r}, as photo {first[photo.file] + 1} is")
        first[photo.file] = index
        if len(photo.instances) > MAX_INSTANCES:
            raise DatasetError(f"{path}: {photo.file} has {len(photo.instances)} instances, more than {MAX_INSTANCES}")
        for label in dict.fromkeys((*photo.labels, *photo.absent, *photo.unsure, *(photo.labelled_classes or ()))):
            if label not in seen and (known := spelling.setdefault(match_key(label), label)) != label:
                raise DatasetError(f"{path}: {photo.file} has the class {label!r}, spelt {known!r} before")
            seen.add(label)
    if not photos:
        raise DatasetError(f"{path}: holds no photo")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"

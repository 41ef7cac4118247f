"""A frozen encoder's features of photos and of changed copies of them, computed once and kept on disk.

A cache is a folder. For each variant v of the photos (0: as they are; others: changed at random) it holds

    photos-v.jsonl     what is known of each changed photo, as `dataset.load_jsonl` reads it
    features-v.npy     [num_photos, C, G, G] float16, in the same order; mapped, not read, when it is used

Both appear by a rename, so a variant is there in whole or not at all, and work that was killed goes on with the next
variant. Equal photos, seed and augmentation give equal caches; another choice goes to another folder (`cache_key`).

Legend: N photos, C channels, G cells a side.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from relay_models.errors import DatasetError
from relay_models.recipes.text4seg.augment import Augmentation, Sample, opened
from relay_models.recipes.text4seg.dataset import Photo, load_jsonl

Features = npt.NDArray[np.float16]
Encode = Callable[[Image.Image], npt.NDArray[Any]]  # an upright RGB picture to features [C, G, G]

_PIXELS_KEPT = 64 << 20  # of photos kept open for mosaics and pastes, 3 bytes each
_BYTES_READ = 4096  # at each end of a file, to tell it from another


@dataclass(frozen=True)
class Variant:
    """One changed copy of every photo. ``features[i]`` are those of ``photos[i]``, in whose masks changes are made."""

    photos: tuple[Photo, ...]
    features: Features


def cache_key(photos: Sequence[Photo], encoder: str, seed: int, augmentation: Augmentation) -> str:
    """Names a cache: it changes with the photos, what is known of them, the encoder's name, seed and augmentation.

    A picture is told from another by its size and its first and last bytes, wherever it lies. Raises DatasetError where
    one cannot be read.
    """
    digest = hashlib.sha256(json.dumps([encoder, seed, asdict(augmentation)]).encode())
    for photo in photos:
        digest.update(json.dumps(record_of(photo), sort_keys=True).encode())
        digest.update(_ends_of(photo.path))
    return digest.hexdigest()[:16]


def _ends_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            first = file.read(_BYTES_READ)
            file.seek(max(0, size - _BYTES_READ))
            return b"%d:%b%b" % (size, first, file.read(_BYTES_READ))
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror or error}") from error


def record_of(photo: Photo) -> dict[str, Any]:
    """The photo as a line of `dataset.load_jsonl`."""
    record: dict[str, Any] = {
        "file": photo.file,
        "width": photo.width,
        "height": photo.height,
        "source": photo.source,
        "instances": [
            {
                "id": instance.id,
                "label": instance.label,
                "mask": {"size": list(instance.size), "counts": instance.counts},
                "provenance": "pseudo" if instance.is_pseudo else "gt",
                "crowd": instance.is_crowd,
                "group": instance.is_group,
            }
            for instance in photo.instances
        ],
        "expressions": [
            {"text": expression.text, "ids": list(expression.ids), "kind": expression.kind}
            for expression in photo.expressions
        ],
        "absent": list(photo.absent),
        "unsure": list(photo.unsure),
        "negative": photo.is_negative,
    }
    if photo.labelled_classes is not None:
        record["labelled_classes"] = list(photo.labelled_classes)
    if photo.marked_by_hand is not None:
        record["marked_by_hand"] = photo.marked_by_hand
    return record


def make_variant(
    folder: Path, number: int, photos: Sequence[Photo], encode: Encode, seed: int, augmentation: Augmentation
) -> None:
    """Write variant ``number`` of ``photos``, unless it is there. Variant 0 is not changed."""
    photos_file, features_file = _files(folder, number)
    if photos_file.exists() and features_file.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"*-{number}.*.part"):  # of a run that was killed: they are large
        leftover.unlink(missing_ok=True)
    unfinished = features_file.with_suffix(f".{os.getpid()}.part")
    try:
        records = _write_features(unfinished, number, photos, encode, seed, augmentation)
        lines = photos_file.with_suffix(f".{os.getpid()}.part")
        lines.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        os.replace(unfinished, features_file)
        os.replace(lines, photos_file)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_features(
    file: Path, number: int, photos: Sequence[Photo], encode: Encode, seed: int, augmentation: Augmentation
) -> list[dict[str, Any]]:
    """What is known of each photo of the variant, whose features are in ``file`` then."""
    opened_photos = _OpenedPhotos(photos)
    records: list[dict[str, Any]] = []
    stored: np.memmap[Any, Any] | None = None
    for index in tqdm(range(len(photos)), desc=f"Features, variant {number}", unit="photo"):
        sample = opened(photos[index])
        if number:
            sample = _changed(
                sample, opened_photos.get, len(photos), np.random.default_rng([seed, number, index]), augmentation
            )
        features_CGG = np.asarray(encode(sample.image), dtype=np.float16)
        if stored is None:
            shape = (len(photos), *features_CGG.shape)
            stored = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
        stored[index] = features_CGG
        records.append(record_of(replace(sample.photo, file=photos[index].file)))
    assert stored is not None, "there are photos"
    stored.flush()
    return records


class _OpenedPhotos:
    """The photos opened last, as many as have `_PIXELS_KEPT` pixels together, and at least one."""

    def __init__(self, photos: Sequence[Photo]) -> None:
        self._photos = photos
        self._opened: OrderedDict[int, Sample] = OrderedDict()
        self._pixels = 0

    def get(self, index: int) -> Sample:
        if index not in self._opened:
            self._opened[index] = opened(self._photos[index])
            self._pixels += self._pixels_of(index)
        self._opened.move_to_end(index)
        while self._pixels > _PIXELS_KEPT and len(self._opened) > 1:
            self._pixels -= self._pixels_of(self._opened.popitem(last=False)[0])
        return self._opened[index]

    def _pixels_of(self, index: int) -> int:
        return self._photos[index].width * self._photos[index].height


def read_variants(folder: Path, image_folder: Path) -> list[Variant]:
    """The variants that are there in whole, by number, until the first that is not."""
    variants: list[Variant] = []
    while True:
        photos_file, features_file = _files(folder, len(variants))
        if not (photos_file.exists() and features_file.exists()):
            return variants
        photos = load_jsonl(photos_file, image_folder)
        variants.append(Variant(tuple(photos), np.load(features_file, mmap_mode="r")))


def _changed(
    sample: Sample, draw: Callable[[int], Sample], count: int, rng: np.random.Generator, augmentation: Augmentation
) -> Sample:
    return augmentation.apply(sample, lambda: draw(int(rng.integers(count))), rng)


def _files(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"photos-{number}.jsonl", folder / f"features-{number}.npy"

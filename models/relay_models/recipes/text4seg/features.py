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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from relay_models.recipes.text4seg.augment import Augmentation, Sample, opened
from relay_models.recipes.text4seg.dataset import Photo, load_jsonl

Features = npt.NDArray[np.float16]
Encode = Callable[[Image.Image], npt.NDArray[Any]]  # an upright RGB picture to features [C, G, G]

_OPENED_KEPT = 64  # photos kept open for mosaics and pastes


@dataclass(frozen=True)
class Variant:
    """One changed copy of every photo. ``features[i]`` are those of ``photos[i]``, in whose masks changes are made."""

    photos: tuple[Photo, ...]
    features: Features


def cache_key(photos: Sequence[Photo], encoder: str, seed: int, augmentation: Augmentation) -> str:
    """Names a cache: it changes with the photos, what is known of them, the encoder's name, seed and augmentation."""
    digest = hashlib.sha256(json.dumps([encoder, seed, asdict(augmentation)]).encode())
    for photo in photos:
        digest.update(json.dumps(record_of(photo), sort_keys=True).encode())
    return digest.hexdigest()[:16]


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
    unfinished = features_file.with_suffix(f".{os.getpid()}.part")
    draw_opened = lru_cache(maxsize=_OPENED_KEPT)(lambda index: opened(photos[index]))
    records: list[dict[str, Any]] = []
    stored: np.memmap[Any, Any] | None = None
    for index in tqdm(range(len(photos)), desc=f"Features, variant {number}", unit="photo"):
        sample = opened(photos[index])
        if number:
            sample = _changed(
                sample, draw_opened, len(photos), np.random.default_rng([seed, number, index]), augmentation
            )
        features_CGG = np.asarray(encode(sample.image), dtype=np.float16)
        if stored is None:
            shape = (len(photos), *features_CGG.shape)
            stored = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float16, shape=shape)
        stored[index] = features_CGG
        records.append(record_of(replace(sample.photo, file=photos[index].file)))
    assert stored is not None, "there are photos"
    stored.flush()
    lines = photos_file.with_suffix(f".{os.getpid()}.part")
    lines.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(unfinished, features_file)
    os.replace(lines, photos_file)


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

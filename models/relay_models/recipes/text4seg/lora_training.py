"""The recipe for LLaVA-1.5, Qwen2-VL and InternVL2: LoRA on the language model, and the projector, on cached features.

    photos → features (cached, changed copies too) ┐
    questions (drawn anew each time)               ┴→ packed sequences → loss on the answers → AdamW → adapter

The folder of a run holds
    adapter/         what it is all about, see `lora_adapter`; there once the run is done
    log.jsonl        one line a step: step, loss, rate, grad_norm, targets, tokens, seconds
    checkpoint.pt    weights, optimizer, step; a run that was killed goes on from it
    features/        the cache, see `features`

Promises: everything that is drawn for a step depends on (seed, step) alone, so a run that was killed and started again
gives, on a CPU, bit for bit the adapter of a run that was not; what a checkpoint was made with is checked before it is
gone on with; each file appears by a rename. Loss is the mean over all predicted tokens of a step.

Legend: T image tokens or patches, C channels.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from relay_models.errors import RelayModelsError
from relay_models.recipes.text4seg.augment import Augmentation
from relay_models.recipes.text4seg.dataset import Photo
from relay_models.recipes.text4seg.features import Variant, cache_key, make_variant, read_variants
from relay_models.recipes.text4seg.lora_adapter import SPARE_BYTES, write_adapter
from relay_models.recipes.text4seg.lora_sequences import PackedQuestions, packed
from relay_models.recipes.text4seg.lora_student import (
    LoraSizes,
    Student,
    check_peft,
    fetched,
    fingerprint,
    trained_config,
)
from relay_models.recipes.text4seg.questions import QuestionMix, questions_of
from relay_models.text4seg.families.family import Family
from relay_models.text4seg.families.registry import require_family
from relay_models.text4seg.profiles import Style

ADAPTER, LOG, CHECKPOINT, FEATURES = "adapter", "log.jsonl", "checkpoint.pt", "features"
PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}

# What may differ between the two halves of a run.
_FREE_OPTIONS = ("output", "device", "checkpoint_every", "checkpoints_activations")
_ORDER, _QUESTIONS, _DROPOUT = range(3)  # what a generator is for, beside the seed


@dataclass(frozen=True)
class LoraOptions:
    """How a run goes; the defaults are the paper's (arXiv 2410.09855 and its published scripts) for LLaVA-1.5.

    Attributes:
        model: folder or hub id of a LLaVA-1.5 (-hf), Qwen2-VL or InternVL (-hf).
        output: folder of the run.
        grid, style: of the answers and of the prompts; by default what is known of the model.
        sizes: of the LoRA.
        steps: of the optimizer.
        photos_per_step: gradients are accumulated over so many photos.
        questions_per_photo: at most.
        most_tokens: of one packed sequence; a photo whose questions take more has several.
        learning_rate, projector_rate: at their highest.
        warmup_share: of the steps, in which rates rise; then they fall along a cosine to nothing.
        weight_decay, max_grad_norm: as usual.
        variants: copies of the photos, the first as they are, the others changed by `augmentation`; each has features
            of its own in the cache. Epochs go through them in turn.
        augmentation: how copies are changed.
        mix: of the questions; its ``max_questions`` is `questions_per_photo`.
        precision: of what is frozen, and of the computation; what is trained is float32.
        device: "cpu", "cuda", "cuda:1", or "auto".
        checkpoints_activations: less memory, a third more time.
        checkpoint_every: steps.
        seed: of everything.
    """

    model: str
    output: Path
    grid: int | None = None
    style: Style | None = None
    sizes: LoraSizes = field(default_factory=LoraSizes)
    steps: int = 2000
    photos_per_step: int = 16
    questions_per_photo: int = 8
    most_tokens: int = 4096
    learning_rate: float = 2e-4
    projector_rate: float = 2e-5
    warmup_share: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    variants: int = 1
    augmentation: Augmentation = field(default_factory=Augmentation)
    mix: QuestionMix = field(default_factory=QuestionMix)
    precision: str = "bfloat16"
    device: str = "auto"
    checkpoints_activations: bool = False
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "photos_per_step", "questions_per_photo", "most_tokens", "variants", "checkpoint_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RelayModelsError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("learning_rate", "projector_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise RelayModelsError(f"{name} must be positive, got {value}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise RelayModelsError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.warmup_share < 1:
            raise RelayModelsError(f"warmup_share must be at least 0 and below 1, got {self.warmup_share}")
        if self.seed < 0:
            raise RelayModelsError(f"seed must not be negative, got {self.seed}")
        if self.precision not in PRECISIONS:
            raise RelayModelsError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    def rate_share(self, step: int) -> float:
        """Of the highest learning rate, in step 0, 1, ...: a rise that ends at 1, then a cosine that ends above 0."""
        warmup = round(self.steps * self.warmup_share)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup)))


Progress = Callable[[int, float], None]  # steps done, loss of the last


def train_lora(options: LoraOptions, photos: Sequence[Photo], progress: Progress | None = None) -> Path:
    """Train, going on from the checkpoint in ``options.output`` if there is one. Returns the adapter's folder.

    Args:
        options: of the run.
        photos: to learn from.
        progress: called after each step; a bar on stderr shows it anyway.

    Raises:
        RelayModelsError: an option, the model or the photos cannot be used, peft is absent, a checkpoint is of another
            run, the disk is full, or the loss or its gradient is no number any more. What was written before stays.
    """
    check_peft()
    if not photos:
        raise RelayModelsError("photos must not be empty")
    device = _device(options.device)
    folder = fetched(options.model)
    config = trained_config(folder, options.model, options.grid, options.style)
    _check_words(photos, require_family(config, options.model))
    student = Student.load(
        folder, config, options.sizes, dtype=PRECISIONS[options.precision], device=device, seed=options.seed
    )
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        model_name = fingerprint(folder)
        variants = _variants(options, student, photos, model_name)
        run = _Run(options, student, variants, _run_name(options, photos, model_name))
        run.go(progress)
    except OSError as error:
        raise RelayModelsError(f"cannot write the run in {options.output}: {error.strerror or error}") from error
    adapter = options.output / ADAPTER
    base = str(folder) if Path(options.model).is_dir() else options.model
    write_adapter(student.model, adapter, base, config)
    return adapter


# ---------------------------------------------------------------- the data


def _variants(options: LoraOptions, student: Student, photos: Sequence[Photo], model_name: str) -> list[Variant]:
    """The photos and their copies with the features of each, computed where they are not there yet."""
    encoder = f"{model_name} {options.precision} {student.family.image_side}"
    folder = options.output / FEATURES / cache_key(photos, encoder, options.seed, options.augmentation)
    image_folder = _image_folder(photos)
    made = read_variants(folder, image_folder)
    if len(made) < options.variants:
        num_bytes = student.stored_features(photos[0].open()).nbytes * len(photos)
        _check_disk(options, num_bytes * (options.variants - len(made)))
        for number in range(len(made), options.variants):
            make_variant(folder, number, photos, student.stored_features, options.seed, options.augmentation)
        made = read_variants(folder, image_folder)
    return made[: options.variants]


def _check_words(photos: Sequence[Photo], family: Family) -> None:
    """Before hours go by: what photos call things must be text for the model. Raises LabelError."""
    for photo in photos:
        for label in (*photo.labels, *photo.absent):
            family.check_text(f"the label {label!r} of {photo.file}", label)
        for expression in photo.expressions:
            family.check_text(f"the expression {expression.text!r} of {photo.file}", expression.text)


def _image_folder(photos: Sequence[Photo]) -> Path:
    folders = {photo.folder for photo in photos}
    if len(folders) > 1:
        listed = ", ".join(sorted(map(str, folders))[:3])
        raise RelayModelsError(f"photos must be of one folder, got {listed}: load them with their common folder")
    return folders.pop()


def _check_disk(options: LoraOptions, num_bytes: int) -> None:
    """Beforehand: the cache is a mapped file, and a full disk would end the process."""
    free = shutil.disk_usage(options.output).free
    if free < num_bytes + SPARE_BYTES:
        raise RelayModelsError(
            f"{options.output} has {free >> 20} MiB free, and the cached features take {num_bytes >> 20} MiB: free "
            "some, name another output, or use fewer photos or variants"
        )


def _run_name(options: LoraOptions, photos: Sequence[Photo], model_name: str) -> dict[str, Any]:
    """What a run is, as far as its result depends on it."""
    chosen = {item.name: getattr(options, item.name) for item in fields(options) if item.name not in _FREE_OPTIONS}
    for name in ("sizes", "augmentation", "mix"):
        chosen[name] = asdict(chosen[name])
    chosen["model"] = model_name
    chosen["photos"] = cache_key(photos, "", 0, options.augmentation)
    return json.loads(json.dumps(chosen, default=str))  # type: ignore[no-any-return]


# ---------------------------------------------------------------- the run


class _Run:
    def __init__(
        self, options: LoraOptions, student: Student, variants: Sequence[Variant], name: dict[str, Any]
    ) -> None:
        self.options, self.student, self.variants, self.name = options, student, variants, name
        self.mix = QuestionMix(**{**asdict(options.mix), "max_questions": options.questions_per_photo})
        self.trained = student.trained()
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [weight for name, weight in self.trained.items() if not student.is_of_projector(name)]},
                {"params": [weight for name, weight in self.trained.items() if student.is_of_projector(name)]},
            ],
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
        )
        self.log = options.output / LOG
        self.checkpoint = options.output / CHECKPOINT
        if options.checkpoints_activations:
            student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def go(self, progress: Progress | None) -> None:
        done = self._restore()
        if not done:
            self._check_questions()
        self.student.model.train()
        steps = self.options.steps
        with tqdm(total=steps, initial=done, desc="Training", unit="step") as bar:
            for step in range(done, steps):
                began = time.monotonic()
                figures = self._step(step)
                self._write_log({**figures, "seconds": round(time.monotonic() - began, 3)})
                if (step + 1) % self.options.checkpoint_every == 0 or step + 1 == steps:
                    self._save(step + 1)
                bar.set_postfix(loss=f"{figures['loss']:.4f}", refresh=False)
                bar.update()
                if progress:
                    progress(step + 1, figures["loss"])
        self.student.model.eval()

    def _step(self, step: int) -> dict[str, Any]:
        share = self.options.rate_share(step)
        for group, rate in zip(
            self.optimizer.param_groups, (self.options.learning_rate, self.options.projector_rate), strict=True
        ):
            group["lr"] = rate * share
        batch = [*self._batch(step)]
        num_targets = sum(len(sequence.target_A) for _, sequence in batch)
        loss = 0.0
        with self._dropout(step):
            for features_TC, sequence in batch:
                part = self.student.loss(sequence, self.student.projected(features_TC)) / max(num_targets, 1)
                part.backward()
                loss += part.item()
        self._check_finite("loss", loss, step)
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained.values(), self.options.max_grad_norm))
        self._check_finite("gradient", norm, step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "step": step + 1,
            "loss": loss,
            "rate": self.options.learning_rate * share,
            "grad_norm": norm,
            "targets": num_targets,
            "tokens": sum(len(sequence.ids_S) for _, sequence in batch),
        }

    def _check_finite(self, name: str, value: float, step: int) -> None:
        """Before the weights change, which nothing would bring back."""
        if not math.isfinite(value):
            raise RelayModelsError(
                f"the {name} of step {step + 1} is {value}: lower learning_rate ({self.options.learning_rate}); the "
                f"last checkpoint is {self.checkpoint}"
            )

    def _batch(self, step: int) -> Iterator[tuple[Any, PackedQuestions]]:
        """Features and questions of the photos of a step; one whose questions are too many comes several times."""
        count = len(self.variants[0].photos)
        for place in range(step * self.options.photos_per_step, (step + 1) * self.options.photos_per_step):
            epoch, index = divmod(place, count)
            variant = self.variants[epoch % len(self.variants)]
            photo = int(np.random.default_rng([self.options.seed, _ORDER, epoch]).permutation(count)[index])
            for sequence in self._sequences(variant.photos[photo], place):
                yield variant.features[photo], sequence

    def _sequences(self, photo: Photo, place: int) -> Iterator[PackedQuestions]:
        rng = np.random.default_rng([self.options.seed, _QUESTIONS, place])
        questions = questions_of(photo, self.student.family.grid, rng, self.mix)
        asked = [self.student.speaker.asked(question) for question in questions]
        return packed(asked, self.student.positions, most_tokens=self.options.most_tokens)

    def _check_questions(self) -> None:
        rng = np.random.default_rng(self.options.seed)
        grid = self.student.family.grid
        if not any(questions_of(photo, grid, rng, self.mix) for variant in self.variants for photo in variant.photos):
            raise RelayModelsError(
                f"photos give no question at all: none shows anything that is left on a grid of {grid} by {grid} cells"
            )

    @contextlib.contextmanager
    def _dropout(self, step: int) -> Iterator[None]:
        """A state of the generators that depends on the step, and leaves the caller's alone."""
        devices = [self.student.device] if self.student.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            drawn = np.random.default_rng([self.options.seed, _DROPOUT, step])
            torch.manual_seed(int(drawn.integers(1 << 63)))
            yield

    # ------------------------------------------------------------ files

    def _restore(self) -> int:
        """How many steps are done: those of the checkpoint, if there is one."""
        if not self.checkpoint.exists():
            self.log.unlink(missing_ok=True)
            return 0
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            step, name, weights = int(state["step"]), state["run"], state["trained"]
        except (RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise RelayModelsError(
                f"{self.checkpoint} cannot be read: {str(error).splitlines()[0]}: delete it to begin anew"
            ) from error
        different = [key for key in self.name if name.get(key) != self.name[key]]
        if different:
            key = different[0]
            raise RelayModelsError(
                f"{self.checkpoint} was made with {key} {name.get(key)!r}, and now it is {self.name[key]!r}: give what "
                "was given then, or name another output"
            )
        with torch.no_grad():
            for key, weight in self.trained.items():
                weight.copy_(weights[key])
        self.optimizer.load_state_dict(state["optimizer"])
        self._cut_log(step)
        return step

    def _save(self, step: int) -> None:
        state = {
            "step": step,
            "run": self.name,
            "trained": {key: weight.detach() for key, weight in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        unfinished = self.checkpoint.with_suffix(f".{os.getpid()}.part")
        try:
            with unfinished.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.checkpoint)
        except RuntimeError as error:  # torch's own words for a full disk
            raise OSError(f"{self.checkpoint}: {str(error).splitlines()[0]}") from error
        finally:
            unfinished.unlink(missing_ok=True)

    def _write_log(self, figures: dict[str, Any]) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def _cut_log(self, step: int) -> None:
        """Without the steps after the checkpoint, which are done again, and without a line that was cut off."""
        lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True) if self.log.exists() else []
        unfinished = self.log.with_suffix(f".{os.getpid()}.part")
        unfinished.write_text("".join(lines[:step]), encoding="utf-8")
        os.replace(unfinished, self.log)


def _device(name: str) -> torch.device:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    known = ["cpu", *(f"cuda:{index}" for index in range(num_gpus))]
    if name not in (*known, *(("cuda",) if num_gpus else ())):
        raise RelayModelsError(f"device must be auto or one that PyTorch has here ({', '.join(known)}), got {name!r}")
    return torch.device(name)

"""The projector's warm-up: it learns what each cell shows before the language model learns to read it.

    features (cached) → projector → class and shape of the object, cell by cell; which classes are there at all

It costs little: no language model takes part. Afterwards the tokens, which are made from that, already hold what a
picture shows. It is trained for a time, not for a number of steps, and goes on from its checkpoint.

Legend: T cells, K classes and one, N photos of a step.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from relay_models.errors import RelayModelsError
from relay_models.recipes.text4seg.cells import CellTargets, cell_targets
from relay_models.recipes.text4seg.features import Variant
from relay_models.recipes.text4seg.training import Model

logger = logging.getLogger(__name__)

_WARMUP_STEPS = 30
_RARE_EXPONENT = 0.5  # a class counts as (mean share / its share) to this power, between the two bounds
_CLASS_WEIGHTS = (0.5, 6.0)
_FEWEST_CELLS = 50
_PRESENCE_WEIGHT = 0.2


@dataclass(frozen=True)
class WarmupOptions:
    """How a warm-up goes.

    Attributes:
        minutes: over which the learning rate falls to nothing; 0 for no warm-up.
        photos: of a step.
        rate: the learning rate at its highest.
        weight_decay: of matrices.
        checkpoint_seconds: between checkpoints.
        seed: of what is drawn.
    """

    minutes: float = 20.0
    photos: int = 12
    rate: float = 1e-3
    weight_decay: float = 0.05
    checkpoint_seconds: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.minutes) and self.minutes >= 0):
            raise RelayModelsError(f"minutes must be finite and not negative, got {self.minutes}")
        for name in ("photos", "rate", "checkpoint_seconds"):
            if not getattr(self, name) > 0:
                raise RelayModelsError(f"{name} must be positive, got {getattr(self, name)}")


def warm_up(
    options: WarmupOptions, model: Model, variants: Sequence[Variant], weights_N: np.ndarray, checkpoint: Path
) -> None:
    """Train the projector until the time is over, going on from ``checkpoint`` if it is there.

    Args:
        options: see there.
        model: whose projector is trained; its language model takes no part.
        variants: of the photos, with features.
        weights_N: how often each photo is drawn; they sum to 1.
        checkpoint: a file; when the time is over it holds the result, and nothing is left to do.
    """
    grid = model.projector.sizes.grid
    device = model.projector.cell_TE.device
    targets = [[cell_targets(photo, grid, model.classes) for photo in variant.photos] for variant in variants]
    weights_K = class_weights(targets, len(model.classes) + 1).to(device)
    parameters = [*model.projector.requires_grad_(True).parameters(), *model.shape_head.parameters()]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    step, elapsed = _restore(checkpoint, model, optimizer)
    started, saved, total = time.monotonic() - elapsed, time.monotonic(), options.minutes * 60
    model.projector.train()
    with tqdm(total=int(total), initial=int(elapsed), unit="s", desc="Projector", mininterval=5) as bar:
        while (elapsed := time.monotonic() - started) < total:
            rng = np.random.default_rng([options.seed, step])
            torch.manual_seed(int(rng.integers(1 << 31)))
            rise = min(1.0, (step + 1) / _WARMUP_STEPS)
            for group in optimizer.param_groups:
                group["lr"] = options.rate * rise * 0.5 * (1 + math.cos(math.pi * elapsed / total))
            drawn = [
                (int(rng.integers(len(variants))), int(rng.choice(len(weights_N), p=weights_N)))
                for _ in range(options.photos)
            ]
            features = np.stack([variants[number].features[index] for number, index in drawn])
            with torch.autocast(device.type, torch.bfloat16):
                hidden_NTE = model.projector.hidden(torch.from_numpy(features).to(device).float())
                logits_NTK = model.projector.classify(hidden_NTE).float()
                shape_NT4 = model.shape_head(hidden_NTE).float()
            chosen = [targets[number][index] for number, index in drawn]
            loss = cell_losses(logits_NTK, shape_NT4, chosen, weights_K)
            loss = loss + _PRESENCE_WEIGHT * presence_loss(logits_NTK, chosen)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            bar.update(int(elapsed) - bar.n)
            bar.set_postfix(loss=round(loss.item(), 4), refresh=False)
            if time.monotonic() - saved > options.checkpoint_seconds:
                _save(checkpoint, model, optimizer, step, time.monotonic() - started)
                saved = time.monotonic()
    _save(checkpoint, model, optimizer, step, max(elapsed, total))
    logger.info("projector: %d steps", step)


def cell_losses(
    logits_NTK: Tensor,
    shape_NT4: Tensor,
    targets: Sequence[CellTargets],
    class_weights_K: Tensor | None = None,
) -> Tensor:
    """What the projector says of each cell against what is known: its class, and the shape of its object."""

    def stacked(arrays: Iterable[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(list(arrays))).to(logits_NTK.device)

    class_NT = stacked(target.class_T for target in targets)
    unnamed_NK = stacked(target.unnamed_K for target in targets)
    log_NTK = logits_NTK.log_softmax(-1)
    named_NT = log_NTK.gather(-1, class_NT[..., None])[..., 0]
    unnamed_NT = log_NTK.masked_fill(~unnamed_NK[:, None], float("-inf")).logsumexp(-1)
    weight_NT = torch.ones_like(named_NT) if class_weights_K is None else class_weights_K[class_NT]
    class_loss = -(torch.where(class_NT > 0, named_NT, unnamed_NT) * weight_NT).sum() / weight_NT.sum()
    truth_NT4 = stacked(target.shape_T4 for target in targets)
    is_object_NT = stacked(target.is_object_T for target in targets)
    distance_NT = (shape_NT4 - truth_NT4).abs().mean(-1)
    shape_loss = (distance_NT * is_object_NT).sum() / is_object_NT.sum().clamp(min=1)
    return class_loss + shape_loss


def presence_loss(logits_NTK: Tensor, targets: Sequence[CellTargets]) -> Tensor:
    """What the cell that shows a class most likely says, against whether the class is there at all: the mean over what
    is there, and the sum over what is surely absent, a photo. Cells alone teach that rare classes are never likely."""
    highest_NK = logits_NTK.log_softmax(-1).amax(1)
    device = logits_NTK.device
    is_there_NK = torch.from_numpy(np.stack([target.is_there_K for target in targets])).to(device)
    is_absent_NK = torch.from_numpy(np.stack([target.is_absent_K for target in targets])).to(device)
    missed = -(highest_NK * is_there_NK).sum() / is_there_NK.sum().clamp(min=1)
    claimed_NK = -torch.log1p(-highest_NK.exp().clamp(max=1 - 1e-4))
    return missed + (claimed_NK * is_absent_NK).sum() / len(targets)


def class_weights(targets: Sequence[Sequence[CellTargets]], num_classes: int) -> Tensor:
    """[K] how much a cell of each class counts: more where its class is rare. Class 0 counts once."""
    cells_K = np.zeros(num_classes)
    for target in (target for variant in targets for target in variant):
        cells_K += np.bincount(target.class_T, minlength=num_classes)
    shares_K = cells_K[1:].mean() / np.maximum(cells_K, _FEWEST_CELLS)
    weights_K = np.clip(shares_K**_RARE_EXPONENT, *_CLASS_WEIGHTS)
    weights_K[0] = 1.0
    return torch.from_numpy(weights_K).float()


def _save(file: Path, model: Model, optimizer: torch.optim.Optimizer, step: int, elapsed: float) -> None:
    state = {
        "step": step,
        "elapsed": elapsed,
        "classes": list(model.classes),
        "projector": model.projector.state_dict(),
        "shape_head": model.shape_head.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    unfinished = file.with_suffix(".part")
    torch.save(state, unfinished)
    os.replace(unfinished, file)


def _restore(file: Path, model: Model, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    if not file.exists():
        return 0, 0.0
    state = torch.load(file, map_location="cpu", weights_only=True)
    if tuple(state["classes"]) != model.classes:
        raise RelayModelsError(f"{file} was made with other classes: name another folder, or remove it")
    model.projector.load_state_dict(state["projector"])
    model.shape_head.load_state_dict(state["shape_head"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["elapsed"]

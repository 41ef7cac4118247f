"""Training of relay-seg-tiny: LoRA of the language model and the tokens of pictures, on a few CPU cores or a GPU.

    map of classes (photo, projector, or made up) → tokens    ┐
                                                              ├→ packed sequence → LoRA Llama → loss on the answers
    questions about the map, or about the photo (drawn anew)  ┘

The projector was trained before (`warmup`) and is frozen here, but for the vectors that its tokens are made of.
Asked for answers alone, the language model takes hours to find out that they are in the picture. So it is led:
at first only its lower third is computed (it costs a third), and told there which run of which row it is about to
write, which of the picture's tokens tells of it, for heads to look at, and what that says (`Guide`, `_Probe`). After
that it learns to answer, and goes on with the other between.

One process a core works on a picture of its own; gradients are averaged. On a GPU one process works on several, which
other processes make up. Every choice for sequence k of step s in process r is drawn from a generator seeded with (seed,
s, r, k), so that a run that was killed goes on from its last checkpoint with the same data. The learning rate follows
the time that is used, because it is the time that is limited.

Legend: S tokens of a sequence, A of them predicted, D the language model's width, V tokens of the vocabulary.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from relay_models.errors import CheckpointError, RelayModelsError
from relay_models.recipes.text4seg.augment import plural
from relay_models.recipes.text4seg.dataset import Photo
from relay_models.recipes.text4seg.features import Variant
from relay_models.recipes.text4seg.lora_layers import Guide, LoraLlama
from relay_models.recipes.text4seg.maps import Map, MapDrawer
from relay_models.recipes.text4seg.packing import Exchange, PackedSequence, Packer
from relay_models.recipes.text4seg.questions import Question, QuestionMix, questions_of, questions_of_map
from relay_models.relay_seg.assemble import ALPHA, TRAINING_KEY, read_trained, save_trained
from relay_models.relay_seg.configuration import IMAGE_TOKEN_ID
from relay_models.relay_seg.pins import BASE_SHA256, ENCODER_SHA256
from relay_models.relay_seg.projector import Projector, ProjectorSizes, Runs, row_runs

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
_PROJECTOR = "projector."
_OF_CLASSES = frozenset(f"{_PROJECTOR}{name}" for name in ("codebook_KD", "classify.weight", "classify.bias"))
# The first layer of SmolLM2 adds forty times what an embedding holds: tokens as large as that stay legible above it. It
# does not change what that layer itself computes, which is of normalised tokens.
TOKEN_SCALE = 20.0
# Of a typical embedding's length, which is the share of a run's class in its token: the shares of the rest.
ROW_SHARE = ORDER_SHARE = 0.7
COLUMN_SHARE = LENGTH_SHARE = 0.5
# Where the language model is told to look: heads are (key head, query head of its group).
GUIDED_LAYERS = (5, 6, 7, 8)
GUIDED_HEADS = ((0, 0), (1, 0), (2, 0))
GUIDED_WEIGHT = 1.3
PLACE_LAYER = 4  # by which a token knows its row, the order and column of its run, and what was asked for
READ_LAYER = 9  # by which it knows what the picture says of that run
MAX_ROUNDS = 3  # of questions about one photo
SHORTEST_QUESTION = 120  # tokens
ABOUT_PHOTOS = 0.2  # of sequences, how many ask about a photo in every way, not about a map
MOST_CLASSES, MOST_ABSENT = 5, 3  # of a map, asked for in a round of questions
COMMON_TOKENS = 2048  # of the vocabulary, whose tokens are sorted from common to rare: rivals of every target


@dataclass(frozen=True)
class TrainingOptions:
    """How a run goes.

    Attributes:
        minutes: of training.
        reading_share: of these, the first, in which only the layers up to `READ_LAYER` are computed: they learn to
            find their place in the picture and to read what it shows there.
        rank, alpha: of the LoRA.
        lora_rate, projector_rate: learning rates at their highest, of the LoRA and of what tokens are made of.
        tokens: of the questions and answers of one sequence, at most.
        whole_answers: of answers, how many are read to their end; the others end below the last row in which
            the map shows anything.
        guide_weight: of the losses that tell layers where in the picture a token is, beside the answers'.
        full_vocabulary_share: of predicted tokens, how many compete with the whole vocabulary; the others with
            the common tokens and those of the answers.
        readings_between: steps after those minutes in which it is still so, for each that computes all layers.
        warmup_steps: until the learning rate is at its highest.
        held_share: of the time, for how much of it the rate stays there before it falls along a cosine to nothing.
        max_grad_norm: of the gradient, of both groups each.
        checkpoint_seconds: between checkpoints.
        processes: one a core; 1 on a GPU.
        device: "cpu" or "cuda".
        sequences: of a step, in each process.
        workers: processes that make up the sequences of each process; 0 for none but itself.
        seed: of everything.
    """

    minutes: float = 88.0
    reading_share: float = 0.295
    rank: int = 24
    alpha: float = 48.0
    lora_rate: float = 1e-3
    projector_rate: float = 1e-2
    tokens: int = 900
    whole_answers: float = 0.2
    guide_weight: float = 0.25
    full_vocabulary_share: float = 0.1
    readings_between: int = 2
    warmup_steps: int = 10
    held_share: float = 0.3
    max_grad_norm: float = 1.0
    checkpoint_seconds: float = 240.0
    processes: int = 2
    device: str = "cpu"
    sequences: int = 1
    workers: int = 0
    seed: int = 0
    mix: QuestionMix = field(
        default_factory=lambda: QuestionMix(
            num_absent=2, instance_share=0.2, multi_class_share=0.15, everything_share=0.05
        )
    )

    def __post_init__(self) -> None:
        for name in ("minutes", "rank", "alpha", "lora_rate", "projector_rate", "tokens", "processes"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise RelayModelsError(f"{name} must be positive and finite, got {value}")
        if not 0 <= self.reading_share < 1:
            raise RelayModelsError(f"reading_share must be at least 0 and below 1, got {self.reading_share}")
        if self.sequences < 1 or self.workers < 0:
            raise RelayModelsError(
                f"sequences must be at least 1 and workers 0, got {self.sequences} and {self.workers}"
            )
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and self.processes > 1):
            raise RelayModelsError(
                f"device must be cpu, or cuda with one process, got {self.device!r} and processes {self.processes}"
            )
        if self.seed < 0:
            raise RelayModelsError(f"seed must not be negative, got {self.seed}")


@dataclass
class Model:
    """What is trained, and the classes its projector names."""

    projector: Projector
    shape_head: nn.Linear
    llama: LoraLlama
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Data:
    """Variants of the photos, and how often each photo is drawn."""

    variants: Sequence[Variant]
    weights: np.ndarray


def train(options: TrainingOptions, model: Model, data: Data, tokenizer: Any, folder: Path, rank: int = 0) -> None:
    """Train until the time is over, going on from ``folder``'s checkpoint if there is one.

    To be called in each of ``options.processes`` processes, with torch.distributed initialised where there are several.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trainer = _Trainer(options, model, data, tokenizer, rank)
    step, elapsed = trainer.restore(folder / CHECKPOINT)
    started, saved = time.monotonic() - elapsed, time.monotonic()
    total = options.minutes * 60
    bar = tqdm(total=int(total), initial=int(elapsed), unit="s", disable=rank != 0, mininterval=10)
    batches = trainer.batches(step)
    while (elapsed := trainer.agreed(time.monotonic() - started)) < total:
        figures = trainer.step(step, elapsed / total, next(batches))
        step += 1
        if rank == 0:
            bar.update(int(elapsed) - bar.n)
            bar.set_postfix(figures, refresh=False)
            if step % 10 == 0:
                logger.info("step %d at %d s: %s", step, elapsed, figures)
            if time.monotonic() - saved > options.checkpoint_seconds:
                trainer.save(folder / CHECKPOINT, step, time.monotonic() - started)
                saved = time.monotonic()
    if rank == 0:
        trainer.save(folder / CHECKPOINT, step, max(elapsed, total))
    bar.close()


class Drawn(NamedTuple):
    """A sequence made up for one step: its map [T], its tokens, and the seed of what is chosen of them."""

    class_T: Tensor  # noqa: N815
    packed: PackedSequence
    seed: int


class _Trainer:
    def __init__(self, options: TrainingOptions, model: Model, data: Data, tokenizer: Any, rank: int) -> None:
        self.options, self.model, self.data, self.rank = options, model, data, rank
        self.device = torch.device(options.device)
        self.packer = Packer(tokenizer, model.projector.sizes.grid**2)
        projector = model.projector.eval().requires_grad_(False)
        # What a projector sees does not change any more; the processes that make sequences up have no GPU.
        seeing = projector if self.device.type == "cpu" else copy.deepcopy(projector).cpu()
        for module in (projector, model.shape_head, model.llama):
            module.to(self.device)
        of_tokens = projector.of_tokens()
        for parameter in of_tokens:
            parameter.requires_grad_(True)
        self.groups = (list(model.llama.named_halves().values()), of_tokens)
        self.rates = (options.lora_rate, options.projector_rate)
        groups = [{"params": parameters} for parameters in self.groups]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.maps = MapDrawer(seeing, data.variants, data.weights, model.classes)
        self.mean: dict[str, float] = {}
        torch.manual_seed(options.seed)
        self.probe = _Probe(model.projector.sizes).to(self.device)
        self.probe_optimizer = torch.optim.Adam(self.probe.parameters(), lr=3e-3)
        self.topics = _Topics(model.classes)

    # ------------------------------------------------------------ data

    def batches(self, step: int) -> Iterator[list[Drawn]]:
        """The sequences of this step, of the next one, and so on without end."""
        numbers = range(step * self.options.sequences, sys.maxsize)
        if not self.options.workers:
            while True:
                yield [self[number] for number in numbers[: self.options.sequences]]
                numbers = numbers[self.options.sequences :]
        yield from DataLoader(
            self,  # type: ignore[arg-type]  # all that is asked of it is an item by its number
            batch_size=self.options.sequences,
            sampler=numbers,
            num_workers=self.options.workers,
            collate_fn=list,
            prefetch_factor=4,
            multiprocessing_context="fork",
            worker_init_fn=_work_alone,
        )

    def __getitem__(self, number: int) -> Drawn:
        """Sequence ``number % sequences`` of step ``number // sequences``."""
        step, index = divmod(number, self.options.sequences)
        rng = np.random.default_rng([self.options.seed, step, self.rank, index])
        map_GG, exchanges = self.sequence(rng)
        return Drawn(torch.from_numpy(map_GG).flatten(), self.packer.pack(exchanges), int(rng.integers(1 << 31)))

    def sequence(self, rng: np.random.Generator) -> tuple[Map, list[Exchange]]:
        """A map, and questions about it, or about the photo it is of, until the sequence is full.

        Questions are asked again, in other words, where there are few: the processes wait for one another, so their
        sequences have to be about equally long.
        """
        while True:
            photo, map_GG = self._drawn(rng)
            exchanges: list[Exchange] = []
            room = self.options.tokens
            for _ in range(MAX_ROUNDS):
                for question in self._questions(photo, map_GG, rng):
                    exchange = self._exchange(question, map_GG, rng)
                    if len(exchange.ids) <= room:
                        exchanges.append(exchange)
                        room -= len(exchange.ids)
                if room < SHORTEST_QUESTION:
                    break
            if exchanges:
                return map_GG, exchanges

    def _drawn(self, rng: np.random.Generator) -> tuple[Photo | None, Map]:
        if rng.random() >= ABOUT_PHOTOS:
            return None, self.maps.draw(rng)
        index = int(rng.choice(len(self.data.weights), p=self.data.weights))
        number = int(rng.integers(len(self.data.variants)))
        return self.data.variants[number].photos[index], self.maps.true(number, index)

    def _questions(self, photo: Photo | None, map_GG: Map, rng: np.random.Generator) -> list[Question]:
        if photo is not None:
            return questions_of(photo, self.model.projector.sizes.grid, rng, self.options.mix)
        # Drawn as most classes of maps are: else a name alone would tell that it is asked for in vain.
        absent = [self.maps.any_class(rng) for _ in range(rng.integers(1, MOST_ABSENT + 1))]
        found = questions_of_map(map_GG, self.model.classes, absent, rng, self.options.mix)
        return found[: MOST_CLASSES + MOST_ABSENT]

    def _exchange(self, question: Question, map_GG: Map, rng: np.random.Generator) -> Exchange:
        """Mostly without most of the rows below the last in which the map shows anything: each is a copy of the one
        above it. A row that shows something else than what was asked for is where reading goes wrong."""
        topic = self.topics.of(question.labels[1]) if len(question.labels) == 2 else -1
        if ((map_GG == topic + 1) != (question.cells_GG > 0)).any():  # one of several, or partly behind something else
            topic = -1
        exchange = self.packer.exchange(question, topic).distracted((map_GG > 0) & (question.cells_GG == 0))
        if rng.random() < self.options.whole_answers:
            return exchange
        rows = np.flatnonzero(map_GG.any(axis=1))
        last = (int(rows[-1]) if len(rows) else -1) + int(rng.integers(1, 4))
        return exchange if last >= len(question.cells_GG) - 1 else self.packer.cut_after_row(exchange, last)

    # ------------------------------------------------------------ a step

    def step(self, step: int, time_used: float, drawn: Sequence[Drawn] | None = None) -> dict[str, float]:
        """One step, with the sequences of `batches`, which are made up here if they are not given."""
        drawn = next(self.batches(step)) if drawn is None else drawn
        torch.manual_seed(drawn[0].seed)
        self.optimizer.zero_grad(set_to_none=False)
        self.model.llama.merge()
        between = step % (self.options.readings_between + 1) > 0
        is_reading = between or time_used < self.options.reading_share
        figures = self._sequences_step(drawn, is_reading)
        self._average_gradients()
        rise = min(1.0, (step + 1) / self.options.warmup_steps)
        fall = max(0.0, time_used - self.options.held_share) / (1 - self.options.held_share)
        shape = rise * 0.5 * (1 + math.cos(math.pi * min(fall, 1.0)))
        for group, rate, parameters in zip(self.optimizer.param_groups, self.rates, self.groups, strict=True):
            group["lr"] = rate * shape
            norm = float(nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm))
            if not math.isfinite(norm):  # before the weights change, which nothing would bring back
                raise RelayModelsError(
                    f"the gradient of step {step + 1} is {norm}: lower the learning rate, {self.options.lora_rate}; "
                    "the last checkpoint stays"
                )
        self.optimizer.step()
        self.probe_optimizer.step()
        self.probe_optimizer.zero_grad()
        for name, value in figures.items():
            if not math.isfinite(self.mean.get(name, 0.0)):
                self.mean[name] = value
            self.mean[name] = 0.95 * self.mean.get(name, value) + 0.05 * value
        return {name: round(value, 4) for name, value in self.mean.items()}

    def _sequences_step(self, drawn: Sequence[Drawn], is_reading: bool) -> dict[str, float]:
        """Adds the mean of their gradients; the figures are those of the last."""
        figures: dict[str, float] = {}
        for sequence in drawn:
            packed = sequence.packed.to(self.device)
            rng = np.random.default_rng(sequence.seed)
            loss, figures = self._answer_loss(packed, sequence.class_T.to(self.device), rng, is_reading=is_reading)
            (loss / len(drawn)).backward()
            figures |= {"loss": loss.item(), "tokens": float(len(packed.ids_S))}
        return figures

    def _answer_loss(
        self, packed: PackedSequence, class_T: Tensor, rng: np.random.Generator, *, is_reading: bool
    ) -> tuple[Tensor, dict[str, float]]:
        llama, projector = self.model.llama, self.model.projector
        (tokens_TD,) = projector.tokens(class_T[None])
        embeddings_SD = F.embedding(packed.ids_S, llama.embeddings)
        is_image_S = packed.ids_S == IMAGE_TOKEN_ID
        embeddings_SD = embeddings_SD.masked_scatter(is_image_S[:, None], tokens_TD.to(embeddings_SD.dtype))
        guide = self._guide(packed, row_runs(class_T[None], projector.sizes.grid), is_reading)
        hidden_SD, shares, probed = llama.guided(embeddings_SD, packed.layout, guide)
        if is_reading:
            return self._guided_loss(packed, shares, probed)
        hidden_AD = hidden_SD[packed.source_A]
        weight_A = packed.weight_A / packed.weight_A.sum()
        chosen_A = torch.from_numpy(rng.random(len(hidden_AD)) < self.options.full_vocabulary_share).to(self.device)
        loss, figures = self._guided_loss(packed, shares, probed)
        loss = self.options.guide_weight * loss
        if chosen_A.any():
            logits = F.linear(hidden_AD[chosen_A], llama.embeddings).float()
            nll_A = F.cross_entropy(logits, packed.target_A[chosen_A], reduction="none")
            loss = loss + (nll_A * weight_A[chosen_A]).sum()
        if not chosen_A.all():
            kept_V = torch.unique(torch.cat((torch.arange(COMMON_TOKENS, device=self.device), packed.target_A)))
            logits = F.linear(hidden_AD[~chosen_A], llama.embeddings[kept_V]).float()
            target = torch.searchsorted(kept_V, packed.target_A[~chosen_A])
            nll_A = F.cross_entropy(logits, target, reduction="none")
            loss = loss + (nll_A * weight_A[~chosen_A]).sum()
            counted = weight_A[~chosen_A] >= weight_A.max() * 0.99  # the places where rows change
            if counted.any():
                figures["accuracy"] = (logits.argmax(-1) == target)[counted].float().mean().item()
            is_known = packed.weight_A[~chosen_A] >= 1
            figures["answers"] = nll_A[is_known].mean().item()
        return loss, figures

    def _guide(self, packed: PackedSequence, runs: Runs, is_reading: bool) -> Guide:
        """To the token that tells of the run that a token is part of. Where the row shows nothing of what was asked
        for, that is the one of its gap from end to end. Tokens of other questions are led nowhere."""
        is_run_A = packed.start_A >= 0
        row_M1 = (packed.start_A[is_run_A] // self.model.projector.sizes.grid)[:, None]
        order_M1, topic_M1 = packed.order_A[is_run_A][:, None], packed.topic_A[is_run_A][:, None]
        is_of_row_MT = runs.is_used_NT & (runs.row_NT == row_M1)
        wanted_MT = is_of_row_MT & (runs.class_NT == topic_M1 + 1) & (runs.order_NT == order_M1) & (topic_M1 >= 0)
        gap_MT = is_of_row_MT & (runs.class_NT == 0) & (topic_M1 >= 0)
        wanted_MT = torch.where(wanted_MT.any(1, keepdim=True), wanted_MT, gap_MT)
        first = len(self.packer.text_prefix)
        wanted_MP = F.pad(wanted_MT, (first, packed.layout.prefix - first - wanted_MT.shape[1]))
        wanted = (wanted_MP,) * len(GUIDED_HEADS)
        stop = READ_LAYER if is_reading else None
        return Guide(packed.source_A[is_run_A], wanted, GUIDED_LAYERS, GUIDED_HEADS, (PLACE_LAYER, READ_LAYER), stop)

    def _guided_loss(
        self, packed: PackedSequence, shares: Tensor, probed: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Heads look where the guide says; the layers below them know which run it is; those above, what it is."""
        is_run_A = packed.start_A >= 0
        grid = self.model.projector.sizes.grid
        weight_M = packed.weight_A[is_run_A]
        cell_M, length_M, order_M, topic_M, is_asked_M = (
            x[is_run_A] for x in (packed.start_A, packed.length_A, packed.order_A, packed.topic_A, packed.is_asked_A)
        )
        is_led_M = weight_M * (topic_M >= 0)
        seen_LMH = -shares.float().clamp(min=1e-12).log() * is_led_M[:, None]
        seen_H = seen_LMH.sum(1).mean(0) / is_led_M.sum().clamp(min=1)
        place = self.probe.place(probed[0]).split((grid, grid, grid, len(self.model.classes)), -1)
        read = self.probe.read(probed[1]).split((grid, 2), -1)
        asked = {
            "row": (place[0], cell_M // grid, weight_M, 1.0),
            "column": (place[1], cell_M % grid, weight_M, 0.2),
            "order": (place[2], order_M, weight_M, 0.6),
            "topic": (place[3], topic_M, is_led_M, 1.0),
            "length": (read[0], length_M - 1, weight_M * (length_M > 0), 2.0),
            "object": (read[1], is_asked_M.long(), weight_M * (length_M > 0), 1.0),
        }
        loss = GUIDED_WEIGHT * seen_H.mean()
        figures = {f"seen {index}": value for index, value in enumerate(seen_H.tolist())}
        for name, (logits, target, weight, share) in asked.items():
            target = target.clamp(min=0)
            nll = F.cross_entropy(logits, target, reduction="none")
            loss = loss + share * (nll * weight).sum() / weight.sum().clamp(min=1)
            is_right = (logits.argmax(-1) == target).float()
            figures[name] = ((is_right * weight).sum() / weight.sum().clamp(min=1)).item()
        return loss, figures

    def _average_gradients(self) -> None:
        if not dist.is_initialized():
            return
        parameters = [*(parameter for group in self.groups for parameter in group), *self.probe.parameters()]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(piece.view_as(parameter))

    def agreed(self, seconds: float) -> float:
        """The seconds of process 0: all end at the same step."""
        if not dist.is_initialized():
            return seconds
        value = torch.tensor([seconds], dtype=torch.float64)
        dist.broadcast(value, 0)
        return float(value)

    # ------------------------------------------------------------ checkpoints

    def save(self, file: Path, step: int, elapsed: float) -> None:
        state = {
            "step": step,
            "elapsed": elapsed,
            "options": json.dumps(asdict(self.options)),
            "classes": list(self.model.classes),
            "projector": self.model.projector.state_dict(),
            "decision": {
                "projector_present_above": self.model.projector.sizes.present_above,
                "projector_named_above": self.model.projector.sizes.named_above,
            },
            "shape_head": self.model.shape_head.state_dict(),
            "halves": {name: half.detach() for name, half in self.model.llama.named_halves().items()},
            "optimizer": self.optimizer.state_dict(),
            "probe": self.probe.state_dict(),
            "probe_optimizer": self.probe_optimizer.state_dict(),
            "mean": self.mean,
        }
        unfinished = file.with_suffix(".part")
        torch.save(state, unfinished)
        os.replace(unfinished, file)

    def restore(self, file: Path) -> tuple[int, float]:
        """Step and seconds of the checkpoint, 0 and 0.0 without one."""
        if not file.exists():
            return 0, 0.0
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["classes"] != list(self.model.classes):
            raise CheckpointError(f"{file} was made with other classes: name another folder, or remove it")
        made = json.loads(state["options"])
        for name in ("rank", "alpha"):
            if made[name] != getattr(self.options, name):
                now = getattr(self.options, name)
                raise CheckpointError(f"{file} was made with {name} {made[name]}, and now it is {now}")
        self.model.projector.load_state_dict(state["projector"])
        self.model.shape_head.load_state_dict(state["shape_head"])
        with torch.no_grad():
            for name, half in self.model.llama.named_halves().items():
                half.copy_(state["halves"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.probe.load_state_dict(state["probe"])
        self.probe_optimizer.load_state_dict(state["probe_optimizer"])
        self.mean = state["mean"]
        return state["step"], state["elapsed"]


class _Probe(nn.Module):
    """Reads off hidden states what they should hold; of use while training only."""

    def __init__(self, sizes: ProjectorSizes) -> None:
        super().__init__()
        self.width = sizes.out_width
        self.places = nn.Linear(sizes.out_width, 3 * sizes.grid + sizes.num_classes)
        self.reads = nn.Linear(sizes.out_width, sizes.grid + 2)

    def place(self, hidden_MD: Tensor) -> Tensor:
        """Row, column and order of the run, and the class that was asked for, [M, G + G + G + classes]."""
        return self.places(F.rms_norm(hidden_MD.float(), (self.width,)))

    def read(self, hidden_MD: Tensor) -> Tensor:
        """Length of the run, and whether it is of what was asked for, [M, G + 2]."""
        return self.reads(F.rms_norm(hidden_MD.float(), (self.width,)))


class _Topics:
    """Which class an expression is about: the one whose name, or plural, it holds; the longest if several do."""

    def __init__(self, classes: Sequence[str]) -> None:
        names = [(number, called) for number, name in enumerate(classes) for called in (name, plural(name))]
        self._classes = sorted(names, key=lambda pair: -len(pair[1]))
        self._known: dict[str, int] = {}

    def of(self, text: str) -> int:
        if text not in self._known:
            found = (number for number, name in self._classes if re.search(rf"\b{re.escape(name)}\b", text))
            self._known[text] = next(found, -1)
        return self._known[text]


def _work_alone(number: int) -> None:
    torch.set_num_threads(1)


def new_model(
    config: Any, tensors: dict[str, Tensor], tokenizer: Any, classes: Sequence[str], options: TrainingOptions
) -> Model:
    """The untrained model over the base's config and tensors: a codebook that begins as the classes' names."""
    torch.manual_seed(options.seed)
    sizes = ProjectorSizes(num_classes=len(classes), out_width=config.hidden_size)
    projector = Projector(sizes, dropout=0.1)
    embeddings = tensors["model.embed_tokens.weight"].float()
    typical = embeddings.norm(dim=1).median() * TOKEN_SCALE

    def directions(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, sizes.out_width), dim=-1) * typical

    with torch.no_grad():
        names = [embeddings[tokenizer(f" {name}")["input_ids"]].mean(0) for name in ("others", *classes)]
        names_KD = torch.stack(names)
        # Without what all words have in common, and turned until they are at right angles, each as little as possible
        # (Schönemann 1966): so that one is told from another, be they cats and dogs.
        turned = torch.linalg.svd(F.normalize(names_KD - names_KD.mean(0), dim=1), full_matrices=False)
        projector.codebook_KD.copy_(turned.U @ turned.Vh * typical)
        # A direction a row, a column, a length, a number, so that each can be looked up from the start.
        projector.rows_GD.copy_(directions(sizes.grid) * ROW_SHARE)
        projector.columns_GD.copy_(directions(sizes.grid) * COLUMN_SHARE)
        projector.lengths_GD.copy_(directions(sizes.grid) * LENGTH_SHARE)
        projector.orders_GD.copy_(directions(sizes.grid) * ORDER_SHARE)
        projector.gap_D.copy_(directions(1)[0] * LENGTH_SHARE)
        projector.unused_D.copy_(directions(1)[0])
    # Where a core has no tiles (AMX) for it, PyTorch multiplies bfloat16 slower than float32.
    is_fast = options.device == "cuda" or torch.cpu._is_amx_tile_supported()
    dtype = torch.bfloat16 if is_fast else torch.float32
    llama = LoraLlama(config, tensors, rank=options.rank, alpha=options.alpha, seed=options.seed, dtype=dtype)
    return Model(projector, nn.Linear(sizes.width, 4), llama, tuple(classes))


def check_trained(file: Path, options: TrainingOptions) -> tuple[str, ...]:
    """The classes of what `export` wrote.

    Raises CheckpointError where ``file`` is something else, or the LoRA in it has another rank or alpha.
    """
    from safetensors import safe_open

    settings, tensors = read_trained(file)
    with safe_open(file, framework="pt") as stored:
        classes = json.loads((stored.metadata() or {}).get(TRAINING_KEY, "{}")).get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{file} does not say of which classes it is: classes is {classes!r}")
    if settings[ALPHA] != options.alpha:
        raise CheckpointError(f"{ALPHA} of {file} is {settings[ALPHA]}, expected {options.alpha}")
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight") and len(tensor) != options.rank:
            raise CheckpointError(f"{name} in {file} has rank {len(tensor)}, expected {options.rank}")
    return tuple(classes)


def load_trained(model: Model, file: Path, options: TrainingOptions, *, sees_anew: bool = False) -> None:
    """Put what a run trained (`export`) into ``model``, so that training goes on from there, with these or other
    classes.

    How maps are read, which is the LoRA and what tokens are made of, is the same skill whatever they show; how cells
    are seen is taken over as well, unless ``sees_anew``. Classes are matched by their names. Of one that the file does
    not know, the vector stays as `new_model` made it, turned until it is at right angles to those of the file; how it
    is seen is still to be trained. The head for the shapes of objects, which is not in the file, stays as it is.

    Raises:
        CheckpointError: as `check_trained`, or a tensor is missing, of no use, or of another shape.
    """
    known = ("", *check_trained(file, options))  # 0: whatever has no name
    _, tensors = read_trained(file)
    targets = {f"{_PROJECTOR}{name}": tensor for name, tensor in model.projector.state_dict().items()}
    targets |= model.llama.named_halves()
    for name in sorted(targets.keys() ^ tensors.keys()):
        raise CheckpointError(f"{name} is {'missing from' if name in targets else 'of no use here, but in'} {file}")
    rows = [(row, known.index(name)) for row, name in enumerate(("", *model.classes)) if name in known]
    ours, theirs = (list(places) for places in zip(*rows, strict=True))
    of_tokens = {id(parameter) for parameter in model.projector.of_tokens()}
    reading = {f"{_PROJECTOR}{name}" for name, tensor in model.projector.named_parameters() if id(tensor) in of_tokens}
    with torch.no_grad():
        for name, target in targets.items():
            tensor, is_of_classes = tensors[name], name in _OF_CLASSES
            expected = [len(known), *target.shape[1:]] if is_of_classes else list(target.shape)
            if list(tensor.shape) != expected:
                raise CheckpointError(f"{name} in {file} has shape {list(tensor.shape)}, expected {expected}")
            if sees_anew and name.startswith(_PROJECTOR) and name not in reading:
                continue
            if is_of_classes:
                target[ours] = tensor[theirs].to(target.dtype)
            else:
                target.copy_(tensor)
        is_new_K = torch.ones(len(model.classes) + 1, dtype=torch.bool)
        is_new_K[ours] = False
        codebook_KD = model.projector.codebook_KD
        taken_KD = tensors[f"{_PROJECTOR}codebook_KD"].float()
        codebook_KD[is_new_K] = _apart_from(taken_KD, codebook_KD[is_new_K])


def _apart_from(taken_KD: Tensor, new_MD: Tensor) -> Tensor:
    """``new_MD`` without what is in the span of ``taken_KD``, each as long as before."""
    basis_KD = torch.linalg.qr(taken_KD.T).Q.T
    if len(basis_KD) == taken_KD.shape[1]:
        return new_MD  # all of the space is taken
    rest_MD = new_MD - new_MD @ basis_KD.T @ basis_KD
    return F.normalize(rest_MD, dim=1) * new_MD.norm(dim=1, keepdim=True)


def export(checkpoint: Path, target: Path) -> None:
    """Write what a checkpoint holds as the small file that `relay_seg.assemble` takes, in bfloat16, by a rename.

    The metadata names the base and the encoder it belongs to, the options, steps, seconds and classes of the run.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    options = json.loads(state["options"])
    tensors = {f"{_PROJECTOR}{name}": tensor for name, tensor in state["projector"].items()} | state["halves"]
    training = {
        "base_sha256": BASE_SHA256,
        "encoder_sha256": ENCODER_SHA256,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "steps": state["step"],
        "seconds": round(state["elapsed"]),
        "options": options,
        "classes": state["classes"],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".part")
    save_trained(
        unfinished,
        tensors,
        lora_alpha=options["alpha"],
        training=training,
        projector_classes=len(state["classes"]),
        **state["decision"],
    )
    os.replace(unfinished, target)

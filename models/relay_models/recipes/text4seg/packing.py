"""Questions about one picture as one packed sequence of tokens, and how much each token of the answers counts.

Legend: S tokens of the sequence, A of them predicted, G cells a side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from relay_models.recipes.text4seg.lora_layers import PackedLayout
from relay_models.recipes.text4seg.questions import Question, ignored_spans
from relay_models.relay_seg.configuration import IMAGE_TOKEN_ID
from relay_models.text4seg.codec import BACKGROUND, OPEN_TAG
from relay_models.text4seg.families.relay_seg import CONVERSATION, IMAGE_TOKEN
from relay_models.text4seg.row_marks import mark_tokens

PREAMBLE_WEIGHT = 0.1  # of a token of the preamble, which the question settles
KNOWN_WEIGHT = 0.3  # of what a row shares with the row before it, from its start: copying says it
CHANGE_WEIGHT = 3.0  # of the place where it first differs: only the picture says it
DISTRACTED_WEIGHT = 1.2  # of a row like the one before it, where the picture shows something that was not asked for
MARK_WEIGHT = 0.5  # of a piece of a word that tells its row
END_OF_TURN = "<|im_end|>"

# First cell, length, how many runs the row has before it; of the separator or line break after a run its last cell, 0,
# and the run's order.
Run = tuple[int, int, int]
_NO_RUN = (-1, 0, 0)
_Told = tuple[int, float, Run]  # token, weight, run


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """Attributes:
    ids_S: tokens; those of the picture are `IMAGE_TOKEN_ID`.
    layout: which of them are the prefix, and which each question.
    source_A: where the tokens stand that predict the answers' tokens.
    target_A: what they are to predict.
    weight_A: how much that counts.
    start_A: the first cell of the run that the token is part of, in reading order; -1 for tokens outside of a
        descriptor. What separates runs is of the last cell before it.
    length_A: cells of that run; 0 for what separates runs and for tokens outside of a descriptor.
    order_A: how many runs its row has before it.
    is_asked_A: whether that cell shows what was asked for.
    topic_A: what was asked for, as `Exchange.topic`.
    """

    ids_S: Tensor  # noqa: N815
    layout: PackedLayout
    source_A: Tensor  # noqa: N815
    target_A: Tensor  # noqa: N815
    weight_A: Tensor  # noqa: N815
    start_A: Tensor  # noqa: N815
    length_A: Tensor  # noqa: N815
    order_A: Tensor  # noqa: N815
    is_asked_A: Tensor  # noqa: N815
    topic_A: Tensor  # noqa: N815

    def to(self, device: torch.device) -> PackedSequence:
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "layout"}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Exchange:
    """Tokens of one question with its answer.

    Attributes:
        ids: the tokens.
        weights: of each as a target; 0 for the question's.
        runs: the run that each is part of.
        is_asked_GG: where the picture shows what was asked for.
        topic: the number of the class all of which was asked for, as the picture shows it; -1 where it is another
            question.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    runs: tuple[Run, ...]
    is_asked_GG: npt.NDArray[np.bool_]  # noqa: N815
    topic: int

    def distracted(self, other_GG: npt.NDArray[np.bool_]) -> Exchange:
        """With more weight on rows where the picture shows something else than what was asked for: reading goes wrong
        there, and such a row is often like the one before it, which alone would count little."""
        rows = set(np.flatnonzero(other_GG.any(axis=1)))
        weights = [
            DISTRACTED_WEIGHT if 0 < weight < 1 and cell >= 0 and cell // len(other_GG) in rows else weight
            for weight, (cell, *_) in zip(self.weights, self.runs, strict=True)
        ]
        return replace(self, weights=tuple(weights))

    def cut(self, most: int) -> Exchange:
        return replace(self, ids=self.ids[:most], weights=self.weights[:most], runs=self.runs[:most])


class Packer:
    """Turns questions into tokens as the server's prompts are."""

    def __init__(self, tokenizer: Any, num_image_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.grid = math.isqrt(num_image_tokens)
        (self.line_break,) = self._ids("\n")
        (self.background,) = self._ids(f" {BACKGROUND}")
        self.marks = mark_tokens(tokenizer.get_vocab())
        opening = CONVERSATION.prompt("").partition(IMAGE_TOKEN)[0]
        self.text_prefix = self._ids(opening)
        after = CONVERSATION.image.partition(IMAGE_TOKEN)[2]
        self.image_prefix = [*self.text_prefix, *[IMAGE_TOKEN_ID] * num_image_tokens, *self._ids(after)]

    def exchange(self, question: Question, topic: int = -1) -> Exchange:
        """The tokens of a question about a picture, which asks for all of the class of number ``topic``."""
        asked = self._ids(question.prompt + CONVERSATION.user_close + CONVERSATION.assistant_open)
        encoded = self.tokenizer(question.answer, return_offsets_mapping=True, add_special_tokens=False)
        weight_of = _character_weights(question)
        weights = [_token_weight(weight_of[start:end]) for start, end in encoded["offset_mapping"]]
        run_of = _character_runs(question)
        runs = [run_of[end - 1] for _, end in encoded["offset_mapping"]]
        answer = list(self._marked(zip(encoded["input_ids"], weights, runs, strict=True)))
        end = self._ids(END_OF_TURN)
        return Exchange(
            (*asked, *(token for token, _, _ in answer), *end),
            (*[0.0] * len(asked), *(weight for _, weight, _ in answer), *[1.0] * len(end)),
            (*[_NO_RUN] * len(asked), *(run for _, _, run in answer), *[_NO_RUN] * len(end)),
            question.cells_GG > 0,
            topic,
        )

    def _marked(self, answer: Iterable[_Told]) -> Iterator[_Told]:
        """The answer's tokens, with the row told by how ` others` is cut, see `row_marks`."""
        for token, weight, run in answer:
            row = run[0] // self.grid
            if token == self.background and 0 < row <= len(self.marks):
                for piece in self.marks[row - 1]:
                    yield piece, max(weight, MARK_WEIGHT) if weight else weight, run
            else:
                yield token, weight, run

    def cut_after_row(self, exchange: Exchange, row: int) -> Exchange:
        """The beginning of an exchange about a picture, up to the end of a row of its descriptor, from 0."""
        answer = next(place for place, weight in enumerate(exchange.weights) if weight > 0)
        (line_break,) = self._ids("\n")
        ends = [place for place, token in enumerate(exchange.ids) if token == line_break and place >= answer]
        return exchange.cut(ends[1 + row] + 1)  # the first ends the preamble

    def pack(self, exchanges: Sequence[Exchange]) -> PackedSequence:
        prefix = self.image_prefix
        ids = [*prefix, *(token for exchange in exchanges for token in exchange.ids)]
        source: list[int] = []
        target: list[int] = []
        weight: list[float] = []
        runs: list[Run] = []
        asked: list[bool] = []
        topics: list[int] = []
        start = len(prefix)
        for exchange in exchanges:
            is_asked_T = exchange.is_asked_GG.reshape(-1)
            for place, (token, counts) in enumerate(zip(exchange.ids, exchange.weights, strict=True)):
                if counts > 0:
                    source.append(start + place - 1)
                    target.append(token)
                    weight.append(counts)
                    runs.append(exchange.runs[place])
                    asked.append(bool(is_asked_T[exchange.runs[place][0]]))
                    topics.append(exchange.topic)
            start += len(exchange.ids)
        layout = PackedLayout(
            len(prefix), tuple(len(exchange.ids) for exchange in exchanges), unchanged=len(self.text_prefix)
        )
        start_A, length_A, order_A = torch.tensor(runs).unbind(1)
        return PackedSequence(
            torch.tensor(ids),
            layout,
            torch.tensor(source),
            torch.tensor(target),
            torch.tensor(weight),
            start_A,
            length_A,
            order_A,
            torch.tensor(asked),
            torch.tensor(topics),
        )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids


def _character_weights(question: Question) -> npt.NDArray[np.float64]:
    """How much each character of the answer counts; 0 where the truth is unknown."""
    answer = question.answer
    weights = np.ones(len(answer))
    body = answer.index(OPEN_TAG)
    weights[:body] = PREAMBLE_WEIGHT
    start = body + len(OPEN_TAG)
    previous = f" {question.labels[0]} *{len(question.cells_GG)}\n"
    while (end := answer.find("\n", start)) >= 0:
        row = answer[start : end + 1]
        lead = "" if row.startswith(" ") else " "  # the first row has none
        shared = _num_shared(lead + row, previous) - len(lead)
        weights[start : start + shared] = KNOWN_WEIGHT
        weights[start + shared : min(start + shared, end) + 1] = CHANGE_WEIGHT
        if shared == len(row):
            weights[end] = KNOWN_WEIGHT
        previous, start = lead + row, end + 1
    for first, last in ignored_spans(question):
        weights[first:last] = 0
    return weights


def _character_runs(question: Question) -> list[Run]:
    """For each character of the answer its run."""
    runs = [_NO_RUN] * (question.answer.index(OPEN_TAG) + len(OPEN_TAG))
    grid = len(question.cells_GG)
    for row, cells_G in enumerate(question.cells_GG.tolist()):
        column = 0
        for order, (index, run) in enumerate(groupby(cells_G)):
            length = len(list(run))
            lead = " " if row or column else ""
            runs += [(row * grid + column, length, order)] * len(f"{lead}{question.labels[index]} *{length}")
            column += length
            runs.append((row * grid + column - 1, 0, order))  # the separator or the line break
    return runs + [_NO_RUN] * (len(question.answer) - len(runs))


def _num_shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


def _token_weight(weights: npt.NDArray[np.float64]) -> float:
    """Of a token with these characters: unknown if one of them is, else as the one that counts most."""
    return float(weights.max() if weights.min() > 0 else 0.0)

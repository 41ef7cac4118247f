"""Questions about one picture as token sequences for a Hugging Face model: the picture once, then every question.

A sequence is a tree of two levels: what all of its questions begin with, the picture included, and a branch for each
question with its answer. A branch sees what comes before it and itself, and its positions are those it would have
alone, so that the model computes for each question exactly what it computes for that question by itself. This holds
for M-RoPE too, where the positions of the picture have three components.

Promises: a question's tokens are those of the prompt as the server renders it (the family's chat template), the
picture's placeholder expanded as the model's own processor does; only answers are learnt, without what nobody knows
(`questions.ignored_spans`).

Legend: S tokens of a sequence, A of them predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from relay_models.errors import CheckpointError
from relay_models.recipes.text4seg.questions import Question, ignored_spans
from relay_models.text4seg.families.family import Family

Positions = Callable[[Tensor], Tensor]  # tokens [S] of one question to positions [S], or [3, S] with M-RoPE


@dataclass(frozen=True)
class Asked:
    """One question with its answer.

    Attributes:
        ids: tokens, the picture's among them.
        num_prompt: how many of them are the prompt's.
        is_learnt: of each token, whether the loss sees it as a target.
    """

    ids: tuple[int, ...]
    num_prompt: int
    is_learnt: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class PackedQuestions:
    """Several questions about one picture.

    Attributes:
        ids_S: tokens.
        positions: [S], or [3, S] with M-RoPE.
        branch_S: 0 for what is shared, then the number of the question.
        source_A: where the tokens stand that predict the answers'.
        target_A: what they are to predict.
    """

    ids_S: Tensor  # noqa: N815
    positions: Tensor
    branch_S: Tensor  # noqa: N815
    source_A: Tensor  # noqa: N815
    target_A: Tensor  # noqa: N815

    def mask(self) -> Tensor:
        """[1, 1, S, S], True where a token (row) sees another: what is before it in its own branch, or shared."""
        order_S = torch.arange(len(self.ids_S))
        is_earlier_SS = order_S[:, None] >= order_S[None, :]
        is_seen_SS = (self.branch_S[None, :] == 0) | (self.branch_S[:, None] == self.branch_S[None, :])
        return (is_earlier_SS & is_seen_SS)[None, None]


class Speaker:
    """Writes questions and answers as one family's model is to see them."""

    def __init__(self, family: Family, processor: Any) -> None:
        """Raises CheckpointError: the processor makes other tokens of a picture than the family says."""
        self.family = family
        self.tokenizer = processor.tokenizer
        if not self.tokenizer.is_fast:
            raise CheckpointError(f"{family.name} must come with a fast tokenizer (tokenizer.json)")
        # as the server gives them to the processor
        self.image_kwargs: dict[str, Any] = {}
        if family.mm_processor_kwargs:
            self.image_kwargs = {"images_kwargs": dict(family.mm_processor_kwargs)}
        self.image_token_id, self._picture = self._learn_picture(processor)
        self._end = self._end_of_answer()

    def asked(self, question: Question) -> Asked:
        """The tokens of a question and its answer, up to the one that ends it.

        Raises:
            LabelError: the question holds a string that the model does not read as text.
            CheckpointError: the tokenizer joins the prompt's end to the answer's beginning.
        """
        prompt = self.prompt(question.prompt)
        lead = self.family.conversation.answer_lead
        prompt_ids = self._ids(prompt)
        encoded = self.tokenizer(
            f"{prompt}{lead}{question.answer}{self._end}", add_special_tokens=False, return_offsets_mapping=True
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if ids[: len(prompt_ids)] != prompt_ids:
            raise CheckpointError(
                f"the tokenizer of {self.family.name} reads {prompt[-20:]!r} differently when an answer follows"
            )
        begin = len(prompt) + len(lead)
        unknown = [(begin + start, begin + end) for start, end in ignored_spans(question)]
        learnt = [
            place >= len(prompt_ids) and not any(_touches(offsets[place], span) for span in unknown)
            for place in range(len(ids))
        ]
        at = self._place(ids)
        picture = [False] * len(self._picture)
        return Asked(
            (*ids[:at], *self._picture, *ids[at + 1 :]),
            len(prompt_ids) - 1 + len(self._picture),
            (*learnt[:at], *picture, *learnt[at + 1 :]),
        )

    def prompt(self, question: str) -> str:
        """As the family's chat template writes it, to be tokenised without further special tokens."""
        begins = self.tokenizer.bos_token if self.family.conversation.begins_text else ""
        return f"{begins}{self.family.prompt(question)}"

    def prompt_ids(self, question: str) -> list[int]:
        """The tokens of a prompt, the picture's expanded."""
        ids = self._ids(self.prompt(question))
        at = self._place(ids)
        return [*ids[:at], *self._picture, *ids[at + 1 :]]

    @property
    def end_ids(self) -> list[int]:
        """What ends an answer."""
        return self._ids(self._end)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _place(self, ids: Sequence[int]) -> int:
        return ids.index(self.image_token_id)

    def _learn_picture(self, processor: Any) -> tuple[int, list[int]]:
        """The token that stands for a picture in a prompt, and those that its processor puts in its place."""
        from PIL import Image

        prompt = self.prompt("?")
        square = self.family.squash(Image.new("RGB", (2, 2)))
        placeholder = int(self.tokenizer.convert_tokens_to_ids(processor.image_token))
        short = self._ids(prompt)
        given = processor(images=[square], text=[prompt], add_special_tokens=False, **self.image_kwargs)
        long = [int(token) for token in given["input_ids"][0]]
        at = short.index(placeholder)
        after = len(short) - at - 1
        if short[:at] != long[:at] or short[at + 1 :] != long[len(long) - after :]:
            raise CheckpointError(f"the processor of {self.family.name} changes more of a prompt than its picture")
        picture = long[at : len(long) - after]
        if picture.count(placeholder) != self.family.num_image_tokens:
            raise CheckpointError(
                f"the processor of {self.family.name} makes {picture.count(placeholder)} tokens of a square of "
                f"{self.family.image_side} pixels, expected {self.family.num_image_tokens}: the size in its "
                "processor_config.json or preprocessor_config.json must be that of the square"
            )
        return placeholder, picture

    def _end_of_answer(self) -> str:
        """The family's, where it is a token of this tokenizer, which may be of another language model."""
        said = self.family.conversation.assistant_close.strip()
        if said in self.tokenizer.get_vocab():
            return said
        if self.tokenizer.eos_token is None:
            raise CheckpointError(
                f"the tokenizer of {self.family.name} has no token {said!r}, and none that ends a text"
            )
        return str(self.tokenizer.eos_token)


def packed(questions: Sequence[Asked], positions: Positions, *, most_tokens: int) -> Iterator[PackedQuestions]:
    """Sequences of at most ``most_tokens`` tokens in which each question is once, in their order.

    A question that is longer by itself has a sequence of its own.
    """
    group: list[Asked] = []
    for question in questions:
        if group and _num_tokens([*group, question]) > most_tokens:
            yield _joined(group, positions)
            group = []
        group.append(question)
    if group:
        yield _joined(group, positions)


def _joined(group: Sequence[Asked], positions: Positions) -> PackedQuestions:
    shared = _num_shared(group)
    ids = list(group[0].ids[:shared])
    alone = [positions(torch.tensor(question.ids)) for question in group]
    where = [alone[0][..., :shared]]
    branches, source, target = [0] * shared, [], []
    for number, (question, own) in enumerate(zip(group, alone, strict=True), start=1):
        shift = len(ids) - shared
        for place in range(question.num_prompt, len(question.ids)):
            if question.is_learnt[place]:
                source.append(shift + place - 1)
                target.append(question.ids[place])
        ids += question.ids[shared:]
        where.append(own[..., shared:])
        branches += [number] * (len(question.ids) - shared)
    return PackedQuestions(
        torch.tensor(ids),
        torch.cat(where, dim=-1),
        torch.tensor(branches),
        torch.tensor(source, dtype=torch.long),
        torch.tensor(target, dtype=torch.long),
    )


def _num_shared(group: Sequence[Asked]) -> int:
    """What all begin with; the last token of a prompt stays with its answer, whose first token it predicts."""
    shortest = min(question.num_prompt for question in group) - 1
    columns = zip(*(question.ids[:shortest] for question in group), strict=True)
    return len([*takewhile(lambda column: len(set(column)) == 1, columns)])


def _num_tokens(group: Sequence[Asked]) -> int:
    shared = _num_shared(group)
    return shared + sum(len(question.ids) - shared for question in group)


def _touches(token: tuple[int, int], span: tuple[int, int]) -> bool:
    """Whether a token has a character of a span; one without characters of its own has the one that it stands at."""
    return token[0] < span[1] and max(token[1], token[0] + 1) > span[0]

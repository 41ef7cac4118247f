"""The requests of a serving benchmark: what they have in common and what is their own, as plain text.

Text is drawn from a seed, a word a token in most vocabularies; `tokens_per_word` corrects what a model's own does.
Equal arguments make equal requests, so that both sides answer the same.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

SAMPLE = (  # what `tokens_per_word` is measured on, and every text is made of
    "the of and a to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part over new sound "
    "take only little work know place year live me back give most very after thing our just name good sentence man "
    "think say great where help through much before line right too mean old any same tell boy follow came want show "
    "also around form three small set put end does another well large must big even such because turn here why ask "
    "went men read need land different home us move try kind hand picture again change off play spell air away animal "
    "house point page letter mother answer found study still learn should world high every near add food between own "
    "below country plant last school father keep tree never start city earth eye light thought head under story saw"
)
_WORDS = SAMPLE.split()
_PICTURE_SIDE = 256


class Workload(StrEnum):
    """Who shares what with whom; the comment says what a prompt is made of."""

    CHAT = "chat"  # one system prompt for all, then a question
    TENANTS = "tenants"  # one of several system prompts, by Zipf's law, then a question
    AGENT = "agent"  # instructions of all agents, the task of one, the step of one of its branches, then a question
    RAG = "rag"  # instructions for all, one of several documents, then a question about it
    IMAGE = "image"  # one picture, then a question about it
    NONE = "none"  # a question that shares nothing with another


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        shared: what others begin with too; may be empty.
        question: its own.
        picture: a data URL, or empty.
    """

    shared: str
    question: str
    picture: str = ""

    def prompt(self) -> str:
        """For /v1/completions."""
        return f"{self.shared} {self.question}".strip()

    def messages(self) -> list[dict[str, object]]:
        """For /v1/chat/completions: the picture before the question, so that questions about it share it."""
        content: object = self.question
        if self.picture:
            picture = {"type": "image_url", "image_url": {"url": self.picture}}
            content = [picture, {"type": "text", "text": self.question}]
        system: list[dict[str, object]] = [{"role": "system", "content": self.shared}] if self.shared else []
        return [*system, {"role": "user", "content": content}]


@dataclass(frozen=True)
class Traffic:
    """What to make.

    Attributes:
        requests: how many.
        shared_tokens: what each request has in common with others, all its parts together.
        question_tokens: shortest and longest question.
        contexts: different system prompts (TENANTS), agents (AGENT) or documents (RAG).
        zipf: how unequal tenants are: the k-th most frequent has a share in proportion to ``k ** -zipf``.
    """

    workload: Workload
    requests: int
    shared_tokens: int
    question_tokens: tuple[int, int]
    contexts: int = 8
    zipf: float = 1.0


def make_requests(traffic: Traffic, seed: int, tokens_per_word: float = 1.0, number: int = 0) -> list[Ask]:
    """What is shared depends on the seed, questions on the number too."""
    words = _Words(tokens_per_word)
    shared = _shared_texts(traffic, words, random.Random(f"shared {seed}"))
    source = random.Random(f"questions {seed} {number}")
    picture = _picture(seed) if traffic.workload is Workload.IMAGE else ""
    order = _order(traffic, len(shared), source)
    return [Ask(shared[i], words.text(source, source.randint(*traffic.question_tokens)), picture) for i in order]


def distinct_contexts(requests: Sequence[Ask]) -> list[Ask]:
    """One short request for each thing that others share, to put it into the prefix cache."""
    found = {(ask.shared, ask.picture): Ask(ask.shared, "Hello", ask.picture) for ask in requests}
    return [ask for (shared, picture), ask in found.items() if shared or picture]


class _Words:
    def __init__(self, tokens_per_word: float) -> None:
        self._tokens_per_word = tokens_per_word

    def text(self, source: random.Random, tokens: int) -> str:
        """About so many tokens; at least a word, unless it is 0."""
        count = max(round(tokens / self._tokens_per_word), 1) if tokens else 0
        return " ".join(source.choices(_WORDS, k=count))


def _shared_texts(traffic: Traffic, words: _Words, source: random.Random) -> list[str]:
    tokens, contexts = traffic.shared_tokens, traffic.contexts
    match traffic.workload:
        case Workload.CHAT:
            return [words.text(source, tokens)]
        case Workload.TENANTS:
            return [words.text(source, tokens) for _ in range(contexts)]
        case Workload.RAG:
            instructions = words.text(source, tokens // 8)
            return [f"{instructions} {words.text(source, tokens - tokens // 8)}".strip() for _ in range(contexts)]
        case Workload.AGENT:  # half of it is the instructions, a quarter the task, the rest one of two steps
            instructions = words.text(source, tokens - tokens // 2)
            tasks = [words.text(source, tokens // 4) for _ in range(contexts)]
            steps = [[words.text(source, tokens // 2 - tokens // 4) for _ in range(2)] for _ in tasks]
            return [f"{instructions} {tasks[i]} {step}".strip() for i in range(contexts) for step in steps[i]]
        case _:
            return [""]


def _order(traffic: Traffic, texts: int, source: random.Random) -> list[int]:
    """Which shared text each request begins with."""
    if traffic.workload is Workload.TENANTS:
        shares = list(accumulate((k + 1) ** -traffic.zipf for k in range(texts)))
        return source.choices(range(texts), cum_weights=shares, k=traffic.requests)
    order = [i % texts for i in range(traffic.requests)]
    source.shuffle(order)
    return order


def _picture(seed: int) -> str:
    """A PNG of coloured squares, as a data URL."""
    import numpy as np
    from PIL import Image

    squares = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(squares).resize((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.NEAREST).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

"""The prompts of a decode benchmark: one shared prompt, one short question of its own for each request.

Token ids are drawn from a seed, so that both sides, each in its own process, make the same prompts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

_FIRST_ORDINARY_TOKEN = 32  # ids below are special tokens in most vocabularies


@dataclass(frozen=True)
class Shape:
    """One point of the benchmark.

    Attributes:
        batch: requests that decode together.
        shared_tokens: length of the prompt that all of them begin with.
        question_tokens: shortest and longest question.
    """

    batch: int
    shared_tokens: int
    question_tokens: tuple[int, int]


def make_shared_prompt(shape: Shape, vocabulary: int, seed: int) -> list[int]:
    return _tokens(random.Random(f"shared {seed}"), shape.shared_tokens, vocabulary)


def make_prompts(shape: Shape, vocabulary: int, seed: int) -> list[list[int]]:
    """One prompt a request: the shared one, then its question."""
    shared = make_shared_prompt(shape, vocabulary, seed)
    source = random.Random(f"questions {seed}")
    return [shared + _tokens(source, source.randint(*shape.question_tokens), vocabulary) for _ in range(shape.batch)]


def blocks_needed(shape: Shape, block_size: int, generated: int) -> int:
    """Cache blocks that the batch holds at its longest, the shared ones once, the null block included."""
    shared_blocks, rest = divmod(shape.shared_tokens, block_size)
    own = -(-(rest + shape.question_tokens[1] + generated) // block_size)
    return 1 + shared_blocks + shape.batch * own


def _tokens(source: random.Random, count: int, vocabulary: int) -> list[int]:
    return [source.randrange(min(_FIRST_ORDINARY_TOKEN, vocabulary - 1), vocabulary) for _ in range(count)]

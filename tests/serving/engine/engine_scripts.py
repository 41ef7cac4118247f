"""Scripts of what happens to a crowded engine: requests join, are aborted, and the engine takes steps.

A script is a list of operations, plain values that go through JSON:
    ["join", prompt, salt, tokens]: a request for so many tokens after the prompt of that number in a pool.
    ["abort", which]: of the requests alive, counted from the oldest, and around.
    ["abort_preempted"]: the next request that is preempted, while it waits to be computed anew.
    ["steps", count]
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

SALTS = (None, None, "salt", "pepper")
MOST_ALIVE = 24  # whoever comes when so many are running or waiting is turned away, so that no queue grows for ever
MOST_TOKENS = 64
BURST_PROMPTS = 3
FIRST_PROMPTS = 33
NUM_PROMPTS = 43
MEMORY_EVERY_STEPS = 50  # a soak looks at its memory
CLEAR_GAP = 1e-3  # of two best log-probabilities; rounding moves them by 1e-5

Operation = list[Any]

# So few blocks that requests are preempted and prefixes evicted; most prefills are cut, and several run in one step, so
# that rows find blocks in the cache that another row only computes in that step.
CROWDED_ENGINE = {
    "skip_tokenizer_init": True, "dtype": "float32", "block_size": 32, "max_model_len": 384,
    "max_num_batched_tokens": 160, "long_prefill_token_threshold": 70, "max_num_seqs": 10,
    "num_gpu_blocks_override": 26, "kv_cache_memory_bytes": 64 << 20,
}  # fmt: skip
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
# Threads change nothing that is asked here, and those of two engines at once would only wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# Small enough that an n-gram now and then foretells a token; large enough that a wrong key soon gives another one.
VOCAB = 64
REPETITIVE = {"vocab_size": VOCAB, "initializer_range": 0.15}


@dataclass(frozen=True)
class Pool:
    """Prompts, and what stock vLLM answers to each: up to the first token that is nearly a tie, so that none counts."""

    prompts: list[list[int]]
    answers: list[list[int]]


def crowded_engine(model: Path, speculation: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of vLLM's LLM."""
    return {**CROWDED_ENGINE, "model": str(model), "speculative_config": speculation}


def clear_answers(result: dict[str, Any]) -> list[list[int]]:
    """The tokens of each request of a scenario before the first that rounding could change."""
    answers = []
    for tokens, gaps in zip(result["tokens"], result["gaps"], strict=True):
        unclear = next((place for place, gap in enumerate(gaps) if gap is None or gap < CLEAR_GAP), len(tokens))
        answers.append(tokens[:unclear])
    return answers


def first_prompts() -> list[list[int]]:
    """A tree: three systems, two documents under each, four ragged questions about each; six that share nothing.

    The last are BURST_PROMPTS: short questions after a system that ends just before a block does.
    """
    rng = random.Random(1)

    def text(length: int) -> list[int]:
        return [rng.randrange(3, VOCAB) for _ in range(length)]

    prompts = []
    for system in (text(70), text(101), text(64)):
        for document in (text(33), text(64)):
            prompts += [system + document + text(rng.randrange(1, 40)) for _ in range(4)]
    prompts += [text(10 + 23 * i) for i in range(6)]
    system = text(190)
    return prompts + [system + text(5 + i) for i in range(BURST_PROMPTS)]


def follow_ups(prompts: list[list[int]], answers: list[list[int]]) -> list[list[int]]:
    """What is asked next: the prefix holds tokens that were decoded, or drafted, and not prefilled."""
    rng = random.Random(2)
    chosen = range(0, len(prompts) - BURST_PROMPTS, 3)
    return [prompts[i] + answers[i] + [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 20))] for i in chosen]


def bursts() -> list[Operation]:
    """Bursts of equal prompts whose system is in the cache, but not the block in which they part from others.

    The first row computes that block while the others hold it already, and it pays to share all that is before it.
    """
    first = FIRST_PROMPTS - BURST_PROMPTS
    operations: list[Operation] = [["join", first, None, 8], ["steps", 12]]
    for prompt in range(first + 1, FIRST_PROMPTS):
        operations += [["join", prompt, None, 12]] * 5 + [["steps", 14]]
    return operations


def long_script(seed: int, length: int) -> list[Operation]:
    """The bursts, then random operations, so many in all."""
    opening = bursts()
    return opening + list(islice(random_operations(random.Random(seed), NUM_PROMPTS), length - len(opening)))


def random_operations(rng: random.Random, num_prompts: int) -> Iterator[Operation]:
    """For ever; requests come about as fast as ten rows can serve them, in bursts, often for the same few prompts."""
    favourites = [rng.randrange(num_prompts) for _ in range(3)]
    while True:
        kind = rng.random()
        if kind < 0.45:
            prompt, salt = rng.randrange(num_prompts), rng.choice(SALTS)
            if rng.random() < 0.4:
                prompt = rng.choice(favourites)
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                yield ["join", prompt, salt if rng.random() < 0.7 else rng.choice(SALTS), rng.randint(1, MOST_TOKENS)]
        elif kind < 0.53:
            yield ["abort", rng.randrange(MOST_ALIVE)]
        elif kind < 0.55:
            yield ["abort_preempted"]
        else:
            yield ["steps", rng.randint(1, 9)]
        if rng.random() < 0.02:
            favourites[rng.randrange(3)] = rng.randrange(num_prompts)

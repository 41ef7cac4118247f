"""Prompts and the room they take."""

from __future__ import annotations

import pytest

from relay_benchmarks.machine import Machine
from relay_benchmarks.workload import Shape, blocks_needed, make_prompts, make_shared_prompt

SHAPE = Shape(batch=16, shared_tokens=300, question_tokens=(8, 60))


def test_all_begin_with_the_shared_prompt_and_then_differ() -> None:
    prompts = make_prompts(SHAPE, vocabulary=1000, seed=3)
    shared = make_shared_prompt(SHAPE, vocabulary=1000, seed=3)
    assert len(shared) == 300
    assert len(prompts) == 16
    assert all(prompt[:300] == shared for prompt in prompts)
    assert len({tuple(prompt[300:308]) for prompt in prompts}) == 16
    lengths = {len(prompt) - 300 for prompt in prompts}
    assert lengths <= set(range(8, 61))
    assert len(lengths) > 5


def test_the_seed_decides_the_prompts() -> None:
    assert make_prompts(SHAPE, 1000, seed=3) == make_prompts(SHAPE, 1000, seed=3)
    assert make_prompts(SHAPE, 1000, seed=3) != make_prompts(SHAPE, 1000, seed=4)


@pytest.mark.parametrize("vocabulary", [2, 33, 100, 49152])
def test_token_ids_are_in_the_vocabulary(vocabulary: int) -> None:
    for prompt in make_prompts(SHAPE, vocabulary, seed=0):
        assert all(0 <= token < vocabulary for token in prompt)


@pytest.mark.parametrize(
    ("shape", "generated", "expected"),
    [
        (Shape(4, 256, (1, 60)), 68, 1 + 2 + 4 * 1),  # 60 + 68 fill one block exactly
        (Shape(4, 256, (1, 60)), 69, 1 + 2 + 4 * 2),
        (Shape(4, 300, (1, 60)), 68, 1 + 2 + 4 * 2),  # 44 shared tokens are in a block of one's own
        (Shape(1, 0, (1, 1)), 1, 1 + 0 + 1),
    ],
)
def test_blocks_needed(shape: Shape, generated: int, expected: int) -> None:
    assert blocks_needed(shape, block_size=128, generated=generated) == expected


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ("Intel(R) Xeon(R) Processor", "intel-xeon-processor-2-cores"),
        ("Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz", "intel-core-i7-8700-2-cores"),
        ("AMD EPYC 9R14 / 96-Core", "amd-epyc-9r14-96-core-2-cores"),
        ("", "unknown-cpu-2-cores"),
    ],
)
def test_a_machines_name_is_fit_for_a_file(cpu: str, expected: str) -> None:
    assert Machine(cpu, cores=2, memory_gib=8).name == expected

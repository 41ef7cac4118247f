"""The check that a kernel must pass before it is timed: what is right passes, what is slightly wrong does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from relay_benchmarks.kernel_check import Problem, check_kernel, make_problem
from relay_kernels.relay_attention.reference import paged_attention_reference


def attend_in(dtype: torch.dtype) -> Callable[[Problem], Tensor]:
    def attend(problem: Problem) -> Tensor:
        out, _ = paged_attention_reference(
            problem.query.to(dtype),
            problem.key_cache.to(dtype),
            problem.value_cache.to(dtype),
            problem.block_table,
            problem.query_lens,
            problem.seq_lens,
            problem.scale,
        )
        return out.to(problem.query.dtype)

    return attend


def problem(dtype: torch.dtype) -> Problem:
    return make_problem(query_heads=6, key_heads=2, head_size=64, block_size=32, scale=0.125, dtype=dtype, seed=1)


def zeros(problem: Problem) -> Tensor:
    return torch.zeros_like(problem.query)


def not_written(problem: Problem) -> Tensor:
    out = attend_in(torch.float32)(problem)
    out[-1, -1, -1] = float("nan")
    return out


def one_key_short(problem: Problem) -> Tensor:
    return attend_in(torch.float32)(replace(problem, seq_lens=tuple(length - 1 for length in problem.seq_lens)))


def wrong_scale(problem: Problem) -> Tensor:
    return attend_in(torch.float32)(replace(problem, scale=problem.scale * 1.1))


def neighbours_block(problem: Problem) -> Tensor:
    return attend_in(torch.float32)(replace(problem, block_table=problem.block_table.roll(1, dims=0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_right_passes(dtype: torch.dtype) -> None:
    found = check_kernel(attend_in(torch.float32), problem(dtype))
    assert found.passed
    assert found.budget < 0.2


@pytest.mark.parametrize("wrong", [zeros, not_written, one_key_short, wrong_scale, neighbours_block])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_wrong_does_not(wrong: Callable[[Problem], Tensor], dtype: torch.dtype) -> None:
    assert not check_kernel(wrong, problem(dtype)).passed


def test_the_problem_has_what_a_kernel_can_get_wrong() -> None:
    plan = problem(torch.float32).plan
    assert plan.is_shared
    assert plan.num_groups >= 2
    assert max(problem(torch.float32).query_lens) > 1
    assert plan.grouped_requests == 7  # of eight

"""Whether an attention kernel computes the right values, asked before it is timed.

A small step of every kind (two groups, nested prefixes, a request alone, several query tokens) is compared with the
float64 reference. The budget is twice the error of the same mathematics done plainly in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from relay_kernels.relay_attention.plan import CostModel, RelayPlan, make_plan
from relay_kernels.relay_attention.reference import paged_attention_reference

_ALWAYS_SHARE = CostModel(segment=0.0, merge=0.0)


@dataclass(frozen=True)
class Problem:
    """One layer of one step.

    Attributes:
        query: [T, N heads, H].
        key_cache, value_cache: plain, [blocks, S tokens, K heads, H].
        plan: shares every prefix that can be shared.
        query_start: [R + 1], where each row's query tokens begin.
        slots: where each cached key lies, block * S + offset.
    """

    plan: RelayPlan
    query_start: np.ndarray
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    block_table: Tensor
    slots: Tensor
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    scale: float


@dataclass(frozen=True)
class KernelCheck:
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # false for NaN


def check_kernel(attend: Callable[[Problem], Tensor], problem: Problem) -> KernelCheck:
    """Largest error of ``attend(problem)``, [T, N, H], and the largest that is allowed."""
    exact, plain = (_reference(problem, dtype) for dtype in (torch.float64, problem.query.dtype))
    found = attend(problem).double()
    return KernelCheck((found - exact).abs().max().item(), 2 * (plain - exact).abs().max().item())


def make_problem(
    *, query_heads: int, key_heads: int, head_size: int, block_size: int, scale: float, dtype: torch.dtype, seed: int
) -> Problem:
    """Eight requests: four over blocks 1 2 (two of them over 3 as well), three over 4, one alone."""
    prefixes: tuple[list[int], ...] = ([1, 2, 3], [1, 2, 3], [1, 2], [1, 2], [4], [4], [4], [])
    query_lens = (1, 1, 1, 5, 1, 1, 1, 1)
    own_tokens = (block_size + 7, 6, 1, 9, block_size, 63, 5, 11)
    seq_lens = tuple(len(prefix) * block_size + own for prefix, own in zip(prefixes, own_tokens, strict=True))
    table = np.zeros((len(prefixes), max(-(-length // block_size) for length in seq_lens)), dtype=np.int32)
    free = 5
    for row, (prefix, length) in enumerate(zip(prefixes, seq_lens, strict=True)):
        own = -(-length // block_size) - len(prefix)
        table[row, : len(prefix) + own] = [*prefix, *range(free, free + own)]
        free += own
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

    return Problem(
        plan=make_plan(
            table, np.array(query_lens), np.array(seq_lens), block_size=block_size, cost_model=_ALWAYS_SHARE
        ),
        query_start=np.cumsum((0, *query_lens), dtype=np.int32),
        query_lens=query_lens,
        seq_lens=seq_lens,
        block_table=torch.from_numpy(table),
        slots=torch.arange(free * block_size),
        query=random(sum(query_lens), query_heads, head_size),
        key_cache=random(free, block_size, key_heads, head_size),
        value_cache=random(free, block_size, key_heads, head_size),
        scale=scale,
    )


def _reference(problem: Problem, dtype: torch.dtype) -> Tensor:
    out, _ = paged_attention_reference(
        problem.query.to(dtype),
        problem.key_cache.to(dtype),
        problem.value_cache.to(dtype),
        problem.block_table,
        problem.query_lens,
        problem.seq_lens,
        problem.scale,
    )
    return out.double()

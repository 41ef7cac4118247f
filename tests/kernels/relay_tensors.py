"""Queries and paged caches for a step, in float64, with NaN wherever no key was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from relay_coverage import Step
from torch import Tensor

from relay_kernels.relay_attention.reference import paged_attention_reference

UNIT_ROUNDOFF = 2.0**-24


@dataclass(frozen=True)
class Problem:
    """One layer of a step, already rounded to ``dtype``."""

    step: Step
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    scale: float

    def reference(self, dtype: torch.dtype = torch.float64, **features: Any) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of plain attention in ``dtype``, on the CPU and as float64."""
        query, key, value = (x.cpu().to(dtype) for x in (self.query, self.key_cache, self.value_cache))
        num_tokens = sum(self.step.query_lens)
        table, query_lens, seq_lens = self.block_table.cpu(), self.step.query_lens, self.step.seq_lens
        out, lse = paged_attention_reference(
            query[:num_tokens], key, value, table, query_lens, seq_lens, self.scale, **features
        )
        return out.double(), lse.double()


def make_problem(
    step: Step,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    num_padding_tokens: int = 0,
    is_head_major: bool = False,
    seed: int = 0,
) -> Problem:
    """Random queries, keys and values; ``is_head_major`` lays the cache out as [blocks, key heads, block size, H]."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = int(step.block_table.max(initial=0)) + 1
    num_tokens = sum(step.query_lens) + num_padding_tokens

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    is_written = torch.from_numpy(_written(step, num_blocks))
    caches = []
    for _ in range(2):
        cache = random(num_blocks, step.block_size, num_kv_heads, head_size)
        cache[~is_written] = float("nan")
        if is_head_major:
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        caches.append(cache.to(device))
    return Problem(
        step=step,
        query=random(num_tokens, num_heads, head_size).to(device),
        key_cache=caches[0],
        value_cache=caches[1],
        block_table=torch.from_numpy(step.block_table).to(device),
        scale=0.9 * head_size**-0.5,  # inexact, so that every way to apply it rounds
    )


def _written(step: Step, num_blocks: int) -> np.ndarray:
    """[blocks, block size]: the places that hold a key of some row."""
    written = np.zeros((num_blocks, step.block_size), dtype=bool)
    for row, seq_len in enumerate(step.seq_lens):
        position = np.arange(seq_len)
        written[step.block_table[row, position // step.block_size], position % step.block_size] = True
    return written


def assert_within_budget(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the error (root mean square) of the same mathematics done plainly in the same dtype.

    Where that happens to be nearly exact, three roundings of float32, in which the kernels accumulate: scores go to
    base 2 and log-sum-exps back.
    """
    assert torch.equal(torch.isneginf(actual), torch.isneginf(exact))
    is_finite = torch.isfinite(exact)
    error, plain_error = (_norm(other[is_finite] - exact[is_finite]) for other in (actual, plain))
    budget = max(2 * plain_error, 3 * UNIT_ROUNDOFF * _norm(exact[is_finite]))
    assert error <= budget, f"the error is {error:.3g}, the budget {budget:.3g}"


def _norm(error: Tensor) -> float:
    return float(error.square().mean().sqrt()) if error.numel() else 0.0


def tree_step(block_size: int, rows: list[tuple[list[int], int, int]]) -> Step:
    """Rows of (labels of leading blocks, query_len, seq_len); equal labels are equal blocks, the rest is the row's."""
    width = max((-(-seq_len // block_size) for _, _, seq_len in rows), default=1)
    block_table = np.zeros((len(rows), max(width, 1)), dtype=np.int32)
    labels = sorted({label for prefix, _, _ in rows for label in prefix})
    next_block = 1 + len(labels)
    for row, (prefix, _, seq_len) in enumerate(rows):
        num_blocks = -(-seq_len // block_size)
        own = num_blocks - len(prefix)
        block_table[row, :num_blocks] = [
            *(1 + labels.index(label) for label in prefix),
            *range(next_block, next_block + own),
        ]
        next_block += own
    _, query_lens, seq_lens = zip(*rows, strict=True) if rows else ((), (), ())
    return Step(block_table, tuple(query_lens), tuple(seq_lens), block_size)

"""One layer of a decode step to time kernels on: requests in groups that share a prompt, each with tokens of its own.

Legend: R requests, one query token each; N query heads, K key heads, H head size; B cache blocks of S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from relay_benchmarks.errors import BenchArgumentError
from relay_kernels.relay_attention.plan import CostModel, RelayPlan, make_plan
from relay_kernels.relay_attention.reference import partial_attention_reference

OWN_TOKENS = (64, 192)  # fewest and most of a request, drawn for each


@dataclass(frozen=True)
class Shape:
    """What is timed.

    Attributes:
        requests: in the step.
        shared: tokens of each group's prompt, in full blocks; the rest of a block is left out.
        groups: prompts; requests take them in turn.
        query_heads, key_heads, head_size: of the layer.
        block_size: tokens of a cache block.
        dtype: of queries, keys and values.
    """

    requests: int
    shared: int
    groups: int
    query_heads: int = 32
    key_heads: int = 8
    head_size: int = 128
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("requests", "groups", "query_heads", "key_heads", "head_size", "block_size"):
            if getattr(self, name) < 1:
                raise BenchArgumentError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.shared < 0:
            raise BenchArgumentError(f"shared must not be negative, got {self.shared}")
        if self.query_heads % self.key_heads:
            raise BenchArgumentError(
                f"query heads must be a multiple of key heads, got {self.query_heads} and {self.key_heads}"
            )

    @property
    def has_sharers(self) -> bool:
        return self.requests > self.groups and self.shared >= self.block_size

    @property
    def bytes_per_key(self) -> int:
        """Of key and value, over all heads."""
        return 2 * self.key_heads * self.head_size * self.dtype.itemsize

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, {self.groups} x {self.shared} shared, {self.query_heads}:{self.key_heads} heads"
        )


@dataclass(frozen=True, eq=False)
class KernelStep:
    """Tensors of one step, on a device.

    Attributes:
        seq_lens: [R] keys of each request.
        query: [R, N, H].
        key_cache, value_cache: plain, [B, S, K, H].
        block_table: [R, W] int32.
    """

    shape: Shape
    seq_lens: np.ndarray
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor

    @classmethod
    def make(cls, shape: Shape, device: torch.device, seed: int) -> KernelStep:
        """Random tensors; equal shapes and seeds give equal ones on one device."""
        rng = np.random.default_rng(seed)
        prefix_blocks = shape.shared // shape.block_size
        own_R = rng.integers(OWN_TOKENS[0], OWN_TOKENS[1] + 1, shape.requests)
        seq_lens = prefix_blocks * shape.block_size + own_R
        own_blocks_R = -(-own_R // shape.block_size)
        table = np.zeros((shape.requests, prefix_blocks + int(own_blocks_R.max())), dtype=np.int32)
        # Blocks lie in memory as a server's do after a while: in no order. Block 0 is nobody's.
        order = 1 + rng.permutation(shape.groups * prefix_blocks + int(own_blocks_R.sum())).astype(np.int32)
        prefixes = order[: shape.groups * prefix_blocks].reshape(shape.groups, prefix_blocks)
        rest = order[shape.groups * prefix_blocks :]
        ends_R = own_blocks_R.cumsum()
        for row, (end, count) in enumerate(zip(ends_R, own_blocks_R, strict=True)):
            table[row, :prefix_blocks] = prefixes[row % shape.groups]
            table[row, prefix_blocks : prefix_blocks + count] = rest[end - count : end]
        generator = torch.Generator(device).manual_seed(seed)

        def random(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=shape.dtype, device=device)

        cache = (len(order) + 1, shape.block_size, shape.key_heads, shape.head_size)
        return cls(
            shape,
            seq_lens,
            random(shape.requests, shape.query_heads, shape.head_size),
            random(*cache),
            random(*cache),
            torch.from_numpy(table).to(device),
        )

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def scale(self) -> float:
        return float(self.shape.head_size**-0.5)

    @property
    def unique_keys(self) -> int:
        """Keys that have to be read at least once."""
        prefix = self.shape.shared // self.shape.block_size * self.shape.block_size
        groups = min(self.shape.groups, self.shape.requests)
        return int(self.seq_lens.sum()) - prefix * (self.shape.requests - groups)

    @property
    def least_bytes(self) -> int:
        """That any kernel moves: every key and value once, queries in, results out."""
        return self.unique_keys * self.shape.bytes_per_key + 2 * self.query.numel() * self.query.element_size()

    @property
    def flops(self) -> int:
        """Of scores and weighted values, each a multiplication and an addition."""
        return 4 * int(self.seq_lens.sum()) * self.shape.query_heads * self.shape.head_size

    def plan(self, cost_model: CostModel) -> RelayPlan:
        return make_plan(
            self.block_table.cpu().numpy(),
            np.ones(self.shape.requests, dtype=np.int64),
            self.seq_lens,
            block_size=self.shape.block_size,
            cost_model=cost_model,
        )

    def slots(self, row: int) -> Tensor:
        """Where the keys of a request lie, block * S + offset."""
        position = torch.arange(int(self.seq_lens[row]), device=self.device)
        size = self.shape.block_size
        return self.block_table[row, position // size].long() * size + position % size

    @cached_property
    def checked_rows(self) -> list[int]:
        """The rows that results are compared on: the first, the last, and some between."""
        return sorted({0, self.shape.requests - 1, *range(0, self.shape.requests, max(1, self.shape.requests // 6))})

    def error_and_budget(self, out: Tensor) -> tuple[float, float]:
        """The largest error of `checked_rows` against float64, and twice that of plain mathematics in this dtype."""
        errors, budgets = [], []
        for row in self.checked_rows:
            slots = self.slots(row)
            keys, values = self.key_cache.flatten(0, 1)[slots], self.value_cache.flatten(0, 1)[slots]
            query = self.query[row : row + 1]
            exact, plain = (
                partial_attention_reference(query.to(t), keys.to(t), values.to(t), self.scale)[0].double()
                for t in (torch.float64, self.shape.dtype)
            )
            errors.append((out[row : row + 1].double() - exact).abs().max())
            budgets.append(2 * (plain - exact).abs().max())
        return float(torch.stack(errors).max()), float(torch.stack(budgets).max())

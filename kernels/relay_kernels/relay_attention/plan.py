"""The relay plan: which requests of a step read which keys together, decided from block tables alone.

Legend: R requests (rows of the block table), W blocks per row, bs tokens per block.

Requests whose block tables begin with the same physical blocks form a prefix tree; each node of it is a run of blocks
that two or more requests share. A `CostModel` decides which nodes are worth a segment of their own, and what remains
of a request is its suffix. A plan is made of integers, knows neither torch nor vLLM, and can be printed and hashed.

Three rules keep a plan from corrupting an answer, each in one small function:
    `shareable_blocks`: a row shares only full blocks it computed in earlier steps. Blocks scheduled in this very step
        may already stand in other rows' tables, and entries past the end of a sequence are stale.
    `names_a_prefix`: the null block is nobody's prefix, however many rows hold it.
    `common_prefix_end`: a match is positional, from block 0 on, and on physical block ids only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer[Any]]
BoolArray = npt.NDArray[np.bool_]

NULL_BLOCK = 0
FIRST_WINDOW = 64  # blocks compared at first when looking for the end of a prefix; doubles from there


@dataclass(frozen=True)
class Segment:
    """Keys ``[key_start, key_end)`` of the rows ``requests``, which all hold them in the same physical blocks.

    With two or more requests the segment is shared, and every query token of each of them sees all of its keys. With
    one request it is that request's suffix, and causal at its end.
    """

    requests: tuple[int, ...]
    key_start: int
    key_end: int

    @property
    def num_keys(self) -> int:
        return self.key_end - self.key_start


@dataclass(frozen=True)
class CostModel:
    """When sharing pays, in units of one key (K and V of all heads) read for one request.

    A request of q query tokens takes ``max(key_read, q * row_key)`` for each key it reads alone: memory or arithmetic,
    whichever is slower. A segment shared by requests of m query tokens in all takes ``max(key_read, m * row_key)`` for
    each key, once, plus ``segment`` and ``m * merge``: each of its tokens gets one more partial result to merge.

    The defaults suit a CPU, where one core's matrix product handles about twenty query rows in the time that a key
    takes to arrive from memory, and writing and merging a partial result costs about four keys.

    Attributes:
        key_read: reading one key for one request.
        row_key: one query token's arithmetic on one key.
        segment: fixed cost of a shared segment (packing queries, scheduling).
        merge: cost of one more partial result of one query token.
        min_keys: a shorter segment is never shared.
    """

    key_read: float = 1.0
    row_key: float = 0.05
    segment: float = 16.0
    merge: float = 4.0
    min_keys: int = 0

    def __post_init__(self) -> None:
        for name in ("key_read", "row_key"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        for name in ("segment", "merge"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")

    @classmethod
    def always(cls) -> CostModel:
        """Share whatever can be shared."""
        return cls(key_read=1.0, row_key=0.0, segment=0.0, merge=0.0)

    @classmethod
    def never(cls) -> CostModel:
        """Share nothing."""
        return cls(segment=math.inf)

    def gain_per_key(self, query_lens: Sequence[int]) -> float:
        """What each key of a segment saves when these requests share it."""
        alone = sum(max(self.key_read, query_len * self.row_key) for query_len in query_lens)
        return alone - max(self.key_read, sum(query_lens) * self.row_key)

    def overhead(self, query_lens: Sequence[int]) -> float:
        """What a segment shared by these requests costs, however short it is."""
        return self.segment + sum(query_lens) * self.merge


@dataclass(frozen=True)
class RelayPlan:
    """What one step shares.

    Attributes:
        block_size: tokens per block.
        query_lens: query tokens of each row in this step.
        seq_lens: keys of each row once this step's tokens are written.
        shared: the shared segments, by ascending key_start, then by first row.
        suffix_starts: for each row the first key that no shared segment covers.
    """

    block_size: int
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    shared: tuple[Segment, ...]
    suffix_starts: tuple[int, ...]

    @cached_property
    def suffixes(self) -> tuple[Segment, ...]:
        """One segment for each row that takes part in the step, in row order."""
        return tuple(
            Segment((row,), start, seq_len)
            for row, (query_len, seq_len, start) in enumerate(
                zip(self.query_lens, self.seq_lens, self.suffix_starts, strict=True)
            )
            if query_len > 0 and seq_len > 0
        )

    @property
    def num_requests(self) -> int:
        return len(self.query_lens)

    @property
    def is_shared(self) -> bool:
        return bool(self.shared)

    @property
    def grouped_requests(self) -> int:
        """Distinct requests in any shared segment."""
        return len({row for segment in self.shared for row in segment.requests})

    @property
    def num_groups(self) -> int:
        """Sets of requests that share something; nested segments belong to the group of the outermost."""
        return sum(segment.key_start == 0 for segment in self.shared)

    @property
    def kv_tokens_saved(self) -> int:
        """Keys that are read once where each request would have read them for itself."""
        return sum((len(segment.requests) - 1) * segment.num_keys for segment in self.shared)

    def __str__(self) -> str:
        head = (
            f"RelayPlan: {self.num_requests} rows, block size {self.block_size}, {self.num_groups} groups of "
            f"{self.grouped_requests} requests, {self.kv_tokens_saved} key reads saved"
        )
        shared = [
            f"  keys [{segment.key_start}, {segment.key_end}) shared by rows {_ranges(segment.requests)}"
            for segment in self.shared
        ]
        return "\n".join([head, *shared])


def make_plan(
    block_table: IntArray,
    query_lens: Sequence[int] | IntArray,
    seq_lens: Sequence[int] | IntArray,
    *,
    block_size: int,
    cost_model: CostModel,
    max_depth: int | None = None,
) -> RelayPlan:
    """Find what the rows of one step share and decide what of it pays.

    Args:
        block_table: [R, W] physical block ids; what lies past ``cdiv(seq_len, block_size)`` in a row is never read.
        query_lens: [R] query tokens of each row: the last ``query_len`` of its ``seq_len`` keys.
        seq_lens: [R] keys of each row, this step's included. A row with no query tokens or no keys is padding.
        block_size: tokens per block.
        cost_model: when sharing pays.
        max_depth: of the prefix trees; what is nested deeper is not looked for. None for no limit.

    Raises:
        ValueError: an argument has the wrong shape or an impossible value; the message names it.
    """
    if max_depth is not None and max_depth < 1:
        raise ValueError(f"max_depth must be at least 1 or None, got {max_depth}")
    query_lens_R = _lengths("query_lens", query_lens)
    seq_lens_R = _lengths("seq_lens", seq_lens)
    _check_step(block_table, query_lens_R, seq_lens_R, block_size)

    shareable_R = shareable_blocks(query_lens_R, seq_lens_R, block_size, block_table.shape[1])
    query_lens_list: list[int] = query_lens_R.tolist()
    suffix_starts_R = np.zeros(len(query_lens_R), dtype=np.int64)
    shared: list[Segment] = []
    for rows, start, end in _paying_nodes(
        list(_prefix_forest(block_table, shareable_R, max_depth)), query_lens_list, cost_model, block_size
    ):
        shared.append(Segment(tuple(rows.tolist()), start * block_size, end * block_size))
        suffix_starts_R[rows] = np.maximum(suffix_starts_R[rows], end * block_size)
    shared.sort(key=lambda segment: (segment.key_start, segment.requests))
    return RelayPlan(
        block_size=block_size,
        query_lens=tuple(query_lens_list),
        seq_lens=tuple(seq_lens_R.tolist()),
        shared=tuple(shared),
        suffix_starts=tuple(suffix_starts_R.tolist()),
    )


def can_share(block_table: IntArray, query_lens: IntArray, seq_lens: IntArray, *, block_size: int) -> bool:
    """Whether any two rows hold the same computed first block: the cheap question before `make_plan`.

    Takes the arguments of `make_plan` as arrays, unchecked.
    """
    shareable_R = shareable_blocks(query_lens, seq_lens, block_size, block_table.shape[1])
    first_blocks = np.sort(block_table[shareable_R > 0, 0])
    return bool(((first_blocks[1:] == first_blocks[:-1]) & names_a_prefix(first_blocks[1:])).any())


def shareable_blocks(query_lens_R: IntArray, seq_lens_R: IntArray, block_size: int, table_width: int) -> IntArray:
    """How many leading blocks each row may share: the full ones it computed before this step, none for padding."""
    computed_R: IntArray = np.where((query_lens_R > 0) & (seq_lens_R > 0), seq_lens_R - query_lens_R, 0)
    shareable_R: IntArray = np.minimum(computed_R // block_size, table_width)
    return shareable_R


def names_a_prefix(block_ids: IntArray) -> BoolArray:
    """Which block ids stand for keys that somebody wrote. The null block pads rows and replaces freed blocks."""
    is_named: BoolArray = block_ids != NULL_BLOCK
    return is_named


def common_prefix_end(block_table: IntArray, rows: IntArray, start: int, limit: int) -> int:
    """The block at which these rows, equal before ``start``, first differ, or ``limit``."""
    window = FIRST_WINDOW
    while start < limit:
        stop = min(start + window, limit)
        first = block_table[rows[0], start:stop]
        is_common = (block_table[rows[1:], start:stop] == first).all(axis=0) & names_a_prefix(first)
        if not is_common.all():
            return start + int(is_common.argmin())
        start = stop
        window *= 2
    return limit


@dataclass
class _Node:
    """Blocks ``[start, end)``, the same in all of ``rows``; ``starts`` are those of its ancestors and its own."""

    rows: IntArray
    starts: tuple[int, ...]
    end: int
    children: list[_Node] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    pays: list[bool] = field(default_factory=list)


def _prefix_forest(block_table: IntArray, shareable_R: IntArray, max_depth: int | None) -> Iterator[_Node]:
    """The nodes of the prefix trees of two or more rows, parents before children, as deep as is wanted."""
    branches: list[tuple[IntArray, int, _Node | None]] = [(np.flatnonzero(shareable_R), 0, None)]
    while branches:
        rows, start, parent = branches.pop()
        for group in _rows_by_block(rows, block_table[rows, start]):
            end = common_prefix_end(block_table, group, start + 1, int(shareable_R[group].min()))
            node = _Node(group, (*(parent.starts if parent else ()), start), end)
            if parent:
                parent.children.append(node)
            yield node
            going_on = group[shareable_R[group] > end]
            if len(going_on) > 1 and len(node.starts) != max_depth:
                branches.append((going_on, end, node))


def _rows_by_block(rows: IntArray, block_ids: IntArray) -> list[IntArray]:
    """The sets of two or more rows that hold the same block, by first row; rows stay in ascending order."""
    if len(rows) < 2:
        return []
    order = block_ids.argsort(kind="stable")
    ids = block_ids[order]
    edges = np.flatnonzero(ids[1:] != ids[:-1]) + 1
    if len(edges) == len(ids) - 1:
        return []
    begins = np.concatenate(([0], edges))
    ends = np.concatenate((edges, [len(ids)]))
    kept = np.flatnonzero((ends - begins > 1) & names_a_prefix(ids[begins]))
    groups = [rows[order[begins[i] : ends[i]]] for i in kept.tolist()]
    groups.sort(key=lambda group: int(group[0]))
    return groups


def _paying_nodes(
    nodes: list[_Node], query_lens: list[int], cost_model: CostModel, block_size: int
) -> Iterator[tuple[IntArray, int, int]]:
    """The best choice of segments: (rows, first block, end block), exactly optimal under the cost model.

    A node that does not pay leaves its blocks to its children, whose segments then begin where it began, and to the
    suffixes of the rows without a child. So each node is judged once for each place its blocks may begin: its own
    start, or that of an ancestor if all between are skipped.
    """
    for node in reversed(nodes):
        node_query_lens = [query_lens[row] for row in node.rows.tolist()]
        gain_per_block = cost_model.gain_per_key(node_query_lens) * block_size
        rest = sum(child.gains[-1] for child in node.children) - cost_model.overhead(node_query_lens)
        for i, start in enumerate(node.starts):
            shared = gain_per_block * (node.end - start) + rest
            skipped = sum(child.gains[i] for child in node.children)
            is_long_enough = (node.end - start) * block_size >= cost_model.min_keys
            node.pays.append(is_long_enough and shared > skipped)
            node.gains.append(shared if node.pays[-1] else skipped)

    pending = [(node, 0) for node in nodes if len(node.starts) == 1]
    while pending:
        node, i = pending.pop()
        if node.pays[i]:
            yield node.rows, node.starts[i], node.end
            pending += [(child, len(child.starts) - 1) for child in node.children]
        else:
            pending += [(child, i) for child in node.children]


def _lengths(name: str, lengths: Sequence[int] | IntArray) -> npt.NDArray[np.int64]:
    array = np.asarray(lengths)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, got dtype {array.dtype}")
    return array.astype(np.int64)


def _check_step(block_table: IntArray, query_lens_R: IntArray, seq_lens_R: IntArray, block_size: int) -> None:
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if block_table.ndim != 2 or not np.issubdtype(block_table.dtype, np.integer):
        raise ValueError(
            f"block_table must be a two-dimensional array of integers, got shape {block_table.shape} and dtype "
            f"{block_table.dtype}"
        )
    num_rows, width = block_table.shape
    for name, lengths in (("query_lens", query_lens_R), ("seq_lens", seq_lens_R)):
        if len(lengths) != num_rows:
            raise ValueError(f"{name} has {len(lengths)} entries for {num_rows} rows of block_table")
        if num_rows and lengths.min() < 0:
            row = int(lengths.argmin())
            raise ValueError(f"{name}[{row}] must not be negative, got {lengths[row]}")
    if not num_rows:
        return
    too_long = (query_lens_R > seq_lens_R) & (seq_lens_R > 0)
    if too_long.any():
        row = int(too_long.argmax())
        raise ValueError(f"query_lens[{row}] is {query_lens_R[row]}, more than seq_lens[{row}], {seq_lens_R[row]}")
    too_wide = (seq_lens_R > width * block_size) & (query_lens_R > 0)
    if too_wide.any():
        row = int(too_wide.argmax())
        raise ValueError(
            f"seq_lens[{row}] is {seq_lens_R[row]}, more than the {width} blocks of {block_size} tokens in a row of "
            f"block_table can hold"
        )


def _ranges(rows: tuple[int, ...]) -> str:
    """``(0, 1, 2, 5)`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][1] + 1:
            runs[-1][1] = row
        else:
            runs.append([row, row])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)

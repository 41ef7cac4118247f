"""The plan of a step, made on the GPU from tensors that are there: block table, query starts, sequence lengths.

    partition, extend (once for each depth of the prefix trees) → lower

What comes out is bit for bit the work list that `fitted_work_list(make_plan(...))` gives on the host, with the tiles of
it, in the buffers of a `TritonWorkspace`. Nothing is copied to the host, no launch depends on what the step holds, and
all addresses stay, so that the launches can stand in a CUDA graph.

    partition   which rows go on with the same block: leaders (first rows of a group), and sums over each group
    extend      one program a row: how far it is equal to its leader; the group ends where its shortest row does
    lower       which groups are worth a segment (`CostModel`, in integers), the segments in order, cut into pieces;
                the slots of each piece, the slots of each token, the tiles of each piece

Legend: R rows of W blocks of S keys, padded to RP; D depths; T query tokens; P slots. A *node* is a group at one depth.
Group arrays are [D, RP]: at a member's row for what is its own, at the leader's for what is the group's.

Importing this module imports triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from relay_kernels.relay_attention.plan import CostModel
from relay_kernels.relay_attention.triton_relay import TritonWorkspace
from relay_kernels.relay_attention.work_list import MOST_SLOTS_OF_CUT_SEGMENT

MAX_ROWS = 1024
MAX_DEPTH = 4
COMPARED_BLOCKS = 512  # of a row and its leader at a time
COLUMNS = tl.constexpr(32)  # rows that all rows are compared with at a time
FAR = tl.constexpr(1 << 30)
LARGEST_COST = 1 << 20
# Of all steps so far: those in which rows share a computed block, those that read a prefix once, and of these the rows
# and groups that share, and the keys that are read once where each row would have read them.
TOTALS = ("eligible_steps", "relay_steps", "grouped_requests", "groups", "kv_tokens_saved")


@dataclass(frozen=True)
class DeviceCosts:
    """A `CostModel` in integers, which the host and the GPU add up to the same."""

    key_read: int
    row_key: int
    segment: int
    merge: int
    min_keys: int

    @classmethod
    def of(cls, model: CostModel) -> DeviceCosts:
        """Raises ValueError where a cost is no whole number, or too large."""
        costs = {}
        for name in ("key_read", "row_key", "segment", "merge", "min_keys"):
            value = getattr(model, name)
            if not (math.isfinite(value) and value == int(value) and value <= LARGEST_COST):
                raise ValueError(f"{name} must be a whole number up to {LARGEST_COST} on a GPU, got {value}")
            costs[name] = int(value)
        return cls(**costs)


class DevicePlanner:
    """Plans steps of at most so many rows into a workspace.

    Args:
        workspace: whose buffers take the work list; its capacity has to hold any step without sharing.
        max_rows: of the block table; at most `MAX_ROWS`.
        block_size: keys of a cache block.
        cost_model: when sharing pays, in whole numbers.
        max_keys_per_segment: see `make_work_list`.
        max_depth: of the prefix trees.

    Attributes:
        totals: [`TOTALS`] int64, on the device.

    Raises:
        ValueError: an argument has an impossible value; the message names it.
    """

    def __init__(
        self,
        workspace: TritonWorkspace,
        *,
        max_rows: int,
        block_size: int,
        cost_model: CostModel,
        max_keys_per_segment: int,
        max_depth: int = MAX_DEPTH,
    ) -> None:
        if not 1 <= max_rows <= MAX_ROWS:
            raise ValueError(f"max_rows must be from 1 to {MAX_ROWS}, got {max_rows}")
        for name, value in (("block_size", block_size), ("max_keys_per_segment", max_keys_per_segment)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 1 <= max_depth <= 8:
            raise ValueError(f"max_depth must be from 1 to 8, got {max_depth}")
        if workspace.capacity.segments < max_rows or workspace.capacity.slots < workspace.capacity.tokens:
            raise ValueError(
                f"the workspace must hold {max_rows} segments and {workspace.capacity.tokens} slots at least, got "
                f"{workspace.capacity.segments} and {workspace.capacity.slots}"
            )
        self.workspace = workspace
        self.block_size = block_size
        self.costs = DeviceCosts.of(cost_model)
        self.max_keys_per_segment = max_keys_per_segment
        self.max_depth = max_depth
        self.padded_rows = max(32, triton.next_power_of_2(max_rows))
        device = workspace.segments.device
        self._groups = torch.empty(len(_GROUP_ARRAYS), max_depth, self.padded_rows, dtype=torch.int32, device=device)
        self._sums = torch.empty(1 + max_depth + 1, max_depth, self.padded_rows, dtype=torch.int64, device=device)
        self._rows = torch.empty(len(_ROW_ARRAYS), self.padded_rows, dtype=torch.int32, device=device)
        nodes = self.padded_rows + 1
        self._nodes = torch.empty(len(_NODE_ARRAYS), nodes, dtype=torch.int32, device=device)
        self._segments = torch.empty(len(_SEGMENT_ARRAYS), 2 * self.padded_rows, dtype=torch.int32, device=device)
        self._members = torch.empty(2, max_depth * self.padded_rows, dtype=torch.int32, device=device)
        self.totals = torch.zeros(len(TOTALS), dtype=torch.int64, device=device)
        self._pieces = torch.empty(2, workspace.capacity.segments, dtype=torch.int32, device=device)

    def plan(self, block_table: Tensor, query_start: Tensor, seq_lens: Tensor, num_rows: int | None = None) -> None:
        """Load the workspace with this step.

        Args:
            block_table: [>= R, W] int32.
            query_start: [>= R + 1] int32, ascending; row r's query tokens are from entry r to entry r + 1.
            seq_lens: [>= R] int32; a row with none, or without query tokens, is padding.
            num_rows: R; by default as many as `seq_lens` has.
        """
        rows = len(seq_lens) if num_rows is None else num_rows
        if rows > self.padded_rows or rows > len(block_table):
            raise ValueError(f"num_rows is {rows}, more than the planner's {self.padded_rows} or the table has")
        for name, tensor in (("block_table", block_table), ("query_start", query_start), ("seq_lens", seq_lens)):
            if tensor.dtype != torch.int32 or tensor.device != self._rows.device or tensor.stride(-1) != 1:
                raise ValueError(f"{name} must be a contiguous int32 tensor on {self._rows.device}")
        step = (block_table, query_start, seq_lens)
        shape = (block_table.stride(0), block_table.shape[1], rows)
        costs = self.costs
        sizes: dict[str, Any] = {"ROWS": self.padded_rows, "DEPTHS": self.max_depth}
        for depth in range(self.max_depth):
            _launch(
                partition_kernel, (1,), *step, self._groups, self._sums, self._rows, *shape, depth,
                KEY_READ=costs.key_read, ROW_KEY=costs.row_key, BLOCK_SIZE=self.block_size, **sizes, num_warps=8,
            )  # fmt: skip
            _launch(
                extend_kernel, (self.padded_rows,), block_table, self._groups, self._rows, *shape, depth, **sizes,
                COMPARED=COMPARED_BLOCKS, num_warps=4,
            )  # fmt: skip
        work = self.workspace
        _launch(
            lower_kernel, (1,), query_start, seq_lens, self._groups, self._sums, self._rows, self._nodes,
            self._segments, self._members, self._pieces, work.segments, work.slot_token, work.slot_key_end,
            work.token_slot_start, work.token_slots, work.token_key_end, work.small_tiles, work.large_tiles,
            work.small_count, work.large_count, self.totals, rows, work.capacity.segments, work.capacity.slots,
            work.capacity.tokens,
            KEY_READ=costs.key_read, ROW_KEY=costs.row_key, SEGMENT=costs.segment, MERGE=costs.merge,
            MIN_KEYS=costs.min_keys, MAX_BLOCKS=max(self.max_keys_per_segment // self.block_size, 1),
            BLOCK_SIZE=self.block_size, **sizes, NODE_STEPS=(2 * self.padded_rows).bit_length(),
            PIECE_STEPS=work.capacity.segments.bit_length(),
            MEMBER_STEPS=(self.max_depth * self.padded_rows).bit_length(),
            HEADS_PER_KV_HEAD=work.num_heads // work.num_kv_heads, SMALL_ROWS=work.tiles.small.rows,
            LARGE_ROWS=work.tiles.large.rows, PIECE_CAPACITY=work.capacity.segments,
            MOST_SLOTS=MOST_SLOTS_OF_CUT_SEGMENT, num_warps=8,
        )  # fmt: skip


# The rows of `_groups`, `_rows`, `_nodes`, `_segments`.
_GROUP_ARRAYS = ("leader", "start", "end", "tokens", "tokens_before", "members_before", "members", "pays", "chosen")
G_LEADER, G_START, G_END, G_TOKENS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
G_TOKENS_BEFORE, G_MEMBERS_BEFORE, G_MEMBERS = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
G_PAYS, G_CHOSEN = tl.constexpr(7), tl.constexpr(8)  # chosen: where the segment begins, -1 for none
_ROW_ARRAYS = ("shareable", "previous", "block", "query_len", "pieces", "suffix", "own_segment")
R_SHAREABLE, R_PREVIOUS, R_BLOCK, R_QUERY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
R_PIECES, R_SUFFIX, R_OWN = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
_NODE_ARRAYS = ("start", "end", "leader", "depth", "tokens", "members")
N_START, N_END, N_LEADER, N_DEPTH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
N_TOKENS, N_MEMBERS = tl.constexpr(4), tl.constexpr(5)
_SEGMENT_ARRAYS = ("first_piece", "piece_blocks", "key_start", "key_end", "row", "tokens", "first_member", "members")
S_PIECE, S_BLOCKS, S_START, S_END = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
S_ROW, S_TOKENS, S_MEMBER, S_MEMBERS = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    kernel[grid](*arguments, **constants)


@triton.jit(do_not_specialize=["num_rows", "depth"])
def partition_kernel(  # type: ignore[no-untyped-def]
    p_table,
    p_query_start,
    p_seq_lens,
    p_groups,
    p_sums,
    p_rows,
    stride_table,
    width,
    num_rows,
    depth,
    KEY_READ: tl.constexpr,
    ROW_KEY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTHS: tl.constexpr,
):
    """Rows that were together so far and go on with the same block, and what each row and each group is of that."""
    o_row = tl.arange(0, ROWS)
    m_row = o_row < num_rows
    begin = tl.load(p_query_start + o_row, mask=m_row, other=0)
    query_len = tl.load(p_query_start + o_row + 1, mask=m_row, other=0) - begin
    seq_len = tl.load(p_seq_lens + o_row, mask=m_row, other=0)
    is_there = m_row & (query_len > 0) & (seq_len > 0)
    shareable = tl.where(is_there, tl.minimum((seq_len - query_len) // BLOCK_SIZE, width), 0)
    previous = tl.zeros([ROWS], dtype=tl.int32)
    position = tl.zeros([ROWS], dtype=tl.int32)
    is_going_on = shareable > 0
    if depth > 0:
        p_before = p_groups + (depth - 1) * ROWS
        previous = tl.load(p_before + G_LEADER * DEPTHS * ROWS + o_row)
        was_grouped = previous >= 0
        end = tl.load(p_before + G_END * DEPTHS * ROWS + previous, mask=was_grouped, other=0)
        position = tl.where(was_grouped, end, 0)
        is_going_on = was_grouped & (shareable > position)
    block = tl.load(p_table + o_row.to(tl.int64) * stride_table + position, mask=is_going_on, other=0)
    is_going_on = is_going_on & (block != 0)  # the null block is nobody's prefix
    block = tl.where(is_going_on, block, -1)
    tl.store(p_rows + R_SHAREABLE * ROWS + o_row, shareable)
    tl.store(p_rows + R_PREVIOUS * ROWS + o_row, previous)
    tl.store(p_rows + R_BLOCK * ROWS + o_row, block)
    tl.store(p_rows + R_QUERY * ROWS + o_row, query_len)
    tl.debug_barrier()

    leader = tl.full([ROWS], FAR, dtype=tl.int32)
    members = tl.zeros([ROWS], dtype=tl.int32)
    members_before = tl.zeros([ROWS], dtype=tl.int32)
    tokens = tl.zeros([ROWS], dtype=tl.int32)
    tokens_before = tl.zeros([ROWS], dtype=tl.int32)
    alone = tl.zeros([ROWS], dtype=tl.int64)
    for first in range(0, ROWS, COLUMNS):
        o_other = first + tl.arange(0, COLUMNS)
        other_previous = tl.load(p_rows + R_PREVIOUS * ROWS + o_other)
        other_block = tl.load(p_rows + R_BLOCK * ROWS + o_other)
        other_query = tl.load(p_rows + R_QUERY * ROWS + o_other)
        # [ROWS, COLUMNS]
        is_same = (previous[:, None] == other_previous[None, :]) & (block[:, None] == other_block[None, :])
        is_same = is_same & is_going_on[:, None]
        is_before = is_same & (o_other[None, :] < o_row[:, None])
        leader = tl.minimum(leader, tl.min(tl.where(is_same, o_other[None, :], FAR), axis=1))
        members += tl.sum(is_same.to(tl.int32), axis=1)
        members_before += tl.sum(is_before.to(tl.int32), axis=1)
        tokens += tl.sum(tl.where(is_same, other_query[None, :], 0), axis=1)
        tokens_before += tl.sum(tl.where(is_before, other_query[None, :], 0), axis=1)
        cost = tl.maximum(KEY_READ, other_query.to(tl.int64) * ROW_KEY)
        alone += tl.sum(tl.where(is_same, cost[None, :], 0), axis=1)
    is_grouped = is_going_on & (members > 1)
    p_here = p_groups + depth * ROWS + o_row
    tl.store(p_here + G_LEADER * DEPTHS * ROWS, tl.where(is_grouped, leader, -1))
    tl.store(p_here + G_START * DEPTHS * ROWS, position)
    tl.store(p_here + G_END * DEPTHS * ROWS, tl.full([ROWS], FAR, dtype=tl.int32))
    tl.store(p_here + G_TOKENS * DEPTHS * ROWS, tokens)
    tl.store(p_here + G_TOKENS_BEFORE * DEPTHS * ROWS, tokens_before)
    tl.store(p_here + G_MEMBERS_BEFORE * DEPTHS * ROWS, members_before)
    tl.store(p_here + G_MEMBERS * DEPTHS * ROWS, members)
    tl.store(p_sums + depth * ROWS + o_row, alone)


@triton.jit(do_not_specialize=["num_rows", "depth"])
def extend_kernel(  # type: ignore[no-untyped-def]
    p_table,
    p_groups,
    p_rows,
    stride_table,
    width,
    num_rows,
    depth,
    ROWS: tl.constexpr,
    DEPTHS: tl.constexpr,
    COMPARED: tl.constexpr,
):
    """One row: the block at which it first differs from its leader, or ends, lowers the end of its group."""
    i_row = tl.program_id(0)
    p_here = p_groups + depth * ROWS
    leader = tl.load(p_here + G_LEADER * DEPTHS * ROWS + i_row)
    if leader >= 0:
        limit = tl.load(p_rows + R_SHAREABLE * ROWS + i_row)
        position = tl.load(p_here + G_START * DEPTHS * ROWS + i_row) + 1
        end = limit
        while position < limit:
            o_block = position + tl.arange(0, COMPARED)
            m_block = o_block < limit
            mine = tl.load(p_table + i_row.to(tl.int64) * stride_table + o_block, mask=m_block, other=0)
            theirs = tl.load(p_table + leader.to(tl.int64) * stride_table + o_block, mask=m_block, other=0)
            is_end = m_block & ((mine != theirs) | (mine == 0))
            found = tl.min(tl.where(is_end, o_block, FAR), axis=0)
            end = tl.minimum(end, found)
            position = tl.where(found < FAR, limit, position + COMPARED)
        tl.atomic_min(p_here + G_END * DEPTHS * ROWS + leader, end)


@triton.jit
def _rightmost(p_values, x, count, m_x, STEPS: tl.constexpr, STRIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """For each x the last of ``count`` ascending values that is not above it; the first is not above any."""
    low = tl.zeros_like(x)
    for i in tl.static_range(STEPS):
        candidate = low + (1 << (STEPS - 1 - i))
        m_candidate = m_x & (candidate < count)
        value = tl.load(p_values + candidate * STRIDE, mask=m_candidate, other=FAR)
        low = tl.where(m_candidate & (value <= x), candidate, low)
    return low


@triton.jit
def _cdiv(x, y):  # type: ignore[no-untyped-def]
    return (x + y - 1) // y


@triton.jit(do_not_specialize=["num_rows"])
def lower_kernel(  # type: ignore[no-untyped-def]
    p_query_start,
    p_seq_lens,
    p_groups,
    p_sums,
    p_rows,
    p_nodes,
    p_of_segments,
    p_members,
    p_pieces,
    p_segments,
    p_slot_token,
    p_slot_key_end,
    p_token_slot_start,
    p_token_slots,
    p_token_key_end,
    p_small_tiles,
    p_large_tiles,
    p_num_small,
    p_num_large,
    p_totals,
    num_rows,
    most_pieces,
    most_slots,
    most_tokens,
    KEY_READ: tl.constexpr,
    ROW_KEY: tl.constexpr,
    SEGMENT: tl.constexpr,
    MERGE: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTHS: tl.constexpr,
    NODE_STEPS: tl.constexpr,
    PIECE_STEPS: tl.constexpr,
    MEMBER_STEPS: tl.constexpr,
    HEADS_PER_KV_HEAD: tl.constexpr,
    SMALL_ROWS: tl.constexpr,
    LARGE_ROWS: tl.constexpr,
    PIECE_CAPACITY: tl.constexpr,
    MOST_SLOTS: tl.constexpr,
):
    o_row = tl.arange(0, ROWS)
    m_row = o_row < num_rows
    LEVEL: tl.constexpr = DEPTHS * ROWS  # from one group array to the next
    NODES: tl.constexpr = ROWS + 1
    SEGMENTS: tl.constexpr = 2 * ROWS
    query_len = tl.load(p_rows + R_QUERY * ROWS + o_row)
    seq_len = tl.load(p_seq_lens + o_row, mask=m_row, other=0)
    is_own = m_row & (query_len > 0) & (seq_len > 0)

    # ---- which nodes pay: from the deepest up. Sums of children's gains stand behind `alone`, by where blocks begin.
    for i in tl.static_range(DEPTHS * (DEPTHS + 1)):
        tl.store(p_sums + LEVEL + i * ROWS + o_row, tl.zeros([ROWS], dtype=tl.int64))
    tl.debug_barrier()
    for depth in tl.static_range(DEPTHS - 1, -1, -1):
        p_here = p_groups + depth * ROWS + o_row
        leader = tl.load(p_here + G_LEADER * LEVEL)
        is_node = leader == o_row
        group_tokens = tl.load(p_here + G_TOKENS * LEVEL).to(tl.int64)
        alone = tl.load(p_sums + depth * ROWS + o_row)
        end = tl.load(p_here + G_END * LEVEL)
        per_block = (alone - tl.maximum(KEY_READ, group_tokens * ROW_KEY)) * BLOCK_SIZE
        p_children = p_sums + LEVEL + depth * (DEPTHS + 1) * ROWS + o_row
        rest = tl.load(p_children + (depth + 1) * ROWS) - (SEGMENT + group_tokens * MERGE)
        pays = tl.zeros([ROWS], dtype=tl.int32)
        for i in tl.static_range(depth + 1):
            start = tl.load(p_groups + G_START * LEVEL + i * ROWS + o_row)
            shared = per_block * (end - start) + rest
            skipped = tl.load(p_children + i * ROWS)
            is_worth_it = ((end - start) * BLOCK_SIZE >= MIN_KEYS) & (shared > skipped)
            pays = pays | (is_worth_it.to(tl.int32) << i)
            if depth > 0:
                parent = tl.load(p_groups + G_LEADER * LEVEL + (depth - 1) * ROWS + o_row)
                p_parent = p_sums + LEVEL + (depth - 1) * (DEPTHS + 1) * ROWS + i * ROWS
                gain = tl.where(is_worth_it, shared, skipped)
                tl.atomic_add(p_parent + parent, gain, mask=is_node & (parent >= 0))
        tl.store(p_here + G_PAYS * LEVEL, pays)
        tl.debug_barrier()

    # ---- which segments each row has part in, from the root down
    begins_at = tl.zeros([ROWS], dtype=tl.int32)  # the depth whose start the next segment begins at
    suffix = tl.zeros([ROWS], dtype=tl.int32)
    num_nodes = 0
    for depth in tl.static_range(DEPTHS):
        p_here = p_groups + depth * ROWS + o_row
        leader = tl.load(p_here + G_LEADER * LEVEL)
        is_member = leader >= 0
        pays = tl.load(p_groups + G_PAYS * LEVEL + depth * ROWS + leader, mask=is_member, other=0)
        end = tl.load(p_groups + G_END * LEVEL + depth * ROWS + leader, mask=is_member, other=0)
        start = tl.load(p_groups + G_START * LEVEL + begins_at * ROWS + o_row)
        is_chosen = is_member & (((pays >> begins_at) & 1) == 1)
        tl.store(p_here + G_CHOSEN * LEVEL, tl.where(is_chosen, start, -1))
        suffix = tl.where(is_chosen, end, suffix)
        begins_at = tl.where(is_chosen, depth + 1, begins_at)
        is_node = is_chosen & (leader == o_row)
        place = num_nodes + tl.cumsum(is_node.to(tl.int32), axis=0) - 1
        p_node = p_nodes + place
        tl.store(p_node + N_START * NODES, start, mask=is_node)
        tl.store(p_node + N_END * NODES, end, mask=is_node)
        tl.store(p_node + N_LEADER * NODES, o_row, mask=is_node)
        tl.store(p_node + N_DEPTH * NODES, tl.full([ROWS], depth, dtype=tl.int32), mask=is_node)
        tl.store(p_node + N_TOKENS * NODES, tl.load(p_here + G_TOKENS * LEVEL), mask=is_node)
        tl.store(p_node + N_MEMBERS * NODES, tl.load(p_here + G_MEMBERS * LEVEL), mask=is_node)
        num_nodes += tl.sum(is_node.to(tl.int32), axis=0)
    tl.debug_barrier()

    # ---- does all of it fit? Else nothing is shared, and nothing cut.
    m_node = o_row < num_nodes
    p_node = p_nodes + o_row
    node_start = tl.load(p_node + N_START * NODES, mask=m_node, other=0)
    node_blocks = tl.load(p_node + N_END * NODES, mask=m_node, other=0) - node_start
    node_leader = tl.load(p_node + N_LEADER * NODES, mask=m_node, other=0)
    node_depth = tl.load(p_node + N_DEPTH * NODES, mask=m_node, other=0)
    node_tokens = tl.load(p_node + N_TOKENS * NODES, mask=m_node, other=0)
    node_members = tl.load(p_node + N_MEMBERS * NODES, mask=m_node, other=0)
    node_piece_blocks, node_pieces = _cut(node_blocks, node_tokens, MAX_BLOCKS, MOST_SLOTS)
    node_pieces = tl.where(m_node, node_pieces, 0)
    own_blocks = _cdiv(seq_len - suffix * BLOCK_SIZE, BLOCK_SIZE)
    own_piece_blocks, own_pieces = _cut(own_blocks, query_len, MAX_BLOCKS, MOST_SLOTS)
    own_pieces = tl.where(is_own, own_pieces, 0)
    slots = tl.sum(node_pieces.to(tl.int64) * node_tokens, axis=0) + tl.sum(own_pieces.to(tl.int64) * query_len, axis=0)
    pieces = tl.sum(node_pieces, axis=0) + tl.sum(own_pieces, axis=0)
    fits = (pieces <= most_pieces) & (slots <= most_slots)
    num_fitting = tl.where(fits, ROWS, 0)  # rows that may share
    num_nodes = tl.where(fits, num_nodes, 0)
    m_node = o_row < num_nodes
    node_pieces = tl.where(m_node, node_pieces, 0)
    suffix = tl.where(fits, suffix, 0)
    own_blocks = _cdiv(seq_len - suffix * BLOCK_SIZE, BLOCK_SIZE)
    own_piece_blocks = tl.where(fits, own_piece_blocks, tl.maximum(own_blocks, 1))
    own_pieces = tl.where(fits, own_pieces, is_own.to(tl.int32))

    # ---- what is told of it, over all steps: see `TOTALS`
    num_sharing = tl.where(num_nodes > 0, 1, 0)
    is_eligible = tl.max((tl.load(p_groups + G_LEADER * LEVEL + o_row) >= 0).to(tl.int32), axis=0)
    saved = tl.where(m_node, (node_members - 1).to(tl.int64) * node_blocks * BLOCK_SIZE, 0)
    tl.store(p_totals, tl.load(p_totals) + is_eligible)
    tl.store(p_totals + 1, tl.load(p_totals + 1) + num_sharing)
    tl.store(p_totals + 2, tl.load(p_totals + 2) + tl.sum((suffix > 0).to(tl.int64), axis=0))
    tl.store(p_totals + 3, tl.load(p_totals + 3) + tl.sum((m_node & (node_start == 0)).to(tl.int64), axis=0))
    tl.store(p_totals + 4, tl.load(p_totals + 4) + tl.sum(saved, axis=0))

    # ---- segments in order: shared ones by where they begin and by their first row, then each row's own
    rank = tl.zeros([ROWS], dtype=tl.int32)
    for first in range(0, ROWS, COLUMNS):
        o_other = first + tl.arange(0, COLUMNS)
        m_other = o_other < num_nodes
        other_start = tl.load(p_nodes + N_START * NODES + o_other, mask=m_other, other=FAR)
        other_leader = tl.load(p_nodes + N_LEADER * NODES + o_other, mask=m_other, other=FAR)
        is_before = (other_start[None, :] < node_start[:, None]) | (
            (other_start[None, :] == node_start[:, None]) & (other_leader[None, :] < node_leader[:, None])
        )
        rank += tl.sum((is_before & m_other[None, :]).to(tl.int32), axis=1)
    p_segment = p_of_segments + rank
    tl.store(p_segment + S_PIECE * SEGMENTS, node_pieces, mask=m_node)  # their number; where they begin comes next
    tl.store(p_segment + S_BLOCKS * SEGMENTS, node_piece_blocks, mask=m_node)
    tl.store(p_segment + S_START * SEGMENTS, node_start * BLOCK_SIZE, mask=m_node)
    tl.store(p_segment + S_END * SEGMENTS, (node_start + node_blocks) * BLOCK_SIZE, mask=m_node)
    tl.store(p_segment + S_ROW * SEGMENTS, node_leader, mask=m_node)
    tl.store(p_segment + S_TOKENS * SEGMENTS, node_tokens, mask=m_node)
    tl.store(p_segment + S_MEMBERS * SEGMENTS, node_members, mask=m_node)
    # A node is found again by its depth and leader: its rank takes the place of what is not needed any more.
    for depth in tl.static_range(DEPTHS):
        tl.store(p_groups + G_PAYS * LEVEL + depth * ROWS + o_row, tl.full([ROWS], -1, dtype=tl.int32))
    tl.debug_barrier()
    tl.store(p_groups + G_PAYS * LEVEL + node_depth * ROWS + node_leader, rank, mask=m_node)
    tl.debug_barrier()
    sorted_pieces = tl.load(p_of_segments + S_PIECE * SEGMENTS + o_row, mask=m_node, other=0)
    sorted_members = tl.load(p_of_segments + S_MEMBERS * SEGMENTS + o_row, mask=m_node, other=0)
    tl.debug_barrier()
    tl.store(p_of_segments + S_PIECE * SEGMENTS + o_row, tl.cumsum(sorted_pieces, axis=0) - sorted_pieces, mask=m_node)
    tl.store(
        p_of_segments + S_MEMBER * SEGMENTS + o_row, tl.cumsum(sorted_members, axis=0) - sorted_members, mask=m_node
    )
    num_shared_pieces = tl.sum(sorted_pieces, axis=0)
    own_segment = num_nodes + tl.cumsum(is_own.to(tl.int32), axis=0) - 1
    p_segment = p_of_segments + own_segment
    tl.store(
        p_segment + S_PIECE * SEGMENTS, num_shared_pieces + tl.cumsum(own_pieces, axis=0) - own_pieces, mask=is_own
    )
    tl.store(p_segment + S_BLOCKS * SEGMENTS, own_piece_blocks, mask=is_own)
    tl.store(p_segment + S_START * SEGMENTS, suffix * BLOCK_SIZE, mask=is_own)
    tl.store(p_segment + S_END * SEGMENTS, seq_len, mask=is_own)
    tl.store(p_segment + S_ROW * SEGMENTS, o_row, mask=is_own)
    tl.store(p_segment + S_TOKENS * SEGMENTS, query_len, mask=is_own)
    num_segments = num_nodes + tl.sum(is_own.to(tl.int32), axis=0)
    num_pieces = num_shared_pieces + tl.sum(own_pieces, axis=0)
    tl.debug_barrier()

    # ---- members of shared segments by row, and how many pieces each row has before those of each depth, and its own
    before = tl.zeros([ROWS], dtype=tl.int32)
    for depth in tl.static_range(DEPTHS):
        p_here = p_groups + depth * ROWS + o_row
        leader = tl.load(p_here + G_LEADER * LEVEL)
        is_member = (leader >= 0) & (tl.load(p_here + G_CHOSEN * LEVEL) >= 0) & (o_row < num_fitting)
        segment = tl.load(p_groups + G_PAYS * LEVEL + depth * ROWS + leader, mask=is_member, other=0)
        place = tl.load(p_of_segments + S_MEMBER * SEGMENTS + segment, mask=is_member, other=0)
        place += tl.load(p_here + G_MEMBERS_BEFORE * LEVEL)
        tl.store(p_members + place, o_row, mask=is_member)
        tl.store(p_members + LEVEL + place, tl.load(p_here + G_TOKENS_BEFORE * LEVEL), mask=is_member)
        tl.store(p_here + G_CHOSEN * LEVEL, before)
        start = tl.load(p_of_segments + S_START * SEGMENTS + segment, mask=is_member, other=0)
        end = tl.load(p_of_segments + S_END * SEGMENTS + segment, mask=is_member, other=0)
        blocks = tl.load(p_of_segments + S_BLOCKS * SEGMENTS + segment, mask=is_member, other=1)
        before += tl.where(is_member, _cdiv(end - start, blocks * BLOCK_SIZE), 0)
    tl.store(p_rows + R_PIECES * ROWS + o_row, before)
    tl.store(p_rows + R_SUFFIX * ROWS + o_row, suffix)
    tl.store(p_rows + R_OWN * ROWS + o_row, tl.where(is_own, own_piece_blocks, 0))
    tl.debug_barrier()

    # ---- pieces, their slots and their tiles
    num_slots = 0
    num_small = 0
    num_large = 0
    for first in range(0, num_pieces, ROWS):
        piece = first + o_row
        m_piece = piece < num_pieces
        segment = _rightmost(p_of_segments + S_PIECE * SEGMENTS, piece, num_segments, m_piece, NODE_STEPS, 1)
        p_segment = p_of_segments + segment
        blocks = tl.load(p_segment + S_BLOCKS * SEGMENTS, mask=m_piece, other=1)
        part = piece - tl.load(p_segment + S_PIECE * SEGMENTS, mask=m_piece, other=0)
        end = tl.load(p_segment + S_END * SEGMENTS, mask=m_piece, other=0)
        start = tl.load(p_segment + S_START * SEGMENTS, mask=m_piece, other=0) + part * blocks * BLOCK_SIZE
        end = tl.minimum(start + blocks * BLOCK_SIZE, end)
        row = tl.load(p_segment + S_ROW * SEGMENTS, mask=m_piece, other=0)
        tokens = tl.load(p_segment + S_TOKENS * SEGMENTS, mask=m_piece, other=0)
        is_suffix = segment >= num_nodes
        computed = tl.load(p_seq_lens + row, mask=m_piece, other=0) - tl.load(
            p_rows + R_QUERY * ROWS + row, mask=m_piece, other=0
        )
        tokens = tl.where(is_suffix, tokens - tl.maximum(start - computed, 0), tokens)
        tokens = tl.where(m_piece, tokens, 0)
        slot_end = num_slots + tl.cumsum(tokens, axis=0)
        p_piece = p_segments + piece * 5
        tl.store(p_piece, row, mask=m_piece)
        tl.store(p_piece + 1, start, mask=m_piece)
        tl.store(p_piece + 2, end, mask=m_piece)
        tl.store(p_piece + 3, slot_end - tokens, mask=m_piece)
        tl.store(p_piece + 4, slot_end, mask=m_piece)
        tl.store(p_pieces + piece, segment, mask=m_piece)
        num_slots += tl.sum(tokens, axis=0)
        rows = tokens * HEADS_PER_KV_HEAD
        is_small = m_piece & (rows > 0) & (rows <= SMALL_ROWS)
        large = tl.where(m_piece & (rows > SMALL_ROWS), _cdiv(rows, LARGE_ROWS), 0)
        p_tile = p_small_tiles + 2 * (num_small + tl.cumsum(is_small.to(tl.int32), axis=0) - 1)
        tl.store(p_tile, piece, mask=is_small)
        tl.store(p_tile + 1, tl.zeros_like(piece), mask=is_small)
        tl.store(p_pieces + PIECE_CAPACITY + piece, num_large + tl.cumsum(large, axis=0) - large, mask=m_piece)
        num_small += tl.sum(is_small.to(tl.int32), axis=0)
        num_large += tl.sum(large, axis=0)
    tl.store(p_num_small, num_small)
    tl.store(p_num_large, num_large)
    tl.debug_barrier()
    for first in range(0, num_large, ROWS):
        tile = first + o_row
        m_tile = tile < num_large
        piece = _rightmost(p_pieces + PIECE_CAPACITY, tile, num_pieces, m_tile, PIECE_STEPS, 1)
        begin = tl.load(p_pieces + PIECE_CAPACITY + piece, mask=m_tile, other=0)
        tl.store(p_large_tiles + 2 * tile, piece, mask=m_tile)
        tl.store(p_large_tiles + 2 * tile + 1, (tile - begin) * LARGE_ROWS, mask=m_tile)

    # ---- how many slots each token has
    last_token = tl.load(p_query_start + num_rows)
    num_told = 0
    for first in range(0, most_tokens, ROWS):
        token = first + o_row
        m_token = token < last_token
        row = _rightmost(p_query_start, token, num_rows, m_token, NODE_STEPS, 1)
        in_row = token - tl.load(p_query_start + row, mask=m_token, other=0)
        length = tl.load(p_rows + R_QUERY * ROWS + row, mask=m_token, other=0)
        keys = tl.load(p_seq_lens + row, mask=m_token, other=0)
        blocks = tl.load(p_rows + R_OWN * ROWS + row, mask=m_token, other=0)
        own_start = tl.load(p_rows + R_SUFFIX * ROWS + row, mask=m_token, other=0) * BLOCK_SIZE
        last_key = keys - length + in_row
        seen = (last_key - own_start) // tl.maximum(blocks * BLOCK_SIZE, 1) + 1
        count = seen + tl.load(p_rows + R_PIECES * ROWS + row, mask=m_token, other=0)
        count = tl.where(m_token & (blocks > 0), count, 0)
        place = num_told + tl.cumsum(count, axis=0) - count
        tl.store(p_token_slot_start + token, place, mask=token < most_tokens)
        is_told = m_token & (in_row < length) & (keys > 0)
        tl.store(p_token_key_end + token, tl.where(is_told, last_key + 1, 0), mask=token < most_tokens)
        num_told += tl.sum(count, axis=0)
    tl.store(p_token_slot_start + most_tokens, num_told)
    tl.debug_barrier()

    # ---- the slots: whose they are, how far they see, and where they stand among their token's
    for first in range(0, num_slots, ROWS):
        slot = first + o_row
        m_slot = slot < num_slots
        piece = _rightmost(p_segments + 3, slot, num_pieces, m_slot, PIECE_STEPS, 5)
        within = slot - tl.load(p_segments + piece * 5 + 3, mask=m_slot, other=0)
        start = tl.load(p_segments + piece * 5 + 1, mask=m_slot, other=0)
        end = tl.load(p_segments + piece * 5 + 2, mask=m_slot, other=0)
        segment = tl.load(p_pieces + piece, mask=m_slot, other=0)
        part = piece - tl.load(p_of_segments + S_PIECE * SEGMENTS + segment, mask=m_slot, other=0)
        is_shared = m_slot & (segment < num_nodes)
        first_member = tl.load(p_of_segments + S_MEMBER * SEGMENTS + segment, mask=is_shared, other=0)
        num_members = tl.load(p_of_segments + S_MEMBERS * SEGMENTS + segment, mask=is_shared, other=0)
        member = first_member + _rightmost(
            p_members + LEVEL + first_member, within, num_members, is_shared, MEMBER_STEPS, 1
        )
        row = tl.load(p_of_segments + S_ROW * SEGMENTS + segment, mask=m_slot, other=0)
        row = tl.where(is_shared, tl.load(p_members + member, mask=is_shared, other=0), row)
        computed = tl.load(p_seq_lens + row, mask=m_slot, other=0) - tl.load(
            p_rows + R_QUERY * ROWS + row, mask=m_slot, other=0
        )
        in_row = within + tl.maximum(start - computed, 0)
        in_row = tl.where(is_shared, within - tl.load(p_members + LEVEL + member, mask=is_shared, other=0), in_row)
        token = tl.load(p_query_start + row, mask=m_slot, other=0) + in_row
        tl.store(p_slot_token + slot, token, mask=m_slot)
        tl.store(p_slot_key_end + slot, tl.minimum(end, computed + in_row + 1), mask=m_slot)
        # Of a shared segment, the pieces before it are those of the depths above; its depth is where it was chosen.
        leader = tl.load(p_of_segments + S_ROW * SEGMENTS + segment, mask=is_shared, other=0)
        earlier = tl.load(p_rows + R_PIECES * ROWS + row, mask=m_slot, other=0)
        for depth in tl.static_range(DEPTHS):
            p_depth = p_groups + depth * ROWS
            is_here = is_shared & (tl.load(p_depth + G_LEADER * LEVEL + row, mask=is_shared, other=-1) == leader)
            is_here = is_here & (tl.load(p_depth + G_PAYS * LEVEL + leader, mask=is_here, other=-1) == segment)
            earlier = tl.where(is_here, tl.load(p_depth + G_CHOSEN * LEVEL + row, mask=is_here, other=0), earlier)
        place = tl.load(p_token_slot_start + token, mask=m_slot, other=0) + earlier + part
        tl.store(p_token_slots + place, slot, mask=m_slot)


@triton.jit
def _cut(blocks, tokens, MAX_BLOCKS: tl.constexpr, MOST_SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Blocks of a piece, and number of pieces, as `work_list._pieces`."""
    most = tl.maximum(MOST_SLOTS // tl.maximum(tokens, 1), 1)
    wanted = tl.minimum(tl.maximum(_cdiv(blocks, MAX_BLOCKS), 1), most)
    piece_blocks = tl.maximum(_cdiv(blocks, wanted), 1)
    return piece_blocks, _cdiv(blocks, piece_blocks)

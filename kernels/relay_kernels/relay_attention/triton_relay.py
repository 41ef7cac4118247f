"""Relay attention for a GPU in Triton: one attention kernel over the work list's segments, one kernel that merges.

Legend: T query tokens, N query heads, K key heads, G = N // K query heads per key head, H head size, R block-table rows
of W blocks, B cache blocks of S tokens, P slots of the work list.

What a layer does beyond plain attention is `LayerFeatures`: a sliding window, a soft cap, sinks, an 8-bit cache.

The rows of an attention tile are the (slot, query head) pairs of one segment and one key head: a shared segment packs
the tokens of all its requests over one reading of the keys, a decoding request's suffix fills a small tile with its G
heads. Partial results and log-sum-exps stay in float32 until they are merged. The softmax and the partial log-sum-exps
are in base 2; what leaves this module is natural.

Nothing that a launch depends on changes with the grouping: the grid is as large as the GPU, the work list lies in
buffers of fixed capacity (`TritonWorkspace`), and the kernels read the counts from there. One captured CUDA graph
therefore serves every grouping; load the next work list into the workspace and replay.

Importing this module imports triton, which a CPU installation does not have. TRITON_INTERPRET=1 counts if it is set
before that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from relay_kernels.relay_attention.work_list import Int64Array, WorkList, expand

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MIN_HEAD_SIZE = 16  # tl.dot multiplies no smaller blocks
MAX_HEAD_SIZE = 256
SEGMENT_COLUMNS = 5
TILE_COLUMNS = 2
NUM_COUNTS = 2
PROGRAMS_PER_MULTIPROCESSOR = 2
INTERPRETED_PROGRAMS = 3
HEADS_PER_MERGE = 8

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, eq=False)
class LayerFeatures:
    """What a layer does beyond plain causal attention; the defaults are that.

    Attributes:
        window: how many keys a token sees, itself the last; None for all of them.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)`` (Gemma 2, arXiv 2408.00118); 0 for none.
        sinks_N: [N] float32, for each query head the score of a key that has no value (gpt-oss); it takes part in the
            softmax of each token once.
        key_scale, value_scale: what keys and values of an 8-bit cache are to be multiplied by.
    """

    window: int | None = None
    soft_cap: float = 0.0
    sinks_N: Tensor | None = None  # noqa: N815
    key_scale: float = 1.0
    value_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 or None, got {self.window}")
        if not (math.isfinite(self.soft_cap) and self.soft_cap >= 0):
            raise ValueError(f"soft_cap must be finite and not negative, got {self.soft_cap}")
        for name in ("key_scale", "value_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value}")


PLAIN = LayerFeatures()


@dataclass(frozen=True)
class Tile:
    """One attention tile: rows of queries, keys per step of its loop, and how Triton compiles it."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """A segment runs in small tiles if all of its rows fit in one, else in large ones."""

    small: Tile
    large: Tile


def default_tiles(head_size: int, dtype: torch.dtype) -> Tiles:
    """Tiles whose queries and two stages of keys and values fit in 100 KiB of shared memory. Not tuned for any GPU."""
    row_bytes = triton.next_power_of_2(head_size) * dtype.itemsize
    keys = max(16, min(64, 16384 // row_bytes))
    rows = 64 if row_bytes <= 512 else 32
    return Tiles(small=Tile(16, keys, num_warps=4, num_stages=2), large=Tile(rows, keys, num_warps=4, num_stages=2))


@dataclass(frozen=True)
class Capacity:
    """The largest work list a workspace can hold."""

    segments: int
    slots: int
    tokens: int

    @classmethod
    def of(cls, work_list: WorkList) -> Capacity:
        return cls(len(work_list.segments), work_list.num_slots, work_list.num_tokens)


class TritonWorkspace:
    """Device buffers of fixed capacity: a work list, its tiles, and the partial results of its slots."""

    def __init__(
        self,
        capacity: Capacity,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        tiles: Tiles | None = None,
    ) -> None:
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        if not MIN_HEAD_SIZE <= head_size <= MAX_HEAD_SIZE:
            raise ValueError(f"head_size must be between {MIN_HEAD_SIZE} and {MAX_HEAD_SIZE}, got {head_size}")
        if dtype not in KERNEL_DTYPES:
            raise ValueError(f"dtype must be one of {KERNEL_DTYPES}, got {dtype}")
        self.capacity = capacity
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.dtype = dtype
        self.tiles = tiles or default_tiles(head_size, dtype)
        self.num_programs = _num_programs(device)
        self._allocate(device)

    def _allocate(self, device: torch.device) -> None:
        """All integers stand in one buffer, so that loading a work list is one copy."""
        heads_per_kv_head = self.num_heads // self.num_kv_heads
        max_large_tiles = self.capacity.segments + self.capacity.slots * heads_per_kv_head // self.tiles.large.rows
        lengths = {
            "counts": NUM_COUNTS,
            "segments": self.capacity.segments * SEGMENT_COLUMNS,
            "slot_token": self.capacity.slots,
            "slot_key_end": self.capacity.slots,
            "token_slot_start": self.capacity.tokens + 1,
            "token_slots": self.capacity.slots,
            "token_key_end": self.capacity.tokens,
            "small_tiles": self.capacity.segments * TILE_COLUMNS,
            "large_tiles": max_large_tiles * TILE_COLUMNS,
        }
        total = sum(lengths.values())
        self._host = np.zeros(total, dtype=np.int32)
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        offsets = np.cumsum([0, *lengths.values()]).tolist()
        spans = dict(zip(lengths, pairwise(offsets), strict=True))
        self._host_views = {name: self._host[begin:end] for name, (begin, end) in spans.items()}
        views = {name: self._device[begin:end] for name, (begin, end) in spans.items()}
        self.small_count, self.large_count = views["counts"][:1], views["counts"][1:]
        self.segments = views["segments"]
        self.slot_token = views["slot_token"]
        self.slot_key_end = views["slot_key_end"]
        self.token_slot_start = views["token_slot_start"]
        self.token_slots = views["token_slots"]
        self.token_key_end = views["token_key_end"]
        self.small_tiles, self.large_tiles = views["small_tiles"], views["large_tiles"]
        partials = (self.capacity.slots, self.num_heads)
        self.partial_out_PNH = torch.empty((*partials, self.head_size), dtype=torch.float32, device=device)
        self.partial_lse_PN = torch.empty(partials, dtype=torch.float32, device=device)

    def load(self, work_list: WorkList) -> None:
        """Replace the work list in place; tokens beyond its own get no slots."""
        needed = Capacity.of(work_list)
        for name in ("segments", "slots", "tokens"):
            if getattr(needed, name) > getattr(self.capacity, name):
                raise ValueError(
                    f"work_list has {getattr(needed, name)} {name}, more than the capacity of "
                    f"{getattr(self.capacity, name)}: make the workspace larger or the plan coarser"
                )
        small_tiles, large_tiles = self._tiles_of(work_list)
        starts = self._host_views["token_slot_start"]
        starts[: needed.tokens + 1] = work_list.token_slot_start
        starts[needed.tokens + 1 :] = needed.slots
        self._host_views["token_key_end"][needed.tokens :] = 0
        self._host_views["counts"][:] = (len(small_tiles), len(large_tiles))
        for name, array in (
            ("segments", work_list.segments),
            ("slot_token", work_list.slot_token),
            ("slot_key_end", work_list.slot_key_end),
            ("token_slots", work_list.token_slots),
            ("token_key_end", work_list.token_key_end),
            ("small_tiles", small_tiles),
            ("large_tiles", large_tiles),
        ):
            self._host_views[name][: array.size] = array.ravel()
        self._device.copy_(torch.from_numpy(self._host))

    def _tiles_of(self, work_list: WorkList) -> tuple[Int64Array, Int64Array]:
        """(segment, first row) of every small and of every large tile."""
        slots = (work_list.segments[:, 4] - work_list.segments[:, 3]).astype(np.int64)
        num_rows = slots * (self.num_heads // self.num_kv_heads)
        is_small = num_rows <= self.tiles.small.rows
        small = np.flatnonzero(is_small & (num_rows > 0))
        large = np.flatnonzero(~is_small)
        owner, place = expand(-(-num_rows[large] // self.tiles.large.rows))
        return (
            np.stack((small, np.zeros_like(small)), 1),
            np.stack((large[owner], place * self.tiles.large.rows), 1),
        )


def relay_attention_triton(
    query_TNH: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    work: WorkList | TritonWorkspace,
    *,
    scale: float,
    features: LayerFeatures = PLAIN,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention of one step over a paged cache, as its work list says.

    Args:
        query_TNH: queries; tokens the work list does not know are padding, and get zeros.
        key_cache: [B, S, K, H], of any strides but a contiguous head: a view of [B, K, S, H] serves as well. Of the
            dtype of the queries, or one of `FP8_DTYPES`.
        value_cache: like `key_cache`.
        block_table: [R, W] int32, on the device.
        work: a work list, or a workspace loaded with one; only the latter gives launches that a CUDA graph can hold.
        scale: factor of the scores.
        features: of the layer.
        out: [T, N, H] result, made if None.
        lse: [T, N] float32, filled with natural log-sum-exps if given, of keys and sinks; -inf for a token without
            slots.

    Raises:
        ValueError: an argument has the wrong shape or dtype; the message names it.
    """
    out = torch.empty_like(query_TNH) if out is None else out
    _check_tensors(query_TNH, key_cache, value_cache, block_table, out, lse, features)
    workspace = work if isinstance(work, TritonWorkspace) else _workspace_for(work, query_TNH, key_cache)
    _check_workspace(workspace, query_TNH, key_cache)
    with torch.cuda.device_of(query_TNH):
        small, large = workspace.tiles.small, workspace.tiles.large
        _attend(query_TNH, key_cache, value_cache, block_table, workspace, scale, features, large, is_large=True)
        _attend(query_TNH, key_cache, value_cache, block_table, workspace, scale, features, small, is_large=False)
        _merge(workspace, out, lse, features)
    return out


def _attend(
    query_TNH: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    workspace: TritonWorkspace,
    scale: float,
    features: LayerFeatures,
    tile: Tile,
    *,
    is_large: bool,
) -> None:
    _launch(
        attend_kernel,
        (workspace.num_programs,),
        query_TNH,
        key_cache,
        value_cache,
        block_table,
        workspace.segments,
        workspace.slot_token,
        workspace.slot_key_end,
        workspace.token_key_end,
        workspace.large_tiles if is_large else workspace.small_tiles,
        workspace.large_count if is_large else workspace.small_count,
        workspace.partial_out_PNH,
        workspace.partial_lse_PN,
        scale * features.key_scale * (1.0 if features.soft_cap else LOG2_E.value),
        features.soft_cap,
        features.value_scale,
        features.window or 0,
        *query_TNH.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        block_table.stride(0),
        NUM_KV_HEADS=workspace.num_kv_heads,
        HEADS_PER_KV_HEAD=workspace.num_heads // workspace.num_kv_heads,
        HEAD_SIZE=workspace.head_size,
        PADDED_HEAD_SIZE=triton.next_power_of_2(workspace.head_size),
        CACHE_BLOCK_SIZE=key_cache.shape[1],
        TILE_ROWS=tile.rows,
        TILE_KEYS=tile.keys,
        HAS_WINDOW=features.window is not None,
        HAS_SOFT_CAP=features.soft_cap > 0,
        HAS_FP8_CACHE=key_cache.dtype in FP8_DTYPES,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _merge(workspace: TritonWorkspace, out: Tensor, lse: Tensor | None, features: LayerFeatures) -> None:
    num_tokens, num_heads, head_size = out.shape
    if num_tokens == 0:
        return
    _launch(
        merge_kernel,
        (num_tokens, triton.cdiv(num_heads, HEADS_PER_MERGE)),
        workspace.partial_out_PNH,
        workspace.partial_lse_PN,
        workspace.token_slot_start,
        workspace.token_slots,
        workspace.partial_lse_PN if features.sinks_N is None else features.sinks_N,
        out,
        workspace.partial_lse_PN if lse is None else lse,
        *out.stride()[:2],
        0 if lse is None else lse.stride(0),
        NUM_HEADS=num_heads,
        HEAD_SIZE=head_size,
        PADDED_HEAD_SIZE=triton.next_power_of_2(head_size),
        TILE_HEADS=HEADS_PER_MERGE,
        WANTS_LSE=lse is not None,
        HAS_SINKS=features.sinks_N is not None,
        num_warps=4,
    )


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    kernel[grid](*arguments, **constants)


@triton.jit
def attend_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations as its own
    p_query,  # [T, N, H]
    p_key,  # [B, S, K, H]
    p_value,  # [B, S, K, H]
    p_block_table,  # [R, W]
    p_segments,  # [segments, 5]
    p_slot_token,  # [P]
    p_slot_key_end,  # [P]
    p_token_key_end,  # [T]
    p_tiles,  # [tiles, 2]: segment, first row
    p_num_tiles,  # [1]
    p_partial_out,  # [P, N, H] float32
    p_partial_lse,  # [P, N] float32, base 2
    scale,  # of scores, in base 2 unless they are capped first
    soft_cap,
    value_scale,
    window,
    stride_query_t,
    stride_query_n,
    stride_key_b,
    stride_key_s,
    stride_key_k,
    stride_value_b,
    stride_value_s,
    stride_value_k,
    stride_table_r,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_PER_KV_HEAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD_SIZE: tl.constexpr,
    CACHE_BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_FP8_CACHE: tl.constexpr,
):
    """Each program takes every num_programs-th (tile, key head) and writes the partial results of its rows."""
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * HEADS_PER_KV_HEAD
    num_items = tl.load(p_num_tiles) * NUM_KV_HEADS
    o_head = tl.arange(0, PADDED_HEAD_SIZE)
    m_head = o_head < HEAD_SIZE
    for i_item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        i_kv_head = tl.cast(i_item % NUM_KV_HEADS, tl.int64)
        p_tile = p_tiles + (i_item // NUM_KV_HEADS) * 2
        p_segment = p_segments + tl.load(p_tile).to(tl.int64) * 5
        i_table_row = tl.load(p_segment).to(tl.int64)
        key_start = tl.load(p_segment + 1)
        key_end = tl.load(p_segment + 2)
        slot_begin = tl.load(p_segment + 3)
        slot_end = tl.load(p_segment + 4)

        o_row = tl.load(p_tile + 1) + tl.arange(0, TILE_ROWS)
        m_row = o_row < (slot_end - slot_begin) * HEADS_PER_KV_HEAD
        i_slot = (slot_begin + o_row // HEADS_PER_KV_HEAD).to(tl.int64)
        i_head = i_kv_head * HEADS_PER_KV_HEAD + o_row % HEADS_PER_KV_HEAD
        # [TILE_ROWS]
        i_token = tl.load(p_slot_token + i_slot, mask=m_row, other=0).to(tl.int64)
        # [TILE_ROWS]; a row past the end of the segment sees the first key, so that its softmax is finite.
        row_key_end = tl.load(p_slot_key_end + i_slot, mask=m_row, other=0)
        row_key_end = tl.where(m_row, row_key_end, key_start + 1)
        # [TILE_ROWS, PADDED_HEAD_SIZE]
        b_query = tl.load(
            p_query + (i_token * stride_query_t + i_head * stride_query_n)[:, None] + o_head[None, :],
            mask=m_row[:, None] & m_head[None, :],
            other=0.0,
        )

        b_max = tl.full([TILE_ROWS], float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros([TILE_ROWS], dtype=tl.float32)
        b_out = tl.zeros([TILE_ROWS, PADDED_HEAD_SIZE], dtype=tl.float32)
        # No row sees anything past the last of the rows' ends.
        tile_key_end = tl.minimum(key_end, tl.max(row_key_end, axis=0))
        if HAS_WINDOW:
            # [TILE_ROWS]; of a shared segment a row may see nothing at all.
            row_key_begin = tl.load(p_token_key_end + i_token, mask=m_row, other=0) - window
            first_key = tl.min(tl.where(m_row, row_key_begin, tile_key_end), axis=0)
            key_start += tl.maximum(first_key - key_start, 0) // TILE_KEYS * TILE_KEYS
        for start in range(key_start, tile_key_end, TILE_KEYS):
            position = start + tl.arange(0, TILE_KEYS)
            m_key = position < tile_key_end
            # [TILE_KEYS]
            i_block = tl.load(
                p_block_table + i_table_row * stride_table_r + position // CACHE_BLOCK_SIZE, mask=m_key, other=0
            ).to(tl.int64)
            o_in_block = (position % CACHE_BLOCK_SIZE).to(tl.int64)
            o_key = i_block * stride_key_b + o_in_block * stride_key_s + i_kv_head * stride_key_k
            # [PADDED_HEAD_SIZE, TILE_KEYS]
            b_key = tl.load(p_key + o_key[None, :] + o_head[:, None], mask=m_key[None, :] & m_head[:, None], other=0.0)
            if HAS_FP8_CACHE:
                b_key = b_key.to(b_query.dtype)
            # [TILE_ROWS, TILE_KEYS]
            b_score = tl.dot(b_query, b_key, input_precision="ieee") * scale
            if HAS_SOFT_CAP:
                # The hyperbolic tangent, from the sigmoid of twice as much.
                b_score = (2.0 * tl.sigmoid(2.0 * b_score / soft_cap) - 1.0) * soft_cap * LOG2_E
            m_score = position[None, :] < row_key_end[:, None]
            if HAS_WINDOW:
                m_score = m_score & (position[None, :] >= row_key_begin[:, None])
            b_score = tl.where(m_score, b_score, float("-inf"))
            b_new_max = tl.maximum(b_max, tl.max(b_score, axis=1))
            # Without a window every row sees the segment's first key: its maximum is finite from the first step on.
            b_shift = _finite(b_new_max) if HAS_WINDOW else b_new_max
            b_decay = tl.exp2(b_max - b_shift)
            b_weight = tl.exp2(b_score - b_shift[:, None])
            b_sum = b_sum * b_decay + tl.sum(b_weight, axis=1)
            o_value = i_block * stride_value_b + o_in_block * stride_value_s + i_kv_head * stride_value_k
            # [TILE_KEYS, PADDED_HEAD_SIZE]
            b_value = tl.load(
                p_value + o_value[:, None] + o_head[None, :], mask=m_key[:, None] & m_head[None, :], other=0.0
            )
            if HAS_FP8_CACHE:
                b_value = b_value.to(b_query.dtype)
            b_out = b_out * b_decay[:, None]
            b_out += tl.dot(b_weight.to(b_value.dtype), b_value, input_precision="ieee")
            b_max = b_new_max

        if HAS_WINDOW:
            b_sum = tl.where(b_max == float("-inf"), 1.0, b_sum)  # saw nothing: nothing, with nothing's weight
        if HAS_FP8_CACHE:
            b_out = b_out * value_scale
        o_partial = i_slot * NUM_HEADS + i_head
        tl.store(
            p_partial_out + o_partial[:, None] * HEAD_SIZE + o_head[None, :],
            b_out / b_sum[:, None],
            mask=m_row[:, None] & m_head[None, :],
        )
        tl.store(p_partial_lse + o_partial, b_max + tl.log2(b_sum), mask=m_row)


@triton.jit
def merge_kernel(  # type: ignore[no-untyped-def]  # Triton reads annotations as its own
    p_partial_out,  # [P, N, H] float32
    p_partial_lse,  # [P, N] float32, base 2
    p_token_slot_start,  # [T + 1]
    p_token_slots,  # [P]
    p_sinks,  # [N] float32, natural; untouched unless HAS_SINKS
    p_out,  # [T, N, H]
    p_lse,  # [T, N] float32, natural; untouched unless WANTS_LSE
    stride_out_t,
    stride_out_n,
    stride_lse_t,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD_SIZE: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    WANTS_LSE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One token and TILE_HEADS heads: the mean of its partial results, weighted by the exponentials of their sums."""
    i_token = tl.program_id(0).to(tl.int64)
    i_head = (tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)).to(tl.int64)
    o_head = tl.arange(0, PADDED_HEAD_SIZE)
    m_n = i_head < NUM_HEADS
    m_nh = m_n[:, None] & (o_head < HEAD_SIZE)[None, :]
    begin = tl.load(p_token_slot_start + i_token)
    end = tl.load(p_token_slot_start + i_token + 1)

    b_max = tl.full([TILE_HEADS], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([TILE_HEADS], dtype=tl.float32)
    if HAS_SINKS:
        # A sink is one more key, whose value is zero.
        b_max = tl.load(p_sinks + i_head, mask=m_n, other=0.0).to(tl.float32) * LOG2_E
        b_sum = tl.where(b_max == float("-inf"), 0.0, 1.0)
    b_out = tl.zeros([TILE_HEADS, PADDED_HEAD_SIZE], dtype=tl.float32)
    for i in range(begin, end):
        o_partial = tl.load(p_token_slots + i).to(tl.int64) * NUM_HEADS + i_head
        # [TILE_HEADS]; -inf where a token sees nothing of a segment, for the window before it.
        b_lse = tl.load(p_partial_lse + o_partial, mask=m_n, other=0.0)
        # [TILE_HEADS, PADDED_HEAD_SIZE]
        b_partial = tl.load(p_partial_out + o_partial[:, None] * HEAD_SIZE + o_head[None, :], mask=m_nh, other=0.0)
        b_new_max = tl.maximum(b_max, b_lse)
        b_shift = _finite(b_new_max)
        b_decay = tl.exp2(b_max - b_shift)
        b_weight = tl.exp2(b_lse - b_shift)
        b_out = b_out * b_decay[:, None] + b_partial * b_weight[:, None]
        b_sum = b_sum * b_decay + b_weight
        b_max = b_new_max

    has_slots = end > begin
    b_divisor = tl.where(has_slots, b_sum, 1.0)
    tl.store(
        p_out + i_token * stride_out_t + i_head[:, None] * stride_out_n + o_head[None, :],
        (b_out / b_divisor[:, None]).to(p_out.dtype.element_ty),
        mask=m_nh,
    )
    if WANTS_LSE:
        b_lse = tl.where(has_slots, (b_max + tl.log2(b_divisor)) * LN_2, float("-inf"))
        tl.store(p_lse + i_token * stride_lse_t + i_head, b_lse, mask=m_n)


@triton.jit
def _finite(b_max):  # type: ignore[no-untyped-def]
    """Zero where nothing was seen yet, so that the weight of nothing is zero and not NaN."""
    return tl.where(b_max == float("-inf"), 0.0, b_max)


def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return PROGRAMS_PER_MULTIPROCESSOR * int(torch.cuda.get_device_properties(device).multi_processor_count)


def _workspace_for(work_list: WorkList, query_TNH: Tensor, key_cache: Tensor) -> TritonWorkspace:
    capacity = Capacity(len(work_list.segments), work_list.num_slots, max(len(query_TNH), work_list.num_tokens))
    workspace = TritonWorkspace(
        capacity,
        num_heads=query_TNH.shape[1],
        num_kv_heads=key_cache.shape[2],
        head_size=query_TNH.shape[2],
        dtype=query_TNH.dtype,
        device=query_TNH.device,
    )
    workspace.load(work_list)
    return workspace


def _check_tensors(
    query_TNH: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    out: Tensor,
    lse: Tensor | None,
    features: LayerFeatures,
) -> None:
    if query_TNH.ndim != 3:
        raise ValueError(f"query_TNH must have three dimensions, got shape {tuple(query_TNH.shape)}")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.ndim != 4 or cache.shape != key_cache.shape or cache.shape[3] != query_TNH.shape[2]:
            raise ValueError(
                f"{name} must have shape [blocks, block size, key heads, {query_TNH.shape[2]}], the same for keys and "
                f"values, got {tuple(cache.shape)}"
            )
        if cache.dtype != key_cache.dtype or cache.dtype not in (query_TNH.dtype, *FP8_DTYPES):
            raise ValueError(
                f"{name} must have the dtype of query_TNH, {query_TNH.dtype}, or one of {FP8_DTYPES}, the same for "
                f"keys and values, got {cache.dtype}"
            )
    if key_cache.dtype not in FP8_DTYPES and (features.key_scale, features.value_scale) != (1.0, 1.0):
        raise ValueError(
            f"key_scale and value_scale are those of an 8-bit cache, got {features.key_scale} and "
            f"{features.value_scale} with a cache of {key_cache.dtype}"
        )
    sinks_N = features.sinks_N
    if sinks_N is not None and (sinks_N.shape != query_TNH.shape[1:2] or sinks_N.dtype != torch.float32):
        raise ValueError(
            f"sinks_N must be a float32 tensor of shape {tuple(query_TNH.shape[1:2])}, got shape "
            f"{tuple(sinks_N.shape)} and dtype {sinks_N.dtype}"
        )
    if block_table.ndim != 2 or block_table.dtype != torch.int32:
        raise ValueError(
            f"block_table must be a two-dimensional int32 tensor, got shape {tuple(block_table.shape)} and dtype "
            f"{block_table.dtype}"
        )
    if out.shape != query_TNH.shape:
        raise ValueError(f"out must have the shape of query_TNH, {tuple(query_TNH.shape)}, got {tuple(out.shape)}")
    if lse is not None and (lse.shape != query_TNH.shape[:2] or lse.dtype != torch.float32):
        raise ValueError(
            f"lse must be a float32 tensor of shape {tuple(query_TNH.shape[:2])}, got shape {tuple(lse.shape)} and "
            f"dtype {lse.dtype}"
        )
    named = {"query_TNH": query_TNH, "key_cache": key_cache, "value_cache": value_cache, "out": out, "lse": lse}
    for name, tensor in (*named.items(), ("sinks_N", sinks_N), ("block_table", block_table)):
        if tensor is None:
            continue
        if tensor.device != query_TNH.device:
            raise ValueError(f"{name} must be on the device of query_TNH, {query_TNH.device}, got {tensor.device}")
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got stride {tensor.stride(-1)}")


def _check_workspace(workspace: TritonWorkspace, query_TNH: Tensor, key_cache: Tensor) -> None:
    for name, given in (
        ("num_heads", query_TNH.shape[1]),
        ("num_kv_heads", key_cache.shape[2]),
        ("head_size", query_TNH.shape[2]),
        ("dtype", query_TNH.dtype),
    ):
        if getattr(workspace, name) != given:
            raise ValueError(f"the workspace was made for {name} {getattr(workspace, name)}, got {given}")
    if len(query_TNH) > workspace.capacity.tokens:
        raise ValueError(
            f"query_TNH has {len(query_TNH)} tokens, more than the capacity of {workspace.capacity.tokens}"
        )

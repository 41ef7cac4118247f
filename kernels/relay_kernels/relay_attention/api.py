"""One call for relay attention, whatever runs it: checks what every implementation needs, imports the chosen one late.

Legend: T query tokens, N query heads, H head size, R block-table rows, W blocks per row.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from relay_kernels.relay_attention.work_list import WorkList


class Implementation(Enum):
    """What runs the work list. Nothing here chooses: a configuration does."""

    TRITON = "triton"
    CPU = "cpu"
    CPU_TORCH = "cpu_torch"


class CacheLayout(Enum):
    """How a KV cache lies in memory."""

    UNPACKED = "unpacked"
    """[blocks, block size, key heads, head size], any strides with a contiguous head. The one Triton reads."""

    AMX = "amx"
    """vLLM's CPU cache for AMX tiles."""

    VEC = "vec"
    """vLLM's CPU cache for vector instructions."""

    VEC16 = "vec16"
    """vLLM's CPU cache for head sizes and block sizes that the other two do not divide."""


CPU_LAYOUTS = (CacheLayout.AMX, CacheLayout.VEC, CacheLayout.VEC16)


def relay_attention(
    query_TNH: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    work_list: WorkList,
    *,
    scale: float,
    out: Tensor,
    implementation: Implementation,
    layout: CacheLayout | None = None,
) -> Tensor:
    """Attention of one step as its work list says; fills and returns ``out``.

    Args:
        query_TNH: queries; tokens without slots, and tokens past the work list's, get zeros.
        key_cache: in the given layout, as is `value_cache`.
        value_cache: see `key_cache`.
        block_table: [R, W] int32; only the rows and entries that the work list names are read.
        work_list: what to compute, from `make_work_list`.
        scale: factor of the scores.
        out: [T, N, H], of the dtype of ``query_TNH``.
        implementation: what runs it.
        layout: how the caches lie; None is `CacheLayout.UNPACKED` for Triton, and refused for the others.

    Raises:
        ValueError: an argument has the wrong shape, dtype or value; the message names it.
        ImportError: the implementation needs a library that is not installed (Triton has no CPU dependency).
    """
    _check(query_TNH, key_cache, value_cache, block_table, work_list, out)
    layout = _layout_for(implementation, layout)
    if implementation is Implementation.TRITON:
        from relay_kernels.relay_attention.triton_relay import relay_attention_triton

        return relay_attention_triton(query_TNH, key_cache, value_cache, block_table, work_list, scale=scale, out=out)
    if implementation is Implementation.CPU:
        from relay_kernels.relay_attention.cpu import relay_attention_cpu as attend
    else:
        from relay_kernels.relay_attention.cpu_torch import relay_attention_cpu_torch as attend
    attend(query_TNH, key_cache, value_cache, block_table, work_list, scale=scale, out=out, layout=layout.value)
    out[work_list.num_tokens :].zero_()
    return out


def _layout_for(implementation: Implementation, layout: CacheLayout | None) -> CacheLayout:
    readable = (CacheLayout.UNPACKED,) if implementation is Implementation.TRITON else CPU_LAYOUTS
    chosen = CacheLayout.UNPACKED if layout is None and implementation is Implementation.TRITON else layout
    if chosen is None or chosen not in readable:
        names = ", ".join(choice.value for choice in readable)
        given = None if chosen is None else chosen.value
        raise ValueError(f"layout must be one of {names} for the implementation {implementation.value}, got {given}")
    return chosen


def _check(
    query_TNH: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, work_list: WorkList, out: Tensor
) -> None:
    if query_TNH.ndim != 3 or not query_TNH.dtype.is_floating_point:
        raise ValueError(
            f"query_TNH must be a floating tensor of three dimensions, got shape {tuple(query_TNH.shape)} and dtype "
            f"{query_TNH.dtype}"
        )
    if out.shape != query_TNH.shape or out.dtype != query_TNH.dtype:
        raise ValueError(
            f"out must have the shape and dtype of query_TNH, {tuple(query_TNH.shape)} and {query_TNH.dtype}, got "
            f"{tuple(out.shape)} and {out.dtype}"
        )
    if key_cache.ndim != 4 or value_cache.ndim != 4:
        raise ValueError(
            f"key_cache and value_cache must have four dimensions, got shapes {tuple(key_cache.shape)} and "
            f"{tuple(value_cache.shape)}"
        )
    if block_table.ndim != 2 or block_table.dtype != torch.int32:
        raise ValueError(
            f"block_table must be a two-dimensional int32 tensor, got shape {tuple(block_table.shape)} and dtype "
            f"{block_table.dtype}"
        )
    if work_list.num_tokens > query_TNH.shape[0]:
        raise ValueError(f"work_list has {work_list.num_tokens} tokens, query_TNH only {query_TNH.shape[0]}")

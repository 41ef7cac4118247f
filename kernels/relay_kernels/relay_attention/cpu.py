"""RelayAttention on the CPU: the compiled kernel behind a plan-once, run-per-layer interface.

Legend: T query tokens, H query heads, K KV heads, D head size, B block size, P slots.
The kernel reads vLLM's paged cache in place in its "amx", "vec" and "vec16" layouts; partial results are float32.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from relay_kernels.relay_attention import cpu_build
from relay_kernels.relay_attention.work_list import WorkList

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_LAYOUTS = {"vec": 0, "vec16": 0, "amx": 1}

_POINTERS = (
    *("out", "query", "key_cache", "value_cache", "block_table", "segments", "slot_token", "slot_key_end"),
    *("token_slot_start", "token_slots", "partial_out", "partial_lse", "lse"),
)
_STRIDES = (
    *("out_stride_token", "out_stride_head", "query_stride_token", "query_stride_head"),
    *("cache_stride_block", "cache_stride_head", "block_table_stride"),
)
_SIZES = ("num_tokens", "num_segments", "num_heads", "num_kv_heads", "head_size", "block_size", "dtype", "layout")


class _Arguments(ctypes.Structure):
    """Mirrors struct RelayArguments of cpu_kernel.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *((name, ctypes.c_int32) for name in _SIZES),
        ("scale", ctypes.c_float),
    ]


class CpuRun:
    """One step's work, bound once to its integer arrays and scratch memory, then run for each layer.

    Args:
        work_list: what to compute; segments must start at block boundaries.
        block_table: [R, W] int32, contiguous rows, on the CPU; kept alive by this object.
        num_heads, num_kv_heads, head_size, block_size: the shape of the layers this will be run for.
        dtype: of query, cache and output: float32, float16 or bfloat16.
        layout: "amx" (bfloat16 in pairs), "vec" or "vec16" (planes), as vLLM names them.

    Raises:
        ValueError: a dtype, layout or shape the kernel cannot serve, named with its value.
        KernelUnavailableError: the kernel cannot be compiled or loaded here.
    """

    def __init__(
        self,
        work_list: WorkList,
        block_table: torch.Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        block_size: int,
        dtype: torch.dtype,
        layout: str,
    ) -> None:
        _check_shape(num_heads, num_kv_heads, head_size, block_size, dtype, layout)
        _check_block_table(block_table, work_list, block_size)
        if work_list.segments.size and np.any(work_list.segments[:, 1] % block_size):
            raise ValueError(f"work_list.segments: key_start must be a multiple of block_size ({block_size})")
        self._library = cpu_build.load()
        if not supports(layout):
            raise cpu_build.KernelUnavailableError(f"layout {layout!r}: the kernel was built without AMX on this CPU")
        slots = work_list.num_slots
        self._partial_out = torch.empty(slots * num_heads * head_size, dtype=torch.float32)
        self._partial_lse = torch.empty(slots * num_heads, dtype=torch.float32)
        self._kept = (work_list, block_table)
        self._last_block = _last_block(block_table, work_list, block_size)
        self._dtype = dtype
        self._shape = (num_heads, num_kv_heads, head_size, block_size)
        a = self._arguments = _Arguments()
        a.block_table = block_table.data_ptr()
        a.block_table_stride = block_table.stride(0)
        for name in ("segments", "slot_token", "slot_key_end", "token_slot_start", "token_slots"):
            setattr(a, name, getattr(work_list, name).ctypes.data)
        a.partial_out = self._partial_out.data_ptr()
        a.partial_lse = self._partial_lse.data_ptr()
        a.num_tokens = work_list.num_tokens
        a.num_segments = work_list.segments.shape[0]
        a.num_heads, a.num_kv_heads, a.head_size, a.block_size = self._shape
        a.dtype, a.layout = _DTYPES[dtype], _LAYOUTS[layout]

    def __call__(
        self,
        query_TND: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        *,
        scale: float,
        out_TND: torch.Tensor,
        lse_TN: torch.Tensor | None = None,
    ) -> None:
        """Writes attention of every query token over the keys it may see into ``out_TND``.

        Args:
            query_TND, out_TND: [>=T, H, D], last dimension contiguous. Rows beyond T are left alone.
            key_cache, value_cache: [blocks, K, B, D] in strides; the interior of a (block, head) is one packed run.
            scale: factor of the scores; positive.
            lse_TN: [>=T, H] float32, receives the natural-log sum of exponentials; -inf where nothing is seen.
        """
        a = self._arguments
        num_heads, num_kv_heads, head_size, block_size = self._shape
        for name, tensor in (("query", query_TND), ("out", out_TND)):
            _check_tensor(name, tensor, self._dtype, (num_heads, head_size))
            if tensor.shape[0] < a.num_tokens or tensor.stride(2) != 1:
                raise ValueError(
                    f"{name} must hold {a.num_tokens} tokens with contiguous heads, got shape {tuple(tensor.shape)} "
                    f"and strides {tensor.stride()}"
                )
        for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
            _check_tensor(name, cache, self._dtype, (num_kv_heads, block_size, head_size))
            if cache.stride() != (*key_cache.stride()[:2], head_size, 1) or cache.shape[0] <= self._last_block:
                raise ValueError(
                    f"{name} must hold {self._last_block + 1} blocks whose heads are packed runs, got shape "
                    f"{tuple(cache.shape)} and strides {cache.stride()}"
                )
        if lse_TN is not None and not (
            lse_TN.dtype is torch.float32 and lse_TN.is_contiguous() and lse_TN.shape[1:] == (num_heads,)
            and lse_TN.shape[0] >= a.num_tokens
        ):  # fmt: skip
            raise ValueError(f"lse must be contiguous float32 [>={a.num_tokens}, {num_heads}], got {lse_TN.shape}")
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        a.query, a.out = query_TND.data_ptr(), out_TND.data_ptr()
        a.key_cache, a.value_cache = key_cache.data_ptr(), value_cache.data_ptr()
        a.query_stride_token, a.query_stride_head = query_TND.stride(0), query_TND.stride(1)
        a.out_stride_token, a.out_stride_head = out_TND.stride(0), out_TND.stride(1)
        a.cache_stride_block, a.cache_stride_head = key_cache.stride(0), key_cache.stride(1)
        a.lse = lse_TN.data_ptr() if lse_TN is not None else None
        a.scale = scale
        if self._library.relay_attention(ctypes.byref(a)):
            raise MemoryError("relay attention: no memory for a thread's scratch buffers")


def _check_block_table(block_table: torch.Tensor, work_list: WorkList, block_size: int) -> None:
    if block_table.dtype != torch.int32 or block_table.ndim != 2 or block_table.device.type != "cpu":
        raise ValueError(f"block_table must be int32 [R, W] on the CPU, got {block_table.dtype} {block_table.shape}")
    if block_table.numel() and block_table.stride(1) != 1:
        raise ValueError(f"block_table must have contiguous rows, got strides {block_table.stride()}")
    rows, width = block_table.shape
    segments = work_list.segments
    if segments.size and (segments[:, 0].max() >= rows or segments[:, 2].max() > width * block_size):
        raise ValueError(
            f"work_list names row {segments[:, 0].max()} and key {segments[:, 2].max()} of a block_table of shape "
            f"{tuple(block_table.shape)} with blocks of {block_size}"
        )


def _last_block(block_table: torch.Tensor, work_list: WorkList, block_size: int) -> int:
    """The highest block that is read; a negative one is refused."""
    if not work_list.segments.size:
        return -1
    table = block_table.numpy()
    ends = np.zeros(table.shape[0], dtype=np.int64)
    np.maximum.at(ends, work_list.segments[:, 0], -(-work_list.segments[:, 2] // block_size))
    read = table[np.arange(table.shape[1]) < ends[:, None]]
    if read.size and read.min() < 0:
        raise ValueError(f"block_table holds the block {read.min()}")
    return int(read.max(initial=-1))


def _check_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape[1:] != shape or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} must be {dtype} [*, {', '.join(map(str, shape))}] on the CPU, got {tensor.dtype} "
            f"{tuple(tensor.shape)} on {tensor.device}"
        )


def supports(layout: str) -> bool:
    """Whether the compiled kernel can read this layout on this CPU. Compiles it if need be.

    Raises:
        KernelUnavailableError: it cannot be had at all.
    """
    return bool(cpu_build.load().relay_layouts() >> _LAYOUTS[layout] & 1)


def _check_shape(
    num_heads: int, num_kv_heads: int, head_size: int, block_size: int, dtype: torch.dtype, layout: str
) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}, got {layout!r}")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
    unit = 32 if layout == "amx" else 16
    if head_size % unit or block_size % unit:
        raise ValueError(f"layout {layout!r}: head_size ({head_size}), block_size ({block_size}): multiples of {unit}")
    if layout == "amx" and dtype is not torch.bfloat16:
        raise ValueError(f"layout 'amx' holds bfloat16, got {dtype}")


def relay_attention_cpu(
    query_TNH: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    work_list: WorkList,
    *,
    scale: float,
    out: torch.Tensor,
    layout: str,
    lse_TN: torch.Tensor | None = None,
) -> None:
    """One call of :class:`CpuRun` for a single layer."""
    run = CpuRun(
        work_list,
        block_table,
        num_heads=query_TNH.shape[1],
        num_kv_heads=key_cache.shape[1],
        head_size=query_TNH.shape[2],
        block_size=key_cache.shape[2],
        dtype=query_TNH.dtype,
        layout=layout,
    )
    run(query_TNH, key_cache, value_cache, scale=scale, out_TND=out, lse_TN=lse_TN)

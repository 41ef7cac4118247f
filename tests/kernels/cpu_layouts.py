"""Packing a plain paged cache into the layouts of vLLM's CPU cache."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_caches(key_cache_BSKH: Tensor, value_cache_BSKH: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Keys and values [blocks, K, S, H] as the halves of one [blocks, K, 2 * S, H] cache, as vLLM hands them over."""
    blocks, size, heads, head_size = key_cache_BSKH.shape
    whole = torch.empty(blocks, heads, 2 * size, head_size, dtype=key_cache_BSKH.dtype)
    key_cache, value_cache = whole.chunk(2, dim=2)
    keys, values = key_cache_BSKH.transpose(1, 2), value_cache_BSKH.transpose(1, 2)
    if layout == "amx":
        pairs = keys.reshape(blocks, heads, size // 16, 16, head_size // 2, 2).permute(0, 1, 2, 4, 3, 5)
        key_cache.copy_(pairs.reshape(blocks, heads, size, head_size))
        pairs = values.reshape(blocks, heads, size // 2, 2, head_size // 16, 16).permute(0, 1, 4, 2, 5, 3)
        value_cache.copy_(pairs.reshape(blocks, heads, size, head_size))
    else:
        key_cache.copy_(keys.transpose(2, 3).reshape(blocks, heads, size, head_size))
        value_cache.copy_(values)
    return key_cache, value_cache

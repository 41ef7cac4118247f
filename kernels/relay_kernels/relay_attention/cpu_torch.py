"""RelayAttention on the CPU in plain torch, for machines without a C++ compiler. Which one runs is logged.

Legend: T query tokens, H query heads, K KV heads, G = H / K, D head size, B block size, L keys of a segment.
"""

from __future__ import annotations

import torch

from relay_kernels.relay_attention.work_list import WorkList


def unpack_keys(packed_LKBD: torch.Tensor, layout: str) -> torch.Tensor:
    """Keys of some blocks, [L, K, B, D] as stored in ``layout``, as plain [K, L * B, D] float32."""
    num_blocks, num_kv_heads, block_size, head_size = packed_LKBD.shape
    if layout == "amx":  # [t/16][d/2][t%16][d%2]
        tiles = packed_LKBD.reshape(num_blocks, num_kv_heads, block_size // 16, head_size // 2, 16, 2)
        plain = tiles.permute(1, 0, 2, 4, 3, 5)
    else:  # [d][t]
        plain = packed_LKBD.reshape(num_blocks, num_kv_heads, head_size, block_size).permute(1, 0, 3, 2)
    return plain.reshape(num_kv_heads, num_blocks * block_size, head_size).float()


def unpack_values(packed_LKBD: torch.Tensor, layout: str) -> torch.Tensor:
    """Values of some blocks, [L, K, B, D] as stored in ``layout``, as plain [K, L * B, D] float32."""
    num_blocks, num_kv_heads, block_size, head_size = packed_LKBD.shape
    if layout == "amx":  # [d/16][t/2][d%16][t%2]
        tiles = packed_LKBD.reshape(num_blocks, num_kv_heads, head_size // 16, block_size // 2, 16, 2)
        plain = tiles.permute(1, 0, 3, 5, 2, 4)
    else:  # [t][d]
        plain = packed_LKBD.permute(1, 0, 2, 3)
    return plain.reshape(num_kv_heads, num_blocks * block_size, head_size).float()


def relay_attention_cpu_torch(
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
    """As :func:`relay_kernels.relay_attention.cpu.relay_attention_cpu`, in float32 matrix products of torch."""
    num_tokens, num_heads, head_size = work_list.num_tokens, query_TNH.shape[1], query_TNH.shape[2]
    num_kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    partial_out = torch.zeros(work_list.num_slots, num_heads, head_size)
    partial_lse = torch.full((work_list.num_slots, num_heads), float("-inf"))
    slot_token = torch.from_numpy(work_list.slot_token).long()
    slot_key_end = torch.from_numpy(work_list.slot_key_end).long()
    for row, key_start, key_end, begin, end in work_list.segments.tolist():
        blocks = block_table[row, key_start // block_size : -(-key_end // block_size)].long()
        length = key_end - key_start
        keys_KLD = unpack_keys(key_cache[blocks], layout)[:, :length]
        values_KLD = unpack_values(value_cache[blocks], layout)[:, :length]
        tokens = end - begin
        query = query_TNH[slot_token[begin:end]].float().reshape(tokens, num_kv_heads, -1, head_size)
        query_KRD = query.permute(1, 0, 2, 3).reshape(num_kv_heads, -1, head_size)
        scores_KRL = torch.matmul(query_KRD, keys_KLD.transpose(1, 2)).mul_(scale)
        visible = torch.arange(key_start, key_end) < slot_key_end[begin:end, None]
        group = num_heads // num_kv_heads
        scores_KRL.masked_fill_(~visible.repeat_interleave(group, 0), float("-inf"))
        lse_KR = torch.logsumexp(scores_KRL, -1)
        out_KRD = torch.matmul(scores_KRL.sub_(lse_KR[..., None]).exp_(), values_KLD)
        partial_out[begin:end] = out_KRD.reshape(num_kv_heads, tokens, group, -1).transpose(0, 1).flatten(1, 2)
        partial_lse[begin:end] = lse_KR.reshape(num_kv_heads, tokens, group).transpose(0, 1).flatten(1, 2)
    _merge(work_list, partial_out, partial_lse, num_tokens, out, lse_TN)


def _merge(
    work_list: WorkList,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    num_tokens: int,
    out: torch.Tensor,
    lse_TN: torch.Tensor | None,
) -> None:
    num_heads = partial_lse.shape[1]
    slot_token = torch.from_numpy(work_list.slot_token).long()[:, None].expand(-1, num_heads)
    highest = torch.full((num_tokens, num_heads), float("-inf"))
    highest.scatter_reduce_(0, slot_token, partial_lse, "amax")
    base = highest.nan_to_num(neginf=0.0)
    weights = (partial_lse - base.gather(0, slot_token)).exp()
    total = torch.zeros(num_tokens, num_heads).scatter_add_(0, slot_token, weights)
    summed = torch.zeros(num_tokens, *partial_out.shape[1:])
    summed.index_add_(0, slot_token[:, 0], partial_out * weights[..., None])
    out[:num_tokens] = (summed / total.clamp_min(1e-30)[..., None]).to(out.dtype)
    if lse_TN is not None:
        lse_TN[:num_tokens] = base + total.log()

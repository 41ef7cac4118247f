"""What relay attention means, in eager torch and in any dtype, float64 included. Only tests run it.

Legend: R requests, T query tokens, N query heads, K key heads (N is a multiple of K, and query head n reads key head
n // (N // K)), H head size, L keys, B blocks, S tokens per block, P partial results.

A log-sum-exp is natural, [T, N], and -inf where there was no key; the output there is zero. These functions decide
every edge case: no keys, no seen keys, no requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def partial_attention_reference(
    query_TNH: Tensor,
    key_LKH: Tensor,
    value_LKH: Tensor,
    scale: float,
    is_seen_TL: Tensor | None = None,
    soft_cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention over some of a request's keys: output [T, N, H] and natural log-sum-exp [T, N].

    Args:
        query_TNH: queries.
        key_LKH: keys; L may be 0.
        value_LKH: values.
        scale: factor of the scores.
        is_seen_TL: which keys each token sees; None is all of them.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; 0 for none.
    """
    heads_per_key_head = query_TNH.shape[1] // key_LKH.shape[1]
    key_LNH = key_LKH.repeat_interleave(heads_per_key_head, dim=1)
    value_LNH = value_LKH.repeat_interleave(heads_per_key_head, dim=1)
    every_score_NTL = torch.einsum("tnh,lnh->ntl", query_TNH, key_LNH) * scale
    if soft_cap:
        every_score_NTL = soft_cap * (every_score_NTL / soft_cap).tanh()
    score_NTL = every_score_NTL if is_seen_TL is None else every_score_NTL.masked_fill(~is_seen_TL, float("-inf"))
    lse_NT = score_NTL.logsumexp(dim=-1)
    weight_NTL = (score_NTL - _finite(lse_NT)[..., None]).exp()
    return torch.einsum("ntl,lnh->tnh", weight_NTL, value_LNH), lse_NT.transpose(0, 1)


def merge_reference(out_PTNH: Tensor, lse_PTN: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over disjoint sets of keys, from the output and log-sum-exp of each (RelayAttention, equation 8).

    A part whose log-sum-exp is -inf counts for nothing, whatever its output holds.
    """
    lse_TN = lse_PTN.logsumexp(dim=0)
    weight_PTN = (lse_PTN - _finite(lse_TN)).exp()
    counted_PTNH = out_PTNH.masked_fill((weight_PTN == 0)[..., None], 0.0)
    return (weight_PTN[..., None] * counted_PTNH).sum(dim=0), lse_TN


def paged_attention_reference(
    query_TNH: Tensor,
    key_cache_BSKH: Tensor,
    value_cache_BSKH: Tensor,
    block_table: Sequence[Sequence[int]] | Tensor,
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float = 0.0,
    sinks_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of each request over its own blocks, sharing nothing: output [T, N, H], log-sum-exp [T, N].

    Query tokens are packed row after row and are the last ``query_len`` of the row's ``seq_len`` keys. The tokens of a
    row without keys get zeros and -inf. ``window``, ``soft_cap`` and ``sinks_N`` are as `LayerFeatures` has them.
    """
    starts = list(accumulate(query_lens, initial=0))
    parts = [
        partial_attention_reference(
            query_TNH[start : start + query_len],
            gather_keys(key_cache_BSKH, block_table[row], seq_len),
            gather_keys(value_cache_BSKH, block_table[row], seq_len),
            scale,
            is_seen_TL=_is_seen(query_len, seq_len, query_TNH.device, window),
            soft_cap=soft_cap,
        )
        for row, (start, query_len, seq_len) in enumerate(zip(starts, query_lens, seq_lens, strict=False))
    ]
    nothing = (query_TNH[:0], query_TNH[:0, :, 0])
    outs, lses = zip(nothing, *parts, strict=True)
    out_TNH, lse_TN = torch.cat(outs), torch.cat(lses)
    if sinks_N is None:
        return out_TNH, lse_TN
    sinks_TN = sinks_N.to(lse_TN.dtype).masked_fill(lse_TN == float("-inf"), float("-inf"))
    return merge_reference(torch.stack((out_TNH, torch.zeros_like(out_TNH))), torch.stack((lse_TN, sinks_TN)))


def gather_keys(cache_BSKH: Tensor, blocks: Sequence[int] | Tensor, num_keys: int) -> Tensor:
    """The first ``num_keys`` keys (or values) of a request, [L, K, H]."""
    num_blocks = -(-num_keys // cache_BSKH.shape[1])
    index = torch.as_tensor(blocks, dtype=torch.int64, device=cache_BSKH.device)[:num_blocks]
    return cache_BSKH[index].flatten(0, 1)[:num_keys]


def _is_seen(query_len: int, seq_len: int, device: torch.device, window: int | None) -> Tensor:
    """[query_len, seq_len]: each token sees the keys up to its own, or as many of them as the window has."""
    position_T1 = torch.arange(seq_len - query_len, seq_len, device=device)[:, None]
    key_L = torch.arange(seq_len, device=device)
    return (key_L <= position_T1) & (key_L > position_T1 - (seq_len if window is None else window))


def _finite(lse: Tensor) -> Tensor:
    """Zero where there is nothing to normalise, so that exp(-inf - lse) is zero and not NaN."""
    return lse.masked_fill(lse == float("-inf"), 0.0)

"""The reference: what it says of whole attention, of parts, and of nothing at all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from relay_kernels.relay_attention.reference import (
    merge_reference,
    paged_attention_reference,
    partial_attention_reference,
)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("heads_per_kv_head", [1, 3, 8])
def test_paged_attention_is_causal_attention(heads_per_kv_head: int) -> None:
    """Three rows: a decode, a chunk of a prompt, a whole prompt; blocks in any order."""
    num_kv_heads, block_size, query_lens, seq_lens = 2, 4, [1, 5, 7], [11, 9, 7]
    query = _random(13, num_kv_heads * heads_per_kv_head, 16)
    key_cache, value_cache = _random(12, block_size, num_kv_heads, 16), _random(13, block_size, num_kv_heads, 16)[1:]
    block_table = [[7, 2, 9], [1, 11, 4], [3, 8, 0]]
    out, _ = paged_attention_reference(query, key_cache, value_cache, block_table, query_lens, seq_lens, 0.3)
    start = 0
    for blocks, query_len, seq_len in zip(block_table, query_lens, seq_lens, strict=True):
        key, value = (cache[blocks].flatten(0, 1)[:seq_len] for cache in (key_cache, value_cache))
        mask = torch.ones(query_len, seq_len, dtype=torch.bool).tril(seq_len - query_len)
        expected = F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (query[start : start + query_len], key, value)),
            attn_mask=mask,
            scale=0.3,
            enable_gqa=True,
        )
        torch.testing.assert_close(out[start : start + query_len], expected[0].transpose(0, 1), rtol=0, atol=1e-12)
        start += query_len


def test_rows_without_tokens_or_keys_see_nothing() -> None:
    query, cache = _random(3, 2, 8), _random(3, 4, 1, 8)
    out, lse = paged_attention_reference(query, cache, cache, [[1], [2], [0]], [0, 1, 2], [4, 3, 0], 1.0)
    assert torch.isfinite(lse[0]).all()
    assert torch.equal(out[1:], torch.zeros(2, 2, 8, dtype=torch.float64))
    assert torch.isneginf(lse[1:]).all()


def test_a_step_without_rows_is_empty() -> None:
    cache = _random(3, 4, 1, 8)
    out, lse = paged_attention_reference(_random(0, 2, 8), cache, cache, [], [], [], 1.0)
    assert out.shape == (0, 2, 8)
    assert lse.shape == (0, 2)


def test_attention_over_no_keys_is_zero_with_an_lse_of_minus_infinity() -> None:
    out, lse = partial_attention_reference(_random(3, 2, 8), _random(0, 1, 8), _random(0, 1, 8), 1.0)
    assert torch.equal(out, torch.zeros(3, 2, 8, dtype=torch.float64))
    assert torch.isneginf(lse).all()


def test_the_lse_is_natural_and_tokens_come_first() -> None:
    query, key = _random(3, 2, 8), _random(5, 1, 8)
    _, lse = partial_attention_reference(query, key, _random(5, 1, 8), 0.5)
    expected = (torch.einsum("tnh,lh->tnl", query, key[:, 0]) * 0.5).exp().sum(-1).log()
    torch.testing.assert_close(lse, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cut", [0, 1, 5, 9])
def test_parts_merge_into_the_whole(cut: int) -> None:
    query, key, value = _random(4, 6, 8), _random(9, 2, 8), _random(10, 2, 8)[1:]
    parts = [partial_attention_reference(query, key[s], value[s], 0.5) for s in (slice(cut), slice(cut, None))]
    out, lse = merge_reference(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))
    whole_out, whole_lse = partial_attention_reference(query, key, value, 0.5)
    torch.testing.assert_close(out, whole_out, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=1e-12)


def test_merging_nothing_with_nothing_is_nothing() -> None:
    out, lse = merge_reference(torch.full((2, 3, 2, 8), float("nan")), torch.full((2, 3, 2), float("-inf")))
    assert torch.equal(out, torch.zeros(3, 2, 8))
    assert torch.isneginf(lse).all()


def test_an_empty_part_counts_for_nothing_whatever_it_holds() -> None:
    out, lse = _random(2, 3, 2, 8), _random(2, 3, 2)
    out[1], lse[1] = float("nan"), float("-inf")
    merged_out, merged_lse = merge_reference(out, lse)
    assert torch.equal(merged_out, out[0])
    assert torch.equal(merged_lse, lse[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lse_of_torch_flash_attention_on_the_cpu(dtype: torch.dtype) -> None:
    """Base e, [batch, heads, tokens], float32 for reduced dtypes: what we may assume if we ever merge its results."""
    query, key, value = (_random(1, 2, n, 16).to(dtype) for n in (5, 37, 37))
    _, lse_BNT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=0.5)
    exact = (query.double() @ key.double().transpose(-1, -2) * 0.5).logsumexp(-1)
    assert lse_BNT.shape == (1, 2, 5)
    assert lse_BNT.dtype == torch.float32
    torch.testing.assert_close(lse_BNT.double(), exact, rtol=0, atol=1e-3)


def test_lse_of_torch_flash_attention_on_the_cpu_where_nothing_is_seen() -> None:
    """Zero, neither infinity: its results for empty rows cannot be merged as they are."""
    query, key, value = (_random(1, 2, n, 16).float() for n in (3, 7, 7))
    nothing = torch.full((3, 7), float("-inf"))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=nothing)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.zeros_like(lse))

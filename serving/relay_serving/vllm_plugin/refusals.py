"""Why something cannot be relayed, whatever runs it: one of `FALLBACK_REASONS`, or None where it can."""

from __future__ import annotations

from collections.abc import Iterable

from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
)

from relay_serving.vllm_plugin.counters import FALLBACK_REASONS

logger = init_logger("vllm.relay")


def spec_refusal(kv_cache_spec: AttentionSpec, vllm_config: VllmConfig, *, takes_windows: bool) -> str | None:
    """Of all layers of a KV-cache group; ``takes_windows``: whether the kernel knows sliding windows."""
    parallel = vllm_config.parallel_config
    if isinstance(kv_cache_spec, SlidingWindowSpec) and not takes_windows:
        return "sliding_window"
    if isinstance(kv_cache_spec, ChunkedLocalAttentionSpec) or getattr(kv_cache_spec, "attention_chunk_size", None):
        return "chunked_local"
    if isinstance(kv_cache_spec, (CrossAttentionSpec, EncoderOnlyAttentionSpec)):
        return "attention_type"
    if type(kv_cache_spec) is not FullAttentionSpec and type(kv_cache_spec) is not SlidingWindowSpec:
        return "kv_cache_spec"
    if vllm_config.kv_transfer_config is not None:
        return "kv_connector"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context_parallel"
    if envs.VLLM_BATCH_INVARIANT:
        return "batch_invariance"
    return None


def common_refusal(layers: Iterable[object]) -> str | None:
    """Of a group's layers, so that its steps need no plan; None where one of them can be relayed."""
    refusals = [getattr(getattr(layer, "impl", None), "refusal", None) for layer in layers]
    return refusals[0] if refusals and all(refusals) else None


def log_refusal(reason: str) -> None:
    """Once for each reason."""
    assert reason in FALLBACK_REASONS
    logger.info_once(
        "RelayAttention leaves layers of this model to vLLM's own kernel (reason: %s); their results are stock's.",
        reason,
    )

"""What relay does not serve is refused for a named reason, from vLLM's own configuration, before any kernel runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engines import tiny_llama
from vllm.config import KVTransferConfig, VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    MLAAttentionSpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
)

from relay_serving.vllm_plugin.attention_backend import (
    RelayCPUBackend,
    RelayCPUImpl,
    RelayCPUMetadataBuilder,
    group_refusal,
    layer_refusal,
    step_refusal,
)
from relay_serving.vllm_plugin.counters import FALLBACK_REASONS

SHAPE: dict[str, Any] = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
FULL = FullAttentionSpec(**SHAPE)


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmConfig]:
    model = tiny_llama(tmp_path_factory.mktemp("model"))
    config = EngineArgs(model=str(model), skip_tokenizer_init=True, max_model_len=256).create_engine_config()
    with set_current_vllm_config(config):
        yield config


def test_plain_attention_is_relayed(vllm_config: VllmConfig) -> None:
    assert group_refusal(FULL, vllm_config, "vec") is None


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (lambda: SlidingWindowSpec(**SHAPE, sliding_window=64), "sliding_window"),
        (lambda: ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=64), "chunked_local"),
        (lambda: dataclasses.replace(FULL, attention_chunk_size=64), "chunked_local"),
        (lambda: CrossAttentionSpec(**SHAPE), "attention_type"),
        (lambda: EncoderOnlyAttentionSpec(**SHAPE), "attention_type"),
        (lambda: MLAAttentionSpec(**{**SHAPE, "num_kv_heads": 1}), "kv_cache_spec"),
        (lambda: SinkFullAttentionSpec(**SHAPE, sink_len=4), "kv_cache_spec"),
    ],
)
def test_other_caches_are_refused(vllm_config: VllmConfig, spec: Callable[[], Any], reason: str) -> None:
    assert group_refusal(spec(), vllm_config, "vec") == reason


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("cache_config.cache_dtype", "fp8_e5m2", "kv_cache_dtype"),
        ("kv_transfer_config", KVTransferConfig(kv_connector="X", kv_role="kv_both"), "kv_connector"),
        ("parallel_config.decode_context_parallel_size", 2, "context_parallel"),
        ("parallel_config.prefill_context_parallel_size", 2, "context_parallel"),
    ],
)
def test_engine_features_are_refused(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch, path: str, value: object, reason: str
) -> None:
    *owners, name = path.split(".")
    owner: Any = vllm_config
    for step in owners:
        owner = getattr(owner, step)
    monkeypatch.setattr(owner, name, value)
    assert group_refusal(FULL, vllm_config, "vec") == reason


def test_batch_invariance_is_refused(vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert group_refusal(FULL, vllm_config, "vec") == "batch_invariance"


@pytest.mark.parametrize("isa", ["neon", "rvv", "vsx", "vxe"])
def test_other_architectures_are_refused(vllm_config: VllmConfig, isa: str) -> None:
    assert group_refusal(FULL, vllm_config, isa) == "cpu_architecture"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"sliding_window": 64}, "sliding_window"),
        ({"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]}, "alibi"),
        ({"logits_soft_cap": 30.0}, "soft_cap"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"attn_type": AttentionType.ENCODER_DECODER}, "attention_type"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attention_type"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"scale": -1.0}, "scale"),
    ],
)
def test_layers_are_judged_one_by_one(vllm_config: VllmConfig, change: dict[str, Any], reason: str | None) -> None:
    plain: dict[str, Any] = {
        "num_heads": 4, "head_size": 32, "scale": 0.2, "num_kv_heads": 2, "alibi_slopes": None,
        "sliding_window": None, "kv_cache_dtype": "auto",
    }  # fmt: skip
    impl = RelayCPUImpl(**{**plain, **change})
    assert impl.refusal == layer_refusal(impl) == reason
    assert reason is None or reason in FALLBACK_REASONS


def test_steps_that_are_not_causal_are_refused() -> None:
    numbers = torch.tensor([0, 1], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=numbers, query_start_loc_cpu=numbers, seq_lens=numbers[1:], num_reqs=1, num_actual_tokens=1,
        max_query_len=1, max_seq_len=1, block_table_tensor=numbers[None], slot_mapping=numbers[:1].long(),
    )  # fmt: skip
    assert step_refusal(common) is None
    for change in (
        {"causal": False},
        {"causal": torch.tensor([True])},
        {"mm_req_doc_ranges": {0: [(0, 4)]}},
        {"rswa_prefix_lens": torch.tensor([3])},
    ):
        assert step_refusal(dataclasses.replace(common, **change)) == "non_causal"  # type: ignore[arg-type]


def inherited_promises(backend: Any) -> set[str]:
    """Promises of a backend that sharing cannot keep: the plan belongs to one group, one step and one batch."""
    builder = backend.get_builder_cls()
    promises = {
        "batch invariance": backend.supports_batch_invariance(),
        "update_block_table": bool(getattr(builder, "supports_update_block_table", False)),
        "decode context parallelism": backend.supports_dcp(),
    }
    return {name for name, is_promised in promises.items() if is_promised}


def test_no_promise_is_inherited_that_sharing_cannot_keep() -> None:
    assert inherited_promises(RelayCPUBackend) == set()


def test_a_backend_that_inherits_them_is_noticed() -> None:
    class Careless(RelayCPUBackend):
        @classmethod
        def supports_batch_invariance(cls) -> bool:
            return True

        @staticmethod
        def get_builder_cls() -> Any:
            class Builder(RelayCPUMetadataBuilder):
                supports_update_block_table = True

            return Builder

    assert inherited_promises(Careless) == {"batch invariance", "update_block_table"}


def test_the_classes_are_those_vllm_looks_for() -> None:
    assert RelayCPUBackend.get_name() == CPUAttentionBackend.get_name() == "CPU_ATTN"
    assert issubclass(RelayCPUMetadataBuilder, CPUAttentionMetadataBuilder)
    assert issubclass(RelayCPUBackend.get_impl_cls(), CPUAttentionBackend.get_impl_cls()), "its window scan needs this"


def test_every_reason_is_one_word_that_metrics_can_label() -> None:
    assert len(set(FALLBACK_REASONS)) == len(FALLBACK_REASONS)
    assert all(reason.replace("_", "").isalpha() and reason.islower() for reason in FALLBACK_REASONS)

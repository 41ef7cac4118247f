"""The GPU backend without a GPU: its parts on this CPU, and whole engines in which it plans and computes, interpreted.

What only a GPU can show, captured graphs and time, is not shown here.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import IN_PROCESS, INTERPRETED_IMPL, divergences, relay_counters, run_engine, run_engines, tiny_llama
from test_features import ENGINE, NEAR_TIE, TREE, tiny_gemma2, tiny_gpt_oss

pytest.importorskip("triton")

from relay_serving.vllm_plugin import gpu_backend
from relay_serving.vllm_plugin.counters import CounterFile
from relay_serving.vllm_plugin.gpu_backend import GpuPlans, GroupShape

SHAPE = GroupShape(
    max_rows=256, max_tokens=8192, num_heads=32, num_kv_heads=8, head_size=128, dtype=torch.bfloat16, block_size=16
)


@pytest.fixture(scope="module")
def plans() -> GpuPlans:
    return GpuPlans(SHAPE, torch.device("cpu"), CounterFile.private())


def test_whether_a_step_is_ours_depends_on_its_size_alone(plans: GpuPlans) -> None:
    assert not plans.fits(1, 1)
    assert plans.fits(2, 2)
    assert plans.fits(256, plans.max_tokens)
    assert not plans.fits(257, 257)
    assert not plans.fits(2, plans.max_tokens + 1)


def test_buffers_hold_every_step_that_is_ours_and_no_more_memory_than_said(plans: GpuPlans) -> None:
    workspace = plans.planner.workspace
    assert workspace.capacity.slots >= 2 * plans.max_tokens
    assert workspace.capacity.segments >= plans.max_rows
    partials = (workspace.partial_out_PNH, workspace.partial_lse_PN)
    assert sum(tensor.nbytes for tensor in partials) <= gpu_backend.MOST_SCRATCH_BYTES


def test_costs_are_whole_numbers_and_min_keys_is_among_them() -> None:
    small = GroupShape(8, 32, 4, 2, 32, torch.float32, 16)
    assert GpuPlans(small, torch.device("cpu"), CounterFile.private(), min_keys=77).planner.costs.min_keys == 77


def config(**changes: Any) -> Any:
    parts = {
        "parallel_config": SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        "kv_transfer_config": None,
        "model_config": SimpleNamespace(is_mm_prefix_lm=False, rswa_window=None),
        "cache_config": SimpleNamespace(enable_prefix_caching=True),
    }
    return SimpleNamespace(**{**parts, **changes})


def spec(window: int | None = None) -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    shape = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    return FullAttentionSpec(**shape) if window is None else SlidingWindowSpec(**shape, sliding_window=window)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"model_config": SimpleNamespace(is_mm_prefix_lm=True, rswa_window=None)}, "non_causal"),
        ({"model_config": SimpleNamespace(is_mm_prefix_lm=False, rswa_window=9)}, "non_causal"),
        ({"cache_config": SimpleNamespace(enable_prefix_caching=False)}, "no_prefix_caching"),
        ({"kv_transfer_config": object()}, "kv_connector"),
        (
            {"parallel_config": SimpleNamespace(decode_context_parallel_size=2, prefill_context_parallel_size=1)},
            "context_parallel",
        ),
    ],
)
def test_groups_are_refused_by_what_holds_for_all_of_their_steps(changes: dict[str, Any], reason: str | None) -> None:
    """A graph is replayed without asking: what a step alone could tell comes too late."""
    assert gpu_backend.group_refusal(spec(), config(**changes)) == reason
    assert gpu_backend.group_refusal(spec(window=64), config(**changes)) == reason


def impl(of: type = object, **changes: Any) -> Any:
    features = {
        "alibi_slopes": None,
        "attn_type": "decoder",
        "kv_cache_dtype": "auto",
        "head_size": 128,
        "chunk_lookback": -1,
        "scale": 0.1,
        **changes,
    }
    made = object.__new__(type("Impl", (of,), {}))
    vars(made).update(features)
    return made


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"sliding_window": (31, 0), "logits_soft_cap": 30.0, "sinks": torch.zeros(4)}, None),
        ({"alibi_slopes": torch.ones(4)}, "alibi"),
        ({"attn_type": "encoder_only"}, "attention_type"),
        ({"chunk_lookback": 2}, "chunked_local"),
        ({"scale": 0.0}, "scale"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype"),  # a cache of another dtype than the queries
        ({"head_size": 256}, None),
        ({"head_size": 512}, "head_size"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype"),
    ],
)
def test_layers_are_refused_by_their_features(changes: dict[str, Any], reason: str | None) -> None:
    assert gpu_backend.layer_refusal(impl(**changes)) == reason


def test_the_limits_of_the_kernel_are_those_that_layers_are_refused_by() -> None:
    from relay_kernels.relay_attention import triton_relay

    ours, theirs = ((module.MIN_HEAD_SIZE, module.MAX_HEAD_SIZE) for module in (gpu_backend, triton_relay))
    assert ours == theirs


def test_a_step_that_is_not_causal_ends_with_what_to_do(plans: GpuPlans) -> None:
    """Nothing may fall back in silence: a graph that holds our kernel would run from the plan of another step."""
    builder = object.__new__(gpu_backend.RelayTritonBuilder)
    builder.plans = plans
    step = SimpleNamespace(num_reqs=2, num_actual_tokens=2, causal=False)
    with pytest.raises(ValueError, match=r"causal False, which .* start with --relay-gpu-kernel off"):
        builder._plan(step)
    step.num_reqs = 1
    assert builder._plan(step) is None


def test_caches_of_eight_bits_are_ours_where_vllms_kernel_takes_the_same_queries() -> None:
    assert gpu_backend.layer_refusal(impl(gpu_backend.TritonAttentionImpl, kv_cache_dtype="fp8")) is None
    refused = impl(gpu_backend.TritonAttentionImpl, kv_cache_dtype="fp8_per_token_head")
    assert gpu_backend.layer_refusal(refused) == "kv_cache_dtype"


def test_no_promise_is_inherited_that_does_not_hold() -> None:
    from relay_serving.vllm_plugin.gpu_flash_attn import RelayFlashBackend, RelayFlashBuilder, RelayFlashImpl

    for backend in (gpu_backend.RelayTritonBackend, RelayFlashBackend):
        assert not backend.supports_batch_invariance()
        assert issubclass(backend.get_builder_cls(), gpu_backend.RelayGpuBuilder)
        assert issubclass(backend.get_impl_cls(), gpu_backend.RelayGpuImpl)
    for builder in (RelayFlashBuilder, gpu_backend.RelayTritonBuilder):
        assert not builder.supports_update_block_table
        assert builder.build is gpu_backend.RelayGpuBuilder.build
    assert RelayFlashImpl.forward is gpu_backend.RelayGpuImpl.forward


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_model", "has"),
    [(tiny_llama, "plain"), (tiny_gemma2, "soft cap and windows"), (tiny_gpt_oss, "sinks and windows")],
    ids=["llama", "gemma2", "gpt-oss"],
)
def test_engines_that_plan_on_the_device_say_what_stock_says(tmp_path: Path, make_model: Any, has: str) -> None:
    model = make_model(tmp_path / "model")
    prompts = [prompt for i, prompt in enumerate(TREE["prompts"]) if i in (0, 1, 2, 8, 9, 13)]
    scenario = {"name": "tree", "prompts": prompts, "arrivals": [0, 2, 2, 0, 3, 4], "max_tokens": 8, "logprobs": 2}
    engine = {**ENGINE, "model": str(model), "kv_cache_memory_bytes": 32 << 20}
    stock = run_engine(tmp_path, "stock", engine, [scenario], IN_PROCESS)["results"]["tree"]
    job = {
        "name": has,
        "engine": {**engine, "worker_extension_cls": "interpreted_gpu_backend.Probe"},
        "scenarios": [scenario],
        "calls": [["write_plans", [str(tmp_path / "plans.json")]]],
    }
    interpreted = {"TRITON_INTERPRET": "1", **IN_PROCESS}
    (report,), log = run_engines(tmp_path, "relay", [job], interpreted, implementation=INTERPRETED_IMPL)
    relay = report["results"]["tree"]
    assert all(gap is not None and gap < NEAR_TIE for _, _, gap in divergences(stock, relay))
    assert "kernel: triton, planned on the GPU" in log
    plans = json.loads((tmp_path / "plans.json").read_text())
    # More partial results than tokens: a prefix was read once for several requests.
    assert sum(slots > tokens for _, tokens, slots in plans) >= relay["steps"] // 3
    counted = relay_counters(report)
    assert 0 < counted["relay_steps"] <= counted["steps"]
    assert counted["kv_tokens_saved"] >= 32 * counted["relay_steps"]

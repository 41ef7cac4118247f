"""Every engine feature is either relayed or served by vLLM's own kernel and counted: tokens equal stock's."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from engines import (
    IN_PROCESS,
    divergences,
    relay_counters,
    run_engine,
    run_engines,
    save_tiny,
    tiny_llama,
    tree_prompts,
)

pytestmark = pytest.mark.e2e

NEAR_TIE = 1e-4


def tiny_gemma3(folder: Path) -> Path:
    """Windowed and global layers by turns."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=256, max_position_embeddings=2048, initializer_range=0.3, sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return save_tiny(folder, with_quiet_embeddings(Gemma3ForCausalLM(config)))


def tiny_gemma2(folder: Path) -> Path:
    """Scores pass a soft cap."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=256, max_position_embeddings=2048, initializer_range=0.3, sliding_window=4096,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, query_pre_attn_scalar=32, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    return save_tiny(folder, with_quiet_embeddings(Gemma2ForCausalLM(config)))


def with_quiet_embeddings(model: Any) -> Any:
    """Gemma multiplies tied embeddings by the root of their width, so a random one repeats its last token for ever."""
    import torch

    embeddings = model.model.embed_tokens.weight
    with torch.no_grad():
        embeddings.mul_(0.01)
    return model


def tiny_bloom(folder: Path) -> Path:
    """Positions by ALiBi."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(
        hidden_size=128, n_layer=2, n_head=4, vocab_size=256, initializer_range=0.3, bos_token_id=1, eos_token_id=2
    )
    return save_tiny(folder, BloomForCausalLM(config))


@dataclass(frozen=True)
class Case:
    """One engine.

    Attributes:
        relays: whether relay should run in at least one layer.
        reasons: fallbacks that must have been counted, and no others.
    """

    model: Callable[[Path], Path] = tiny_llama
    engine: dict[str, Any] = field(default_factory=dict)
    relays: bool = True
    reasons: frozenset[str] = frozenset()
    log: str = ""


def llama(**overrides: Any) -> Callable[[Path], Path]:
    return lambda folder: tiny_llama(folder, **overrides)


NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
CASES = {
    "mha, head size 80, vec16": Case(llama(head_dim=80, num_key_value_heads=4)),
    "mqa, compiled by dynamo": Case(
        llama(num_key_value_heads=1), {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    ),
    "torch kernel": Case(engine={"additional_config": {"relay": {"cpu_kernel": "torch"}}}, log="kernel torch"),
    "preemption": Case(engine={"num_gpu_blocks_override": 40}),
    "windowed and global layers in one group": Case(
        tiny_gemma3, {"disable_hybrid_kv_cache_manager": True}, reasons=frozenset({"sliding_window"}),
        log="reason: sliding_window",
    ),
    # The windowed group offers nothing to share: vLLM frees its first blocks, or never takes them from the cache.
    "windowed and global layers in two groups": Case(tiny_gemma3),
    "soft cap": Case(tiny_gemma2, relays=False, reasons=frozenset({"soft_cap"}), log="reason: soft_cap"),
    "alibi": Case(tiny_bloom, relays=False, reasons=frozenset({"alibi"}), log="reason: alibi"),
    "fp8 cache": Case(
        engine={"kv_cache_dtype": "fp8"}, relays=False, reasons=frozenset({"kv_cache_dtype"}),
        log="reason: kv_cache_dtype",
    ),
    "prefix caching off": Case(engine={"enable_prefix_caching": False}, relays=False, log="prefix caching is off"),
    # Last: it loads numba, and with numba loaded vLLM cannot start another engine in the same process.
    "n-gram speculation": Case(engine={"speculative_config": NGRAM}),
}  # fmt: skip
TREE = {
    "name": "tree",
    "prompts": tree_prompts(),
    "arrivals": [0, 0, 0, 1, 1, 2, 3, 5, 0, 0, 4, 4, 9, 0, 2, 6],
    "max_tokens": 24,
}
ENGINE = {
    "skip_tokenizer_init": True, "dtype": "float32", "block_size": 32, "max_model_len": 512,
    "max_num_batched_tokens": 128, "max_num_seqs": 12, "kv_cache_memory_bytes": 128 << 20,
}  # fmt: skip

Reports = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Reports, str]]:
    """Every case run by stock and by relay: reports by case, and the log."""
    folder = tmp_path_factory.mktemp("features")
    jobs = []
    for name, case in CASES.items():
        model = case.model(folder / name.replace(" ", "-"))
        scenario = {**TREE, "logprobs": None if "speculative_config" in case.engine else 2}
        jobs.append({"name": name, "engine": {**ENGINE, "model": str(model), **case.engine}, "scenarios": [scenario]})
    found = {}
    for side in ("stock", "relay"):
        reports, log = run_engines(folder, side, jobs, IN_PROCESS)
        found[side] = (dict(zip(CASES, reports, strict=True)), log)
    return found


@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_those_of_stock(sides: dict[str, tuple[Reports, str]], name: str) -> None:
    case = CASES[name]
    (stock, _), (relay, log) = (sides[side] for side in ("stock", "relay"))
    found = divergences(stock[name]["results"]["tree"], relay[name]["results"]["tree"])
    assert all(gap is not None and gap < NEAR_TIE for _, _, gap in found), found

    tokens = stock[name]["results"]["tree"]["tokens"]
    assert not case.relays or sum(len(set(answer)) for answer in tokens) > 3 * len(tokens), (
        "a model that repeats itself proves nothing"
    )

    counted = relay_counters(relay[name])
    print(counted)
    assert (counted["layer_calls"] > 0) == case.relays
    assert {reason for reason, count in counted["fallbacks"].items() if count} - {"cost_model"} == case.reasons
    assert counted["eligible_steps"] > 0 or not case.engine.get("enable_prefix_caching", True)
    if case.log:
        assert log.count(case.log) == 1, "the reason should be named once"


def test_tensor_parallel_ranks_agree_and_do_not_multiply_the_counters(tmp_path: Path) -> None:
    engine = {**ENGINE, "model": str(tiny_llama(tmp_path / "model")), "tensor_parallel_size": 2}
    scenario = {**TREE, "logprobs": 2, "max_tokens": 12}
    cores = sorted(os.sched_getaffinity(0))
    bound = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}  # by default a rank wants a NUMA node of its own
    stock, relay = (run_engine(tmp_path, side, engine, [scenario], bound) for side in ("stock", "relay"))
    found = divergences(stock["results"]["tree"], relay["results"]["tree"])
    assert all(gap is not None and gap < NEAR_TIE for _, _, gap in found), found
    assert len(relay["layers"]) == 2, "two ranks"
    counted = relay_counters(relay)
    assert counted["layer_calls"] == 2 * counted["relay_steps"] > 0
    assert counted["steps"] <= relay["results"]["tree"]["steps"] + 4


def test_a_layer_that_ignores_its_window_is_noticed(sides: dict[str, tuple[Reports, str]], tmp_path: Path) -> None:
    """The mutant of one metadata for different layers: a windowed layer runs the plan of its group."""
    name = "windowed and global layers in one group"
    model = tiny_gemma3(tmp_path / "model")
    engine = {
        **ENGINE,
        **CASES[name].engine,
        "model": str(model),
        "worker_extension_cls": "mutant_ignores_windows.Mutant",
    }
    mutant = run_engine(tmp_path, "relay", engine, [{**TREE, "logprobs": 2}], IN_PROCESS)
    assert relay_counters(mutant)["fallbacks"]["sliding_window"] == 0
    assert divergences(sides["stock"][0][name]["results"]["tree"], mutant["results"]["tree"])


def test_triton_kernels_serve_a_whole_engine(tmp_path: Path) -> None:
    """Under the interpreter: several groups, ragged lengths, chunked prefill among decodes. Zeroed, it must fail."""
    model = tiny_llama(tmp_path / "model")
    prompts = [prompt for i, prompt in enumerate(TREE["prompts"]) if i in (0, 1, 2, 8, 9, 13)]
    scenario = {"name": "tree", "prompts": prompts, "arrivals": [0, 2, 2, 0, 3, 4], "max_tokens": 16, "logprobs": 2}
    engine = {
        **ENGINE, "model": str(model), "kv_cache_memory_bytes": 32 << 20,
        "additional_config": {"relay": {"cpu_kernel": "triton"}},
    }  # fmt: skip
    interpreted = {"TRITON_INTERPRET": "1", **IN_PROCESS}
    stock = run_engine(tmp_path, "stock", engine, [scenario], interpreted)["results"]["tree"]
    report = run_engine(tmp_path, "relay", engine, [scenario], interpreted)
    relay, counted = report["results"]["tree"], relay_counters(report)
    assert relay["steps"] >= 16
    assert all(gap is not None and gap < NEAR_TIE for _, _, gap in divergences(stock, relay))
    assert counted["groups"] >= 2 * 8
    assert "kernel: triton" in report["log"]

    zeroed = {**engine, "worker_extension_cls": "mutant_zeroed_triton.Mutant"}
    broken = run_engine(tmp_path, "relay", zeroed, [{**scenario, "max_tokens": 2}], interpreted)["results"]["tree"]
    firsts = {"tokens": [tokens[:2] for tokens in stock["tokens"]], "gaps": stock["gaps"]}
    assert divergences(firsts, broken), "the Triton kernels' output does not reach the model"

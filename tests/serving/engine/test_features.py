"""Every engine feature is either relayed or served by vLLM's own kernel and counted: tokens equal stock's."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
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
NEAR_TIE_FP16 = 1e-2
NEAR_TIE_BF16 = 0.5  # logits of 8 to 16 are multiples of 1/16
MLA_IMPL = "vllm.v1.attention.backends.mla.cpu_mla.CPUMLAImpl"


def tiny_gemma3(folder: Path) -> Path:
    """Windowed and global layers by turns."""
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
    embeddings = model.model.embed_tokens.weight
    with torch.no_grad():
        embeddings.mul_(0.01)
    return model


def tiny_bloom(folder: Path) -> Path:
    """Positions by ALiBi."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(
        hidden_size=128, n_layer=2, n_head=4, vocab_size=256, initializer_range=0.3, bos_token_id=1, eos_token_id=2
    )
    return save_tiny(folder, BloomForCausalLM(config))


def tiny_gpt_oss(folder: Path) -> Path:
    """Attention sinks."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2, vocab_size=256,
        initializer_range=0.3, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return save_tiny(folder, GptOssForCausalLM(config))


def tiny_llama4(folder: Path) -> Path:
    """Three layers that attend within chunks of 64 tokens, then one that attends to everything."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    config = Llama4TextConfig(
        hidden_size=128, intermediate_size=128, intermediate_size_mlp=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=64,
        interleave_moe_layer_step=1, vocab_size=256, initializer_range=0.3, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return save_tiny(folder, Llama4ForCausalLM(config))


def tiny_qwen3_next(folder: Path) -> Path:
    """Three layers with a recurrent state (gated delta net), then one of attention: a hybrid model."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        head_dim=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, linear_num_key_heads=1,
        shared_expert_intermediate_size=64, linear_num_value_heads=1, linear_key_head_dim=128,
        linear_value_head_dim=128, vocab_size=256, initializer_range=0.3, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return save_tiny(folder, Qwen3NextForCausalLM(config))


def tiny_deepseek(folder: Path) -> Path:
    """Multi-head latent attention."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV2Config(
        hidden_size=128, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=32, qk_rope_head_dim=64,
        v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=2, vocab_size=256,
        initializer_range=0.3, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return save_tiny(folder, DeepseekV2ForCausalLM(config))


def adapter(folder: Path, seed: int) -> str:
    """A LoRA adapter of rank 8 for `tiny_llama`, large enough to change what it says."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "v_proj"]}))
    weights = {}
    for layer, (name, width) in itertools.product(range(2), (("q_proj", 128), ("v_proj", 64))):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        weights[f"{prefix}.lora_A.weight"] = torch.randn(8, 128, generator=generator) * 0.3
        weights[f"{prefix}.lora_B.weight"] = torch.randn(width, 8, generator=generator) * 0.3
    save_file(weights, folder / "adapter_model.safetensors")
    return str(folder)


def with_adapters(folder: Path) -> dict[str, Any]:
    """Requests of one group by turns without an adapter, with the first and with the second."""
    adapters = [None, adapter(folder / "first", 1), adapter(folder / "second", 2)]
    return {"adapters": [adapters[i // 2 % 3] for i in range(16)]}


def with_salts(*salts: str) -> Callable[[Path], dict[str, Any]]:
    """The same prompt six times, under these salts by turns."""
    prompt = tree_prompts()[3]
    cycle = itertools.cycle(salts)
    return lambda _: {"prompts": [prompt] * 6, "arrivals": [0] * 6, "salts": [next(cycle) for _ in range(6)]}


@dataclass(frozen=True)
class Case:
    """One engine.

    Attributes:
        engine: arguments of vLLM's LLM; "{folder}" in them is a folder of that engine's own.
        scenario: what differs from TREE.
        relays: whether relay should run in at least one layer.
        shares: whether any two requests hold the same cached block.
        groups: at least so many groups in a relay step, on average.
        reasons: fallbacks that must have been counted, and no others.
        near_tie: the gap of stock's two best log-probabilities below which another token is no error.
    """

    model: Callable[[Path], Path] = tiny_llama
    engine: dict[str, Any] = field(default_factory=dict)
    scenario: Callable[[Path], dict[str, Any]] = lambda _: {}
    relays: bool = True
    shares: bool = True
    groups: float = 1.0
    reasons: frozenset[str] = frozenset()
    log: str = ""
    near_tie: float = NEAR_TIE


def llama(**overrides: Any) -> Callable[[Path], Path]:
    return lambda folder: tiny_llama(folder, **overrides)


NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
CASES = {
    "mha, head size 80, vec16": Case(llama(head_dim=80, num_key_value_heads=4)),
    "torch kernel": Case(engine={"additional_config": {"relay": {"cpu_kernel": "torch"}}}, log="kernel: torch"),
    "preemption": Case(engine={"num_gpu_blocks_override": 40}),
    "windowed and global layers in one group": Case(
        tiny_gemma3, {"disable_hybrid_kv_cache_manager": True}, reasons=frozenset({"sliding_window"}),
        log="reason: sliding_window",
    ),
    "bfloat16": Case(engine={"dtype": "bfloat16"}, near_tie=NEAR_TIE_BF16),
    "lora": Case(engine={"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}, scenario=with_adapters, groups=2.0),
    "two cache salts": Case(scenario=with_salts("a", "b"), groups=1.5),
    "fp8 cache": Case(
        engine={"kv_cache_dtype": "fp8"}, relays=False, reasons=frozenset({"kv_cache_dtype"}),
        log="reason: kv_cache_dtype",
    ),
    "prefix caching off": Case(
        engine={"enable_prefix_caching": False}, relays=False, shares=False, log="prefix caching is off"
    ),
    # Last: it loads numba, and with numba loaded vLLM cannot start another engine in the same process.
    "n-gram speculation": Case(engine={"speculative_config": NGRAM}),
}  # fmt: skip
# Rarer features, and models whose other layers vLLM computes in ways that differ with the CPU or that start slowly.
RARER_CASES = {
    "mqa, compiled by dynamo": Case(
        llama(num_key_value_heads=1), {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    ),
    # The windowed group offers nothing to share: vLLM frees its first blocks, or never takes them from the cache.
    "windowed and global layers in two groups": Case(tiny_gemma3),
    "float16": Case(engine={"dtype": "float16"}, near_tie=NEAR_TIE_FP16),
    "a cache salt for each": Case(scenario=with_salts(*"abcdef"), relays=False, shares=False),
    "kv connector": Case(
        engine={"kv_transfer_config": {
            "kv_connector": "ExampleConnector", "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": "{folder}"},
        }}, relays=False, reasons=frozenset({"kv_connector"}), log="reason: kv_connector",
    ),
    "soft cap": Case(tiny_gemma2, relays=False, reasons=frozenset({"soft_cap"}), log="reason: soft_cap"),
    "alibi": Case(tiny_bloom, relays=False, reasons=frozenset({"alibi"}), log="reason: alibi"),
    "layers within chunks": Case(tiny_llama4, reasons=frozenset({"chunked_local"}), log="reason: chunked_local"),
    "hybrid with recurrent layers": Case(
        tiny_qwen3_next, {"dtype": "bfloat16", "block_size": None, "enable_prefix_caching": True},
        near_tie=NEAR_TIE_BF16,
    ),
    "sinks": Case(  # in both of its groups; every second layer has a window besides
        tiny_gpt_oss, relays=False, reasons=frozenset({"sinks", "sliding_window"}), log="reason: sinks"
    ),
}  # fmt: skip
# vLLM refuses this one without AVX-512; test_refusals has what relay would say to it.
IMPOSSIBLE_HERE = {"fp8 cache"} if torch.backends.cpu.get_cpu_capability() == "AVX2" else set()
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
    possible = {name: case for name, case in CASES.items() if name not in IMPOSSIBLE_HERE}
    return run_cases(tmp_path_factory.mktemp("features"), possible)


@pytest.fixture(scope="module")
def rarer_sides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Reports, str]]:
    return run_cases(tmp_path_factory.mktemp("rarer"), RARER_CASES)


def run_cases(folder: Path, cases: dict[str, Case]) -> dict[str, tuple[Reports, str]]:
    jobs = []
    for name, case in cases.items():
        place = folder / name.replace(" ", "-")
        model = case.model(place / "model")
        logprobs = None if "speculative_config" in case.engine else 2
        scenario = {**TREE, "logprobs": logprobs, **case.scenario(place)}
        jobs.append({"name": name, "engine": {**ENGINE, "model": str(model), **case.engine}, "scenarios": [scenario]})
    found = {}
    for side in ("stock", "relay"):
        own = [json.loads(json.dumps(job).replace("{folder}", f"{folder}/{side}-{i}")) for i, job in enumerate(jobs)]
        reports, log = run_engines(folder, side, own, IN_PROCESS)
        found[side] = (dict(zip(cases, reports, strict=True)), log)
    return found


@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_those_of_stock(sides: dict[str, tuple[Reports, str]], name: str) -> None:
    if name in IMPOSSIBLE_HERE:
        pytest.skip("vLLM's fp8 cache wants AVX-512")
    check(sides, name, CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", RARER_CASES)
def test_tokens_of_rarer_cases_equal_those_of_stock(rarer_sides: dict[str, tuple[Reports, str]], name: str) -> None:
    check(rarer_sides, name, RARER_CASES[name])


def check(sides: dict[str, tuple[Reports, str]], name: str, case: Case) -> None:
    (stock, _), (relay, log) = (sides[side] for side in ("stock", "relay"))
    found = divergences(stock[name]["results"]["tree"], relay[name]["results"]["tree"])
    assert all(gap is not None and gap <= case.near_tie for _, _, gap in found), found

    tokens = stock[name]["results"]["tree"]["tokens"]
    assert not case.relays or sum(len(set(answer)) for answer in tokens) > 3 * len(tokens), (
        "a model that repeats itself proves nothing"
    )

    counted = relay_counters(relay[name])
    print(counted)
    assert (counted["layer_calls"] > 0) == (counted["relay_steps"] > 0) == (counted["bytes_saved"] > 0) == case.relays
    assert counted["groups"] >= case.groups * counted["relay_steps"]
    assert {reason for reason, count in counted["fallbacks"].items() if count} - {"cost_model"} == case.reasons
    assert (counted["eligible_steps"] > 0) == case.shares
    if case.log:
        assert log.count(case.log) == 1, "the reason should be named once"


def test_adapters_change_what_is_said(sides: dict[str, tuple[Reports, str]]) -> None:
    """Else the LoRA case would prove nothing."""
    bare, adapted = (sides["relay"][0][name]["results"]["tree"]["tokens"] for name in ("torch kernel", "lora"))
    assert all(bare[i] != adapted[i] for i in range(16) if i // 2 % 3)


@pytest.mark.slow
def test_latent_attention_is_left_to_vllm(tmp_path: Path) -> None:
    """vLLM serves MLA from a backend of its own, which relay does not replace: the same layers, the same tokens."""
    engine = {**ENGINE, "model": str(tiny_deepseek(tmp_path / "model"))}
    jobs = [{"name": "mla", "engine": engine, "scenarios": [{**TREE, "logprobs": 2, "max_tokens": 8}]}]
    ((stock,), _), ((relay,), _) = (
        run_engines(tmp_path, side, jobs, IN_PROCESS, implementation=MLA_IMPL) for side in ("stock", "relay")
    )
    assert divergences(stock["results"]["tree"], relay["results"]["tree"]) == []


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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

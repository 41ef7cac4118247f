"""Helpers of the tests that run real vLLM engines: starting one side, tiny models, comparing tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STOCK_IMPL = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl"
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
RELAY_IMPL = "relay_serving.vllm_plugin.attention_backend.RelayCPUImpl"


def run_engines(
    folder: Path,
    side: str,
    jobs: list[dict[str, Any]],
    environment: dict[str, str] | None = None,
    *,
    implementation: str | None = None,
) -> tuple[list[dict[str, Any]], str]:
    """The driver's report for each engine, and everything that was logged.

    Args:
        folder: for the job and result files.
        side: "stock" (no plugin of ours is loaded, and its layers are asserted to be vLLM's) or "relay" (ours).
        jobs: ``{"name", "engine", "scenarios"}`` each; ``engine`` holds arguments of vLLM's LLM. ``calls``, if given,
            are made to the workers after the scenarios: ``[[method, arguments], ...]``.
        environment: variables beside the cleaned ones of this process.
        implementation: the class all layers must have on both sides, where relay replaces none; it then counts nothing.
    """
    job_file, result_file = folder / f"{side}.jobs.json", folder / f"{side}.results.json"
    job_file.write_text(json.dumps(jobs))
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "TRITON_")) or k == "VLLM_RELAY_CACHE"}
    variables = {
        **clean,
        "VLLM_PLUGINS": "relay" if side == "relay" else "",
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **(environment or {}),
    }
    command = [sys.executable, str(HERE / "engine_driver.py"), str(job_file), str(result_file)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=1200, check=False)
    log = done.stdout + done.stderr
    assert done.returncode == 0, f"the {side} engine failed:\n{log[-6000:]}"
    reports: list[dict[str, Any]] = json.loads(result_file.read_text())
    expected = implementation or (RELAY_IMPL if side == "relay" else STOCK_IMPL)
    for report in reports:
        for layers in report["layers"]:
            assert set(layers) == {expected}, f"the {side} engine ran {layers}"
        assert bool(report["counters"]) == (expected == RELAY_IMPL)
    return reports, log


def run_engine(
    folder: Path,
    side: str,
    engine: dict[str, Any],
    scenarios: list[dict[str, Any]],
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """One engine's report; its log is under "log"."""
    jobs = [{"name": side, "engine": engine, "scenarios": scenarios}]
    (report,), log = run_engines(folder, side, jobs, environment)
    return {**report, "log": log}


def relay_counters(report: dict[str, Any]) -> dict[str, Any]:
    """The counters of the one engine of a relay report."""
    (values,) = report["counters"]
    return dict(values)


def tiny_llama(folder: Path, **overrides: Any) -> Path:
    """A two-layer Llama with random weights, saved for vLLM with ``skip_tokenizer_init``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(overrides.pop("seed", 0))
    shape = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256, "max_position_embeddings": 2048,
        "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    return save_tiny(folder, LlamaForCausalLM(LlamaConfig(**{**shape, **overrides})))


def save_tiny(folder: Path, model: Any) -> Path:
    """Save a random model in float32."""
    model.float().save_pretrained(folder)
    return folder


def tree_prompts(seed: int = 0, vocab: int = 256) -> list[list[int]]:
    """Sixteen prompts: two systems; under the first, two documents; ragged questions; three that share nothing."""
    import random

    rng = random.Random(seed)

    def text(length: int) -> list[int]:
        return [rng.randrange(3, vocab) for _ in range(length)]

    system_a, system_b = text(140), text(101)
    documents = [text(70), text(96)]
    prompts = [system_a + documents[i % 2] + text(5 + 3 * i) for i in range(8)]
    prompts += [system_b + text(9 + 7 * i) for i in range(5)]
    return prompts + [text(20 + 31 * i) for i in range(3)]


def divergences(stock: dict[str, Any], relay: dict[str, Any]) -> list[tuple[int, int, float | None]]:
    """(request, place, stock's gap between its two best log-probabilities) of each request's first differing token."""
    found = []
    for i, (left, right) in enumerate(zip(stock["tokens"], relay["tokens"], strict=True)):
        assert len(left) == len(right)
        for place, pair in enumerate(zip(left, right, strict=True)):
            if pair[0] != pair[1]:
                gap = stock["gaps"][i][place] if stock["gaps"][i] else None
                found.append((i, place, gap))
                break
    return found

"""Runs prompts through real vLLM engines and writes down what came out: ``engine_driver.py JOBS.json RESULT.json``.

Tests start it twice, once with ``VLLM_PLUGINS=""`` (stock) and once with ``VLLM_PLUGINS=relay``, and compare. Engines
of one call run one after the other; with VLLM_ENABLE_V1_MULTIPROCESSING=0 all in this process, which saves the minutes
that importing vLLM anew would take.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


def run_scenario(llm: Any, scenario: dict[str, Any]) -> dict[str, Any]:
    """Drive the engine by hand: request i arrives before step ``arrivals[i]``.

    Returns token ids per request, and for each token the gap between its two best log-probabilities (null if unknown).
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    engine = llm.llm_engine
    prompts: list[list[int]] = scenario["prompts"]
    arrivals: list[int] = scenario.get("arrivals") or [0] * len(prompts)
    adapters: list[str | None] = scenario.get("adapters") or [None] * len(prompts)
    known = sorted(set(filter(None, adapters)))
    params = SamplingParams(
        temperature=0.0, ignore_eos=True, max_tokens=scenario["max_tokens"], logprobs=scenario.get("logprobs"),
        detokenize=False,
    )  # fmt: skip
    pending = sorted(range(len(prompts)), key=lambda i: (arrivals[i], i))
    finished: dict[int, Any] = {}
    step = 0
    while pending or engine.has_unfinished_requests():
        while pending and arrivals[pending[0]] <= step:
            i = pending.pop(0)
            prompt = TokensPrompt(prompt_token_ids=prompts[i])
            if scenario.get("salts"):
                prompt["cache_salt"] = scenario["salts"][i]
            adapter = adapters[i] and LoRARequest(f"adapter-{adapters[i]}", 1 + known.index(adapters[i]), adapters[i])
            engine.add_request(f"{scenario['name']}-{i}", prompt, params, lora_request=adapter or None)
        for output in engine.step():
            if output.finished:
                finished[int(output.request_id.rsplit("-", 1)[1])] = output.outputs[0]
        step += 1
    gaps = []
    for i in range(len(prompts)):
        best_two = [sorted((p.logprob for p in place.values()), reverse=True) for place in finished[i].logprobs or []]
        gaps.append([best[0] - best[1] if len(best) > 1 else None for best in best_two])
    return {"tokens": [list(finished[i].token_ids) for i in range(len(prompts))], "gaps": gaps, "steps": step}


def open_engine(arguments: dict[str, Any]) -> Any:
    """vLLM's LLM with these arguments, and with what all tests of engines want unless they say otherwise."""
    from vllm import LLM

    defaults = {
        "enforce_eager": True,
        "seed": 0,
        "kv_cache_memory_bytes": 1 << 30,
        "worker_extension_cls": "engine_probe.EngineProbe",
        "disable_log_stats": True,
    }
    return LLM(**{**defaults, **arguments})


def read_counters(llm: Any) -> list[dict[str, Any]]:
    """What relay has counted in this engine so far: one reading, or none on the stock side."""
    from relay_serving.vllm_plugin import counters

    return [asdict(file.read()) for _, file in counters.find(llm.llm_engine.vllm_config.instance_id)]


def run_one(job: dict[str, Any]) -> dict[str, Any]:
    """Build one engine, run its scenarios, take it down."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = open_engine(job["engine"])
    results = {scenario["name"]: run_scenario(llm, scenario) for scenario in job["scenarios"]}
    for method, arguments in job.get("calls") or []:
        llm.collective_rpc(method, args=tuple(arguments))
    report = {"results": results, "layers": llm.collective_rpc("probe_layers"), "counters": read_counters(llm)}
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return report


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    reports = []
    for job in jobs:
        print(f"=== {job['name']} ===", flush=True)
        reports.append(run_one(job))
    Path(sys.argv[2]).write_text(json.dumps(reports))


if __name__ == "__main__":
    main()

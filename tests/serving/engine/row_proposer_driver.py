"""Writes masks with real vLLM engines, with and without row drafts: ``row_proposer_driver.py JOBS.json RESULT.json``.

A job is ``{"name", "engine", "requests"}``; a request has a prompt of token ids, a grammar or null, and max_tokens. All
requests of a job run in one batch, greedily. Engines run one after the other, all in this process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine_probe import EngineProbe

from relay_serving.vllm_plugin.row_proposer import RowProposer


class RecordingProposer(RowProposer):
    """The real one, which also remembers its steps: for each request (all of its tokens, the draft)."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self.steps: list[list[tuple[list[int], list[int]]]] = []

    def propose(self, sampled: Any, lengths: Any, token_ids: Any, slot_mappings: Any = None) -> list[list[int]]:
        drafts = super().propose(sampled, lengths, token_ids, slot_mappings)
        rows = [token_ids[row, : lengths[row]].tolist() for row in range(len(sampled))]
        self.steps.append(list(zip(rows, [list(draft) for draft in drafts], strict=True)))
        return drafts


class DraftProbe(EngineProbe):
    """The worker extension that hands the record out."""

    def probe_drafts(self) -> list[list[tuple[list[int], list[int]]]] | None:
        drafter = getattr(self.model_runner, "drafter", None)  # type: ignore[attr-defined]
        return drafter.steps if drafter else None


def run_one(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import StructuredOutputsParams

    from relay_serving.vllm_plugin import counters

    llm = LLM(**{"worker_extension_cls": "row_proposer_driver.DraftProbe", **job["engine"]})
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=request["grammar"] is None,
            structured_outputs=request["grammar"] and StructuredOutputsParams(grammar=request["grammar"]),
        )
        for request in job["requests"]
    ]  # fmt: skip
    prompts = [TokensPrompt(prompt_token_ids=request["prompt"]) for request in job["requests"]]
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    report = {
        "tokens": [list(output.token_ids) for output in outputs],
        "texts": [output.text for output in outputs],
        "steps": llm.collective_rpc("probe_drafts")[0],
        "layers": llm.collective_rpc("probe_layers")[0],
        "counters": [asdict(file.read()) for _, file in counters.find(llm.llm_engine.vllm_config.instance_id)],
    }
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return report


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([run_one(job) for job in jobs]))


if __name__ == "__main__":
    main()

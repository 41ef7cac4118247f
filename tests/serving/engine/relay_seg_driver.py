"""Asks a vLLM engine about pictures: ``relay_seg_driver.py JOB.json RESULT.pt``.

A job is ``{"model", "engine", "pictures", "batches", "chats", "refused_options"}``. ``pictures`` are files, read as the
server reads those of its requests; a batch is ``{"requests", "max_tokens", "logits"}``, its requests are [picture
number, question], or [null, prompt] without a picture, and run together, to the end of the answer or, with logits, to
the last token. The result holds, batch by batch, token ids, texts, cached prompt tokens and raw logits, and the
counters of relay.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from relay_models.images import ImageLimits
from relay_models.text4seg.families.registry import require_family
from relay_serving.segmentation.media import Picture, PictureReader


def read_pictures(model: str, files: list[str]) -> tuple[Any, list[Picture]]:
    """The model's family, and the pictures as a request's are read."""
    family = require_family(json.loads((Path(model) / "config.json").read_text()), model)
    reader = PictureReader(None, ImageLimits(), 10, family.squash)
    return family, [asyncio.run(reader.read_bytes(Path(file).read_bytes(), "image")) for file in files]


def ask(llm: Any, family: Any, pictures: list[Picture], batch: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0,
        max_tokens=batch["max_tokens"],
        ignore_eos=batch["logits"],
        logprobs=-1 if batch["logits"] else None,
        detokenize=not batch["logits"],
    )
    prompts = [
        {"prompt": question}
        if number is None
        else {
            "prompt": family.prompt(question),
            "multi_modal_data": {"image": pictures[number].square},
            "multi_modal_uuids": {"image": pictures[number].id},
        }
        for number, question in batch["requests"]
    ]
    answers = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        (spoken,) = output.outputs
        logits = [[place[token].logprob for token in range(len(place))] for place in spoken.logprobs or []]
        answers.append(
            {
                "prompt": list(output.prompt_token_ids),
                "tokens": list(spoken.token_ids),
                "text": spoken.text,
                "cached": output.num_cached_tokens,
                "logits_SV": torch.tensor(logits),
            }
        )
    return answers


def main() -> None:
    from vllm import LLM

    from relay_serving.vllm_plugin import counters

    job = json.loads(Path(sys.argv[1]).read_text())
    family, pictures = read_pictures(job["model"], job["pictures"])
    llm = LLM(
        **{
            "model": job["model"],
            "enforce_eager": True,
            "max_model_len": 2048,
            "block_size": 32,
            "kv_cache_memory_bytes": 128 << 20,
            "max_logprobs": -1,
            "logprobs_mode": "raw_logits",
            "seed": 0,
            **job["engine"],
        }
    )
    batches = [ask(llm, family, pictures, batch) for batch in job["batches"]]
    found = [asdict(file.read()) for _, file in counters.find(llm.llm_engine.vllm_config.instance_id)]
    refusal = _refusal(llm, family, pictures, job["refused_options"]) if "refused_options" in job else ""
    chats = [llm.chat(chat, _greedy(64), use_tqdm=False)[0] for chat in job.get("chats", [])]
    said = [{"prompt": list(chat.prompt_token_ids), "tokens": list(chat.outputs[0].token_ids)} for chat in chats]
    torch.save({"batches": batches, "counters": found, "chats": said, "refusal": refusal}, sys.argv[2])
    llm.llm_engine.engine_core.shutdown()


def _refusal(llm: Any, family: Any, pictures: list[Picture], options: dict[str, Any]) -> str:
    """What is said to a request that asks for its picture to be seen in another way."""
    from vllm.exceptions import VLLMValidationError

    media = {"multi_modal_data": {"image": pictures[0].square}, "mm_processor_kwargs": options}
    try:
        llm.generate([{"prompt": family.prompt("?"), **media}], _greedy(1), use_tqdm=False)
    except VLLMValidationError as error:
        return str(error)
    return ""


def _greedy(max_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens)


if __name__ == "__main__":
    main()

"""The grammars inside vLLM: whatever a model of random weights samples under one is an exact descriptor, and it ends.

Run as a script this file is the driver: ``test_grammar_in_vllm.py JOBS.json RESULT.json`` builds one engine, has it
answer every job, and writes down the answers. The judgement is made by the test, without vLLM.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay_models.text4seg.codec import DescriptorStatus, Repair, decode_answer
from relay_models.text4seg.grammar import FreeText, GrammarSpec, seg_grammar, worst_case_bytes

SAMPLES = 500
CONTEXT = 8192
PROMPT_TOKENS = 4
CLASSES = (
    "others", "person", "bicycle", "car", "motorbike", "aeroplane", "bus", "train", "truck", "boat", "traffic light",
    "bird", "cat", "dog", "horse", "sheep", "cow", "bear", "zebra", "dining table",
)  # fmt: skip
SENTENCES = (
    "Sure, here is the segmentation mask for 'dog laying down':\n",
    "The segmentation map for 'dog laying down' is:\n",
)

SPECS = {
    "expression": GrammarSpec.referring("dog laying down", height=16, width=16, preamble=SENTENCES),
    "20 classes": GrammarSpec(16, 16, CLASSES, ("\n",)),
    "open": GrammarSpec(24, 24, None, ("\n",)),
    "free preamble": GrammarSpec.referring("dog", height=16, width=16, preamble=FreeText()),
    "blocks or refusal": GrammarSpec(6, 9, ("others", "dog", "狗 🐕"), FreeText(24), max_blocks=3, allow_refusal=True),
}


def job(name: str, samples: int, **sampling: Any) -> dict[str, Any]:
    spec = SPECS[name]
    limit = min(worst_case_bytes(spec) + 1, CONTEXT - PROMPT_TOKENS)
    return {
        "name": name,
        "grammar": seg_grammar(spec),
        "samples": samples,
        "sampling": {"temperature": 1.0, "max_tokens": limit, **sampling},
    }


@pytest.fixture(scope="module")
def tiny_model(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights that speak SmolLM2's 49,152 tokens."""
    from engines import tiny_llama

    folder = tiny_llama(
        tmp_path_factory.mktemp("grammar") / "model", hidden_size=64, intermediate_size=128, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=49_152, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_model / file, folder)
    return folder


@pytest.fixture(scope="module")
def run_jobs(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, make_environment: Callable[..., dict[str, str]]
) -> Callable[..., dict[str, list[dict[str, Any]]]]:
    """Answers by job name, of one engine started for these jobs."""

    def run(jobs: list[dict[str, Any]], **engine: Any) -> dict[str, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp("jobs")
        (folder / "jobs.json").write_text(json.dumps({"engine": {"model": str(tiny_model), **engine}, "jobs": jobs}))
        done = subprocess.run(
            [sys.executable, __file__, str(folder / "jobs.json"), str(folder / "result.json")],
            env=make_environment(VLLM_PLUGINS="", VLLM_ENABLE_V1_MULTIPROCESSING="0"),
            capture_output=True, text=True, timeout=3600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        answers: dict[str, list[dict[str, Any]]] = json.loads((folder / "result.json").read_text())
        return answers

    return run


# ---------------------------------------------------------------- the judgement


def check_answer(text: str, spec: GrammarSpec) -> int:
    """The answer's descriptors are exact, by addition here and by the decoder; returns how many there are."""
    bodies = re.findall("<seg>(.*?)</seg>", text, re.DOTALL)
    decoded = decode_answer(text, height=spec.height, width=spec.width, labels=spec.labels)
    assert len(decoded.descriptors) == len(bodies)
    assert not bodies or text.endswith("</seg>")
    for body, descriptor in zip(bodies, decoded.descriptors, strict=True):
        assert body.endswith("\n")
        rows = body[:-1].split("\n ")
        assert len(rows) == spec.height
        for row in rows:
            runs = [re.fullmatch(r"([^|<\n]+) \*([1-9][0-9]*)", run) for run in row.split("| ")]
            assert all(runs), row
            assert sum(int(run[2]) for run in runs if run) == spec.width, row
            assert spec.labels is None or {run[1] for run in runs if run} <= set(spec.labels), row
        if spec.keeps_runs_apart:
            assert descriptor.status is DescriptorStatus.COMPLETE, (body, descriptor.repairs)
        else:
            assert set(descriptor.repairs) <= {Repair.SEPARATOR, Repair.LABEL_NORMALISED}, (body, descriptor.repairs)
    return len(bodies)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_random_logits_draw_exact_descriptors(
    name: str, run_jobs: Callable[..., dict[str, list[dict[str, Any]]]]
) -> None:
    """500 answers at temperature 1, each to a prompt of its own: all end by themselves and all are exact.

    A quarter of a million tokens for each grammar, half a million for the open one: minutes, spent on drawing from
    49,152 logits.
    """
    spec = SPECS[name]
    (answers,) = run_jobs([job(name, SAMPLES)]).values()
    assert len(answers) == SAMPLES
    assert {answer["backend"] for answer in answers} == {"xgrammar"}
    for answer in answers:
        assert answer["finish_reason"] == "stop", answer
        assert answer["num_tokens"] <= worst_case_bytes(spec) + 1
    counts = [check_answer(answer["text"], spec) for answer in answers]
    # Few of the tokens that may follow a block end the answer, so random logits nearly always draw as many as they may.
    assert set(counts) <= set(range(0 if spec.allow_refusal else 1, spec.max_blocks + 1))
    assert max(counts) == spec.max_blocks
    assert not spec.allow_refusal or 0 in counts, "no sample refused"
    assert len({answer["text"] for answer in answers}) > SAMPLES / 2, "the samples are not random"


@pytest.mark.slow
def test_a_cut_answer_is_truncated_and_what_was_written_is_kept(
    run_jobs: Callable[..., dict[str, list[dict[str, Any]]]],
) -> None:
    """max_tokens is the one thing that leaves a descriptor incomplete."""
    spec = SPECS["20 classes"]
    (answers,) = run_jobs([job("20 classes", 20, max_tokens=150)]).values()
    for answer in answers:
        assert (answer["finish_reason"], answer["num_tokens"]) == ("length", 150)
        decoded = decode_answer(answer["text"], height=16, width=16, labels=spec.labels)
        assert decoded.status is DescriptorStatus.TRUNCATED
        (descriptor,) = decoded.descriptors
        assert descriptor.num_rows_read >= 1
        assert set(descriptor.repairs) <= {Repair.TRUNCATED, Repair.PARTIAL_RUN_DROPPED, Repair.ROWS_MISSING}


@pytest.mark.slow
def test_drafted_tokens_leave_no_grammar(run_jobs: Callable[..., dict[str, list[dict[str, Any]]]]) -> None:
    """Speculative decoding takes drafts back, and the grammar's state with them."""
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    names = ("20 classes", "free preamble")
    drafted = run_jobs([job(name, 60) for name in names], speculative_config=ngram)
    for name in names:
        for answer in drafted[name]:
            assert answer["finish_reason"] == "stop", answer
            check_answer(answer["text"], SPECS[name])


# ---------------------------------------------------------------- the driver


def answer_jobs(engine: dict[str, Any], jobs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    import random

    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import StructuredOutputsParams

    llm = LLM(
        **{
            "dtype": "float32", "enforce_eager": True, "seed": 0, "max_model_len": CONTEXT, "max_num_seqs": 256,
            "kv_cache_memory_bytes": 1 << 30, "disable_log_stats": True, **engine,
        }
    )  # fmt: skip
    numbers = random.Random(0)
    answers = {}
    for job in jobs:
        prompts = [
            TokensPrompt(prompt_token_ids=[numbers.randrange(100, 49_000) for _ in range(PROMPT_TOKENS)])
            for _ in range(job["samples"])
        ]
        structured = StructuredOutputsParams(grammar=job["grammar"])
        outputs = llm.generate(
            prompts, SamplingParams(structured_outputs=structured, **job["sampling"]), use_tqdm=False
        )
        answers[job["name"]] = [
            {
                "text": output.outputs[0].text,
                "num_tokens": len(output.outputs[0].token_ids),
                "finish_reason": output.outputs[0].finish_reason,
                "backend": structured._backend,
            }
            for output in outputs
        ]
    return answers


def main() -> None:
    told = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(answer_jobs(told["engine"], told["jobs"])))


if __name__ == "__main__":
    main()

"""Row drafts in a real vLLM: under a grammar, beside plain chat, with relay; the same tokens as without them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engines import HERE, IN_PROCESS, RELAY_IMPL, STOCK_IMPL, tiny_llama

from relay_models.text4seg.codec import CLOSE_TAG, OPEN_TAG, DescriptorStatus, decode_answer
from relay_models.text4seg.grammar import GrammarSpec, seg_grammar

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LABELS = ("the brown dog", "person, man", "кошка")
SIDE = 8
DRAFTS = 16
ENGINE = {
    "dtype": "float32", "enforce_eager": True, "seed": 0, "block_size": 32, "max_model_len": 1024,
    "max_num_batched_tokens": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20, "disable_log_stats": True,
}  # fmt: skip
SPECULATION = {
    "method": "custom_class",
    "model": "row_proposer_driver.RecordingProposer",
    "num_speculative_tokens": DRAFTS,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Path:
    """Random weights behind a real tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(folder, vocab_size=49152, tie_word_embeddings=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded_model / name, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def requests(tokenizer: Any) -> list[dict[str, Any]]:
    """Six masks behind four blocks of shared prompt, and three plain answers; one prompt ends within a block."""
    shared = "You answer with masks. " + "Rows follow one another from top to bottom. " * 14
    found = []
    for i in range(6):
        spec = GrammarSpec.referring(LABELS[i % 3], height=SIDE, width=SIDE, preamble=(f"Mask {i}:\n",))
        prompt = tokenizer.encode(f"{shared}{'Please. ' * i}Segment '{LABELS[i % 3]}'.")
        found.append({"prompt": prompt, "grammar": seg_grammar(spec), "max_tokens": 600})
    assert len(tokenizer.encode(shared)) >= 4 * ENGINE["block_size"]
    row = f"others *{SIDE}\n "
    for text in ("Tell me a story.", f"The format is {OPEN_TAG}{row * SIDE}{CLOSE_TAG}.", f"{OPEN_TAG}{row * 3}"):
        found.append({"prompt": tokenizer.encode(shared + text), "grammar": None, "max_tokens": 40})
    return found


def run(folder: Path, side: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    job_file, result_file = folder / f"{side}.jobs.json", folder / f"{side}.results.json"
    job_file.write_text(json.dumps(jobs))
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "TRITON_")) or k == "VLLM_RELAY_CACHE"}
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**clean, **IN_PROCESS, "VLLM_PLUGINS": "relay" if side == "relay" else "", "PYTHONPATH": path}
    command = [sys.executable, str(HERE / "row_proposer_driver.py"), str(job_file), str(result_file)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"the {side} engine failed:\n{(done.stdout + done.stderr)[-6000:]}"
    reports: list[dict[str, Any]] = json.loads(result_file.read_text())
    assert all(set(report["layers"]) == {RELAY_IMPL if side == "relay" else STOCK_IMPL} for report in reports)
    return reports


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, model: Path, tokenizer: Any) -> dict[str, dict[str, Any]]:
    """The same requests by vLLM, by vLLM with drafts, and by relay with drafts."""
    folder = tmp_path_factory.mktemp("row-proposer")
    asked = requests(tokenizer)
    plain = {"name": "plain", "engine": {**ENGINE, "model": str(model)}, "requests": asked}
    drafted = {**plain, "name": "drafted", "engine": {**plain["engine"], "speculative_config": SPECULATION}}
    stock, stock_drafted = run(folder, "stock", [plain, drafted])
    (relay_drafted,) = run(folder, "relay", [drafted])
    return {"stock": stock, "stock with drafts": stock_drafted, "relay with drafts": relay_drafted}


@pytest.mark.parametrize("side", ["stock with drafts", "relay with drafts"])
def test_drafts_change_no_token(reports: dict[str, dict[str, Any]], side: str) -> None:
    assert reports[side]["tokens"] == reports["stock"]["tokens"]


def test_the_answers_are_masks(reports: dict[str, dict[str, Any]]) -> None:
    """Else all of this would prove nothing."""
    masks = reports["stock"]["texts"][:6]
    for text in masks:
        assert decode_answer(text, height=SIDE, width=SIDE).status is DescriptorStatus.COMPLETE, text
    assert len(set(masks)) == 6
    assert all(OPEN_TAG not in text for text in reports["stock"]["texts"][6:])


def rows_of_request(report: dict[str, Any], prompt: list[int]) -> dict[int, tuple[list[int], list[int]]]:
    """(answer so far, draft) behind each pass that wrote something for this request, by the length of the answer."""
    found = {}
    for step in report["steps"]:
        for tokens, draft in step:
            if len(tokens) > len(prompt) and tokens[: len(prompt)] == prompt:
                found[len(tokens) - len(prompt)] = (tokens[len(prompt) :], draft)
    return found


@pytest.mark.parametrize("side", ["stock with drafts", "relay with drafts"])
def test_drafts_save_passes_and_stay_within_blocks(
    reports: dict[str, dict[str, Any]], tokenizer: Any, side: str
) -> None:
    """Passes of each request, for when a request begins depends on how long its grammar takes to compile."""
    for request, answer in zip(requests(tokenizer), reports[side]["tokens"], strict=True):
        rows = rows_of_request(reports[side], request["prompt"])
        drafts = 0
        for written, draft in rows.values():
            text = tokenizer.decode(written)
            assert not draft or text.rfind(OPEN_TAG) > text.rfind(CLOSE_TAG), f"{draft} drafted behind {text!r}"
            assert len(draft) <= DRAFTS
            drafts += bool(draft)
        print(f"{side}: {len(answer)} tokens in {len(rows)} passes, {drafts} of them drafted")
        if request["grammar"]:
            assert drafts > 10
            assert len(rows) < 0.9 * len(answer), "even a model that draws at random writes what the grammar fixes"
        else:
            assert drafts == 0
            assert len(rows) == len(answer)


def test_relay_serves_requests_of_several_query_tokens(reports: dict[str, dict[str, Any]]) -> None:
    (counted,) = reports["relay with drafts"]["counters"]
    steps = reports["relay with drafts"]["steps"]
    with_drafts = sum(any(draft for _, draft in step) for step in steps)
    print(counted, f"{with_drafts} of {len(steps)} steps had drafts")
    # A step's drafts are computed in the next one: more relayed steps than steps without drafts, so some had both.
    assert counted["relay_steps"] > len(steps) - with_drafts + 1
    assert not {reason: n for reason, n in counted["fallbacks"].items() if n and reason != "cost_model"}


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, model: Path) -> None:
    engine = {**ENGINE, "model": str(model), "skip_tokenizer_init": True, "speculative_config": SPECULATION}
    with pytest.raises(AssertionError, match="row drafts need the model's tokenizer, and skip_tokenizer_init is set"):
        run(tmp_path, "stock", [{"name": "blind", "engine": engine, "requests": []}])

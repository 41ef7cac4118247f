"""`vllm-relay bench decode` with real engines and a random two-layer model: small, but nothing is pretended."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.e2e

TIME_LIMIT = 240


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, head size 64, without a tokenizer: prompts are token ids."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def bench(model: Path, output: Path) -> subprocess.Popen[str]:
    flags = "--batch 4 --shared 0,256 --rounds 2 --decode 5 --enforce-eager --kv-cache-memory-bytes 33554432"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "TRITON_"))}
    if "VLLM_RELAY_CACHE" in os.environ:
        environment["VLLM_RELAY_CACHE"] = os.environ["VLLM_RELAY_CACHE"]
    return subprocess.Popen(
        [sys.executable, "-m", "relay_benchmarks", "decode", str(model), *flags.split(), "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "VLLM_PLUGINS": "relay"},  # what a relay server's shell may have: stock must not inherit it
    )


@pytest.mark.slow
def test_relay_relays_and_stock_is_stock(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.csv"
    out, err = bench(tiny_model, output).communicate(timeout=TIME_LIMIT)
    assert "rows of" in out, err
    with output.open(newline="") as text:
        rows = {(row["side"], int(row["shared_tokens"])): row for row in csv.DictReader(text)}
    assert set(rows) == {("stock", 0), ("relay", 0), ("stock", 256), ("relay", 256)}
    assert {rows["stock", shared]["backend"] for shared in (0, 256)} == {"CPUAttentionBackend"}
    assert {rows["relay", shared]["backend"] for shared in (0, 256)} == {"RelayCPUBackend"}
    assert {(row["status"], row["rounds"], row["block_size"]) for row in rows.values()} == {("complete", "2", "128")}

    relay = rows["relay", 256]
    assert relay["cache"] == "warm"
    relay_steps = int(relay["relay_steps"])
    assert relay_steps >= 2 * 5  # every timed step of both rounds
    assert relay_steps <= int(relay["eligible_steps"]) <= int(relay["steps"])
    assert int(relay["layer_calls"]) == 2 * relay_steps
    # three of four requests do not read the two shared blocks
    assert int(relay["kv_tokens_saved"]) >= 2 * 5 * 3 * 256
    assert float(relay["planning_us"]) > 0
    assert float(relay["equal_tokens"]) > 0.2

    alone = rows["relay", 0]
    assert (alone["relay_steps"], alone["eligible_steps"], alone["layer_calls"]) == ("0", "0", "0")
    assert int(alone["steps"]) > 0
    for row in rows.values():
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["self_equal_tokens"]) > 0.2
    assert "default of stock 128, of relay 128" in out


@pytest.mark.slow
def test_an_interrupted_start_leaves_no_process(tiny_model: Path, tmp_path: Path) -> None:
    process = bench(tiny_model, tmp_path / "results.csv")
    deadline = time.monotonic() + 60
    descendants: list[psutil.Process] = []
    while len(descendants) < 3 and time.monotonic() < deadline:  # both engines, and what the first of them spawned
        time.sleep(0.2)
        descendants = psutil.Process(process.pid).children(recursive=True)
    assert len(descendants) >= 2
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(descendants, timeout=10)
    assert not alive
    assert out == ""

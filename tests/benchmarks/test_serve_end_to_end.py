"""`vllm-relay bench serve` and `throughput` with real servers, engines and traffic, of tiny random models."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_chat import make_tiny_chat

pytestmark = pytest.mark.e2e

TIME_LIMIT = 900
FLAGS = ("--enforce-eager", "--kv-cache-memory-bytes", "134217728")


@pytest.fixture(scope="module")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat(tmp_path_factory.mktemp("tiny-chat"))


@pytest.fixture
def bench(make_environment: Callable[..., dict[str, str]], tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start an experiment; its rows go to ``rows.csv``."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "relay_benchmarks", *arguments, "--output", str(tmp_path / "rows.csv")]
        environment = make_environment(VLLM_PLUGINS="relay")  # what a shell may have: stock must not inherit it
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)

    return start


def rows_in(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "rows.csv").open(newline="") as text:
        return {(row["side"], row["shared_tokens"]): row for row in csv.DictReader(text)}


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_servers_are_compared_over_http(bench: Any, tiny_chat: Path, tmp_path: Path) -> None:
    load = "--workload agent --contexts 2 --shared 320,640 --requests 8 --max-concurrency 8 --generate 8 --rounds 2"
    picture = tmp_path / "cost.png"
    goodput = ("--goodput", "ttft:60000", "e2el:60000", "--plot", str(picture))
    out, err = bench("serve", str(tiny_chat), *load.split(), *FLAGS, *goodput).communicate(timeout=TIME_LIMIT)
    assert "4 rows of" in out, err
    rows = rows_in(tmp_path)
    assert set(rows) == {(side, shared) for side in ("stock", "relay") for shared in ("320", "640")}
    for (side, _), row in rows.items():
        assert row["backend"] == {"stock": "CPUAttentionBackend", "relay": "RelayCPUBackend"}[side]
        assert (row["relay"], row["status"]) == ({"stock": "off", "relay": "on"}[side], "complete")
        assert (row["completed"], row["block_size"], row["default_block_size"]) == ("16", "128", "128")
        assert 0 < float(row["ttft_p50_ms"]) < float(row["e2el_p99_ms"])
        assert 0 < float(row["goodput"]) == float(row["requests_per_second"])
        assert float(row["equal_text"]) > 0.2
    relay = rows["relay", "640"]
    assert int(relay["relay_steps"]) > 0
    assert int(relay["kv_tokens_saved"]) > 128
    # of about 700 tokens each prompt found at least the four full blocks of 640
    assert int(relay["prefix_hits"]) >= 16 * 512
    assert "relay against stock vLLM, the best alternative of this run" in out
    assert is_picture(picture)


@pytest.mark.slow
def test_an_interrupted_comparison_leaves_no_server(bench: Any, tiny_chat: Path) -> None:
    process = bench("serve", str(tiny_chat), "--shared", "320", *FLAGS)
    deadline = time.monotonic() + 120
    descendants: list[psutil.Process] = []
    while len(descendants) < 2 and time.monotonic() < deadline:  # the server, and what it spawned
        time.sleep(0.2)
        descendants = psutil.Process(process.pid).children(recursive=True)
    assert len(descendants) >= 2
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, ""), err
    assert "Traceback" not in err
    assert not psutil.wait_procs(descendants, timeout=10)[1]


@pytest.mark.slow
def test_questions_about_a_picture_are_compared_with_stock(bench: Any, tmp_path: Path) -> None:
    """Stock does not know the class of relay-seg: it is told of that, and of nothing else of ours."""
    from relay_serving import embedded_model
    from tiny_relay_seg import make_tiny_relay_seg

    model = make_tiny_relay_seg(tmp_path / "tiny-seg", embedded_model.prepare(embedded_model.RELAY_SEG))
    load = "--workload image --dtype float32 --block-size 32 --requests 6 --max-concurrency 6 --generate 6 --rounds 1"
    out, err = bench("serve", str(model), *load.split(), *FLAGS).communicate(timeout=TIME_LIMIT)
    assert "2 rows of" in out, err
    rows = rows_in(tmp_path)
    stock, relay = rows["stock", "0"], rows["relay", "0"]
    assert (stock["backend"], relay["backend"]) == ("CPUAttentionBackend", "RelayCPUBackend")
    assert int(relay["relay_steps"]) > 0
    assert float(relay["prompt_tokens"]) > 256  # a cell of the picture is a token
    assert int(relay["prefix_hits"]) >= 6 * 256
    assert float(relay["equal_text"]) > 0.9  # float32


@pytest.mark.slow
def test_a_batch_job_is_timed_on_both_sides(bench: Any, tiny_chat: Path, tmp_path: Path) -> None:
    job = "--requests 6 --concurrency 4 --shared 64,512 --generate 8 --rounds 2"
    out, err = bench("throughput", str(tiny_chat), *job.split(), *FLAGS).communicate(timeout=TIME_LIMIT)
    assert "4 rows of" in out, err
    rows = rows_in(tmp_path)
    relay = rows["relay", "512"]
    assert (relay["backend"], rows["stock", "512"]["backend"]) == ("RelayCPUBackend", "CPUAttentionBackend")
    assert int(relay["relay_steps"]) > 0 == int(rows["relay", "64"]["relay_steps"])  # 64 tokens are less than a block
    assert int(relay["kv_tokens_saved"]) >= 512
    for row in rows.values():
        ratio = float(row["output_tokens_per_second"]) / float(row["requests_per_second"])
        assert ratio == pytest.approx(8, rel=0.01)
        assert float(row["equal_tokens"]) > 0.2
    (picture,) = tmp_path.glob("rows-*.png")
    assert is_picture(picture)


@pytest.mark.slow
def test_a_model_of_which_relay_serves_no_layer_is_refused(bench: Any, tmp_path: Path) -> None:
    """Every layer of it has a window."""
    model = make_tiny_chat(tmp_path / "windowed")
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 256}
    (model / "config.json").write_text(json.dumps(config))
    process = bench("throughput", str(model), "--shared", "512", *FLAGS)
    out, err = process.communicate(timeout=TIME_LIMIT)
    assert (process.returncode, out) == (1, "")
    assert "error: relay cannot serve windowed: sliding_window; nothing was timed" in err.splitlines()[-1]
    assert rows_in(tmp_path) == {}


PREFIXES = "prefix_repetition --prefix-repetition-prefix-len 256 --prefix-repetition-suffix-len 8"


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        "--workload tenants --shared 256 --request-rate 20",
        f"--dataset-name {PREFIXES} --prefix-repetition-num-prefixes 2 --prefix-repetition-output-len 4",
    ],
    ids=["tenants", "dataset"],
)
def test_a_running_server_is_measured(
    asked: str, relay_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from relay_benchmarks import cli

    words = ["serve", "--url", relay_server.url, *asked.split(), "--requests", "4", "--generate", "4", "--rounds", "1"]
    output = ["--output", str(tmp_path / "rows.csv"), "--plot", str(tmp_path / "cost.png")]
    status = cli.main([*words, *output])
    out, err = capsys.readouterr()
    assert (status, "relay on" in out) == (0, True), err
    (row,) = rows_in(tmp_path).values()
    assert (row["side"], row["relay"], row["completed"], row["model"]) == ("server", "on", "4", "relay-seg-tiny")
    assert float(row["output_tokens_per_second"]) == pytest.approx(4 * float(row["requests_per_second"]), rel=0.01)
    assert float(row["prompt_tokens"]) > 256
    assert int(row["prefix_hits"]) > 0
    assert is_picture(tmp_path / "cost.png")

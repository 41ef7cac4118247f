"""A server's life as a user sees it: one clear line for a mistake, and nothing left behind after a signal."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from relay_serving import embedded_model

pytestmark = pytest.mark.e2e

COMMAND = [sys.executable, "-m", "relay_serving", "serve"]
# quick to load, and started often here
QUICK = ("--enforce-eager", "--kv-cache-memory-bytes", "256M", "--max-model-len", "1024")


def run_to_failure(environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *flags], env=environment, capture_output=True, text=True, timeout=180)


@pytest.fixture
def environment(make_environment: Callable[..., dict[str, str]]) -> dict[str, str]:
    return make_environment()


def assert_one_clear_line(result: subprocess.CompletedProcess[str], *expected: str) -> None:
    printed = result.stdout + result.stderr
    assert result.returncode not in (0, None), printed
    assert "Traceback" not in printed
    errors = [line for line in printed.splitlines() if line.startswith("vllm-relay: error:")]
    assert len(errors) == 1, printed
    assert printed.rstrip().endswith(errors[0])
    for text in expected:
        assert text in errors[0]


# ---- bad input


def test_an_unknown_flag(environment):
    result = run_to_failure(environment, "--max-modle-len", "5")
    assert_one_clear_line(result, "--max-modle-len", "did you mean --max-model-len?")
    assert result.returncode == 2


def test_a_missing_model_path(environment):
    result = run_to_failure(environment, "/no/such/model")
    assert_one_clear_line(result, "no model folder at '/no/such/model'", "check the path")


def test_a_folder_that_is_no_model(environment, tmp_path):
    assert_one_clear_line(run_to_failure(environment, str(tmp_path)), str(tmp_path))


def test_a_port_in_use(environment):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        result = run_to_failure(environment, "--port", str(port))
    assert_one_clear_line(result, f"127.0.0.1:{port}", "Address already in use", "--port")


@pytest.mark.slow
def test_too_little_memory_for_the_kv_cache(environment, free_port):
    flags = ("--enforce-eager", "--kv-cache-memory-bytes", "4M", "--port", str(free_port))
    result = run_to_failure(environment, *flags)
    assert_one_clear_line(result, "KV cache", "max_model_len", "Full log: ")
    log = Path(result.stderr.strip().rpartition("Full log: ")[2])
    assert "Traceback" in log.read_text()


def test_a_wrong_setting_of_ours(make_environment):
    result = run_to_failure(make_environment(VLLM_RELAY_CPU_KERNEL="abacus"), "--port", "1")
    assert_one_clear_line(result, "VLLM_RELAY_CPU_KERNEL is 'abacus'", "one of auto, cpp, torch, triton")


def test_a_prompt_over_the_context_is_a_400(relay_server):
    import httpx

    body = {"model": embedded_model.DEFAULT, "prompt": "word " * 9000, "max_tokens": 1}
    response = httpx.post(f"{relay_server.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 400
    assert "8192" in response.json()["error"]["message"]


# ---- the end of a server


def processes_of(server: subprocess.Popen[bytes]) -> list[psutil.Process]:
    parent = psutil.Process(server.pid)
    return [parent, *parent.children(recursive=True)]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def start(environment: dict[str, str], log: Path, port: int) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen([*COMMAND, *QUICK, "--port", str(port)], stdout=output, stderr=output, env=environment)


def wait_for(log: Path, text: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while text not in log.read_text(errors="replace"):
        assert server.poll() is None, log.read_text(errors="replace")[-3000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("stage", "number", "status"),
    [
        pytest.param("Initializing a V1 LLM engine", signal.SIGTERM, 128 + signal.SIGTERM, id="sigterm-while-starting"),
        pytest.param("vllm-relay: ready on", signal.SIGINT, 0, id="ctrl-c-while-serving", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_every_process_within_seconds(environment, tmp_path, free_port, stage, number, status):
    log = tmp_path / "server.log"
    server = start(environment, log, free_port)
    wait_for(log, stage, server)
    family = processes_of(server)
    assert len(family) >= 3

    server.send_signal(number)
    assert server.wait(15) == status
    assert alive(family) == []
    assert "Traceback" not in log.read_text()


def test_killing_the_supervisor_outright_leaves_no_orphan(environment, tmp_path, free_port):
    log = tmp_path / "server.log"
    server = start(environment, log, free_port)
    wait_for(log, "Initializing a V1 LLM engine", server)
    family = processes_of(server)

    server.kill()
    server.wait(5)
    deadline = time.monotonic() + 20
    while alive(family) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert alive(family) == []

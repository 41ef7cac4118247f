"""Who is stock, who is relay, and what ends a run before anything is timed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from relay_benchmarks import processes, sides
from relay_benchmarks.errors import ComparisonError, EngineFailedError, KernelCheckError
from relay_benchmarks.processes import close_all
from relay_benchmarks.sides import (
    RELAY_CLASSES,
    STOCK_CLASSES,
    Engine,
    Side,
    check_answers,
    check_sides,
    environment_of,
)

SAME = dict.fromkeys(sides._MUST_AGREE, 1)
PASSED = {"kernel": "cpp (amx)", "passed": True, "error": 0.1, "budget": 0.2}


def described(**changes: dict[str, Any]) -> dict[Side, dict[str, Any]]:
    stock = {**SAME, **STOCK_CLASSES, "relay_is_loaded": False, "kernel_check": None}
    relay = {**SAME, **RELAY_CLASSES, "relay_is_loaded": True, "kernel_check": PASSED}
    return {Side.STOCK: {**stock, **changes.get("stock", {})}, Side.RELAY: {**relay, **changes.get("relay", {})}}


def test_a_fair_comparison_passes() -> None:
    check_sides(described())


@pytest.mark.parametrize("kind", ["backends", "implementations", "builders"])
def test_stock_that_runs_relay_is_no_baseline(kind: str) -> None:
    with pytest.raises(ComparisonError, match="stock engine's attention"):
        check_sides(described(stock={kind: RELAY_CLASSES[kind]}))
    with pytest.raises(ComparisonError, match="stock engine's attention"):
        check_sides(described(stock={kind: [*STOCK_CLASSES[kind], *RELAY_CLASSES[kind]]}))
    with pytest.raises(ComparisonError, match="none instead of"):
        check_sides(described(stock={kind: []}))


def test_stock_that_loaded_relay_is_no_baseline() -> None:
    with pytest.raises(ComparisonError, match="has relay's backend loaded"):
        check_sides(described(stock={"relay_is_loaded": True}))


def test_relay_that_serves_as_stock_is_no_relay() -> None:
    with pytest.raises(ComparisonError, match="relay engine's attention"):
        check_sides(described(relay=dict(STOCK_CLASSES)))


@pytest.mark.parametrize("name", sides._MUST_AGREE)
def test_engines_that_differ_are_not_compared(name: str) -> None:
    with pytest.raises(ComparisonError, match=f"differ in {name}"):
        check_sides(described(relay={name: 2}))


def test_a_wrong_kernel_is_not_timed() -> None:
    with pytest.raises(KernelCheckError, match="nothing was timed"):
        check_sides(described(relay={"kernel_check": {**PASSED, "passed": False}}))
    with pytest.raises(ComparisonError, match="cannot serve tiny-gemma: sliding_window"):
        check_sides(described(relay={"kernel_check": {"refusal": "sliding_window"}}), "tiny-gemma")


def test_answers_with_too_little_in_common_are_not_compared() -> None:
    check_answers("batch 4", equal=0.6, self_equal=1.0)  # what rounding leaves of 32 tokens
    check_answers("batch 4", equal=0.1, self_equal=0.2)  # a model that does not agree with itself either
    with pytest.raises(ComparisonError, match=r"batch 4: only 5.0 % .* 100.0 %"):
        check_answers("batch 4", equal=0.05, self_equal=1.0)


def test_the_environments_differ_in_the_plugin_only(tmp_path: Path) -> None:
    users = {"VLLM_PLUGINS": "other,relay", "VLLM_RELAY": "0", "HOME": str(tmp_path), "MINE": "kept"}
    stock, relay = environment_of(Side.STOCK, users), environment_of(Side.RELAY, users)
    assert (stock["VLLM_PLUGINS"], relay["VLLM_PLUGINS"]) == ("", "relay")
    assert (stock["VLLM_RELAY"], relay["VLLM_RELAY"]) == ("0", "1")
    different = {name for name in {*stock, *relay} if stock.get(name) != relay.get(name)}
    assert different == {"VLLM_PLUGINS", "VLLM_RELAY"}
    assert stock["MINE"] == "kept"


STAND_IN = """
import subprocess, sys, time
from multiprocessing.connection import Connection

grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
with Connection(int(sys.argv[-1])) as parent:
    while (command := parent.recv())[0] != "stop":
        name, arguments = command
        if name == "die":
            raise ValueError("the reason, in the log")
        if name == "hang":
            time.sleep(600)
        parent.send(("failed", "ValueError: refused") if name == "refuse" else ("done", arguments))
"""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An Engine whose process is no vLLM, but has a child that nothing ends by itself."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    started = processes.subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return started([sys.executable, str(script), command[-1]], **options)

    monkeypatch.setattr(processes.subprocess, "Popen", start)
    monkeypatch.setattr(processes, "_STOP_SECONDS", 1.0)
    monkeypatch.setattr(processes, "_TERMINATE_SECONDS", 1.0)
    monkeypatch.setattr(processes.tempfile, "tempdir", str(tmp_path))
    engine = Engine(Side.STOCK, os.environ)
    yield engine
    close_all([engine])


def processes_of(engine: Engine) -> list[psutil.Process]:
    deadline = time.monotonic() + 10
    while len(found := engine._processes()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(found) == 2
    return found


@pytest.mark.parametrize("state", ["idle", "hanging", "dead"])
def test_no_process_is_left(engine: Engine, state: str) -> None:
    engine.call("echo")
    processes = processes_of(engine)
    if state == "hanging":
        engine.request("hang")
    elif state == "dead":
        engine._process.kill()
        engine._process.wait()
    close_all([engine])
    assert not any(process.is_running() for process in processes)


def test_an_engine_that_refuses_says_why(engine: Engine) -> None:
    with pytest.raises(EngineFailedError, match="stock engine failed: ValueError: refused"):
        engine.call("refuse")


def test_an_engine_that_dies_is_explained_from_its_log(engine: Engine) -> None:
    with pytest.raises(EngineFailedError, match="the reason, in the log") as caught:
        engine.call("die")
    assert str(engine.log_path) in str(caught.value)
    with pytest.raises(EngineFailedError):
        engine.call("echo")


def test_an_engine_that_is_killed_is_noticed(engine: Engine) -> None:
    engine.request("hang")
    engine._process.kill()
    with pytest.raises(EngineFailedError, match="ended with status -9"):
        engine.answer()


def test_an_engine_answers(engine: Engine) -> None:
    assert engine.call("echo", number=7) == {"number": 7}
    assert engine.cpu_seconds() > 0
    engine.wait_until_quiet()

"""Stock and relay as two engine processes, alive at the same time, of which the caller works only one at a time.

An engine's life: launch → start (a minute) → describe → warm and measure → begin_close → close. Both load this
distribution's code, but only relay's VLLM_PLUGINS names the plugin: what that makes of each is read back from its
worker and checked.

Promises: when `close_all` returns, no process of the engines is alive. Should this process be killed outright, they
end by themselves.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from relay_benchmarks.errors import ComparisonError, EngineFailedError, KernelCheckError
from relay_benchmarks.workload import Shape
from relay_serving import plugin_names, start_defaults
from relay_serving.settings import KILL_SWITCH, cache_folder
from relay_serving.start_failure import StartLog, in_one_line

STOCK_CLASSES = {
    "backends": ["vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"],
    "implementations": ["vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl"],
    "builders": ["vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadataBuilder"],
}
RELAY_CLASSES = {
    "backends": ["relay_serving.vllm_plugin.attention_backend.RelayCPUBackend"],
    "implementations": ["relay_serving.vllm_plugin.attention_backend.RelayCPUImpl"],
    "builders": ["relay_serving.vllm_plugin.attention_backend.RelayCPUMetadataBuilder"],
}
_MUST_AGREE = (
    *("vllm_version", "torch_version", "dtype", "layers", "query_heads", "key_heads", "head_size"),
    *("max_model_len", "block_size", "block_sizes", "num_blocks", "compiled"),
)
_STOP_SECONDS = 12.0
_TERMINATE_SECONDS = 3.0
_QUIET_WINDOW = 0.25
_QUIET_SECONDS = 6.0  # an idle vLLM worker polls for one second before it sleeps


class Side(StrEnum):
    STOCK = "stock"
    RELAY = "relay"


class Engine:
    """The parent's end of one engine process, in a session of its own so that a Ctrl-C does not reach it."""

    def __init__(self, side: Side, environment: Mapping[str, str]) -> None:
        self.side = side
        self._seen: dict[int, psutil.Process] = {}
        self._owes_an_answer = False
        ours, theirs = socket.socketpair()
        log_descriptor, log_name = tempfile.mkstemp(prefix=f"vllm-relay-bench-{side}-", suffix=".log")
        self.log_path = Path(log_name)
        with theirs, os.fdopen(log_descriptor, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "relay_benchmarks.measured_engine", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._pipe = Connection(ours.detach())

    def request(self, command: str, **arguments: Any) -> None:
        """Send a command; `answer` waits for what comes of it."""
        self._owes_an_answer = True
        try:
            self._pipe.send((command, arguments))
        except OSError as error:
            raise self._failure(None) from error

    def answer(self) -> Any:
        """Raises EngineFailedError if the engine refuses or dies instead."""
        while not self._pipe.poll(0.2):
            if self._process.poll() is not None and not self._pipe.poll(0):
                raise self._failure(None)
        try:
            status, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._failure(None) from error
        self._owes_an_answer = False
        if status == "failed":
            raise self._failure(value)
        return value

    def call(self, command: str, **arguments: Any) -> Any:
        self.request(command, **arguments)
        return self.answer()

    def warm(self, shape: Shape, seed: int) -> None:
        self.call("warm", shape=shape, seed=seed)

    def measure(self, shape: Shape, seed: int, steps: int) -> dict[str, Any]:
        answer: dict[str, Any] = self.call("measure", shape=shape, seed=seed, steps=steps)
        return answer

    def cpu_seconds(self) -> float:
        """Processor time that all processes of this engine have used."""
        total = 0.0
        for process in self._processes():
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            total += times.user + times.system
        return total

    def wait_until_quiet(self) -> None:
        """Return once the engine uses less than a tenth of a core, or after a few seconds."""
        deadline = time.monotonic() + _QUIET_SECONDS
        while time.monotonic() < deadline:
            before = self.cpu_seconds()
            time.sleep(_QUIET_WINDOW)
            if self.cpu_seconds() - before < 0.1 * _QUIET_WINDOW:
                return

    def begin_close(self) -> None:
        """Ask it to end, without waiting."""
        self._processes()
        if self._owes_an_answer:  # it will not read the word before it has given it
            self._process.terminate()
        else:
            self._ask_to_stop()

    def close(self) -> None:
        """End every process: by a word, then by SIGTERM, then by SIGKILL. Once `begin_close` was called."""
        for seconds, end in ((_STOP_SECONDS, self._process.terminate), (_TERMINATE_SECONDS, self._kill)):
            if self._wait(seconds):
                break
            end()
        self._kill()
        self._process.wait()
        self._pipe.close()

    def _ask_to_stop(self) -> None:
        try:
            self._pipe.send(("stop", {}))
        except OSError:
            pass

    def forget_log(self) -> None:
        """Remove the log of an engine that did its work."""
        self.log_path.unlink(missing_ok=True)

    def _wait(self, seconds: float) -> bool:
        """Whether the process has ended by then."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _processes(self) -> list[psutil.Process]:
        """The engine and its descendants; those seen once are remembered, whoever is their parent by then."""
        try:
            root = psutil.Process(self._process.pid)
            for process in (root, *root.children(recursive=True)):
                self._seen.setdefault(process.pid, process)
        except psutil.Error:
            pass
        return [process for process in self._seen.values() if process.is_running()]

    def _kill(self) -> None:
        processes = self._processes()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        for process in processes:
            try:
                process.kill()
            except psutil.Error:
                pass
        psutil.wait_procs([process for process in processes if process.pid != self._process.pid], timeout=5)

    def _failure(self, message: str | None) -> EngineFailedError:
        if message is None:
            self._wait(2.0)  # a connection closes a little before its process ends
        log = StartLog()
        for line in self.log_path.read_text(errors="replace").splitlines():
            log.shows(line)
        status = self._process.poll()
        fallback = message or (f"it ended with status {status}" if status is not None else "it closed its connection")
        reason = in_one_line(log.reason() or fallback).rstrip(".")
        return EngineFailedError(f"the {self.side} engine failed: {reason}. Full log: {self.log_path}")


def close_all(engines: Collection[Engine]) -> None:
    """All at the same time: each takes seconds."""
    for engine in engines:
        engine.begin_close()
    for engine in engines:
        engine.close()


def environment_of(side: Side, users: Mapping[str, str]) -> dict[str, str]:
    """The same environment but for the plugin: other plugins are off on both sides."""
    return {
        **users,
        **start_defaults.compile_cache_environment(users, cache_folder(users)),
        plugin_names.VARIABLE: plugin_names.OUR_NAME if side is Side.RELAY else "",
        KILL_SWITCH: "1" if side is Side.RELAY else "0",
        "PYTHONUNBUFFERED": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def check_sides(described: Mapping[Side, Mapping[str, Any]]) -> None:
    """Raises ComparisonError unless stock is stock, relay is relay, and nothing else differs; KernelCheckError."""
    for side, classes in ((Side.STOCK, STOCK_CLASSES), (Side.RELAY, RELAY_CLASSES)):
        for kind, expected in classes.items():
            if (found := described[side][kind]) != expected:
                raise ComparisonError(
                    f"the {side} engine's attention {kind} are {', '.join(found) or 'none'} instead of "
                    f"{expected[0]}; nothing was timed"
                )
    if described[Side.STOCK]["relay_is_loaded"]:
        raise ComparisonError("the stock engine's worker has relay's backend loaded; nothing was timed")
    for name in _MUST_AGREE:
        stock, relay = described[Side.STOCK][name], described[Side.RELAY][name]
        if stock != relay:
            raise ComparisonError(f"the engines differ in {name}: stock {stock}, relay {relay}; nothing was timed")
    _check_kernel_passed(described[Side.RELAY]["kernel_check"])


def _check_kernel_passed(found: Mapping[str, Any]) -> None:
    if "refusal" in found:
        raise ComparisonError(f"relay cannot serve this model: {found['refusal']}; nothing was timed")
    if not found["passed"]:
        raise KernelCheckError(
            f"the kernel {found['kernel']} is wrong: its error is {found['error']:.3g}, the budget "
            f"{found['budget']:.3g}; nothing was timed. Run the kernel tests"
        )

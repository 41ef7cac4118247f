"""A process that is measured: started in a session of its own, watched, and ended with everything it started.

Promises: after `close`, no process of it is alive. What it printed is in `log_path`, from which a failure is explained.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import psutil

from relay_benchmarks.errors import EngineFailedError
from relay_serving.start_failure import StartLog, in_one_line

_STOP_SECONDS = 12.0
_TERMINATE_SECONDS = 3.0
_QUIET_WINDOW = 0.25
_QUIET_SECONDS = 6.0  # an idle vLLM worker polls for one second before it sleeps


class MeasuredProcess:
    """One child and its descendants, out of reach of a Ctrl-C in this terminal."""

    kind = "process"

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int] = ()
    ) -> None:
        self.name = name
        self._seen: dict[int, psutil.Process] = {}
        log_descriptor, log_name = tempfile.mkstemp(prefix=f"vllm-relay-bench-{name}-", suffix=".log")
        self.log_path = Path(log_name)
        with os.fdopen(log_descriptor, "wb") as log:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                pass_fds=tuple(pass_fds),
                start_new_session=True,
            )

    def cpu_seconds(self) -> float:
        """Processor time that all its processes have used."""
        total = 0.0
        for process in self._processes():
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            total += times.user + times.system
        return total

    def wait_until_quiet(self) -> None:
        """Return once it uses less than a tenth of a core, or after a few seconds."""
        deadline = time.monotonic() + _QUIET_SECONDS
        while time.monotonic() < deadline:
            before = self.cpu_seconds()
            time.sleep(_QUIET_WINDOW)
            if self.cpu_seconds() - before < 0.1 * _QUIET_WINDOW:
                return

    def begin_close(self) -> None:
        """Ask it to end, without waiting."""
        self._processes()
        self._process.terminate()

    def close(self) -> None:
        """End every process: by what `begin_close` asked for, then by SIGTERM, then by SIGKILL."""
        for seconds, end in ((_STOP_SECONDS, self._process.terminate), (_TERMINATE_SECONDS, self._kill)):
            if self.has_ended_by(seconds):
                break
            end()
        self._kill()
        self._process.wait()

    def forget_log(self) -> None:
        """Remove the log of a process that did its work."""
        self.log_path.unlink(missing_ok=True)

    def failure(self, message: str | None = None) -> EngineFailedError:
        """Why it failed: the first cause in its log, else `message`, else how it ended."""
        if message is None:
            self.has_ended_by(2.0)  # a connection closes a little before its process ends
        log = StartLog()
        for line in self.log_path.read_text(errors="replace").splitlines():
            log.shows(line)
        status = self._process.poll()
        fallback = message or (f"it ended with status {status}" if status is not None else "it closed its connection")
        reason = in_one_line(log.reason() or fallback).rstrip(".")
        return EngineFailedError(f"the {self.name} {self.kind} failed: {reason}. Full log: {self.log_path}")

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def has_ended_by(self, seconds: float) -> bool:
        """Whether it has ended so many seconds from now, at the latest."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _processes(self) -> list[psutil.Process]:
        """The child and its descendants; those seen once are remembered, whoever is their parent by then."""
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


def close_all(processes: Collection[MeasuredProcess]) -> None:
    """All at the same time: each takes seconds."""
    for process in processes:
        process.begin_close()
    for process in processes:
        process.close()

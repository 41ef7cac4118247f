"""Runs vLLM's server as a child and stands between it and the terminal.

A child's life: spawn → speak (log lines, filtered until it is up; all of them go to a file) → be ready (URL and curl)
→ stop (one signal, a grace period, then the whole process group) → be explained (one line, if it failed).

Promises: when `supervise` returns, no process of the child's group is alive; a start that fails prints one line and no
traceback, and that line names the file with the full log; whatever becomes of the terminal or the disk, the child's
output is read, so that it never waits for us. This process never imports vLLM or PyTorch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from types import FrameType
from typing import IO, Any

from relay_serving.errors import EngineStartError, RelayServingError, UsageError
from relay_serving.start_failure import StartLog, in_one_line, is_second_hand, with_advice

GRACE_SECONDS = 6.0  # from the signal to SIGKILL, on top of vLLM's own --shutdown-timeout
KEPT_LOGS = 10
LOG_BYTES = 50 << 20  # then the file starts anew, and the one before it is kept
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Listening:
    """What the child says it will listen on, once it has read its command line."""

    host: str
    port: int
    tls: bool
    unix_socket: str | None
    model: str
    chats: bool
    needs_key: bool
    relay: str
    shutdown_timeout: float

    @property
    def base_url(self) -> str:
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        if ":" in host and not host.startswith("["):
            host = f"[{host}]"
        return f"http{'s' if self.tls else ''}://{host}:{self.port}"

    def healthy(self) -> bool:
        connection = self._connection()
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def _connection(self) -> HTTPConnection:
        if self.unix_socket is not None:
            connection = HTTPConnection("localhost", timeout=2)
            connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.sock.settimeout(2)
            try:
                connection.sock.connect(self.unix_socket)
            except OSError:
                connection.close()
                return HTTPConnection("localhost", 1, timeout=1)
            return connection
        host = self.base_url.split("://")[1].rpartition(":")[0].strip("[]")
        if self.tls:
            return HTTPSConnection(host, self.port, timeout=2, context=ssl._create_unverified_context())
        return HTTPConnection(host, self.port, timeout=2)

    def greeting(self) -> str:
        url = self.base_url if self.unix_socket is None else f"unix:{self.unix_socket}"
        return f"\nvllm-relay: ready on {url}  (model {self.model}, relay {self.relay})\n{self._curl()}\n"

    def _curl(self) -> str:
        body: dict[str, Any] = {"model": self.model}
        if self.chats:
            body["messages"] = [{"role": "user", "content": "Why is the sky blue?"}]
        else:
            body["prompt"] = "Once upon a time"
        body["max_tokens"] = 64
        base = self.base_url if self.unix_socket is None else "http://localhost"
        words = ["curl", *(["-k"] if self.tls else [])]
        if self.unix_socket is not None:
            words += ["--unix-socket", self.unix_socket]
        words += [f"{base}/v1/{'chat/' if self.chats else ''}completions", "-H", "Content-Type: application/json"]
        key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if self.needs_key else ""
        return f"{shlex.join(words)}{key} -d {shlex.quote(json.dumps(body))}"


class ServerLog:
    """The file that keeps what a server says, locked for as long as that server runs, of bounded size.

    A disk that fills up ends the file, once and for all, and never the server.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_whole = True
        self._file: IO[bytes] | None = None
        self._open()

    def write(self, raw: bytes, *, may_rotate: bool = True) -> None:
        if self._file is None:
            return
        try:
            if may_rotate and self._size + len(raw) > LOG_BYTES:
                self._rotate()
            self._file.write(raw)
            self._size += len(raw)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        self._file = self.path.open("wb", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._size = 0

    def _rotate(self) -> None:
        os.replace(self.path, _predecessor(self.path))
        self.close()
        self._open()

    def _give_up(self, error: OSError) -> None:
        self.is_whole = False
        self.close()
        _write(f"vllm-relay: WARNING: the log {self.path} ends here: {error.strerror or error}; the server goes on\n")


def engine_command(status_descriptor: int, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "relay_serving.engine_process", str(status_descriptor), *arguments]


class Child:
    """One vLLM server, in a session of its own so that one signal reaches all of it."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: ServerLog) -> None:
        self._log = log
        self.listening: Listening | None = None
        self.ready = False
        self.stopping = False
        self._usage_error: str | None = None
        self._own_error: str | None = None
        self._start_log = StartLog()
        status_read, status_write = os.pipe()
        try:
            self.process = subprocess.Popen(
                engine_command(status_write, arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                pass_fds=(status_write,),
                start_new_session=True,
            )
        finally:
            os.close(status_write)
        self._threads = [
            threading.Thread(target=self._relay_output, daemon=True),
            threading.Thread(target=self._read_status, args=(os.fdopen(status_read),), daemon=True),
            threading.Thread(target=self._announce_readiness, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self, signal_number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal_number)

    def end(self) -> None:
        """Kill what is left of the group, then let the readers finish: its last words are shown too."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                break
            time.sleep(0.02)
        self.process.wait()
        for thread in self._threads:
            thread.join(timeout=2)
        self.stopping = True

    def failure(self) -> RelayServingError:
        if self._usage_error is not None:
            return UsageError(self._usage_error)
        status = self.process.returncode
        own_is_first_hand = self._own_error is not None and not is_second_hand(self._own_error)
        reason = self._own_error if own_is_first_hand else self._start_log.reason() or self._own_error
        if reason is None and status < 0:
            reason = f"a process was ended by {signal.Signals(-status).name}"
            if status == -signal.SIGKILL:
                reason += ", most likely because memory ran out; lower --kv-cache-memory-bytes or --max-model-len"
        what = "stopped" if self.ready else "did not start"
        reason = with_advice(in_one_line(reason or f"vLLM exited with status {status} and gave no reason"))
        log = f"{'Full log' if self._log.is_whole else 'Log, cut short'}: {self._log.path}"
        return EngineStartError(f"the server {what}: {reason.rstrip('.')}. {log}")

    def _relay_output(self) -> None:
        output: IO[bytes] | None = self.process.stdout
        assert output is not None
        for raw in output:
            self._log.write(raw, may_rotate=self.ready)
            line = raw.decode("utf-8", errors="replace").rstrip("\n")
            shown = self._start_log.shows(line) and '"GET /health HTTP' not in line
            if (self.ready and not self.stopping) or (shown and not self.stopping):
                _write(f"{line}\n")
        self._log.close()

    def _read_status(self, status: IO[str]) -> None:
        with status:
            for line in status:
                try:
                    event, value = json.loads(line)
                except ValueError:  # the child was killed in the middle of a line
                    continue
                if event == "listening":
                    self.listening = Listening(**value)
                elif event == "usage":
                    self._usage_error = value
                elif event == "error":
                    self._own_error = value
                elif event == "notice":
                    _write(f"vllm-relay: {value}\n")

    def _announce_readiness(self) -> None:
        while not self.stopping and self.process.poll() is None:
            listening = self.listening
            if listening is not None and listening.healthy():
                time.sleep(_POLL_SECONDS)  # lets the last lines of the start come first
                self.ready = True
                _write(listening.greeting())
                return
            time.sleep(_POLL_SECONDS)


class StopSignals:
    """Remembers SIGINT and SIGTERM instead of dying of them, for the time it is entered."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)


def supervise(arguments: Sequence[str], environment: Mapping[str, str], logs: Path) -> int:
    """Serve until the child ends or a signal asks for it. Returns the exit status; raises what went wrong."""
    with StopSignals() as signals:
        child = Child(arguments, environment, new_log(logs))
        try:
            stopped_at = None
            while child.process.poll() is None:
                if signals.received and stopped_at is None:
                    stopped_at = time.monotonic()
                    _write("vllm-relay: stopping\n")
                    child.stopping = True
                    child.stop(signal.SIGTERM)
                if stopped_at is not None and _is_over(child, stopped_at, len(signals.received)):
                    break
                time.sleep(_POLL_SECONDS / 2)
        finally:
            child.end()
    if signals.received:
        return 0 if child.ready else 128 + signals.received[0]
    if child.process.returncode == 0:
        return 0
    raise child.failure()


def _is_over(child: Child, stopped_at: float, signals_received: int) -> bool:
    drain = child.listening.shutdown_timeout if child.ready and child.listening is not None else 0.0
    return signals_received > 1 or time.monotonic() - stopped_at > drain + GRACE_SECONDS


def new_log(folder: Path) -> ServerLog:
    """A log for this start, and of older ones the latest, and those of servers that still run. Raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in sorted(folder.glob("serve-*.log"))[: -KEPT_LOGS + 1]:
            _remove_unless_in_use(old)
        return ServerLog(folder / f"serve-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log")
    except OSError as error:
        raise UsageError(
            f"cannot write logs to {folder}: {error.strerror}; name another folder in VLLM_RELAY_CACHE"
        ) from error


def _remove_unless_in_use(log: Path) -> None:
    with contextlib.suppress(OSError), log.open("rb") as file:  # OSError: in use, already gone, or another user's
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        log.unlink(missing_ok=True)
        _predecessor(log).unlink(missing_ok=True)


def _predecessor(log: Path) -> Path:
    return log.with_suffix(".log.1")


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except (OSError, ValueError):  # whoever read us has gone, or its disk is full; the log file goes on
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # what is left in the old one's buffer would fail at exit

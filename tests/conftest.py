"""What every test may use: a free port, and one real server for the whole session."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

START_LIMIT_SECONDS = 300


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def isolated_environment(**changes: str) -> dict[str, str]:
    """This environment without what a developer, or another test, may have set for vLLM; where caches are is kept."""
    kept = {"VLLM_RELAY_CACHE", "VLLM_CACHE_ROOT"}
    others = ("VLLM_", "RELAY_", "TRITON_")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(others) or name in kept}
    return {**ours, "PYTHONUNBUFFERED": "1", **changes}


@dataclass(frozen=True)
class RelayServer:
    """A running `vllm-relay serve`: its base URL (without /v1), everything it printed, its process."""

    url: str
    log_path: Path
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


@contextlib.contextmanager
def serving(log_path: Path, *flags: str, **environment: str) -> Iterator[RelayServer]:
    """Start `vllm-relay serve` on a free port, wait until it says it is ready, stop it afterwards."""
    port = find_free_port()
    command = [sys.executable, "-m", "relay_serving", "serve", *flags, "--port", str(port)]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=isolated_environment(**environment))
    server = RelayServer(f"http://127.0.0.1:{port}", log_path, process)
    try:
        wait_until_ready(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_until_ready(server: RelayServer) -> None:
    deadline = time.monotonic() + START_LIMIT_SECONDS
    while "vllm-relay: ready on" not in server.log:
        if server.process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the server did not become ready; it printed:\n{server.log[-4000:]}")
        time.sleep(0.2)


@pytest.fixture(scope="session")
def relay_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayServer]:
    """The embedded model, started once. Not compiled, which takes minutes where nothing was compiled before."""
    with serving(tmp_path_factory.mktemp("relay_server") / "server.log", "--enforce-eager") as server:
        yield server


@pytest.fixture(scope="session")
def start_server() -> Callable[..., contextlib.AbstractContextManager[RelayServer]]:
    """`serving`, for tests that need a server of their own."""
    return serving


@pytest.fixture(scope="session")
def make_environment() -> Callable[..., dict[str, str]]:
    """`isolated_environment`, for tests that start processes of their own."""
    return isolated_environment


@pytest.fixture
def free_port() -> int:
    return find_free_port()


def http_status(url: str) -> int | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            status: int = response.status
            return status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None

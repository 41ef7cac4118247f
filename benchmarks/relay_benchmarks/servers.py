"""Servers under load: one that runs already, or stock and relay, started here.

A started server is vLLM's own API server on both sides, in an environment that differs in the plugin only; what that
makes of its worker is asked of it over HTTP, by vLLM's development endpoints, and checked as for engines.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from relay_benchmarks.errors import BenchArgumentError, RequestsFailedError
from relay_benchmarks.load import Api
from relay_benchmarks.pair import closing, say, say_it_is_up
from relay_benchmarks.processes import MeasuredProcess
from relay_benchmarks.server_metrics import Reading, read
from relay_benchmarks.sides import Side, check_sides, environment_of
from relay_benchmarks.traffic import SAMPLE
from relay_benchmarks.worker_inspection import EXTENSION
from relay_serving.settings import SEGMENTATION_OFF, RelaySettings

HOST = "127.0.0.1"
START_SECONDS = 900.0
_POLL_SECONDS = 0.2
_TIMEOUT = 300.0
_LAST_WORDS_SECONDS = 3.0  # of a server whose engine has died
_DEVELOPMENT = "VLLM_SERVER_DEV_MODE"


class Server:
    """A server that is up, whoever started it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._client = httpx.Client(base_url=self.url, timeout=_TIMEOUT, headers=_authorization())
        try:
            served = self._client.get("/v1/models").raise_for_status().json()["data"][0]
            self.model, self.folder = str(served["id"]), str(served.get("root") or served["id"])
            self.max_model_len: int | None = served.get("max_model_len")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError, AttributeError) as error:
            raise BenchArgumentError(f"--url {url} is no running server: {error or type(error).__name__}") from error

    def metrics(self) -> Reading:
        """Raises RequestsFailedError where the server is gone, or counts nothing."""
        try:
            return read(self._get("/metrics").raise_for_status().text)
        except (httpx.HTTPStatusError, ValueError) as error:
            raise RequestsFailedError(f"{self.url}/metrics cannot be read: {error or type(error).__name__}") from error

    def describe(self) -> dict[str, Any]:
        """What a server tells anybody: its version, its context, its block size."""
        answer = self._get("/version")
        version = answer.json().get("version", "") if answer.status_code == httpx.codes.OK else ""
        block_size = self.metrics().block_size or ""
        return {"vllm_version": version, "max_model_len": self.max_model_len, "block_size": block_size}

    def forget_prefixes(self) -> bool:
        """Empty the prefix cache, if the server lets us: only one in vLLM's development mode does."""
        return self._post("/reset_prefix_cache", None).status_code == httpx.codes.OK

    def ask_once(self, api: Api, sample: Any) -> int:
        """Answer one request, not streamed. Returns its prompt's tokens. Raises RequestsFailedError, with why."""
        body: dict[str, Any] = {"model": self.model, "temperature": 0, "ignore_eos": True}
        body["max_tokens"] = sample.expected_output_len
        if api is Api.CHAT:
            body["messages"] = sample.chat_messages or [{"role": "user", "content": sample.prompt}]
        else:
            body["prompt"] = sample.prompt
        answer = self._post(api.path, body)
        if answer.status_code != httpx.codes.OK:
            raise RequestsFailedError(f"{self.url}{api.path} refuses: {_reason(answer)}")
        return int(answer.json()["usage"]["prompt_tokens"])

    def tokens_per_word(self) -> float:
        """Of the words that requests are made of; 1 where the server does not tell."""
        answer = self._post("/tokenize", {"model": self.model, "prompt": SAMPLE, "add_special_tokens": False})
        if answer.status_code != httpx.codes.OK:
            return 1.0
        return int(answer.json()["count"]) / len(SAMPLE.split())

    def worker(self, method: str, *arguments: Any) -> dict[str, Any]:
        """What the first worker answers; for servers in development mode, with our extension."""
        answer = self._post("/collective_rpc", {"method": method, "args": list(arguments)})
        if answer.status_code != httpx.codes.OK:
            raise RequestsFailedError(f"{self.url} does not say what serves attention: {_reason(answer)}")
        found: dict[str, Any] = answer.json()["results"][0]
        return found

    def _get(self, path: str) -> httpx.Response:
        try:
            return self._client.get(path)
        except httpx.HTTPError as error:
            raise RequestsFailedError(f"{self.url}{path} does not answer: {error or type(error).__name__}") from error

    def _post(self, path: str, body: Any) -> httpx.Response:
        try:
            return self._client.post(path, json=body)
        except httpx.HTTPError as error:
            raise RequestsFailedError(f"{self.url}{path} does not answer: {error or type(error).__name__}") from error


class ServerProcess(MeasuredProcess):
    """A server of one side, started here."""

    kind = "server"

    def __init__(self, side: Side, environment: Mapping[str, str], model: str, flags: Sequence[str]) -> None:
        self.side = side
        self._url = f"http://{HOST}:{_free_port()}"
        descriptor, facts = tempfile.mkstemp(prefix=f"vllm-relay-bench-{side}-", suffix=".json")
        os.close(descriptor)
        self._facts = Path(facts)
        address = ["--host", HOST, "--port", self._url.rpartition(":")[2]]
        command = [sys.executable, "-m", "relay_benchmarks.measured_server", str(self._facts), model, *flags, *address]
        super().__init__(side, command, {**environment, _DEVELOPMENT: "1"})

    def wait_until_ready(self) -> Server:
        """Raises EngineFailedError if it does not come up."""
        deadline = time.monotonic() + START_SECONDS
        while not self._is_healthy():
            if self.has_ended():
                raise self.failure()
            if time.monotonic() > deadline:
                raise self.failure(f"it did not answer within {START_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)
        return Server(self._url)

    def default_block_size(self) -> int:
        return int(json.loads(self._facts.read_text())["default_block_size"])

    def close(self) -> None:
        super().close()
        self._facts.unlink(missing_ok=True)

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self._url}/health", timeout=5).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False


@contextmanager
def running_servers(
    vllm_arguments: Mapping[str, Any], flags: Sequence[str], settings: RelaySettings, seed: int, name: str
) -> Iterator[tuple[dict[Side, ServerProcess], dict[Side, Server], dict[Side, dict[str, Any]]]]:
    """Stock and relay, started one after the other, checked to be what they are called, and ended.

    Yields the processes, the servers, and what each says of itself. Should one die, its log explains it.

    Args:
        vllm_arguments: of both, the model among them.
        flags: more of vLLM's flags, of both.
        name: of the model, in requests and errors.
    """
    arguments = dict(vllm_arguments)
    model = arguments.pop("model")
    common = [*flags_of(arguments), "--served-model-name", name, "--worker-extension-cls", EXTENSION, *flags]
    ours = settings.updated({"segmentation": SEGMENTATION_OFF}).to_additional_config()  # stock has no such chats
    processes: dict[Side, ServerProcess] = {}
    servers: dict[Side, Server] = {}
    described: dict[Side, dict[str, Any]] = {}
    with closing(processes):
        for side in Side:
            began = time.monotonic()
            own = ["--additional-config", json.dumps(ours)] if side is Side.RELAY else []
            processes[side] = ServerProcess(side, environment_of(side, os.environ), model, [*common, *own])
            say(f"starting {side} (log: {processes[side].log_path})")
            servers[side] = processes[side].wait_until_ready()
            described[side] = {
                **servers[side].worker("relay_bench_describe"),
                "kernel_check": servers[side].worker("relay_bench_check_kernel", seed) if side is Side.RELAY else None,
                "default_block_size": processes[side].default_block_size(),
            }
            say_it_is_up(side, described[side], began)
        check_sides(described, name)
        try:
            yield processes, servers, described
        except RequestsFailedError as error:
            for process in processes.values():
                if process.has_ended_by(_LAST_WORDS_SECONDS):
                    raise process.failure(str(error)) from error
            raise


def flags_of(arguments: Mapping[str, Any]) -> list[str]:
    """vLLM's engine arguments as flags of its server."""
    flags = []
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags += [flag, str(value)]
    return flags


def words_of(flags: str) -> list[str]:
    """Raises BenchArgumentError for quotes that do not end."""
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise BenchArgumentError(f"--server-flags {flags!r}: {error}") from error


def _reason(answer: httpx.Response) -> str:
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = answer.text
    return " ".join(f"{answer.status_code} {message}".split())[:400]


def _authorization() -> dict[str, str]:
    """As vLLM's request functions do."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port

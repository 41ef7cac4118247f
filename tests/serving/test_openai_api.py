"""The server speaks OpenAI's API, through the official client and plain HTTP, and shows relay at work on /metrics."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError

import openai
import pytest

from relay_serving import embedded_model

pytestmark = pytest.mark.e2e


class RelayServer(Protocol):
    """What the fixture `relay_server` yields."""

    url: str
    log: str


StartServer = Callable[..., AbstractContextManager[RelayServer]]

MODEL = embedded_model.DEFAULT
KEY = "a-secret-key"
# About 330 tokens: two full blocks of 128, ten of 32.
SYSTEM = "You are a careful assistant. " + "Answer briefly, name your sources, and never invent a number. " * 24


def client_of(server: RelayServer, api_key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=api_key, max_retries=0, timeout=120)


def post(server: RelayServer, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        server.url + path, data=body, headers={"Content-Type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.loads(response.read())
    except HTTPError as error:
        return error.code, json.loads(error.read())


def metrics(server: RelayServer) -> dict[str, float]:
    """Every sample of relay's counters by its full name with labels."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        text = response.read().decode()
    lines = [line for line in text.splitlines() if line.startswith("vllm_relay_")]
    samples = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
    assert len(samples) == len(lines), "a counter appears twice"
    return samples


def total(samples: dict[str, float], name: str) -> float:
    found = [value for sample, value in samples.items() if sample.startswith(f"vllm_relay_{name}_total{{")]
    assert found, f"vllm_relay_{name}_total is not on /metrics"
    return sum(found)


def test_models_are_listed(relay_server: RelayServer) -> None:
    assert [model.id for model in client_of(relay_server).models.list()] == [MODEL]


def test_a_chat_is_answered(relay_server: RelayServer) -> None:
    answer = client_of(relay_server).chat.completions.create(
        model=MODEL, temperature=0, max_tokens=24,
        messages=[{"role": "user", "content": "Finish the list: Monday, Tuesday, Wednesday,"}],  # by a wide margin
    )  # fmt: skip
    assert "Monday, Tuesday, Wednesday" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_a_streamed_chat_says_the_same(relay_server: RelayServer) -> None:
    question: Any = {
        "model": MODEL, "messages": [{"role": "user", "content": "Count from one to five."}], "temperature": 0,
        "max_tokens": 24,
    }  # fmt: skip
    client = client_of(relay_server)
    whole = client.chat.completions.create(**question)
    chunks = list(client.chat.completions.create(**question, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert sum(map(bool, pieces)) > 3, "the answer should arrive in pieces"
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_completion_is_answered_with_logprobs(relay_server: RelayServer) -> None:
    answer = client_of(relay_server).completions.create(
        model=MODEL, prompt=["One, two, three,", "Monday, Tuesday,"], temperature=0, max_tokens=6, logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert "four" in answer.choices[0].text
    assert answer.choices[1].logprobs is not None


def test_tokenize_and_detokenize_are_inverse(relay_server: RelayServer) -> None:
    text = "A long shared prompt."
    status, tokens = post(relay_server, "/tokenize", json.dumps({"model": MODEL, "prompt": text}).encode())
    assert status == 200
    body = json.dumps({"model": MODEL, "tokens": tokens["tokens"]}).encode()
    assert post(relay_server, "/detokenize", body)[1]["prompt"] == text


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"{", 400, "json"),
        (json.dumps({"model": MODEL, "prompt": "hi", "max_tokens": -3}).encode(), 400, "max_tokens"),
        (json.dumps({"model": "no-such-model", "prompt": "hi"}).encode(), 404, "no-such-model"),
        (json.dumps({"model": MODEL, "prompt": "word " * 9000, "max_tokens": 4}).encode(), 400, "8192"),
        (json.dumps({"model": MODEL, "prompt": "hi", "temperature": "warm"}).encode(), 400, "temperature"),
    ],
    ids=["not json", "negative max_tokens", "unknown model", "over the context", "wrong type"],
)
def test_bad_requests_name_what_was_wrong(relay_server: RelayServer, body: bytes, status: int, word: str) -> None:
    got, answer = post(relay_server, "/v1/completions", body)
    assert got == status
    assert word in json.dumps(answer).lower()
    assert "Traceback" not in json.dumps(answer)
    assert post(relay_server, "/v1/completions", json.dumps({"model": MODEL, "prompt": "hi"}).encode())[0] == 200


def test_requests_that_share_a_prompt_are_relayed_and_counted(relay_server: RelayServer) -> None:
    """One call with eight prompts: they run together however slow the machine is."""
    client = client_of(relay_server)
    client.completions.create(model=MODEL, prompt=SYSTEM, max_tokens=1)  # the prompt is cached before the others come
    before = metrics(relay_server)
    answer = client.completions.create(
        model=MODEL, prompt=[f"{SYSTEM}Tell me about {number}." for number in range(8)], max_tokens=32, temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == list(range(8))
    after = metrics(relay_server)
    grown = {name: total(after, name) - total(before, name) for name in (
        "steps", "eligible_steps", "relay_steps", "relay_layers", "groups", "grouped_requests", "kv_tokens_saved",
        "bytes_saved", "planning_seconds",
    )}  # fmt: skip
    print(grown)
    assert grown["relay_steps"] >= 25
    assert grown["relay_layers"] == 30 * grown["relay_steps"]
    assert grown["grouped_requests"] >= 5 * grown["relay_steps"]
    assert grown["kv_tokens_saved"] >= 256 * 4 * grown["relay_steps"]
    assert grown["bytes_saved"] == grown["kv_tokens_saved"] * 30 * 2 * 3 * 64 * 2
    assert 0 < grown["planning_seconds"] < 0.01 * grown["steps"]
    assert any('engine="0"' in name and f'model_name="{MODEL}"' in name for name in after)
    assert {name for name in after if "_fallbacks_total" in name} >= {
        f'vllm_relay_fallbacks_total{{engine="0",model_name="{MODEL}",reason="sliding_window"}}'
    }
    assert relay_server.log.count("RelayAttention engaged") == 1


def test_chats_at_the_same_time_are_all_answered(relay_server: RelayServer) -> None:
    client = openai.AsyncOpenAI(base_url=f"{relay_server.url}/v1", api_key="none", max_retries=0, timeout=120)

    async def ask(number: int) -> str:
        answer = await client.chat.completions.create(
            model=MODEL, temperature=0, max_tokens=16,
            messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Tell me about {number}."}],
        )  # fmt: skip
        return answer.choices[0].message.content or ""

    async def ask_all() -> list[str]:
        return await asyncio.gather(*(ask(number) for number in range(8)))

    assert all(asyncio.run(ask_all()))


@pytest.fixture(scope="module")
def guarded_server(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayServer]:
    """With an API key, and two API server processes in front of one engine."""
    log = tmp_path_factory.mktemp("guarded") / "server.log"
    with start_server(
        log, "--api-key", KEY, "--api-server-count", "2", "--enforce-eager", "--max-model-len", "1024"
    ) as it:
        yield it


@pytest.mark.slow
def test_the_api_key_guards_v1(guarded_server: RelayServer) -> None:
    with pytest.raises(openai.AuthenticationError):
        client_of(guarded_server, "wrong").models.list()
    assert [model.id for model in client_of(guarded_server, KEY).models.list()] == [MODEL]
    for path, body in (("/v1/completions", {"model": MODEL, "prompt": "hi"}), ("/v1/segmentations", {})):
        status, _ = post(guarded_server, path, json.dumps(body).encode())
        assert status == 401, path


@pytest.mark.slow
def test_two_api_servers_count_one_engine_once(guarded_server: RelayServer) -> None:
    client = client_of(guarded_server, KEY)
    client.completions.create(model=MODEL, prompt=SYSTEM + "First", max_tokens=1)
    client.completions.create(
        model=MODEL, prompt=[SYSTEM + name for name in ("Ann", "Bob", "Cid")], max_tokens=16, temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    readings = [metrics(guarded_server) for _ in range(8)]  # whichever process answers
    assert all(total(reading, "relay_steps") == total(readings[0], "relay_steps") for reading in readings)
    assert 10 <= total(readings[0], "relay_steps") <= 20
    with urllib.request.urlopen(f"{guarded_server.url}/metrics", timeout=30) as response:
        assert b"vllm:num_requests_running" in response.read(), "vLLM's own metrics should still be there"


@pytest.mark.slow
def test_every_default_serves(start_server: StartServer, tmp_path: Path) -> None:
    """No flag at all: the model is compiled, its answers are the eager server's by a wide margin; then it is loaded."""
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm")}
    with start_server(tmp_path / "first.log", **cache) as server:
        test_a_chat_is_answered(server)
        assert "enforce_eager=False" in server.log
        assert "saved AOT compiled function" in server.log
    with start_server(tmp_path / "second.log", **cache) as server:
        test_a_chat_is_answered(server)
        test_a_completion_is_answered_with_logprobs(server)
        assert "Directly load AOT compilation" in server.log
        assert "Compiling model again" not in server.log


@pytest.mark.slow
def test_the_kill_switch_serves_stock(start_server: StartServer, tmp_path: Path) -> None:
    with start_server(tmp_path / "stock.log", "--no_relay", "--enforce-eager", "--max-model-len", "1024") as server:
        (model,) = client_of(server).models.list()
        assert model.id == embedded_model.SMOLLM2, "stock vLLM knows no other of the embedded models"
        client_of(server).completions.create(model=model.id, prompt=[SYSTEM + "A", SYSTEM + "B"], max_tokens=4)
        assert metrics(server) == {}
        assert "RelayAttention" not in server.log
        assert "relay off" in server.log

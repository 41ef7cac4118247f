"""Many segmentations at once, clients that leave, bodies meant to hurt; and what one picture's questions share."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from typing import Any

import httpx
import pytest

from hostile_bodies import hostile_bodies
from tiny_server import picture_url

pytestmark = pytest.mark.e2e

STREAMS = 32


def metric(server: Any, name: str) -> float:
    """The sum of a metric's samples."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    samples = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    assert samples, f"no metric {name}"
    return sum(map(float, samples))


def ask(server: Any, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/v1/segmentations", json=fields, timeout=300)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_questions_about_one_picture_share_it(segmenting_server: Any) -> None:
    """The encoder runs once, the prefix cache is hit for the picture's whole blocks, and relay groups the requests."""
    counted = {
        "grouped": "vllm_relay_grouped_requests_total",
        "hits": "vllm:prefix_cache_hits_total",
        "queries": "vllm:prefix_cache_queries_total",
        "mm_hits": "vllm:mm_cache_hits_total",
        "mm_queries": "vllm:mm_cache_queries_total",
    }
    before = {name: metric(segmenting_server, metric_name) for name, metric_name in counted.items()}
    num = 8
    ask(segmenting_server, image=picture_url(seed=101), expressions=[f"thing {i}" for i in range(num)])
    gained = {name: metric(segmenting_server, metric_name) - before[name] for name, metric_name in counted.items()}
    assert gained["mm_queries"] - gained["mm_hits"] == 1, "the picture was processed more than once"
    assert gained["hits"] >= (num - 1) * 64, "the picture's 64 tokens were not shared by all"
    assert gained["grouped"] >= num, "relay grouped none of them"


async def stream(client: httpx.AsyncClient, seed: int, expression: str) -> tuple[list[Any], dict[str, Any]]:
    fields = {"image": picture_url(seed=seed), "expressions": [expression], "stream": True}
    rows, result = [], {}
    async with client.stream("POST", "/v1/segmentations", json=fields) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if event["object"] == "segmentation.row":
                rows.append(event["row"])
            elif event["object"] == "segmentation.results":
                (result,) = event["results"]
    return rows, result


def test_concurrent_streams_answer_as_one_after_the_other(segmenting_server: Any) -> None:
    """In float32. Neighbours change the rounding of a sum, so what may differ is a near tie; none is expected here."""
    cases = [(seed % 5, f"object {seed}") for seed in range(STREAMS)]

    async def all_at_once() -> list[tuple[list[Any], dict[str, Any]]]:
        async with httpx.AsyncClient(base_url=segmenting_server.url, timeout=300) as client:
            return await asyncio.gather(*(stream(client, *case) for case in cases))

    together = asyncio.run(all_at_once())
    alone = [
        ask(segmenting_server, image=picture_url(seed=seed), expressions=[expression])["results"][0]
        for seed, expression in cases
    ]
    for (rows, result), expected in zip(together, alone, strict=True):
        assert rows == list(range(8))
        assert result["text"] == expected["text"]
        assert result["mask"] == expected["mask"]


def test_clients_that_leave_leave_nothing_running(segmenting_server: Any) -> None:
    async def leave_in_the_middle(client: httpx.AsyncClient, seed: int) -> None:
        fields = {"image": picture_url(seed=seed), "expressions": ["a", "b"], "stream": True}
        async with client.stream("POST", "/v1/segmentations", json=fields) as answer:
            async for line in answer.aiter_lines():
                if "segmentation.row" in line:
                    return

    async def all_leave() -> None:
        async with httpx.AsyncClient(base_url=segmenting_server.url, timeout=120) as client:
            await asyncio.gather(*(leave_in_the_middle(client, seed) for seed in range(10)))

    asyncio.run(all_leave())
    deadline = time.monotonic() + 2
    while metric(segmenting_server, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert metric(segmenting_server, "vllm:num_requests_running") == 0
    assert metric(segmenting_server, "vllm:num_requests_waiting") == 0
    assert ask(segmenting_server, image=picture_url(seed=1), expressions=["a"])["results"][0]["status"] == "complete"


def test_a_client_that_does_not_wait_for_a_whole_answer_ends_it(segmenting_server: Any) -> None:
    fields = {"image": picture_url(seed=3), "expressions": [f"thing {i}" for i in range(20)]}
    with contextlib.suppress(httpx.TimeoutException):
        httpx.post(f"{segmenting_server.url}/v1/segmentations", json=fields, timeout=0.7)
    deadline = time.monotonic() + 2
    while metric(segmenting_server, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert metric(segmenting_server, "vllm:num_requests_running") == 0


def test_a_client_that_leaves_a_stream_before_its_first_row_ends_it(segmenting_server: Any) -> None:
    """Without a grammar a random model never opens a descriptor: nothing is sent until the answer ends."""
    fields = {"image": picture_url(seed=3), "expressions": ["a", "b"], "stream": True, "grammar": "off"}
    with contextlib.suppress(httpx.TimeoutException):
        httpx.post(f"{segmenting_server.url}/v1/segmentations", json=fields, timeout=0.7)
    running_at_first = metric(segmenting_server, "vllm:num_requests_running")
    deadline = time.monotonic() + 2
    while metric(segmenting_server, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert metric(segmenting_server, "vllm:num_requests_running") == 0, f"{running_at_first:.0f} ran at first"


def test_too_many_at_once_are_told_when_to_come_back(segmenting_server: Any) -> None:
    """The server takes 40 queries at a time, so of three requests of 20 one has to wait."""

    async def three() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=segmenting_server.url, timeout=300) as client:
            fields = {"image": picture_url(seed=4), "expressions": [f"thing {i}" for i in range(20)]}
            return await asyncio.gather(*(client.post("/v1/segmentations", json=fields) for _ in range(3)))

    answers = asyncio.run(three())
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429]
    (refused,) = (answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert "40" in refused.json()["error"]["message"]


def test_hostile_bodies_are_refused_by_name_and_the_server_goes_on(segmenting_server: Any) -> None:
    bodies = hostile_bodies()
    assert len(bodies) >= 200
    with httpx.Client(base_url=segmenting_server.url, timeout=60) as client:
        for body in bodies:
            answer = client.post("/v1/segmentations", content=body.content, headers=body.headers)
            assert 400 <= answer.status_code < 500, f"{body.name}: {answer.status_code} {answer.text[:300]}"
            error = answer.json()["error"]
            assert body.is_named_by(error["param"]), f"{body.name}: not {body.param} but {error}"
    good = ask(segmenting_server, image=picture_url(seed=5), expressions=["a"])
    assert good["results"][0]["status"] == "complete"

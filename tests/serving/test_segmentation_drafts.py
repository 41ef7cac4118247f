"""A server that drafts rows says what another says, in fewer steps, and names what drafting rules out."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from relay_benchmarks.cli import main as bench
from tiny_server import TINY_FLAGS, picture_url

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

VAL = Path(__file__).parents[3] / "shared/data/seg-tiny/val.jsonl"
EXPRESSIONS = [f"the thing {i}" for i in range(6)]


@pytest.fixture(scope="module")
def drafting_server(
    tiny_llava: Path, start_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    log_path = tmp_path_factory.mktemp("drafting") / "server.log"
    with start_server(log_path, str(tiny_llava), *TINY_FLAGS, "--relay-draft-rows", "32") as server:
        yield server


def texts(server: Any) -> list[str]:
    answer = httpx.post(
        f"{server.url}/v1/segmentations",
        json={"image": picture_url(seed=11), "expressions": EXPRESSIONS},
        timeout=300,
    )
    assert answer.status_code == 200, answer.text
    return [result["text"] for result in answer.json()["results"]]


def metric(server: Any, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    return sum(map(float, re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)))


def test_drafts_change_no_answer_and_are_accepted(drafting_server: Any, segmenting_server: Any) -> None:
    assert texts(drafting_server) == texts(segmenting_server)
    assert metric(drafting_server, "vllm:spec_decode_num_accepted_tokens_total") > 0


@pytest.mark.parametrize("pictures", [1, 0])
@pytest.mark.parametrize(("name", "value"), [("min_p", 0.1), ("logit_bias", {"5": 1.0})])
def test_what_speculation_refuses_is_a_400_that_names_it(
    drafting_server: Any, name: str, value: Any, pictures: int
) -> None:
    parts = [{"type": "image_url", "image_url": {"url": picture_url(seed=1)}}] * pictures
    answer = httpx.post(
        f"{drafting_server.url}/v1/chat/completions",
        json={
            "model": "tiny-llava",
            "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "hello"}]}],
            name: value,
        },
        timeout=60,
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == name
    assert "--relay-draft-rows" in error["message"]


def test_two_servers_are_compared(
    drafting_server: Any,
    segmenting_server: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    output = tmp_path / "rows.csv"
    if not VAL.exists():
        pytest.skip("needs the photos of ../shared/data/seg-tiny")
    arguments = [segmenting_server.url, drafting_server.url, str(VAL), "--queries", "3", "--output", str(output)]
    assert bench(["segmentation", *arguments]) == 0
    (row,) = csv.DictReader(output.open(newline=""))
    assert int(row["queries"]) == 3
    assert int(row["steps"]) > 0
    assert float(row["largest_gap"]) <= float(row["noise"]) + 1e-3, "in float32 answers part at ties only"
    assert "whole request" in capsys.readouterr().out

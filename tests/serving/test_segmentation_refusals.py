"""Models that end their answer without a mask, and models that draw one unasked: what is forced, and what says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from relay_models import masks
from relay_models.text4seg.codec import Repair, decode
from relay_models.text4seg.geometry import upsample
from tiny_models import make_leaning_llava
from tiny_server import GRID, TINY_FLAGS, data_url, picture_bytes

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

WIDTH, HEIGHT = 61, 43
END_OF_TEXT = "<|im_end|>"  # of SmolLM2's words
BEGINS_A_DESCRIPTOR = "<"
CLASSES = ["sky", "grass", "zebra"]
SUBJECTS = [
    pytest.param({"expressions": ["the dog", "a cat, left"]}, id="expressions"),
    pytest.param({"classes": CLASSES}, id="classes"),
    pytest.param({"everything": True}, id="everything"),
]


@pytest.fixture(scope="module")
def serve_leaning(
    start_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Iterator[httpx.Client]]:
    """A client of a server whose model says one token wherever it may."""

    def serve(token: str) -> Iterator[httpx.Client]:
        folder = tmp_path_factory.mktemp("leaning")
        model = make_leaning_llava(folder / "model", token)
        with (
            start_server(folder / "server.log", str(model), *TINY_FLAGS) as server,
            httpx.Client(base_url=server.url, timeout=120) as client,
        ):
            yield client

    return serve


@pytest.fixture(scope="module")
def refusing(serve_leaning: Callable[[str], Iterator[httpx.Client]]) -> Iterator[httpx.Client]:
    """Asks a model that ends every answer at once."""
    yield from serve_leaning(END_OF_TEXT)


@pytest.fixture(scope="module")
def drawing(serve_leaning: Callable[[str], Iterator[httpx.Client]]) -> Iterator[httpx.Client]:
    """Asks a model that begins a descriptor at once."""
    yield from serve_leaning(BEGINS_A_DESCRIPTOR)


def ask(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    picture = picture_bytes(width=WIDTH, height=HEIGHT)
    answer = client.post("/v1/segmentations", json={"image": data_url(picture), **fields})
    assert answer.status_code == 200, answer.text
    results: list[dict[str, Any]] = answer.json()["results"]
    assert results
    return results


def assert_drawn(result: dict[str, Any], *, any_label: bool = False) -> None:
    """A complete descriptor, and the mask that it says. Where any label may stand in it, runs may be divided."""
    assert set(result["repairs"]) <= ({Repair.SEPARATOR} if any_label else set()), result
    assert result["status"] == ("repaired" if result["repairs"] else "complete")
    assert result["grid"] == [GRID, GRID]
    descriptor = decode(result["text"], height=GRID, width=GRID)
    found = masks.from_coco_rle({"size": result["mask"]["size"], "counts": result["mask"]["counts"]})
    expected = upsample(descriptor.mask(result["label"]), HEIGHT, WIDTH)
    np.testing.assert_array_equal(found, expected)
    assert result["area"] == int(expected.sum())


def assert_nothing(result: dict[str, Any]) -> None:
    assert result["status"] == "none", result
    assert result["forced"] is False
    assert result["mask"] is None
    assert result["text"] is None
    assert result["box"] is None
    assert result["error"] is None
    assert (result["empty"], result["area"]) == (True, 0)


# ---------------------------------------------------------------- a model that refuses


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_model_that_ends_its_answer_is_made_to_draw(
    refusing: httpx.Client, subject: dict[str, Any], temperature: float
) -> None:
    results = ask(refusing, **subject, temperature=temperature, seed=7)
    for result in results:
        assert result["forced"] is True
        assert_drawn(result, any_label="everything" in subject)
    if "everything" not in subject:
        asked = subject.get("expressions") or subject["classes"]
        assert [result["label"] for result in results] == asked


def test_what_it_said_before_stays_said(refusing: httpx.Client) -> None:
    """Forced or not, the answer begins in the same way."""
    (forced,) = ask(refusing, expressions=["the dog"])
    (returned,) = ask(refusing, expressions=["the dog"], on_refusal="return")
    assert returned["answer"].strip()
    assert forced["answer"].strip() == returned["answer"].strip()


def test_the_cost_of_a_forced_answer_is_that_of_all_it_says(refusing: httpx.Client) -> None:
    fields = {"image": data_url(picture_bytes()), "expressions": ["the dog"]}
    forced, returned = (
        refusing.post("/v1/segmentations", json={**fields, "on_refusal": on_refusal}).json()["usage"]
        for on_refusal in ("force", "return")
    )
    assert forced["prompt_tokens"] == returned["prompt_tokens"], "what it said itself is no prompt of ours"
    assert forced["completion_tokens"] > returned["completion_tokens"] + 2 * GRID


def test_a_stream_says_what_was_forced(refusing: httpx.Client) -> None:
    fields = {"image": data_url(picture_bytes(width=WIDTH, height=HEIGHT)), "expressions": ["the dog"], "stream": True}
    with refusing.stream("POST", "/v1/segmentations", json=fields) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    events = [json.loads(line) for line in lines[:-1]]
    assert [event["row"] for event in events if event["object"] == "segmentation.row"] == list(range(GRID))
    (result,) = [result for event in events for result in event.get("results", ())]
    assert result["forced"] is True
    assert [result] == ask(refusing, expressions=["the dog"])


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_refusal_is_returned_where_it_may_be(refusing: httpx.Client, subject: dict[str, Any]) -> None:
    results = ask(refusing, **subject, on_refusal="return")
    assert len(results) == len(subject.get("expressions", ["one answer"]))
    for result in results:
        assert_nothing(result)
        assert result["answer"].strip()


@pytest.mark.parametrize("on_refusal", ["force", "return"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_nothing_is_forced_without_the_grammar(
    refusing: httpx.Client, subject: dict[str, Any], on_refusal: str
) -> None:
    for result in ask(refusing, **subject, grammar="off", on_refusal=on_refusal):
        assert_nothing(result)
        assert not result["answer"], "this model's own answer is empty"


# ---------------------------------------------------------------- a model that draws


@pytest.mark.parametrize("on_refusal", ["force", "return"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_model_that_draws_of_its_own_accord_is_not_forced(
    drawing: httpx.Client, subject: dict[str, Any], on_refusal: str
) -> None:
    for result in ask(drawing, **subject, on_refusal=on_refusal):
        assert result["forced"] is False
        assert_drawn(result, any_label="everything" in subject)

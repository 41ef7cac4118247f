"""Chats about pictures, with the official openai client: the usual answer, and masks where it holds descriptors."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from relay_models import masks
from relay_models.text4seg.codec import Repair, decode_answer
from relay_models.text4seg.geometry import upsample
from tiny_server import GRID, MODEL, picture_url

pytestmark = pytest.mark.e2e

WIDTH, HEIGHT = 50, 30
# Random weights open no descriptor by themselves, so the client's own grammar has them write one.
ALWAYS_A_MASK = (
    'root ::= "Here:\\n<seg>" row (" " row){7} "</seg>"\n'
    'row ::= "others *8\\n" | "cat *8\\n" | "others *4| cat *4\\n" | "cat *3| others *5\\n"'
)


def picture_part(*, seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": picture_url(seed=seed, width=width, height=height)}}


def about(*parts: Any, text: str = "Where is the cat?") -> list[Any]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def forced(grammar: str = ALWAYS_A_MASK) -> dict[str, Any]:
    return {"structured_outputs": {"grammar": grammar}}


@pytest.fixture(scope="module")
def client(segmenting_server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{segmenting_server.url}/v1", api_key="none", timeout=120, max_retries=0)


@pytest.fixture(scope="module")
def async_client(segmenting_server: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{segmenting_server.url}/v1", api_key="none", timeout=120, max_retries=0)


def check(segmentation: dict[str, Any], content: str, *, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    """The masks are those of the descriptors in the text, decoded here once more."""
    (descriptor,) = decode_answer(content, height=GRID, width=GRID).descriptors
    written = segmentation["masks"]
    expected = [label for label in descriptor.labels if label != "others"] or [None]
    assert [mask["label"] for mask in written] == expected
    for entry in written:
        pixels = masks.from_coco_rle({"size": entry["mask"]["size"], "counts": entry["mask"]["counts"]})
        np.testing.assert_array_equal(pixels, upsample(descriptor.mask(entry["label"] or "nothing"), *size))
        assert entry["grid"] == [GRID, GRID]


def test_a_whole_answer_carries_its_masks(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=about(picture_part()), max_tokens=400, extra_body=forced()
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "stop"
    segmentation = message.segmentation
    assert segmentation["status"] == "complete"
    assert segmentation["images"] == [{"index": 0, "width": WIDTH, "height": HEIGHT}]
    check(segmentation, message.content)


def test_a_chat_without_a_picture_is_left_alone(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Say something."}],
        max_tokens=200,
        extra_body=forced(),
    )
    assert "<seg>" in answer.choices[0].message.content
    assert getattr(answer.choices[0].message, "segmentation", None) is None


def read_stream(chunks: Any) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]], list[Any]]:
    content, rows, found, reasons = "", [], [], []
    for chunk in chunks:
        assert chunk.choices, "a chunk without choices"
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        segmentation = getattr(choice.delta, "segmentation", None) or {}
        rows += segmentation.get("rows", [])
        if "masks" in segmentation:
            assert choice.finish_reason is None
            found.append(segmentation)
        reasons.append(choice.finish_reason)
    return content, rows, found, reasons


def test_a_stream_carries_rows_and_then_the_masks(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=about(picture_part()), max_tokens=400, stream=True, extra_body=forced()
        )
    )
    content, rows, found, reasons = read_stream(chunks)
    assert [row["row"] for row in rows] == list(range(GRID))
    assert [row["index"] for row in rows] == list(range(GRID))
    assert all(sum(run["count"] for run in row["runs"]) == GRID for row in rows)
    (segmentation,) = found
    check(segmentation, content)
    assert reasons.count("stop") == 1
    assert reasons[-1] == "stop"
    assert getattr(chunks[-2].choices[0].delta, "segmentation", None) == segmentation, "not the last delta"


def test_the_async_client_sees_the_same(async_client: openai.AsyncOpenAI) -> None:
    async def collect() -> list[Any]:
        stream = await async_client.chat.completions.create(
            model=MODEL, messages=about(picture_part()), max_tokens=400, stream=True, extra_body=forced()
        )
        return [chunk async for chunk in stream]

    content, rows, found, _ = read_stream(asyncio.run(collect()))
    assert len(rows) == GRID
    check(found[0], content)


def test_the_stream_helper_puts_the_deltas_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=about(picture_part()), max_tokens=400, extra_body=forced()
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    message = final.choices[0].message
    segmentation = message.segmentation
    assert [row["row"] for row in segmentation["rows"]] == list(range(GRID))
    check(segmentation, message.content)


def test_usage_is_streamed_as_ever(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=about(picture_part()),
            max_tokens=400,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=forced(),
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0


def test_the_grammar_holds_once_a_descriptor_is_opened(client: openai.OpenAI, segmenting_server: Any) -> None:
    """Random weights that are pushed to write pieces of `<seg>` soon open one: from there on only rows."""
    asked = {"model": MODEL, "prompt": "<seg>", "add_special_tokens": False}
    pieces = httpx.post(f"{segmenting_server.url}/tokenize", json=asked).json()["tokens"]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=about(picture_part()),
        n=8,
        temperature=1.0,
        seed=3,
        max_tokens=1500,
        logit_bias={str(token): 20 for token in pieces},
    )
    closed = 0
    for choice in answer.choices:
        decoded = decode_answer(choice.message.content, height=GRID, width=GRID)
        for descriptor in decoded.descriptors:
            if Repair.TRUNCATED in descriptor.repairs:
                assert choice.finish_reason == "length"
                continue
            closed += 1
            assert set(descriptor.repairs) <= {Repair.SEPARATOR, Repair.LABEL_NORMALISED}, descriptor.text
    assert closed >= 4, [choice.message.content[-200:] for choice in answer.choices]


def test_masks_of_several_pictures_name_theirs(client: openai.OpenAI) -> None:
    two = ALWAYS_A_MASK.replace('root ::= "Here:\\n<seg>"', 'root ::= block block\nblock ::= "\\n<seg>"')
    answer = client.chat.completions.create(
        model=MODEL,
        messages=about(picture_part(), picture_part(seed=1, width=20, height=40)),
        max_tokens=800,
        extra_body=forced(two),
    )
    segmentation = answer.choices[0].message.segmentation
    for entry in segmentation["masks"]:
        assert entry["image_index"] == entry["block"]
        if entry["mask"]:
            assert entry["mask"]["size"] == [[HEIGHT, WIDTH], [40, 20]][entry["block"]]


def test_a_follow_up_is_about_the_last_picture(client: openai.OpenAI) -> None:
    messages = [
        *about(picture_part()),
        {"role": "assistant", "content": "There."},
        *about(picture_part(seed=1, width=20, height=40)),
        {"role": "assistant", "content": "There too."},
        {"role": "user", "content": "And the dog?"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=400, extra_body=forced())
    segmentation = answer.choices[0].message.segmentation
    assert {entry["image_index"] for entry in segmentation["masks"]} == {1}


def test_sampling_is_forced_after_the_models_defaults(client: openai.OpenAI) -> None:
    """What bends a descriptor changes nothing: penalties, stops, a minimum, bad words, a repetition detector."""
    plain = client.chat.completions.create(
        model=MODEL, messages=about(picture_part()), max_tokens=400, extra_body=forced()
    )
    bent = client.chat.completions.create(
        model=MODEL,
        messages=about(picture_part()),
        max_tokens=400,
        frequency_penalty=2.0,
        presence_penalty=2.0,
        stop=["others"],
        extra_body={
            **forced(),
            "repetition_penalty": 1.9,
            "min_tokens": 300,
            "bad_words": ["cat"],
            "repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 2},
        },
    )
    assert bent.choices[0].message.content == plain.choices[0].message.content


def test_a_bad_picture_names_its_place(segmenting_server: Any) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    answer = httpx.post(
        f"{segmenting_server.url}/v1/chat/completions",
        json={"model": MODEL, "messages": about(picture_part(), part)},
        timeout=60,
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages.0.content.1.image_url.url"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ("png", "segmentation"),
        ({"mask_format": "bmp"}, "segmentation.mask_format"),
        ({"components": 1}, "segmentation.components"),
        ({"grammar": "maybe"}, "segmentation.grammar"),
    ],
)
def test_bad_options_are_named(segmenting_server: Any, options: Any, param: str) -> None:
    answer = httpx.post(
        f"{segmenting_server.url}/v1/chat/completions",
        json={"model": MODEL, "messages": about(picture_part()), "segmentation": options},
        timeout=60,
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param

"""Greedy tokens with relay equal stock's, in float32, in a real vLLM with the real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import divergences, relay_counters, run_engine

NUM_LAYERS = 30
NEAR_TIE = 1e-4

pytestmark = pytest.mark.e2e


def exactness_prompts(model: Path) -> list[list[int]]:
    """64 prompts: 3 system prompts of at least 5 blocks of 128 and a ragged rest, unshared requests between them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rules = (
        "Answer in one sentence. Name your sources. Never invent a number. Prefer plain words to long ones. "
        "If the question has several parts, answer each of them in its own line and say which part it belongs to. "
    )
    roles = [("a patient teacher of physics", 17), ("a strict editor of a newspaper", 21), ("a travel guide", 25)]
    systems = [tokenizer.encode(f"You are {role}. " + rules * repeats) for role, repeats in roles]
    assert all(len(system) >= 5 * 128 for system in systems)
    assert all(len(system) % 128 for system in systems), "the shared part should end inside a block"
    topics = ["the tides", "a bridge", "bread", "the moon", "a violin", "snow", "the post office", "iron"]
    prompts = []
    for i in range(64):
        question = f"Question {i}: tell me {'more ' * (i % 5)}about {topics[i % 8]}, please."
        if i % 8 == 7:
            prompts.append(tokenizer.encode(f"Letter {i * 37}. Dear friend of {topics[i // 8]}, " + question))
        else:
            prompts.append(systems[i % 3] + tokenizer.encode(question))
    return prompts


@pytest.fixture(scope="module")
def both_sides(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("exactness")
    prompts = exactness_prompts(embedded_model)
    shape = {"prompts": prompts, "max_tokens": 64, "logprobs": 2}
    scenarios = [
        {"name": "burst", **shape},  # all at once into a cold cache: rows compute blocks that others already name
        {"name": "staggered", **shape, "arrivals": [i // 2 for i in range(64)]},
    ]
    engine = {
        "model": str(embedded_model), "dtype": "float32", "max_model_len": 2048, "max_num_seqs": 64,
        "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 3 << 30,
    }  # fmt: skip
    return {side: run_engine(folder, side, engine, scenarios) for side in ("stock", "relay")}


@pytest.mark.parametrize("scenario", ["burst", "staggered"])
def test_greedy_tokens_equal_those_of_stock(both_sides: dict[str, dict[str, Any]], scenario: str) -> None:
    stock, relay = (both_sides[side]["results"][scenario] for side in ("stock", "relay"))
    assert sum(map(len, relay["tokens"])) == 64 * 64
    found = divergences(stock, relay)
    print(f"{scenario}: {len(found)} of 64 requests diverge: {found}")
    assert all(gap is not None and gap < NEAR_TIE for _, _, gap in found), found


def test_relay_ran_in_every_layer_of_nearly_every_eligible_step(both_sides: dict[str, dict[str, Any]]) -> None:
    counted = relay_counters(both_sides["relay"])
    print(counted)
    assert counted["eligible_steps"] >= 120, "the scenarios should offer sharing in nearly every step"
    assert counted["layer_calls"] >= 0.9 * counted["eligible_steps"] * NUM_LAYERS
    assert counted["groups"] >= 2.5 * counted["relay_steps"], "three system prompts, three groups in most steps"
    assert counted["bytes_saved"] == counted["kv_tokens_saved"] * NUM_LAYERS * 2 * 3 * 64 * 4
    assert "RelayAttention engaged" in both_sides["relay"]["log"]
    assert "RelayAttention" not in both_sides["stock"]["log"]

"""Greedy tokens with relay equal stock's, in float32, in a real vLLM with the real model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engines import divergences, relay_counters, run_engine

NUM_LAYERS = 30
NEAR_TIE = 1e-4

pytestmark = pytest.mark.e2e


@dataclass(frozen=True)
class Size:
    """How much is compared: `make test` has a few minutes, the whole is marked slow."""

    prompts: int
    tokens: int


SIZES = [
    pytest.param(Size(prompts=10, tokens=8), id="10 prompts of 8 tokens"),
    pytest.param(Size(prompts=64, tokens=64), id="64 prompts of 64 tokens", marks=pytest.mark.slow),
]


def exactness_prompts(model: Path, count: int) -> list[list[int]]:
    """The first of 64: 3 system prompts of at least 5 blocks of 128 and a ragged rest, unshared ones between them."""
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
    for i in range(count):
        question = f"Question {i}: tell me {'more ' * (i % 5)}about {topics[i % 8]}, please."
        if i % 8 == 7:
            prompts.append(tokenizer.encode(f"Letter {i * 37}. Dear friend of {topics[i // 8]}, " + question))
        else:
            prompts.append(systems[i % 3] + tokenizer.encode(question))
    return prompts


@dataclass(frozen=True)
class Sides:
    """The reports of both sides."""

    size: Size
    stock: dict[str, Any]
    relay: dict[str, Any]


@pytest.fixture(scope="module", params=SIZES)
def sides(request: pytest.FixtureRequest, embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    size: Size = request.param
    folder = tmp_path_factory.mktemp("exactness")
    shape = {"prompts": exactness_prompts(embedded_model, size.prompts), "max_tokens": size.tokens, "logprobs": 2}
    scenarios = [
        {"name": "burst", **shape},  # all at once into a cold cache: rows compute blocks that others already name
        {"name": "staggered", **shape, "arrivals": [i // 2 for i in range(size.prompts)]},
    ]
    engine = {
        "model": str(embedded_model), "dtype": "float32", "max_model_len": 2048, "max_num_seqs": 64,
        "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 3 << 30,
    }  # fmt: skip
    all_cores = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}  # vLLM leaves one core idle, which here may be every second one
    return Sides(size, *(run_engine(folder, side, engine, scenarios, all_cores) for side in ("stock", "relay")))


@pytest.mark.parametrize("scenario", ["burst", "staggered"])
def test_greedy_tokens_equal_those_of_stock(sides: Sides, scenario: str) -> None:
    stock, relay = sides.stock["results"][scenario], sides.relay["results"][scenario]
    assert sum(map(len, relay["tokens"])) == sides.size.prompts * sides.size.tokens
    found = divergences(stock, relay)
    print(f"{scenario}: {len(found)} of {sides.size.prompts} requests diverge: {found}")
    assert all(gap is not None and gap < NEAR_TIE for _, _, gap in found), found


def test_relay_ran_in_every_layer_of_nearly_every_eligible_step(sides: Sides) -> None:
    counted = relay_counters(sides.relay)
    print(counted)
    assert counted["eligible_steps"] >= 1.8 * sides.size.tokens, "nearly every step should offer sharing"
    assert counted["layer_calls"] >= 0.9 * counted["eligible_steps"] * NUM_LAYERS
    assert counted["groups"] >= 2.4 * counted["relay_steps"], "three system prompts, three groups in most steps"
    assert counted["bytes_saved"] == counted["kv_tokens_saved"] * NUM_LAYERS * 2 * 3 * 64 * 4
    assert "RelayAttention engaged" in sides.relay["log"]
    assert "RelayAttention" not in sides.stock["log"]

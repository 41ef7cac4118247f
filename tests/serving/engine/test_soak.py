"""Half an hour of requests that join, finish, are aborted, preempted and drafted for: no growth, and no drift."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from engine_scripts import MEMORY_EVERY_STEPS, NGRAM, Pool, crowded_engine
from engines import EngineSession

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SECONDS = float(os.environ.get("RELAY_TEST_SOAK_SECONDS", "1800"))
WARM_UP_STEPS = 10_000  # after them every number of tokens has been multiplied once, for which oneDNN keeps memory
FEWEST_STEPS = 15_000
# Bytes of resident memory. An allocator's own swings took 6 MiB of it in half an hour of 75 thousand steps; if each
# relayed step left but its plan behind, it would be more in three minutes.
MOST_GROWTH = 8 << 20


@pytest.fixture(scope="module")
def soaked(sessions: dict[str, EngineSession], pool: Pool, repetitive_model: Path) -> dict[str, Any]:
    """Relay's report; stock only gave the answers it is held to."""
    sessions["stock"].close()
    relay = sessions["relay"]
    relay.open(crowded_engine(repetitive_model, NGRAM))
    relay.take(pool.prompts, pool.answers)
    report = relay.ask("soak", SECONDS, 0, timeout=SECONDS + 600)
    some = report["memory"][:: max(len(report["memory"]) // 30, 1)]
    print({**report, "memory": [f"{used / 2**20:.1f} MiB" for used in some]})
    return dict(report)


def test_no_token_drifts_from_those_of_stock(soaked: dict[str, Any]) -> None:
    assert soaked["wrong"] == []
    assert soaked["faults"] == []
    assert soaked["tokens"] > 5 * SECONDS, "too idle to prove anything"
    for hardship in ("preemptions", "evictions", "drafted tokens accepted", "aborted while running"):
        assert soaked["seen"][hardship] > SECONDS / 60, hardship
    assert soaked["relayed"]["steps"] > 0.25 * soaked["steps"]


def test_memory_does_not_grow(soaked: dict[str, Any]) -> None:
    assert soaked["steps"] >= FEWEST_STEPS, "too few steps to tell"
    warm = soaked["memory"][WARM_UP_STEPS // MEMORY_EVERY_STEPS :]
    tenth = max(len(warm) // 10, 1)
    early, late = statistics.median(warm[:tenth]), statistics.median(warm[-tenth:])
    print(f"{early / 2**20:.1f} MiB after the warm-up, {late / 2**20:.1f} MiB at the end, in {soaked['steps']} steps")
    assert late - early < MOST_GROWTH

"""Counters of a server, read from what vLLM and relay print at /metrics."""

from __future__ import annotations

import pytest

from relay_benchmarks.server_metrics import read

STOCK = """\
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100.0
vllm:prefix_cache_queries_total{engine="1",model_name="m"} 20.0
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 64.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",cache_dtype="auto",engine="0"} 1.0
"""
RELAY = """\
# TYPE vllm_relay_steps counter
vllm_relay_steps_total{engine="0",model_name="m"} 10.0
# TYPE vllm_relay_relay_steps counter
vllm_relay_relay_steps_total{engine="0",model_name="m"} 7.0
# TYPE vllm_relay_planning_seconds counter
vllm_relay_planning_seconds_total{engine="0",model_name="m"} 0.002
# TYPE vllm_relay_fallbacks counter
vllm_relay_fallbacks_total{engine="0",model_name="m",reason="sinks"} 3.0
vllm_relay_fallbacks_total{engine="1",model_name="m",reason="sinks"} 1.0
"""


def test_engines_are_added_up() -> None:
    reading = read(STOCK + RELAY)
    assert reading.counts["prefix_queries"] == 120
    assert reading.fallbacks == {"sinks": 4}
    assert reading.block_size == 32
    assert reading.counts["planning_us"] == pytest.approx(2000)


def test_relay_is_on_where_an_engine_counts_it() -> None:
    assert read(STOCK + RELAY).has_relay
    assert not read(STOCK).has_relay
    families_without_engines = "".join(f"{line}\n" for line in RELAY.splitlines() if line.startswith("#"))
    assert not read(STOCK + families_without_engines).has_relay


def test_what_was_counted_in_between() -> None:
    before = read(STOCK + RELAY)
    after = read((STOCK + RELAY).replace("} 7.0", "} 9.0").replace('"sinks"} 3.0', '"sinks"} 5.0'))
    gained = after.since(before)
    assert (gained.counts["relay_steps"], gained.counts["steps"], gained.fallbacks) == (2, 0, {"sinks": 2})
    assert gained.block_size == 32
    assert after.since(read(STOCK)).counts["steps"] == 10  # counters that came only then


def test_what_is_none_of_it_is_an_error() -> None:
    with pytest.raises(ValueError, match="float"):
        read("<html>oops {")

"""Requests join, finish and are aborted at random inside a real vLLM: every token, in every step, is stock's.

Both sides play the same scripts, step by step, on a cache so small that requests are preempted and prefixes evicted.
Weights are float32 and every answer ends before the first token that rounding could change, so that any difference is
an error. Each step is judged as it is built, too (`step_witness.py`): a row read alone, or a group over two salts,
changes no token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_scripts import (
    MOST_ALIVE,
    MOST_TOKENS,
    NGRAM,
    NUM_PROMPTS,
    ONE_THREAD,
    SALTS,
    Operation,
    Pool,
    crowded_engine,
    long_script,
)
from engines import EngineSession
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.e2e

SPECULATIONS = [pytest.param(None, id="no speculation"), pytest.param(NGRAM, id="n-gram speculation")]

QUICK_SEED = 4

# What must have happened, or the tokens prove nothing; with speculation, the drafts besides.
HARDSHIPS = (
    *("preemptions", "evictions", "chunks of prefill", "chunks of recomputation", "steps with twins of other salts"),
    *("steps that share what they compute", "finished"),
    *("aborted while running", "aborted while waiting", "aborted while preempted"),
)
DRAFT_HARDSHIPS = ("drafted tokens accepted", "drafted tokens rejected")
RELAYED = ("steps", "groups", "nested segments", "rows that prefill", "rows that were preempted before")


@dataclass
class Pair:
    """Stock and relay, each with an engine of the same arguments."""

    stock: EngineSession
    relay: EngineSession
    is_drafting: bool

    def play(self, operations: list[Operation]) -> dict[str, Any]:
        """Play a script on both sides. Whatever differs, or was planned wrongly, fails. Returns what relay reports."""
        stock, relay = (side.ask("play", operations) for side in (self.stock, self.relay))
        assert relay["tokens"] == stock["tokens"]
        assert relay["when"] == stock["when"], "the same tokens, but in other steps"
        assert relay["seen"] == stock["seen"], "the same tokens, but by other ways"
        assert relay["faults"] == stock["faults"] == []
        assert stock["relayed"] == {}
        return dict(relay)


@pytest.fixture(scope="module", params=SPECULATIONS)
def pair(
    request: pytest.FixtureRequest, sessions: dict[str, EngineSession], pool: Pool, repetitive_model: Path
) -> Pair:
    for session in sessions.values():
        session.open(crowded_engine(repetitive_model, request.param))
        session.take(pool.prompts, pool.answers)
    return Pair(sessions["stock"], sessions["relay"], request.param is not None)


joins = st.tuples(
    st.just("join"), st.integers(0, NUM_PROMPTS - 1), st.sampled_from(SALTS), st.integers(1, MOST_TOKENS)
).map(list)
aborts = st.tuples(st.just("abort"), st.integers(0, MOST_ALIVE - 1)).map(list)
steps = st.tuples(st.just("steps"), st.integers(1, 6)).map(list)
operations = st.one_of(joins, joins, joins, joins, aborts, st.just(["abort_preempted"]), steps, steps, steps)
scripts = st.integers(1, 80).flatmap(lambda length: st.lists(operations, min_size=length, max_size=length))


def explored(max_examples: int) -> settings:
    """The same scripts every time; one that fails is made as short as it can be."""
    return settings(
        max_examples=max_examples, derandomize=True, database=None, deadline=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def check_that_it_was_hard(pair: Pair, played: dict[str, Any]) -> None:
    print(played["seen"], played["relayed"])
    hardships = HARDSHIPS + (DRAFT_HARDSHIPS if pair.is_drafting else ())
    relayed = RELAYED + (("rows with drafts",) if pair.is_drafting else ())
    assert [name for name in hardships if not played["seen"].get(name)] == []
    assert [name for name in relayed if not played["relayed"].get(name)] == []
    assert played["relayed"]["steps"] > 0.25 * played["seen"]["steps"], "many steps should relay"


def test_a_long_script_gives_the_tokens_of_stock(pair: Pair) -> None:
    played = pair.play(long_script(QUICK_SEED, length=150))
    assert played["seen"]["steps"] >= 200
    assert len(played["tokens"]) > 50
    check_that_it_was_hard(pair, played)


@explored(max_examples=6)
@given(script=scripts)
def test_any_script_gives_the_tokens_of_stock(pair: Pair, script: list[Operation]) -> None:
    pair.play(script)


@pytest.mark.slow
@explored(max_examples=400)
@given(script=scripts)
def test_many_scripts_give_the_tokens_of_stock(pair: Pair, script: list[Operation]) -> None:
    pair.play(script)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5, 15))
def test_longer_scripts_give_the_tokens_of_stock(pair: Pair, seed: int) -> None:
    played = pair.play(long_script(seed, length=1000))
    assert played["seen"]["steps"] >= 1000
    check_that_it_was_hard(pair, played)


@dataclass(frozen=True)
class Mutant:
    """How a broken plan is noticed: by the tokens, or only by a sentence of the witness."""

    name: str
    changes_tokens: bool
    fault: str


MUTANTS = [
    Mutant("shares_what_is_scheduled", False, "only computes in this step"),
    Mutant("forgets_causality", True, "sees keys up to"),
    Mutant("takes_the_first_block_for_the_prefix", True, "read from row"),
    Mutant("compares_tokens", False, "groups the salts"),
    Mutant("starts_suffixes_a_block_late", True, "keys from"),
    Mutant("starts_suffixes_a_block_early", True, "keys from"),
    Mutant("forgets_a_joined_row", True, "keys from"),
    Mutant("leaves_a_joined_row_alone", False, "read alone"),
    Mutant("keeps_the_plan_of_the_step_before", True, "read alone"),
]


@pytest.fixture
def breakable(tmp_path: Path) -> Iterator[EngineSession]:
    """A relay of its own: what is broken in that process stays there."""
    session = EngineSession(tmp_path, "relay", ONE_THREAD)
    yield session
    session.close()


@pytest.mark.slow
def test_broken_plans_are_noticed(
    pool: Pool, sessions: dict[str, EngineSession], breakable: EngineSession, repetitive_model: Path
) -> None:
    """The judges of this file can tell, with the script of the quick run."""
    engine, script = crowded_engine(repetitive_model, None), long_script(QUICK_SEED, length=150)
    sessions["stock"].open(engine)
    breakable.open({**engine, "worker_extension_cls": "mutant_plans.Mutant"})
    for session in (sessions["stock"], breakable):
        session.take(pool.prompts, pool.answers)
    stock = sessions["stock"].ask("play", script)
    for mutant in MUTANTS:
        breakable.ask("call", "become", [mutant.name])
        relay = breakable.ask("play", script)
        differing = sum(left != right for left, right in zip(stock["tokens"], relay["tokens"], strict=True))
        print(f"{mutant.name}: {differing} of {len(stock['tokens'])} requests; {relay['faults'][:1]}")
        assert (differing > 0) == mutant.changes_tokens, mutant
        assert any(mutant.fault in fault for fault in relay["faults"]), mutant

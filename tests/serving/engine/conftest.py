"""Fixtures of the tests that run real engines: the models they run, and engines that play scripts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The helpers beside this file: pytest's importlib mode does not put test folders on the path.
sys.path.insert(0, str(Path(__file__).parent))
from engine_scripts import (
    MOST_TOKENS,
    NUM_PROMPTS,
    ONE_THREAD,
    REPETITIVE,
    Pool,
    clear_answers,
    crowded_engine,
    first_prompts,
    follow_ups,
)
from engines import EngineSession, tiny_llama


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The model that `vllm-relay serve` serves by default, prepared if it is not yet."""
    from relay_serving.embedded_model import prepare

    return prepare()


@pytest.fixture(scope="session")
def repetitive_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, some of whose tokens an n-gram foretells."""
    return tiny_llama(tmp_path_factory.mktemp("repetitive") / "model", **REPETITIVE)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EngineSession]]:
    """Both sides, each with a process of its own."""
    folder = tmp_path_factory.mktemp("sessions")
    opened = {side: EngineSession(folder, side, ONE_THREAD) for side in ("stock", "relay")}
    yield opened
    for session in opened.values():
        session.close()


@pytest.fixture(scope="module")
def pool(sessions: dict[str, EngineSession], repetitive_model: Path) -> Pool:
    """Prompts, and what stock answers to them without speculation."""
    stock = sessions["stock"]
    stock.open(crowded_engine(repetitive_model, None))
    prompts = first_prompts()
    answers = clear_answers(stock.ask("answer", prompts, MOST_TOKENS))
    later = follow_ups(prompts, answers)
    answers += clear_answers(stock.ask("answer", later, MOST_TOKENS))
    assert len(prompts + later) == NUM_PROMPTS
    assert sum(map(len, answers)) > 0.7 * NUM_PROMPTS * MOST_TOKENS, "too many answers are unclear"
    return Pool(prompts + later, answers)

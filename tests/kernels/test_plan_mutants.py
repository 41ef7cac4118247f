"""The judge can tell: a planner that forgets a rule is caught by the very inputs the property tests draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, settings
from relay_coverage import Step, faults_of_step
from relay_steps import TinyEngine, steps

from relay_kernels.relay_attention import plan, work_list
from relay_kernels.relay_attention.plan import CostModel, IntArray

SEARCH = settings(
    max_examples=3000,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def _shares_what_is_scheduled(query_lens: IntArray, seq_lens: IntArray, block_size: int, width: int) -> IntArray:
    """Forgets that blocks of this very step are in the tables of others already."""
    return np.where((query_lens > 0) & (seq_lens > 0), seq_lens // block_size, 0)


def _shares_stale_tails(query_lens: IntArray, seq_lens: IntArray, block_size: int, width: int) -> IntArray:
    """Forgets that a row is valid up to its length only."""
    return np.where((query_lens > 0) & (seq_lens > 0), width, 0)


def _shares_partial_blocks(query_lens: IntArray, seq_lens: IntArray, block_size: int, width: int) -> IntArray:
    """Rounds the computed keys up to a block."""
    return np.where((query_lens > 0) & (seq_lens > 0), -(-(seq_lens - query_lens) // block_size), 0)


def _shares_with_padding(query_lens: IntArray, seq_lens: IntArray, block_size: int, width: int) -> IntArray:
    """Forgets that a row without query tokens takes no part."""
    return (seq_lens - np.minimum(query_lens, seq_lens)) // block_size


def _null_block_is_a_prefix(block_ids: IntArray) -> IntArray:
    return np.ones(block_ids.shape, dtype=bool)


def _first_block_decides(block_table: IntArray, rows: IntArray, start: int, limit: int) -> int:
    """Takes rows that agree in one block to agree in all that follow."""
    return limit


MUTANTS = [
    pytest.param("shareable_blocks", _shares_what_is_scheduled, id="same-step-hits"),
    pytest.param("shareable_blocks", _shares_stale_tails, id="stale-tails"),
    pytest.param("shareable_blocks", _shares_partial_blocks, id="partial-blocks"),
    pytest.param("shareable_blocks", _shares_with_padding, id="padding"),
    pytest.param("names_a_prefix", _null_block_is_a_prefix, id="null-block"),
    pytest.param("common_prefix_end", _first_block_decides, id="first-block-decides"),
]


def _is_faulty(step: Step) -> bool:
    return faults_of_step(step, CostModel.always()) != []


@pytest.mark.parametrize(("rule", "mutant"), MUTANTS)
def test_the_property_tests_would_notice(monkeypatch: pytest.MonkeyPatch, rule: str, mutant: Callable) -> None:
    monkeypatch.setattr(plan, rule, mutant)
    step = find(steps(), _is_faulty, settings=SEARCH)
    monkeypatch.undo()
    assert not _is_faulty(step)


def _cold_burst() -> Step:
    """Three equal prompts of 150 tokens arrive at once: row 0 computes what the tables of 1 and 2 hold already."""
    engine = TinyEngine(block_size=16, num_rows=4, width=12)
    for _ in range(3):
        engine.join([7] * 150)
    return engine.step(chunk=152, sampled=0, drafted=0)


def _freed_windows() -> Step:
    """Two rows whose leading blocks were freed: null blocks, then blocks of their own."""
    return Step(np.array([[0, 0, 5, 6], [0, 0, 7, 8]], dtype=np.int32), (1, 1), (60, 60), 16)


def _equal_tails() -> Step:
    """Two rows that share a block, and behind their ends the same leftovers."""
    return Step(np.array([[1, 2, 9, 9], [1, 3, 9, 9]], dtype=np.int32), (1, 1), (18, 17), 16)


def _equal_tails_of_short_rows() -> Step:
    """Two rows with nothing computed and the same leftovers from the first block on."""
    return Step(np.array([[4, 9, 9], [4, 9, 9]], dtype=np.int32), (1, 1), (5, 5), 16)


@pytest.mark.parametrize(
    ("rule", "mutant", "step"),
    [
        pytest.param("shareable_blocks", _shares_what_is_scheduled, _cold_burst(), id="same-step-hits"),
        pytest.param("names_a_prefix", _null_block_is_a_prefix, _freed_windows(), id="null-block"),
        pytest.param("shareable_blocks", _shares_stale_tails, _equal_tails_of_short_rows(), id="stale-tails"),
    ],
)
def test_each_trap_springs_on_its_own_step(
    monkeypatch: pytest.MonkeyPatch, rule: str, mutant: Callable, step: Step
) -> None:
    assert not _is_faulty(step)
    monkeypatch.setattr(plan, rule, mutant)
    assert _is_faulty(step)


def test_equal_tails_are_not_part_of_a_prefix() -> None:
    assert _equal_tails().plan(CostModel.always()).kv_tokens_saved == 16


def test_the_cold_burst_shares_among_the_rows_that_wait_only() -> None:
    step = _cold_burst()
    assert step.query_lens == (150, 6, 6, 0)
    assert (step.block_table[1:3, :9] == step.block_table[0, :9]).all()
    assert [segment.requests for segment in step.plan(CostModel.always()).shared] == [(1, 2)]


def test_the_burst_shares_as_one_once_it_is_computed() -> None:
    engine = TinyEngine(block_size=16, num_rows=4, width=12)
    for _ in range(3):
        engine.join([7] * 150)
    engine.step(chunk=152, sampled=0, drafted=0)
    decoding = engine.step(chunk=152, sampled=0, drafted=0)
    assert decoding.query_lens == (1, 1, 1, 0)
    assert [(s.requests, s.key_end) for s in decoding.plan(CostModel.always()).shared] == [((0, 1, 2), 144)]


def test_a_lowering_that_forgets_causality_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slot reaches to the end of its piece."""
    step = _cold_burst()
    lowered = work_list.make_work_list

    def blind(*args: object, **kwargs: object) -> work_list.WorkList:
        honest = lowered(*args, **kwargs)  # type: ignore[arg-type]
        ends = np.repeat(honest.segments[:, 2], honest.segments[:, 4] - honest.segments[:, 3])
        return replace(honest, slot_key_end=ends)

    monkeypatch.setattr("relay_coverage.make_work_list", blind)
    assert _is_faulty(step)

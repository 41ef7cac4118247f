"""The plan and its lowering: every query token gets each key it may see, once, from the place where it lies."""

from __future__ import annotations

import json
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from relay_coverage import Step, coverage_faults, faults_of_step, form_faults
from relay_steps import TinyEngine, cost_models, steps
from test_plan_mutants import MUTANTS

from relay_kernels.relay_attention.plan import CostModel, RelayPlan, Segment, make_plan
from relay_kernels.relay_attention.work_list import make_work_list

RECORDED_STEPS = Path(__file__).parent / "recorded_steps"
piece_sizes = st.one_of(st.none(), st.sampled_from((1, 5, 16, 128, 1000)))


@settings(max_examples=500, deadline=None)
@given(step=steps(), cost_model=cost_models, max_keys=piece_sizes)
def test_every_token_sees_its_keys_once(step: Step, cost_model: CostModel, max_keys: int | None) -> None:
    assert faults_of_step(step, cost_model, max_keys) == []


@settings(max_examples=100, deadline=None)
@given(step=steps(), data=st.data())
def test_tokens_between_rows_belong_to_nobody(step: Step, data: st.DataObject) -> None:
    gaps = data.draw(st.lists(st.integers(0, 3), min_size=len(step.query_lens) + 1, max_size=len(step.query_lens) + 1))
    ends = np.cumsum(np.array([*step.query_lens, 0]) + gaps)
    query_start_loc = (ends - np.array([*step.query_lens, 0])).tolist()
    assert faults_of_step(step, CostModel.always(), None, query_start_loc) == []


class EngineSteps(RuleBasedStateMachine):
    """Requests join, run and finish; each step they make must be planned without a fault."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = TinyEngine(block_size=2)

    @rule(system=st.integers(0, 1), tools=st.integers(0, 2), own=st.integers(0, 9), copies=st.integers(1, 4))
    def join(self, system: int, tools: int, own: int, copies: int) -> None:
        for copy in range(copies):
            self.engine.join([100 + system] * 5 + [200] * 2 * tools + [300 + copy] * own)

    @rule(row=st.integers(0, 5))
    def finish(self, row: int) -> None:
        self.engine.finish(row)

    @rule(chunk=st.integers(1, 8), sampled=st.integers(0, 1), drafted=st.integers(0, 2), cost_model=cost_models)
    def step(self, chunk: int, sampled: int, drafted: int, cost_model: CostModel) -> None:
        step = self.engine.step(chunk, sampled, drafted)
        assert faults_of_step(step, cost_model, max_keys_per_segment=4) == []
        assert faults_of_step(step, CostModel.always()) == []


TestEngineSteps = EngineSteps.TestCase
TestEngineSteps.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize(
    ("name", "trap"),
    [
        ("cold_burst", "same-step-hits"),
        ("padded_rows", "null-block"),
        ("preemption", "first-block-decides"),
        ("sliding_window", "null-block"),
        ("stale_tails", "stale-tails"),
    ],
)
def test_recorded_steps_of_a_real_engine(monkeypatch: pytest.MonkeyPatch, name: str, trap: str) -> None:
    """Planned without a fault; and each recording holds its trap, for a planner that ignores it is caught there."""
    recording = json.loads((RECORDED_STEPS / f"{name}.json").read_text())
    recorded_steps = [
        Step(
            np.array(recorded["block_table"], dtype=np.int32),
            tuple(recorded["query_lens"]),
            tuple(recorded["seq_lens"]),
            recording["block_size"],
        )
        for recorded in recording["steps"]
    ]
    for i, step in enumerate(recorded_steps):
        for cost_model in (CostModel.always(), CostModel()):
            assert faults_of_step(step, cost_model, 1024) == [], f"step {i}"

    ((rule, mutant),) = (param.values for param in MUTANTS if param.id == trap)
    monkeypatch.setattr(f"relay_kernels.relay_attention.plan.{rule}", mutant)
    assert any(faults_of_step(step, CostModel.always()) for step in recorded_steps)
    if trap == "stale-tails":
        assert any(_shares_past_an_end(step) for step in recorded_steps), "only other traps were sprung"


def _shares_past_an_end(step: Step) -> bool:
    shared = step.plan(CostModel.always()).shared
    return any(segment.key_end > step.seq_lens[row] for segment in shared for row in segment.requests)


@settings(max_examples=100, deadline=None)
@given(step=steps(), cost_model=cost_models)
def test_planning_changes_nothing_and_repeats_itself(step: Step, cost_model: CostModel) -> None:
    table, query_lens, seq_lens = step.block_table.copy(), np.array(step.query_lens, int), np.array(step.seq_lens, int)
    for array in (table, query_lens, seq_lens):
        array.setflags(write=False)
    plan = make_plan(table, query_lens, seq_lens, block_size=step.block_size, cost_model=cost_model)
    again = step.plan(cost_model)
    assert plan == again
    assert hash(plan) == hash(again)
    first, second = (make_work_list(p, max_keys_per_segment=5) for p in (plan, again))
    assert all(np.array_equal(getattr(first, name), getattr(second, name)) for name in vars(first))


@settings(max_examples=100, deadline=None)
@given(step=steps(), cost_model=cost_models)
def test_what_lies_past_the_end_of_a_row_changes_nothing(step: Step, cost_model: CostModel) -> None:
    garbled = step.block_table.copy()
    for row, seq_len in enumerate(step.seq_lens):
        garbled[row, -(-seq_len // step.block_size) :] = 1
    garbled_step = Step(garbled, step.query_lens, step.seq_lens, step.block_size)
    assert step.plan(cost_model) == garbled_step.plan(cost_model)


def _cost(plan: RelayPlan, cost_model: CostModel) -> float:
    """What the cost model says of a plan, straight from its documentation."""
    total = 0.0
    for segment in plan.shared:
        tokens = sum(plan.query_lens[row] for row in segment.requests)
        total += max(cost_model.key_read, tokens * cost_model.row_key) * segment.num_keys
        total += cost_model.segment + tokens * cost_model.merge
    for segment in plan.suffixes:
        (row,) = segment.requests
        total += max(cost_model.key_read, plan.query_lens[row] * cost_model.row_key) * segment.num_keys
    return total


def _skipping_some(plan: RelayPlan, kept: tuple[Segment, ...]) -> RelayPlan:
    """The plan with only some of its shared segments, each reaching back to the next one kept before it."""
    ends = [0] * plan.num_requests
    shared = []
    for segment in sorted(kept, key=lambda s: s.key_start):
        shared.append(Segment(segment.requests, ends[segment.requests[0]], segment.key_end))
        for row in segment.requests:
            ends[row] = segment.key_end
    return RelayPlan(plan.block_size, plan.query_lens, plan.seq_lens, tuple(shared), tuple(ends))


@settings(max_examples=200, deadline=None)
@given(step=steps(max_rows=6), cost_model=cost_models)
def test_no_other_choice_of_segments_is_cheaper(step: Step, cost_model: CostModel) -> None:
    everything = step.plan(CostModel.always())
    subsets = chain.from_iterable(combinations(everything.shared, n) for n in range(len(everything.shared) + 1))
    cheapest = min(_cost(_skipping_some(everything, kept), cost_model) for kept in subsets)
    assert _cost(step.plan(cost_model), cost_model) == pytest.approx(cheapest)


def _nested_step() -> Step:
    """Six rows under one system prompt, four of them under one tool prompt, and one row alone."""
    block_table = np.zeros((7, 6), dtype=np.int32)
    block_table[:6, :2] = (1, 2)
    block_table[:4, 2:4] = (3, 4)
    block_table[4, 2:] = (20, 21, 22, 23)
    block_table[5, 2:] = (30, 31, 32, 33)
    block_table[:4, 4:] = np.arange(40, 48).reshape(4, 2)
    block_table[6] = np.arange(50, 56)
    return Step(block_table, (1,) * 7, (90,) * 7, 16)


def test_a_nested_tree_is_found_and_counted() -> None:
    plan = _nested_step().plan(CostModel.always())
    assert plan.shared == (Segment((0, 1, 2, 3, 4, 5), 0, 32), Segment((0, 1, 2, 3), 32, 64))
    assert [s.key_start for s in plan.suffixes] == [64, 64, 64, 64, 32, 32, 0]
    assert plan.is_shared
    assert (plan.num_groups, plan.grouped_requests, plan.kv_tokens_saved) == (1, 6, 5 * 32 + 3 * 32)
    assert "keys [32, 64) shared by rows 0-3" in str(plan)


def test_a_node_that_does_not_pay_is_left_to_its_children() -> None:
    """The outer node saves two reads of 32 keys over the inner one alone, 64, and costs 70."""
    plan = _nested_step().plan(CostModel(key_read=1, row_key=0, segment=70, merge=0))
    assert plan.shared == (Segment((0, 1, 2, 3), 0, 64),)
    assert plan.suffix_starts == (64, 64, 64, 64, 0, 0, 0)
    assert _nested_step().plan(CostModel.never()).shared == ()


def test_long_segments_are_cut_into_even_pieces_of_whole_blocks() -> None:
    step = Step(np.arange(1, 12, dtype=np.int32)[None].repeat(2, 0), (1, 1), (161, 161), 16)
    work_list = make_work_list(step.plan(CostModel.always()), max_keys_per_segment=100)
    assert work_list.segments[:, 1:3].tolist() == [[0, 80], [80, 160], [160, 161], [160, 161]]
    assert form_faults(work_list) == []
    assert coverage_faults(step, work_list, [0, 1]) == []


def test_a_chunk_of_a_prompt_has_no_slot_where_it_sees_nothing() -> None:
    step = Step(np.array([[1, 2]], dtype=np.int32), (4,), (4,), 2)
    work_list = make_work_list(step.plan(CostModel.always()), max_keys_per_segment=2)
    assert work_list.segments.tolist() == [[0, 0, 2, 0, 4], [0, 2, 4, 4, 6]]
    assert work_list.slot_token.tolist() == [0, 1, 2, 3, 2, 3]
    assert work_list.slot_key_end.tolist() == [1, 2, 2, 2, 3, 4]


def test_a_chain_deeper_than_the_recursion_limit_is_planned() -> None:
    num_rows = 1100
    block_table = np.arange(1, num_rows + 2, dtype=np.int32)[None].repeat(num_rows, 0)
    plan = make_plan(
        block_table, [1] * num_rows, range(2, num_rows + 2), block_size=1, cost_model=CostModel(1, 0, 0, 0)
    )
    assert len(plan.shared) == num_rows - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"query_lens": [1]}, "query_lens has 1 entries for 2 rows"),
        ({"seq_lens": [4, 4, 4]}, "seq_lens has 3 entries for 2 rows"),
        ({"query_lens": [1, 5]}, r"query_lens\[1\] is 5, more than seq_lens\[1\], 4"),
        ({"query_lens": [-1, 1]}, r"query_lens\[0\] must not be negative, got -1"),
        ({"seq_lens": [4, 13]}, r"seq_lens\[1\] is 13, more than the 3 blocks of 4 tokens"),
        ({"query_lens": [[1, 1]]}, r"query_lens must have one dimension, got shape \(1, 2\)"),
        ({"seq_lens": [4.0, 4.0]}, "seq_lens must hold integers, got dtype float64"),
        ({"block_table": np.zeros(3, np.int32)}, r"block_table must be .* got shape \(3,\)"),
        ({"block_table": np.zeros((2, 3))}, "block_table must be .* dtype float64"),
    ],
)
def test_impossible_steps_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    step = {"block_table": np.ones((2, 3), np.int32), "query_lens": [1, 1], "seq_lens": [4, 4], "block_size": 4}
    with pytest.raises(ValueError, match=message):
        make_plan(**{**step, **changes}, cost_model=CostModel.always())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_start_loc": [0, 1]}, "query_start_loc must have one entry per row and one for the end, 3"),
        ({"query_start_loc": [0, 1, 1]}, r"query_lens\[1\] is 1, which overlaps query_start_loc\[2\], 1"),
        ({"query_start_loc": [-1, 1, 2]}, r"query_start_loc\[0\] must not be negative, got -1"),
        ({"max_keys_per_segment": 0}, "max_keys_per_segment must be at least 1 or None, got 0"),
    ],
)
def test_impossible_lowerings_are_refused_by_name(arguments: dict[str, object], message: str) -> None:
    plan = make_plan(np.ones((2, 3), np.int32), [1, 1], [4, 4], block_size=4, cost_model=CostModel.always())
    with pytest.raises(ValueError, match=message):
        make_work_list(plan, **{"max_keys_per_segment": None, **arguments})


@pytest.mark.parametrize("arguments", [{"key_read": -1.0}, {"row_key": float("inf")}, {"merge": float("nan")}])
def test_impossible_costs_are_refused_by_name(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        CostModel(**arguments)

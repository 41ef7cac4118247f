"""The plan made on the device against the one made on the host: equal to the last integer, whatever the step holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from relay_coverage import Step
from relay_steps import TinyEngine, steps
from relay_tensors import Problem, assert_within_budget, make_problem, tree_step

from relay_kernels.relay_attention.plan import CostModel, can_share, make_plan
from relay_kernels.relay_attention.work_list import WorkList, fitted_work_list

pytest.importorskip("triton")

from relay_kernels.relay_attention import triton_plan
from relay_kernels.relay_attention.triton_plan import DeviceCosts, DevicePlanner
from relay_kernels.relay_attention.triton_relay import (
    Capacity,
    Tile,
    Tiles,
    TritonWorkspace,
    relay_attention_triton,
)

TILES = Tiles(Tile(16, 16, num_warps=4, num_stages=2), Tile(32, 16, num_warps=4, num_stages=2))
ROOMY = Capacity(segments=400, slots=3000, tokens=300)
ALWAYS = CostModel(key_read=1, row_key=0, segment=0, merge=0)
GPU = CostModel(key_read=64, row_key=1, segment=900, merge=130)

_costs = st.integers(0, 60)
whole_costs = st.one_of(
    st.just(ALWAYS),
    st.just(GPU),
    st.builds(
        CostModel,
        key_read=_costs,
        row_key=_costs,
        segment=_costs,
        merge=_costs,
        min_keys=st.sampled_from([0, 0, 16, 200]),
    ),
)


def workspace(device: torch.device, capacity: Capacity = ROOMY) -> TritonWorkspace:
    made = TritonWorkspace(
        capacity, num_heads=6, num_kv_heads=2, head_size=16, dtype=torch.float32, device=device, tiles=TILES
    )
    made._device.fill_(-7)  # what a step does not set must not matter
    return made


def planned(
    step: Step, cost_model: CostModel, max_keys: int, device: torch.device, capacity: Capacity = ROOMY, depth: int = 4
) -> TritonWorkspace:
    made = workspace(device, capacity)
    planner = DevicePlanner(
        made,
        max_rows=max(1, len(step.query_lens)),
        block_size=step.block_size,
        cost_model=cost_model,
        max_keys_per_segment=max_keys,
        max_depth=depth,
    )
    for buffer in (planner._groups, planner._sums, planner._rows, planner._nodes, planner._segments, planner._members):
        buffer.fill_(-9)
    planner.plan(*tensors_of(step, device))
    return made


def tensors_of(step: Step, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    start = np.cumsum((0, *step.query_lens))
    arrays = (step.block_table, start, np.array(step.seq_lens))
    table, start_R, seq_R = (torch.from_numpy(np.ascontiguousarray(a, dtype=np.int32)).to(device) for a in arrays)
    return table.reshape(len(step.query_lens), -1), start_R, seq_R


def on_host(
    step: Step, cost_model: CostModel, max_keys: int, capacity: Capacity = ROOMY, depth: int = 4
) -> tuple[WorkList, bool]:
    plan = make_plan(
        step.block_table,
        step.query_lens,
        step.seq_lens,
        block_size=step.block_size,
        cost_model=cost_model,
        max_depth=depth,
    )
    work_list = fitted_work_list(
        plan, max_keys_per_segment=max_keys, most_segments=capacity.segments, most_slots=capacity.slots
    )
    return work_list, plan.is_shared


def totals_of(step: Step) -> list[int]:
    """What one step adds to `DevicePlanner.totals`, where everything is shared and all of it fits."""
    lens = (np.array(step.query_lens, dtype=np.int64), np.array(step.seq_lens, dtype=np.int64))
    plan = make_plan(step.block_table, *lens, block_size=step.block_size, cost_model=ALWAYS, max_depth=4)
    is_eligible = can_share(step.block_table, *lens, block_size=step.block_size)
    counted = (plan.is_shared, plan.grouped_requests, plan.num_groups, plan.kv_tokens_saved)
    return [int(is_eligible), *map(int, counted)]


def assert_equal(found: TritonWorkspace, expected: WorkList) -> None:
    loaded = workspace(found.segments.device, found.capacity)
    loaded.load(expected)
    sizes = {
        "counts": 2,
        "segments": expected.segments.size,
        "slot_token": expected.num_slots,
        "slot_key_end": expected.num_slots,
        "token_slot_start": found.capacity.tokens + 1,
        "token_slots": expected.num_slots,
        "token_key_end": found.capacity.tokens,
    }
    counts = [int(loaded.small_count), int(loaded.large_count)]
    assert [int(found.small_count), int(found.large_count)] == counts
    sizes |= {"small_tiles": 2 * counts[0], "large_tiles": 2 * counts[1]}
    for name, size in sizes.items():
        if name != "counts":
            ours, theirs = getattr(found, name)[:size].cpu(), getattr(loaded, name)[:size].cpu()
            assert torch.equal(ours, theirs), (name, ours.tolist(), theirs.tolist())


STEPS = {
    "one decode": tree_step(16, [([], 1, 63)]),
    "nothing shared": tree_step(16, [([], 1, 63), ([], 1, 111), ([], 1, 37)]),
    "one prefix": tree_step(16, [([7, 8, 9], 1, 63), ([7, 8, 9], 1, 111), ([7, 8, 9], 1, 49)]),
    "two groups": tree_step(
        16, [([1, 2], 1, 63), ([5, 6, 7], 1, 111), ([1, 2], 1, 37), ([], 1, 5), ([5, 6, 7], 1, 50)]
    ),
    "nested": tree_step(16, [([1, 2, 3, 4], 1, 80), ([1, 2, 3, 4], 1, 66), ([1, 2, 9], 1, 63), ([1, 2, 9], 1, 51)]),
    "mixed": tree_step(16, [([1, 2], 63, 111), ([1, 2], 37, 74), ([1, 2], 3, 37), ([1, 2], 1, 33), ([], 37, 37)]),
    "padding rows": tree_step(16, [([1, 2], 1, 37), ([], 0, 0), ([1, 2], 1, 40), ([], 0, 9), ([1, 2], 2, 70)]),
    "six deep": tree_step(
        4, [([*range(1, depth + 1)] if half else [*range(1, depth), 90 + depth], 1, 4 * depth + 3)
            for depth in range(1, 7) for half in (True, False)]
    ),
    "deeper, but not worth it": tree_step(16, [([1, 2, 3], 1, 63), ([1, 2, 3], 1, 70), ([1, 2], 1, 50)]),
    "null blocks": Step(
        np.array([[0, 5, 6, 7], [0, 5, 6, 8], [4, 0, 6, 9], [4, 0, 6, 3]], dtype=np.int32), (1,) * 4, (60,) * 4, 16
    ),
    "nothing": Step(np.zeros((3, 2), dtype=np.int32), (0, 0, 0), (0, 0, 0), 16),
}  # fmt: skip


@pytest.mark.parametrize("max_keys", [16, 1000])
@pytest.mark.parametrize("name", STEPS)
def test_known_steps(name: str, max_keys: int, triton_device: torch.device) -> None:
    for cost_model in (ALWAYS, CostModel(1, 0, 20, 4)):
        expected, _ = on_host(STEPS[name], cost_model, max_keys)
        assert_equal(planned(STEPS[name], cost_model, max_keys, triton_device), expected)


@settings(max_examples=30, deadline=None)
@given(steps(), whole_costs, st.sampled_from([1, 16, 50, 4096]), st.integers(1, 4))
def test_any_step(step: Step, cost_model: CostModel, max_keys: int, depth: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if sum(step.query_lens) > ROOMY.tokens:
        return
    if not len(step.query_lens):
        return
    expected, _ = on_host(step, cost_model, max_keys, depth=depth)
    assert_equal(planned(step, cost_model, max_keys, device, depth=depth), expected)


@settings(max_examples=10, deadline=None)
@given(steps(), st.integers(10, 60), st.integers(1, 120))
def test_a_step_that_may_not_fit_shares_nothing_and_is_cut_nowhere(step: Step, segments: int, spare: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = sum(step.query_lens)
    if not 0 < tokens <= 200 or not len(step.query_lens):
        return
    capacity = Capacity(segments=segments, slots=tokens + spare, tokens=tokens)
    expected, _ = on_host(step, ALWAYS, 16, capacity)
    assert_equal(planned(step, ALWAYS, 16, device, capacity), expected)


def test_both_ways_of_fitting_are_met() -> None:
    step = STEPS["nested"]
    roomy, is_shared = on_host(step, ALWAYS, 16)
    tight, _ = on_host(step, ALWAYS, 16, Capacity(segments=8, slots=100, tokens=4))
    assert is_shared
    assert len(roomy.segments) > len(tight.segments) == 4
    with pytest.raises(ValueError, match="the step needs 4 segments, more than most_segments, 3"):
        on_host(step, ALWAYS, 16, Capacity(segments=3, slots=100, tokens=4))


def test_the_steps_of_an_engine(triton_device: torch.device) -> None:
    """Requests join and finish, blocks are handed out again, rows keep stale tails: one planner sees all of it."""
    rng = np.random.default_rng(0)
    engine = TinyEngine(block_size=4)
    prompts = [[int(x) for x in rng.integers(0, 9, 9)] for _ in range(2)]
    made = workspace(triton_device)
    planner = DevicePlanner(made, max_rows=6, block_size=4, cost_model=ALWAYS, max_keys_per_segment=8)
    shared = 0
    totals = np.zeros(5, dtype=np.int64)
    for number in range(14):
        if rng.random() < 0.6:
            engine.join([*prompts[number % 2], *(int(x) for x in rng.integers(0, 9, int(rng.integers(1, 8))))])
        if rng.random() < 0.2:
            engine.finish(int(rng.integers(6)))
        step = engine.step(chunk=5, sampled=number % 7, drafted=int(rng.integers(0, 3)))
        expected, is_shared = on_host(step, ALWAYS, 8)
        planner.plan(*tensors_of(step, triton_device))
        assert_equal(made, expected)
        shared += is_shared
        totals += totals_of(step)
        assert planner.totals.tolist() == totals.tolist()
    assert shared > 3


@pytest.mark.parametrize(
    "name",
    [
        "cold_burst",
        "padded_rows",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("preemption", "sliding_window", "stale_tails")),
    ],
)
def test_recorded_steps_of_a_real_engine(name: str, triton_device: torch.device) -> None:
    """Same-step prefix hits, padded rows and rows of a graph's capture, null blocks, tails of whoever was there."""
    recording = json.loads((Path(__file__).parent / "recorded_steps" / f"{name}.json").read_text())
    size, recorded = recording["block_size"], recording["steps"][::6]
    work = workspace(triton_device, Capacity(segments=400, slots=4000, tokens=1500))
    rows = max(len(step["seq_lens"]) for step in recorded)
    planner = DevicePlanner(work, max_rows=rows, block_size=size, cost_model=ALWAYS, max_keys_per_segment=64)
    for found in recorded:
        table = np.array(found["block_table"], dtype=np.int32)
        step = Step(table, tuple(found["query_lens"]), tuple(found["seq_lens"]), size)
        expected, _ = on_host(step, ALWAYS, 64, work.capacity)
        planner.plan(*tensors_of(step, triton_device))
        assert_equal(work, expected)


def test_launches_do_not_depend_on_the_step(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """So one captured CUDA graph plans every step of the same padded size."""
    launches: list[Any] = []
    launch = triton_plan._launch

    def recorded(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        given = tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments)
        launches.append((kernel, grid, given, tuple(sorted(constants.items()))))
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(triton_plan, "_launch", recorded)
    made = workspace(triton_device)
    planner = DevicePlanner(made, max_rows=8, block_size=16, cost_model=ALWAYS, max_keys_per_segment=32)
    table = torch.zeros(8, 16, dtype=torch.int32, device=triton_device)
    start = torch.zeros(9, dtype=torch.int32, device=triton_device)
    seq = torch.zeros(8, dtype=torch.int32, device=triton_device)
    seen = []
    for name in ("nested", "nothing shared", "padding rows"):
        ours = tensors_of(STEPS[name], triton_device)
        rows = len(ours[2])
        table.zero_()[:rows, : ours[0].shape[1]] = ours[0]
        start[: rows + 1], start[rows + 1 :] = ours[1], ours[1][-1]
        seq.zero_()[:rows] = ours[2]
        planner.plan(table, start, seq)
        expected, _ = on_host(STEPS[name], ALWAYS, 32)
        assert_equal(made, expected)
        seen.append(tuple(launches))
        launches.clear()
    assert len(seen[0]) == 2 * 4 + 1
    assert seen[0] == seen[1] == seen[2]


def test_attention_over_a_plan_that_never_left_the_device(triton_device: torch.device) -> None:
    step = STEPS["mixed"]
    problem = make_problem(step, num_heads=6, num_kv_heads=2, head_size=16, dtype=torch.float32, device=triton_device)
    work = planned(step, ALWAYS, 16, triton_device)
    out = relay_attention_triton(
        problem.query, problem.key_cache, problem.value_cache, problem.block_table, work, scale=problem.scale
    )
    plain, exact = (problem.reference(dtype)[0] for dtype in (torch.float32, torch.float64))
    assert_within_budget(out.cpu().double(), plain, exact)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_one_graph_plans_and_attends_for_every_step() -> None:
    """Captured on a step that shares nothing, replayed on others whose rows, prefixes and lengths differ."""
    device = torch.device("cuda")
    work = workspace(device)
    planner = DevicePlanner(work, max_rows=8, block_size=16, cost_model=ALWAYS, max_keys_per_segment=32)
    shape = {"num_heads": 6, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32, "device": device}
    names = ("nothing shared", "nested", "one prefix", "padding rows")
    problems = [make_problem(STEPS[name], **shape) for name in names]
    blocks = max(len(problem.key_cache) for problem in problems)
    query = torch.zeros(ROOMY.tokens, 6, 16, device=device)
    caches = [torch.zeros(blocks, 16, 2, 16, device=device) for _ in range(2)]
    table = torch.zeros(8, 16, dtype=torch.int32, device=device)
    start = torch.zeros(9, dtype=torch.int32, device=device)
    seq = torch.zeros(8, dtype=torch.int32, device=device)
    out = torch.empty_like(query)

    def run() -> None:
        planner.plan(table, start, seq)
        relay_attention_triton(query, *caches, table, work, scale=problems[0].scale, out=out)

    def load(problem: Problem) -> None:
        ours = tensors_of(problem.step, device)
        rows = len(ours[2])
        table.zero_()[:rows, : ours[0].shape[1]] = ours[0]
        start[: rows + 1], start[rows + 1 :] = ours[1], ours[1][-1]
        seq.zero_()[:rows] = ours[2]
        query[: len(problem.query)] = problem.query
        for cache, theirs in zip(caches, (problem.key_cache, problem.value_cache), strict=True):
            cache[: len(theirs)] = theirs

    load(problems[0])
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for problem in problems:
        load(problem)
        graph.replay()
        plain, exact = (problem.reference(dtype)[0] for dtype in (torch.float32, torch.float64))
        assert_within_budget(out[: len(exact)].cpu().double(), plain, exact)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (CostModel(row_key=0.05), "row_key must be a whole number up to 1048576 on a GPU, got 0.05"),
        (CostModel(row_key=0, segment=float("inf")), "segment must be a whole number"),
    ],
)
def test_costs_that_the_device_cannot_add_are_refused(model: CostModel, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        DeviceCosts.of(model)

"""The Triton kernels against the reference: compiled where there is a GPU, interpreted elsewhere.

Interpreted bfloat16 products are wrong in Triton itself, so bfloat16 is asked of the GPU only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from relay_coverage import Step
from relay_tensors import Problem, assert_within_budget, make_problem, tree_step

from relay_kernels.relay_attention.plan import CostModel
from relay_kernels.relay_attention.reference import partial_attention_reference
from relay_kernels.relay_attention.work_list import WorkList, make_work_list

triton = pytest.importorskip("triton")

from relay_kernels.relay_attention import triton_relay  # noqa: E402  (imports triton)
from relay_kernels.relay_attention.triton_relay import (  # noqa: E402
    FP8_DTYPES,
    Capacity,
    LayerFeatures,
    Tile,
    Tiles,
    TritonWorkspace,
    relay_attention_triton,
)

SMALL_TILES = Tiles(Tile(16, 16, num_warps=4, num_stages=2), Tile(32, 32, num_warps=4, num_stages=2))

STEPS = {
    "one decode": tree_step(16, [([], 1, 63)]),
    "nothing shared": tree_step(16, [([], 1, 63), ([], 1, 111), ([], 1, 37)]),
    "one prefix": tree_step(16, [([7, 8, 9], 1, 63), ([7, 8, 9], 1, 111), ([7, 8, 9], 1, 49)]),
    "two groups and one alone": tree_step(
        16, [([1, 2], 1, 63), ([5, 6, 7], 1, 111), ([1, 2], 1, 37), ([], 1, 5), ([5, 6, 7], 1, 50)]
    ),
    "nested": tree_step(16, [([1, 2, 3, 4], 1, 80), ([1, 2, 3, 4], 1, 66), ([1, 2, 9], 1, 63), ([1, 2, 9], 1, 51)]),
    "prefill, speculation and decodes": tree_step(
        16, [([1, 2], 63, 111), ([1, 2], 37, 74), ([1, 2], 3, 37), ([1, 2], 1, 33), ([], 37, 37)]
    ),
    "padding rows": tree_step(16, [([1, 2], 1, 37), ([], 0, 0), ([1, 2], 1, 40), ([], 0, 9), ([], 2, 0)]),
    "blocks of 7": tree_step(7, [([1, 2, 3], 1, 37), ([1, 2, 3], 2, 63), ([], 9, 11)]),
    "blocks of 1": tree_step(1, [([*range(30)], 1, 37), ([*range(30)], 1, 33)]),
    "blocks of 128": tree_step(128, [([1], 1, 150), ([1], 1, 200)]),
    "first step of all": tree_step(16, [([], 37, 37), ([], 1, 1)]),
    "no rows": tree_step(16, []),
}


def _work_list(problem: Problem, max_keys: int | None = None, cost_model: CostModel | None = None) -> WorkList:
    plan = problem.step.plan(cost_model or CostModel.always())
    return make_work_list(plan, max_keys_per_segment=max_keys)


def _run(
    problem: Problem, work: WorkList | TritonWorkspace, out: torch.Tensor | None = None, **features: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = torch.empty(problem.query.shape[:2], dtype=torch.float32, device=problem.query.device)
    out = relay_attention_triton(
        problem.query,
        problem.key_cache,
        problem.value_cache,
        problem.block_table,
        work,
        scale=problem.scale,
        features=LayerFeatures(**features),
        out=out,
        lse=lse,
    )
    return out.cpu().double(), lse.cpu().double()


def _assert_right(problem: Problem, actual: tuple[torch.Tensor, torch.Tensor], **features: Any) -> None:
    """Output and log-sum-exp within budget, and nothing at all for padding tokens."""
    num_tokens = sum(problem.step.query_lens)
    plainly, exactly = (problem.reference(dtype, **features) for dtype in (problem.query.dtype, torch.float64))
    for result, plain, exact in zip(actual, plainly, exactly, strict=True):
        assert_within_budget(result[:num_tokens], plain, exact)
    assert torch.equal(actual[0][num_tokens:], torch.zeros_like(actual[0][num_tokens:]))
    assert torch.isneginf(actual[1][num_tokens:]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("name", STEPS)
def test_steps(name: str, dtype: torch.dtype, triton_device: torch.device) -> None:
    problem = make_problem(
        STEPS[name], num_heads=6, num_kv_heads=2, head_size=32, dtype=dtype, device=triton_device, num_padding_tokens=2
    )
    _assert_right(problem, _run(problem, _work_list(problem, max_keys=32)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize(
    ("head_size", "num_heads", "num_kv_heads"),
    [(32, 8, 1), (64, 3, 3), (80, 6, 2), (96, 8, 1), (112, 2, 2), (128, 3, 1), (256, 8, 1), (128, 40, 1)],
)
def test_head_sizes_and_groups(
    head_size: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    problem = make_problem(
        tree_step(16, [([1, 2], 1, 63), ([1, 2], 21, 63), ([], 1, 37)]),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        dtype=dtype,
        device=triton_device,
    )
    _assert_right(problem, _run(problem, _work_list(problem)))


FEATURES = {
    "window of two": {"window": 2},
    "window inside a block": {"window": 5},
    "window across blocks": {"window": 35},
    "window larger than all": {"window": 1000},
    "soft cap": {"soft_cap": 1.5},
    "sinks": {"sinks_N": [0.5, -3.0, 2.0, float("-inf"), 9.0, 0.0]},
    "all": {"window": 21, "soft_cap": 2.0, "sinks_N": [0.5, -3.0, 2.0, float("-inf"), 9.0, 0.0]},
}


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(
    "name",
    [
        "nested",
        "padding rows",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("one prefix", "prefill, speculation and decodes")),
    ],
)
def test_what_a_layer_does_beyond_plain_attention(name: str, features: str, triton_device: torch.device) -> None:
    problem = make_problem(
        STEPS[name],
        num_heads=6,
        num_kv_heads=2,
        head_size=32,
        dtype=torch.float32,
        device=triton_device,
        num_padding_tokens=1,
    )
    chosen: dict[str, Any] = dict(FEATURES[features])
    if "sinks_N" in chosen:
        chosen["sinks_N"] = torch.tensor(chosen["sinks_N"], device=triton_device)
    actual = _run(problem, _work_list(problem, max_keys=32), **chosen)
    of_reference = chosen | ({"sinks_N": chosen["sinks_N"].cpu()} if "sinks_N" in chosen else {})
    _assert_right(problem, actual, **of_reference)


@pytest.mark.parametrize("cache_dtype", FP8_DTYPES, ids=["e4m3", "e5m2"])
def test_a_cache_of_eight_bits(cache_dtype: torch.dtype, triton_device: torch.device) -> None:
    """Exactly the values that its numbers stand for, times the scales: against a cache that holds those."""
    problem = make_problem(
        STEPS["nested"], num_heads=6, num_kv_heads=2, head_size=32, dtype=torch.float16, device=triton_device
    )
    key_scale, value_scale = 0.25, 2.0  # exact in every format
    small = [(cache.float() / 8).to(cache_dtype) for cache in (problem.key_cache, problem.value_cache)]
    scales = (key_scale, value_scale)
    meant = [(cache.float() * scale).to(torch.float16) for cache, scale in zip(small, scales, strict=True)]
    step, query, table = problem.step, problem.query, problem.block_table
    stored = Problem(step, query, small[0], small[1], table, problem.scale)
    plain = Problem(step, query, meant[0], meant[1], table, problem.scale)
    actual = _run(stored, _work_list(problem, max_keys=32), key_scale=key_scale, value_scale=value_scale)
    _assert_right(plain, actual)


def test_features_that_cannot_be_are_refused(triton_device: torch.device) -> None:
    for name, value in (("window", 0), ("soft_cap", -1.0), ("soft_cap", float("nan")), ("key_scale", 0.0)):
        with pytest.raises(ValueError, match=f"{name} must be .* got"):
            LayerFeatures(**{name: value})
    problem = make_problem(
        STEPS["one decode"], num_heads=6, num_kv_heads=2, head_size=32, dtype=torch.float32, device=triton_device
    )
    with pytest.raises(ValueError, match=r"those of an 8-bit cache, got 0\.5 and 1\.0 with a cache of torch\.float32"):
        _run(problem, _work_list(problem), key_scale=0.5)
    for sinks in (torch.zeros(5, device=triton_device), torch.zeros(6, device=triton_device, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"sinks_N must be a float32 tensor of shape \(6,\)"):
            _run(problem, _work_list(problem), sinks_N=sinks)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="interpreted bfloat16 products are wrong, and there is no GPU"
)
@pytest.mark.parametrize("name", STEPS)
def test_bfloat16(name: str) -> None:
    problem = make_problem(
        STEPS[name], num_heads=8, num_kv_heads=2, head_size=128, dtype=torch.bfloat16, device=torch.device("cuda")
    )
    _assert_right(problem, _run(problem, _work_list(problem, max_keys=64)))


def test_sharing_or_not_is_the_same_attention(triton_device: torch.device) -> None:
    problem = make_problem(
        STEPS["nested"], num_heads=6, num_kv_heads=2, head_size=32, dtype=torch.float32, device=triton_device
    )
    for cost_model in (CostModel.always(), CostModel.never()):
        _assert_right(problem, _run(problem, _work_list(problem, cost_model=cost_model)))


def test_any_order_of_the_cache_dimensions(triton_device: torch.device) -> None:
    """Keys head-major, values block-major, and queries and output as slices of something wider."""
    shape = {"num_heads": 6, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32, "device": triton_device}
    step = STEPS["prefill, speculation and decodes"]
    plain = make_problem(step, **shape)
    head_major = make_problem(step, **shape, is_head_major=True)
    assert plain.key_cache.stride() != head_major.key_cache.stride()
    wide = torch.empty(len(plain.query), 7, 48, device=triton_device)
    wide_query = wide[:, :6, :32].copy_(plain.query)
    problem = Problem(step, wide_query, head_major.key_cache, plain.value_cache, plain.block_table, plain.scale)
    out = torch.empty(len(plain.query), 7, 48, device=triton_device)
    _assert_right(problem, _run(problem, _work_list(problem), out[:, :6, :32]))
    assert out[:, 6:].isnan().all()
    assert out[..., 32:].isnan().all()


def test_blocks_beyond_the_reach_of_32_bits(triton_device: torch.device) -> None:
    """Blocks lie 2 ** 28 elements apart, so the eighth begins where an int32 ends."""
    block_stride, block_size, head_size = 2**28, 2, 16
    num_elements = 8 * block_stride + block_size * head_size
    caches = []
    for seed in (0, 1):
        # Zeros of numpy take no memory until they are written; a GPU must have it all.
        memory = (
            torch.from_numpy(np.zeros(num_elements, dtype=np.float16))
            if triton_device.type == "cpu"
            else torch.zeros(num_elements, dtype=torch.float16, device=triton_device)
        )
        cache = memory.as_strided((9, block_size, 1, head_size), (block_stride, head_size, head_size, 1))
        for block in (3, 8):
            values = torch.randn(cache[block].shape, generator=torch.Generator().manual_seed(10 * seed + block))
            cache[block] = values.to(cache)
        caches.append(cache)
    step = Step(np.array([[8, 3]], dtype=np.int32), (1,), (4,), block_size)
    small = make_problem(step, num_heads=2, num_kv_heads=1, head_size=16, dtype=torch.float16, device=triton_device)
    problem = Problem(step, small.query, caches[0], caches[1], small.block_table, small.scale)
    actual = _run(problem, _work_list(problem))
    key, value = (cache[[8, 3]].cpu().flatten(0, 1) for cache in caches)
    plain, exact = (
        partial_attention_reference(problem.query.cpu().to(t), key.to(t), value.to(t), problem.scale)
        for t in (torch.float16, torch.float64)
    )
    for i in range(2):
        assert_within_budget(actual[i], plain[i].double(), exact[i])


def test_a_work_list_without_suffixes_and_a_token_that_sees_nothing(triton_device: torch.device) -> None:
    """Three tokens: two see the whole of a prefix and nothing else, the third has neither prefix nor suffix."""
    problem = make_problem(
        tree_step(16, [([], 3, 37)]),
        num_heads=6,
        num_kv_heads=2,
        head_size=32,
        dtype=torch.float32,
        device=triton_device,
    )
    work_list = WorkList(
        *(
            np.array(array, dtype=np.int32)
            for array in ([[0, 0, 16, 0, 2]], [0, 2], [16, 16], [0, 1, 1, 2], [0, 1], [16, 0, 16])
        )
    )
    out, lse = _run(problem, work_list)
    block = int(problem.block_table[0, 0])
    for token, is_empty in enumerate((False, True, False)):
        plain, exact = (
            partial_attention_reference(
                problem.query[token : token + 1].cpu().to(dtype),
                problem.key_cache[block, : 0 if is_empty else 16].cpu().to(dtype),
                problem.value_cache[block, : 0 if is_empty else 16].cpu().to(dtype),
                problem.scale,
            )
            for dtype in (torch.float32, torch.float64)
        )
        assert_within_budget(out[token : token + 1], plain[0].double(), exact[0])
        assert_within_budget(lse[token : token + 1], plain[1].double(), exact[1])
    assert torch.equal(out[1], torch.zeros_like(out[1]))


def _decodes(prefixes: list[list[int]]) -> Step:
    return tree_step(16, [(prefix, 1, 63 + row) for row, prefix in enumerate(prefixes)])


GROUPINGS = {
    "all": _decodes([[1, 2]] * 6),
    "pairs": _decodes([[1, 2], [3], [5, 6, 7], [1, 2], [3], [5, 6, 7]]),
    "none": _decodes([[]] * 6),
}


def _workspace(device: torch.device, dtype: torch.dtype = torch.float32, head_size: int = 32) -> TritonWorkspace:
    return TritonWorkspace(
        Capacity(segments=20, slots=30, tokens=8),
        num_heads=6,
        num_kv_heads=2,
        head_size=head_size,
        dtype=dtype,
        device=device,
        tiles=SMALL_TILES,
    )


def _grouped_problem(name: str, device: torch.device, seed: int = 0) -> Problem:
    return make_problem(
        GROUPINGS[name],
        num_heads=6,
        num_kv_heads=2,
        head_size=32,
        dtype=torch.float32,
        device=device,
        num_padding_tokens=2,
        seed=seed,
    )


def test_launches_do_not_depend_on_the_grouping(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same grid, same addresses, same numbers and constants: what a CUDA graph replays serves every grouping."""
    launches: list[tuple[Any, ...]] = []
    launch = triton_relay._launch

    def recorded(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        given = tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments)
        launches.append((kernel, grid, given, tuple(sorted(constants.items()))))
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(triton_relay, "_launch", recorded)
    workspace = _workspace(triton_device)
    buffers = _grouped_problem("none", triton_device)
    out = torch.empty_like(buffers.query)
    lse = torch.empty(out.shape[:2], device=triton_device)
    seen = []
    for name in GROUPINGS:
        problem = _grouped_problem(name, triton_device, seed=len(seen))
        # The step's own data, where a captured graph would read it.
        query, table = buffers.query.copy_(problem.query), torch.zeros_like(buffers.block_table)
        table = buffers.block_table.copy_(_widened(problem.block_table, table))
        key, value = buffers.key_cache.fill_(float("nan")), buffers.value_cache.fill_(float("nan"))
        key[: len(problem.key_cache)], value[: len(problem.value_cache)] = problem.key_cache, problem.value_cache
        workspace.load(_work_list(problem))
        relay_attention_triton(query, key, value, table, workspace, scale=problem.scale, out=out, lse=lse)
        _assert_right(problem, (out.cpu().double(), lse.cpu().double()))
        seen.append(tuple(launches))
        launches.clear()
    assert len(seen[0]) == 3
    assert seen[0] == seen[1] == seen[2]


def test_a_shorter_work_list_leaves_nothing_of_the_last(triton_device: torch.device) -> None:
    """Eight tokens, then two and six of padding in the same workspace."""
    workspace = _workspace(triton_device)
    for step, num_padding_tokens in ((_decodes([[1, 2]] * 8), 0), (_decodes([[1]] * 2), 6)):
        problem = make_problem(
            step,
            num_heads=6,
            num_kv_heads=2,
            head_size=32,
            dtype=torch.float32,
            device=triton_device,
            num_padding_tokens=num_padding_tokens,
        )
        workspace.load(_work_list(problem))
        _assert_right(problem, _run(problem, workspace))


def _widened(table: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    wide = torch.zeros_like(like)
    wide[:, : table.shape[1]] = table
    return wide


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_one_cuda_graph_serves_every_grouping() -> None:
    device = torch.device("cuda")
    workspace = _workspace(device)
    buffers = _grouped_problem("none", device)
    out = torch.empty_like(buffers.query)
    lse = torch.empty(out.shape[:2], device=device)

    def run() -> None:
        relay_attention_triton(
            buffers.query,
            buffers.key_cache,
            buffers.value_cache,
            buffers.block_table,
            workspace,
            scale=buffers.scale,
            out=out,
            lse=lse,
        )

    workspace.load(_work_list(buffers))
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed, name in enumerate(GROUPINGS):
        problem = _grouped_problem(name, device, seed)
        buffers.query.copy_(problem.query)
        buffers.block_table.copy_(_widened(problem.block_table, buffers.block_table))
        buffers.key_cache[: len(problem.key_cache)] = problem.key_cache
        buffers.value_cache[: len(problem.value_cache)] = problem.value_cache
        workspace.load(_work_list(problem))
        graph.replay()
        _assert_right(problem, (out.cpu().double(), lse.cpu().double()))


def test_a_work_list_too_large_for_its_workspace_is_refused(triton_device: torch.device) -> None:
    problem = make_problem(
        tree_step(16, [([], 9, 9)]),
        num_heads=6,
        num_kv_heads=2,
        head_size=32,
        dtype=torch.float32,
        device=triton_device,
    )
    with pytest.raises(ValueError, match="work_list has 9 tokens, more than the capacity of 8"):
        _workspace(triton_device).load(_work_list(problem))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_TNH": torch.zeros(8, 6)}, r"query_TNH must have three dimensions, got shape \(8, 6\)"),
        ({"key_cache": torch.zeros(9, 16, 2, 48)}, r"key_cache must have shape .* got \(9, 16, 2, 48\)"),
        ({"value_cache": torch.zeros(9, 16, 1, 32)}, r"value_cache must have shape .* got \(9, 16, 1, 32\)"),
        ({"value_cache": torch.zeros(9, 16, 2, 32).half()}, "value_cache must have the dtype .* got torch.float16"),
        ({"block_table": torch.zeros(6, 4)}, "block_table must be .* int32 .* got .* torch.float32"),
        ({"out": torch.zeros(7, 6, 32)}, r"out must have the shape of query_TNH, .* got \(7, 6, 32\)"),
        ({"lse": torch.zeros(8, 6).half()}, "lse must be a float32 tensor .* got .* torch.float16"),
        ({"query_TNH": torch.zeros(8, 6, 64)[..., ::2]}, "query_TNH must be contiguous in its last .* got stride 2"),
        ({"query_TNH": torch.zeros(8, 4, 32)}, "made for num_heads 6, got 4"),
        ({"query_TNH": torch.zeros(9, 6, 32)}, "query_TNH has 9 tokens, more than the capacity of 8"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    changes: dict[str, torch.Tensor], message: str, triton_device: torch.device
) -> None:
    tensors = {
        "query_TNH": torch.zeros(8, 6, 32),
        "key_cache": torch.zeros(9, 16, 2, 32),
        "value_cache": torch.zeros(9, 16, 2, 32),
        "block_table": torch.zeros(6, 4, dtype=torch.int32),
    }
    given = {name: tensor.to(triton_device) for name, tensor in {**tensors, **changes}.items()}
    if "out" not in changes:
        given["out"] = torch.zeros(given["query_TNH"].shape, device=triton_device)
    with pytest.raises(ValueError, match=message):
        relay_attention_triton(**given, work=_workspace(triton_device), scale=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads must be a multiple of num_kv_heads, got 5 and 2"),
        ({"head_size": 512}, "head_size must be between 16 and 256, got 512"),
        ({"dtype": torch.float64}, "dtype must be one of .* got torch.float64"),
    ],
)
def test_layers_that_the_kernels_cannot_serve_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    shape = {"num_heads": 6, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        TritonWorkspace(Capacity(1, 1, 1), **{**shape, **changes}, device=torch.device("cpu"))

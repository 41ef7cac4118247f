"""One call over the implementations: it reaches each of them, and refuses what none of them could take."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from relay_tensors import Problem, assert_within_budget, make_problem, tree_step

from relay_kernels.relay_attention.api import CacheLayout, Implementation, relay_attention
from relay_kernels.relay_attention.plan import CostModel
from relay_kernels.relay_attention.work_list import WorkList, make_work_list


@pytest.fixture
def problem() -> Problem:
    return make_problem(
        tree_step(16, [([1, 2], 1, 63), ([1, 2], 5, 39), ([], 1, 37)]),
        num_heads=6,
        num_kv_heads=2,
        head_size=32,
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_padding_tokens=1,
    )


def _arguments(problem: Problem) -> dict[str, Any]:
    return {
        "query_TNH": problem.query,
        "key_cache": problem.key_cache,
        "value_cache": problem.value_cache,
        "block_table": problem.block_table,
        "work_list": make_work_list(problem.step.plan(CostModel.always()), max_keys_per_segment=32),
        "scale": problem.scale,
        "out": torch.empty_like(problem.query),
    }


def _assert_right(problem: Problem, out: torch.Tensor) -> None:
    (plain, _), (exact, _) = problem.reference(torch.float32), problem.reference()
    assert_within_budget(out[:-1].double(), plain, exact)
    assert torch.equal(out[-1], torch.zeros_like(out[-1]))


def test_triton(problem: Problem) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton is not interpreted where there is a GPU, and this problem is on the CPU")
    arguments = _arguments(problem)
    out = relay_attention(**arguments, implementation=Implementation.TRITON)
    assert out is arguments["out"]
    _assert_right(problem, out)


def test_torch_on_the_cpu_reads_its_own_layout(problem: Problem) -> None:
    """In "vec", a block of one head is [head size, tokens] for keys and [tokens, head size] for values."""
    arguments = _arguments(problem)
    blocks, block_size, num_kv_heads, head_size = problem.key_cache.shape
    # Places without a key are zeros here: this layout is read block by block.
    key_BKHS = problem.key_cache.nan_to_num().permute(0, 2, 3, 1).contiguous()
    arguments["key_cache"] = key_BKHS.view(blocks, num_kv_heads, block_size, head_size)
    arguments["value_cache"] = problem.value_cache.nan_to_num().transpose(1, 2).contiguous()
    out = relay_attention(**arguments, implementation=Implementation.CPU_TORCH, layout=CacheLayout.VEC)
    assert out is arguments["out"]
    _assert_right(problem, out)


@pytest.mark.parametrize(
    ("implementation", "layout", "message"),
    [
        (
            Implementation.TRITON,
            CacheLayout.AMX,
            "layout must be one of unpacked for the .* triton, got amx",
        ),
        (Implementation.CPU, None, "layout must be one of amx, vec, vec16 for the implementation cpu, got None"),
        (Implementation.CPU_TORCH, CacheLayout.UNPACKED, "the implementation cpu_torch, got unpacked"),
    ],
)
def test_layouts_that_an_implementation_cannot_read_are_refused(
    problem: Problem, implementation: Implementation, layout: CacheLayout | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        relay_attention(**_arguments(problem), implementation=implementation, layout=layout)


LONG_WORK_LIST = WorkList(
    *(np.array(array, dtype=np.int32) for array in (np.zeros((0, 5)), [], [], np.zeros(10), [], np.zeros(9)))
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_TNH": torch.zeros(8, 192)}, r"query_TNH must be a floating tensor of three .* got shape \(8, 192\)"),
        ({"query_TNH": torch.zeros(8, 6, 32, dtype=torch.int32)}, "query_TNH must be a floating .* torch.int32"),
        ({"out": torch.zeros(8, 6, 16)}, r"out must have the shape .* got \(8, 6, 16\)"),
        ({"out": torch.zeros(8, 6, 32).half()}, "out must have .* got .* torch.float16"),
        ({"value_cache": torch.zeros(9, 16, 64)}, r"must have four dimensions, got shapes .* and \(9, 16, 64\)"),
        ({"block_table": torch.zeros(3, 4)}, "block_table must be .* int32 .* torch.float32"),
        ({"work_list": LONG_WORK_LIST}, "work_list has 9 tokens, query_TNH only 8"),
    ],
)
def test_what_no_implementation_could_take_is_refused_by_name(
    problem: Problem, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        relay_attention(**{**_arguments(problem), **changes}, implementation=Implementation.TRITON)


def test_the_api_imports_no_implementation_and_the_plan_no_torch() -> None:
    """Triton is absent on CPU installations, and a plan is made where torch need not be."""
    for module, absent in (("api", ("triton", "relay_kernels.relay_attention.cpu")), ("work_list", ("torch",))):
        code = f"import sys, relay_kernels.relay_attention.{module}; print([m for m in {absent} if m in sys.modules])"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert result.stdout.strip() == "[]", module

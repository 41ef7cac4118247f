"""Parts of the attention backend that no engine test reaches: what it does without a compiler, or without memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from relay_kernels.relay_attention.cpu_build import KernelUnavailableError
from relay_kernels.relay_attention.plan import CostModel, make_plan
from relay_serving.vllm_plugin import attention_backend
from relay_serving.vllm_plugin.attention_backend import RelayStep
from relay_serving.vllm_plugin.counters import FALLBACK_REASONS, CounterFile


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    caches = (attention_backend._compiled_kernel_refusal, attention_backend.cpu_build.load)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_relay_stands_aside() -> None:
    assert attention_backend._compiled_kernel_refusal("vec", False) == "no_compiler"
    assert "no_compiler" in FALLBACK_REASONS


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_a_kernel_asked_for_by_name_is_an_error() -> None:
    with pytest.raises(KernelUnavailableError, match="no C\\+\\+ compiler"):
        attention_backend._compiled_kernel_refusal("vec", True)


def test_scratch_memory_counts_every_partial_result() -> None:
    table = np.array([[1, 2, 3], [1, 2, 4]], dtype=np.int32)
    plan = make_plan(table, [1, 3], [70, 72], block_size=32, cost_model=CostModel.always())
    starts = np.array([0, 1, 4], dtype=np.int32)
    step = RelayStep(plan, torch.from_numpy(table), starts, "cpp", CounterFile.private())
    assert plan.is_shared
    slots = 2 * 4  # each of four tokens has the shared segment and its own
    assert step.scratch_bytes(num_heads=6, head_size=64) == slots * 6 * (64 + 1) * 4

"""What every kernel test runs under: uninitialised memory is NaN, and Triton is interpreted where there is no GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# The helpers beside this file: pytest's importlib mode does not put test folders on the path.
sys.path.insert(0, str(Path(__file__).parent))

HAS_CUDA = torch.cuda.is_available()
INTERPRETED = not HAS_CUDA

if INTERPRETED and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton.language" in sys.modules:
        raise RuntimeError("triton was imported before TRITON_INTERPRET could be set: run with TRITON_INTERPRET=1")
    # Triton reads it when a kernel is decorated, its own library's on import included.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads what nobody wrote gets NaN."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreted"),
        pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
    ]
)
def triton_device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton kernels run: interpreted without a GPU, compiled with one."""
    pytest.importorskip("triton", reason="triton is not installed")
    if request.param == "cuda" and not HAS_CUDA:
        pytest.skip("no CUDA device")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("there is a CUDA device, so kernels are compiled and not interpreted")
    return torch.device(request.param)

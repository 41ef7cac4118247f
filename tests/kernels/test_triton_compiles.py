"""The kernels compile for real GPUs, though none is here: the interpreter forgives what the compiler does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import relay_kernels

pytest.importorskip("triton")

SHARED_MEMORY_PER_BLOCK = 99 * 1024  # of the smallest GPUs since Ampere (8.6, 8.9); an A100 has 163 KiB, an H100 227


@pytest.mark.parametrize(
    ("dtype", "head_size", "capability"),
    [
        pytest.param("fp16", 80, 80, marks=pytest.mark.slow),
        ("bf16", 128, 90),
        pytest.param("bf16", 256, 90, marks=pytest.mark.slow),
        pytest.param("fp32", 256, 80, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_and_fit(dtype: str, head_size: int, capability: int, tmp_path: Path) -> None:
    report = compiled(tmp_path, dtype, str(head_size), str(capability))
    attend = {f"attend {size}{named}" for size in ("small", "large") for named in ("", ", all features")}
    assert set(report) == {*attend, "merge"}


def test_the_kernels_that_plan_compile_and_fit(tmp_path: Path) -> None:
    assert set(compiled(tmp_path, "plan", "90")) == {"partition", "extend", "lower"}


def compiled(cache: Path, *words: str) -> dict[str, dict[str, int]]:
    script = Path(__file__).parent / "compile_kernels.py"
    source_root = str(Path(relay_kernels.__file__).parents[1])
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "PYTHONPATH": os.pathsep.join(filter(None, (source_root, os.environ.get("PYTHONPATH")))),
        "TRITON_CACHE_DIR": str(cache),
    }
    result = subprocess.run(
        [sys.executable, str(script), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report: dict[str, dict[str, int]] = json.loads(result.stdout)
    for name, sizes in report.items():
        assert sizes["code_bytes"] > 0, name
        assert sizes["shared_bytes"] <= SHARED_MEMORY_PER_BLOCK, name
    return report

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
    ("dtype", "head_size", "capability"), [("fp16", 80, 80), ("bf16", 128, 90), ("bf16", 256, 90), ("fp32", 256, 80)]
)
def test_kernels_compile_and_fit(dtype: str, head_size: int, capability: int, tmp_path: Path) -> None:
    script = Path(__file__).parent / "compile_kernels.py"
    source_root = str(Path(relay_kernels.__file__).parents[1])
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "PYTHONPATH": os.pathsep.join(filter(None, (source_root, os.environ.get("PYTHONPATH")))),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, str(script), dtype, str(head_size), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report) == {"attend small", "attend large", "merge"}
    for name, sizes in report.items():
        assert sizes["code_bytes"] > 0, name
        assert sizes["shared_bytes"] <= SHARED_MEMORY_PER_BLOCK, name

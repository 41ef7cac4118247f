"""The repair of torchvision, torchaudio and torchcodec beside a CPU-only PyTorch (PATCHES.md).

The tests whose names begin with `test_unpatched` fail once the "remove when" of an entry is true.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

torch = pytest.importorskip("torch")

needs_the_defect = pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch has a CUDA build: no defect")


def skip_where_the_wheel_is_built_for_cpu(*libraries: str) -> None:
    """From PyTorch's CPU index pip takes wheels that load beside a CPU-only PyTorch; the defect is that of PyPI's."""
    for library in libraries:
        if version(library).endswith("+cpu"):
            pytest.skip(f"{library} {version(library)} is built for CPU and loads: no defect")


def python(code: str, *, repaired: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VLLM_RELAY_TORCH_WHEEL_REPAIR": "1" if repaired else "0", "VLLM_PLUGINS": ""}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


@needs_the_defect
@pytest.mark.parametrize(
    ("library", "symptom"),
    [
        ("torchvision", "operator torchvision::nms does not exist"),
        ("torchaudio", "OSError: Could not load this library"),
        ("torchcodec", "OSError: Could not load this library"),
    ],
)
def test_unpatched_imports_still_fail(library, symptom):
    skip_where_the_wheel_is_built_for_cpu(library)
    result = python(f"import {library}", repaired=False)
    assert result.returncode != 0, f"{library} imports by itself now: remove its entry from PATCHES.md and the repair"
    assert symptom in result.stderr


@needs_the_defect
def test_patched_imports_work_and_no_operator_is_emulated():
    skip_where_the_wheel_is_built_for_cpu("torchvision", "torchaudio", "torchcodec")
    code = """
import torchvision, torchaudio, torch
assert not torchvision.extension._has_ops()
try:
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except RuntimeError as error:
    print(str(error).splitlines()[0])
try:
    import torchcodec
except ImportError as error:
    print(error)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "Couldn't load custom C++ ops" in result.stdout
    assert "torchcodec cannot load beside a CPU-only PyTorch" in result.stdout


def test_only_a_wheel_built_for_cpu_is_skipped(monkeypatch):
    monkeypatch.setattr(f"{__name__}.version", {"a": "0.28.0", "b": "0.28.0+cpu"}.__getitem__)
    skip_where_the_wheel_is_built_for_cpu("a")
    with pytest.raises(pytest.skip.Exception, match=r"b 0\.28\.0\+cpu is built for CPU and loads"):
        skip_where_the_wheel_is_built_for_cpu("a", "b")


def test_processes_that_run_no_code_of_ours_import_vllm():
    """As vLLM's model registry is run: a fresh interpreter, straight into vllm."""
    result = python("import vllm.engine.arg_utils, vllm.model_executor.models.registry")
    assert result.returncode == 0, result.stderr[-2000:]


def test_an_interpreter_that_needs_none_of_them_pays_nothing():
    code = """
import sys
from importlib.util import find_spec
assert type(sys.meta_path[0]).__name__ == "type" and sys.meta_path[0].__name__ == "TorchWheelFinder"
assert find_spec("torchvision") is not None
loaded = {"torch", "torchvision", "importlib.metadata", "ctypes"} & set(sys.modules)
assert not loaded, loaded
"""
    assert python(code).returncode == 0


def test_nothing_happens_where_pytorch_is_absent_or_built_for_cuda(tmp_path, monkeypatch):
    import relay_torch_wheel_repair as repair

    monkeypatch.setitem(sys.modules, "torch", None)  # makes `import torch` raise ImportError
    assert repair.declare_missing_schemas(str(tmp_path)) is False
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert repair.declare_missing_schemas(str(tmp_path)) is False


def test_installing_twice_installs_once(monkeypatch):
    import relay_torch_wheel_repair as repair

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    repair.install()
    repair.install()
    assert sys.meta_path.count(repair.TorchWheelFinder) == 1

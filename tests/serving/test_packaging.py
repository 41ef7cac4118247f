"""The wheel holds the four packages, and the repair reaches an environment it is installed into."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_source_file(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(ROOT / root).as_posix()
        for root in ("kernels", "models", "serving", "benchmarks")
        for path in (ROOT / root).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    in_git = {name.partition("/")[2] for name in tracked}
    assert {name for name in expected if name in in_git} <= held
    assert {"relay_torch_wheel_repair.py", "relay_torch_wheel_repair.pth"} <= held


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_every_interpreter_of_an_environment_gets_the_repair(wheel, tmp_path, editable):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True)
    python = tmp_path / "bin" / "python"
    what = ["--editable", str(ROOT)] if editable else [str(wheel)]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *what], check=True)
    code = "import sys; print([getattr(finder, '__name__', '') for finder in sys.meta_path])"
    printed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "TorchWheelFinder" in printed
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "vllm-relay"], check=True)
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert "TorchWheelFinder" not in result.stdout
    assert result.stderr == ""

"""What a row says about where it was measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from relay_benchmarks import machine


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose package folder holds a module, and a results file."""
    package = tmp_path / "benchmarks"
    (package / "results").mkdir(parents=True)
    for name in ("benchmarks/machine.py", "benchmarks/results/here.csv", "kernel.cpp"):
        (tmp_path / name).write_text("first\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "First."]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(machine, "__file__", str(package / "machine.py"))
    return tmp_path


def test_a_clean_tree_is_named_by_its_commit(repository: Path) -> None:
    head = subprocess.run(["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert machine.commit() == head.stdout[:12]


def test_changes_are_told_but_not_those_of_results(repository: Path) -> None:
    (repository / "benchmarks/results/here.csv").write_text("another row\n")
    assert not machine.commit().endswith("+changes")
    (repository / "kernel.cpp").write_text("second\n")
    assert machine.commit().endswith("+changes")


def test_outside_a_repository_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    assert machine.commit() == "unknown"


def test_this_machine_is_described() -> None:
    here = machine.Machine.here()
    assert here.cpu
    assert here.cores >= 1
    assert here.memory_gib >= 1

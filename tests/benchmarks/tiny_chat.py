"""A random two-layer Llama with real words: small, but vLLM serves it like any other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


def make_tiny_chat(folder: Path, **changes: Any) -> Path:
    """Write it in bfloat16 with the tokenizer of the embedded SmolLM2; `changes` are of its LlamaConfig."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from relay_serving import embedded_model

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 2048}
    config = LlamaConfig(
        **{**sizes, **heads, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3, **changes}
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = embedded_model.prepare(embedded_model.SMOLLM2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder / name)
    return folder

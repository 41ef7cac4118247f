"""A DeepSeek-VL2 as published, as small as vLLM lets it be: complete, with random weights.

Its language model is of the kind of DeepSeek-VL2-Tiny, a mixture of experts with plain attention. vLLM builds the
published vision tower whatever the config says, with timm, so that of the 428 million weights all but a few are its.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tiny_models import CONTEXT_TOKENS, VOCABULARY_MULTIPLE, _embedded_model
from tiny_weights import Shapes, write_weights

TOWER = "vit_so400m_patch14_siglip_384.webli"
TOWER_HIDDEN = 1152
SIDE = 384
PATCH = 14
HIDDEN = 64
INNER = 128
EXPERT_INNER = 64
EXPERTS = 4
LAYERS = 2
HEADS = 2
CANDIDATES = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]  # the first three of the published nine


def make_tiny_deepseek_vl2(folder: Path, *, seed: int = 0, tokenizer_folder: Path | None = None) -> Path:
    """Write a DeepSeek-VL2 of random weights: two layers of language, SmolLM2's words, 857 MB for the vision tower.

    Arguments and result as of `tiny_models.make_tiny_llava`.
    """
    from transformers import AutoTokenizer

    from relay_models.text4seg.families import deepseek_vl2

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder or _embedded_model())
    tokenizer.add_tokens(list(deepseek_vl2.RESERVED), special_tokens=True)
    tokenizer.bos_token = "<｜begin▁of▁sentence｜>"
    tokenizer.eos_token = deepseek_vl2.END_OF_ANSWER
    tokenizer.pad_token = "<｜▁pad▁｜>"
    tokenizer.model_max_length = CONTEXT_TOKENS
    vocabulary = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(_config(vocabulary, tokenizer), indent=2))
    (folder / "processor_config.json").write_text(json.dumps(_PROCESSOR, indent=2))
    shapes = {**_vision(), **_projector(), **_language(vocabulary)}
    write_weights(folder / "model.safetensors", shapes, seed=seed, dtype=torch.bfloat16)
    return folder


_PROCESSOR = {
    "processor_class": "DeepseekVLV2Processor",
    "candidate_resolutions": CANDIDATES,
    "patch_size": PATCH,
    "downsample_ratio": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "normalize": True,
    "image_token": "<image>",
    "pad_token": "<｜▁pad▁｜>",
    "add_special_token": False,
    "sft_format": "deepseek",
    "mask_prompt": False,
    "ignore_id": -100,
}


def _config(vocabulary: int, tokenizer: Any) -> dict[str, Any]:
    """The published config's fields, with our sizes; like it, it names no architecture."""
    return {
        "model_type": "deepseek_vl_v2",
        "candidate_resolutions": CANDIDATES,
        "global_view_pos": "head",
        "tile_tag": "2D",
        "torch_dtype": "bfloat16",
        "vision_config": {
            "model_type": "vision",
            "model_name": TOWER,
            "image_size": SIDE,
            "patch_size": PATCH,
            "width": TOWER_HIDDEN,
            "layers": 27,
            "mlp_ratio": 3.7362,
        },
        "projector_config": {"model_type": "mlp_projector", "input_dim": TOWER_HIDDEN, "n_embed": HIDDEN},
        "language_config": {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "use_mla": False,
            "q_lora_rank": None,
            "kv_lora_rank": None,
            "qk_nope_head_dim": 0,
            "qk_rope_head_dim": 0,
            "v_head_dim": 0,
            "first_k_dense_replace": 1,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": EXPERT_INNER,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "max_position_embeddings": CONTEXT_TOKENS,
            "vocab_size": vocabulary,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "torch_dtype": "bfloat16",
        },
    }


def _vision() -> Shapes:
    """The tower's own names, from a tower without memory."""
    import timm

    with torch.device("meta"):
        tower = timm.create_model(TOWER, pretrained=False, num_classes=0)
    return {f"vision.{name}": tuple(weight.shape) for name, weight in tower.state_dict().items()}


def _projector() -> Shapes:
    """From the four patches that become one token, and the tokens between rows and views."""
    return {
        "projector.layers.0.weight": (HIDDEN, 4 * TOWER_HIDDEN),
        "projector.layers.0.bias": (HIDDEN,),
        "projector.layers.2.weight": (HIDDEN, HIDDEN),
        "projector.layers.2.bias": (HIDDEN,),
        "image_newline": (HIDDEN,),
        "view_seperator": (HIDDEN,),
    }


def _language(vocabulary: int) -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {
        "language.model.embed_tokens.weight": (vocabulary, HIDDEN),
        "language.model.norm.weight": (HIDDEN,),
        "language.lm_head.weight": (vocabulary, HIDDEN),
    }
    for layer in range(LAYERS):
        of_layer: dict[str, tuple[int, ...]] = {
            **{f"self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"},
            "input_layernorm.weight": (HIDDEN,),
            "post_attention_layernorm.weight": (HIDDEN,),
        }
        if layer == 0:
            of_layer |= _feed_forward("mlp", INNER)
        else:
            of_layer |= {"mlp.gate.weight": (EXPERTS, HIDDEN), **_feed_forward("mlp.shared_experts", 2 * EXPERT_INNER)}
            for expert in range(EXPERTS):
                of_layer |= _feed_forward(f"mlp.experts.{expert}", EXPERT_INNER)
        shapes |= {f"language.model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return shapes


def _feed_forward(name: str, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gate_proj.weight": (inner, HIDDEN),
        f"{name}.up_proj.weight": (inner, HIDDEN),
        f"{name}.down_proj.weight": (HIDDEN, inner),
    }

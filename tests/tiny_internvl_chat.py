"""An InternVL2 as OpenGVLab publishes it, small enough for a test: complete, with random weights, made in seconds.

Its language model is InternLM2, as that of InternVL2-8B, which the paper of Text4Seg trained. The published folders
bring Python for their config, without which neither transformers nor vLLM reads it; so does this one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tiny_models import CONTEXT_TOKENS, VOCABULARY_MULTIPLE, _embedded_model
from tiny_weights import Shapes, write_weights

SIDE = 448
PATCH = 14
HIDDEN = 64
INNER = 128
LAYERS = 2
HEADS = 2

# What the published tokenizer has besides words. `<image>` is not of them: it is spelled, and the processor finds it.
SPECIAL = (
    *("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    *("<|action_start|>", "<|action_end|>", "<|interpreter|>", "<|plugin|>"),
    *("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)

CONFIGURATION = '''"""Stands for the file of this name in the published folders."""

import copy

from transformers import PretrainedConfig


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"


class InternLM2Config(PretrainedConfig):
    model_type = "internlm2"


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **values):
        super().__init__(**values)
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = InternLM2Config(**(llm_config or {}))

    def to_dict(self):
        written = copy.deepcopy(self.__dict__)
        written["vision_config"] = self.vision_config.to_dict()
        written["llm_config"] = self.llm_config.to_dict()
        written["model_type"] = self.model_type
        return written
'''


def make_tiny_internvl_chat(folder: Path, *, seed: int = 0, tokenizer_folder: Path | None = None) -> Path:
    """Write an InternVL2 of random weights: two layers on either side, SmolLM2's words, 256 tokens for a tile.

    Arguments and result as of `tiny_models.make_tiny_llava`.
    """
    from transformers import AutoTokenizer

    from relay_models.text4seg.families import internvl2

    assert set(SPECIAL) <= set(internvl2.RESERVED), "no question may hold them"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder or _embedded_model())
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in SPECIAL if token not in known], special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<s>", "</s>", "</s>"
    tokenizer.model_max_length = CONTEXT_TOKENS
    vocabulary = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    (folder / "config.json").write_text(json.dumps(_config(vocabulary, tokenizer), indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (folder / "configuration_internvl_chat.py").write_text(CONFIGURATION)
    write_weights(folder / "model.safetensors", {**_vision(), **_projector(), **_language(vocabulary)}, seed=seed)
    return folder


def _config(vocabulary: int, tokenizer: Any) -> dict[str, Any]:
    """The published config's fields, with our sizes."""
    small = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "model_type": "internvl_chat",
        "template": "internlm2-chat",
        "force_image_size": SIDE,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "ps_version": "v2",
        "select_layer": -1,
        "torch_dtype": "float32",
        "vision_config": {
            **small,
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "image_size": SIDE,
            "patch_size": PATCH,
            "hidden_act": "gelu",
            "norm_type": "layer_norm",
            "layer_norm_eps": 1e-6,
            "initializer_factor": 1.0,
            "qkv_bias": True,
            "qk_normalization": False,
        },
        "llm_config": {
            **small,
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "num_key_value_heads": HEADS,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000,
            "rope_scaling": {"factor": 2.0, "type": "dynamic"},
            "bias": False,
            "max_position_embeddings": CONTEXT_TOKENS,
            "vocab_size": vocabulary,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        },
    }


def _vision() -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, HIDDEN),
        "vision_model.embeddings.position_embedding": (1, (SIDE // PATCH) ** 2 + 1, HIDDEN),
        "vision_model.embeddings.patch_embedding.weight": (HIDDEN, 3, PATCH, PATCH),
        "vision_model.embeddings.patch_embedding.bias": (HIDDEN,),
    }
    for layer in range(LAYERS):
        of_layer = {
            "attn.qkv.weight": (3 * HIDDEN, HIDDEN),
            "attn.qkv.bias": (3 * HIDDEN,),
            "attn.proj.weight": (HIDDEN, HIDDEN),
            "attn.proj.bias": (HIDDEN,),
            "mlp.fc1.weight": (INNER, HIDDEN),
            "mlp.fc1.bias": (INNER,),
            "mlp.fc2.weight": (HIDDEN, INNER),
            "mlp.fc2.bias": (HIDDEN,),
            "norm1.weight": (HIDDEN,),
            "norm1.bias": (HIDDEN,),
            "norm2.weight": (HIDDEN,),
            "norm2.bias": (HIDDEN,),
            "ls1": (HIDDEN,),
            "ls2": (HIDDEN,),
        }
        shapes |= {f"vision_model.encoder.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return shapes


def _projector() -> Shapes:
    """From the four patches that become one token."""
    return {
        "mlp1.0.weight": (4 * HIDDEN,),
        "mlp1.0.bias": (4 * HIDDEN,),
        "mlp1.1.weight": (HIDDEN, 4 * HIDDEN),
        "mlp1.1.bias": (HIDDEN,),
        "mlp1.3.weight": (HIDDEN, HIDDEN),
        "mlp1.3.bias": (HIDDEN,),
    }


def _language(vocabulary: int) -> Shapes:
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.model.tok_embeddings.weight": (vocabulary, HIDDEN),
        "language_model.model.norm.weight": (HIDDEN,),
        "language_model.output.weight": (vocabulary, HIDDEN),
    }
    for layer in range(LAYERS):
        of_layer = {
            "attention.wqkv.weight": (3 * HIDDEN, HIDDEN),
            "attention.wo.weight": (HIDDEN, HIDDEN),
            "feed_forward.w1.weight": (INNER, HIDDEN),
            "feed_forward.w2.weight": (HIDDEN, INNER),
            "feed_forward.w3.weight": (INNER, HIDDEN),
            "attention_norm.weight": (HIDDEN,),
            "ffn_norm.weight": (HIDDEN,),
        }
        shapes |= {f"language_model.model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return shapes

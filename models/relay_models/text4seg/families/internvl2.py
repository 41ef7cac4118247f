"""InternVL2: InternViT at 448 pixels, one tile of 256 image tokens.

Stock InternVL cuts a picture into tiles of its own choice and adds a thumbnail. Of the tilings of a square with the
side of one tile it chooses the single tile, without a thumbnail, so squashing first is all that is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from relay_models.errors import CheckpointError
from relay_models.text4seg.families.family import (
    Conversation,
    Family,
    config_int,
    config_object,
    has_architecture,
)
from relay_models.text4seg.profiles import training_of

ARCHITECTURE = "InternVLChatModel"
TEMPLATES = ("internlm2-chat", "Hermes-2")  # of InternVL2's sizes; later generations speak differently
RESERVED = (
    "<image>",
    "<video>",
    "<placeholder>",  # vLLM's processor puts it where pictures go
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|action_start|>",
    "<|action_end|>",
    "<|interpreter|>",
    "<|plugin|>",
    "<s>",
    "</s>",
    "<unk>",
)

# InternVL2's own, which it was tuned with: "You are the multimodal model InternVL ... a useful and harmless assistant".
SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"


def from_config(config: Mapping[str, Any], model_id: str = "") -> Family | None:
    """The family, or None for another architecture or a later generation of InternVL.

    Raises:
        CheckpointError: the config has an impossible size.
    """
    if not has_architecture(config, ARCHITECTURE) or config.get("template") not in TEMPLATES:
        return None
    side = config_int(config, "vision_config.image_size", 448)
    if config.get("force_image_size") is not None:  # upstream's class writes null where nothing is forced
        side = config_int(config, "force_image_size", side)
    patch = config_int(config, "vision_config.patch_size", 14)
    tokenizer_begins_text = has_architecture(config_object(config, "llm_config"), "InternLM2ForCausalLM")
    cuts_always = config_int(config, "min_dynamic_patch", 1) > 1
    return Family(
        name="internvl2",
        architecture=ARCHITECTURE,
        grid=training_of(config, model_id, default_grid=16).grid,
        image_side=side,
        num_image_tokens=int((side // patch) ** 2 * _downsampling(config) ** 2),
        conversation=Conversation(
            system_open="<|im_start|>system\n",
            system=SYSTEM,
            system_close="<|im_end|>",
            user_open="<|im_start|>user\n",
            image="<image>\n",
            user_close="<|im_end|>",
            assistant_open="<|im_start|>assistant\n",
            assistant_close="<|im_end|>",
            begins_text=tokenizer_begins_text,
        ),
        reserved=RESERVED,
        mm_processor_kwargs=MappingProxyType({"dynamic_image_size": False} if cuts_always else {}),
    )


def _downsampling(config: Mapping[str, Any]) -> float:
    ratio = config.get("downsample_ratio", 0.5)
    if not isinstance(ratio, int | float) or not (math.isfinite(ratio) and 0 < ratio <= 1):
        raise CheckpointError(f"downsample_ratio in config.json must be above 0 and at most 1, got {ratio!r}")
    return float(ratio)

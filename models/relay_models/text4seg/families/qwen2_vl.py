"""Qwen2-VL and Qwen2.5-VL: pictures of any size, here a square of 448 pixels, 256 image tokens.

Qwen keeps a picture's shape, as near as multiples of 28 pixels come to it, and rescales what has too few or too many
pixels. A square whose side is such a multiple passes unchanged, provided that the processor's bounds allow its area,
which is why they are pinned: a folder may carry others.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from relay_models.errors import CheckpointError
from relay_models.text4seg.families.family import Conversation, Family, config_int, has_architecture
from relay_models.text4seg.profiles import training_of

ARCHITECTURES = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
IMAGE_SIDE = 448  # one image token for each cell of the default grid
MIN_PIXELS = 56 * 56  # the published bounds of both generations, so that other pictures are seen as ever
MAX_PIXELS = 28 * 28 * 16384
RESERVED = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
)


def from_config(config: Mapping[str, Any], model_id: str = "") -> Family | None:
    """The family, or None for another architecture.

    Raises:
        CheckpointError: the config's patches do not divide the square.
    """
    architecture = next((name for name in ARCHITECTURES if has_architecture(config, name)), None)
    if architecture is None:
        return None
    merged_patch = config_int(config, "vision_config.patch_size", 14) * config_int(
        config, "vision_config.spatial_merge_size", 2
    )
    if IMAGE_SIDE % merged_patch:
        raise CheckpointError(
            f"vision_config in config.json makes image tokens of {merged_patch} pixels a side, which do not divide "
            f"{IMAGE_SIDE}"
        )
    return Family(
        name="qwen2-vl",
        architecture=architecture,
        grid=training_of(config, model_id, default_grid=16).grid,
        image_side=IMAGE_SIDE,
        num_image_tokens=(IMAGE_SIDE // merged_patch) ** 2,
        conversation=Conversation(
            system_open="<|im_start|>system\n",
            system="You are a helpful assistant.",
            system_close="<|im_end|>\n",
            user_open="<|im_start|>user\n",
            image="<|vision_start|><|image_pad|><|vision_end|>",
            user_close="<|im_end|>\n",
            assistant_open="<|im_start|>assistant\n",
            assistant_close="<|im_end|>\n",
        ),
        reserved=RESERVED,
        mm_processor_kwargs=MappingProxyType({"size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}}),
    )

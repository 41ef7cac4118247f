"""DeepSeek-VL2: SigLIP at 384 pixels, one global view and one tile, 421 image tokens.

Its processor pads a picture to the best of its candidate shapes and cuts that into tiles, beside a padded global view.
A square of one tile's side fits the single-tile candidate exactly: nothing is padded, and both views are the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relay_models.errors import CheckpointError
from relay_models.text4seg.families.family import Conversation, Family, config_int
from relay_models.text4seg.profiles import training_of

ARCHITECTURE = "DeepseekVLV2ForCausalLM"
MODEL_TYPE = "deepseek_vl_v2"
END_OF_ANSWER = "<｜end▁of▁sentence｜>"
RESERVED = (
    "<image>",
    "<|User|>",
    "<|Assistant|>",
    "<|ref|>",
    "<|/ref|>",
    "<|det|>",
    "<|/det|>",
    "<|grounding|>",
    "<｜begin▁of▁sentence｜>",
    END_OF_ANSWER,
    "<｜▁pad▁｜>",
)


def from_config(config: Mapping[str, Any], model_id: str = "") -> Family | None:
    """The family, or None for another model. Published configs name no architecture; DeepSeek-OCR shares their type.

    Raises:
        CheckpointError: the config's candidate resolutions hold no single tile, or it has an impossible size.
    """
    architectures = config.get("architectures") or [ARCHITECTURE]
    if config.get("model_type") != MODEL_TYPE or architectures != [ARCHITECTURE]:
        return None
    side = _tile_side(config)
    patches = side // config_int(config, "vision_config.patch_size", 14)
    tokens = -(-patches // config_int(config, "projector_config.downsample_ratio", 2))
    view = tokens * (tokens + 1)  # each row of a view ends with a token of its own
    return Family(
        name="deepseek-vl2",
        architecture=ARCHITECTURE,
        grid=training_of(config, model_id, default_grid=16).grid,
        image_side=side,
        num_image_tokens=view + 1 + view,
        conversation=Conversation(
            system_close="\n\n",
            user_open="<|User|>: ",
            image="<image>\n",
            user_close="\n\n",
            assistant_open="<|Assistant|>:",
            answer_lead=" ",
            assistant_close=END_OF_ANSWER,
            begins_text=True,
        ),
        reserved=RESERVED,
    )


def _tile_side(config: Mapping[str, Any]) -> int:
    """Of the first candidate, as its processor has it; that square must be among them, or it would be padded."""
    candidates = config.get("candidate_resolutions", [[384, 384]])
    try:
        sizes = [(int(width), int(height)) for width, height in candidates]
        side = sizes[0][0]
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"candidate_resolutions in config.json must be pairs of whole numbers, got {candidates!r}"
        ) from error
    if (side, side) not in sizes:
        raise CheckpointError(
            f"candidate_resolutions in config.json must hold {[side, side]}, the single tile, got {candidates!r}"
        )
    return config_int({"candidate_resolutions": side}, "candidate_resolutions", side)

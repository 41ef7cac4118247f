"""LLaVA-1.5: CLIP ViT-L/14 at 336 pixels, 576 image tokens, Llama or Vicuna.

Published Text4Seg weights are of this family: the original LLaVA checkpoint with a grid of 24, converted first (see
``convert``), and adapters with a grid of 16. Its stock processor scales the shorter side and crops the centre, which
would cut off what a mask has to cover; a square of the right size passes it unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relay_models.text4seg.families.family import (
    Conversation,
    Family,
    config_int,
    config_object,
    has_architecture,
)
from relay_models.text4seg.profiles import Style, training_of

ARCHITECTURE = "LlavaForConditionalGeneration"
IMAGE_TOKEN = "<image>"
END_OF_ANSWER = "</s>"
RESERVED = (IMAGE_TOKEN, "<s>", END_OF_ANSWER, "<unk>", "<pad>")

# Vicuna v1.1's, as FastChat words it.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def conversation(style: Style, *, begins_text: bool = True, end_of_answer: str = END_OF_ANSWER) -> Conversation:
    """LLaVA's turns. SentencePiece begins an answer with a space, hence the lead."""
    vicuna = style is Style.VICUNA
    return Conversation(
        system=VICUNA_SYSTEM if vicuna else None,
        system_close=" " if vicuna else "\n",
        user_open="USER: ",
        image=f"{IMAGE_TOKEN}\n",
        user_close=" " if vicuna else "\n",
        assistant_open="ASSISTANT:",
        answer_lead=" ",
        assistant_close=end_of_answer,
        begins_text=begins_text,
    )


def from_config(config: Mapping[str, Any], model_id: str = "") -> Family | None:
    """The family, or None for another architecture or another vision tower than CLIP's (Pixtral has this class too).

    Raises:
        CheckpointError: the config has an impossible size.
    """
    vision = config_object(config, "vision_config")
    if not has_architecture(config, ARCHITECTURE):
        return None
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        return None
    side = config_int(config, "vision_config.image_size", 336)
    patch = config_int(config, "vision_config.patch_size", 14)
    keeps_class_token = config.get("vision_feature_select_strategy", "default") == "full"
    training = training_of(config, model_id, default_grid=16)
    return Family(
        name="llava-1.5",
        architecture=ARCHITECTURE,
        grid=training.grid,
        image_side=side,
        num_image_tokens=(side // patch) ** 2 + keeps_class_token,
        conversation=conversation(training.style),
        reserved=RESERVED,
    )

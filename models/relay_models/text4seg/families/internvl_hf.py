"""InternVL in the layout of transformers: `OpenGVLab/InternVL2-*-hf`, and whatever else was converted to it.

Spoken to as InternVL2 is, with another word for the picture. A config of this layout does not say which generation it
is of; one that is trained here learns these words, whichever it was. The processor's tilings of a square with the side
of one tile are those of `internvl2`: the single tile, without a thumbnail.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from relay_models.errors import CheckpointError
from relay_models.text4seg.families import internvl2
from relay_models.text4seg.families.family import Family, config_int, config_object, has_architecture
from relay_models.text4seg.profiles import CONFIG_KEY

ARCHITECTURE = "InternVLForConditionalGeneration"
IMAGE_TOKEN = "<IMG_CONTEXT>"


def from_config(config: Mapping[str, Any], model_id: str = "") -> Family | None:
    """The family, or None for another architecture.

    Raises:
        CheckpointError: the config has an impossible size.
    """
    if not has_architecture(config, ARCHITECTURE):
        return None
    vision = config_object(config, "vision_config")
    same = internvl2.from_config(
        {
            "architectures": [internvl2.ARCHITECTURE],
            "template": internvl2.TEMPLATES[0],
            "force_image_size": _side(vision, "image_size", 448),
            "vision_config": {"patch_size": _side(vision, "patch_size", 14)},
            "downsample_ratio": config.get("downsample_ratio", 0.5),
            CONFIG_KEY: config.get(CONFIG_KEY),
        },
        model_id,
    )
    assert same is not None, "it was made to be of that family"
    begins_text = config_object(config, "text_config").get("model_type") == "llama"  # InternLM2, which was converted
    conversation = replace(same.conversation, image=f"{IMAGE_TOKEN}\n", begins_text=begins_text)
    return replace(same, architecture=ARCHITECTURE, conversation=conversation)


def _side(vision: Mapping[str, Any], name: str, default: int) -> int:
    """Of a square, which this layout writes as a pair."""
    value = vision.get(name, default)
    if isinstance(value, list | tuple):
        if len(value) != 2 or value[0] != value[1]:
            raise CheckpointError(f"vision_config.{name} in config.json must be a square's, got {list(value)}")
        value = value[0]
    return config_int({name: value}, name, default)

"""Pictures and prompts as relay-seg models take them, for the Hugging Face module and for vLLM's class alike.

Legend: N pictures, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from relay_models.errors import ImageError, LabelError
from relay_models.images import squash
from relay_models.relay_seg.configuration import RelaySegConfig
from relay_models.relay_seg.encoder import normalise
from relay_models.text4seg.families.relay_seg import IMAGE_TOKEN


def pixel_values_of(images: Sequence[Image.Image], side: int) -> torch.Tensor:
    """[N, 3, side, side] float32: upright RGB pictures of any shape, squashed to the square the model was trained on.

    Raises:
        ImageError: one of them is no PIL picture, or not in mode RGB.
    """
    for index, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise ImageError(f"images[{index}] must be a PIL picture, got {type(image).__name__}")
    squares_NHW3 = [np.array(squash(image, side, side)) for image in images]
    return torch.stack([normalise(square_HW3) for square_HW3 in squares_NHW3])


class RelaySegProcessor:
    """Prompts with `IMAGE_TOKEN` where the pictures go, and the pictures, to what the Hugging Face module takes."""

    def __init__(self, tokenizer: Any, config: RelaySegConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RelaySegProcessor:
        from transformers import AutoTokenizer

        config = RelaySegConfig.from_pretrained(folder)
        return cls(AutoTokenizer.from_pretrained(folder, config=config), config)

    def __call__(self, text: str, images: Sequence[Image.Image] = ()) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``attention_mask`` [1, S] of one prompt, and ``pixel_values`` if it has pictures.

        Raises:
            LabelError: the prompt has places for another number of pictures than there are.
            ImageError: as of `pixel_values_of`.
        """
        if (places := text.count(IMAGE_TOKEN)) != len(images):
            raise LabelError(f"text has places for {places} pictures ({IMAGE_TOKEN}), but images holds {len(images)}")
        expanded = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.config.num_image_tokens)
        encoded = self.tokenizer(expanded, return_tensors="pt")
        inputs = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        if images:
            inputs["pixel_values"] = pixel_values_of(images, self.config.image_side)
        return inputs

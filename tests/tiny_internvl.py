"""An InternVL in transformers' own layout, small enough for a test: complete, with random weights, made in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from tiny_models import CONTEXT_TOKENS, VOCABULARY_MULTIPLE, _embedded_model, _spread_logits

SIDE = 112
SPECIAL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def make_tiny_internvl(folder: Path, *, seed: int = 0, tokenizer_folder: Path | None = None) -> Path:
    """Write an InternVL of random weights: two layers on either side, SmolLM2's words, 16 image tokens.

    Arguments and result as of `tiny_models.make_tiny_llava`.
    """
    from transformers import (
        AutoTokenizer,
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    from relay_models.text4seg.families import internvl_hf

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder or _embedded_model(), extra_special_tokens=SPECIAL)
    tokenizer.add_tokens([*SPECIAL.values()], special_tokens=True)
    tokenizer.model_max_length = CONTEXT_TOKENS
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    num_tokens = (SIDE // 14) ** 2 // 4
    config = InternVLConfig(
        architectures=[internvl_hf.ARCHITECTURE],
        vision_config={**small, "image_size": [SIDE, SIDE], "patch_size": [14, 14]},
        text_config={
            **small,
            "model_type": "qwen2",
            "num_key_value_heads": 2,
            "vocab_size": -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
            "max_position_embeddings": CONTEXT_TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=num_tokens,
        tie_word_embeddings=False,
    )
    family = internvl_hf.from_config(config.to_dict())
    assert family is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config).to(torch.float32)
        _spread_logits(model)
    square = {"height": SIDE, "width": SIDE}
    if folder.exists():
        shutil.rmtree(folder)
    model.save_pretrained(folder)
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=square, crop_to_patches=True),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=square),
        image_seq_length=num_tokens,
        chat_template=family.conversation.chat_template(),
    ).save_pretrained(folder)
    return folder

"""Multimodal models small enough for a test: complete Hugging Face folders with random weights, made in seconds.

A folder made here is loaded by transformers and by vLLM like any published one. The tokenizer is that of the embedded
model, so the text is real text; the weights are random, so what the model says is not.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

IMAGE_TOKEN = "<image>"
VOCABULARY_MULTIPLE = 64  # llava-hf pads its embeddings to a multiple of 64 after adding <image> and <pad>
CONTEXT_TOKENS = 4096
LEANING = 20.0  # so large that not even a temperature of 2 draws another token


def make_tiny_llava(
    folder: Path,
    *,
    seed: int = 0,
    image_size: int = 112,
    dtype: torch.dtype = torch.float32,
    tokenizer_folder: Path | None = None,
) -> Path:
    """Write a LLaVA-1.5 of 7 million random weights: two CLIP layers, two Llama layers, SmolLM2's words.

    Args:
        folder: made if absent; an existing folder of that name is replaced.
        seed: of the weights; equal seeds write equal bytes.
        image_size: pixels a side, a multiple of 14; an image takes ``(image_size / 14)²`` tokens (64 by default).
        dtype: of the stored weights.
        tokenizer_folder: where the tokenizer is read; by default the embedded model, prepared if it is not yet.

    Returns the folder.
    """
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor

    from relay_models.text4seg.families import llava15
    from relay_models.text4seg.profiles import Style

    if image_size % 14:
        raise ValueError(f"image_size must be a multiple of the patch size 14, got {image_size}")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder or _embedded_model())
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.model_max_length = CONTEXT_TOKENS
    config = _tiny_llava_config(tokenizer, image_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).to(dtype)
        _spread_logits(model)
    turns = llava15.conversation(Style.PLAIN, begins_text=False, end_of_answer=tokenizer.eos_token)
    # A square resize and no crop: what is left of CLIP's own geometry would cut the sides of a wide picture.
    square = {"height": image_size, "width": image_size}
    image_processor = CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=turns.chat_template(),
    )
    if folder.exists():
        shutil.rmtree(folder)
    model.save_pretrained(folder)
    _name_weights_as_published(folder / "model.safetensors")
    processor.save_pretrained(folder)
    return folder


def make_leaning_llava(folder: Path, token: str) -> Path:
    """Write a `make_tiny_llava` that says one token wherever it may, whatever it is asked; the rest is as random.

    Its residual stream carries a constant that no layer reads or writes, and of which its head makes that token.
    """
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    file = make_tiny_llava(folder) / "model.safetensors"
    token_id = AutoTokenizer.from_pretrained(folder).get_vocab()[token]
    weights = load_file(file)
    for name, weight in weights.items():
        if not name.startswith("language_model"):
            continue
        if name.endswith("embed_tokens.weight"):
            weight[:, 0] = LEANING
        elif name.endswith(("layernorm.weight", "o_proj.weight", "down_proj.weight")):
            weight[0] = 0
        elif name.endswith("lm_head.weight"):
            weight[:, 0] = 0
            weight[token_id, 0] = LEANING * weight.abs().max()
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def make_tiny_qwen2_vl(folder: Path, *, seed: int = 0, tokenizer_folder: Path | None = None) -> Path:
    """Write a Qwen2-VL of random weights: two layers on either side, SmolLM2's words, Qwen's own processor.

    Arguments and result as of `make_tiny_llava`.
    """
    from transformers import (
        AutoTokenizer,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
    )
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    from relay_models.text4seg.families import qwen2_vl

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder or _embedded_model())
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in qwen2_vl.RESERVED if token not in known], special_tokens=True)
    tokenizer.model_max_length = CONTEXT_TOKENS
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2VLConfig(
        text_config={
            **small,
            "intermediate_size": 128,
            "vocab_size": -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
            "max_position_embeddings": CONTEXT_TOKENS,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        },
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    family = qwen2_vl.from_config({"architectures": ["Qwen2VLForConditionalGeneration"]})
    assert family is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config).to(torch.float32)
        _spread_logits(model)
    if folder.exists():
        shutil.rmtree(folder)
    model.save_pretrained(folder)
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=family.conversation.chat_template(),
    ).save_pretrained(folder)
    return folder


def _embedded_model() -> Path:
    from relay_serving.embedded_model import prepare

    return prepare()


def _tiny_llava_config(tokenizer: object, image_size: int) -> object:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=14,
        projection_dim=64,
    )
    vocabulary = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=vocabulary,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(image_size // 14) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _name_weights_as_published(file: Path) -> None:
    """transformers 5 writes ``vision_tower.embeddings``; vLLM reads only llava-hf's ``vision_tower.vision_model``."""
    from safetensors.torch import load_file, save_file

    tower = "vision_tower."
    weights = {
        name.replace(tower, f"{tower}vision_model.", 1) if name.startswith(tower) else name: weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


def _spread_logits(model: torch.nn.Module) -> None:
    """Weights as initialised give all but equal logits, and an image that changes nothing; make both visible."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.1)
            elif name.endswith(("embed_tokens.weight", "position_embedding.weight", "class_embedding")):
                weight.normal_(std=0.5)
            elif weight.dim() >= 2:
                weight.normal_(std=1 / weight[0].numel() ** 0.5)

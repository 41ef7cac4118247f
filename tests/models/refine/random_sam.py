"""transformers' SAM, small and with random weights, as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def random_sam(side: int = 64) -> Any:
    import torch
    from transformers import SamConfig, SamModel

    torch.manual_seed(0)
    config = SamConfig(
        vision_config={
            "hidden_size": 32,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": side,
            "window_size": 2,
            "global_attn_indexes": [1],
            "num_pos_feats": 16,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": side},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 32,
        },
    )
    model = SamModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # transformers' own start is nearly zero
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.tie_weights()
    return model


def save_random_sam(folder: Path, side: int = 64) -> Path:
    random_sam(side).save_pretrained(folder)
    return folder

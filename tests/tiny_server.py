"""How the tiny segmentation model is served in tests, and pictures to ask it about."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

GRID = 8
MODEL = "tiny-llava"
TINY_FLAGS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "64"),
    *("--kv-cache-memory-bytes", str(256 << 20), "--limit-mm-per-prompt", '{"image": 4}'),
    *("--served-model-name", MODEL, "--relay-segmentation", str(GRID)),
)


def picture_bytes(*, seed: int = 0, width: int = 40, height: int = 30) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def picture_url(*, seed: int = 0, width: int = 40, height: int = 30) -> str:
    return data_url(picture_bytes(seed=seed, width=width, height=height))

"""Random weights under published names, for models whose classes are not in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

Shapes = Mapping[str, tuple[int, ...]]


def write_weights(file: Path, shapes: Shapes, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
    """Matrices that keep what passes through them at its size, embeddings and biases that are seen, norms of one."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    save_file({name: _weight(name, shape, generator).to(dtype) for name, shape in shapes.items()}, file)


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("bias"):
        return torch.randn(shape, generator=generator) * 0.1
    if "embed" in name and not name.endswith(("patch_embedding.weight", "patch_embed.proj.weight")):
        return torch.randn(shape, generator=generator) * 0.5
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.randn(shape, generator=generator) / torch.Size(shape[1:]).numel() ** 0.5

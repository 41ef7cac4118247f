"""LoRA for a picture and what follows it: tokens before it are computed as the base computes them.

    y_t = W x_t + follows_t * alpha / rank * B A x_t          (LoRA: arXiv 2106.09685, equation 3)

where follows_t is 1 from a sequence's first image token on, else 0 (activated LoRA, arXiv 2504.12397). So a chat
without a picture is the base's, exactly, and what is kept of a text is the same whether a picture follows it or not.

Legend: N sequences, S tokens of each.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Activation:
    """Which tokens of the pass that is being computed follow a picture; shared by all layers of a model."""

    follows_NS1: Tensor | None = None  # noqa: N815


class LoraLinear(nn.Linear):
    """A linear layer with a change that acts where ``activation`` says."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, activation: Activation) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        self.scale = alpha / rank
        self._activation = activation

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, self.weight, self.bias)
        follows = self._activation.follows_NS1
        return y if follows is None else y + follows * (self.scale * self.lora_B(self.lora_A(input)))


def add_lora(layers: nn.Module, rank: int, alpha: float) -> Activation:
    """Put a `LoraLinear` in the place of each linear layer of ``layers``."""
    activation = Activation()
    found = [(name, module) for name, module in layers.named_modules() if type(module) is nn.Linear]
    for name, linear in found:
        parent, _, child = name.rpartition(".")
        setattr(layers.get_submodule(parent), child, LoraLinear(linear, rank, alpha, activation))
    return activation


def follows_picture(is_image_NS: Tensor, past: Any) -> Tensor:
    """[N, S] which tokens are of a picture or follow one, be it in what is kept of earlier passes (``past``)."""
    follows_NS = is_image_NS.cumsum(1) > 0
    earlier_N = getattr(past, _KEPT, None) if past is not None and past.get_seq_length() else None
    return follows_NS if earlier_N is None else follows_NS | earlier_N[:, None]


def keep(past: Any, follows_NS: Tensor) -> None:
    """For the next pass: which sequences have seen a picture by now."""
    if past is not None:
        setattr(past, _KEPT, follows_NS[:, -1].clone())


_KEPT = "relay_seg_follows_picture"

"""From a picture's features to the 256 tokens the language model reads: what each cell shows, and where it is.

A cell's token is the sum of four things in the embedding space of the language model:

    what it shows, in words    the codebook's rows (one a class, begun as what tells the class's name from others', and
                               one for whatever has no name), mixed by the probabilities that a softmax gives them
    how far it goes            a second codebook, a row for each length from 1 to G: for how many cells, itself
                               included, the row shows the same from here to the right
    what else is known of it   free, for what neither says: which of several things it is
    where it is                a learned vector a cell

Legend: N pictures, C channels, G cells a side, T = G * G cells in reading order, E the projector's width, K classes
and one, D the language model's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ProjectorSizes:
    """Of what `Projector` is made; the values are relay-seg-tiny's."""

    channels: int = 1728
    grid: int = 16
    width: int = 256
    num_layers: int = 3
    num_heads: int = 4
    num_classes: int = 80
    out_width: int = 576


class _Layer(nn.Module):
    """A transformer layer, normalised before each half (arXiv 2002.04745)."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_NTE: Tensor) -> Tensor:
        N, T, E = x_NTE.shape
        qkv = self.qkv(self.norm_1(x_NTE)).view(N, T, 3, self.num_heads, E // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed_NTE = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(N, T, E)
        x_NTE = x_NTE + self.dropout(self.out(mixed_NTE))
        return x_NTE + self.dropout(self.down(F.gelu(self.up(self.norm_2(x_NTE)))))


class Projector(nn.Module):
    """Features [N, C, G, G] to tokens [N, T, D], see above."""

    def __init__(self, sizes: ProjectorSizes, dropout: float = 0.0) -> None:
        super().__init__()
        self.sizes = sizes
        num_cells = sizes.grid**2
        self.enter = nn.Linear(sizes.channels, sizes.width)
        self.enter_norm = nn.LayerNorm(sizes.width)
        self.cell_TE = nn.Parameter(torch.randn(num_cells, sizes.width) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(_Layer(sizes.width, sizes.num_heads, dropout) for _ in range(sizes.num_layers))
        self.leave_norm = nn.LayerNorm(sizes.width)
        self.classify = nn.Linear(sizes.width, sizes.num_classes + 1)  # class 0: whatever has no name
        self.codebook_KD = nn.Parameter(torch.zeros(sizes.num_classes + 1, sizes.out_width))
        self.measure = nn.Linear(sizes.width, sizes.grid)  # lengths 1 to G
        self.lengths_GD = nn.Parameter(torch.zeros(sizes.grid, sizes.out_width))
        self.free = nn.Linear(sizes.width, sizes.out_width, bias=False)
        self.place_TD = nn.Parameter(torch.zeros(num_cells, sizes.out_width))

    def forward(self, features_NCGG: Tensor) -> Tensor:
        hidden_NTE = self.hidden(features_NCGG)
        return self.tokens(hidden_NTE, self.classify(hidden_NTE), self.measure(hidden_NTE))

    def hidden(self, features_NCGG: Tensor) -> Tensor:
        """What is known of each cell, [N, T, E]."""
        x_NTE = self.enter_norm(self.enter(features_NCGG.flatten(2).transpose(1, 2))) + self.cell_TE
        x_NTE = self.dropout(x_NTE)
        for layer in self.layers:
            x_NTE = layer(x_NTE)
        return self.leave_norm(x_NTE)

    def tokens(self, hidden_NTE: Tensor, class_logits_NTK: Tensor, length_logits_NTG: Tensor) -> Tensor:
        """The tokens [N, T, D] of cells of which this is known."""
        named_NTD = class_logits_NTK.softmax(-1) @ self.codebook_KD
        measured_NTD = length_logits_NTG.softmax(-1) @ self.lengths_GD
        return named_NTD + measured_NTD + self.free(hidden_NTE) + self.place_TD

"""From a picture's features to the 256 tokens the language model reads: what each cell shows, and where it is.

    features → transformer → which class each cell shows → tokens

The tokens are made from that map of classes and from nothing else, so that a language model can learn to read maps, of
which there are as many as one likes, instead of pictures, of which there are few. A cell's token is the sum of
learned vectors in the embedding space of the language model:

    what it shows     one a class, begun as what tells the class's name from others', and one for whatever has no name
    how far it goes   one a length from 1 to G: for how many cells, itself included, the row shows the same to the right
    where it begins   one, at a cell whose row shows something else to the left of it, or that is the row's first
    where it is       one a cell

Legend: N pictures, C channels, G cells a side, T = G * G cells in reading order, E the projector's width, K classes
and one, D the language model's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A class is on the map if some cell shows it at least this likely. So low because what is small, or rare in training,
# is never likely.
PRESENT_ABOVE = 0.03
# Of a cell at an outline, or of a rare thing, "nothing that has a name" is often far likelier although it is there.
NAMED_ABOVE = 0.1


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
        self.lengths_GD = nn.Parameter(torch.zeros(sizes.grid, sizes.out_width))  # lengths 1 to G
        self.begins_D = nn.Parameter(torch.zeros(sizes.out_width))
        self.place_TD = nn.Parameter(torch.zeros(num_cells, sizes.out_width))

    def forward(self, features_NCGG: Tensor) -> Tensor:
        return self.tokens(decide(self.classify(self.hidden(features_NCGG))))

    def hidden(self, features_NCGG: Tensor) -> Tensor:
        """What is known of each cell, [N, T, E]."""
        x_NTE = self.enter_norm(self.enter(features_NCGG.flatten(2).transpose(1, 2))) + self.cell_TE
        x_NTE = self.dropout(x_NTE)
        for layer in self.layers:
            x_NTE = layer(x_NTE)
        return self.leave_norm(x_NTE)

    def tokens(self, class_NT: Tensor) -> Tensor:
        """The tokens [N, T, D] of maps of classes, whole numbers from 0 (no name) to K - 1."""
        lengths_NT = run_lengths(class_NT, self.sizes.grid)
        begins_NT1 = run_begins(class_NT, self.sizes.grid)[..., None]
        begins_NTD = torch.where(begins_NT1, self.begins_D, 0.0)
        return self.codebook_KD[class_NT] + self.lengths_GD[lengths_NT - 1] + begins_NTD + self.place_TD


def decide(class_logits_NTK: Tensor) -> Tensor:
    """[N, T] the class of each cell, 0 for whatever has no name.

    A class that is likelier than `PRESENT_ABOVE` anywhere is there. Of those classes a cell may show each that is
    likelier than `NAMED_ABOVE` in it, or nowhere likelier than in it; and it shows that of which it has the largest
    share. So what is small is in front, as where masks meet: a tie is not lost on the person who wears it.
    """
    likely_NTK = class_logits_NTK.float().softmax(-1)[..., 1:]
    highest_N1K = likely_NTK.amax(1, keepdim=True)
    may_show_NTK = (likely_NTK > NAMED_ABOVE) | (likely_NTK == highest_N1K)
    may_show_NTK &= highest_N1K > PRESENT_ABOVE
    share_NTK = likely_NTK / likely_NTK.sum(1, keepdim=True)
    shown = torch.where(may_show_NTK, share_NTK, 0.0).max(-1)
    return torch.where(shown.values > 0, shown.indices + 1, 0)


def run_lengths(class_NT: Tensor, grid: int) -> Tensor:
    """[N, T] for how many cells, itself included, the row goes on as at this cell."""
    class_NGG = class_NT.unflatten(-1, (grid, grid))
    lengths_NGG = torch.ones_like(class_NGG)
    for column in range(grid - 2, -1, -1):
        goes_on = class_NGG[..., column] == class_NGG[..., column + 1]
        lengths_NGG[..., column] = torch.where(goes_on, lengths_NGG[..., column + 1] + 1, 1)
    return lengths_NGG.flatten(-2)


def run_begins(class_NT: Tensor, grid: int) -> Tensor:
    """[N, T] whether the row shows something else at the cell to the left, or there is none."""
    class_NGG = class_NT.unflatten(-1, (grid, grid))
    begins_NGG = torch.ones_like(class_NGG, dtype=torch.bool)
    begins_NGG[..., 1:] = class_NGG[..., 1:] != class_NGG[..., :-1]
    return begins_NGG.flatten(-2)

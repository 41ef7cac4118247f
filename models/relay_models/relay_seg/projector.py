"""From a picture's features to the 256 tokens the language model reads: what each row shows of each class.

    features → transformer → which class each cell shows → runs of cells → tokens

The tokens are made from that map of classes and from nothing else, so that a language model can learn to read maps, of
which there are as many as one likes, instead of pictures, of which there are few. A row is told once for each class it
shows, as the answer to a question for that class alone would tell it in R-RLE (arXiv 2410.09855): in runs of cells that
show the class, and of cells that do not, which are its gaps. A run's token is the sum of learned vectors in the
embedding space of the language model:

    its class         one a class, begun as what tells the class's name from others'
    its row           one a row
    its first column  one a column
    its length        one a length from 1 to G
    its order         one a number: how many runs of that class, gaps among them, the row has before it
    that it is a gap  one, where it is

Before these stand G tokens that tell of each row what holds for a class that it does not show: one gap from end to end,
of the class that has no name. Where there are fewer runs than tokens, one vector fills the places that are left; where
there are more, those of the classes that show least are missing.

Legend: N pictures, C channels, G cells a side, T = G * G cells in reading order and as many tokens, E the projector's
width, K classes and one, D the language model's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ProjectorSizes:
    """Of what `Projector` is made; the values are those that training begins with.

    Attributes:
        present_above: a class is on the map if some cell shows it likelier than this. So low because what is small, or
            rare in training, is never likely.
        named_above: of a cell at an outline, or of a rare thing, "nothing that has a name" is often far likelier
            although it is there; what is likelier than this may be shown.
    """

    channels: int = 1728
    grid: int = 16
    width: int = 256
    num_layers: int = 3
    num_heads: int = 4
    num_classes: int = 80
    out_width: int = 576
    present_above: float = 0.015
    named_above: float = 0.1


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
        self.rows_GD = nn.Parameter(torch.zeros(sizes.grid, sizes.out_width))
        self.columns_GD = nn.Parameter(torch.zeros(sizes.grid, sizes.out_width))
        self.lengths_GD = nn.Parameter(torch.zeros(sizes.grid, sizes.out_width))  # lengths 1 to G
        self.orders_GD = nn.Parameter(torch.zeros(sizes.grid, sizes.out_width))
        self.gap_D = nn.Parameter(torch.zeros(sizes.out_width))
        self.unused_D = nn.Parameter(torch.zeros(sizes.out_width))

    def forward(self, features_NCGG: Tensor) -> Tensor:
        return self.tokens(self.decided(features_NCGG))

    def decided(self, features_NCGG: Tensor) -> Tensor:
        """What pictures show, [N, T], see `decide`."""
        logits_NTK = self.classify(self.hidden(features_NCGG))
        return decide(logits_NTK, present_above=self.sizes.present_above, named_above=self.sizes.named_above)

    def hidden(self, features_NCGG: Tensor) -> Tensor:
        """What is known of each cell, [N, T, E]."""
        x_NTE = self.enter_norm(self.enter(features_NCGG.flatten(2).transpose(1, 2))) + self.cell_TE
        x_NTE = self.dropout(x_NTE)
        for layer in self.layers:
            x_NTE = layer(x_NTE)
        return self.leave_norm(x_NTE)

    def of_tokens(self) -> list[nn.Parameter]:
        """What tokens are made of, once it is known what a picture shows."""
        of_runs = [self.rows_GD, self.columns_GD, self.lengths_GD, self.orders_GD, self.gap_D]
        return [self.codebook_KD, *of_runs, self.unused_D]

    def tokens(self, class_NT: Tensor) -> Tensor:
        """The tokens [N, T, D] of maps of classes, whole numbers from 0 (no name) to K - 1."""
        runs = row_runs(class_NT, self.sizes.grid)
        tokens_NTD = self.codebook_KD[runs.class_NT] + self.rows_GD[runs.row_NT] + self.columns_GD[runs.column_NT]
        tokens_NTD = tokens_NTD + self.lengths_GD[runs.length_NT - 1] + self.orders_GD[runs.order_NT]
        tokens_NTD = tokens_NTD + torch.where(runs.is_gap_NT[..., None], self.gap_D, 0.0)
        return torch.where(runs.is_used_NT[..., None], tokens_NTD, self.unused_D)


def decide(class_logits_NTK: Tensor, *, present_above: float, named_above: float) -> Tensor:
    """[N, T] the class of each cell, 0 for whatever has no name.

    A class that is likelier than ``present_above`` anywhere is there. Of those classes a cell may show each that is
    likelier than ``named_above`` in it, or nowhere likelier than in it; and it shows that of which it has the largest
    share. So what is small is in front, as where masks meet: a tie is not lost on the person who wears it.
    """
    likely_NTK = class_logits_NTK.float().softmax(-1)[..., 1:]
    highest_N1K = likely_NTK.amax(1, keepdim=True)
    may_show_NTK = (likely_NTK > named_above) | (likely_NTK == highest_N1K)
    may_show_NTK &= highest_N1K > present_above
    share_NTK = likely_NTK / likely_NTK.sum(1, keepdim=True)
    shown = torch.where(may_show_NTK, share_NTK, 0.0).max(-1)
    return torch.where(shown.values > 0, shown.indices + 1, 0)


@dataclass(frozen=True)
class Runs:
    """What each token of pictures tells, each [N, T]; where ``is_used_NT`` is False, it tells nothing."""

    class_NT: Tensor  # noqa: N815
    row_NT: Tensor  # noqa: N815
    column_NT: Tensor  # noqa: N815
    length_NT: Tensor  # noqa: N815
    order_NT: Tensor  # noqa: N815
    is_gap_NT: Tensor  # noqa: N815
    is_used_NT: Tensor  # noqa: N815


def row_runs(class_NT: Tensor, grid: int) -> Runs:
    """The runs of maps of classes: G gaps from end to end, one a row; then of each class, that with the most cells
    first, its runs and gaps in reading order, as many as there are places."""
    class_NGG = class_NT.unflatten(-1, (grid, grid))
    N = len(class_NGG)
    column_G = torch.arange(grid, device=class_NT.device)
    length_NGG = _run_lengths(class_NGG)
    begins_NGG = torch.ones_like(class_NGG, dtype=torch.bool)
    begins_NGG[..., 1:] = class_NGG[..., 1:] != class_NGG[..., :-1]
    begins_NGG &= class_NGG > 0
    # [..., x, y]: whether at column y begins another run of the class of column x
    other_NGGG = begins_NGG[..., None, :] & (class_NGG[..., None] == class_NGG[..., None, :])
    earlier_NGGG = other_NGGG & (column_G < column_G[:, None])
    ends_NGG = (column_G + length_NGG) * begins_NGG
    last_end_NGG = torch.where(earlier_NGGG, ends_NGG[..., None, :], 0).amax(-1)
    num_earlier_NGG = earlier_NGGG.sum(-1)
    first_NGG = torch.where(other_NGGG, column_G, grid).amin(-1)
    order_NGG = 2 * num_earlier_NGG + (first_NGG > 0)
    is_last_NGG = ~(other_NGGG & (column_G > column_G[:, None])).any(-1)
    end_NGG = column_G + length_NGG
    before_NGG, after_NGG = column_G - last_end_NGG, grid - end_NGG
    # [..., 3]: the gap before a run, the run, the gap after the row's last
    column = torch.stack((last_end_NGG, column_G.expand_as(class_NGG), end_NGG), -1).flatten(1)
    length = torch.stack((before_NGG, length_NGG, after_NGG), -1).flatten(1)
    order = torch.stack((order_NGG - 1, order_NGG, order_NGG + 1), -1).flatten(1)
    is_used = torch.stack((begins_NGG & (before_NGG > 0), begins_NGG, begins_NGG & is_last_NGG & (after_NGG > 0)), -1)
    is_used = is_used.flatten(1)
    number = class_NGG[..., None].expand(-1, -1, -1, 3).flatten(1)
    place = torch.arange(column.shape[1], device=class_NT.device)
    size = (class_NT[:, :, None] == class_NT[:, None]).sum(-1)[..., None].expand(-1, -1, 3).flatten(1)
    by_size = (grid**2 - size) * (1 << 20) + number  # classes of one size by number
    key = by_size * len(place) + place
    key = torch.where(is_used, key, torch.iinfo(torch.long).max)
    chosen = key.argsort(-1)[:, : grid**2 - grid]
    row = place // (3 * grid)
    row_NG = column_G.expand(N, -1)
    zero_NG, one_NG = torch.zeros_like(row_NG), torch.ones_like(row_NG)

    def told(of_rows_NG: Tensor, of_runs: Tensor) -> Tensor:
        return torch.cat((of_rows_NG, of_runs.expand(N, -1).gather(1, chosen)), 1)

    is_gap = (place % 3 != 1).expand(N, -1)
    return Runs(
        class_NT=told(zero_NG, number),
        row_NT=told(row_NG, row),
        column_NT=told(zero_NG, column.clamp(max=grid - 1)),
        length_NT=told(grid * one_NG, length.clamp(min=1)),
        order_NT=told(zero_NG, order.clamp(0, grid - 1)),
        is_gap_NT=told(one_NG.bool(), is_gap),
        is_used_NT=told(one_NG.bool(), is_used),
    )


def _run_lengths(class_NGG: Tensor) -> Tensor:
    """[N, G, G] for how many cells, itself included, the row goes on as at this cell."""
    length_NGG = torch.ones_like(class_NGG)
    for column in range(class_NGG.shape[-1] - 2, -1, -1):
        goes_on = class_NGG[..., column] == class_NGG[..., column + 1]
        length_NGG[..., column] = torch.where(goes_on, length_NGG[..., column + 1] + 1, 1)
    return length_NGG

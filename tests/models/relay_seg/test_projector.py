"""What the projector's tokens are made of, and that a picture's token depends on the whole picture."""

from __future__ import annotations

import torch

from relay_models.relay_seg.projector import Projector, ProjectorSizes

SIZES = ProjectorSizes(channels=7, grid=3, width=16, num_layers=2, num_heads=2, num_classes=4, out_width=10)


def projector() -> Projector:
    torch.manual_seed(0)
    made = Projector(SIZES).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


def test_a_token_is_the_sum_of_what_is_known_of_its_cell() -> None:
    made = projector()
    features = torch.randn(2, 7, 3, 3)
    with torch.no_grad():
        tokens = made(features)
        hidden = made.hidden(features)
        class_3 = torch.full((2, 9, 5), -60.0)
        class_3[..., 3] = 60.0
        length_2 = torch.full((2, 9, 3), -60.0)
        length_2[..., 1] = 60.0
        certain = made.tokens(hidden, class_3, length_2)
    assert tokens.shape == (2, 9, 10)
    expected = made.codebook_KD[3] + made.lengths_GD[1] + made.free(hidden) + made.place_TD
    torch.testing.assert_close(certain, expected)


def test_cells_are_in_reading_order_and_see_one_another() -> None:
    made = projector()
    features = torch.zeros(1, 7, 3, 3)
    with torch.no_grad():
        before = made.enter(features.flatten(2).transpose(1, 2))
        features[0, :, 1, 2] = 1.0
        after = made.enter(features.flatten(2).transpose(1, 2))
        changed = (after - before).abs().sum(-1)[0] > 0
        assert changed.nonzero().flatten().tolist() == [5]
        moved = (made(features) - made(torch.zeros(1, 7, 3, 3))).abs().sum(-1)[0]
    assert (moved > 0).all()

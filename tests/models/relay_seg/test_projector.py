"""What the projector's tokens are made of, and that a picture's token depends on the whole picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relay_models.relay_seg.projector import Projector, ProjectorSizes, decide, run_lengths

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
    classes = torch.tensor([[0, 0, 3, 4, 4, 4, 1, 3, 3]])
    lengths = torch.tensor([2, 1, 1, 3, 2, 1, 1, 2, 1])
    with torch.no_grad():
        expected = made.codebook_KD[classes] + made.lengths_GD[lengths - 1] + made.place_TD
        assert torch.equal(made.tokens(classes), expected)


def test_tokens_of_a_picture_are_those_of_the_classes_it_shows() -> None:
    made = projector()
    features = torch.randn(2, 7, 3, 3)
    with torch.no_grad():
        logits = made.classify(made.hidden(features))
        assert torch.equal(made(features), made.tokens(decide(logits)))
    assert decide(logits).shape == (2, 9)


@pytest.mark.parametrize(
    ("chances", "expected"), [((0.7, 0.26, 0.04), 1), ((0.75, 0.24, 0.01), 0), ((0.1, 0.4, 0.5), 2)]
)
def test_a_cell_shows_what_is_likely_enough(chances: tuple[float, ...], expected: int) -> None:
    assert decide(torch.tensor([[chances]]).log()).tolist() == [[expected]]


def test_run_lengths_against_counting() -> None:
    maps = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (4, 25)))
    for cells, lengths in zip(maps.view(-1, 5).tolist(), run_lengths(maps, 5).view(-1, 5).tolist(), strict=True):
        for place, length in enumerate(lengths):
            rest = cells[place:]
            assert length == next((n for n, cell in enumerate(rest) if cell != rest[0]), len(rest))


def test_cells_are_in_reading_order_and_see_one_another() -> None:
    made = projector()
    features = torch.zeros(1, 7, 3, 3)
    with torch.no_grad():
        before = made.enter(features.flatten(2).transpose(1, 2))
        features[0, :, 1, 2] = 1.0
        after = made.enter(features.flatten(2).transpose(1, 2))
        changed = (after - before).abs().sum(-1)[0] > 0
        assert changed.nonzero().flatten().tolist() == [5]
        moved = (made.hidden(features) - made.hidden(torch.zeros(1, 7, 3, 3))).abs().sum(-1)[0]
    assert (moved > 0).all()

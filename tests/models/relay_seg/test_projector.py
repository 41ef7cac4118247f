"""What the projector's tokens are made of, and that a picture's token depends on the whole picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relay_models.relay_seg.projector import Projector, ProjectorSizes, decide, run_begins, run_lengths

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
    begins = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0])
    with torch.no_grad():
        expected = made.codebook_KD[classes] + made.lengths_GD[lengths - 1] + made.place_TD
        expected = expected + begins[:, None] * made.begins_D
        torch.testing.assert_close(made.tokens(classes), expected)


def test_tokens_of_a_picture_are_those_of_the_classes_it_shows() -> None:
    made = projector()
    features = torch.randn(2, 7, 3, 3)
    with torch.no_grad():
        logits = made.classify(made.hidden(features))
        assert torch.equal(made(features), made.tokens(decide(logits)))
    assert decide(logits).shape == (2, 9)


# Three cells, nothing and two classes: how likely each is, and what the cells show.
@pytest.mark.parametrize(
    ("likely", "expected"),
    [
        # likely enough, likelier than another, and not
        ([(0.3, 0.61, 0.09), (0.3, 0.3, 0.4), (0.9, 0.09, 0.01)], [1, 2, 0]),
        # nowhere likely, but there: where it is likeliest
        ([(0.95, 0.04, 0.01), (0.96, 0.035, 0.005), (0.99, 0.0, 0.01)], [1, 0, 0]),
        # not there
        ([(0.98, 0.01, 0.01), (0.99, 0.005, 0.005), (0.99, 0.0, 0.01)], [0, 0, 0]),
        # on top of something far likelier, of which this is a smaller share
        ([(0.01, 0.98, 0.01), (0.1, 0.7, 0.2), (0.04, 0.95, 0.01)], [1, 2, 1]),
    ],
)
def test_a_cell_shows_what_is_likely_enough(likely: list[tuple[float, ...]], expected: list[int]) -> None:
    logits_NTK = torch.tensor([likely, [(1.0, 0.0, 0.0)] * 3]).log()
    assert decide(logits_NTK).tolist() == [expected, [0, 0, 0]]


def test_run_lengths_against_counting() -> None:
    maps = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (4, 25)))
    for cells, lengths in zip(maps.view(-1, 5).tolist(), run_lengths(maps, 5).view(-1, 5).tolist(), strict=True):
        for place, length in enumerate(lengths):
            rest = cells[place:]
            assert length == next((n for n, cell in enumerate(rest) if cell != rest[0]), len(rest))


def test_runs_begin_where_a_row_changes() -> None:
    maps = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (4, 25)))
    for cells, begins in zip(maps.view(-1, 5).tolist(), run_begins(maps, 5).view(-1, 5).tolist(), strict=True):
        assert begins == [place == 0 or cells[place] != cells[place - 1] for place in range(5)]


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

"""What the projector's tokens tell of a map of classes, and that what a cell shows depends on the whole picture."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch

from relay_models.relay_seg.projector import Projector, ProjectorSizes, decide, row_runs

SIZES = ProjectorSizes(channels=7, grid=3, width=16, num_layers=2, num_heads=2, num_classes=4, out_width=10)


def projector() -> Projector:
    torch.manual_seed(0)
    made = Projector(SIZES).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


Told = tuple[int, int, int, int, int, bool]  # class, row, column, length, order, whether it is a gap


def told_by_walking(rows: list[list[int]]) -> list[Told]:
    """What the tokens of a map tell, were there as many as it takes."""
    grid = len(rows)
    told: list[Told] = [(0, row, 0, grid, 0, True) for row in range(grid)]
    sizes = Counter(number for cells in rows for number in cells if number)
    for number in sorted(sizes, key=lambda number: (-sizes[number], number)):
        for row, cells in enumerate(rows):
            column = 0
            for order, (is_it, run) in enumerate(groupby(cell == number for cell in cells)):
                length = len(list(run))
                if number in cells:
                    told.append((number, row, column, length, order, not is_it))
                column += length
    return told


@pytest.mark.parametrize(("grid", "kinds"), [(3, 2), (5, 3), (16, 2), (16, 40)])
def test_runs_are_the_rows_of_each_class(grid: int, kinds: int) -> None:
    maps = torch.from_numpy(np.random.default_rng(0).integers(0, kinds, (12, grid**2)))
    maps[1:3] = 0
    maps[2, grid : 2 * grid] = 1  # a row from end to end
    maps[3] = 1
    runs = row_runs(maps, grid)
    fields = (runs.class_NT, runs.row_NT, runs.column_NT, runs.length_NT, runs.order_NT, runs.is_gap_NT)
    for index, cells in enumerate(maps.tolist()):
        expected = told_by_walking([cells[start : start + grid] for start in range(0, grid**2, grid)])[: grid**2]
        found = zip(*(field[index].tolist() for field in fields), strict=True)
        assert [one for one, used in zip(found, runs.is_used_NT[index].tolist(), strict=True) if used] == expected


def test_what_shows_least_is_missing_where_there_are_too_many_runs() -> None:
    rng = np.random.default_rng(1)
    cells = np.where(rng.random(256) < 0.6, 1, rng.integers(2, 40, 256))
    runs = row_runs(torch.from_numpy(cells)[None], 16)
    assert runs.is_used_NT.all()
    shown = [number for number in dict.fromkeys(runs.class_NT[0].tolist()) if number]
    sizes = Counter(cells.tolist())
    assert len(shown) < len(sizes)
    assert shown[0] == 1
    assert min(sizes[number] for number in shown) >= max(sizes[number] for number in sizes.keys() - {*shown})


def test_a_token_is_the_sum_of_what_it_tells() -> None:
    made = projector()
    rows = [[0, 4, 0], [4, 4, 4], [0, 0, 0]]
    told = told_by_walking(rows)
    assert len(told) == 7  # of nine tokens
    with torch.no_grad():
        (tokens_TD,) = made.tokens(torch.tensor(rows).view(1, 9))
        for token_D, (number, row, column, length, order, is_gap) in zip(tokens_TD, told, strict=False):
            expected = made.codebook_KD[number] + made.rows_GD[row] + made.columns_GD[column]
            expected = expected + made.lengths_GD[length - 1] + made.orders_GD[order] + is_gap * made.gap_D
            torch.testing.assert_close(token_D, expected)
    torch.testing.assert_close(tokens_TD[7:], made.unused_D.expand(2, -1))


def test_tokens_of_a_picture_are_those_of_the_classes_it_shows() -> None:
    made = projector()
    features = torch.randn(2, 7, 3, 3)
    with torch.no_grad():
        logits = made.classify(made.hidden(features))
        class_NT = decide(logits, present_above=0.015, named_above=0.1)
        assert torch.equal(made.decided(features), class_NT)
        assert torch.equal(made(features), made.tokens(class_NT))
    assert class_NT.shape == (2, 9)


def test_the_thresholds_are_the_models_own() -> None:
    made = projector()
    features = torch.randn(2, 7, 3, 3)
    with torch.no_grad():
        assert made.decided(features).any()
        made.sizes = replace(SIZES, present_above=1.0)
        assert not made.decided(features).any()


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
    assert decide(logits_NTK, present_above=0.03, named_above=0.1).tolist() == [expected, [0, 0, 0]]


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

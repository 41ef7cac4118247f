"""Quantiles, ratios and the table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_benchmarks.summary import Spread, equal_fraction, quantile, quantiles, spread_of_ratios, table

TIMES = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


@given(TIMES, st.floats(0, 1))
def test_quantile_is_numpys(values: list[float], fraction: float) -> None:
    assert quantile(values, fraction) == pytest.approx(float(np.quantile(values, fraction)), rel=1e-9, abs=1e-9)


def test_quantiles_are_p20_p50_p80() -> None:
    found = quantiles([50.0, 10.0, 40.0, 20.0, 30.0, 60.0])
    assert (found.p20, found.p50, found.p80) == (20.0, 35.0, 50.0)


def test_a_quantile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_ratios_are_taken_within_a_round() -> None:
    # a machine that slows down threefold in round 2 changes no ratio
    assert spread_of_ratios([20.0, 60.0, 22.0], [10.0, 30.0, 10.0]) == Spread(2.0, 2.0, 2.2)


def test_rounds_without_a_partner_are_an_error() -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        spread_of_ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 0]], 4 / 6),
        ([[1, 2, 3]], [[1, 2]], 1.0),  # only what both generated counts
        ([[1]], [[2]], 0.0),
        ([], [], 1.0),
    ],
)
def test_equal_fraction(first: list[list[int]], second: list[list[int]], expected: float) -> None:
    assert equal_fraction(first, second) == pytest.approx(expected)


def test_table_aligns_its_columns() -> None:
    assert table(["a", "bb"], [["100", "2"]]).splitlines() == ["  a  bb", "-------", "100   2"]

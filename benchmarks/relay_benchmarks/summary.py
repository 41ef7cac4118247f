"""Quantiles, per-round ratios, and the table they are printed in. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Quantiles:
    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Spread:
    """A figure taken once a round."""

    median: float
    min: float
    max: float


def quantile(values: Sequence[float], fraction: float) -> float:
    """Linear between the two nearest values, as numpy's default. Raises ValueError for no values."""
    if not values:
        raise ValueError("quantile of no values")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def quantiles(values: Sequence[float]) -> Quantiles:
    return Quantiles(*(quantile(values, fraction) for fraction in (0.2, 0.5, 0.8)))


def spread_of_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Ratios of pairs measured next to each other, so that a slow minute of the machine touches both halves."""
    ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
    return Spread(median(ratios), min(ratios), max(ratios))


def equal_fraction(first: Sequence[Sequence[object]], second: Sequence[Sequence[object]]) -> float:
    """Of the positions that both sides generated, the fraction with the same token (or letter, of texts)."""
    pairs = [pair for left, right in zip(first, second, strict=True) for pair in zip(left, right, strict=False)]
    return sum(left == right for left, right in pairs) / len(pairs) if pairs else 1.0


def mean_equality(first: Sequence[Sequence[Sequence[object]]], second: Sequence[Sequence[Sequence[object]]]) -> float:
    """`equal_fraction` of pairs of rounds, on average."""
    fractions = [equal_fraction(left, right) for left, right in zip(first, second, strict=True)]
    return sum(fractions) / len(fractions)


def agreement(
    first: Sequence[Sequence[Sequence[object]]], second: Sequence[Sequence[Sequence[object]]]
) -> tuple[float, float, float]:
    """(of the sides with each other, of the first with itself, of the second with itself): what the rounds of two
    sides generated is compared round by round, and with the side's own first round."""
    return (
        mean_equality(first, second),
        mean_equality(first, [first[0]] * len(first)),
        mean_equality(second, [second[0]] * len(second)),
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right, the first line underlined."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

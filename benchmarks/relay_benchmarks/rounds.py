"""How both sides are measured by turns: an order that flips each round, and a neighbour that is idle meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from relay_benchmarks.sides import Side

T = TypeVar("T")


class Neighbour(Protocol):
    """What is asked of the side that is not measured."""

    def cpu_seconds(self) -> float: ...

    def wait_until_quiet(self) -> None: ...


def order_of(number: int, sides: Sequence[T]) -> Sequence[T]:
    """In which order sides are measured in this round."""
    return tuple(sides) if number % 2 == 0 else tuple(reversed(sides))


def other_of(side: Side) -> Side:
    return Side.RELAY if side is Side.STOCK else Side.STOCK


def beside(neighbour: Neighbour | None, work: Callable[[], T]) -> tuple[T, float]:
    """Do the work once the neighbour is quiet. Returns what comes of it, and the cores the neighbour used meanwhile."""
    if neighbour is None:
        return work(), 0.0
    neighbour.wait_until_quiet()
    before, began = neighbour.cpu_seconds(), time.perf_counter()
    result = work()
    return result, (neighbour.cpu_seconds() - before) / max(time.perf_counter() - began, 1e-9)

"""How both sides are measured by turns: an order that flips each round, and a neighbour that is idle meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from relay_benchmarks.sides import Side

T = TypeVar("T")


@dataclass
class Rounds(Generic[T]):
    """What each side gave, a value a round."""

    of: dict[str, list[T]]

    @property
    def count(self) -> int:
        """Rounds of which every side is there."""
        return min(map(len, self.of.values()), default=0)

    def whole(self) -> dict[str, list[T]]:
        """Without a round that only one side has had."""
        return {side: values[: self.count] for side, values in self.of.items()}


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

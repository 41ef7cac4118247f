"""Rows of a run on both sides: appended as soon as a shape is done, and told in a table and a picture at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from relay_benchmarks.pair import say
from relay_benchmarks.plots import Panel, draw_and_tell
from relay_benchmarks.results_file import ResultsFile
from relay_benchmarks.run_facts import RunFacts
from relay_benchmarks.run_options import EngineOptions

Options = TypeVar("Options", bound=EngineOptions)


class PairReport(ABC, Generic[Options]):
    """A subclass makes the rows of one shape, and calls `_append`."""

    def __init__(
        self, facts: RunFacts, options: Options, described: Mapping[Any, Mapping[str, Any]], results_file: ResultsFile
    ) -> None:
        self._facts = facts
        self._options = options
        self._described = described
        self._file = results_file
        self.rows: list[dict[Any, dict[str, Any]]] = []

    @abstractmethod
    def __str__(self) -> str:
        """What it was measured on, the table, and what a reader must know of it."""

    @abstractmethod
    def panels(self) -> list[Panel]:
        """Of the picture."""

    @contextmanager
    def told(self, picture: Path | None) -> Iterator[None]:
        """Prints the table and draws the picture at the end, whatever ends it, if anything was measured."""
        try:
            yield
        finally:
            if self.rows:
                print(self, flush=True)
                title = f"{self._facts.model}, {self._facts.machine.cpu}"
                say(draw_and_tell(picture, title, self.panels()))

    def _append(self, pair: Mapping[Any, dict[str, Any]]) -> None:
        self._file.append(list(pair.values()))
        self.rows.append(dict(pair))

    def _points(
        self, cost: str, rows: Sequence[Mapping[Any, Mapping[str, Any]]]
    ) -> dict[str, list[tuple[float, float]]]:
        """A line for each side: shared tokens, and the column `cost`."""
        return {
            str(side): [(float(pair[side]["shared_tokens"] or 0), pair[side][cost]) for pair in rows]
            for side in rows[0]
        }

    def _ending(self, lines: Sequence[str]) -> list[str]:
        count = sum(map(len, self.rows))
        where = f"\n{count} rows of {self._facts.began} appended to {self._file.path}"
        return ["", *lines, where] if lines else [where]

"""Pictures of results: cost against shared length. matplotlib, which draws them, is the extra `bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from relay_benchmarks.errors import BenchArgumentError

ABSENT = "matplotlib is not installed; install it with pip install 'vllm-relay[bench]'"


@dataclass(frozen=True)
class Panel:
    """One diagram: for each line its points (shared tokens, cost)."""

    title: str
    cost: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def plot_path(chosen: Path | None, output: Path, began: str) -> Path | None:
    """Where a run's picture goes: where it was asked for, else beside the rows; None where none can be drawn.

    Raises BenchArgumentError if one was asked for that cannot be drawn.
    """
    if find_spec("matplotlib") is None:
        if chosen is not None:
            raise BenchArgumentError(f"--plot {chosen} cannot be drawn: {ABSENT}")
        return None
    path = chosen or output.with_name(f"{output.stem}-{began.replace(':', '')}.png")
    if not path.parent.is_dir():
        raise BenchArgumentError(f"--plot {path} cannot be written: no folder {path.parent}")
    return path


def pyplot() -> Any:
    """matplotlib's, drawing to files. Raises BenchArgumentError where it is not installed."""
    try:
        import matplotlib as mpl  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise BenchArgumentError(f"--plot: {ABSENT}; the rows are kept") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # type: ignore[import-not-found,import-untyped,unused-ignore]

    return plt


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """A PNG of the panels side by side."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for label, points in panel.lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axis.set(title=panel.title, xlabel="shared tokens", ylabel=panel.cost)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize="small")
    figure.suptitle(title, fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_and_tell(path: Path | None, title: str, panels: Sequence[Panel]) -> str:
    """Draw, if there is a place for it. Returns the line that says where, or why not."""
    if path is None:
        return f"no picture: {ABSENT}"
    draw(path, title, panels)
    return f"picture: {path}"

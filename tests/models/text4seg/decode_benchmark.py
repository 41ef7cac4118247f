"""From the text of a descriptor to a mask of 480 x 640: what is timed, and a median when run as a script.

taskset -c 0 python tests/models/text4seg/decode_benchmark.py
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from relay_models.text4seg.codec import decode, encode
from relay_models.text4seg.geometry import reduce_to_grid, upsample

GRID, HEIGHT, WIDTH = 16, 480, 640
LABELS = ("dog laying down", "the 2nd, 3rd & 4th cups", "café table", "man in a red shirt", "zebra")

Sample = tuple[str, str, np.ndarray]


def sample_descriptors(count: int, seed: int = 0) -> list[Sample]:
    """Text, label and grid (1 where the label is) of masks made of ellipses, with other labels around some."""
    random = np.random.default_rng(seed)
    y_H1, x_1W = np.mgrid[0:HEIGHT, 0:1][0], np.mgrid[0:1, 0:WIDTH][1]
    samples = []
    while len(samples) < count:
        cells_HW = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
        for index in random.permutation(np.arange(1, random.integers(2, len(LABELS) + 1))):
            for _ in range(random.integers(1, 4)):
                centre_y, centre_x = random.uniform(0, HEIGHT), random.uniform(0, WIDTH)
                radius_y, radius_x = random.uniform(30, 200), random.uniform(30, 250)
                inside = ((y_H1 - centre_y) / radius_y) ** 2 + ((x_1W - centre_x) / radius_x) ** 2 < 1
                cells_HW[inside] = index
        grid = reduce_to_grid(cells_HW, GRID, GRID)
        if 0 < (grid == 1).sum() < grid.size:
            samples.append((encode(grid, ("others", *LABELS)), LABELS[0], (grid == 1).astype(np.uint8)))
    return samples


def mask_of(text: str, label: str) -> np.ndarray:
    """uint8 [480, 640]."""
    return upsample(decode(text, height=GRID, width=GRID).mask(label), HEIGHT, WIDTH)


def masks_and_seconds(samples: list[Sample]) -> tuple[list[np.ndarray], list[float]]:
    masks, seconds = [], []
    for text, label, _ in samples:
        start = time.perf_counter()
        mask = mask_of(text, label)
        seconds.append(time.perf_counter() - start)
        masks.append(mask)
    return masks, seconds


def main() -> None:
    samples = sample_descriptors(200)
    masks_and_seconds(samples)
    _, seconds = masks_and_seconds(samples)
    characters = statistics.median(len(text) for text, _, _ in samples)
    p20, p50, p80 = (1e3 * tenth for tenth in statistics.quantiles(seconds, n=10)[1:8:3])
    print(
        f"{len(samples)} descriptors of {characters:.0f} characters (median) to {HEIGHT} x {WIDTH}: "
        f"p20 {p20:.3f} ms, p50 {p50:.3f} ms, p80 {p80:.3f} ms"
    )


if __name__ == "__main__":
    main()

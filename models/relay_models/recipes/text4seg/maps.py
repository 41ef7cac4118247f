"""Maps of classes for a language model to learn reading from: as photos show them, as the projector sees them, made up.

The tokens of a picture are made from such a map alone (`relay_seg.projector`), and what a map shows of a class is
certain. So there are as many exercises as one likes, and none of them teaches that something is there which the tokens
do not show: seeing is the projector's part, reading the language model's.

Legend: G rows and columns of the grid, K classes and one: 0 is whatever has no name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from relay_models.recipes.text4seg.cells import cell_targets
from relay_models.recipes.text4seg.features import Variant
from relay_models.relay_seg.projector import Projector

Map = npt.NDArray[np.int64]

EMPTY, TRUE = 0.04, 0.2  # of maps, how many begin with nothing, and as masks say; the others as the projector sees it
DRAWN_ON, SPECKLED = 0.6, 0.5  # how many get shapes, and single cells, of other classes
MOST_SHAPES, MOST_SPECKLES = 5, 20
RENAMED = 0.75  # how many show any classes in place of theirs, for most classes are rare and all are to be read alike
LARGEST = 11  # cells that a shape is wide or high


@dataclass(frozen=True)
class MapDrawer:
    """Draws maps.

    Attributes:
        projector: frozen.
        variants, weights: of the photos, and how often each is drawn.
        classes: their names; number 1 is the first.
    """

    projector: Projector
    variants: Sequence[Variant]
    weights: npt.NDArray[np.float64]
    classes: Sequence[str]
    common: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        counts = Counter(instance.label for photo in self.variants[0].photos for instance in photo.instances)
        often = [int(counts[name] ** 0.5) for name in self.classes]
        common = np.repeat(np.arange(1, len(often) + 1), often)
        object.__setattr__(self, "common", common if len(common) else np.arange(1, len(often) + 1))

    def draw(self, rng: np.random.Generator) -> Map:
        """[G, G] one map."""
        map_GG = self._begun(rng)
        if not map_GG.any() or rng.random() < DRAWN_ON:
            map_GG = self._with_shapes(map_GG, rng)
        if rng.random() < SPECKLED:
            map_GG = self._with_speckles(map_GG, rng)
        return self._renamed(map_GG, rng) if rng.random() < RENAMED else map_GG

    def true(self, number: int, index: int) -> Map:
        """[G, G] what the masks of a photo say."""
        grid = self.projector.sizes.grid
        return cell_targets(self.variants[number].photos[index], grid, self.classes).class_T.reshape(grid, grid)

    def seen(self, number: int, index: int) -> Map:
        """[G, G] what the projector makes of a photo."""
        features = torch.from_numpy(np.array(self.variants[number].features[index])[None]).float()
        with torch.no_grad():
            class_NT = self.projector.decided(features)
        return class_NT[0].unflatten(0, (self.projector.sizes.grid, -1)).numpy()

    def any_class(self, rng: np.random.Generator) -> int:
        """As often as maps show it: most of them are of any class."""
        return int(rng.integers(1, len(self.classes) + 1)) if rng.random() < RENAMED else self.some_class(rng)

    def some_class(self, rng: np.random.Generator) -> int:
        """Mostly one that photos show often."""
        return int(rng.choice(self.common)) if rng.random() < 0.6 else int(rng.integers(1, len(self.classes) + 1))

    def _begun(self, rng: np.random.Generator) -> Map:
        kind = rng.random()
        if kind < EMPTY:
            return np.zeros((self.projector.sizes.grid,) * 2, np.int64)
        number, index = int(rng.integers(len(self.variants))), int(rng.choice(len(self.weights), p=self.weights))
        return self.true(number, index) if kind < EMPTY + TRUE else self.seen(number, index)

    def _with_shapes(self, map_GG: Map, rng: np.random.Generator) -> Map:
        """Some ellipses and boxes over it, of a class that is there, of another, or of none."""
        drawn_GG = map_GG.copy()
        grid = len(map_GG)
        down, right = np.mgrid[:grid, :grid] + 0.5
        for _ in range(rng.integers(1, MOST_SHAPES + 1)):
            height, width = np.exp(rng.uniform(0, np.log(LARGEST), 2))
            centre_down, centre_right = rng.uniform(0, grid, 2)
            down_share, right_share = abs(down - centre_down) / (height / 2), abs(right - centre_right) / (width / 2)
            is_ellipse = rng.random() < 0.6
            inside = down_share**2 + right_share**2 <= 1 if is_ellipse else np.maximum(down_share, right_share) < 1
            present = np.unique(drawn_GG[drawn_GG > 0])
            kind = rng.random()
            if kind < 0.1:
                drawn_GG[inside] = 0
            elif kind < 0.45 and len(present):
                drawn_GG[inside] = rng.choice(present)
            else:
                drawn_GG[inside] = self.some_class(rng)
        return drawn_GG

    def _with_speckles(self, map_GG: Map, rng: np.random.Generator) -> Map:
        """Some single cells that show what other cells do, or one of a few other classes."""
        drawn_GG = map_GG.copy()
        shown = [*np.unique(map_GG), *(self.some_class(rng) for _ in range(rng.integers(1, MOST_SPECKLES + 1)))]
        for _ in range(rng.integers(1, MOST_SPECKLES + 1)):
            drawn_GG[tuple(rng.integers(len(map_GG), size=2))] = rng.choice(shown)
        return drawn_GG

    def _renamed(self, map_GG: Map, rng: np.random.Generator) -> Map:
        """Each class in place of another, all equally often."""
        return np.concatenate(([0], rng.permutation(len(self.classes)) + 1))[map_GG]

"""What each cell of a photo shows, as far as it is known: the targets a projector is warmed up with.

Legend: G cells a side, T = G * G cells in reading order, K classes and one: class 0 is whatever has no name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from relay_models.recipes.text4seg.dataset import Photo
from relay_models.recipes.text4seg.questions import instance_cells

NOT_AN_OBJECT = -1


@dataclass(frozen=True, eq=False)
class CellTargets:
    """Attributes:
    class_T: the class a cell shows, 0 where none of the photo's masks covers it.
    unnamed_K: what a cell of class 0 may show after all: class 0, and every class that may lack masks.
    shape_T4: for cells of single objects, from the cell's centre: to the object's centre, right and down, and the
        object's width and height, all in sides of the picture.
    is_object_T: where `shape_T4` says something.
    is_there_K: the classes of which a cell is shown.
    is_absent_K: the classes that are surely nowhere: the photo says so, or people marked everything in it.
    """

    class_T: npt.NDArray[np.int64]  # noqa: N815
    unnamed_K: npt.NDArray[np.bool_]  # noqa: N815
    shape_T4: npt.NDArray[np.float32]  # noqa: N815
    is_object_T: npt.NDArray[np.bool_]  # noqa: N815
    is_there_K: npt.NDArray[np.bool_]  # noqa: N815
    is_absent_K: npt.NDArray[np.bool_]  # noqa: N815


def cell_targets(photo: Photo, grid: int, classes: Sequence[str]) -> CellTargets:
    """The targets of one photo. Where masks meet, the one of fewer cells is in front. Other classes count as none."""
    number_of = {name: number for number, name in enumerate(classes, start=1)}
    class_GG = np.zeros((grid, grid), dtype=np.int64)
    owner_GG = np.full((grid, grid), NOT_AN_OBJECT, dtype=np.int64)
    shapes = np.zeros((len(photo.instances) + 1, 4), dtype=np.float32)
    by_size = sorted(enumerate(photo.instances), key=lambda pair: -int(instance_cells(pair[1], grid).sum()))
    for index, instance in by_size:
        mask_GG = instance_cells(instance, grid)
        if not mask_GG.any():
            continue
        class_GG[mask_GG] = number_of.get(instance.label, 0)
        owner_GG[mask_GG] = index if instance.is_one_object else NOT_AN_OBJECT
        rows, columns = np.nonzero(mask_GG)
        top, left = rows.min(), columns.min()
        height, width = rows.max() + 1 - top, columns.max() + 1 - left
        shapes[index] = np.array([left + width / 2, top + height / 2, width, height]) / grid
    centres = (np.arange(grid) + 0.5) / grid
    shape_GG4 = shapes[owner_GG]
    shape_GG4[..., 0] -= centres[None, :]
    shape_GG4[..., 1] -= centres[:, None]
    return CellTargets(
        class_GG.reshape(-1),
        np.array([True, *(not photo.is_complete(name) for name in classes)]),
        shape_GG4.reshape(-1, 4),
        (owner_GG != NOT_AN_OBJECT).reshape(-1),
        np.isin(np.arange(len(classes) + 1), class_GG[class_GG > 0]),
        np.array([False, *(photo.surely_lacks(name) for name in classes)]),
    )

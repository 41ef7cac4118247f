"""Whether and how the served model segments: its family, its grid, the square it sees.

A multimodal model is taken for a segmentation model where something says so: the flag `--relay-segmentation GRID`, the
`text4seg` object that `vllm-relay convert` writes into its config, or a known name. A plain LLaVA is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from relay_models.text4seg.families.family import Family
from relay_models.text4seg.families.registry import family_of, require_family
from relay_models.text4seg.profiles import is_trained
from relay_serving.settings import SEGMENTATION_AUTO, SEGMENTATION_OFF


@dataclass(frozen=True)
class SegmentationProfile:
    """How pictures go into the served model and what grid comes out."""

    family: Family

    @property
    def rows(self) -> int:
        return self.family.grid

    @property
    def columns(self) -> int:
        return self.family.grid


def resolve(setting: str, config: Mapping[str, Any], model: str) -> SegmentationProfile | None:
    """The profile of the served model; None where it does not segment.

    Args:
        setting: `auto`, `off`, or a number of cells a side.
        config: the model's config.json.
        model: its hub id or folder.

    Raises:
        CheckpointError: a grid was asked for, and the model is of no family that has one; or its config is impossible.
    """
    if setting == SEGMENTATION_OFF:
        return None
    if setting != SEGMENTATION_AUTO:
        return SegmentationProfile(require_family(config, model).with_grid(int(setting)))
    if not is_trained(config, model):
        return None
    family = family_of(config, model)
    return None if family is None else SegmentationProfile(family)

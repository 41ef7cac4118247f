"""What is known of a checkpoint beyond its config: the grid it was trained on, how it is spoken to, how it is loaded.

Nothing in a Text4Seg answer says how many cells a row has; it is a property of the training data (16 for referring
expressions, 24 for the released LLaVA). Known checkpoints are data here. Every other source is asked first: a
``text4seg`` object in the model's config, which `convert` writes, then the list, then the published habit of naming the
grid in the model's name (``-p24``), then the family's default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from relay_models.errors import CheckpointError

CONFIG_KEY = "text4seg"  # of the object in config.json
MAX_GRID = 128  # cells a side; published grids end at 64

_GRID_IN_NAME = re.compile(r"(?<![a-z0-9])p(16|24|32|64)(?![a-z0-9])")


class Style(StrEnum):
    """How LLaVA-1.5 is spoken to; other families know one way each.

    PLAIN: no system sentence, the answer on a line of its own (adapters trained with ms-swift).
    VICUNA: Vicuna's system sentence, everything on one line (the original LLaVA code).
    """

    PLAIN = "plain"
    VICUNA = "vicuna"


@dataclass(frozen=True)
class Profile:
    """One published checkpoint.

    Attributes:
        grid: cells a side of its descriptors.
        style: how it is spoken to.
        needs_conversion: its weights are in the original LLaVA layout, which vLLM does not load.
        vision_tower: the model whose vision tower it was trained on, if its own files may lack it.
    """

    grid: int
    style: Style = Style.PLAIN
    needs_conversion: bool = False
    vision_tower: str | None = None


# By model id, lower case: the hub does not tell ids apart by case.
PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "lmc22/text4seg-llava-7b-p24": Profile(
            grid=24,
            style=Style.VICUNA,
            needs_conversion=True,
            vision_tower="openai/clip-vit-large-patch14-336",
        ),
    }
)


@dataclass(frozen=True)
class Training:
    """What serving has to know of a checkpoint's training."""

    grid: int
    style: Style


def profile_of(model_id: str) -> Profile | None:
    """The profile of a hub id; None for what is not listed, local folders among them."""
    return PROFILES.get(model_id.lower())


def training_of(
    config: Mapping[str, Any], model_id: str, *, default_grid: int, default_style: Style = Style.PLAIN
) -> Training:
    """The grid and the style of a model, from the first source that knows them (see above).

    Raises:
        CheckpointError: the config's ``text4seg`` object has an impossible grid or style.
    """
    profile = profile_of(model_id)
    grid = profile.grid if profile else _grid_in_name(model_id) or default_grid
    style = profile.style if profile else default_style
    written = config.get(CONFIG_KEY) or {}
    if not isinstance(written, Mapping):
        raise CheckpointError(f"{CONFIG_KEY} in config.json must be an object, got {written!r}")
    return Training(check_grid(written.get("grid", grid)), _checked_style(written.get("style", style)))


def is_trained(config: Mapping[str, Any], model_id: str) -> bool:
    """Whether something says that this model writes descriptors: its config, the list above, or a grid in its name."""
    return bool(config.get(CONFIG_KEY)) or profile_of(model_id) is not None or _grid_in_name(model_id) is not None


def check_grid(grid: Any) -> int:
    """``grid`` itself. Raises CheckpointError unless it is a whole number from 1 to `MAX_GRID`."""
    if not isinstance(grid, int) or isinstance(grid, bool) or not 1 <= grid <= MAX_GRID:
        raise CheckpointError(f"grid must be a whole number from 1 to {MAX_GRID}, got {grid!r}")
    return grid


def _checked_style(style: Any) -> Style:
    try:
        return Style(style)
    except ValueError as error:
        raise CheckpointError(f"style must be one of {[known.value for known in Style]}, got {style!r}") from error


def _grid_in_name(model_id: str) -> int | None:
    """The last component of the id decides: ``org-p16/name-p24`` is a 24."""
    found = _GRID_IN_NAME.findall(model_id.rstrip("/").rsplit("/", 1)[-1].lower())
    return int(found[-1]) if found else None

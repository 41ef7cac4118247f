"""A server whose model segments: a tiny LLaVA with random weights and a grid of 8 by 8, started once a session."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The helpers in tests/: pytest's importlib mode does not put test folders on the path.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny_models import make_tiny_llava
from tiny_server import TINY_FLAGS


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture(scope="session")
def segmenting_server(
    tiny_llava: Path, start_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    log_path = tmp_path_factory.mktemp("segmenting") / "server.log"
    with start_server(log_path, str(tiny_llava), *TINY_FLAGS, "--relay-segmentation-queries", "40") as server:
        yield server

"""Fixtures of the tests that run real engines: the models they run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The helpers beside this file: pytest's importlib mode does not put test folders on the path.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The model that `vllm-relay serve` serves by default, prepared if it is not yet."""
    from relay_serving.embedded_model import prepare

    return prepare()

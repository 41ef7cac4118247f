"""What a child of a benchmark does first. Every process vLLM spawns may import this, so it stays light."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def end_with_the_parent() -> None:
    """SIGTERM ends this process in order; Linux sends it too if the parent is killed outright."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

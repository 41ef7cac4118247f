"""What sides say of themselves, where no engine is started, and reading back what was kept."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from relay_benchmarks.machine import Machine
from relay_benchmarks.run_facts import RunFacts
from relay_benchmarks.sides import RELAY_CLASSES, STOCK_CLASSES, Side

BLOCK = 128
FACTS = RunFacts("2025-01-01T00:00:00Z", Machine("A CPU", 2, 8), 0.1, "abc", "tiny")


def described(side: Side) -> dict[str, Any]:
    return {
        **(STOCK_CLASSES if side is Side.STOCK else RELAY_CLASSES),
        "vllm_version": "0.32.0",
        "torch_version": "2",
        "model_class": "vllm.Tiny",
        "dtype": "bfloat16",
        "layers": 2,
        "query_heads": 4,
        "key_heads": 2,
        "head_size": 64,
        "max_model_len": 1024,
        "block_size": BLOCK,
        "block_sizes": [BLOCK],
        "num_blocks": 99,
        "default_block_size": BLOCK,
        "compiled": "NONE",
        "cache_groups": 1,
        "relay_is_loaded": side is Side.RELAY,
        "kernel_check": {"kernel": "cpp (vec)", "passed": True, "error": 0.1, "budget": 0.2}
        if side is Side.RELAY
        else None,
    }


class PretendNeighbour:
    """All calls of both engines go to one log."""

    def __init__(self, side: Side, calls: list[tuple[str, Side]]) -> None:
        self.side = side
        self.calls = calls

    def cpu_seconds(self) -> float:
        return 0.0

    def wait_until_quiet(self) -> None:
        self.calls.append(("quiet", self.side))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as text:
        return list(csv.DictReader(text))

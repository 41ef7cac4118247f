"""What is the same in every row of a run: when, where, from which commit, of which model, between which sides."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from relay_benchmarks.machine import Machine, commit, installed
from relay_benchmarks.results_file import ENGINE_COLUMNS
from relay_benchmarks.sides import Side

BEST_OTHER = "the best alternative of this run"  # the only one: whole engines of others are not part of it
_ENGINE_FACTS = ("vllm_version", "torch_version", *ENGINE_COLUMNS)


@dataclass(frozen=True)
class RunFacts:
    began: str
    machine: Machine
    load_at_start: float
    commit: str
    model: str

    @classmethod
    def now(cls, model: str) -> RunFacts:
        return cls(
            began=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            machine=Machine.here(),
            load_at_start=os.getloadavg()[0],
            commit=commit(),
            model=model,
        )

    def columns(self, described: Mapping[str, Any]) -> dict[str, Any]:
        """RUN_COLUMNS but for the status, and ENGINE_COLUMNS; what a side does not tell of itself is empty."""
        return {
            "time": self.began,
            "machine": self.machine.name,
            "cpu": self.machine.cpu,
            "cores": self.machine.cores,
            "memory_gib": self.machine.memory_gib,
            "load_at_start": round(self.load_at_start, 2),
            "commit": self.commit,
            "relay_version": installed("vllm-relay"),
            **{name: described.get(name, "") for name in _ENGINE_FACTS},
            "model": self.model,
        }

    def where(self) -> str:
        machine = self.machine
        return f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib} GiB\ncommit {self.commit}"

    def heading(self, described: Mapping[Any, Mapping[str, Any]]) -> str:
        """Machine, versions, model, what serves attention on each side and how the kernel's check went."""
        stock, relay = described[Side.STOCK], described[Side.RELAY]
        check = relay["kernel_check"]
        versions = f"vLLM {stock['vllm_version']}, torch {stock['torch_version']}, vllm-relay {installed('vllm-relay')}"
        heads = f"{stock['query_heads']}/{stock['key_heads']} heads of {stock['head_size']}"
        default = f"default of stock {stock['default_block_size']}, of relay {relay['default_block_size']}"
        return (
            f"\n{self.where()}; {versions}\n"
            f"{self.model}, {stock['dtype']}, {stock['layers']} layers, {heads}; on both sides compilation "
            f"{stock['compiled']} and model class {stock['model_class']}\n"
            f"stock, {BEST_OTHER}, runs {stock['backends'][0]}\n"
            f"relay runs {relay['backends'][0]}, kernel {check['kernel']}: "
            f"error {check['error']:.2g} of {check['budget']:.2g} allowed\n"
            f"block size {stock['block_size']} on both sides ({default})\n"
        )


def backend_and_kernel(side: str, described: Mapping[Any, Mapping[str, Any]]) -> dict[str, str]:
    return {
        "backend": described[side]["backends"][0].rpartition(".")[2],
        "kernel": described[Side.RELAY]["kernel_check"]["kernel"] if side == Side.RELAY else "vLLM",
    }


def summed(readings: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, Any]:
    """Counters over several rounds; empty where a side has none."""
    if not readings:
        return dict.fromkeys(names, "")
    return {name: round(sum(reading.get(name, 0) for reading in readings)) for name in names}


def notes(where: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know of the rows of one shape: an idle side that was not, and rounds that are missing."""
    lines = []
    disturbed = max(float(row["other_side_cpu_percent"] or 0) for row in rows)
    if disturbed > 2:
        lines.append(f"NOTE {where}: the idle engine used {disturbed} % of a core while the other was measured")
    if rows[0]["status"] == "partial":
        lines.append(f"NOTE {where}: cut short after {rows[0]['rounds']} alternated round(s)")
    return lines

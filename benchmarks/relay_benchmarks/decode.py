"""`vllm-relay bench decode`: what one output token costs, stock and relay, against the length of the shared prompt.

Both engines are alive, one works. For each shape every round measures both, one after the other, in an order that
flips each round; a ratio is taken within a round. Only steps in which every request gets exactly one token are timed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from statistics import median
from typing import Any, Protocol

from relay_benchmarks.errors import BenchArgumentError, ComparisonError
from relay_benchmarks.machine import Machine, commit, installed
from relay_benchmarks.measured_engine import SLACK_TOKENS
from relay_benchmarks.results_file import ResultsFile
from relay_benchmarks.sides import Side
from relay_benchmarks.summary import equal_fraction, quantiles, spread_of_ratios, table
from relay_benchmarks.workload import Shape, blocks_needed

GIB = 1 << 30
MAX_BATCH = 4096


class Workload(StrEnum):
    SHARED = "shared"
    NONE = "none"  # "never slower for nothing": no request shares anything with another


_DEFAULT_BATCHES = {Workload.SHARED: (64,), Workload.NONE: (1, 64, 256)}
_DEFAULT_SHARED = {Workload.SHARED: (0, 2432, 7168), Workload.NONE: (0,)}


@dataclass(frozen=True)
class DecodeOptions:
    """What is measured. Empty `batch` and `shared` stand for the workload's own.

    Attributes:
        question_tokens: shortest and longest question.
        steps: timed decode steps of one side in one round.
        block_size, max_model_len: None is vLLM's default, on both sides.
        kv_cache_bytes: of each side.
    """

    workload: Workload = Workload.SHARED
    batch: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    question_tokens: tuple[int, int] = (8, 60)
    steps: int = 32
    rounds: int = 7
    dtype: str = "bfloat16"
    block_size: int | None = None
    max_model_len: int | None = None
    kv_cache_bytes: int = 2 * GIB
    enforce_eager: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch", self.batch or _DEFAULT_BATCHES[self.workload])
        object.__setattr__(self, "shared", self.shared or _DEFAULT_SHARED[self.workload])
        for batch in self.batch:
            _require(1 <= batch <= MAX_BATCH, "--batch", batch, f"1 to {MAX_BATCH}")
        for shared in self.shared:
            _require(shared >= 0, "--shared", shared, "0 or more tokens")
            _require(shared == 0 or self.workload is Workload.SHARED, "--shared", shared, "0 with --workload none")
        low, high = self.question_tokens
        _require(1 <= low <= high, "--question", f"{low}-{high}", "LOW-HIGH with 1 <= LOW <= HIGH")
        _require(self.steps >= 1, "--decode", self.steps, "1 step or more")
        _require(self.rounds >= 1, "--rounds", self.rounds, "1 or more")
        _require(self.block_size is None or self.block_size >= 1, "--block-size", self.block_size, "1 token or more")
        _require(
            self.max_model_len is None or self.max_model_len >= 1, "--max-model-len", self.max_model_len, "1 or more"
        )
        _require(self.kv_cache_bytes >= 1 << 20, "--kv-cache-memory-bytes", self.kv_cache_bytes, "at least 1 MiB")
        _require(0 <= self.seed < 2**32, "--seed", self.seed, "0 to 2^32 - 1")

    def shapes(self) -> list[Shape]:
        return [
            Shape(batch, shared, self.question_tokens)
            for batch in dict.fromkeys(self.batch)
            for shared in dict.fromkeys(self.shared)
        ]

    def check_context(self, max_model_len: int) -> None:
        """Raises BenchArgumentError if the longest request does not fit."""
        longest = max(self.shared) + self.question_tokens[1] + self.steps + SLACK_TOKENS
        if longest > max_model_len:
            raise BenchArgumentError(
                f"--shared {max(self.shared)} + a question of {self.question_tokens[1]} + --decode {self.steps} + "
                f"{SLACK_TOKENS} spare tokens make {longest}, over the model's context of {max_model_len}; shorten one"
            )

    def check_cache(self, num_blocks: int, block_size: int) -> None:
        """Raises BenchArgumentError if a batch would not fit into the KV cache all at once."""
        for shape in self.shapes():
            needed = blocks_needed(shape, block_size, self.steps + SLACK_TOKENS)
            if needed > num_blocks:
                raise BenchArgumentError(
                    f"batch {shape.batch} with {shape.shared_tokens} shared tokens needs {needed} cache blocks of "
                    f"{block_size} tokens and the engine has {num_blocks}; pass --kv-cache-memory-bytes "
                    f"{-(-self.kv_cache_bytes * needed // num_blocks)} or more"
                )

    def engine_args(self, model: str) -> dict[str, Any]:
        """vLLM's engine arguments, the same on both sides; what is left out is vLLM's default."""
        chosen = {
            "model": model,
            "dtype": self.dtype,
            "block_size": self.block_size,
            "max_model_len": self.max_model_len,
            "kv_cache_memory_bytes": self.kv_cache_bytes,
            "enforce_eager": self.enforce_eager,
            "max_num_seqs": max(128, *self.batch),
            "enable_prefix_caching": True,
            "seed": self.seed,
        }
        return {name: value for name, value in chosen.items() if value is not None}


def _require(holds: bool, flag: str, value: object, expected: str) -> None:
    if not holds:
        raise BenchArgumentError(f"{flag} {value} is not possible; it must be {expected}")


class Measured(Protocol):
    """What `run_decode` asks of an engine; `sides.Engine` is one."""

    def warm(self, shape: Shape, seed: int) -> None: ...

    def measure(self, shape: Shape, seed: int, steps: int) -> dict[str, Any]: ...

    def cpu_seconds(self) -> float: ...

    def wait_until_quiet(self) -> None: ...


@dataclass
class SideResult:
    """What one side gave over the rounds of one shape."""

    seconds: list[list[float]] = field(default_factory=list)
    tokens: list[list[list[int]]] = field(default_factory=list)
    counters: list[dict[str, int]] = field(default_factory=list)
    timed_counters: list[dict[str, int]] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    others_cpu: list[float] = field(default_factory=list)

    def round_medians_ms(self, rounds: int) -> list[float]:
        return [1e3 * median(seconds) for seconds in self.seconds[:rounds]]

    def all_ms(self, rounds: int) -> list[float]:
        return [1e3 * step for seconds in self.seconds[:rounds] for step in seconds]

    def counter(self, name: str, rounds: int) -> int:
        return sum(counters[name] for counters in self.counters[:rounds])


@dataclass
class ShapeResult:
    shape: Shape
    sides: dict[Side, SideResult] = field(default_factory=lambda: {side: SideResult() for side in Side})

    @property
    def rounds(self) -> int:
        """Rounds of which both halves are there."""
        return min(len(result.seconds) for result in self.sides.values())


def run_decode(
    engines: Mapping[Side, Measured], options: DecodeOptions, block_size: int, keep: Callable[[ShapeResult], None]
) -> None:
    """Measure every shape. What was measured of a shape goes to `keep` also when something ends the run early."""
    for shape in options.shapes():
        result = ShapeResult(shape)
        try:
            for side in Side:
                _say(f"{_named(shape)}: warming {side}")
                engines[side].warm(shape, options.seed)
            for number in range(options.rounds):
                order = tuple(Side) if number % 2 == 0 else tuple(reversed(Side))
                for side in order:
                    _measure(engines, side, result, options, block_size)
                _say(_progress(result, options.rounds))
        finally:
            if result.rounds:
                keep(result)


def _measure(
    engines: Mapping[Side, Measured], side: Side, result: ShapeResult, options: DecodeOptions, block_size: int
) -> None:
    other = engines[Side.RELAY if side is Side.STOCK else Side.STOCK]
    other.wait_until_quiet()
    before, began = other.cpu_seconds(), time.perf_counter()
    measured = engines[side].measure(result.shape, options.seed, options.steps)
    others_cpu = (other.cpu_seconds() - before) / max(time.perf_counter() - began, 1e-9)
    in_full_blocks = result.shape.shared_tokens // block_size * block_size
    if measured["cached_tokens"] < in_full_blocks:
        raise ComparisonError(
            f"the {side} engine found {measured['cached_tokens']} of {in_full_blocks} shared tokens in its prefix "
            "cache; the cache was to be warm. Pass a larger --kv-cache-memory-bytes"
        )
    kept = result.sides[side]
    kept.seconds.append(measured["seconds"])
    kept.tokens.append(measured["tokens"])
    kept.cached_tokens.append(measured["cached_tokens"])
    kept.others_cpu.append(others_cpu)
    if measured["counters"] is not None:
        kept.counters.append(measured["counters"])
        kept.timed_counters.append(measured["timed_counters"])


def _named(shape: Shape) -> str:
    return f"batch {shape.batch}, {shape.shared_tokens} shared tokens"


def _progress(result: ShapeResult, rounds: int) -> str:
    stock, relay = (result.sides[side].round_medians_ms(result.rounds)[-1] for side in (Side.STOCK, Side.RELAY))
    return (
        f"{_named(result.shape)}: round {result.rounds}/{rounds}: stock {stock:.2f} ms, relay {relay:.2f} ms a token, "
        f"stock/relay {stock / relay:.3f}"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class RunFacts:
    """What is the same in every row of a run."""

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


class Report:
    """Turns finished shapes into rows, appends them at once, and prints the table at the end."""

    def __init__(
        self,
        facts: RunFacts,
        options: DecodeOptions,
        described: Mapping[Side, Mapping[str, Any]],
        results_file: ResultsFile,
    ) -> None:
        self._facts = facts
        self._options = options
        self._described = described
        self._file = results_file
        self.rows: list[dict[Side, dict[str, Any]]] = []

    def keep(self, result: ShapeResult) -> None:
        pair = {side: self._row(result, side) for side in Side}
        self._file.append(list(pair.values()))
        self.rows.append(pair)

    def _row(self, result: ShapeResult, side: Side) -> dict[str, Any]:
        rounds, shape, facts = result.rounds, result.shape, self._facts
        mine, described = result.sides[side], self._described[side]
        stock, relay = result.sides[Side.STOCK], result.sides[Side.RELAY]
        times = quantiles(mine.all_ms(rounds))
        speedup = spread_of_ratios(stock.round_medians_ms(rounds), relay.round_medians_ms(rounds))
        no_prompt = next(
            (
                pair[side]["p50_ms"]
                for pair in self.rows
                if pair[side]["batch"] == shape.batch and pair[side]["shared_tokens"] == 0
            ),
            times.p50 if shape.shared_tokens == 0 else None,
        )
        return {
            "time": facts.began,
            "status": "complete" if rounds == self._options.rounds else "partial",
            "machine": facts.machine.name,
            "cpu": facts.machine.cpu,
            "cores": facts.machine.cores,
            "memory_gib": facts.machine.memory_gib,
            "load_at_start": round(facts.load_at_start, 2),
            "commit": facts.commit,
            "relay_version": installed("vllm-relay"),
            "model": facts.model,
            **{
                name: described[name]
                for name in (
                    *("vllm_version", "torch_version", "dtype", "layers", "query_heads", "key_heads", "head_size"),
                    *("compiled", "block_size", "default_block_size"),
                )
            },
            "workload": self._options.workload.value,
            "batch": shape.batch,
            "shared_tokens": shape.shared_tokens,
            "question_tokens": "-".join(map(str, shape.question_tokens)),
            "decode_steps": self._options.steps,
            "cache": "warm" if min(mine.cached_tokens[:rounds]) else "nothing shared",
            "seed": self._options.seed,
            "side": side.value,
            "backend": described["backends"][0].rpartition(".")[2],
            "kernel": self._described[Side.RELAY]["kernel_check"]["kernel"] if side is Side.RELAY else "vLLM",
            "rounds": rounds,
            "p20_ms": round(times.p20, 3),
            "p50_ms": round(times.p50, 3),
            "p80_ms": round(times.p80, 3),
            "round_medians_ms": ";".join(f"{value:.3f}" for value in mine.round_medians_ms(rounds)),
            "speedup_median": round(speedup.median, 4),
            "speedup_min": round(speedup.min, 4),
            "speedup_max": round(speedup.max, 4),
            "ratio_to_no_prompt": "" if no_prompt is None else round(times.p50 / no_prompt, 3),
            "equal_tokens": round(_mean_equality(stock.tokens[:rounds], relay.tokens[:rounds]), 4),
            "self_equal_tokens": round(_mean_equality(mine.tokens[:rounds], [mine.tokens[0]] * rounds), 4),
            "other_side_cpu_percent": round(100 * max(mine.others_cpu[:rounds]), 1),
            **self._counted(mine, rounds, times.p50),
        }

    def _counted(self, mine: SideResult, rounds: int, step_ms: float) -> dict[str, Any]:
        names = ("relay_steps", "eligible_steps", "steps", "layer_calls", "kv_tokens_saved")
        if not mine.counters:
            return dict.fromkeys((*names, "planning_us", "planning_percent"), "")
        counts: dict[str, Any] = {name: mine.counter(name, rounds) for name in names}
        # a group of cache layers counts its own steps; a model step plans once for each
        groups = self._described[Side.RELAY]["cache_groups"]
        timed_steps, planning_ns = (
            sum(counters[name] for counters in mine.timed_counters[:rounds]) for name in ("steps", "planning_ns")
        )
        planning_us = planning_ns * groups / max(timed_steps, 1) / 1e3
        return {
            **counts,
            "planning_us": round(planning_us, 2),
            "planning_percent": round(100 * planning_us / (1e3 * step_ms), 4),
        }

    def __str__(self) -> str:
        header = (
            *("batch", "shared", "stock ms p20/p50/p80", "relay ms p20/p50/p80", "stock/relay (min-max)"),
            *("no prompt: stock", "relay", "relay steps", "layer calls", "KV tokens saved", "planning", "equal tokens"),
        )
        return "\n".join(
            [
                self._heading(),
                table(header, [self._cells(pair) for pair in self.rows]),
                *self._verdicts(),
                self._where(),
            ]
        )

    def _heading(self) -> str:
        facts, stock, relay = self._facts, self._described[Side.STOCK], self._described[Side.RELAY]
        check = relay["kernel_check"]
        versions = f"vLLM {stock['vllm_version']}, torch {stock['torch_version']}, vllm-relay {installed('vllm-relay')}"
        heads = f"{stock['query_heads']}/{stock['key_heads']} heads of {stock['head_size']}"
        error = f"error {check['error']:.2g} of {check['budget']:.2g} allowed"
        default = f"default of stock {stock['default_block_size']}, of relay {relay['default_block_size']}"
        return (
            f"\n{facts.machine.cpu}, {facts.machine.cores} cores, {facts.machine.memory_gib} GiB\n"
            f"commit {facts.commit}; {versions}\n"
            f"{facts.model}, {stock['dtype']}, {stock['layers']} layers, {heads}; compilation {stock['compiled']} on "
            f"both sides\n"
            f"stock runs {stock['backends'][0]}\n"
            f"relay runs {relay['backends'][0]}, kernel {check['kernel']}: {error}\n"
            f"block size {stock['block_size']} on both sides ({default})\n"
            f"warm prefix cache; seed {self._options.seed}; ms a token over {self._options.steps} decode steps a "
            "round, ratios within a round\n"
        )

    def _cells(self, pair: Mapping[Side, Mapping[str, Any]]) -> list[str]:
        stock, relay = pair[Side.STOCK], pair[Side.RELAY]
        return [
            str(stock["batch"]),
            str(stock["shared_tokens"]),
            *(f"{row['p20_ms']:.2f}/{row['p50_ms']:.2f}/{row['p80_ms']:.2f}" for row in (stock, relay)),
            f"{relay['speedup_median']:.3f} ({relay['speedup_min']:.3f}-{relay['speedup_max']:.3f})",
            *(f"{row['ratio_to_no_prompt'] or '-'}" for row in (stock, relay)),
            f"{relay['relay_steps']}/{relay['eligible_steps']} of {relay['steps']}",
            str(relay["layer_calls"]),
            str(relay["kv_tokens_saved"]),
            f"{relay['planning_us']:.0f} us = {relay['planning_percent']:.2f} %",
            f"{100 * relay['equal_tokens']:.1f} % (itself {100 * relay['self_equal_tokens']:.1f} %)",
        ]

    def _verdicts(self) -> list[str]:
        lines = []
        for pair in self.rows:
            stock, relay = pair[Side.STOCK], pair[Side.RELAY]
            rounds = f"{relay['rounds']} alternated round(s)"
            if relay["shared_tokens"] == 0:
                lines.append(
                    f"nothing shared, batch {relay['batch']}: relay/stock {1 / relay['speedup_median']:.3f} "
                    f"({1 / relay['speedup_max']:.3f}-{1 / relay['speedup_min']:.3f}) over {rounds}; "
                    f"planning {relay['planning_us']:.1f} us, {relay['planning_percent']:.3f} % of a step"
                )
            disturbed = max(stock["other_side_cpu_percent"], relay["other_side_cpu_percent"])
            if disturbed > 2:
                lines.append(
                    f"NOTE batch {relay['batch']}, {relay['shared_tokens']} shared: the idle engine used {disturbed} % "
                    "of a core while the other was measured"
                )
            if relay["status"] == "partial":
                lines.append(f"NOTE batch {relay['batch']}, {relay['shared_tokens']} shared: cut short after {rounds}")
        return ["", *lines] if lines else []

    def _where(self) -> str:
        return f"\n{2 * len(self.rows)} rows of {self._facts.began} appended to {self._file.path}"


def _mean_equality(first: list[list[list[int]]], second: list[list[list[int]]]) -> float:
    fractions = [equal_fraction(left, right) for left, right in zip(first, second, strict=True)]
    return sum(fractions) / len(fractions)

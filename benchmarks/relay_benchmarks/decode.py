"""`vllm-relay bench decode`: what one output token costs, stock and relay, against the length of the shared prompt.

Both engines are alive, one works. For each shape every round measures both, one after the other, in an order that
flips each round; a ratio is taken within a round. Only steps in which every request gets exactly one token are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from statistics import median
from typing import Any, Protocol

from relay_benchmarks.errors import BenchArgumentError
from relay_benchmarks.measured_engine import SLACK_TOKENS
from relay_benchmarks.pair import say
from relay_benchmarks.pair_report import PairReport
from relay_benchmarks.plots import Panel
from relay_benchmarks.results_file import COUNTED
from relay_benchmarks.rounds import Neighbour, beside, order_of, other_of
from relay_benchmarks.run_facts import backend_and_kernel, notes, summed
from relay_benchmarks.run_options import EngineOptions, require
from relay_benchmarks.sides import Side, check_answers, check_warm
from relay_benchmarks.summary import agreement, quantiles, spread_of_ratios, table
from relay_benchmarks.workload import Shape, blocks_needed

MAX_BATCH = 4096


class Workload(StrEnum):
    SHARED = "shared"
    NONE = "none"  # "never slower for nothing": no request shares anything with another


_DEFAULT_BATCHES = {Workload.SHARED: (64,), Workload.NONE: (1, 64, 256)}
_DEFAULT_SHARED = {Workload.SHARED: (0, 2432, 7168), Workload.NONE: (0,)}


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(EngineOptions):
    """What is measured. Empty `batch` and `shared` stand for the workload's own.

    Attributes:
        steps: timed decode steps of one side in one round.
    """

    workload: Workload = Workload.SHARED
    batch: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    steps: int = 32
    rounds: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "batch", self.batch or _DEFAULT_BATCHES[self.workload])
        object.__setattr__(self, "shared", self.shared or _DEFAULT_SHARED[self.workload])
        for batch in self.batch:
            require(1 <= batch <= MAX_BATCH, "--batch", batch, f"1 to {MAX_BATCH}")
        for shared in self.shared:
            require(shared >= 0, "--shared", shared, "0 or more tokens")
            require(shared == 0 or self.workload is Workload.SHARED, "--shared", shared, "0 with --workload none")
        require(self.steps >= 1, "--decode", self.steps, "1 step or more")

    def shapes(self) -> list[Shape]:
        return [
            Shape(batch, shared, self.question_tokens)
            for batch in dict.fromkeys(self.batch)
            for shared in dict.fromkeys(self.shared)
        ]

    def check_context(self, max_model_len: int) -> None:
        """Raises BenchArgumentError if the longest request does not fit."""
        longest = max(self.shared) + self.question_tokens[1] + self.steps + SLACK_TOKENS
        self.check_fits(
            f"--shared {max(self.shared)} + a question of {self.question_tokens[1]} + --decode {self.steps} + "
            f"{SLACK_TOKENS} spare tokens",
            longest,
            max_model_len,
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
        return self.vllm_arguments(model, max_num_seqs=max(128, *self.batch))


class Measured(Neighbour, Protocol):
    """What `run_decode` asks of an engine; `sides.Engine` is one."""

    def warm(self, shape: Shape, seed: int) -> None: ...

    def measure(self, shape: Shape, seed: int, steps: int) -> dict[str, Any]: ...


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
                say(f"{_named(shape)}: warming {side}")
                engines[side].warm(shape, options.seed)
            for number in range(options.rounds):
                for side in order_of(number, tuple(Side)):
                    _measure(engines, side, result, options, block_size)
                say(_progress(result, options.rounds))
        finally:
            if result.rounds:
                keep(result)


def _measure(
    engines: Mapping[Side, Measured], side: Side, result: ShapeResult, options: DecodeOptions, block_size: int
) -> None:
    measured, others_cpu = beside(
        engines[other_of(side)], partial(engines[side].measure, result.shape, options.seed, options.steps)
    )
    check_warm(side, measured["cached_tokens"], result.shape.shared_tokens, block_size)
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


# ---------------------------------------------------------------- rows


class Report(PairReport[DecodeOptions]):
    """Turns finished shapes into rows."""

    def keep(self, result: ShapeResult) -> None:
        pair = {side: self._row(result, side) for side in Side}
        self._append(pair)

    def _row(self, result: ShapeResult, side: Side) -> dict[str, Any]:
        rounds, shape, facts = result.rounds, result.shape, self._facts
        mine, described = result.sides[side], self._described[side]
        stock, relay = result.sides[Side.STOCK], result.sides[Side.RELAY]
        times = quantiles(mine.all_ms(rounds))
        speedup = spread_of_ratios(stock.round_medians_ms(rounds), relay.round_medians_ms(rounds))
        equal, *of_itself = agreement(stock.tokens[:rounds], relay.tokens[:rounds])
        equal_to_itself = dict(zip(Side, of_itself, strict=True))
        check_answers(_named(shape), equal, min(of_itself))
        no_prompt = next(
            (
                pair[side]["p50_ms"]
                for pair in self.rows
                if pair[side]["batch"] == shape.batch and pair[side]["shared_tokens"] == 0
            ),
            times.p50 if shape.shared_tokens == 0 else None,
        )
        return {
            **facts.columns(described),
            "status": "complete" if rounds == self._options.rounds else "partial",
            **{name: described[name] for name in ("block_size", "default_block_size")},
            "workload": self._options.workload.value,
            "batch": shape.batch,
            "shared_tokens": shape.shared_tokens,
            "question_tokens": "-".join(map(str, shape.question_tokens)),
            "decode_steps": self._options.steps,
            "cache": "warm" if min(mine.cached_tokens[:rounds]) else "nothing shared",
            "seed": self._options.seed,
            "side": side.value,
            **backend_and_kernel(side, self._described),
            "rounds": rounds,
            "p20_ms": round(times.p20, 3),
            "p50_ms": round(times.p50, 3),
            "p80_ms": round(times.p80, 3),
            "round_medians_ms": ";".join(f"{value:.3f}" for value in mine.round_medians_ms(rounds)),
            "speedup_median": round(speedup.median, 4),
            "speedup_min": round(speedup.min, 4),
            "speedup_max": round(speedup.max, 4),
            "ratio_to_no_prompt": "" if no_prompt is None else round(times.p50 / no_prompt, 3),
            "equal_tokens": round(equal, 4),
            "self_equal_tokens": round(equal_to_itself[side], 4),
            "other_side_cpu_percent": round(100 * max(mine.others_cpu[:rounds]), 1),
            **self._counted(mine, rounds, times.p50),
        }

    def _counted(self, mine: SideResult, rounds: int, step_ms: float) -> dict[str, Any]:
        counts = summed(mine.counters[:rounds], COUNTED)
        if not mine.counters:
            return {**counts, "planning_us": "", "planning_percent": ""}
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
                *self._ending(self._verdicts()),
            ]
        )

    def _heading(self) -> str:
        return (
            f"{self._facts.heading(self._described)}"
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
            lines += notes(f"batch {relay['batch']}, {relay['shared_tokens']} shared", (stock, relay))
        return lines

    def panels(self) -> list[Panel]:
        return [
            Panel(
                f"batch {batch}",
                "ms a token (p50)",
                self._points("p50_ms", [pair for pair in self.rows if pair[Side.STOCK]["batch"] == batch]),
            )
            for batch in dict.fromkeys(pair[Side.STOCK]["batch"] for pair in self.rows)
        ]

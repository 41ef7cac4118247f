"""`vllm-relay bench throughput`: how fast a batch job is, stock and relay, against the length of the shared prompt.

    vllm-relay bench throughput
    vllm-relay bench throughput --requests 200 --shared 64,1024,8192 --cache cold

The non-interactive experiment of the RelayAttention paper: a fixed number of requests is given to the engine all at
once, and timed until the last has its last token, prefill included. Both engines are alive, one works; each round
measures both on the same prompts, in an order that flips. The prefix cache is emptied before each measurement; `warm`
puts the shared prompt back, not timed, `cold` does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, Protocol

from tqdm import tqdm

from relay_benchmarks import run_options
from relay_benchmarks.errors import BenchArgumentError
from relay_benchmarks.pair import context_of, running_engines, shown_name
from relay_benchmarks.pair_report import PairReport
from relay_benchmarks.plots import Panel, plot_path
from relay_benchmarks.results_file import (
    COUNTED,
    ENGINE_COLUMNS,
    RESULTS_FOLDER,
    RUN_COLUMNS,
    ResultsFile,
)
from relay_benchmarks.rounds import Neighbour, Rounds, beside, order_of, other_of
from relay_benchmarks.run_facts import RunFacts, backend_and_kernel, notes, summed
from relay_benchmarks.run_options import Cache, EngineOptions, integers, require
from relay_benchmarks.sides import Side, check_answers, check_warm
from relay_benchmarks.summary import agreement, spread_of_ratios, table
from relay_benchmarks.workload import Shape, blocks_needed
from relay_serving import embedded_model
from relay_serving.settings import RelaySettings

THROUGHPUT_COLUMNS = (
    *RUN_COLUMNS,
    *ENGINE_COLUMNS,
    *("requests", "concurrency", "shared_tokens", "question_tokens", "generated_tokens", "block_size"),
    *("default_block_size", "cache", "seed", "side", "backend", "kernel", "rounds", "round_seconds"),
    *("requests_per_second", "output_tokens_per_second", "total_tokens_per_second", "best_other"),
    *("speedup_median", "speedup_min", "speedup_max", "equal_tokens", "self_equal_tokens", "other_side_cpu_percent"),
    *COUNTED,
)
RESULTS = "throughput.csv"
SHARED = (64, 256, 1024, 4096, 8192)
MAX_REQUESTS = 100_000


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions(EngineOptions):
    """What is measured.

    Attributes:
        requests: given to the engine at once.
        concurrency: of these, the most that it works on at a time.
        shared: lengths of the shared prompt; empty stands for SHARED, as far as the model's context goes.
        generate: tokens of each answer.
    """

    requests: int = 64
    concurrency: int = 64
    shared: tuple[int, ...] = ()
    generate: int = 64
    cache: Cache = Cache.WARM

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.requests <= MAX_REQUESTS, "--requests", self.requests, f"1 to {MAX_REQUESTS}")
        require(self.concurrency >= 1, "--concurrency", self.concurrency, "1 or more")
        for shared in self.shared:
            require(shared >= 0, "--shared", shared, "0 or more tokens")
        require(self.generate >= 1, "--generate", self.generate, "1 token or more")

    def within(self, max_model_len: int) -> ThroughputOptions:
        """With lengths of the shared prompt that fit; those a person chose are not changed.

        Raises BenchArgumentError.
        """
        room = max_model_len - self.question_tokens[1] - self.generate
        if self.shared or room < 0:
            longest = max(self.shared, default=0)
            self.check_fits(
                f"--shared {longest} + a question of {self.question_tokens[1]} + --generate {self.generate}",
                longest + self.question_tokens[1] + self.generate,
                max_model_len,
            )
            return self
        return replace(self, shared=tuple(dict.fromkeys(min(shared, room // 64 * 64) for shared in SHARED)))

    def shapes(self) -> list[Shape]:
        return [Shape(self.requests, shared, self.question_tokens) for shared in dict.fromkeys(self.shared)]

    def check_cache(self, num_blocks: int, block_size: int) -> None:
        """Raises BenchArgumentError if the cache holds too little for the requests that run at one time."""
        for shape in self.shapes():
            at_a_time = replace(shape, batch=min(self.requests, self.concurrency))
            needed = blocks_needed(at_a_time, block_size, self.generate)
            if needed > num_blocks:
                raise BenchArgumentError(
                    f"--concurrency {at_a_time.batch} with --shared {shape.shared_tokens} needs {needed} cache blocks "
                    f"of {block_size} tokens and the engine has {num_blocks}; pass --kv-cache-memory-bytes "
                    f"{-(-self.kv_cache_bytes * needed // num_blocks)} or more"
                )


class Working(Neighbour, Protocol):
    """What `measure_all` asks of an engine; `sides.Engine` is one."""

    def complete(self, shape: Shape, seed: int, generate: int, is_warm: bool) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Job:
    """One round of one side: what the engine answered, and the cores its neighbour used meanwhile."""

    answer: Mapping[str, Any]
    others_cpu: float

    @property
    def seconds(self) -> float:
        return float(self.answer["seconds"])


def measure_all(
    engines: Mapping[Side, Working],
    options: ThroughputOptions,
    block_size: int,
    keep: Callable[[Shape, Rounds[Job]], None],
) -> None:
    """Measure every shape. Whole rounds of a shape go to `keep` also when something ends the run early."""
    shapes = options.shapes()
    with tqdm(total=len(shapes) * options.rounds * 2, unit="job") as progress:
        for shape in shapes:
            found: Rounds[Job] = Rounds({side: [] for side in Side})
            try:
                for side in Side:  # nothing is run for the first time, compiled or allocated while it is timed
                    progress.set_description(f"{shape.shared_tokens} shared tokens, warming {side}")
                    engines[side].complete(shape, options.seed, min(options.generate, 2), True)
                for number in range(options.rounds):
                    for side in order_of(number, tuple(Side)):
                        progress.set_description(f"{shape.shared_tokens} shared tokens, {side}")
                        found.of[side].append(_measure(engines, side, shape, options, block_size))
                        progress.update()
            finally:
                if found.count:
                    keep(shape, found)


def _measure(
    engines: Mapping[Side, Working], side: Side, shape: Shape, options: ThroughputOptions, block_size: int
) -> Job:
    is_warm = options.cache is Cache.WARM
    work = partial(engines[side].complete, shape, options.seed, options.generate, is_warm)
    answer, others_cpu = beside(engines[other_of(side)], work)
    if is_warm:
        check_warm(side, answer["cached_tokens"], shape.shared_tokens, block_size)
    return Job(answer, others_cpu)


# ---------------------------------------------------------------- rows


class Report(PairReport[ThroughputOptions]):
    """Turns finished shapes into rows."""

    def keep(self, shape: Shape, found: Rounds[Job]) -> None:
        """Raises ComparisonError, keeping nothing, if the sides' answers have too little in common."""
        jobs = found.whole()
        tokens = {side: [job.answer["tokens"] for job in jobs[side]] for side in Side}
        seconds = {side: [job.seconds for job in jobs[side]] for side in Side}
        equal, *of_itself = agreement(tokens[Side.STOCK], tokens[Side.RELAY])
        check_answers(f"{shape.shared_tokens} shared tokens", equal, min(of_itself))
        speedup = spread_of_ratios(seconds[Side.STOCK], seconds[Side.RELAY])
        compared = {
            "best_other": "stock vLLM",
            "speedup_median": round(speedup.median, 4),
            "speedup_min": round(speedup.min, 4),
            "speedup_max": round(speedup.max, 4),
            "equal_tokens": round(equal, 4),
        }
        self._append(
            {
                side: {**self._row(shape, side, jobs[side]), **compared, "self_equal_tokens": round(itself, 4)}
                for side, itself in zip(Side, of_itself, strict=True)
            }
        )

    def _row(self, shape: Shape, side: Side, jobs: Sequence[Job]) -> dict[str, Any]:
        options, described = self._options, self._described[side]
        seconds = median(job.seconds for job in jobs)
        generated = sum(map(len, jobs[0].answer["tokens"]))
        return {
            **self._facts.columns(described),
            "status": "complete" if len(jobs) == options.rounds else "partial",
            "requests": shape.batch,
            "concurrency": options.concurrency,
            "shared_tokens": shape.shared_tokens,
            "question_tokens": "-".join(map(str, shape.question_tokens)),
            "generated_tokens": options.generate,
            "block_size": described["block_size"],
            "default_block_size": described["default_block_size"],
            "cache": options.cache.value,
            "seed": options.seed,
            "side": side.value,
            **backend_and_kernel(side, self._described),
            "rounds": len(jobs),
            "round_seconds": ";".join(f"{job.seconds:.4f}" for job in jobs),
            "requests_per_second": round(shape.batch / seconds, 4),
            "output_tokens_per_second": round(generated / seconds, 2),
            "total_tokens_per_second": round((generated + jobs[0].answer["prompt_tokens"]) / seconds, 2),
            "other_side_cpu_percent": round(100 * max(job.others_cpu for job in jobs), 1),
            **summed([job.answer["counters"] for job in jobs if job.answer["counters"]], COUNTED),
        }

    def __str__(self) -> str:
        header = (
            *("requests", "shared", "stock req/s", "relay req/s", "stock out tok/s", "relay out tok/s"),
            *("relay/stock (min-max)", "relay steps", "KV tokens saved", "equal tokens"),
        )
        told = [
            line
            for pair in self.rows
            for line in notes(f"{pair[Side.RELAY]['shared_tokens']} shared tokens", list(pair.values()))
        ]
        options = self._options
        return "\n".join(
            [
                f"{self._facts.heading(self._described)}{options.cache} prefix cache; seed {options.seed}; "
                f"{options.generate} tokens an answer, {options.concurrency} requests at a time; medians over "
                "alternated rounds, ratios within a round\n",
                table(header, [self._cells(pair) for pair in self.rows]),
                *self._ending(told),
            ]
        )

    def _cells(self, pair: Mapping[Side, Mapping[str, Any]]) -> list[str]:
        stock, relay = pair[Side.STOCK], pair[Side.RELAY]
        return [
            str(stock["requests"]),
            str(stock["shared_tokens"]),
            *(f"{row['requests_per_second']:.2f}" for row in (stock, relay)),
            *(f"{row['output_tokens_per_second']:.1f}" for row in (stock, relay)),
            f"{relay['speedup_median']:.3f} ({relay['speedup_min']:.3f}-{relay['speedup_max']:.3f})",
            f"{relay['relay_steps']}/{relay['eligible_steps']} of {relay['steps']}",
            str(relay["kv_tokens_saved"]),
            f"{100 * relay['equal_tokens']:.1f} % (itself {100 * relay['self_equal_tokens']:.1f} %)",
        ]

    def panels(self) -> list[Panel]:
        title = f"{self._options.requests} requests, {self._options.cache} cache"
        return [
            Panel(title, what.replace("_", " "), self._points(what, self.rows))
            for what in ("requests_per_second", "output_tokens_per_second")
        ]


# ---------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = ThroughputOptions()
    add = parser.add_argument
    add("--requests", type=int, default=defaults.requests, metavar="N", help="given all at once (%(default)s)")
    add("--concurrency", type=int, default=defaults.concurrency, metavar="N", help="worked on at a time (%(default)s)")
    add(
        "--shared",
        type=integers,
        default=(),
        metavar="N,...",
        help=f"shared tokens (default: {','.join(map(str, SHARED))}, the last as far as the context goes)",
    )
    add("--generate", type=int, default=defaults.generate, metavar="N", help="tokens of an answer (%(default)s)")
    add("--cache", choices=tuple(Cache), default=defaults.cache.value, help="the shared prompt is cached, or not")
    run_options.add_arguments(parser, defaults, RESULTS)


def run(args: argparse.Namespace) -> None:
    """Measure, append and print. Raises RelayServingError; rows of what was measured by then are kept."""
    options = ThroughputOptions(
        requests=args.requests,
        concurrency=args.concurrency,
        shared=args.shared,
        generate=args.generate,
        cache=Cache(args.cache),
        **run_options.chosen(args),
    )
    settings = RelaySettings.from_environment()
    if (context := context_of(args.model)) is not None:
        options.within(min(context, options.max_model_len or context))
    results_file = ResultsFile(args.output or RESULTS_FOLDER / RESULTS, THROUGHPUT_COLUMNS)
    results_file.prepare()
    facts = RunFacts.now(shown_name(args.model))
    picture = plot_path(args.plot, results_file.path, facts.began)
    model = args.model or str(embedded_model.prepare())
    engine_args = options.vllm_arguments(model, max_num_seqs=options.concurrency)
    with running_engines(engine_args, settings, options.seed, facts.model) as (engines, described):
        stock = described[Side.STOCK]
        options = options.within(stock["max_model_len"])
        options.check_cache(stock["num_blocks"], stock["block_size"])
        report = Report(facts, options, described, results_file)
        with report.told(picture):
            measure_all(engines, options, stock["block_size"], report.keep)

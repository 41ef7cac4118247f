"""`vllm-relay bench serve`: what users of a server wait for, and how much it serves, under traffic that shares prompts.

    vllm-relay bench serve                                       stock and relay, started here, by turns
    vllm-relay bench serve --workload tenants --request-rate 4 --goodput ttft:500 tpot:60
    vllm-relay bench serve --dataset-name prefix_repetition --num-prompts 64 --prefix-repetition-prefix-len 1024
    vllm-relay bench serve --url http://127.0.0.1:8000           only that server, as it is

Requests are streamed over HTTP and answered greedily, each as long as was asked for. They arrive as a Poisson process
(`--request-rate`) or as soon as another one is done (`--max-concurrency`). Load, percentiles, goodput and datasets are
vLLM's own benchmark library. Both servers started here are vLLM's, differ in the plugin only, are alive at the same
time and work by turns, on the same requests. Before each round the prefix cache is emptied; `--cache warm` then puts
in what requests share, not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from relay_benchmarks import load, run_options
from relay_benchmarks.errors import BenchArgumentError
from relay_benchmarks.load import Answered, Api, Load
from relay_benchmarks.pair import context_of, shown_name
from relay_benchmarks.pair_report import PairReport
from relay_benchmarks.plots import Panel, plot_path
from relay_benchmarks.results_file import ENGINE_COLUMNS, RESULTS_FOLDER, RUN_COLUMNS, ResultsFile
from relay_benchmarks.rounds import Neighbour, Rounds, beside, order_of
from relay_benchmarks.run_facts import RunFacts, backend_and_kernel, notes, summed
from relay_benchmarks.run_options import Cache, EngineOptions, integers, require
from relay_benchmarks.server_metrics import RELAY_SAMPLES, VLLM_SAMPLES, Reading
from relay_benchmarks.servers import Server, running_servers, words_of
from relay_benchmarks.sides import Side, check_answers
from relay_benchmarks.summary import Spread, agreement, spread_of_ratios, table
from relay_benchmarks.traffic import Traffic, Workload, distinct_contexts, make_requests
from relay_serving import embedded_model
from relay_serving.settings import RelaySettings

COMPARED = ("ttft", "tpot", "e2el")
SERVE_COLUMNS = (
    *RUN_COLUMNS,
    *ENGINE_COLUMNS,
    *("workload", "api", "loop", "request_rate", "max_concurrency", "requests", "contexts", "shared_tokens"),
    *("question_tokens", "generated_tokens", "prompt_tokens", "block_size", "default_block_size", "cache", "seed"),
    *("side", "relay", "backend", "kernel", "rounds", "completed"),
    *(f"{metric}_p{percentile}_ms" for metric in load.METRICS for percentile in load.PERCENTILES),
    *("requests_per_second", "output_tokens_per_second", "total_tokens_per_second", "slo", "goodput", "best_other"),
    *(f"{metric}_speedup_{of}" for metric in COMPARED for of in ("median", "min", "max")),
    *(f"throughput_gain_{of}" for of in ("median", "min", "max")),
    *("equal_answers", "equal_text", "self_equal_text", "other_side_cpu_percent"),
    *RELAY_SAMPLES,
    *("fallbacks", *VLLM_SAMPLES),
)
RESULTS = "serve.csv"
DATASET = "dataset"
SHARED = (256, 1024, 4096)
TEMPLATE_TOKENS = 64  # left for what a chat template adds
LETTERS = 128  # of each answer are compared, about the 32 tokens that `check_answers` has its measure from
CLOSED_LOOP_CONCURRENCY = 16
_SHARING = frozenset(Workload) - {Workload.NONE, Workload.IMAGE}


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EngineOptions):
    """What is measured. Empty `shared` and no `api` stand for the workload's own.

    Attributes:
        url: of a running server; empty to start two.
        dataset: options of one of vLLM's, in place of a workload of ours.
        generate: tokens of each answer.
        goodput: milliseconds that ttft, tpot and e2el of a good request may take; empty for no such limits.
    """

    url: str = ""
    workload: Workload = Workload.CHAT
    dataset: argparse.Namespace | None = None
    api: Api | None = None
    requests: int = 64
    shared: tuple[int, ...] = ()
    contexts: int = 8
    zipf: float = 1.0
    generate: int = 64
    request_rate: float | None = None
    max_concurrency: int | None = None
    cache: Cache = Cache.WARM
    goodput: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.requests >= 1, "--requests", self.requests, "1 or more")
        require(self.contexts >= 1, "--contexts", self.contexts, "1 or more")
        require(0 <= self.zipf <= 10, "--zipf", self.zipf, "0 to 10")
        require(self.generate >= 2, "--generate", self.generate, "2 tokens or more: there is no time between fewer")
        rate, at_a_time = self.request_rate, self.max_concurrency
        require(rate is None or 0 < rate < float("inf"), "--request-rate", rate, "more than 0 requests a second")
        require(at_a_time is None or at_a_time >= 1, "--max-concurrency", at_a_time, "1 or more")
        for shared in self.shared:
            require(shared >= 0, "--shared", shared, "0 or more tokens")
            require(shared == 0 or self.shares_text, "--shared", shared, f"0 with {self.named_workload}")
        require(
            self.dataset is None or self.workload is Workload.CHAT,
            "--workload",
            self.workload,
            "left out with --dataset-name",
        )
        require(
            self.workload is not Workload.IMAGE or self.api is not Api.COMPLETIONS,
            "--api",
            self.api,
            "chat with --workload image",
        )
        if self.api is None:
            object.__setattr__(self, "api", Api.CHAT if self.workload is Workload.IMAGE else Api.COMPLETIONS)
        if self.request_rate is None and self.max_concurrency is None:
            object.__setattr__(self, "max_concurrency", CLOSED_LOOP_CONCURRENCY)

    @property
    def shares_text(self) -> bool:
        return not self.dataset and self.workload in _SHARING

    @property
    def named_workload(self) -> str:
        return "--dataset-name" if self.dataset else f"--workload {self.workload}"

    @property
    def load(self) -> Load:
        return Load(self.request_rate, self.max_concurrency)

    def within(self, max_model_len: int) -> ServeOptions:
        """With lengths of what is shared that fit; those a person chose are not changed. Raises BenchArgumentError."""
        if self.dataset:
            return self
        room = max_model_len - self.question_tokens[1] - self.generate - TEMPLATE_TOKENS
        if self.shared or room < 0 or not self.shares_text:
            longest = max(self.shared, default=0)
            self.check_fits(
                f"--shared {longest} + a question of {self.question_tokens[1]} + --generate {self.generate} + "
                f"{TEMPLATE_TOKENS} spare tokens",
                longest + self.question_tokens[1] + self.generate + TEMPLATE_TOKENS,
                max_model_len,
            )
            return replace(self, shared=self.shared or (0,))
        return replace(self, shared=tuple(dict.fromkeys(min(shared, room // 64 * 64) for shared in SHARED)))


@dataclass(frozen=True)
class Target:
    """One server that is measured.

    Attributes:
        side: a Side, or "server" for one that ran already.
        neighbours: what must be quiet meanwhile; empty where there is no other.
        described: what it says of itself.
    """

    side: str
    server: Server
    described: Mapping[str, Any]
    neighbours: tuple[Neighbour, ...] = ()


@dataclass(frozen=True)
class Round:
    answered: Answered
    counted: Reading
    others_cpu: float


def measure_all(targets: Sequence[Target], options: ServeOptions, keep: Callable[[int, Rounds[Round]], None]) -> None:
    """Measure every length. Whole rounds go to `keep` also when something ends the run early."""
    tokens_per_word = targets[0].server.tokens_per_word()
    for shared in options.shared or (0,):
        found: Rounds[Round] = Rounds({target.side: [] for target in targets})
        requests_of = partial(_requests, targets[0].server, options, shared, tokens_per_word)
        try:
            samples, contexts = requests_of(0)
            for target in targets:
                _warm_up(target, options, samples)
            for number in range(options.rounds):
                for target in order_of(number, targets):
                    can_forget = _prepare(target, options, contexts)
                    # where the cache cannot be emptied, at least the questions are new
                    asked = samples if can_forget else requests_of(number + 1)[0]
                    label = f"{shared} shared, round {number + 1}/{options.rounds}, {target.side}"
                    found.of[target.side].append(_measure(target, options, asked, number, label))
        finally:
            if found.count:
                keep(shared, found)


def _requests(
    server: Server, options: ServeOptions, shared: int, tokens_per_word: float, number: int
) -> tuple[list[Any], list[Any]]:
    """What is asked in a round, and what puts all that is shared into the prefix cache, both as vLLM's samples."""
    assert options.api is not None
    if options.dataset:
        seed = options.seed + number
        samples = load.dataset_samples(options.dataset, options.requests, seed, server.folder, options.api)
        return samples, [replace(sample, expected_output_len=1) for sample in samples]
    traffic = Traffic(
        options.workload, options.requests, shared, options.question_tokens, options.contexts, options.zipf
    )
    asks = make_requests(traffic, options.seed, tokens_per_word, number)
    return (
        load.samples_of(asks, options.api, options.generate),
        load.samples_of(distinct_contexts(asks), options.api, 1),
    )


def _warm_up(target: Target, options: ServeOptions, samples: Sequence[Any]) -> None:
    """Nothing is run for the first time while it is timed; and a request that is refused is refused here, with why."""
    assert options.api is not None
    longest = max(samples, key=lambda sample: len(str(sample.chat_messages or sample.prompt)))
    target.server.ask_once(options.api, longest)
    few = [replace(sample, expected_output_len=2) for sample in samples[: options.max_concurrency or len(samples)]]
    _drive(target, options, few, 0, f"warming {target.side}")


def _prepare(target: Target, options: ServeOptions, contexts: Sequence[Any]) -> bool:
    """Bring the prefix cache into the state asked for. Returns whether it could be emptied, which `cold` needs."""
    can_forget = target.server.forget_prefixes()
    if options.cache is Cache.COLD and not can_forget:
        raise BenchArgumentError(
            f"--cache cold: the server at {target.server.url} does not let its prefix cache be emptied; start it with "
            "VLLM_SERVER_DEV_MODE=1, or measure with --cache warm"
        )
    if options.cache is Cache.WARM and contexts:
        _drive(target, options, contexts, 0, f"caching what is shared, {target.side}")
    return can_forget


def _measure(target: Target, options: ServeOptions, samples: Sequence[Any], number: int, label: str) -> Round:
    before = target.server.metrics()
    work = partial(_drive, target, options, samples, number, label)
    answered, others_cpu = beside(target.neighbours[0] if target.neighbours else None, work)
    return Round(answered, target.server.metrics().since(before), others_cpu)


def _drive(target: Target, options: ServeOptions, samples: Sequence[Any], number: int, label: str) -> Answered:
    assert options.api is not None
    server, seed = target.server, (options.seed + number) % 2**32
    return load.drive(server.url, server.model, options.api, samples, options.load, seed, label)


# ---------------------------------------------------------------- rows


class Report(PairReport[ServeOptions]):
    """Turns what was served into rows."""

    def keep(self, shared_tokens: int, found: Rounds[Round]) -> None:
        """Raises ComparisonError, keeping nothing, if the sides' answers have too little in common."""
        rounds = found.whole()
        compared = self._compared(shared_tokens, rounds)
        self._append({side: {**self._row(shared_tokens, side, rounds[side]), **compared[side]} for side in rounds})

    def _row(self, shared_tokens: int, side: str, found: Sequence[Round]) -> dict[str, Any]:
        options, described = self._options, self._described[side]
        has_relay = found[-1].counted.has_relay
        metrics = load.metrics_of([one.answered for one in found], self._options.goodput)
        return {
            **self._facts.columns(described),
            "status": "complete" if len(found) == options.rounds else "partial",
            "workload": _workload(options),
            "api": str(options.api),
            "loop": options.load.name,
            "request_rate": options.request_rate or "",
            "max_concurrency": options.max_concurrency or "",
            "requests": len(found[0].answered.samples),
            "contexts": options.contexts if options.shares_text and options.workload is not Workload.CHAT else "",
            "shared_tokens": shared_tokens if not options.dataset else "",
            "question_tokens": "" if options.dataset else "-".join(map(str, options.question_tokens)),
            "generated_tokens": "" if options.dataset else options.generate,
            "block_size": described["block_size"],
            "default_block_size": described.get("default_block_size", ""),
            "cache": options.cache.value,
            "seed": options.seed,
            "side": str(side),
            "relay": "on" if has_relay else "off",
            **({"backend": "", "kernel": ""} if side not in tuple(Side) else backend_and_kernel(side, self._described)),
            "rounds": len(found),
            **{name: round(value, 3) for name, value in metrics.items()},
            "slo": " ".join(f"{name}:{value:g}" for name, value in self._options.goodput.items()),
            **({} if self._options.goodput else {"goodput": ""}),
            "other_side_cpu_percent": round(100 * max(one.others_cpu for one in found), 1),
            **summed([one.counted.counts for one in found if has_relay], tuple(RELAY_SAMPLES)),
            **summed([one.counted.counts for one in found], tuple(VLLM_SAMPLES)),
            "fallbacks": _fallbacks(found),
        }

    def _compared(self, shared_tokens: int, found: Mapping[str, Sequence[Round]]) -> dict[str, dict[str, Any]]:
        """What rows say of one side against the other; of a server that ran already, only of itself."""
        names = [name for name in SERVE_COLUMNS if "_speedup_" in name or name.startswith("throughput_gain_")]
        texts = {side: [_beginnings(one) for one in rounds] for side, rounds in found.items()}
        if len(found) == 1:
            empty = dict.fromkeys([*names, "best_other", "equal_answers", "equal_text", "self_equal_text"], "")
            return {side: dict(empty) for side in found}
        stock, relay = found[Side.STOCK], found[Side.RELAY]
        equal, *of_itself = agreement(texts[Side.STOCK], texts[Side.RELAY])
        check_answers(f"{shared_tokens} shared tokens", equal, min(of_itself))
        pairs = [
            (one, other)
            for left, right in zip(stock, relay, strict=True)
            for one, other in zip(left.answered.texts, right.answered.texts, strict=True)
        ]
        by_round = [
            [load.metrics_of([one.answered], self._options.goodput) for one in rounds] for rounds in (stock, relay)
        ]
        common: dict[str, Any] = {
            "best_other": "stock vLLM",
            "equal_answers": round(sum(one == other for one, other in pairs) / len(pairs), 4),
            "equal_text": round(equal, 4),
        }
        for metric in COMPARED:
            common |= _spread(f"{metric}_speedup", *(_column(side, f"{metric}_p50_ms") for side in by_round))
        common |= _spread(
            "throughput_gain", *(_column(side, "output_tokens_per_second") for side in reversed(by_round))
        )
        return {
            side: {**common, "self_equal_text": round(itself, 4)} for side, itself in zip(Side, of_itself, strict=True)
        }

    def __str__(self) -> str:
        header = (
            *("shared", "prompt", "side", "relay", "TTFT ms p50/p90/p99", "TPOT ms p50/p90/p99", "ITL ms p50/p90/p99"),
            *("E2E ms p50/p90/p99", "out tok/s", "req/s", "good/s", "relay steps", "KV tokens saved", "cache hits"),
        )
        lines = [self._cells(row) for pair in self.rows for row in pair.values()]
        return "\n".join([self._heading(), table(header, lines), *self._ending(self._verdicts())])

    def _heading(self) -> str:
        options, arrival = self._options, self._options.load
        sides = self._described
        if Side.STOCK in sides:
            top = self._facts.heading(sides)
        else:
            (row,) = self.rows[0].values()
            top = (
                f"\n{self._facts.where()}\n{self._facts.model} at {options.url}, "
                f"vLLM {row['vllm_version'] or 'unknown'}, relay {row['relay']}, block size "
                f"{row['block_size'] or 'unknown'}; only this server was measured, "
                "with nothing to compare it with\n"
            )
        rate = "closed loop" if arrival.request_rate is None else f"Poisson, {arrival.request_rate:g} requests/s"
        at_a_time = f", at most {arrival.max_concurrency} at a time" if arrival.max_concurrency else ""
        limits = " ".join(f"{name}:{value:g}" for name, value in self._options.goodput.items())
        return (
            f"{top}{_workload(options)} over /v1/{options.api}, {rate}{at_a_time}; {options.cache} prefix cache; seed "
            f"{options.seed}{f'; good within {limits} ms' if limits else ''}\n"
        )

    def _cells(self, row: Mapping[str, Any]) -> list[str]:
        def three(metric: str) -> str:
            return "/".join(f"{row[f'{metric}_p{percentile}_ms']:.1f}" for percentile in load.PERCENTILES)

        on = row["relay"] == "on"
        return [
            str(row["shared_tokens"]),
            f"{row['prompt_tokens']:.0f}",
            str(row["side"]),
            str(row["relay"]),
            *(three(metric) for metric in load.METRICS),
            f"{row['output_tokens_per_second']:.1f}",
            f"{row['requests_per_second']:.2f}",
            f"{row['goodput']:.2f}" if row["slo"] else "-",
            f"{row['relay_steps']}/{row['eligible_steps']} of {row['steps']}" if on else "-",
            str(row["kv_tokens_saved"]) if on else "-",
            f"{100 * row['prefix_hits'] / max(row['prefix_queries'], 1):.0f} %",
        ]

    def _verdicts(self) -> list[str]:
        lines = []
        for pair in self.rows:
            rows = list(pair.values())
            where = f"{rows[0]['shared_tokens']} shared" if not self._options.dataset else _workload(self._options)
            if len(rows) == 2:
                gains = ", ".join(
                    f"{name} {rows[1][f'{column}_median']} ({rows[1][f'{column}_min']}-{rows[1][f'{column}_max']})"
                    for name, column in (
                        ("TPOT", "tpot_speedup"),
                        ("TTFT", "ttft_speedup"),
                        ("E2E", "e2el_speedup"),
                        ("tok/s", "throughput_gain"),
                    )
                )
                lines.append(
                    f"{where}: relay against {rows[1]['best_other']}, the best alternative of this run, times better "
                    f"(min-max over rounds): {gains}; equal answers {100 * rows[1]['equal_answers']:.0f} %, equal text "
                    f"{100 * rows[1]['equal_text']:.0f} % (itself {100 * rows[1]['self_equal_text']:.0f} %)"
                )
            lines += [f"{where}, {row['side']}: fell back: {row['fallbacks']}" for row in rows if row["fallbacks"]]
            lines += notes(where, rows)
        return lines

    def panels(self) -> list[Panel]:
        title = f"{_workload(self._options)}, {self._options.load.name} loop"
        shown = (("tpot_p50_ms", "TPOT, ms"), ("ttft_p50_ms", "TTFT, ms"), ("output_tokens_per_second", "tokens/s"))
        return [Panel(title, cost, self._points(column, self.rows)) for column, cost in shown]


def _workload(options: ServeOptions) -> str:
    return f"{DATASET}:{options.dataset.dataset_name}" if options.dataset else options.workload.value


def _beginnings(one: Round) -> list[str]:
    return [text[:LETTERS] for text in one.answered.texts]


def _column(rounds: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [metrics[name] for metrics in rounds]


def _spread(name: str, above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """Empty where a ratio is none, as of the time between tokens of answers with one token."""
    found: Spread | None = spread_of_ratios(above, below) if all(below) else None
    return {f"{name}_{of}": "" if found is None else round(getattr(found, of), 4) for of in ("median", "min", "max")}


def _fallbacks(found: Sequence[Round]) -> str:
    """``reason=count``, of all rounds."""
    total: dict[str, float] = {}
    for one in found:
        for reason, count in one.counted.fallbacks.items():
            total[reason] = total.get(reason, 0) + count
    return " ".join(f"{reason}={count:.0f}" for reason, count in sorted(total.items()) if count)


# ---------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = ServeOptions()
    add = parser.add_argument
    add("--url", default="", help="measure this running server only, instead of starting stock and relay")
    add(
        "--workload",
        choices=[workload.value for workload in Workload],
        default=defaults.workload.value,
        help="who shares what (%(default)s); image needs a model that sees: relay-seg-tiny is the default for it",
    )
    add("--dataset-name", metavar="NAME", help="one of vLLM's datasets instead, with every dataset option of its own")
    add("--dataset-path", metavar="PATH", help="of that dataset")
    add("--api", choices=[api.value for api in Api], help="(default: completions; chat for image)")
    add("--requests", "--num-prompts", type=int, default=defaults.requests, metavar="N", help="a round (%(default)s)")
    add(
        "--shared",
        type=integers,
        default=(),
        metavar="N,...",
        help=f"tokens that others begin with too (default: {','.join(map(str, SHARED))}, as far as the context goes)",
    )
    add("--contexts", type=int, default=defaults.contexts, metavar="N", help="tenants, agents, documents (%(default)s)")
    add("--zipf", type=float, default=defaults.zipf, metavar="S", help="exponent of tenants' shares (%(default)s)")
    add(
        "--generate",
        type=int,
        default=defaults.generate,
        metavar="N",
        help="tokens of an answer, but for datasets (%(default)s)",
    )
    add("--request-rate", type=float, metavar="R", help="open loop: requests a second, as a Poisson process")
    add(
        "--max-concurrency",
        type=int,
        metavar="N",
        help=f"requests at a time (default: {CLOSED_LOOP_CONCURRENCY} without --request-rate, else any number)",
    )
    add("--goodput", nargs="+", metavar="NAME:MS", help="count requests within ttft:MS tpot:MS e2el:MS, any of these")
    add("--cache", choices=tuple(Cache), default=defaults.cache.value, help="what is shared is cached before, or not")
    add("--server-flags", default="", metavar="FLAGS", help="more of vLLM's flags, for both servers, in quotes")
    run_options.add_arguments(parser, defaults, RESULTS)


def options_of(args: argparse.Namespace) -> ServeOptions:
    """Raises BenchArgumentError."""
    if args.dataset_path and not args.dataset_name:
        raise BenchArgumentError(f"--dataset-path {args.dataset_path} is of no dataset; give --dataset-name too")
    if args.url:
        _check_left_out(args)
    return ServeOptions(
        url=args.url,
        workload=Workload(args.workload),
        dataset=args.dataset,
        api=Api(args.api) if args.api else None,
        requests=args.requests,
        shared=args.shared,
        contexts=args.contexts,
        zipf=args.zipf,
        generate=args.generate,
        request_rate=args.request_rate,
        max_concurrency=args.max_concurrency,
        cache=Cache(args.cache),
        goodput=load.goodput_of(args.goodput),
        **run_options.chosen(args),
    )


def _check_left_out(args: argparse.Namespace) -> None:
    """A running server is measured as it is: raises BenchArgumentError for what is of servers that are started here."""
    if args.model:
        raise BenchArgumentError(f"--url {args.url} serves its own model: leave out {args.model!r}")
    mine = ("dtype", "block_size", "max_model_len", "kv_cache_memory_bytes", "enforce_eager")
    defaults = {**vars(ServeOptions()), "kv_cache_memory_bytes": ServeOptions().kv_cache_bytes, "server_flags": ""}
    for name in (*mine, "server_flags"):
        if (value := getattr(args, name)) != defaults[name]:
            flag = f"--{name.replace('_', '-')}"
            raise BenchArgumentError(f"{flag} {value} is of servers started here: leave it out with --url {args.url}")


def run(args: argparse.Namespace) -> None:
    """Measure, append and print. Raises RelayServingError; rows of what was measured by then are kept."""
    options = options_of(args)
    flags = words_of(args.server_flags)
    embedded = embedded_model.RELAY_SEG if options.workload is Workload.IMAGE else embedded_model.SMOLLM2
    results_file = ResultsFile(args.output or RESULTS_FOLDER / RESULTS, SERVE_COLUMNS)
    if not options.url and (context := context_of(args.model)) is not None:
        options.within(min(context, options.max_model_len or context))
    results_file.prepare()
    facts = RunFacts.now(shown_name(args.model, embedded))
    picture = plot_path(args.plot, results_file.path, facts.began)
    with _targets(options, args.model, embedded, facts, flags) as targets:
        facts = replace(facts, model=targets[0].server.model)
        options = options.within(targets[0].described["max_model_len"] or options.max_model_len or 2**31)
        report = Report(facts, options, {target.side: target.described for target in targets}, results_file)
        with report.told(picture):
            measure_all(targets, options, report.keep)


@contextmanager
def _targets(
    options: ServeOptions, model: str | None, embedded: str, facts: RunFacts, flags: Sequence[str]
) -> Iterator[list[Target]]:
    """The server that runs already, or two that are started for the time being."""
    if options.url:
        server = Server(options.url)
        yield [Target("server", server, server.describe())]
        return
    folder = model or str(embedded_model.prepare(embedded))
    arguments = options.vllm_arguments(folder, max_num_seqs=max(128, options.max_concurrency or 0))
    settings = RelaySettings.from_environment()
    with running_servers(arguments, flags, settings, options.seed, facts.model) as (processes, servers, described):
        yield [
            Target(side, servers[side], described[side], tuple(processes[other] for other in Side if other is not side))
            for side in Side
        ]

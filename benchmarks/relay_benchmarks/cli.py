"""`vllm-relay bench ...`, also `python -m relay_benchmarks ...`: flags in, an exit status out.

An exit status is 0 after a whole run, 1 or 2 after an error (one line on stderr), 130 or 143 after Ctrl-C or SIGTERM.
Rows of the shapes that were measured by then are in the results file in every case.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from relay_benchmarks import drafting, kernel, load, refining, run_options, segmentation, serve, throughput
from relay_benchmarks.decode import DecodeOptions, Report, Workload, run_decode
from relay_benchmarks.machine import Machine
from relay_benchmarks.pair import context_of, running_engines, shown_name
from relay_benchmarks.plots import plot_path
from relay_benchmarks.results_file import RESULTS_FOLDER, ResultsFile
from relay_benchmarks.run_facts import RunFacts
from relay_benchmarks.run_options import integers
from relay_benchmarks.sides import Side
from relay_models.errors import RelayModelsError
from relay_serving import embedded_model
from relay_serving.errors import RelayServingError
from relay_serving.settings import RelaySettings

_DEFAULTS = DecodeOptions()


def add_bench_parser(subparsers: Any) -> None:
    """Add `bench` with its experiments to the subparsers of a command line."""
    bench = subparsers.add_parser("bench", help="measure relay against stock vLLM")
    _add_experiments(bench)


def run(args: argparse.Namespace) -> int:
    """Run the parsed experiment. Errors are printed, not raised."""
    return _Interruptible().run(args)


def main(argv: Sequence[str] | None = None) -> int:
    return run(parse(make_parser(), argv))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m relay_benchmarks")
    _add_experiments(parser)
    return parser


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """As `parse_args`; where one of vLLM's datasets is named, options of it are vLLM's own to read."""
    given = list(sys.argv[1:] if words is None else words)
    dataset = None
    if "serve" in given and any(word.partition("=")[0] == "--dataset-name" for word in given):
        try:
            dataset, given = load.parse_dataset_options(given)
        except RelayServingError as error:
            parser.error(str(error))
    args = parser.parse_args(given)
    args.dataset = dataset
    return args


def _add_experiments(parser: argparse.ArgumentParser) -> None:
    experiments = parser.add_subparsers(dest="experiment", required=True)
    decode = experiments.add_parser(
        "decode",
        help="time per output token against the length of a shared prompt",
        description="Stock vLLM and relay in one run: two engines, alternated, one working at a time.",
    )
    add = decode.add_argument
    add(
        "--workload",
        choices=[workload.value for workload in Workload],
        default=_DEFAULTS.workload.value,
        help="shared: one prompt for all, or none: nothing shared, batches 1,64,256 (default: %(default)s)",
    )
    add("--batch", type=integers, default=(), metavar="N,...", help="requests decoding together (default: 64)")
    add("--shared", type=integers, default=(), metavar="N,...", help="shared tokens (default: 0,2432,7168)")
    add("--decode", type=int, default=_DEFAULTS.steps, metavar="N", help="timed steps a round (%(default)s)")
    run_options.add_arguments(decode, _DEFAULTS, "<machine>.csv")
    decode.set_defaults(run_experiment=_decode)
    jobs = experiments.add_parser(
        "throughput",
        help="requests and tokens a second of a fixed batch job, against the length of a shared prompt",
        description="A fixed number of requests, all given at once: stock vLLM and relay in one run, alternated.",
    )
    throughput.add_arguments(jobs)
    jobs.set_defaults(run_experiment=throughput.run)
    traffic = experiments.add_parser(
        "serve",
        help="latencies and throughput of servers under HTTP traffic that shares prompts",
        description="Stock vLLM and relay as servers, alternated, or one running server: streamed requests over HTTP.",
        allow_abbrev=False,
    )
    serve.add_arguments(traffic)
    traffic.set_defaults(run_experiment=serve.run)
    layer = experiments.add_parser(
        "kernel",
        help="one layer's decode attention, kernel against kernel",
        description="Relay's kernel and every other that is installed, checked against float64, on the same step.",
    )
    kernel.add_arguments(layer)
    layer.set_defaults(run_experiment=_kernel)
    rows = experiments.add_parser(
        "drafting",
        help="passes a token of drafted segmentation answers, against vLLM's n-gram",
        description="Replays ground-truth descriptors: tokens of three formats, and passes with n-gram and row drafts.",
    )
    drafting.add_arguments(rows)
    rows.set_defaults(run_experiment=_drafting)
    servers = experiments.add_parser(
        "segmentation",
        help="two running servers of one segmentation model, asked the same by turns",
        description="Wall time, engine steps and answers of two running servers, and where their answers part.",
    )
    segmentation.add_arguments(servers)
    servers.set_defaults(run_experiment=_segmentation)
    masks = experiments.add_parser(
        "refining",
        help="what a refiner gains on coarse masks, for each way to prompt it",
        description="gIoU and cIoU of coarse and of refined masks against ground truth, with intervals, by area.",
    )
    refining.add_arguments(masks)
    masks.set_defaults(run_experiment=_refining)


def _kernel(args: argparse.Namespace) -> None:
    print(kernel.result_table(kernel.run(args, lambda text: print(text, file=sys.stderr, flush=True))), flush=True)


def _drafting(args: argparse.Namespace) -> None:
    print(drafting.report(drafting.run(args)), flush=True)


def _segmentation(args: argparse.Namespace) -> None:
    print(segmentation.report(segmentation.run(args)), flush=True)


def _refining(args: argparse.Namespace) -> None:
    print(refining.report(refining.run(args)), flush=True)


def _decode(args: argparse.Namespace) -> None:
    options = DecodeOptions(
        workload=Workload(args.workload),
        batch=args.batch,
        shared=args.shared,
        steps=args.decode,
        **run_options.chosen(args),
    )
    settings = RelaySettings.from_environment()
    results_file = ResultsFile(args.output or RESULTS_FOLDER / f"{Machine.here().name}.csv")
    if (context := context_of(args.model)) is not None:
        options.check_context(min(context, options.max_model_len or context))
    results_file.prepare()
    facts = RunFacts.now(shown_name(args.model))
    picture = plot_path(args.plot, results_file.path, facts.began)
    model = args.model or str(embedded_model.prepare())
    with running_engines(options.engine_args(model), settings, options.seed, facts.model) as (engines, described):
        options.check_context(described[Side.STOCK]["max_model_len"])
        options.check_cache(described[Side.STOCK]["num_blocks"], described[Side.STOCK]["block_size"])
        report = Report(facts, options, described, results_file)
        with report.told(picture):
            run_decode(engines, options, described[Side.STOCK]["block_size"], report.keep)


class _Interruptible:
    """Runs an experiment so that SIGTERM, like Ctrl-C, unwinds it; both once only: clean-up is not cut short."""

    def __init__(self) -> None:
        self._stopped_by: int | None = None

    def run(self, args: argparse.Namespace) -> int:
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            args.run_experiment(args)
        except KeyboardInterrupt:
            return 128 + (self._stopped_by or signal.SIGINT)
        except (RelayServingError, RelayModelsError) as error:
            print(f"vllm-relay bench: error: {error}", file=sys.stderr)
            return getattr(error, "exit_status", 1)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return 0

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._stopped_by is not None:
            return
        self._stopped_by = number
        print("vllm-relay bench: stopping", file=sys.stderr, flush=True)
        raise KeyboardInterrupt

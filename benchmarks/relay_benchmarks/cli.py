"""`vllm-relay bench ...`, also `python -m relay_benchmarks ...`: flags in, an exit status out.

An exit status is 0 after a whole run, 1 or 2 after an error (one line on stderr), 130 or 143 after Ctrl-C or SIGTERM.
Rows of the shapes that were measured by then are in the results file in every case.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from relay_benchmarks import drafting, kernel, refining, segmentation
from relay_benchmarks.decode import DecodeOptions, Report, RunFacts, Workload, run_decode
from relay_benchmarks.errors import BenchArgumentError
from relay_benchmarks.machine import Machine
from relay_benchmarks.results_file import RESULTS_FOLDER, ResultsFile
from relay_benchmarks.sides import Engine, Side, check_sides, close_all, environment_of
from relay_models.errors import RelayModelsError
from relay_serving import embedded_model
from relay_serving.errors import ModelNotFoundError, RelayServingError
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
    parser = argparse.ArgumentParser(prog="python -m relay_benchmarks")
    _add_experiments(parser)
    return run(parser.parse_args(argv))


def _add_experiments(parser: argparse.ArgumentParser) -> None:
    experiments = parser.add_subparsers(dest="experiment", required=True)
    decode = experiments.add_parser(
        "decode",
        help="time per output token against the length of a shared prompt",
        description="Stock vLLM and relay in one run: two engines, alternated, one working at a time.",
    )
    add = decode.add_argument
    add("model", nargs="?", help="hub id or folder; the embedded SmolLM2-135M-Instruct if left out")
    add(
        "--workload",
        choices=[workload.value for workload in Workload],
        default=_DEFAULTS.workload.value,
        help="shared: one prompt for all, or none: nothing shared, batches 1,64,256 (default: %(default)s)",
    )
    add("--batch", type=_integers, default=(), metavar="N,...", help="requests decoding together (default: 64)")
    add("--shared", type=_integers, default=(), metavar="N,...", help="shared tokens (default: 0,2432,7168)")
    low, high = _DEFAULTS.question_tokens
    add("--question", type=_range, default=(low, high), metavar="LOW-HIGH", help=f"question tokens ({low}-{high})")
    add("--decode", type=int, default=_DEFAULTS.steps, metavar="N", help="timed steps a round (%(default)s)")
    add("--rounds", type=int, default=_DEFAULTS.rounds, metavar="N", help="alternated pairs (%(default)s)")
    add("--dtype", default=_DEFAULTS.dtype, choices=("bfloat16", "float16", "float32"), help="(%(default)s)")
    add("--block-size", type=int, metavar="N", help="cache block of both sides (default: vLLM's)")
    add("--max-model-len", type=int, metavar="N", help="context of both sides (default: the model's)")
    add(
        "--kv-cache-memory-bytes",
        type=int,
        default=_DEFAULTS.kv_cache_bytes,
        metavar="N",
        help="KV cache of each side (%(default)s)",
    )
    add(
        "--enforce-eager",
        action=argparse.BooleanOptionalAction,
        default=_DEFAULTS.enforce_eager,
        help="do not compile the model, on either side (default: compile, as the server does)",
    )
    add("--seed", type=int, default=_DEFAULTS.seed, metavar="N", help="of the prompts (%(default)s)")
    add("--output", type=Path, metavar="CSV", help="append rows here (default: results/<machine>.csv of this package)")
    decode.set_defaults(run_experiment=_decode)
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


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)


_integers.__name__ = "list of whole numbers"  # argparse names the type by it
_range.__name__ = "range"


def _decode(args: argparse.Namespace) -> None:
    options = DecodeOptions(
        workload=Workload(args.workload),
        batch=args.batch,
        shared=args.shared,
        question_tokens=args.question,
        steps=args.decode,
        rounds=args.rounds,
        dtype=args.dtype,
        block_size=args.block_size,
        max_model_len=args.max_model_len,
        kv_cache_bytes=args.kv_cache_memory_bytes,
        enforce_eager=args.enforce_eager,
        seed=args.seed,
    )
    settings = RelaySettings.from_environment()
    results_file = ResultsFile(args.output or RESULTS_FOLDER / f"{Machine.here().name}.csv")
    if args.model is not None:
        _check_model(args.model, options)
    results_file.prepare()
    model = args.model or str(embedded_model.prepare())
    facts = RunFacts.now(_shown_name(args.model))

    engines: dict[Side, Engine] = {}
    report: Report | None = None
    keeps_logs = True
    try:
        for side in Side:
            engines[side] = Engine(side, environment_of(side, os.environ))
        described = _start(engines, options.engine_args(model), settings, options.seed)
        check_sides(described)
        options.check_context(described[Side.STOCK]["max_model_len"])
        options.check_cache(described[Side.STOCK]["num_blocks"], described[Side.STOCK]["block_size"])
        report = Report(facts, options, described, results_file)
        run_decode(engines, options, described[Side.STOCK]["block_size"], report.keep)
        keeps_logs = False
    except (KeyboardInterrupt, BenchArgumentError):
        keeps_logs = False  # nothing an engine did
        raise
    finally:
        close_all(engines.values())
        if not keeps_logs:
            for engine in engines.values():
                engine.forget_log()
        if report is not None and report.rows:
            print(report, flush=True)


def _start(
    engines: dict[Side, Engine], engine_args: dict[str, Any], settings: RelaySettings, seed: int
) -> dict[Side, dict[str, Any]]:
    """Start both at once; nothing is measured yet. Returns what each says of itself."""
    began = time.monotonic()
    for side, engine in engines.items():
        print(f"starting {side} (log: {engine.log_path})", file=sys.stderr, flush=True)
        ours = {"additional_config": settings.to_additional_config()} if side is Side.RELAY else {}
        engine.request("start", engine_args={**engine_args, **ours})
    described = {}
    for side, engine in engines.items():
        engine.answer()
        described[side] = engine.call("describe", check_kernel=side is Side.RELAY, seed=seed)
        backend = described[side]["backends"]
        print(f"{side} is up after {time.monotonic() - began:.0f} s: {', '.join(backend)}", file=sys.stderr, flush=True)
    return described


def _check_model(model: str, options: DecodeOptions) -> None:
    """What can be known of a model before a minute is spent on starting it twice."""
    if not os.path.exists(model):
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise ModelNotFoundError(f"no model folder at {model!r}; check the path, or leave it out")
        return
    config = Path(model) / "config.json"
    if not config.is_file():
        raise ModelNotFoundError(f"{model!r} holds no config.json; name the folder of a Hugging Face model")
    try:
        context = json.loads(config.read_text())["max_position_embeddings"]
    except (ValueError, KeyError):
        return
    options.check_context(min(context, options.max_model_len or context))


def _shown_name(model: str | None) -> str:
    """The name in tables and rows: of a folder only its last part."""
    if model is None:
        return embedded_model.SMOLLM2
    return Path(model).resolve().name if os.path.exists(model) else model


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

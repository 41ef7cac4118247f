"""The decode benchmark with engines that only pretend: what is measured when, what is kept, what is refused."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from pretended import BLOCK, FACTS, PretendNeighbour, described, rows_of

from relay_benchmarks import cli, decode, pair
from relay_benchmarks.decode import DecodeOptions, Report, Workload, run_decode
from relay_benchmarks.errors import BenchArgumentError, ComparisonError
from relay_benchmarks.results_file import ResultsFile
from relay_benchmarks.sides import Side
from relay_benchmarks.workload import Shape

OPTIONS = DecodeOptions(batch=(2,), shared=(0, 256), steps=3, rounds=4)


class PretendEngine(PretendNeighbour):
    """Answers as an engine would."""

    def __init__(self, side: Side, calls: list[tuple[str, Side]], step_ms: float, stop_after: int = 10**6) -> None:
        super().__init__(side, calls)
        self.step_ms = step_ms
        self.stop_after = stop_after
        self.cached_tokens: int | None = None

    def warm(self, shape: Shape, seed: int) -> None:
        self.calls.append(("warm", self.side))

    def measure(self, shape: Shape, seed: int, steps: int) -> dict[str, Any]:
        self.calls.append(("measure", self.side))
        if sum(call == ("measure", self.side) for call in self.calls) > self.stop_after:
            raise KeyboardInterrupt
        cached = shape.shared_tokens // BLOCK * BLOCK if self.cached_tokens is None else self.cached_tokens
        step = self.step_ms * (1 + shape.shared_tokens / 256) / 1e3
        gained = {"steps": 5, "eligible_steps": 4, "relay_steps": 4, "layer_calls": 8, "kv_tokens_saved": 640}
        is_relay = self.side is Side.RELAY
        return {
            "seconds": [step] * (steps - 1) + [9.0],  # one outlier that a median ignores
            "tokens": [[1, 2, 3, 4]] * (shape.batch - 1) + [[1, 2, 3, 5 if is_relay else 4]],
            "cached_tokens": cached,
            "counters": gained if is_relay else None,
            "timed_counters": {"steps": 3, "planning_ns": 60_000} if is_relay else None,
        }


def engines(stop_after: int = 10**6) -> tuple[dict[Side, PretendEngine], list[tuple[str, Side]]]:
    calls: list[tuple[str, Side]] = []
    return {
        Side.STOCK: PretendEngine(Side.STOCK, calls, step_ms=20.0),
        Side.RELAY: PretendEngine(Side.RELAY, calls, step_ms=10.0, stop_after=stop_after),
    }, calls


def report(path: Path, options: DecodeOptions = OPTIONS) -> Report:
    file = ResultsFile(path)
    file.prepare()
    return Report(FACTS, options, {side: described(side) for side in Side}, file)


def test_both_are_measured_in_every_round_in_an_order_that_flips(tmp_path: Path) -> None:
    pair, calls = engines()
    run_decode(pair, OPTIONS, BLOCK, report(tmp_path / "a.csv").keep)
    order = [side for call, side in calls if call == "measure"]
    stock_first, relay_first = [Side.STOCK, Side.RELAY], [Side.RELAY, Side.STOCK]
    assert order == (stock_first + relay_first) * 2 * 2  # four rounds, two shapes


def test_the_other_engine_is_quiet_before_each_measurement(tmp_path: Path) -> None:
    pair, calls = engines()
    run_decode(pair, OPTIONS, BLOCK, report(tmp_path / "a.csv").keep)
    for before, (call, side) in itertools.pairwise(calls):
        if call == "measure":
            assert before == ("quiet", Side.RELAY if side is Side.STOCK else Side.STOCK)


def test_rows_say_what_was_measured(tmp_path: Path) -> None:
    pair, _ = engines()
    kept = report(tmp_path / "a.csv")
    run_decode(pair, OPTIONS, BLOCK, kept.keep)
    rows = rows_of(tmp_path / "a.csv")
    assert [(row["side"], row["shared_tokens"]) for row in rows] == [
        *(("stock", "0"), ("relay", "0"), ("stock", "256"), ("relay", "256"))
    ]
    stock, relay = rows[2:]
    assert (float(stock["p50_ms"]), float(relay["p50_ms"])) == (40.0, 20.0)
    assert stock["round_medians_ms"] == "40.000;40.000;40.000;40.000"
    assert {row["speedup_median"] for row in rows} == {"2.0"}
    assert (stock["ratio_to_no_prompt"], relay["ratio_to_no_prompt"]) == ("2.0", "2.0")
    assert (rows[0]["cache"], relay["cache"]) == ("nothing shared", "warm")
    assert {row["equal_tokens"] for row in rows} == {"0.875"}
    assert {row["self_equal_tokens"] for row in rows} == {"1.0"}
    assert (relay["relay_steps"], relay["eligible_steps"], relay["steps"]) == ("16", "16", "20")
    assert stock["relay_steps"] == stock["planning_us"] == ""
    assert (float(relay["planning_us"]), float(relay["planning_percent"])) == (20.0, 0.1)
    assert {(row["status"], row["rounds"]) for row in rows} == {("complete", "4")}
    assert "20 us = 0.10 %" in str(kept)
    assert "2.000 (2.000-2.000)" in str(kept)
    assert "relay/stock 0.500 (0.500-0.500) over 4 alternated round(s)" in str(kept)


def test_whole_rounds_are_kept_when_a_run_is_interrupted(tmp_path: Path) -> None:
    pair, _ = engines(stop_after=6)  # in the third round of the second shape
    kept = report(tmp_path / "a.csv")
    with pytest.raises(KeyboardInterrupt):
        run_decode(pair, OPTIONS, BLOCK, kept.keep)
    rows = rows_of(tmp_path / "a.csv")
    assert [(row["status"], row["rounds"]) for row in rows] == [("complete", "4")] * 2 + [("partial", "2")] * 2
    assert "cut short after 2" in str(kept)


def test_nothing_is_kept_of_a_shape_without_a_whole_round(tmp_path: Path) -> None:
    pair, _ = engines(stop_after=0)
    with pytest.raises(KeyboardInterrupt):
        run_decode(pair, OPTIONS, BLOCK, report(tmp_path / "a.csv").keep)
    assert rows_of(tmp_path / "a.csv") == []


def test_a_cold_cache_is_an_error(tmp_path: Path) -> None:
    pair, _ = engines()
    pair[Side.RELAY].cached_tokens = 128
    with pytest.raises(ComparisonError, match="128 of 256 shared tokens"):
        run_decode(pair, OPTIONS, BLOCK, report(tmp_path / "a.csv").keep)


def test_a_busy_neighbour_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, _ = engines()
    ticks = iter(range(10**6))
    monkeypatch.setattr(pair[Side.STOCK], "cpu_seconds", lambda: float(next(ticks)))
    kept = report(tmp_path / "a.csv")
    run_decode(pair, OPTIONS, BLOCK, kept.keep)
    assert "NOTE batch 2, 256 shared: the idle engine used" in str(kept)


# ---------------------------------------------------------------- options


def test_each_workload_has_its_own_shapes() -> None:
    assert [(shape.batch, shape.shared_tokens) for shape in DecodeOptions().shapes()] == [
        (64, 0),
        (64, 2432),
        (64, 7168),
    ]
    nothing = DecodeOptions(workload=Workload.NONE).shapes()
    assert [(shape.batch, shape.shared_tokens) for shape in nothing] == [(1, 0), (64, 0), (256, 0)]
    assert DecodeOptions().rounds >= 7


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"batch": (64, 0)}, "--batch 0"),
        ({"batch": (-1,)}, "--batch -1"),
        ({"batch": (10**6,)}, "--batch 1000000"),
        ({"shared": (0, -1)}, "--shared -1"),
        ({"shared": (128,), "workload": Workload.NONE}, "--shared 128"),
        ({"question_tokens": (0, 5)}, "--question 0-5"),
        ({"question_tokens": (9, 5)}, "--question 9-5"),
        ({"steps": 0}, "--decode 0"),
        ({"rounds": 0}, "--rounds 0"),
        ({"block_size": 0}, "--block-size 0"),
        ({"max_model_len": -5}, "--max-model-len -5"),
        ({"kv_cache_bytes": 0}, "--kv-cache-memory-bytes 0"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_impossible_options_are_named(wrong: dict[str, Any], names: str) -> None:
    with pytest.raises(BenchArgumentError) as caught:
        DecodeOptions(**wrong)
    assert str(caught.value).startswith(names)


def test_the_longest_request_must_fit_the_context() -> None:
    longest = 256 + 60 + 3 + 64
    OPTIONS.check_context(longest)
    with pytest.raises(BenchArgumentError, match=f"make {longest}, over the model's context of {longest - 1}"):
        OPTIONS.check_context(longest - 1)


def test_the_batch_must_fit_the_cache() -> None:
    needed = 1 + 2 + 2 * 1
    OPTIONS.check_cache(needed, BLOCK)
    with pytest.raises(BenchArgumentError, match=f"needs {needed} cache blocks"):
        OPTIONS.check_cache(needed - 1, BLOCK)


# ---------------------------------------------------------------- the command line


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 1024}))
    return str(folder)


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(pair, "Engine", started)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batch", "0"], "--batch 0 is not possible"),
        (["--shared", "1000"], "over the model's context of 1024"),
        (["--shared", "300", "--max-model-len", "400"], "over the model's context of 400"),
        (["--decode", "-3"], "--decode -3"),
        (["--output", "/proc/no/such.csv"], "cannot append to the results file"),
    ],
)
@pytest.mark.usefixtures("no_engine")
def test_bad_input_is_one_line_before_anything_starts(
    model: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "a.csv")]
    shapes = [] if "--shared" in arguments else ["--shared", "0"]
    assert cli.main(["decode", model, *shapes, *arguments, *output]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1


@pytest.mark.usefixtures("no_engine")
def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for path, says in ((tmp_path / "nowhere", "no model folder"), (tmp_path / "empty", "no config.json")):
        assert cli.main(["decode", str(path), "--output", str(tmp_path / "a.csv")]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["decode", "--batch", "many"], ["decode", "--nope"], ["encode"]])
def test_argparse_refuses_the_rest(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_unwinds_the_run_once(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned_up = []

    def experiment(args: object) -> None:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            os.kill(os.getpid(), number)  # an impatient second one
            cleaned_up.append(True)

    before = signal.getsignal(number)
    parser_args = cli.argparse.Namespace(run_experiment=experiment)
    assert cli.run(parser_args) == 128 + number
    assert cleaned_up == [True]
    assert signal.getsignal(number) is before


def test_bench_joins_another_command_line() -> None:
    parser = cli.argparse.ArgumentParser()
    cli.add_bench_parser(parser.add_subparsers(dest="command"))
    args = parser.parse_args(["bench", "decode", "--batch", "1,64", "--question", "3-9", "--no-enforce-eager"])
    assert (args.batch, args.question, args.enforce_eager) == ((1, 64), (3, 9), False)
    assert decode.DecodeOptions().enforce_eager is False  # as the server does

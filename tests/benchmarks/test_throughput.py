"""The throughput benchmark with engines that only pretend: what is measured when, what is kept, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pretended import BLOCK, FACTS, PretendNeighbour, described, rows_of

from relay_benchmarks import cli, pair
from relay_benchmarks.errors import BenchArgumentError, ComparisonError
from relay_benchmarks.results_file import ResultsFile
from relay_benchmarks.run_options import Cache
from relay_benchmarks.sides import Side
from relay_benchmarks.throughput import THROUGHPUT_COLUMNS, Report, ThroughputOptions, measure_all
from relay_benchmarks.workload import Shape

OPTIONS = ThroughputOptions(requests=2, concurrency=2, shared=(0, 256), generate=3, rounds=2)


class PretendEngine(PretendNeighbour):
    """Answers as an engine would."""

    def __init__(self, side: Side, calls: list[tuple[str, Side]], seconds: float, stop_after: int = 10**6) -> None:
        super().__init__(side, calls)
        self.seconds = seconds
        self.stop_after = stop_after
        self.last_token = 3
        self.cached: int | None = None

    def complete(self, shape: Shape, seed: int, generate: int, is_warm: bool) -> dict[str, Any]:
        self.calls.append(("complete" if generate == OPTIONS.generate else "warm up", self.side))
        if sum(call == ("complete", self.side) for call in self.calls) > self.stop_after:
            raise KeyboardInterrupt
        cached = shape.shared_tokens // BLOCK * BLOCK if is_warm else 0
        gained = {"steps": 5, "eligible_steps": 4, "relay_steps": 4, "layer_calls": 8, "kv_tokens_saved": 640}
        return {
            "seconds": self.seconds,
            "tokens": [[1, 2, self.last_token]] * shape.batch,
            "prompt_tokens": 100,
            "cached_tokens": cached if self.cached is None else self.cached,
            "counters": gained if self.side is Side.RELAY else None,
        }


def engines(stop_after: int = 10**6) -> tuple[dict[Side, PretendEngine], list[tuple[str, Side]]]:
    calls: list[tuple[str, Side]] = []
    stock = PretendEngine(Side.STOCK, calls, seconds=2.0)
    return {Side.STOCK: stock, Side.RELAY: PretendEngine(Side.RELAY, calls, 0.5, stop_after)}, calls


def report(path: Path, options: ThroughputOptions = OPTIONS) -> Report:
    file = ResultsFile(path, THROUGHPUT_COLUMNS)
    file.prepare()
    return Report(FACTS, options, {side: described(side) for side in Side}, file)


def test_both_are_measured_in_every_round_beside_a_quiet_neighbour(tmp_path: Path) -> None:
    both, calls = engines()
    measure_all(both, OPTIONS, BLOCK, report(tmp_path / "a.csv").keep)
    stock, relay = ("complete", Side.STOCK), ("complete", Side.RELAY)
    quiet = [("quiet", Side.RELAY), stock, ("quiet", Side.STOCK), relay]
    flipped = [("quiet", Side.STOCK), relay, ("quiet", Side.RELAY), stock]
    assert calls == [("warm up", Side.STOCK), ("warm up", Side.RELAY), *quiet, *flipped] * 2


def test_rows_say_what_was_measured(tmp_path: Path) -> None:
    both, _ = engines()
    both[Side.RELAY].last_token = 9
    kept = report(tmp_path / "a.csv")
    measure_all(both, OPTIONS, BLOCK, kept.keep)
    rows = rows_of(tmp_path / "a.csv")
    assert [(row["side"], row["shared_tokens"]) for row in rows] == [
        *(("stock", "0"), ("relay", "0"), ("stock", "256"), ("relay", "256"))
    ]
    stock, relay = rows[2:]
    assert (stock["requests_per_second"], relay["requests_per_second"]) == ("1.0", "4.0")
    assert (stock["output_tokens_per_second"], stock["total_tokens_per_second"]) == ("3.0", "53.0")
    assert {(row["speedup_median"], row["best_other"]) for row in rows} == {("4.0", "stock vLLM")}
    assert {(row["equal_tokens"], row["self_equal_tokens"]) for row in rows} == {("0.6667", "1.0")}
    assert (relay["relay_steps"], relay["steps"], stock["relay_steps"]) == ("8", "10", "")
    assert {(row["status"], row["cache"], row["rounds"]) for row in rows} == {("complete", "warm", "2")}
    assert "stock, the best alternative of this run, runs vllm.v1" in str(kept)
    assert kept.panels()[0].lines["relay"] == [(0.0, 4.0), (256.0, 4.0)]


def test_whole_rounds_are_kept_and_told_when_a_run_is_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both, _ = engines(stop_after=3)
    kept = report(tmp_path / "a.csv")
    with pytest.raises(KeyboardInterrupt), kept.told(tmp_path / "a.png"):
        measure_all(both, OPTIONS, BLOCK, kept.keep)
    assert [(row["status"], row["rounds"]) for row in rows_of(tmp_path / "a.csv")] == [
        *[("complete", "2")] * 2,
        *[("partial", "1")] * 2,
    ]
    assert "256 shared tokens: cut short after 1" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_other_answers_are_not_compared(tmp_path: Path) -> None:
    both, _ = engines()
    both[Side.RELAY].complete = lambda *_: {  # type: ignore[method-assign]
        "seconds": 0.1, "tokens": [[7, 8, 9]] * 2, "prompt_tokens": 1, "cached_tokens": 999, "counters": None
    }  # fmt: skip
    with pytest.raises(ComparisonError, match=r"0 shared tokens: only 0\.0 %"):
        measure_all(both, OPTIONS, BLOCK, report(tmp_path / "a.csv").keep)
    assert rows_of(tmp_path / "a.csv") == []


def test_a_cache_that_was_to_be_warm_is_checked(tmp_path: Path) -> None:
    both, _ = engines()
    both[Side.RELAY].cached = 128
    with pytest.raises(ComparisonError, match="128 of 256 shared tokens"):
        measure_all(both, OPTIONS, BLOCK, report(tmp_path / "a.csv").keep)


def test_a_cold_cache_may_be_cold(tmp_path: Path) -> None:
    both, _ = engines()
    options = ThroughputOptions(requests=2, shared=(256,), generate=3, rounds=1, cache=Cache.COLD)
    measure_all(both, options, BLOCK, report(tmp_path / "a.csv", options).keep)
    assert {row["cache"] for row in rows_of(tmp_path / "a.csv")} == {"cold"}


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"requests": 0}, "--requests 0"),
        ({"concurrency": 0}, "--concurrency 0"),
        ({"shared": (64, -1)}, "--shared -1"),
        ({"generate": 0}, "--generate 0"),
        ({"rounds": 0}, "--rounds 0"),
        ({"block_size": 0}, "--block-size 0"),
    ],
)
def test_impossible_options_are_named(wrong: dict[str, Any], names: str) -> None:
    with pytest.raises(BenchArgumentError) as caught:
        ThroughputOptions(**wrong)
    assert str(caught.value).startswith(names)


def test_the_lengths_of_the_paper_are_cut_to_the_context() -> None:
    assert ThroughputOptions().within(100_000).shared == (64, 256, 1024, 4096, 8192)
    assert ThroughputOptions().within(4096 + 60 + 64 - 1).shared == (64, 256, 1024, 4032)
    chosen = ThroughputOptions(shared=(4096,))
    assert chosen.within(4096 + 60 + 64) is chosen
    with pytest.raises(BenchArgumentError, match=r"--shared 4096 .* over the model's context of 4219"):
        chosen.within(4096 + 60 + 64 - 1)
    with pytest.raises(BenchArgumentError, match=r"--generate 64 make 124, over the model's context of 100"):
        ThroughputOptions().within(100)


def test_requests_at_a_time_must_fit_the_cache() -> None:
    options = ThroughputOptions(requests=100, concurrency=2, shared=(256,))
    needed = 1 + 2 + 2 * 1
    options.check_cache(needed, BLOCK)
    with pytest.raises(BenchArgumentError, match=f"--concurrency 2 with --shared 256 needs {needed} cache blocks"):
        options.check_cache(needed - 1, BLOCK)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shared", "1000"], "over the model's context of 1024"),
        (["--requests", "-3"], "--requests -3"),
        (["--output", "/proc/no/such.csv"], "cannot append to the results file"),
        (["--plot", "/no/such/folder/a.png"], "--plot /no/such/folder/a.png cannot be written"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(pair, "Engine", None)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 1024}')
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "a.csv")]
    assert cli.main(["throughput", str(tmp_path), *arguments, *output]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1


def test_flags_of_other_experiments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["throughput", "--random-input-len", "8"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --random-input-len" in capsys.readouterr().err

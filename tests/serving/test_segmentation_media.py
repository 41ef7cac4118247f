"""/v1/segmentations and what it is handed: pictures behind URLs, bodies beyond every limit, text that is no Unicode."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from relay_serving.routes.segmentations import LARGEST_BODY
from relay_serving.schemas.segmentation import MOST_IMAGES
from tiny_server import TINY_FLAGS, data_url, picture_bytes, picture_url

pytestmark = pytest.mark.e2e

PATH = "/v1/segmentations"
MIB = 1 << 20
PATIENCE_SECONDS = 60
MOST_MANY_KEYS_SECONDS = 5
MOST_MANY_KEYS_BYTES = 200 * MIB
LONGEST_MESSAGE = 2000  # characters: names what was wrong, and does not send it back whole


@pytest.fixture(scope="module")
def client(segmenting_server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=segmenting_server.url, timeout=120) as client:
        yield client


class PictureHost:
    """A web server that has pictures at some paths, and nothing at the others.

    Attributes:
        asked: the paths that were asked for.
    """

    def __init__(self, port: int, pictures: dict[str, bytes], asked: list[str]) -> None:
        self.port = port
        self.pictures = pictures
        self.asked = asked

    def put(self, path: str, data: bytes, *, host: str = "127.0.0.1") -> str:
        """Have a picture at a path; returns its URL."""
        self.pictures[path] = data
        return self.url(path, host=host)

    def url(self, path: str, *, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@pytest.fixture
def picture_host() -> Iterator[PictureHost]:
    pictures: dict[str, bytes] = {}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            data = pictures.get(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield PictureHost(server.server_port, pictures, asked)
        finally:
            server.shutdown()
            thread.join()


def results_of(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    answer = client.post(PATH, json=fields)
    assert answer.status_code == 200, answer.text[:LONGEST_MESSAGE]
    results: list[dict[str, Any]] = answer.json()["results"]
    return results


def assert_answers_still(client: httpx.Client) -> None:
    (result,) = results_of(client, image=picture_url(seed=9), expressions=["a"])
    assert result["status"] == "complete"


def refusal_of(answer: httpx.Response, *statuses: int) -> dict[str, Any]:
    """The error of an answer that must be one of these statuses, by default any 4xx."""
    shown = f"{answer.status_code} {answer.text[:LONGEST_MESSAGE]}"
    assert answer.status_code in (statuses or range(400, 500)), shown
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == answer.status_code
    assert error["message"]
    return error


# ---------------------------------------------------------------- pictures behind URLs


def test_a_fetched_picture_is_the_same_as_a_data_url(client: httpx.Client, picture_host: PictureHost) -> None:
    picture = picture_bytes(seed=31, width=61, height=43)
    url = picture_host.put("/x.png", picture)
    fields = {"expressions": ["the dog", "a cat"], "components": True}
    fetched = results_of(client, image=url, **fields)
    assert picture_host.asked == ["/x.png"]
    assert fetched == results_of(client, image=data_url(picture), **fields)
    assert fetched == results_of(client, image={"url": url}, **fields)


def test_fetched_pictures_keep_their_order(client: httpx.Client, picture_host: PictureHost) -> None:
    pictures = [picture_bytes(seed=seed, width=20 + seed, height=10 + seed) for seed in range(3)]
    urls = [picture_host.put(f"/{index}.png", picture) for index, picture in enumerate(pictures)]
    mixed = [urls[0], data_url(pictures[1]), urls[2]]
    answer = client.post(PATH, json={"images": mixed, "expressions": ["a"]})
    assert answer.status_code == 200, answer.text[:LONGEST_MESSAGE]
    assert [(image["width"], image["height"]) for image in answer.json()["images"]] == [(20, 10), (21, 11), (22, 12)]
    from_data = results_of(client, images=[data_url(picture) for picture in pictures], expressions=["a"])
    assert answer.json()["results"] == from_data


def test_a_picture_that_is_not_there_is_named(client: httpx.Client, picture_host: PictureHost) -> None:
    error = refusal_of(client.post(PATH, json={"image": picture_host.url("/gone.png"), "expressions": ["a"]}), 422)
    assert error["param"] == "image"
    assert "404" in error["message"]
    assert "gone.png" in error["message"]


def test_a_host_that_is_not_there_is_named(client: httpx.Client, free_port: int) -> None:
    url = f"http://127.0.0.1:{free_port}/x.png"
    error = refusal_of(client.post(PATH, json={"image": url, "expressions": ["a"]}), 422)
    assert error["param"] == "image"
    assert str(free_port) in error["message"]


def test_of_several_pictures_the_one_that_is_not_there_is_named(
    client: httpx.Client, picture_host: PictureHost
) -> None:
    images = [picture_host.put("/x.png", picture_bytes()), picture_host.url("/gone.png"), picture_url()]
    error = refusal_of(client.post(PATH, json={"images": images, "expressions": ["a"]}), 422)
    assert error["param"] == "images.1"
    assert "gone.png" in error["message"]


def test_a_fetched_file_that_is_no_picture_is_named(client: httpx.Client, picture_host: PictureHost) -> None:
    images = [picture_url(), picture_host.put("/x.png", b"<html>not a picture</html>")]
    error = refusal_of(client.post(PATH, json={"images": images, "expressions": ["a"]}), 400)
    assert error["param"] == "images.1"


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("http://{}/x.png", id="host"),
        pytest.param("http://127.0.0.1:99999/{}", id="path"),
        pytest.param("ftp://127.0.0.1/{}", id="scheme"),
        pytest.param("data:image/png,{}", id="data"),
    ],
)
def test_a_url_of_megabytes_is_refused_at_once_and_not_sent_back(client: httpx.Client, url: str) -> None:
    began = time.perf_counter()
    answer = client.post(PATH, json={"image": url.format("a" * (8 * MIB)), "expressions": ["a"]})
    seconds = time.perf_counter() - began
    error = refusal_of(answer)
    assert error["param"] == "image"
    assert len(error["message"]) < LONGEST_MESSAGE
    assert seconds < 2


@pytest.mark.slow
def test_a_host_that_is_not_allowed_is_not_asked(
    tiny_llava: Path, start_server: Callable[..., Any], picture_host: PictureHost, tmp_path: Path
) -> None:
    allowed, other = (
        picture_host.put(f"/{host}.png", picture_bytes(), host=host) for host in ("127.0.0.1", "localhost")
    )
    flags = ("--allowed-media-domains", "127.0.0.1")
    with (
        start_server(tmp_path / "server.log", str(tiny_llava), *TINY_FLAGS, *flags) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        error = refusal_of(client.post(PATH, json={"image": other, "expressions": ["a"]}), 400)
        assert error["param"] == "image"
        assert "127.0.0.1" in error["message"]
        error = refusal_of(client.post(PATH, json={"images": [allowed, other], "expressions": ["a"]}), 400)
        assert error["param"] == "images.1"
        assert "/localhost.png" not in picture_host.asked
        fetched = results_of(client, image=allowed, expressions=["a"])
        assert fetched == results_of(client, image=picture_url(), expressions=["a"])


# ---------------------------------------------------------------- how many pictures


@pytest.mark.parametrize("num_uploads", [MOST_IMAGES, 1])
def test_uploads_and_urls_are_counted_together(client: httpx.Client, num_uploads: int) -> None:
    uploads = [("image", (f"{i}.png", picture_bytes(seed=i), "image/png")) for i in range(num_uploads)]
    urls = [picture_url(seed=i) for i in range(MOST_IMAGES + 1 - num_uploads)]
    error = refusal_of(client.post(PATH, files=uploads, data={"expressions": ["a"], "images": urls}))
    assert error["param"] in ("images", "image")
    assert str(MOST_IMAGES) in error["message"]


def test_as_many_pictures_as_allowed_are_answered(client: httpx.Client) -> None:
    uploads = [("image", (f"{i}.png", picture_bytes(seed=i), "image/png")) for i in range(MOST_IMAGES - 1)]
    answer = client.post(PATH, files=uploads, data={"expressions": ["a"], "images": [picture_url(seed=7)]})
    assert answer.status_code == 200, answer.text[:LONGEST_MESSAGE]
    assert [result["image_index"] for result in answer.json()["results"]] == list(range(MOST_IMAGES))


# ---------------------------------------------------------------- large bodies


@contextlib.contextmanager
def posting(server: Any, *headers: str) -> Iterator[socket.socket]:
    """A connection on which a POST of JSON was begun, and its headers sent."""
    address = urlsplit(server.url)
    head = [f"POST {PATH} HTTP/1.1", f"Host: {address.netloc}", "Content-Type: application/json", *headers]
    with socket.create_connection((address.hostname, address.port), timeout=PATIENCE_SECONDS) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode())
        yield connection


def response_on(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    response = HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())["error"]


def send_until_answered(connection: socket.socket, piece: bytes, most: int) -> int:
    """Sends a piece again and again, until the other side says something; returns how many bytes it took."""
    sent = 0
    connection.setblocking(False)
    while sent < most:
        readable, writable, _ = select.select([connection], [connection], [], PATIENCE_SECONDS)
        assert readable or writable, f"the server neither reads nor answers after {sent} bytes"
        if readable:
            break
        sent += connection.send(memoryview(piece)[sent % len(piece) :])
    connection.settimeout(PATIENCE_SECONDS)
    return sent


def test_a_body_that_says_it_is_too_large_is_refused_unread(segmenting_server: Any, client: httpx.Client) -> None:
    with posting(segmenting_server, f"Content-Length: {LARGEST_BODY + 1}") as connection:
        status, error = response_on(connection)
    assert status == error["code"] == 413
    assert error["param"] == "body"
    assert str(LARGEST_BODY + 1) in error["message"]
    assert_answers_still(client)


def test_a_body_that_goes_on_and_on_is_refused_on_the_way(segmenting_server: Any, client: httpx.Client) -> None:
    chunk = b"%x\r\n%s\r\n" % (MIB, bytes(MIB))
    with posting(segmenting_server, "Transfer-Encoding: chunked") as connection:
        sent = send_until_answered(connection, chunk, 2 * LARGEST_BODY)
        assert LARGEST_BODY < sent < 2 * LARGEST_BODY
        status, error = response_on(connection)
    assert status == error["code"] == 413
    assert error["param"] == "body"
    assert_answers_still(client)


def test_a_client_that_leaves_its_body_unfinished_harms_nobody(segmenting_server: Any, client: httpx.Client) -> None:
    with posting(segmenting_server, f"Content-Length: {LARGEST_BODY}") as connection:
        connection.sendall(bytes(MIB))
    assert_answers_still(client)


def api_process(server: Any) -> psutil.Process:
    """The process of a server that reads requests."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    (found,) = [child for child in children if "relay_serving.engine_process" in child.cmdline()]
    return found


@contextlib.contextmanager
def watched_memory(process: psutil.Process) -> Iterator[list[int]]:
    """What a process holds over what it held before, in bytes, measured every few milliseconds."""
    before, grown, done = process.memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            grown.append(process.memory_info().rss - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield grown
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("num_keys", "digits"),
    [pytest.param(400_000, 6, id="400000 keys"), pytest.param(120_000, 30, id="120000 long keys")],
)
def test_a_body_of_many_unknown_fields_costs_little(
    segmenting_server: Any, client: httpx.Client, num_keys: int, digits: int
) -> None:
    assert_answers_still(client)  # so that what a first request leaves in memory is not counted
    fields = {"image": picture_url(), "expressions": ["a"], **{f"{key:0{digits}}": 0 for key in range(num_keys)}}
    body = json.dumps(fields, separators=(",", ":")).encode()
    assert 4_000_000 <= len(body) < 6_000_000
    with watched_memory(api_process(segmenting_server)) as grown:
        began = time.perf_counter()
        answer = client.post(PATH, content=body, headers={"content-type": "application/json"})
        seconds = time.perf_counter() - began
    error = refusal_of(answer, 400, 413, 422)
    assert error["param"]
    assert len(answer.content) < LONGEST_MESSAGE
    assert seconds < MOST_MANY_KEYS_SECONDS
    assert max(grown) < MOST_MANY_KEYS_BYTES, f"{max(grown) / MIB:.0f} MiB more for a body of {len(body) / MIB:.1f} MiB"


def test_many_values_in_known_fields_cost_little(segmenting_server: Any, client: httpx.Client) -> None:
    assert_answers_still(client)
    body = b'{"image":"x","expressions":[' + b'"",' * 1_000_000 + b'""]}'
    with watched_memory(api_process(segmenting_server)) as grown:
        answer = client.post(PATH, content=body, headers={"content-type": "application/json"})
    error = refusal_of(answer, 400, 413, 422)
    assert error["param"]
    assert len(answer.content) < LONGEST_MESSAGE
    assert max(grown) < MOST_MANY_KEYS_BYTES


# ---------------------------------------------------------------- values beyond what can be carried


HALF_A_PAIR = "\ud800"  # of surrogates: JSON can say it, UTF-8 cannot


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": HALF_A_PAIR}, "model"),
        ({"expressions": [HALF_A_PAIR]}, "expressions.0"),
        ({"expressions": ["a dog", f"a {HALF_A_PAIR} cat"]}, "expressions.1"),
        ({"expressions": None, "classes": ["sky", HALF_A_PAIR]}, "classes.1"),
        ({"image": HALF_A_PAIR}, "image"),
        ({"image": f"http://{HALF_A_PAIR}/x.png"}, "image"),
        ({"image": f"data:image/png;base64,{HALF_A_PAIR}"}, "image"),
        ({"image": None, "images": [picture_url(), HALF_A_PAIR]}, "images.1"),
        ({"mask_format": HALF_A_PAIR}, "mask_format"),
        ({"refiner": HALF_A_PAIR}, "refiner"),
        ({HALF_A_PAIR: 1}, HALF_A_PAIR),
    ],
)
def test_half_a_surrogate_pair_is_an_error_of_its_field(
    client: httpx.Client, fields: dict[str, Any], param: str, stream: bool
) -> None:
    answer = post_ascii(client, {"image": picture_url(), "expressions": ["x"], "stream": stream, **fields})
    assert refusal_of(answer)["param"] == param


def test_half_a_surrogate_pair_where_nobody_reads_is_no_error_of_ours(client: httpx.Client) -> None:
    answer = post_ascii(client, {"image": picture_url(), "expressions": ["x"], "user": HALF_A_PAIR})
    assert answer.status_code < 500, answer.text[:LONGEST_MESSAGE]
    assert answer.json()


def post_ascii(client: httpx.Client, fields: dict[str, Any]) -> httpx.Response:
    """With every character outside ASCII escaped, which httpx does not do."""
    return client.post(PATH, content=json.dumps(fields).encode("ascii"), headers={"content-type": "application/json"})


@pytest.mark.parametrize("seed", [2**64, 2**63, -(2**63) - 1, -(2**70), pytest.param(10**300, id="300 digits")])
def test_a_seed_that_no_engine_takes_is_named(client: httpx.Client, seed: int) -> None:
    answer = client.post(PATH, json={"image": picture_url(), "expressions": ["x"], "seed": seed})
    assert refusal_of(answer)["param"] == "seed"


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -(2**63)])
def test_a_seed_that_the_engine_takes_is_kept(client: httpx.Client, seed: int) -> None:
    fields = {"image": picture_url(), "expressions": ["x"], "seed": seed, "temperature": 1.5}
    first, second = (results_of(client, **fields) for _ in range(2))
    assert first == second

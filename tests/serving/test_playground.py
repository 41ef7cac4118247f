"""The playground: its files and headers without a server, then the page itself in headless Chromium on a real one.

Chromium is Debian's (`chromium-headless-shell` or `chromium`) or Playwright's own; the servers are the session's.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from relay_models import masks
from relay_serving.routes import playground
from tiny_server import GRID, MODEL, TINY_FLAGS

FOLDER = playground.FOLDER
PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "seg-tiny"
PATIENCE_MS = 180_000

# ---------------------------------------------------------------- files and headers


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    playground.attach(app)
    return app


@pytest.mark.parametrize("path", ["/", "/playground/style.css", "/playground/script.js", "/playground/server.json"])
def test_every_file_comes_with_the_policy(app: FastAPI, path: str) -> None:
    answer = TestClient(app).get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?:|\*", policy)
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["__init__.py", "../routes/playground.py", "..%2froutes%2fplayground.py", "no.css"])
def test_nothing_else_of_the_folder_is_served(app: FastAPI, name: str) -> None:
    assert TestClient(app).get(f"/playground/{name}").status_code == 404


def test_the_page_answers_head_requests(app: FastAPI) -> None:
    answer = TestClient(app).head("/")
    assert (answer.status_code, answer.content) == (200, b"")


def test_a_root_page_that_is_there_already_stays() -> None:
    app = FastAPI()
    app.get("/")(lambda: {"who": "vLLM"})
    playground.attach(app)
    assert TestClient(app).get("/").json() == {"who": "vLLM"}


def test_the_page_is_told_whether_the_server_segments(app: FastAPI) -> None:
    client = TestClient(app)
    assert client.get("/playground/server.json").json() == {"segmentation": None}
    playground.publish(app.state, SimpleNamespace(rows=16, columns=24))
    assert client.get("/playground/server.json").json() == {"segmentation": {"rows": 16, "columns": 24}}
    playground.publish(app.state, None)
    assert client.get("/playground/server.json").json() == {"segmentation": None}


def test_the_page_takes_nothing_from_elsewhere_and_makes_no_markup_from_text() -> None:
    for name in ("index.html", *playground.FILES):
        text = (FOLDER / name).read_text()
        assert not re.search(r"(src|href|url\(|import|fetch\()\s*=?\s*[\"'(]*(https?:)?//", text), name
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|localStorage|DOMParser",
        (FOLDER / "script.js").read_text(),
    )
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", (FOLDER / "index.html").read_text())


# ---------------------------------------------------------------- in a browser

browser_test = [pytest.mark.e2e, pytest.mark.slow]


def chromium_path() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    with driver.sync_playwright() as playwright:
        path = chromium_path()
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: apt-get install chromium-headless-shell, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page of a server; afterwards nothing may have gone wrong in it, nor have been fetched elsewhere."""
    contexts, wrong = [], []

    def open_at(url: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: "Security Policy" in message.text and wrong.append(message.text))
        elsewhere = re.compile(rf"(?!{re.escape(url)}|blob:|data:)")
        page.on("request", lambda request: elsewhere.match(request.url) and wrong.append(request.url))
        # So that choosers are caught from now on: a test that begins to wait for one may press its key too early.
        page.on("filechooser", lambda chooser: None)
        page.goto(f"{url}/")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, wider than high, and stored on its side: what the EXIF rotation makes upright must be what is shown."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path_factory.mktemp("photos") / "my photo.jpg"
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def choose(page: Any, photo: Path) -> None:
    page.set_input_files("#file", photo)
    page.wait_for_selector("#stage:not([hidden])")


def find(page: Any, text: str) -> None:
    page.fill("#expressions", text)
    page.press("#expressions", "Enter")
    page.wait_for_selector("#downloads:not([hidden])")


def wait_until(page: Any, condition: str) -> None:
    """Playwright's own wait evaluates its condition inside the page, again and again, which the policy forbids."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"still not so: {condition}"
        page.wait_for_timeout(50)


def overlay_is_painted(page: Any) -> bool:
    painted: bool = page.evaluate(
        """async () => {
          await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
          const canvas = document.getElementById("overlay");
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          return data.some((value, index) => index % 4 === 3 && value > 0);
        }"""
    )
    return painted


def saved(page: Any, act: Callable[[], None]) -> tuple[str, bytes]:
    with page.expect_download() as waiting:
        act()
    download = waiting.value
    return download.suggested_filename, Path(download.path()).read_bytes()


def whole_answer(url: str, photo: Path, expressions: list[str]) -> dict[str, Any]:
    """What the API says to the same question, asked without the page."""
    image = f"data:image/jpeg;base64,{base64.b64encode(photo.read_bytes()).decode()}"
    answer = httpx.post(f"{url}/v1/segmentations", json={"image": image, "expressions": expressions}, timeout=120)
    body: dict[str, Any] = answer.raise_for_status().json()
    return body


class TestSegmenting:
    pytestmark = browser_test

    def test_expressions_become_masks_that_the_api_gives(
        self, open_page: Callable[..., Any], segmenting_server: Any, photo: Path
    ) -> None:
        page = open_page(segmenting_server.url)
        page.wait_for_selector("#picture:not([hidden])")
        assert MODEL in page.inner_text("#server")
        choose(page, photo)
        assert page.get_attribute("#photo", "aria-label") == "The photo my photo.jpg, 90 by 60 pixels"
        find(page, "the dog, ¿dónde está el niño?\n左の犬")

        expected = whole_answer(segmenting_server.url, photo, ["the dog", "¿dónde está el niño?", "左の犬"])
        assert page.locator(".result bdi").all_inner_texts() == [r["expression"] for r in expected["results"]]
        for index, result in enumerate(expected["results"]):
            row = page.locator(".result").nth(index)
            facts = row.locator(".facts").inner_text()
            assert facts.startswith(result["status"])
            if result["empty"]:
                assert "nothing found" in facts
                continue
            assert f"{result['area']:,} pixels" in facts
            name, data = saved(page, row.locator("button").click)
            assert name.startswith("my-photo-")
            got = np.asarray(Image.open(io.BytesIO(data))) > 0
            np.testing.assert_array_equal(got, masks.from_coco_rle(result["mask"]) > 0)

        name, data = saved(page, lambda: page.click("#save-coco"))
        coco = json.loads(data)
        assert name == "my-photo-coco.json"
        assert [image["file_name"] for image in coco["images"]] == ["my photo.jpg"]
        assert len(coco["annotations"]) == sum(not result["empty"] for result in expected["results"])
        _, data = saved(page, lambda: page.click("#save-picture"))
        assert Image.open(io.BytesIO(data)).width >= 90

    def test_masks_are_toggled_and_told_by_pointer_and_by_keyboard(
        self, open_page: Callable[..., Any], segmenting_server: Any, photo: Path
    ) -> None:
        page = open_page(segmenting_server.url)
        choose(page, photo)
        find(page, "the dog")
        facts = page.inner_text("#facts-1")
        assert overlay_is_painted(page)
        page.focus("#mask-1")
        assert page.inner_text("#caption") == f"1 the dog — {facts}"
        page.keyboard.press("Space")
        assert not page.is_checked("#mask-1")
        assert not overlay_is_painted(page)
        page.keyboard.press("Space")
        assert overlay_is_painted(page)
        page.focus("#expressions")
        assert page.is_hidden("#caption")
        page.evaluate("scrollTo(0, 0)")
        found = masks.from_coco_rle(whole_answer(segmenting_server.url, photo, ["the dog"])["results"][0]["mask"])
        height, width = found.shape
        inside_Y, inside_X = np.nonzero(found)
        box = page.locator("#overlay").bounding_box()
        x, y = (inside_X[0] + 0.5) / width, (inside_Y[0] + 0.5) / height
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        page.wait_for_selector("#caption:not([hidden])")
        assert page.inner_text("#caption") == f"1 the dog — {facts}"

    def test_rows_are_painted_while_they_are_written(
        self, open_page: Callable[..., Any], segmenting_server: Any, photo: Path
    ) -> None:
        page = open_page(segmenting_server.url)
        choose(page, photo)
        page.evaluate(
            """() => {
              window.seen = [];
              new MutationObserver(() => {
                const facts = document.querySelector(".facts");
                const width = document.querySelector(".meter i")?.style.width;
                if (facts?.textContent.startsWith("row")) window.seen.push([facts.textContent, width]);
              }).observe(document.getElementById("results"), { subtree: true, childList: true, characterData: true });
            }"""
        )
        find(page, "the dog")
        seen = page.evaluate("window.seen")
        assert [facts for facts, _ in seen][-1] == f"row {GRID} of {GRID}"
        rows = [int(facts.split()[1]) for facts, _ in seen]
        assert rows == sorted(rows)
        assert len(set(rows)) > 1

    def test_everything_names_what_it_finds(
        self, open_page: Callable[..., Any], segmenting_server: Any, photo: Path
    ) -> None:
        page = open_page(segmenting_server.url)
        choose(page, photo)
        find(page, "Everything")
        assert page.locator(".result").count() >= 1
        colours = [swatch.evaluate("(e) => e.style.background") for swatch in page.locator(".swatch").all()[:7]]
        assert len(set(colours)) == len(colours)

    def test_what_cannot_be_done_is_said(
        self, open_page: Callable[..., Any], segmenting_server: Any, photo: Path, tmp_path: Path
    ) -> None:
        page = open_page(segmenting_server.url)
        page.click("#find")
        assert "Choose a photo first" in page.inner_text("#picture-error")
        (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no photo")
        page.set_input_files("#file", tmp_path / "broken.jpg")
        wait_until(page, "document.getElementById('picture-error').textContent.includes('cannot be shown')")
        choose(page, photo)
        assert page.is_hidden("#picture-error")
        page.click("#find")
        assert "Say what to find" in page.inner_text("#picture-error")
        page.fill("#expressions", ",".join(f"thing {i}" for i in range(41)))  # the server answers 40 at a time
        page.click("#find")
        wait_until(page, "document.getElementById('picture-error').textContent.includes('at most 40')")
        page.context.set_offline(True)
        page.fill("#expressions", "the dog")
        page.click("#find")
        wait_until(page, "document.getElementById('picture-error').textContent.includes('cannot be reached')")
        page.context.set_offline(False)
        page.click("#picture-error button")
        page.wait_for_selector("#downloads:not([hidden])")
        assert page.is_hidden("#picture-error")

    def test_markup_in_a_label_stays_text(
        self, open_page: Callable[..., Any], segmenting_server: Any, photo: Path
    ) -> None:
        page = open_page(segmenting_server.url)
        choose(page, photo)
        markup = "<img src=x onerror=window.hit=1>"
        find(page, markup)
        assert page.inner_text(".result bdi") == markup
        assert page.locator("main img").count() == 0
        assert page.evaluate("window.hit") is None
        refused = page.evaluate("() => { try { document.body.innerHTML = '<b>'; } catch (e) { return e.name; } }")
        assert refused == "TypeError"

    def test_a_chat_streams_is_stopped_and_is_remembered(
        self, open_page: Callable[..., Any], segmenting_server: Any
    ) -> None:
        page = open_page(segmenting_server.url)
        wait_until(page, f"document.getElementById('server').textContent.includes('{MODEL}')")
        answer_at_length(page)
        page.fill("#message", "Hello")
        page.press("#message", "Enter")
        wait_until(page, "document.querySelector('.turn.assistant .text')?.textContent.length > 20")
        page.click("#chat-stop")
        page.wait_for_selector(".turn.assistant .note")
        assert page.inner_text(".turn.assistant .note") == "Stopped."
        said = page.inner_text(".turn.assistant .body")
        with page.expect_request("**/v1/chat/completions") as sent:
            page.fill("#message", "And then?")
            page.press("#message", "Enter")
        messages = sent.value.post_data_json["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        assert messages[1]["content"].strip()[:20] == said.strip()[:20]
        page.click("#chat-new")
        assert page.locator(".turn").count() == 0

    def test_a_chat_is_shown_the_photo(
        self, open_page: Callable[..., Any], segmenting_server: Any, photo: Path
    ) -> None:
        page = open_page(segmenting_server.url)
        choose(page, photo)
        page.check("#with-photo")
        page.fill("#message", "Can you segment the dog in the image?")
        with page.expect_request("**/v1/chat/completions") as sent:
            page.press("#message", "Enter")
        picture, text = sent.value.post_data_json["messages"][0]["content"]
        assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")
        assert text["text"] == "Can you segment the dog in the image?"
        wait_until(page, "document.querySelector('.turn.assistant .body')?.textContent.length > 0")
        if page.is_visible("#chat-stop"):
            page.click("#chat-stop")
        page.wait_for_selector(".turn.assistant:not([aria-busy])")
        assert page.locator("#log .error").count() == 0

    def test_counters_are_live_and_their_absence_is_said(
        self, open_page: Callable[..., Any], segmenting_server: Any
    ) -> None:
        page = open_page(segmenting_server.url)
        page.wait_for_selector("#counters-list dd")
        steps = r"^vllm_relay_steps_total\{.*\} (\S+)$"
        before = float(re.search(steps, httpx.get(f"{segmenting_server.url}/metrics").text, re.M)[1])
        assert int(page.inner_text("#counters-list dd >> nth=0").replace(",", "")) <= before
        httpx.post(
            f"{segmenting_server.url}/v1/completions",
            json={"model": MODEL, "prompt": "Hello", "max_tokens": 8, "ignore_eos": True},
            timeout=60,
        ).raise_for_status()
        wait_until(
            page,
            f"Number(document.querySelector('#counters-list dd').textContent.replaceAll(',', '')) > {before}",
        )
        page.route("**/metrics", lambda route: route.fulfill(status=404))  # as a proxy in front would
        wait_until(page, "document.getElementById('counters-note').textContent.includes('answers 404')")

    def test_it_fits_a_phone_and_a_dark_room(
        self, open_page: Callable[..., Any], segmenting_server: Any, photo: Path
    ) -> None:
        phone = {"width": 360, "height": 640}
        page = open_page(segmenting_server.url, viewport=phone, color_scheme="dark")
        choose(page, photo)
        find(page, f"the dog, {'averyveryverylongword' * 6}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, re.findall(r"\d+", ground)[:3])) < 150

    def test_pieces_may_end_inside_a_character(self, open_page: Callable[..., Any], segmenting_server: Any) -> None:
        page = open_page(segmenting_server.url)
        events = page.evaluate(
            """async () => {
              const { serverEvents } = await import("/playground/script.js");
              const first = 'data: {"a":"犬🐕é"}\\r\\n\\r\\n: a comment\\n\\n';
              const text = first + 'data: {"a":\\ndata: 2}\\n\\ndata: [DONE]\\n\\n';
              const body = new ReadableStream({
                start(stream) {
                  for (const byte of new TextEncoder().encode(text)) stream.enqueue(new Uint8Array([byte]));
                  stream.close();
                },
              });
              const events = [];
              for await (const event of serverEvents(new Response(body))) events.push(event);
              return events;
            }"""
        )
        assert events == [{"a": "犬🐕é"}, {"a": 2}]

    def test_a_stream_that_breaks_off_is_an_error(self, open_page: Callable[..., Any], segmenting_server: Any) -> None:
        page = open_page(segmenting_server.url)
        message = page.evaluate(
            """async () => {
              const { serverEvents } = await import("/playground/script.js");
              try {
                for await (const event of serverEvents(new Response('data: {"a":1}\\n\\ndata: {"a"')));
              } catch (error) { return error.message; }
            }"""
        )
        assert "broke off" in message


class TestByKeyboardAlone:
    pytestmark = browser_test

    def test_choose_ask_toggle_and_chat(
        self, open_page: Callable[..., Any], segmenting_server: Any, photo: Path
    ) -> None:
        page = open_page(segmenting_server.url)
        page.wait_for_selector("#picture:not([hidden])")
        tab_to(page, "choose")
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Enter")
        chooser.value.set_files(photo)
        wait_until(page, "document.activeElement.id === 'expressions'")
        page.keyboard.type("the dog")
        page.keyboard.press("Enter")
        page.wait_for_selector("#downloads:not([hidden])")
        tab_to(page, "mask-1")
        assert page.inner_text("#caption").startswith("1 the dog")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none"
        page.keyboard.press("Space")
        assert not page.is_checked("#mask-1")
        answer_at_length(page)
        tab_to(page, "message")
        page.keyboard.type("Hello")
        page.keyboard.press("Enter")
        wait_until(page, "document.querySelector('.turn.assistant .text')?.textContent.length > 0")
        tab_to(page, "chat-stop")
        page.keyboard.press("Enter")
        page.wait_for_selector(".turn.assistant:not([aria-busy])")


def answer_at_length(page: Any) -> None:
    """So that there is something to stop: the tiny model ends most of its answers at once, or within a second."""

    def ask_for_more(route: Any) -> None:
        body = route.request.post_data_json | {"ignore_eos": True, "max_tokens": 1500}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", ask_for_more)


def tab_to(page: Any, element_id: str) -> None:
    for _ in range(30):
        if page.evaluate("document.activeElement.id") == element_id:
            return
        page.keyboard.press("Tab")
    pytest.fail(f"30 tabs do not reach {element_id}")


class TestKeyAndTextOnly:
    """One server that wants a key, and that answers without masks."""

    pytestmark = browser_test
    KEY = "a-very-secret-key"

    @pytest.fixture(scope="class")
    def guarded_server(
        self, tiny_llava: Path, start_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Any]:
        flags = [*TINY_FLAGS[: TINY_FLAGS.index("--relay-segmentation")], "--relay-segmentation", "off"]
        log_path = tmp_path_factory.mktemp("guarded") / "server.log"
        with start_server(log_path, str(tiny_llava), *flags, "--api-key", self.KEY) as server:
            yield server

    def test_a_key_is_asked_for_and_kept_in_the_tab_only(
        self, open_page: Callable[..., Any], guarded_server: Any
    ) -> None:
        page = open_page(guarded_server.url)
        page.wait_for_selector("#key[open]")
        assert page.evaluate("document.activeElement.id") == "key-value"
        page.keyboard.press("Escape")
        wait_until(page, "document.getElementById('server').textContent.includes('only with an API key')")
        page.click("#reconnect")
        page.wait_for_selector("#key[open]")
        page.fill("#key-value", "wrong")
        page.keyboard.press("Enter")
        wait_until(page, "document.getElementById('key-text').textContent.includes('did not accept')")
        page.fill("#key-value", self.KEY)
        page.keyboard.press("Enter")
        wait_until(page, f"document.getElementById('server').textContent.includes('{MODEL}')")
        kept = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
        assert kept == [[self.KEY], [], ""]
        assert self.KEY not in page.content()

    def test_a_text_only_server_chats_and_says_what_pictures_need(
        self, open_page: Callable[..., Any], guarded_server: Any
    ) -> None:
        page = open_page(guarded_server.url)
        page.fill("#key-value", self.KEY)
        page.keyboard.press("Enter")
        wait_until(page, "document.getElementById('server').textContent.includes('with text only')")
        assert "Pictures need a segmentation model" in page.inner_text("#no-picture")
        assert page.is_hidden("#picture")
        assert page.is_hidden("#show-photo")
        page.fill("#message", "Hello")
        page.press("#message", "Enter")
        wait_until(page, "document.querySelector('.turn.assistant .text')?.textContent.length > 0")


class TestTheEmbeddedModel:
    pytestmark = browser_test

    @pytest.mark.skipif(not PHOTOS.is_dir(), reason="../shared/data/seg-tiny is not beside this checkout")
    def test_by_keyboard_alone_it_finds_a_person_in_a_photo_and_chats(
        self, open_page: Callable[..., Any], relay_server: Any
    ) -> None:
        facts = httpx.get(f"{relay_server.url}/playground/server.json").json()
        if facts["segmentation"] is None:
            pytest.skip("the embedded model answers without masks")
        lines = [json.loads(line) for line in (PHOTOS / "val.jsonl").read_text().splitlines()]
        area = {line["file"]: largest_person(line) for line in lines}
        name = max(area, key=lambda file: area[file])
        page = open_page(relay_server.url)
        page.wait_for_selector("#picture:not([hidden])")
        tab_to(page, "choose")
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Enter")
        chooser.value.set_files(PHOTOS / name)
        wait_until(page, "document.activeElement.id === 'expressions'")
        page.keyboard.type("person")
        page.keyboard.press("Enter")
        page.wait_for_selector("#downloads:not([hidden])")
        tab_to(page, "mask-1")
        assert re.match(r"1 person — .* of the photo", page.inner_text("#caption"))
        assert overlay_is_painted(page)
        page.keyboard.press("Space")
        wait_until(page, "!document.getElementById('mask-1').checked")
        tab_to(page, "message")
        page.keyboard.type("What is the capital of France?")
        page.keyboard.press("Enter")
        page.wait_for_selector(".turn.assistant:not([aria-busy])")
        assert "Paris" in page.inner_text(".turn.assistant .text")


def largest_person(line: dict[str, Any]) -> float:
    people = [instance for instance in line["instances"] if instance["label"] == "person"]
    if len(people) != 1 or "person" in line.get("unsure", []):
        return 0.0
    x0, y0, x1, y1 = people[0]["box"]
    return (x1 - x0) * (y1 - y0) / (line["width"] * line["height"])

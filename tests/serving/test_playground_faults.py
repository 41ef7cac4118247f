"""The playground when things go otherwise than planned, in headless Chromium.

The server here is one that says what a test wants it to, and breaks off where it wants: the real one's answers cannot
be held back, or be wrong, on demand. That the page and the real server understand each other is `test_playground.py`'s.
"""

from __future__ import annotations

import base64
import io
import json
import queue
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from PIL import Image

from relay_models.masks import png_bytes
from relay_serving.routes import playground

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

GRID = 4
SIDE = 64
PATIENCE_MS = 60_000
METRICS = "vllm_relay_steps_total 7\n"


class Scripted:
    """What the server says. A test puts events into ``says``; None ends an answer, `BROKEN` cuts it off."""

    BROKEN = object()

    def __init__(self) -> None:
        self.says: queue.Queue[Any] = queue.Queue()
        self.requests: list[tuple[str, bytes]] = []
        self.refusals: list[int] = []
        self.metrics = "vllm_relay_steps_total 7\n"
        self.breaks_metrics = False

    def stream(self, says: queue.Queue[Any]) -> Iterator[bytes]:
        while True:
            event = says.get(timeout=30)
            if event is None:
                yield b"data: [DONE]\n\n"
                return
            if event is self.BROKEN:
                return
            yield b"data: " + json.dumps(event).encode() + b"\n\n"


def app_of(script: Scripted) -> FastAPI:
    app = FastAPI()
    playground.attach(app)
    playground.publish(app.state, SimpleNamespace(rows=GRID, columns=GRID))
    app.get("/v1/models")(lambda: {"data": [{"id": "scripted"}]})

    @app.get("/metrics")
    def metrics() -> Response:
        if script.breaks_metrics:
            return PlainTextResponse(script.metrics, headers={"Content-Length": "9999"})
        return PlainTextResponse(script.metrics)

    async def answer(request: Request) -> Response:
        script.requests.append((request.url.path, await request.body()))
        if script.refusals:
            return Response(status_code=script.refusals.pop(0), headers={"Retry-After": "1"})
        return StreamingResponse(script.stream(script.says), media_type="text/event-stream")

    for path in ("/v1/segmentations", "/v1/chat/completions"):
        app.post(path)(answer)
    return app


@pytest.fixture
def script() -> Scripted:
    return Scripted()


@pytest.fixture
def url(script: Scripted) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app_of(script), host="127.0.0.1", port=port, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    script.says.put(None)
    server.should_exit = server.force_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    names = ("chromium-headless-shell", "chromium", "chromium-browser")
    with driver.sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, names)), None)
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: apt-get install chromium-headless-shell, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=3 * PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, url: str) -> Iterator[Callable[..., Any]]:
    contexts, wrong = [], []

    def open_at(before: str = "", **options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        if before:
            page.add_init_script(before)
        page.goto(f"{url}/")
        page.get_by_text("chats, and finds things").wait_for()
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = []
    for name, side in (("a", SIDE), ("b", SIDE // 2)):
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", (side, side), "green").save(paths[-1])
    return paths


def choose(page: Any, photo: Path) -> None:
    page.set_input_files("#file", str(photo))
    page.locator("#progress", has_text=f"{photo.name},").wait_for()


def find(page: Any, text: str) -> None:
    page.fill("#expressions", text)
    page.press("#expressions", "Enter")


def say(page: Any, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def facts(page: Any) -> list[str]:
    return [line.strip() for line in page.locator("#results .facts").all_inner_texts()]


def names(page: Any) -> list[str]:
    return page.locator("#results bdi").all_inner_texts()


def row(number: int, label: str = "cat", query: int = 0) -> dict[str, Any]:
    runs = [{"label": label, "count": 2}, {"label": "others", "count": GRID - 2}]
    return {"object": "segmentation.row", "query_index": query, "block": 0, "row": number, "runs": runs}


def result(label: str = "cat", query: int = 0, side: int = SIDE, **changes: Any) -> dict[str, Any]:
    mask_HW = np.zeros((side, side), dtype=bool)
    mask_HW[: side // 2, : side // 2] = True
    mask_HW = changes.pop("mask_HW", mask_HW)
    return {
        "query_index": query, "block": 0, "label": label, "expression": label, "status": "complete", "repairs": [],
        "empty": False, "area": int(mask_HW.sum()), "refiner": None, "warnings": [],
        "mask": {"format": "png", "png": base64.b64encode(png_bytes(mask_HW)).decode()}, **changes,
    }  # fmt: skip


def results(*found: dict[str, Any]) -> dict[str, Any]:
    return {"object": "segmentation.results", "results": list(found)}


def completed(**coco: Any) -> dict[str, Any]:
    return {"object": "segmentation.completed", "coco": {"images": [{"id": 0}], **coco}, "timings": {"total_ms": 5}}


def chat(
    content: str = "", rows: list[Any] | None = None, masks: list[Any] | None = None, **delta: Any
) -> dict[str, Any]:
    if rows or masks:
        delta["segmentation"] = {"rows": rows or [], **({"masks": masks} if masks else {})}
    return {"choices": [{"delta": {"content": content, **delta}, "finish_reason": None}]}


def says(script: Scripted, *events: Any) -> None:
    for event in events:
        script.says.put(event)


# ---------------------------------------------------------------- the chat and the photo


def test_a_question_that_is_asked_again_is_about_the_photo_it_was_asked_about(open_page, script, photos) -> None:
    page = open_page()
    choose(page, photos[0])
    page.check("#with-photo")
    script.refusals = [429]
    say(page, "Where is the cat?")
    page.get_by_role("button", name="Try again").wait_for()
    choose(page, photos[1])
    page.get_by_role("button", name="Try again").click()
    says(script, chat("<seg>cat *2</seg>", [row(0)], [result()]), None)
    page.locator("#chat-status", has_text="complete").wait_for()
    assert names(page) == []
    assert page.get_by_text("A mask", exact=True).count() == 1
    sent = json.loads(script.requests[-1][1])["messages"][-1]["content"][0]["image_url"]["url"]
    assert base64.b64decode(sent.partition(",")[2]) == photos[0].read_bytes()


def test_what_a_stopped_or_broken_chat_has_not_drawn_is_ended(open_page, script, photos) -> None:
    page = open_page()
    choose(page, photos[0])
    page.check("#with-photo")
    say(page, "Where is the cat?")
    says(script, chat("<seg>", [row(0), row(1)]))
    page.locator("#results .facts", has_text=f"row 2 of {GRID}").wait_for()
    page.click("#chat-stop")
    page.locator("#results .facts", has_text="stopped after row 2").wait_for()
    assert page.locator("#results .meter").is_hidden()
    says(script, Scripted.BROKEN)
    page.click("#chat-new")
    page.check("#with-photo")
    say(page, "And now?")
    says(script, chat("<seg>", [row(0)]), Scripted.BROKEN)
    page.locator("#results .facts", has_text="stopped after row 1").wait_for()
    page.locator("#chat-status", has_text="broke off").wait_for(state="attached")


def test_a_search_is_not_overwritten_by_a_chat_that_began_before_it(open_page, script, photos) -> None:
    page = open_page()
    choose(page, photos[0])
    page.check("#with-photo")
    chatting, searching = Scripted(), script.says
    script.says = chatting.says
    say(page, "Where is everything?")
    says(script, chat("<seg>", [row(0, "dog")]))
    page.locator("#results bdi", has_text="dog").wait_for()
    script.says = searching
    find(page, "cat")
    says(script, results(result()), completed(), None)
    page.locator("#progress", has_text="One mask in").wait_for()
    before = (names(page), facts(page))
    says(chatting, chat("", [row(1, "dog")]), chat("</seg>", masks=[result("cat", area=1), result("dog")]), None)
    page.locator("#chat-status", has_text="complete").wait_for(state="attached")
    assert (names(page), facts(page)) == before == (["cat"], before[1])
    page.get_by_role("button", name="Download COCO JSON").wait_for()


def test_a_follow_up_draws_too(open_page, script, photos) -> None:
    """The newest photo is sent again with every question, so its masks come back."""
    page = open_page()
    choose(page, photos[0])
    page.check("#with-photo")
    say(page, "Hello")
    says(script, chat("Hi."), None)
    page.locator("#chat-status", has_text="complete").wait_for(state="attached")
    page.uncheck("#with-photo")
    say(page, "And the cat?")
    says(script, chat("<seg>cat *2</seg>", [row(0)], [result()]), None)
    page.get_by_text("A mask, drawn over the photo").wait_for()
    assert names(page) == ["cat"]
    assert json.loads(script.requests[-1][1])["segmentation"] == {"mask_format": "png"}


def test_only_what_was_said_last_can_be_asked_again(open_page, script) -> None:
    page = open_page()
    script.refusals = [429]
    say(page, "First")
    page.get_by_role("button", name="Try again").wait_for()
    say(page, "Second")
    assert page.get_by_role("button", name="Try again").count() == 0
    says(script, chat("Answer."), None)
    page.get_by_text("Answer.").wait_for()


def test_a_conversation_begun_anew_while_the_photo_is_read_asks_nothing(open_page, script, photos) -> None:
    page = open_page("FileReader.prototype.readAsDataURL = function () { window.reading = this; };")
    choose(page, photos[0])
    page.check("#with-photo")
    say(page, "Where?")
    page.wait_for_function("window.reading")
    page.click("#chat-new")
    page.evaluate(
        "() => { const r = window.reading; Object.defineProperty(r, 'result', {value: 'data:,'}); r.onload(); }"
    )
    page.wait_for_timeout(200)
    assert script.requests == []
    page.uncheck("#with-photo")
    say(page, "Hello")
    says(script, chat("Hi."), None)
    page.get_by_text("Hi.").wait_for()
    assert [message["content"] for message in json.loads(script.requests[0][1])["messages"]] == ["Hello"]


def test_thoughts_are_shown_apart(open_page, script) -> None:
    page = open_page()
    say(page, "Hello")
    says(script, chat("", reasoning="Hmm, "), chat("", reasoning="a greeting."), chat("Hi."), None)
    page.get_by_text("What it thought").click()
    page.get_by_text("Hmm, a greeting.").wait_for()
    assert page.get_by_text("The model said nothing.").count() == 0


# ---------------------------------------------------------------- the search


def test_a_held_key_asks_once(open_page, script, photos) -> None:
    page = open_page()
    choose(page, photos[0])
    page.fill("#expressions", "cat")
    page.focus("#expressions")
    for _ in range(10):
        page.keyboard.down("Enter")
    page.keyboard.up("Enter")
    says(script, results(result()), completed(), None)
    page.locator("#progress", has_text="One mask in").wait_for()
    assert len(script.requests) == 1


def test_what_the_api_tells_is_told(open_page, script, photos) -> None:
    page = open_page()
    choose(page, photos[0])
    find(page, "cat, dog, bird, fish")
    told = [
        result("cat", 0, refiner="failed", warnings=["max_tokens leaves 7 tokens"]),
        result("dog", 1, refiner="kept"),
        result("bird", 2, refiner="mobile-sam"),
        result("fish", 3, refiner="skipped", empty=True, mask=None),
    ]
    says(script, results(*told), completed(), None)
    page.locator("#progress", has_text="3 masks in").wait_for()
    cat, dog, bird, fish = facts(page)
    assert "refining failed, so this is the coarse mask" in cat
    assert cat.endswith("max_tokens leaves 7 tokens")
    assert "the refined outline did not fit" in dog
    assert "outline refined by mobile-sam" in bird
    assert fish == "complete · nothing found"


def test_a_thin_mask_is_drawn_and_counted(open_page, script, tmp_path) -> None:
    """One column of 4000: between the pixels of the canvas, but not nothing."""
    wide = tmp_path / "wide.png"
    Image.new("RGB", (4000, 40)).save(wide)
    mask_HW = np.zeros((40, 4000), dtype=bool)
    mask_HW[:, 2001] = True
    page = open_page()
    choose(page, wide)
    find(page, "wire")
    says(script, results(result("wire", mask_HW=mask_HW)), completed(), None)
    page.locator("#progress", has_text="One mask in").wait_for()
    page.evaluate("() => new Promise(requestAnimationFrame)")
    painted = page.evaluate(
        """() => {
          const canvas = document.getElementById("overlay");
          const column = Math.floor((2001 * canvas.width) / 4000);
          const { data } = canvas.getContext("2d").getImageData(column, 0, 1, canvas.height);
          return data.filter((value, i) => i % 4 === 3 && value > 0).length / canvas.height;
        }"""
    )
    assert painted == 1


def test_rows_without_a_result_and_a_search_that_was_stopped_are_ended(open_page, script, photos) -> None:
    page = open_page()
    choose(page, photos[0])
    page.click("#everything")
    says(script, row(0, "ghost"), results(result()), completed(), None)
    page.locator("#progress", has_text="One mask in").wait_for()
    assert dict(zip(names(page), facts(page), strict=True))["ghost"] == "no mask came"
    find(page, "cat, dog")
    says(script, results(result()))
    page.get_by_text("25.0 % of the photo").wait_for()
    page.click("#find-stop")
    page.get_by_role("button", name="Download photo with masks").wait_for()
    assert page.get_by_role("button", name="Download COCO JSON").count() == 0
    says(script, Scripted.BROKEN)


def test_the_photo_is_saved_in_its_own_size(open_page, script, tmp_path) -> None:
    large = tmp_path / "large.png"
    Image.new("RGB", (2000, 1000), "white").save(large)
    page = open_page()
    choose(page, large)
    mask_HW = np.zeros((1000, 2000), dtype=bool)
    mask_HW[:, :1000] = True
    find(page, "cat")
    says(script, results(result(mask_HW=mask_HW)), completed(), None)
    page.locator("#progress", has_text="One mask in").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download photo with masks").click()
    picture = Image.open(io.BytesIO(Path(download.value.path()).read_bytes())).convert("RGB")
    assert picture.size == (2000, 1000)
    assert picture.getpixel((1900, 900)) == (255, 255, 255)
    assert picture.getpixel((100, 900)) != (255, 255, 255)


def test_the_photo_chosen_last_is_the_one(open_page, photos) -> None:
    slow = """
        const decode = window.createImageBitmap;
        window.createImageBitmap = async (file, ...rest) => {
          if (file.name === 'a.png') await new Promise((resolve) => { window.release = resolve; });
          return decode(file, ...rest);
        };
    """
    page = open_page(slow)
    page.set_input_files("#file", str(photos[0]))
    page.wait_for_function("() => Boolean(window.release)")
    choose(page, photos[1])
    page.evaluate("window.release()")
    page.wait_for_timeout(200)
    assert page.locator("#progress").inner_text().startswith("b.png,")
    assert "b.png" in page.locator("#photo").get_attribute("aria-label")


def test_a_photo_that_changed_on_disk_is_said_to_have(open_page, script, photos) -> None:
    page = open_page("Blob.prototype.arrayBuffer = () => Promise.reject(new DOMException('gone', 'NotReadableError'));")
    choose(page, photos[0])
    find(page, "cat")
    page.locator("#picture-error", has_text="cannot be read any more").wait_for()
    assert script.requests == []


# ---------------------------------------------------------------- the rest


def test_counters_come_back_after_an_answer_that_broke_off(open_page, script) -> None:
    page = open_page()
    page.locator("#counters-list dd", has_text="7").wait_for()
    script.breaks_metrics = True
    page.locator("#counters-note", has_text="does not answer").wait_for()
    script.breaks_metrics, script.metrics = False, "vllm_relay_steps_total 8\n"
    page.locator("#counters-list dd", has_text="8").wait_for()


def test_a_browser_that_keeps_nothing_can_be_used(open_page, script) -> None:
    page = open_page("Object.defineProperty(window, 'sessionStorage', { get() { throw new DOMException('no'); } });")
    page.click("#key-open")
    page.fill("#key-value", "secret")
    page.press("#key-value", "Enter")
    say(page, "Hello")
    says(script, chat("Hi."), None)
    page.get_by_text("Hi.").wait_for()


def test_focus_stays_where_a_button_goes_away(open_page, script, photos) -> None:
    page = open_page()
    script.refusals = [503]
    say(page, "Hello")
    page.get_by_role("button", name="Try again").click()
    assert page.evaluate("document.activeElement.id") in ("message", "chat-stop")
    says(script, chat("Hi."), None)
    page.get_by_text("Hi.").wait_for()
    choose(page, photos[0])
    script.refusals = [503]
    find(page, "cat")
    page.locator("#picture-error button").click()
    assert page.evaluate("document.activeElement.id") in ("expressions", "find-stop")
    says(script, results(result()), completed(), None)
    page.locator("#progress", has_text="One mask in").wait_for()

"""Photographs the page of a running server in Chromium: a photo that was asked about, and a chat beside it.

    python docs/pictures/playground.py http://127.0.0.1:8000 docs/pictures/playground.png chelsea.png cat "Hello"

Needs Playwright and a Chromium (`chromium-headless-shell` or `chromium`). The photo is one that `masks.py` names.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1180, 900
PATIENCE_MS = 300_000


def main() -> None:
    url, target, photo, asked, said = sys.argv[1:]
    found = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.set_default_timeout(PATIENCE_MS)
        page.goto(url)
        page.fill("#message", said)
        page.press("#message", "Enter")
        page.wait_for_selector("#chat-stop", state="visible")
        page.wait_for_selector("#chat-stop", state="hidden")
        page.set_input_files("#file", Path(photo))
        page.wait_for_selector("#stage", state="visible")
        page.fill("#expressions", asked)
        page.press("#expressions", "Enter")
        page.wait_for_selector("#downloads", state="visible")
        page.screenshot(path=target, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()

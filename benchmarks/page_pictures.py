"""The page of `ar2diff serve` as people see it, at the widths of a screen and of a phone, light and
dark, as small PNGs in `docs/images`.

  python benchmarks/page_pictures.py path/to/model

It serves the model and has a headless Chromium, driven by playwright, write a text and compare the
modes. The pictures show both halfway through.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, expect, sync_playwright
from report_pictures import OUT, ROOT, reduced

WIDTHS = (1280, 390)
SHADES = ("light", "dark")
TASKS = {"write": 0.6, "compare": 0.4}  # and how much of the replay is over
STARTED = 120  # seconds until the server must answer


@contextmanager
def served(model: str) -> Iterator[str]:
    """The address at which a model is served."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ar2diff", "serve", model, "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            until = time.monotonic() + STARTED
            while not answers(address):
                if server.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise SystemExit(f"{log.read()}\nerror: {model} is not served")
                time.sleep(0.2)
            yield address
        finally:
            server.terminate()
            server.wait()


def answers(address: str) -> bool:
    """Whether a server answers."""
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except urllib.error.URLError:
        return False


def perform(page: Page, task: str) -> None:
    """Have a task done, and show a moment of it."""
    page.click(f"#tab-{task}")
    for _ in range(2):  # the first run of a mode measures how many drafts pay
        page.click("#run")
        expect(page.locator("#run")).to_be_enabled(timeout=60_000)
        expect(page.locator("#save")).to_be_visible()
    slider = page.locator("#slider")
    slider.fill(str(round(int(slider.get_attribute("max") or 0) * TASKS[task])))
    page.locator("h1").click()  # so that nothing has the focus
    page.evaluate("() => scrollTo(0, 0)")


def photograph(browser: Any, address: str, task: str, width: int, shade: str) -> bytes:
    """A picture of a task, as a PNG."""
    page = browser.new_page(
        viewport={"width": width, "height": 900}, color_scheme=shade, reduced_motion="reduce"
    )
    page.goto(address)
    expect(page.locator("#facts")).not_to_be_empty()
    perform(page, task)
    picture = page.screenshot(full_page=True)
    page.close()
    return reduced(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder of a converted model, such as runs/demo")
    model = parser.parse_args().model
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("error: there is no chromium\n  fix: install it")
    with served(model) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for task in TASKS:
            for width in WIDTHS:
                for shade in SHADES:
                    file = OUT / f"serve-{task}-{width}-{shade}.png"
                    file.write_bytes(photograph(browser, address, task, width, shade))
                    print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1000:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main()

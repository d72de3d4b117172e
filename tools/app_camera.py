"""How many answers a second the page gives to a camera that shows a moving test picture.

    python tools/app_camera.py                             # 20 seconds, with a model of the page's example
    python tools/app_camera.py --seconds 60 -- --device cpu

What follows `--` are options of `duallora app`. It needs the extra `app`, playwright, and Debian's chromium.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, Request, expect, sync_playwright

from app_pictures import chromium, running

PATIENCE = 600_000  # ms
WARM_UP = 5_000  # ms


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="that are measured")
    parser.add_argument("options", nargs="*", help="of duallora app")
    arguments = parser.parse_args()
    expect.set_options(timeout=PATIENCE)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder) / "model", *arguments.options) as address,
        sync_playwright() as playwright,
    ):
        browser = chromium(playwright)
        page = browser.new_context(permissions=["camera"]).new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.get_by_role("button", name="Teach the example").click()
        page.locator("#now-try").wait_for()
        print(json.dumps(measured(page, arguments.seconds), indent=2))
        browser.close()


def measured(page: Page, seconds: float) -> dict[str, float | int]:
    """Answers in some seconds, and how long one takes from the frame that is sent."""
    took: list[float] = []

    def note(request: Request) -> None:
        if "component_server" in request.url:
            took.append(request.timing["responseEnd"])

    page.get_by_role("tab", name="Try").click()
    page.get_by_role("button", name="Start the camera").click()
    expect(page.locator("#camera .camera-answer")).to_contain_text("Familiarity")
    page.wait_for_timeout(WARM_UP)
    page.on("requestfinished", note)
    started = time.monotonic()
    page.wait_for_timeout(1000 * seconds)
    passed = time.monotonic() - started
    median = statistics.median(took) if took else 0.0
    return {
        "answers": len(took),
        "seconds": round(passed, 1),
        "answers_a_second": round(len(took) / passed, 2),
        "median_milliseconds": round(median, 1),
    }


if __name__ == "__main__":
    main()

"""Makes the pictures of `docs/app.md`: teaches handwritten digits on the page and photographs its views.

    python tools/app_pictures.py                 # docs/images/app-*.png
    python tools/app_pictures.py --all FOLDER    # also at other widths, light and dark, to look at

It needs the extra `app`, playwright, and Debian's chromium.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LESSONS = (("three", "five", "nine"), ("one", "two", "eight"))
WIDTH, HEIGHT, WIDTHS = 1060, 800, (360, 800, 1400)
COLOURS = 256  # of a picture in the documents: flat areas and text need no more
DOCS = Path(__file__).resolve().parent.parent / "docs" / "images"


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", type=Path, help="folder for the views in all widths, light and dark")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = write_digits(Path(folder) / "digits")
        expect.set_options(timeout=200_000)
        residual = ("--epochs", "2", "--method.residual", "own")
        with running(Path(folder) / "numbers", *residual) as address, sync_playwright() as playwright:
            browser = chromium(playwright)
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
            page.set_default_timeout(200_000)
            for name, view in VIEWS.items():
                view(page, address, images)
                save(page, DOCS / f"app-{name}.png", COLOURS)
                for width in WIDTHS if arguments.all else ():
                    page.set_viewport_size({"width": width, "height": HEIGHT})
                    for mode in ("light", "dark"):
                        dark(page, mode == "dark")
                        save(page, arguments.all / f"{name}-{width}-{mode}.png")
                dark(page, False)
                page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
            browser.close()


def write_digits(folder: Path, each: int = 15) -> Path:
    """Digits of scikit-learn, enlarged, in folders named in words, and two files that a check finds."""
    digits = load_digits()
    for value, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for number, pixels in enumerate(digits.images[digits.target == value][:each]):
            grey = Image.fromarray((255 - pixels * 15.9).clip(0, 255).astype(np.uint8))
            grey.resize((64, 64), Image.Resampling.BICUBIC).save(folder / name / f"{name}-{number:02d}.png")
    (folder / "eight" / "notes.png").write_text("not an image")
    shutil.copy(folder / "two" / "two-03.png", folder / "one" / "scan.png")
    return folder


@contextmanager
def running(model: Path, *options: str) -> Iterator[str]:
    """The page of a new model; gives its address.

    Args:
        model: its folder.
        options: of ``duallora app``.
    """
    entry = "from duallora.cli import main; raise SystemExit(main())"
    words = [sys.executable, "-u", "-c", entry, "app", str(model), "--port", "0", *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield re.findall(r"http://[^;]+", process.stdout.readline())[0]
    finally:
        process.terminate()
        process.wait()


def start(page: Page, address: str, images: Path) -> None:
    """The view Teach of a model that knows nothing yet, with its example."""
    page.goto(address)
    page.get_by_role("button", name="Teach the example").wait_for()


def chromium(playwright: Playwright) -> Browser:
    """Debian's Chromium, with a camera that shows a moving test picture."""
    flags = ["--no-sandbox", "--disable-dev-shm-usage", "--use-fake-device-for-media-stream"]
    return playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)


def teach(page: Page, address: str, images: Path) -> None:
    """The view Teach with a second lesson that is checked and not yet learned."""
    add(page, images, LESSONS[0])
    page.get_by_role("button", name="Learn", exact=True).click()
    expect(page.locator("#learned")).to_contain_text("is learned")
    page.reload()
    add(page, images, LESSONS[1])
    page.get_by_text("cannot be read").click()
    page.get_by_text("given to two classes").click()


def learned(page: Page, address: str, images: Path) -> None:
    """The same view after the lesson."""
    page.get_by_label("Name of the lesson").fill("1, 2 and 8")
    page.get_by_role("button", name="Learn", exact=True).click()
    expect(page.locator("#learned")).to_contain_text("is learned")
    expect(page.get_by_role("button", name="Undo")).to_be_visible()
    page.locator("#learned").scroll_into_view_if_needed()


def attempt(page: Page, address: str, images: Path) -> None:
    """The view Try with a picture and a folder."""
    page.get_by_role("tab", name="Try").click()
    page.locator("#picture input[type=file]").set_input_files(str(images / "nine" / "nine-14.png"))
    expect(page.locator("#answer")).to_contain_text("Familiarity")
    page.get_by_role("button", name="Show why").click()
    expect(page.locator("#why")).to_contain_text("Bright parts")
    some = [images / name / f"{name}-1{number}.png" for number, name in enumerate(("one", "two", "four"))]
    page.locator("#try-images input[type=file]").set_input_files([str(path) for path in some])
    expect(page.locator("#try-images .field-said")).to_contain_text("ready")
    page.get_by_role("button", name="Answer all").click()
    expect(page.locator("#answers")).to_contain_text("3 images answered")


def look(page: Page, address: str, images: Path) -> None:
    """The view Look."""
    page.get_by_role("tab", name="Look").click()
    expect(page.locator("#look")).to_contain_text("Bytes of each part")


def add(page: Page, images: Path, names: tuple[str, ...]) -> None:
    """Adds classes and waits for the check."""
    for name in names:
        page.get_by_label("Class name").fill(name)
        files = [str(file) for file in sorted((images / name).iterdir())]
        page.locator("#class-images input[type=file]").set_input_files(files)
        expect(page.locator("#class-images .field-said")).to_contain_text("ready")
        page.get_by_role("button", name="Add class").click()
        expect(page.locator("#check")).to_contain_text(name)


def dark(page: Page, on: bool) -> None:
    """Switches the mode as the browser's setting does."""
    page.evaluate("on => document.body.classList.toggle('dark', on)", on)
    page.wait_for_timeout(200)


def save(page: Page, file: Path, colours: int = 0) -> None:
    """Photographs the whole page, in at most so many colours."""
    file.parent.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(300)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    if colours:  # by a method that keeps the colour of a thin line
        picture = picture.quantize(colours, Image.Quantize.MAXCOVERAGE)
    picture.save(file, optimize=True)


VIEWS = {"start": start, "teach": teach, "learned": learned, "try": attempt, "look": look}

if __name__ == "__main__":
    main()

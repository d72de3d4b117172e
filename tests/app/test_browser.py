"""The page in headless Chromium: the whole path from an empty model to undo, by mouse and by keyboard."""

from __future__ import annotations

import csv
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the extra app is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")

from app_page import CONTRAST, FOCUSED, LONG, Page
from app_tools import ARGUMENTS, CHROMIUM, NO_CHROMIUM, files_below, running_app
from command_line import images
from playwright import sync_api

from duallora.cli import main

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)]

HOSTILE = '<img src=x onerror="document.title=1">${1+1}'
sync_api.expect.set_options(timeout=LONG)

# Name of what has the focus, and whether it looks other than without.

# Texts that stand out from what is behind them by less than 4.5 to 1 (WCAG AA); disabled ones may.


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = images(tmp_path_factory.mktemp("pictures"), ["ash", "beech", "cedar", "dahlia"], 10)
    (folder / "ash" / "broken.png").write_bytes(b"no image")
    (folder / "beech" / "same.png").write_bytes((folder / "ash" / "000.png").read_bytes())
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        for name in ("cedar", "dahlia"):
            for file in sorted((folder / name).iterdir()):
                archive.write(file, f"more/{name}/{file.name}")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS, timeout=LONG)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the program keeps what the browser sends."""
    return tmp_path_factory.mktemp("copies")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A model that has learned ash and beech in one lesson."""
    folder, model = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("taught") / "trees"
    for name in ("ash", "beech"):
        shutil.copytree(
            pictures / name, folder / name, ignore=shutil.ignore_patterns("broken.png", "same.png")
        )
    words = ["learn", str(model), str(folder), "--name", "ash, beech", "--epochs", "1", "--device", "cpu"]
    assert main(words) == 0
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the page shows."""
    return tmp_path_factory.mktemp("app") / "trees"


@pytest.fixture(scope="module")
def address(model: Path, copies: Path) -> Iterator[tuple[str, str]]:
    environment = {"TMPDIR": str(copies), "OMP_NUM_THREADS": "1"}
    with running_app(model, "--epochs", "1", environment=environment) as (address, token, _):
        yield address, token


@pytest.fixture
def page(browser: sync_api.Browser, address: tuple[str, str], model: Path, taught: Path) -> Iterator[Page]:
    """The page of a model that knows ash and beech, whatever other tests have done."""
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(taught, model)
    with opened(browser, address) as page:
        yield page


@pytest.fixture
def first_page(
    browser: sync_api.Browser, address: tuple[str, str], model: Path, copies: Path
) -> Iterator[Page]:
    """The page before anything was taught, and without copies of what was sent to others."""
    shutil.rmtree(model, ignore_errors=True)
    with opened(browser, address) as page:
        page.becomes(lambda: files_below(copies), [], "copies of closed pages")
        yield page


@contextmanager
def opened(browser: sync_api.Browser, address: tuple[str, str]) -> Iterator[Page]:
    place, token = address
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    page = Page(context.new_page(), place)
    page.open(token)
    assert "token" not in page.page.url
    yield page
    elsewhere = [url for url in page.asked if not url.startswith((place, "data:", "blob:"))]
    context.close()
    assert elsewhere == [] and page.wrong == []


def test_the_whole_path(first_page: Page, pictures: Path, copies: Path) -> None:
    page = first_page
    page.says("#status", "knows nothing yet")
    sync_api.expect(page.page.get_by_role("button", name="Undo")).to_be_hidden()
    page.tab("Try")
    page.try_one(pictures / "ash" / "000.png", "learned nothing yet")
    page.tab("Teach")
    # A first lesson: what is wrong with the images is said before it is learned.
    page.add("", sorted((pictures / "ash").iterdir()))
    page.says("#intake-said", "no class name")
    page.page.get_by_label("Class name").fill("ash")
    page.page.get_by_role("button", name="Add class").click()
    page.says("#check", "1 class, 10 images", "1 unreadable", "broken.png")
    page.add("beech", sorted((pictures / "beech").iterdir()))
    page.says("#check", "2 classes, 21 images", "smallest class is ash with 10", "the same file")
    page.learn("Held-back accuracy", "of 4 images")
    page.says("#status", "2 classes from 1 lesson")
    page.says("#check", "No class yet")
    assert [path.name for path in files_below(copies)] == ["000.png"]  # which Try still shows
    page.says("#undo-part", "all that the model has learned (classes: ash, beech)")
    sync_api.expect(page.page.get_by_role("button", name="Undo")).to_be_hidden()
    # One image of each.
    page.tab("Try")
    for name in ("ash", "beech"):
        page.try_one(pictures / name / "003.png", f"{name} (", "Lesson “ash, beech”")
    # Two more classes, from a zip, and back again.
    page.tab("Teach")
    page.add("", [pictures / "more.zip"])
    page.says("#check", "2 classes, 20 images", "cedar", "dahlia")
    page.learn("taken for an old class")
    page.says("#status", "4 classes from 2 lessons")
    page.tab("Try")
    page.try_one(pictures / "cedar" / "003.png", "cedar (", "Lesson “cedar, dahlia”")
    page.tab("Look")
    page.says("#look", "Lessons in the order", "cedar, dahlia", "% of 4", "free", "bytes beside the frozen")
    page.tab("Teach")
    page.page.get_by_role("button", name="Undo").click()
    page.says("#undo-question", "The lesson “cedar, dahlia” would be taken back")
    page.page.get_by_role("button", name="Yes, take it back").click()
    page.says("#undo-said", "Undone")
    page.says("#status", "2 classes from 1 lesson")
    sync_api.expect(page.page.get_by_role("button", name="Undo")).to_be_hidden()
    # A first lesson has nothing before it: the model starts again, and learns it once more.
    page.page.get_by_role("button", name="Start again").click()
    page.says("#undo-question", "would know nothing again")
    page.page.get_by_role("button", name="Yes, take it back").click()
    page.says("#undo-said", "starts again")
    page.says("#status", "knows nothing yet")
    sync_api.expect(page.page.locator("#undo-part")).to_be_hidden()
    for name in ("ash", "beech"):
        page.add(name, sorted((pictures / name).iterdir()))
        page.says("#check", name)
    page.learn("Held-back accuracy")
    page.says("#status", "2 classes from 1 lesson")
    page.page.close()
    deadline = time.monotonic() + 300
    while files_below(copies) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert files_below(copies) == []


def test_a_folder_is_answered_as_a_table_and_a_file(page: Page, pictures: Path, tmp_path: Path) -> None:
    page.tab("Try")
    page.page.get_by_role("button", name="Answer all").click()
    page.says("#answers", "Not done", "there are no images")
    page.page.locator("#try-folder").get_by_label("Path: a folder").fill(str(pictures / "ash"))
    page.page.get_by_role("button", name="Answer all").click()
    page.says("#answers", "10 images answered; 1 file could not be read", "000.png")
    assert page.page.locator("#answers tbody tr").count() == 10
    with page.page.expect_download() as download:
        page.page.get_by_role("link", name="predictions.csv").click()
    download.value.save_as(tmp_path / "predictions.csv")
    with (tmp_path / "predictions.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 10 and {line["class"] for line in lines} == {"ash"}
    page.choose("#try-files", [pictures / "more.zip"])
    page.page.locator("#try-folder").get_by_label("Path: a folder").fill("")
    page.page.get_by_role("button", name="Answer all").click()
    page.says("#answers", "20 images answered.")


def test_a_chosen_folder_brings_its_classes(page: Page, pictures: Path) -> None:
    folder = images(pictures.parent / "leaves", ["linden", "maple"], 3)
    (folder / ".hidden").write_text("not sent")
    for _ in range(2):  # the field is emptied, and takes the same folder again
        page.page.locator("#class-chosen input").set_input_files(str(folder))
        page.says("#class-chosen", "6 files ready")
        page.page.get_by_role("button", name="Add class").click()
        page.says("#check", "2 classes, 6 images", "linden", "maple")
        sync_api.expect(page.page.locator("#class-chosen .folder-said")).to_have_text("")
        page.page.get_by_label("Class to take out").click()
        page.page.get_by_role("option", name="linden").click()
        page.page.get_by_role("button", name="Take out").click()
        page.says("#check", "1 class, 3 images")
        page.page.get_by_label("Class to take out").click()
        page.page.get_by_role("option", name="maple").click()
        page.page.get_by_role("button", name="Take out").click()
        page.says("#check", "No class yet")


def test_what_is_no_image_gives_a_sentence(page: Page, pictures: Path, tmp_path: Path) -> None:
    page.tab("Try")
    page.try_one(pictures / "ash" / "broken.png", "Not done", "broken.png is not an image")
    page.tab("Teach")
    page.page.locator("#class-folder").get_by_label("Path: a folder").fill(str(tmp_path / "nowhere"))
    page.page.get_by_role("button", name="Add class").click()
    page.says("#intake-said", "does not exist")
    (tmp_path / "no.zip").write_bytes(b"no zip")
    page.page.locator("#class-folder").get_by_label("Path: a folder").fill("")
    page.add("", [tmp_path / "no.zip"])
    page.says("#intake-said", "damaged or no zip archive")


def test_a_hostile_name_is_shown_as_it_is_and_forgotten(page: Page, pictures: Path) -> None:
    page.add(HOSTILE, sorted((pictures / "dahlia").iterdir()))
    page.says("#check", HOSTILE)
    page.learn(HOSTILE)
    page.says("#status", HOSTILE)
    page.tab("Try")
    page.try_one(pictures / "dahlia" / "001.png", HOSTILE)
    page.page.locator("#unknown-below input[type=number]").fill("1")
    page.page.locator("#unknown-below input[type=number]").press("Tab")
    page.tab("Look")
    page.says("#look", HOSTILE)
    page.page.get_by_label("What to forget").click()
    page.page.get_by_role("option", name="class: " + HOSTILE).click()
    page.page.get_by_role("button", name="Forget", exact=True).click()
    page.says("#forget-question", "Forget the class", "Undo can bring it back")
    page.page.get_by_role("button", name="Yes, forget it").click()
    page.says("#forget-said", "Forgotten: " + HOSTILE)
    page.says("#status", "2 classes from 1 lesson")
    page.tab("Teach")
    page.says("#undo-what", "would come back")
    assert page.page.title() == "trees - duallora" and not page.page.locator("img[src=x]").count()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_narrow_windows_and_both_modes(page: Page, theme: str) -> None:
    page.page.set_viewport_size({"width": 390, "height": 800})
    page.open(f"?__theme={theme}")
    for tab in ("Teach", "Try", "Look"):
        page.tab(tab)
        page.page.wait_for_timeout(300)
        page.becomes(lambda: page.page.evaluate("document.documentElement.scrollWidth <= 390"), True, tab)
        page.becomes(lambda: page.page.evaluate(CONTRAST), [], tab)
    assert page.page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")


def test_every_control_has_a_name_and_headings_are_in_order(page: Page) -> None:
    for tab in ("Teach", "Try", "Look"):
        page.tab(tab)
        page.page.wait_for_timeout(300)
        lines = page.page.locator("body").aria_snapshot().splitlines()
        kinds = r"button|textbox|combobox|checkbox|slider|spinbutton|link|tab|table|region"
        unnamed = [line for line in lines if re.match(rf"\s*- ({kinds})( \[[^]]*\])*:?$", line)]
        assert unnamed == [], tab
        levels = [int(found) for line in lines for found in re.findall(r"- heading .*\[level=(\d)\]", line)]
        assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels)), (tab, levels)


def test_the_keyboard_reaches_everything_in_order_and_shows_where_it_is(page: Page) -> None:
    seen: list[str] = []
    page.page.emulate_media(reduced_motion="reduce")  # a change is there at once
    for _ in range(30):
        page.page.keyboard.press("Tab")
        name, outline = page.page.evaluate(FOCUSED)
        if name == "":  # past the end
            break
        seen.append(name)
        assert outline, name
    wanted = [
        "Teach",
        "Class name",
        "Files: images or a zip",
        "Folder: the browser",
        "Path: a folder",
        "Add class",
        "Name of the lesson",
    ]
    places = [next(i for i, name in enumerate(seen) if want in name) for want in wanted]
    assert places == sorted(places), seen
    # A sentence for what is missing, without the mouse.
    page.page.get_by_label("Class name").focus()
    page.page.keyboard.type("elm")
    page.page.keyboard.press("Enter")
    page.says("#intake-said", "no file to add")
    page.page.get_by_role("tab", name="Teach").focus()
    page.page.keyboard.press("Tab")
    page.page.keyboard.press("Enter")
    page.page.get_by_role("heading", name="Try a picture").wait_for()

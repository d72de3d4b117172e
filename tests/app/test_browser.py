"""The page in headless Chromium: the whole path from an empty model to undo, by mouse and by keyboard."""

from __future__ import annotations

import csv
import re
import time
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the extra app is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")

from app_page import CONTRAST, FOCUSED, Page
from app_tools import CHROMIUM, NO_CHROMIUM, files_below
from command_line import images
from playwright import sync_api

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)]

HOSTILE = '<img src=x onerror="document.title=1">${1+1}'


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
    page.page.get_by_role("button", name="Show why").click()
    page.says("#why", "Why this answer", "spoke most for 'beech'", "gradient-weighted attention")
    sync_api.expect(page.page.locator("#why img")).to_be_visible()
    page.try_one(pictures / "ash" / "004.png", "ash (")
    sync_api.expect(page.page.locator("#why")).to_have_text("")  # it was of the picture before
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
    page.path("try", pictures / "ash")
    page.page.get_by_role("button", name="Answer all").click()
    page.says("#answers", "10 images answered; 1 file could not be read", "000.png")
    assert page.page.locator("#answers tbody tr").count() == 10
    with page.page.expect_download() as download:
        page.page.get_by_role("link", name="predictions.csv").click()
    download.value.save_as(tmp_path / "predictions.csv")
    with (tmp_path / "predictions.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 10 and {line["class"] for line in lines} == {"ash"}
    page.choose("#try-images", [pictures / "more.zip"])
    page.path("try", "")
    page.page.get_by_role("button", name="Answer all").click()
    page.says("#answers", "20 images answered.")


def test_a_chosen_folder_brings_its_classes(page: Page, pictures: Path) -> None:
    folder = images(pictures.parent / "leaves", ["linden", "maple"], 3)
    (folder / ".hidden").write_text("not sent")
    page.page.locator("#class-otherwise button").first.click()
    for _ in range(2):  # the field is emptied, and takes the same folder again
        page.page.locator("#class-folder input").set_input_files(str(folder))
        page.says("#class-folder", "6 files ready: 000.png, 001.png and 4 more")
        page.page.get_by_role("button", name="Add class").click()
        page.says("#check", "2 classes, 6 images", "linden", "maple")
        sync_api.expect(page.page.locator("#class-folder .field-said")).to_have_text("")
        page.page.get_by_label("Class to take out").click()
        page.page.get_by_role("option", name="linden").click()
        page.page.get_by_role("button", name="Take out", exact=True).click()
        page.says("#check", "1 class, 3 images")
        page.page.get_by_label("Class to take out").click()
        page.page.get_by_role("option", name="maple").click()
        page.page.get_by_role("button", name="Take out", exact=True).click()
        page.says("#check", "No class yet")


def test_what_was_chosen_can_be_taken_out_again(page: Page, pictures: Path) -> None:
    page.choose("#class-images", [pictures / "ash" / "000.png"])
    page.page.locator("#class-images").get_by_role("button", name="Take these out").click()
    page.says("#class-images .field-said", "Taken out")
    page.page.get_by_role("button", name="Add class").click()
    page.says("#intake-said", "no file to add")


def test_what_is_no_image_gives_a_sentence(page: Page, pictures: Path, tmp_path: Path) -> None:
    page.tab("Try")
    page.try_one(pictures / "ash" / "broken.png", "Not done", "broken.png is not an image")
    page.tab("Teach")
    page.path("class", tmp_path / "nowhere")
    page.page.get_by_role("button", name="Add class").click()
    page.says("#intake-said", "does not exist")
    (tmp_path / "no.zip").write_bytes(b"no zip")
    page.path("class", "")
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
def test_windows_of_all_widths_in_both_modes(page: Page, theme: str) -> None:
    page.open(f"?__theme={theme}")
    assert page.page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    for tab in ("Teach", "Try", "Look"):
        page.tab(tab)
        for width in (360, 800, 1400):
            page.page.set_viewport_size({"width": width, "height": 800})
            fits = "document.documentElement.scrollWidth <= window.innerWidth"
            page.becomes(lambda fits=fits: page.page.evaluate(fits), True, f"{tab} at {width}")
        page.becomes(lambda: page.page.evaluate(CONTRAST), [], tab)


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
        "Images of the class",
        "A whole folder instead",
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

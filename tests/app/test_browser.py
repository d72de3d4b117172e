"""The page in headless Chromium: the whole path from an empty model to undo, by mouse and by keyboard."""

from __future__ import annotations

import csv
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the extra app is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")

from app_tools import ARGUMENTS, CHROMIUM, NO_CHROMIUM, files_below, running_app
from command_line import images
from playwright import sync_api

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

HOSTILE = '<img src=x onerror="document.title=1">${1+1}'
LONG = 180_000  # ms
sync_api.expect.set_options(timeout=LONG)

# Name of what has the focus, and whether it looks other than without.
FOCUSED = """() => {
  const it = document.activeElement;
  if (it === document.body) return ["", true];
  const label = it.labels?.[0]?.innerText || it.getAttribute("aria-label") || it.innerText || it.tagName;
  const look = () => {
    const { outlineStyle, outlineColor, outlineWidth, boxShadow, borderColor } = getComputedStyle(it);
    return [outlineStyle, outlineColor, outlineWidth, boxShadow, borderColor].join();
  };
  const focused = look();
  it.blur();
  const plain = look();
  it.focus();
  return [label, plain !== focused];
}"""

# Texts that stand out from what is behind them by less than 4.5 to 1 (WCAG AA); disabled ones may.
CONTRAST = """() => {
  const rgba = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith("color(srgb") ? [255 * r, 255 * g, 255 * b, a] : [r, g, b, a];
  };
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
  const behind = (element) => {
    if (!element) return [255, 255, 255];
    return over(rgba(getComputedStyle(element).backgroundColor), behind(element.parentElement));
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), weak = [];
  while (walker.nextNode()) {
    const place = walker.currentNode.parentElement, words = walker.currentNode.textContent.trim();
    if (!words || !place.offsetParent || place.closest("script, style, :disabled, .unseen")) continue;
    const look = getComputedStyle(place), ground = behind(place);
    if (look.visibility === "hidden" || Number(look.opacity) === 0) continue;
    const [a, b] = [light(over(rgba(look.color), ground)), light(ground)].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) weak.push(`${words} ${((a + 0.05) / (b + 0.05)).toFixed(2)}`);
  }
  return weak;
}"""


class Page:
    """The page as a person uses it, and what it asked the network for."""

    def __init__(self, page: sync_api.Page, address: str) -> None:
        self.page, self.address = page, address
        self.asked: list[str] = []
        self.wrong: list[str] = []
        page.set_default_timeout(LONG)
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))

    def open(self, query: str = "") -> None:
        self.page.goto(self.address + query)
        self.page.get_by_role("heading", name="Teach new classes").wait_for()
        self.page.locator("#status p").first.wait_for()  # what is drawn when the page has been loaded
        self.page.locator("#class-files button[aria-label^=Files]").wait_for()  # by the page's own script

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()
        sync_api.expect(self.page.locator(f"#{name.lower()}-tab")).to_be_visible()

    def becomes(self, look: Callable[[], object], wanted: object, what: str) -> None:
        """What is looked at takes a moment to change, and on a busy machine a longer one."""
        deadline = time.monotonic() + LONG / 1000
        while (found := look()) != wanted and time.monotonic() < deadline:
            self.page.wait_for_timeout(100)
        assert found == wanted, what

    def says(self, where: str, *parts: str) -> None:
        for part in parts:
            sync_api.expect(self.page.locator(where)).to_contain_text(part)

    def add(self, name: str, files: list[Path]) -> None:
        self.page.get_by_label("Class name").fill(name)
        self.choose("#class-files", files)
        self.page.get_by_role("button", name="Add class").click()

    def choose(self, where: str, files: list[Path]) -> None:
        self.page.locator(f"{where} input[type=file]").set_input_files([str(file) for file in files])
        sync_api.expect(self.page.locator(f"{where} .file-preview tr, {where} img")).not_to_have_count(0)

    def learn(self, *parts: str) -> None:
        button = self.page.get_by_role("button", name="Learn", exact=True)
        sync_api.expect(button).to_be_enabled()
        button.click()
        self.says("#learned", "is learned", *parts)

    def try_one(self, file: Path, *parts: str) -> None:
        clear = self.page.locator("#picture button[aria-label=Clear]")
        if clear.count():
            clear.click()
            self.says("#answer", "Drop, choose")
        self.page.locator("#picture input[type=file]").set_input_files(str(file))
        self.says("#answer", *parts)


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
def address(tmp_path_factory: pytest.TempPathFactory, copies: Path) -> Iterator[tuple[str, str]]:
    model = tmp_path_factory.mktemp("app") / "trees"
    environment = {"TMPDIR": str(copies), "OMP_NUM_THREADS": "1"}
    with running_app(model, "--epochs", "1", environment=environment) as (address, token, _):
        yield address, token


@pytest.fixture
def page(browser: sync_api.Browser, address: tuple[str, str]) -> Iterator[Page]:
    place, token = address
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    page = Page(context.new_page(), place)
    page.open(token)
    assert "token" not in page.page.url
    yield page
    elsewhere = [url for url in page.asked if not url.startswith((place, "data:", "blob:"))]
    context.close()
    assert elsewhere == [] and page.wrong == []


def test_the_whole_path(page: Page, pictures: Path, copies: Path) -> None:
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
        page.try_one(pictures / name / "003.png", f"{name} (", "Lesson “ash, beech”", "no residual adapters")
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

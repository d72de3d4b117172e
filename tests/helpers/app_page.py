"""The page in a browser, as a person uses it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from playwright import sync_api

LONG = 180_000  # ms


FOCUSED = """() => {
  const it = document.activeElement;
  if (it === document.body) return ["", true];
  const label = it.getAttribute("aria-label") || it.labels?.[0]?.innerText || it.innerText || it.tagName;
  const seen = it.classList.contains("unseen") ? it.parentElement : it;
  const look = () => {
    const { outlineStyle, outlineColor, outlineWidth, boxShadow, borderColor } = getComputedStyle(seen);
    return [outlineStyle, outlineColor, outlineWidth, boxShadow, borderColor].join();
  };
  const focused = look();
  it.blur();
  const plain = look();
  it.focus();
  return [label, plain !== focused];
}"""


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
        self.page.locator("#class-images input").wait_for(state="attached")

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
        self.choose("#class-images", files)
        self.page.get_by_role("button", name="Add class").click()

    def choose(self, where: str, files: list[Path]) -> None:
        self.page.locator(f"{where} input[type=file]").set_input_files([str(file) for file in files])
        self.says(f"{where} .field-said", f"{len(files)} file", "ready")

    def path(self, name: str, folder: Path | str) -> None:
        """Types the path of a folder, behind the line that opens."""
        field = self.page.locator(f"#{name}-path input, #{name}-path textarea").first
        if not field.is_visible():
            self.page.locator(f"#{name}-otherwise button").first.click()
        field.fill(str(folder))

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

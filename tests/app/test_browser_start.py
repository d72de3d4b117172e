"""The page in headless Chromium: a newcomer's first minute, and the camera."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the extra app is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")

from app_page import CONTRAST, Page
from app_tools import CHROMIUM, NO_CHROMIUM, files_below
from playwright import sync_api

from duallora.app import example

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)]

ON = "document.querySelector('.camera-picture').srcObject?.active ?? false"
ASKED = re.compile("/component_server")


def start(page: Page) -> None:
    page.page.get_by_role("button", name="Start the camera").click()
    page.says("#camera .camera-said", "The camera is on")


def test_an_example_is_taught_by_one_press_and_tried_by_another(first_page: Page, copies: Path) -> None:
    page = first_page
    headings = page.page.get_by_role("heading", level=2)
    sync_api.expect(headings.first).to_have_text("New here? Start with an example")
    assert page.page.evaluate(CONTRAST) == []
    page.page.get_by_role("button", name="Teach the example").click()
    page.says("#example-said", "Done", "has learned ring, star, triangle", "held back")
    page.says("#status", "3 classes from 1 lesson")
    sync_api.expect(page.page.locator("#example")).to_be_hidden()
    assert files_below(copies) == []  # its drawings are gone
    page.page.locator("#now-try").get_by_role("button", name="Try drawing 2").click()
    page.says("#answer", "Lesson “example shapes”")
    answer = page.page.locator("#answer .answer").inner_text()
    assert re.split(r"[ ,]", answer)[0] in (*example.CLASSES, "unknown")
    page.page.locator("#example-offer").get_by_role("button", name="Try drawing 1").click()
    page.says("#answer", "Most probable classes")
    page.tab("Teach")
    page.page.get_by_role("button", name="Start again").click()
    page.page.get_by_role("button", name="Yes, take it back").click()
    page.says("#status", "knows nothing yet")
    sync_api.expect(page.page.get_by_role("button", name="Teach the example")).to_be_visible()
    sync_api.expect(page.page.locator("#now-try")).to_be_hidden()


def test_the_camera_is_answered_live_and_leaves_nothing_on_the_disk(page: Page, copies: Path) -> None:
    page.page.context.grant_permissions(["camera"])
    before = set(files_below(copies))
    page.tab("Try")
    start(page)
    page.says("#camera .camera-answer", "Familiarity")
    page.says("#camera .camera-rate", "answers a second")
    assert page.page.locator("#camera .camera-class").inner_text() in ("ash", "beech", "unknown")
    assert set(files_below(copies)) <= before
    page.tab("Look")  # a view that is left needs no camera
    page.becomes(lambda: page.page.evaluate(ON), False, "camera")
    page.tab("Try")
    page.says("#camera .camera-said", "this view was left")
    start(page)
    page.page.get_by_role("button", name="Keep this picture").click()
    page.says("#camera .camera-said", "stands above")
    page.says("#answer", "Most probable classes")
    assert page.page.evaluate(ON) is False


def test_without_the_permission_one_sentence_says_what_to_do(page: Page) -> None:
    page.page.context.clear_permissions()
    page.tab("Try")
    page.page.get_by_role("button", name="Start the camera").click()
    page.says("#camera .camera-said", "does not let this page use the camera; allow it")
    sync_api.expect(page.page.get_by_role("button", name="Start the camera")).to_be_enabled()


def test_frames_are_dropped_while_an_answer_is_slow(page: Page) -> None:
    page.page.context.grant_permissions(["camera"])
    page.tab("Try")
    asked: list[sync_api.Route] = []
    page.page.route(ASKED, lambda route: asked.append(route))
    start(page)
    page.becomes(lambda: len(asked), 1, "the first frame")
    page.page.wait_for_timeout(1_000)  # several frames long
    assert len(asked) == 1
    asked[0].continue_()
    page.becomes(lambda: len(asked), 2, "the next frame, once there is an answer")
    page.says("#camera .camera-answer", "Familiarity")
    page.page.get_by_role("button", name="Stop the camera").click()
    page.says("#camera .camera-said", "The camera is off")
    page.page.unroute_all(behavior="ignoreErrors")


def test_a_program_that_has_gone_is_said(page: Page) -> None:
    page.page.context.grant_permissions(["camera"])
    page.tab("Try")
    page.page.route(ASKED, lambda route: route.abort())
    start(page)
    page.says("#camera .camera-said", "does not answer any more")
    assert page.page.evaluate(ON) is False


def test_images_are_dropped_into_the_field(page: Page) -> None:
    dropped = """() => {
      const given = new DataTransfer();
      for (const name of ["a.png", "b.png", ".hidden"]) given.items.add(new File(["no image"], name));
      return given;
    }"""
    handle = page.page.evaluate_handle(dropped)
    page.page.locator("#class-images .drop").dispatch_event("drop", {"dataTransfer": handle})
    page.says("#class-images .field-said", "2 files ready: a.png, b.png.")
    page.page.get_by_label("Class name").fill("dropped")
    page.page.get_by_role("button", name="Add class").click()
    page.says("#check", "dropped", "2 unreadable", "2 files cannot be read")
    sync_api.expect(page.page.locator("#class-images .field-said")).to_have_text("")


def test_reading_images_says_how_far_it_is(page: Page, pictures: Path) -> None:
    shown = threading.Event()
    page.page.expose_function("seen", shown.set)
    watch = "new MutationObserver(() => document.querySelector('#intake-progress progress') && seen())"
    page.page.evaluate(f"{watch}.observe(document.body, {{ childList: true, subtree: true }})")
    page.path("class", pictures / "ash")
    page.page.get_by_label("Class name").fill("ash again")
    page.page.get_by_role("button", name="Add class").click()
    page.says("#intake-said", "ash again added")
    assert shown.is_set()
    sync_api.expect(page.page.locator("#intake-progress progress")).to_have_count(0)

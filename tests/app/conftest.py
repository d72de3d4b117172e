"""A running page and a browser that looks at it; the tests of a module share both, and no more."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from app_tools import ARGUMENTS, CHROMIUM, files_below, running_app
from command_line import images

from duallora.cli import main

if TYPE_CHECKING:
    from app_page import Page
    from playwright.sync_api import Browser

SHORT = ("--epochs", "1", "--method.min_steps", "0")
"""Of a lesson."""


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
def browser() -> Iterator[Browser]:
    from app_page import LONG
    from playwright import sync_api

    sync_api.expect.set_options(timeout=LONG)
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
    words = ["learn", str(model), str(folder), "--name", "ash, beech", "--device", "cpu", *SHORT]
    assert main(words) == 0
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the page shows."""
    return tmp_path_factory.mktemp("app") / "trees"


@pytest.fixture(scope="module")
def address(model: Path, copies: Path) -> Iterator[tuple[str, str]]:
    environment = {"TMPDIR": str(copies), "OMP_NUM_THREADS": "1"}
    with running_app(model, *SHORT, environment=environment) as (address, token, _):
        yield address, token


@pytest.fixture
def page(browser: Browser, address: tuple[str, str], model: Path, taught: Path) -> Iterator[Page]:
    """The page of a model that knows ash and beech, whatever other tests have done."""
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(taught, model)
    with opened(browser, address) as page:
        yield page


@pytest.fixture
def first_page(browser: Browser, address: tuple[str, str], model: Path, copies: Path) -> Iterator[Page]:
    """The page before anything was taught, and without copies of what was sent to others."""
    shutil.rmtree(model, ignore_errors=True)
    with opened(browser, address) as page:
        page.becomes(lambda: files_below(copies), [], "copies of closed pages")
        yield page


@contextmanager
def opened(browser: Browser, address: tuple[str, str]) -> Iterator[Page]:
    from app_page import Page

    place, token = address
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    page = Page(context.new_page(), place)
    page.open(token)
    assert "token" not in page.page.url
    yield page
    elsewhere = [url for url in page.asked if not url.startswith((place, "data:", "blob:"))]
    context.close()
    assert elsewhere == [] and page.wrong == []

"""Comparisons: without processes on a tiny backbone, and one with processes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command_line import Call, Called, caller
from compare_tools import (
    SMALL,
    Started,
    quick,
    words_of,
)

from duallora.cli import main


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    return quick(monkeypatch)


@pytest.fixture
def call(started: Started, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    return caller(capsys)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison: two seeds of three lines, one of which has the start of another's name."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "lora-x.yaml").write_text("method: {name: lora, rank: 3, projections: qv, tau: 2}\n")
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        assert main(words_of(folder, "lora,ncm,joint", folder / "lora-x.yaml")) == 0
    return folder


@pytest.fixture
def finished(template: Path, tmp_path: Path) -> Path:
    """A copy of the finished comparison; its folder."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Called]:
    """A comparison in two processes at a time, on the embedded backbone; one of the lines cannot be run."""
    folder = tmp_path_factory.mktemp("real")
    bad = folder / "deep.yaml"
    bad.write_text("method: {name: lora, first_adapted_layer: 99}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["compare", "--methods", f"joint,{bad.name}", "--out", "out", "--jobs", "2"]
        code = main([*words, *SMALL, "--epochs", "1"])
    return folder, Called(code, "", "")

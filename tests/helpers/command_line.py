"""Calls commands in process, makes folders of images for them, and notes what lies on the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from tiny import IMAGE, tiny_backbone

from duallora.cli import main


class Called(NamedTuple):
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


Call = Callable[..., Called]


def caller(capsys: pytest.CaptureFixture[str]) -> Call:
    """A function that runs ``duallora WORDS...`` in this process."""

    def call(*words: object) -> Called:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Called(code, *capsys.readouterr())

    return call


def use_tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a tiny random ViT stand for every backbone: commands then take a fraction of a second."""
    for module in ("learner", "backbones.backbone"):
        monkeypatch.setattr(f"duallora.{module}.load_backbone", lambda *_: tiny_backbone())
    monkeypatch.setattr("duallora.runs.results._SPEED_IMAGES", 4)  # nobody looks at how fast it is


def taught_once(model: Path, *folders: Path) -> Path:
    """Teaches a model the folders, one lesson each, on the tiny backbone; tests take copies of it."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_backbone(patch)
        for folder in folders:
            assert main(["learn", str(model), str(folder), "--epochs", "1"]) == 0
    return model


def images(folder: Path, classes: Sequence[str], count: int = 4, seed: int = 0) -> Path:
    """Writes ``count`` noisy images a class, of a colour that belongs to its name, and returns the folder."""
    for name in classes:
        rng = np.random.default_rng([seed, *name.encode()])
        colour = np.random.default_rng(list(name.encode())).integers(0, 255, 3)
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = colour + rng.normal(0, 20, (IMAGE, IMAGE, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / name / f"{number:03d}.png")
    return folder


def on_disk(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below ``folder``, with the files' content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def assert_refused(called: Called, *parts: str, code: int = 2) -> None:
    """One sentence on stderr that has all the parts, nothing on stdout, and the exit code."""
    assert called.code == code, called
    assert called.out == ""
    (sentence,) = called.err.splitlines()
    assert sentence.startswith("duallora: ")
    assert not [part for part in parts if part not in sentence], sentence

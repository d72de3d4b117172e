"""Processes that decode: the same pixels, the same sentences, and bounds that hold for any decoder."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from duallora.data import decoding
from duallora.data.decoding import DecoderEnded, Decoders
from duallora.data.images import TooManyPixels, decode_image, read_image
from duallora.errors import DualLoRAError

# A module that Python imports when it starts: a decoder with a fault that nobody knows of.
FAULTY = """
from PIL import PngImagePlugin
def load(self):
    {fault}
PngImagePlugin.PngImageFile.load = load
"""
FAULTS = {
    "never ends": "while True: pass",
    "swells": "self.kept = [bytearray(1 << 28) for _ in range(400)]; raise MemoryError",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "waits": "import time; time.sleep(3600)",
}


def photo(kind: str = "PNG", size: tuple[int, int] = (70, 50)) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    made = Decoders(1, 1_000_000)
    yield made
    made.close()


def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULTY.format(fault=FAULTS[fault]))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pixels_are_those_of_this_process(decoders: Decoders, tmp_path: Path, kind: str) -> None:
    data = photo(kind, (701, 523))
    own = np.asarray(decode_image(data, "photo"))
    assert np.array_equal(np.asarray(decoders.decode(data, "photo")), own)
    (tmp_path / "photo").write_bytes(data)
    assert np.array_equal(np.asarray(decoders.read(tmp_path / "photo")), own)


def test_sentences_are_those_of_this_process(decoders: Decoders, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "täxt.png").write_bytes(b"no image")
    for path in (tmp_path / "pipe.png", tmp_path / "täxt.png", tmp_path / "nothing.png", tmp_path):
        with pytest.raises(DualLoRAError) as own:
            read_image(path)
        with pytest.raises(DualLoRAError) as other:
            decoders.read(path)
        assert str(own.value) == str(other.value)
    with pytest.raises(TooManyPixels, match="huge has more than 1,000,000 pixels"):
        decoders.decode(photo(size=(1200, 1000)), "huge")


@pytest.mark.parametrize(
    "fault",
    ["crashes", *(pytest.param(name, marks=pytest.mark.process) for name in ("never ends", "swells"))],
)
def test_a_decoder_with_an_unknown_fault_takes_nothing_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(decoding, "_BASE_SECONDS", 0.5)
    faulty(tmp_path, monkeypatch, fault)
    made = Decoders(1, 1_000_000)
    try:
        with pytest.raises(DualLoRAError, match=r"^photo (takes more time or memory|cannot be decoded, for)"):
            made.decode(photo("PNG"), "photo")
        assert made.decode(photo("JPEG"), "photo").size == (70, 50)  # the next image is none the worse
    finally:
        made.close()


def test_a_decoder_that_waits_is_given_up_at_the_moment_that_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoders: Decoders
) -> None:
    faulty(tmp_path, monkeypatch, "waits")
    decoders.decode(photo("JPEG"), "photo")  # it has started
    with pytest.raises(DecoderEnded, match="photo takes more time"):
        decoders.decode(photo("PNG"), "photo", until=time.monotonic() + 0.5)


def test_closing_ends_what_is_being_decoded_and_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoders: Decoders
) -> None:
    faulty(tmp_path, monkeypatch, "waits")
    decoders.decode(photo("JPEG"), "photo")
    ended = []

    def ask() -> None:
        with pytest.raises(DualLoRAError):
            decoders.decode(photo("PNG"), "photo")
        ended.append(True)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    decoders.close()
    for thread in threads:
        thread.join(60)
    assert len(ended) == 3


def test_a_process_that_was_killed_is_replaced(decoders: Decoders) -> None:
    decoders.decode(photo(), "photo")
    process = decoders._all[0]._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert decoders.decode(photo(), "photo").size == (70, 50)


def test_a_folder_beside_the_program_is_no_module_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoders: Decoders
) -> None:
    (tmp_path / "PIL").mkdir()
    (tmp_path / "PIL" / "__init__.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert decoders.decode(photo(), "photo").size == (70, 50)

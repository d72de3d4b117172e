"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from duallora.errors import DualLoRAError
from duallora.storage import atomic, checkpoint


def test_an_atomic_write_replaces_the_target_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    checkpoint.write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def test_an_atomic_write_to_a_pipe_goes_through_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    checkpoint.write_atomic(tmp_path / "pipe", b"new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)


def test_an_atomic_write_into_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DualLoRAError, match="could not be written: No such file"):
        checkpoint.write_atomic(tmp_path / "gone" / "file", b"")


def test_a_large_file_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_CHUNK", 7)
    checkpoint.write_atomic(tmp_path / "file", bytes(range(100)))
    assert (tmp_path / "file").read_bytes() == bytes(range(100))

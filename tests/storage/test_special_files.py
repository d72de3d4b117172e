"""Pipes, sockets, devices and what the kernel makes up are named, and never waited for."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from duallora.app.uploads import Uploads, files_of
from duallora.backbones.weight_file import WeightFile
from duallora.commands.configs import read_config
from duallora.data.images import find_images, read_image
from duallora.errors import DualLoRAError
from duallora.serving.guard import read_token
from duallora.storage import checkpoint
from duallora.storage.atomic import exclusive, sha256_of
from duallora.storage.regular import NotRegular, open_regular, read_text
from duallora.streams.folder import FolderDataset
from duallora.streams.listed import read_lines
from duallora.streams.table import read_table


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def linked_pipe(path: Path) -> Path:
    os.mkfifo(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))
    return path


def unix_socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(path.parent)  # such a name may only be a hundred letters long
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)
    return path


def device(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


def of_the_kernel(path: Path) -> Path:
    path.symlink_to("/proc/self/environ")
    return path


SPECIAL = [pipe, linked_pipe, unix_socket, device, of_the_kernel]
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "an image": ("a.png", read_image),
    "the description of a model": ("model.json", lambda path: checkpoint.read(path.parent)),
    "weights of a backbone": ("w.safetensors", WeightFile.read),
    "a table": ("a.csv", read_table),
    "a list": ("a.txt", read_lines),
    "a configuration": ("c.yaml", lambda path: read_config(str(path))),
    "a token": ("token", read_token),
    "a file to be hashed": ("a", sha256_of),
}


@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("reader", READERS)
def test_nothing_but_a_regular_file_is_read(
    tmp_path: Path, reader: str, make: Callable[[Path], Path]
) -> None:
    name, read = READERS[reader]
    path = make(tmp_path / name)
    with pytest.raises(DualLoRAError, match=r"(a pipe|a socket|a device), not a file|of the system"):
        read(path)


@pytest.mark.parametrize("make", SPECIAL)
def test_a_zip_is_a_regular_file(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with Uploads() as uploads, pytest.raises(DualLoRAError, match=r"name a regular file|of the system"):
        uploads.unpack(make(tmp_path / "a.zip"), "a.zip")


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[Path]:
    import torch

    with exclusive(tmp_path / "model"):
        name = checkpoint.commit(tmp_path / "model", {}, {"a": torch.zeros(2)})
        yield tmp_path / "model" / name


def test_weights_of_a_model_are_a_regular_file(weights: Path) -> None:
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(DualLoRAError, match="is a pipe"):
        checkpoint.read(weights.parent)


@pytest.mark.parametrize("skip", [False, True])
def test_a_pipe_in_a_class_folder_is_named(tmp_path: Path, skip: bool) -> None:
    from PIL import Image

    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / name / "a.png")
    os.mkfifo(tmp_path / "ant" / "b.png")
    with pytest.raises(DualLoRAError, match=r"b\.png is a pipe"):
        FolderDataset(tmp_path, skip_bad_images=skip)
    (tmp_path / "ant" / "b.png").unlink()
    (tmp_path / "ant" / "b.png").symlink_to("nowhere")
    lenient = FolderDataset(tmp_path, skip_bad_images=True)
    lenient.check()
    assert [path.name for path in lenient.paths] == ["a.png", "a.png"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_folders_of_the_kernel_are_not_walked() -> None:
    for folder in ("/proc/self", "/proc", "/sys"):
        with pytest.raises(DualLoRAError, match="of the system"):
            find_images(Path(folder))
        with pytest.raises(DualLoRAError, match="of the system"):
            files_of(Path(folder))


def test_links_to_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("ü\r\n".encode())
    (tmp_path / "b").symlink_to("a")
    with open_regular(tmp_path / "b") as file:
        assert file.read() == "ü\r\n".encode()
    assert read_text(tmp_path / "b") == "ü\n"
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "c")
    with pytest.raises(NotRegular):
        open_regular("/dev/null")


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_the_lock_of_a_folder_is_a_file_of_its_own(tmp_path: Path, kind: str) -> None:
    folder, other = tmp_path / "model", tmp_path / "other"
    folder.mkdir()
    other.write_text("keep")
    if kind == "link":
        (folder / ".lock").symlink_to(other)
    elif kind == "dangling link":
        (folder / ".lock").symlink_to(tmp_path / "new")
    elif kind == "pipe":
        os.mkfifo(folder / ".lock")
    else:
        (folder / ".lock").mkdir()
    with pytest.raises(DualLoRAError, match=r"\.lock is not the lock file"), exclusive(folder):
        pass
    assert other.read_text() == "keep" and not (tmp_path / "new").exists()

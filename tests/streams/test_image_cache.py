"""Decoded images are kept once, in the process that reads them, as far as there is room."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from duallora import ContinualLearner, DualLoRAConfig, streams
from duallora import training as train
from duallora.runs import protocol
from duallora.runs.protocol import run_stream
from duallora.runtime.compute import Compute
from duallora.runtime.progress import Progress
from duallora.streams import image_cache as kept_images
from duallora.streams.image_cache import KeptImages, Memory, keeping


class Source:
    """Three images that count how often they are read."""

    def __init__(self, mode: str = "RGB") -> None:
        self.mode, self.reads = mode, [0, 0, 0]

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.reads[index] += 1
        return Image.new(self.mode, (10, 10)), index


def test_images_are_read_once_as_far_as_they_fit() -> None:
    source = Source()
    cached = KeptImages(source, Memory(2 * 400))
    for _ in range(4):
        assert [cached[i][1] for i in range(len(cached))] == [0, 1, 2]
    assert source.reads == [1, 1, 4]
    tensors = KeptImages([(torch.zeros(3, 4, 4, dtype=torch.uint8), 0)], Memory(48))  # type: ignore[arg-type]
    assert tensors[0][0] is tensors[0][0]


def test_images_are_filled_in_the_order_of_the_positions() -> None:
    source = Source()
    KeptImages(source, Memory(10_000)).fill([1, 2], threads=2)
    assert source.reads == [0, 1, 1]
    filled = KeptImages(source, Memory(2 * 400))
    filled.fill([2, 0, 1], threads=2)
    before = list(source.reads)
    assert [filled[i][1] for i in (2, 0)] == [2, 0]
    assert source.reads == before


@pytest.mark.parametrize(("mode", "size"), [("1", 100), ("L", 100), ("P", 100), ("RGB", 400), ("LA", 400)])
def test_an_image_counts_as_pillow_holds_it(mode: str, size: int) -> None:
    memory = Memory(1000)
    assert KeptImages(Source(mode), memory)[0][1] == 0
    assert memory.free == 1000 - size


def test_a_worker_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, source = Memory(1000), Source()
    cached = KeptImages(source, memory)
    cached[0]
    with monkeypatch.context() as patch:
        patch.setattr(kept_images, "get_worker_info", lambda: "a worker")
        for index in (0, 1, 1):
            cached[index]
    assert source.reads == [1, 2, 0]  # what was kept before is read there, what was not is not kept there
    assert memory.free == 600


def test_a_worker_that_is_no_fork_gets_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    part = streams.digits(tasks=1, classes=2, train_per_class=3).tasks[0].train
    memory = Memory(10**6)
    kept = keeping(part, memory, 2, range(len(part)))
    assert memory.free < 10**6
    assert len(pickle.dumps(kept)) < len(pickle.dumps(part)) + 1000
    assert pickle.loads(pickle.dumps(kept))[0][1] == part[0][1]
    monkeypatch.setattr(kept_images.multiprocessing, "get_start_method", lambda: "spawn")
    unused = Memory(10**6)
    keeping(part, unused, 2, range(len(part)))
    assert unused.free == 10**6


def test_workers_change_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they get is picklable too, as those have to be given it that are no forks."""
    stream = streams.digits(tasks=2, classes=4, train_per_class=6, holdout=4)
    memories: list[Memory] = []
    used: list[int] = []

    def noted(size: int) -> Memory:
        memories.append(Memory(size))
        return memories[-1]

    def loader(views: Any, **options: Any) -> Any:
        used.append(options["num_workers"])
        return DataLoader(
            pickle.loads(pickle.dumps(views)) if not options["num_workers"] else views, **options
        )

    monkeypatch.setattr(train, "_FEW", 0)
    monkeypatch.setattr(train, "DataLoader", loader)
    monkeypatch.setattr(protocol, "Memory", noted)

    def run(workers: int) -> bytes:
        machine, out = Compute("cpu", precision="32", workers=workers).start(), tmp_path / str(workers)
        config, quiet = DualLoRAConfig(epochs=1, batch_size=8), Progress(quiet=True)
        run_stream(
            lambda: ContinualLearner(method=config, augment="crop", device=machine),
            stream,
            out,
            {},
            device=machine,
            progress=quiet,
        )
        return (out / "predictions.csv").read_bytes()

    alone = run(0)
    assert not any(used)
    used.clear()
    memories.clear()
    assert run(2) == alone
    assert set(used) == {2}
    room = Compute("cpu").start().image_bytes // 2
    assert [room - memory.free for memory in memories] == [16 * 256, 12 * 256, 12 * 256]  # tests, two tasks

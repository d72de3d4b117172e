"""How a run reads its images: counted decodes, processes and passes, and equal results whoever reads."""

from __future__ import annotations

import json
import multiprocessing.process
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_tasks import small_config
from tiny import tiny_backbone

from duallora import ContinualLearner
from duallora.bench.counts import images_seen
from duallora.data import loader as loader_module
from duallora.runs.protocol import run_stream
from duallora.runtime.compute import Compute
from duallora.runtime.progress import Progress
from duallora.streams.task import Stream, Task, TaskDataset

pytestmark = pytest.mark.slow

EPOCHS, TRAIN, TEST, TASKS = 3, 12, 6, 3


class Noted:
    """Images of two classes that note in a file, for all processes, which of them is decoded."""

    def __init__(self, file: Path, seed: int, count: int) -> None:
        self.file, self.seed, self.count = file, seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with self.file.open("a") as file:
            file.write(f"{self.seed}/{index}\n")
        draw = np.random.default_rng([self.seed, index])
        pixels = draw.integers(0, 128, (40, 40, 3)) + 100 * (index % 2)
        return Image.fromarray(pixels.astype(np.uint8)), index % 2


def stream(file: Path) -> Stream:
    def part(seed: int, task: int, count: int) -> TaskDataset:
        names, targets = [f"{task} a", f"{task} b"], [i % 2 for i in range(count)]
        identifiers = [f"{seed}-{i}" for i in range(count)]
        base: Any = Noted(file, seed, count)
        return TaskDataset(base, range(count), classes=names, targets=targets, identifiers=identifiers)

    tasks = tuple(Task(f"task {t}", part(2 * t, t, TRAIN), part(2 * t + 1, t, TEST)) for t in range(TASKS))
    return Stream("noted", tasks, tuple(name for task in tasks for name in task.train.classes), 0)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "START_WORTH", -1.0)
    monkeypatch.setattr(loader_module, "SEND_WORTH", -1.0)
    monkeypatch.setattr(loader_module, "CHEAP", 0.0)
    # It asks for images that are decoded already, again and again.
    monkeypatch.setattr("duallora.runs.results.images_per_second", lambda *_: 1.0)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    start = multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(
        multiprocessing.process.BaseProcess, "start", lambda self: (found.append(self), start(self))[1]
    )
    return found


def run(out: Path, workers: int, image_memory: float = 0.01) -> tuple[Counter[str], int]:
    """How often each image was decoded, and how many images entered the backbone."""
    out.mkdir()
    file = out / "decoded"
    compute = Compute("cpu", precision="32", workers=workers, image_memory=image_memory)
    machine, backbone = compute.start(), tiny_backbone()
    config = small_config("duallora", epochs=EPOCHS, batch_size=4)
    with images_seen(backbone) as seen:
        run_stream(
            lambda: ContinualLearner(backbone, config, device=machine),
            stream(file),
            out / "run",
            {},
            device=machine,
            progress=Progress(quiet=True),
        )
    return Counter(file.read_text().split()), seen.images


def state(out: Path) -> tuple[bytes, list[bytes], Any]:
    """Predictions, the model and every figure of a run that is no time."""
    model = sorted(file.read_bytes() for file in (out / "run" / "model").glob("*.safetensors"))
    results = json.loads((out / "run" / "results.json").read_text())
    return (out / "run" / "predictions.csv").read_bytes(), model, results["accuracy_matrix"]


def test_results_are_equal_with_any_number_of_workers(tmp_path: Path) -> None:
    for workers in (0, 2, 4):
        run(tmp_path / str(workers), workers)
    assert state(tmp_path / "0") == state(tmp_path / "2") == state(tmp_path / "4")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_decodes_every_image_once(workers: int, tmp_path: Path, starts: list[Any]) -> None:
    decoded, _ = run(tmp_path / "run", workers)
    assert len(decoded) == TASKS * (TRAIN + TEST)
    assert set(decoded.values()) == {1}
    assert len(starts) == workers  # for the whole run


def test_without_memory_every_view_is_decoded(tmp_path: Path, starts: list[Any]) -> None:
    decoded, _ = run(tmp_path / "run", 2, image_memory=0.0)
    for t in range(TASKS):
        # Two passes and the epochs; a test set after its own task and all later ones.
        assert {decoded[f"{2 * t}/{i}"] for i in range(TRAIN)} == {2 + EPOCHS}
        assert {decoded[f"{2 * t + 1}/{i}"] for i in range(TEST)} == {TASKS - t}
    assert len(starts) == 2


def test_images_pass_the_backbone_as_often_as_needed(tmp_path: Path) -> None:
    _, seen = run(tmp_path / "run", 0)
    assert seen == TASKS * TRAIN * (2 + EPOCHS) + sum(t * TEST for t in range(1, TASKS + 1))

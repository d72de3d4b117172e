"""Learns two tasks from JPEGs on a GPU and says how busy it was, beside the same from memory.

    python benchmarks/gpu_training.py --out OUT

Writes `training.json`: seconds to the first step, images a second of every part of a task, of `evaluate` and
of the bare backbone, and the load of the GPU while `learn` trains, sampled ten times a second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from duallora import ContinualLearner, DualLoRAConfig
from duallora.backbones.backbone import load_backbone
from duallora.runtime.compute import Compute
from duallora.runtime.progress import Progress
from duallora.streams import FolderDataset

CLASSES, EPOCHS, BATCH, EVERY = 10, 3, 64, 0.1


class Synthetic(torch.utils.data.Dataset[tuple[Image.Image, int]]):
    """One image at the size of the input again and again: nothing is decoded, hardly anything resized."""

    def __init__(self, count: int, size: tuple[int, int], name: str) -> None:
        self.classes = [f"{name} {k}" for k in range(CLASSES)]
        self.targets = [i % CLASSES for i in range(count)]
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        self.image = Image.fromarray(pixels)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.image, self.targets[index]


def main() -> None:
    """Measures and writes after every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", default="vit_base_patch16_224.augreg_in21k")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"backbone": given.backbone, "precision": given.precision, "images": given.images}

    def note(**figures: Any) -> None:
        found.update(figures)
        (given.out / "training.json").write_text(json.dumps(found, indent=2) + "\n")
        print(json.dumps(figures), flush=True)

    machine = Compute(given.device, precision=given.precision).start()
    backbone = load_backbone(given.backbone, pretrained=given.backbone == "embedded")
    height, width = backbone.info.input_size[1:]
    start = time.perf_counter()
    learner = ContinualLearner(
        backbone,
        DualLoRAConfig(epochs=EPOCHS, batch_size=BATCH),
        device=machine,
        progress=Progress(),
        exact_readouts=False,
    )
    note(load_seconds=time.perf_counter() - start, workers=machine.workers)
    with tempfile.TemporaryDirectory() as place:
        for task in ("first", "second"):
            folder = Path(place) / task
            write(folder, task, given.images, given.width)
            data = FolderDataset(folder)
            with loads(given.device) as load:
                record = learner.learn(data, task)
            # The load of the middle part: the passes before and after it are no steps.
            seconds = record.prepare_seconds, record.learn_seconds, record.consolidate_seconds
            begin, end = int(seconds[0] / EVERY), int((seconds[0] + seconds[1]) / EVERY)
            part = load[begin:end] or load
            note(
                **{
                    f"{task} prepare images/s": len(data) / seconds[0],
                    f"{task} learn images/s": EPOCHS * len(data) / seconds[1],
                    f"{task} consolidate images/s": len(data) / seconds[2],
                    f"{task} load of steps %": float(np.mean(part)) if part else None,
                    f"{task} seconds to the first step": seconds[0],
                    "processes": learner.loader.started,
                }
            )
        with learner.loader.reading(data, learner.preprocess, keep="views"):
            for time_name in ("cold", "kept"):
                note(
                    **{
                        f"evaluate {time_name} images/s": rate(
                            lambda: learner.evaluate(data), len(data), machine
                        )
                    }
                )
        note(**{"predict images/s": rate(lambda: learner.predict(data.paths), len(data), machine)})
    synthetic = Synthetic(given.images, (height, width), "synthetic")
    record = learner.learn(synthetic, "synthetic")
    note(**{"synthetic learn images/s": EPOCHS * len(synthetic) / record.learn_seconds})
    found["learn / synthetic"] = found["second learn images/s"] / found["synthetic learn images/s"]
    batch = torch.randn(BATCH, 3, height, width, device=machine.device)
    plain = load_backbone(given.backbone, pretrained=given.backbone == "embedded").to(machine.device)

    def bare() -> None:
        with torch.no_grad(), machine.autocast():
            for _ in range(max(1, given.images // BATCH)):
                plain(batch)

    bare()
    note(**{"bare forward images/s": rate(bare, max(1, given.images // BATCH) * BATCH, machine)})
    for name in ("second prepare", "second consolidate", "evaluate kept"):
        note(**{f"{name} / bare": found[f"{name} images/s"] / found["bare forward images/s"]})
    learner.loader.close()


def rate(call: Any, images: int, machine: Any) -> float:
    """Images a second, the device's queue included."""
    synchronize(machine.kind)
    start = time.perf_counter()
    call()
    synchronize(machine.kind)
    return images / (time.perf_counter() - start)


def synchronize(device: str) -> None:
    """Waits for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def write(folder: Path, task: str, count: int, width: int) -> None:
    """JPEGs with grain, of a colour for each class."""
    for number in range(count):
        draw = np.random.default_rng([len(task), number])
        colour = np.random.default_rng([len(task), number % CLASSES]).integers(0, 256, (1, 1, 3))
        small = (colour + draw.normal(0, 60, (width // 10 + 1, width // 10 + 1, 3))).clip(0, 255)
        image = Image.fromarray(small.astype(np.uint8)).resize(
            (width, width * 3 // 4), Image.Resampling.BICUBIC
        )
        path = folder / f"{task} {number % CLASSES}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)


@contextmanager
def loads(device: str) -> Iterator[list[float]]:
    """Load of the GPU in percent, sampled while the context lasts; nothing on another device."""
    found: list[float] = []
    if device != "cuda":
        yield found
        return
    words = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as sampling:

        def read() -> None:
            for line in sampling.stdout or ():
                found.append(float(line))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            yield found
        finally:
            sampling.terminate()
            reader.join(5)


if __name__ == "__main__":
    main()

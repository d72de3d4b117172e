"""How many images a second the data path delivers, beside what the machine can do.

    python benchmarks/loading.py PHOTOGRAPHS --out results/loading

Photographs from a folder are resampled to JPEGs of several widths. The bound is decoding and transforming the
same files in as many plain processes as there are workers; bound and path are measured in turn, so that their
ratio holds on a machine that does something else as well. Then the embedded backbone learns, evaluates and
predicts from such files, beside the same from memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from duallora import ContinualLearner, DualLoRAConfig
from duallora.backbones.backbone import load_backbone
from duallora.data.images import find_images, read_image
from duallora.data.loader import ImageLoader
from duallora.data.transforms import EvaluationTransform, evaluation_transform
from duallora.runtime.compute import Compute
from duallora.storage.documents import markdown_table
from duallora.streams import FolderDataset, as_task_dataset
from duallora.training import EVALUATION_BATCH, evaluated

COUNTS = {64: 1024, 500: 192, 4000: 16}
"""Width of the JPEGs in pixels, and how many there are of each."""

CLASSES = 4
GRAIN = 0.15  # share of noise, so that enlarged photographs take as long to decode as those of a camera


class Memory(torch.utils.data.Dataset[tuple[Image.Image, int]]):
    """Images of a folder, decoded and at the size of the backbone's input."""

    def __init__(self, folder: FolderDataset, view: EvaluationTransform) -> None:
        self.classes, self.targets = folder.classes, folder.targets
        self.images = [Image.fromarray(view.pixels(path)) for path in folder.paths]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.targets[index]


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--widths", default=",".join(map(str, COUNTS)))
    parser.add_argument("--share", type=float, default=1.0, help="of the images, for a quick look")
    parser.add_argument("--loading-only", action="store_true")
    given = parser.parse_args()
    widths = [int(width) for width in given.widths.split(",")]
    found: dict[str, Any] = {"workers": given.workers, "cores": os.cpu_count(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as place:
        folders = {width: Path(place) / str(width) for width in widths}
        for width, folder in folders.items():
            count = max(CLASSES * 2, round(COUNTS.get(width, 64) * given.share))
            make(given.photographs, folder, width, count)
        found["loading"] = [loading(f, width, given.workers, given.repeats) for width, f in folders.items()]
        show(found["loading"], given.out, found)
        if not given.loading_only:
            found["model"] = [
                with_model(f, width, given.workers, given.repeats) for width, f in folders.items()
            ]
            show(found["model"], given.out, found)


def make(photographs: Path, folder: Path, width: int, count: int) -> None:
    """Writes JPEGs of a width and three quarters of it in height, in folders of classes."""
    sources = find_images(photographs)
    for number in range(count):
        size = (width, width * 3 // 4)
        with Image.open(sources[number * 7919 % len(sources)]) as source:
            image = source.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        grain = Image.effect_noise(size, 40).convert("RGB")
        path = folder / f"class {number % CLASSES}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.blend(image, grain, GRAIN).save(path, quality=90)


def loading(folder: Path, width: int, workers: int, repeats: int) -> dict[str, Any]:
    """Images a second without a model: bound, a cold pass, and passes over what is kept."""
    data, view = FolderDataset(folder), evaluation_transform(load_backbone("embedded").info)
    chunks, count = evaluated(range(len(data))), len(data)
    seconds: dict[str, list[float]] = {"bound": [], "cold": [], "warm": []}
    started = 0
    for turn in range(repeats):
        loader = ImageLoader(torch.device("cpu"), workers, 2**31)

        def passed(loader: ImageLoader = loader) -> None:
            with closing(loader.batches(source, chunks, count)) as batches:
                for _ in batches:
                    pass

        with loader.reading(data, view, keep="views") as source:
            calls: dict[str, Callable[[], None]] = {
                "bound": lambda: bound(data.paths, view, workers),
                "cold": passed,
                "warm": passed,
            }
            order = list(calls) if turn % 2 else ["cold", "warm", "bound"]
            for name in order:
                seconds[name].append(timed(calls[name]))
        started = loader.started
        loader.close()
    rates = {name: count / statistics.median(values) for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["bound"], seconds["cold"], strict=True)]
    return {
        "width": width,
        "images": count,
        **{f"{name} images/s": rate for name, rate in rates.items()},
        "cold / bound": statistics.median(ratios),
        "processes": started,
        "load": os.getloadavg()[0],
    }


def with_model(folder: Path, width: int, workers: int, repeats: int) -> dict[str, Any]:
    """Seconds that learning, evaluating and predicting take, over those from memory."""
    machine = Compute("cpu", precision="32", workers=workers).start()
    files_of = FolderDataset(folder)
    data = as_task_dataset(files_of)  # what is kept is kept of one view
    config = DualLoRAConfig(epochs=3, batch_size=32)
    learner = ContinualLearner(method=config, device=machine)
    memory = Memory(files_of, learner.preprocess)
    started = learner.loader.started
    files, fed = (
        timed(lambda d=d: ContinualLearner(method=config, device=machine).learn(d)) for d in (data, memory)
    )
    learner.learn(memory)
    kept = list(batches_of(memory, learner.preprocess))
    seconds: dict[str, list[float]] = {
        name: [] for name in ("memory", "evaluate", "again", "predict", "decode")
    }
    for _ in range(repeats):
        with learner.loader.reading(data, learner.preprocess, keep="views"):
            seconds["evaluate"].append(timed(lambda: learner.evaluate(data)))
            seconds["memory"].append(timed(lambda: learner.outputs_of(kept)))
            seconds["again"].append(timed(lambda: learner.evaluate(data)))
        seconds["predict"].append(timed(lambda: learner.predict(files_of.paths)))
        seconds["decode"].append(timed(lambda: bound(files_of.paths, learner.preprocess, workers)))
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    both = middle["memory"] + middle["decode"]
    result = {
        "width": width,
        "images": len(data),
        "from memory images/s": len(data) / middle["memory"],
        "learn, memory / files": fed / files,
        "evaluate again, memory / kept": middle["memory"] / middle["again"],
        "evaluate, memory / files": middle["memory"] / middle["evaluate"],
        "evaluate, (memory + bound) / files": both / middle["evaluate"],
        "predict, memory / files": middle["memory"] / middle["predict"],
        "predict, (memory + bound) / files": both / middle["predict"],
        "processes": learner.loader.started - started,
        "load": os.getloadavg()[0],
    }
    learner.loader.close()
    return result


def batches_of(memory: Memory, view: EvaluationTransform) -> Iterator[torch.Tensor]:
    """The images as the model takes them."""
    for start in range(0, len(memory), EVALUATION_BATCH):
        yield torch.stack([view(image) for image in memory.images[start : start + EVALUATION_BATCH]])


def bound(paths: Sequence[Path], view: EvaluationTransform, processes: int) -> None:
    """Decodes and transforms files in plain processes that share nothing."""
    context = multiprocessing.get_context("fork")
    parts = [paths[start::processes] for start in range(processes)]
    running = [context.Process(target=_decode, args=(part, view)) for part in parts]
    for each in running:
        each.start()
    for each in running:
        each.join()


def _decode(paths: Sequence[Path], view: EvaluationTransform) -> None:
    for path in paths:
        view(read_image(path))


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def show(rows: list[dict[str, Any]], out: Path, found: dict[str, Any]) -> None:
    """Prints a table and writes everything that is there."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "loading.json").write_text(json.dumps(found, indent=2) + "\n")
    cells = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    print(markdown_table(list(rows[0]), cells), flush=True)


if __name__ == "__main__":
    main()

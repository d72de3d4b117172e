"""The study of the adapters: runs what is missing, then writes the tables and the picture.

    python benchmarks/adapters.py DATA [--out results/adapters] [--only NAME ...] [--streams NAME ...]
                                       [--seeds 0 1 2] [--tables]

DATA holds the folders ``gtsrb``, ``seedlings`` and ``tinyimagenet-cl100``, each with ``train/<class>/`` and
``val/<class>/``. Every ``benchmarks/adapters/NAME.yaml`` is an experiment: the fields of a method, the
streams it is run on, how many seeds, and what is measured: ``val``, or ``held_back`` for training images of
each class that follow. A run is ``OUT/NAME-STREAM-SEED.json``; one that is there is not repeated.
Runs come in the order of ORDER, all of seed 0 first. Started twice, the command shares the work: a run is
claimed by an empty file ``.claimed``, to be deleted where a run was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from adapters_tables import write_tables
from duallora import load_backbone
from duallora.learner import ContinualLearner
from duallora.methods import METHODS
from duallora.predictions import calibration_error
from duallora.storage.atomic import write_atomic
from duallora.streams import FolderDataset, Stream, Task, TaskDataset, all_at_once, split, with_domains

EXPERIMENTS = Path(__file__).parent / "adapters"
ORDER = ("gtsrb", "mixed", "seedlings", "domains", "random", "semantic")
SHIFTS = ("photo", "edges", "negative", "pixelated", "posterised")
HELD_BACK = 15  # the smallest class of gtsrb has forty images
BATCH = 64
# Of a task. Tasks of the others have 19 to 38 batches an epoch at 60 images a class, and four epochs.
MIN_STEPS = dict.fromkeys(ORDER, 100) | dict.fromkeys(("gtsrb", "mixed", "seedlings"), 200)


def part(data: Path, name: str, tasks: int, test: str, per_class: int, **options: Any) -> Stream:
    """A folder of images as a stream, tested on ``val/`` or on training images that are not learned."""
    train = FolderDataset(data / name / "train")
    if test == "val":
        return split(
            train, tasks, test=FolderDataset(data / name / "val"), train_per_class=per_class, **options
        )
    return split(train, tasks, train_per_class=min(per_class, 25), holdout=HELD_BACK, **options)


def mixed_parts(data: Path, test: str, per_class: int) -> dict[str, Stream]:
    """The parts of the *mixed* stream in their order, by the folder of each."""
    return {
        "gtsrb": part(data, "gtsrb", 8, test, per_class),
        "seedlings": part(data, "seedlings", 4, test, per_class),
        "tinyimagenet-cl100": part(data, "tinyimagenet-cl100", 2, test, per_class, classes=20),
    }


def load_stream(data: Path, name: str, test: str, per_class: int) -> Stream:
    """One of ``ORDER``; signs are not mirrored."""
    if name == "gtsrb":
        return replace(part(data, "gtsrb", 8, test, per_class), augmentation="crop")
    if name == "seedlings":
        return part(data, "seedlings", 4, test, per_class)
    if name in ("random", "semantic"):
        order: Any = 1993 if name == "random" else "alphabetical"
        return part(data, "tinyimagenet-cl100", 10, test, per_class, order_seed=order)
    if name == "domains":
        return with_domains(part(data, "tinyimagenet-cl100", 1, test, per_class, classes=20), SHIFTS)
    pieces = mixed_parts(data, test, per_class).values()
    tasks = [Task(f"task {n}", t.train, t.test) for n, t in enumerate((t for p in pieces for t in p), 1)]
    order = tuple(name for p in pieces for name in p.class_order)
    return Stream("mixed", tuple(tasks), order, 1993, augmentation="crop")


class Study:
    """A learner on a stream: what it answers after each task to the task's own images, and to all at the end.

    Args:
        learner: has learned nothing yet.
        stream: its tasks.
    """

    def __init__(self, learner: ContinualLearner, stream: Stream) -> None:
        self.learner, self.method = learner, learner.method
        self.tasks = all_at_once(stream) if self.method.all_at_once else stream
        self.tests = [self._tensors(task.test) for task in stream]
        self.read = torch.zeros(0)
        encode = self.method.encode

        def remembering(images: Tensor, *own: Any) -> Any:
            encoding = encode(images, *own)
            self.read = encoding.features
            return encoding

        self.method.encode = remembering  # type: ignore[method-assign]

    def run(self) -> dict[str, Any]:
        """Figures by readout, in percent; the calibration error as a share."""
        after = []
        for number, task in enumerate(self.tasks):
            self.learner.learn(task.train, name=task.name)
            if not self.method.all_at_once:
                after.append(self.ask(number)["given task"])
        final = [self.ask(number) for number in range(len(self.tests))]
        found: dict[str, Any] = {}
        for name in final[0]["right"]:
            right, sure = (torch.cat([f[key][name] for f in final]) for key in ("right", "confidence"))
            found[name] = {
                "accuracy": 100 * float(right.double().mean()),
                "calibration_error": calibration_error(sure, right),
                "by_task": [100 * float(f["right"][name].double().mean()) for f in final],
            }
            if after:
                lost = [100 * (a[name] - f["given task"][name]) for a, f in zip(after, final, strict=True)]
                found[name]["forgetting_given_task"] = sum(lost[:-1]) / max(len(lost) - 1, 1)
        memory = getattr(self.method, "memory", None)
        domain = None if memory is None else memory.domains.uses
        return {
            "readouts": found,
            "uses": domain,
            "images": sum(len(labels) for _, labels in self.tests),
            "tasks": [asdict(record) for record in self.learner.tasks],
        }

    def _tensors(self, test: TaskDataset) -> tuple[Tensor, list[str]]:
        images = torch.stack([self.learner.preprocess(image) for image, _ in test])  # type: ignore[attr-defined]
        return images, [test.classes[target] for target in test.targets]

    @torch.no_grad()
    def ask(self, number: int) -> dict[str, Any]:
        """Right answers and confidences by readout (n,), and the share that is right given the task."""
        images, names = self.tests[number]
        known = self.learner.classes
        label = torch.tensor([known.index(name) for name in names])
        row_class = torch.tensor([known.index(c) for record in self.learner.tasks for c in record.classes])
        row_task = self.method.rows.task
        one_task = self.method.all_at_once
        own = torch.ones_like(row_task, dtype=torch.bool) if one_task else row_task == number
        answers: dict[str, list[Tensor]] = {}
        for batch in images.split(BATCH):
            readout = self.method.logits(batch)
            answers.setdefault("heads", []).append(readout.heads)
            answers.setdefault("rows", []).append(self.method.rows.log_q(self.read.float()))
            if readout.calibrated is not None:
                answers.setdefault("calibrated", []).append(readout.calibrated)
        result: dict[str, Any] = {"right": {}, "confidence": {}, "given task": {}}
        for name, logs in answers.items():
            rows = torch.cat(logs).exp()
            by_class = torch.zeros(len(rows), len(known)).index_add_(1, row_class, rows)
            sure, best = by_class.max(1)
            result["right"][name], result["confidence"][name] = best == label, sure
            given = row_class[rows.masked_fill(~own, -1.0).argmax(1)]
            result["given task"][name] = float((given == label).double().mean())
        return result


def runs(only: list[str], streams: list[str], seeds: list[int]) -> Iterator[tuple[str, str, int, Any]]:
    """Experiment, stream, seed and what the experiment's file says, in the order of the work."""
    known = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(EXPERIMENTS.glob("*.yaml"))}
    for seed in seeds:
        for stream in ORDER:
            for name, said in sorted(known.items(), key=lambda item: item[1].get("rank", 9)):
                if (only and name not in only) or (streams and stream not in streams):
                    continue
                if stream in said["streams"] and seed < said.get("seeds", 1):
                    yield name, stream, seed, said


def configured(said: dict[str, Any], stream: Stream, name: str) -> tuple[str, Any]:
    """Name and fields of an experiment's method; joint training gets the steps of all tasks together."""
    given = dict(said["method"])
    method = given.pop("name", "duallora")
    config = METHODS[method].config(**{"min_steps": MIN_STEPS[name]} | given)
    if METHODS[method].method.all_at_once:
        config = replace(config, min_steps=config.min_steps * len(stream))
    return method, config


def main() -> None:
    """Runs, or only writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/adapters"))
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--streams", nargs="*", default=[])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--tables", action="store_true")
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name, stream_name, seed, said in () if words.tables else runs(words.only, words.streams, words.seeds):
        place = words.out / f"{name}-{stream_name}-{seed}.json"
        claim = place.with_suffix(".claimed")
        if place.exists() or claim.exists():
            continue
        claim.touch()
        start = time.monotonic()
        stream = load_stream(words.data, stream_name, said["test"], said.get("train_per_class", 60))
        method, config = configured(said, stream, stream_name)
        augment = stream.augmentation
        learner = ContinualLearner(load_backbone("embedded"), config, seed, augment=augment, device="cpu")
        found = Study(learner, stream).run()
        found |= {
            "experiment": name,
            "stream": stream_name,
            "seed": seed,
            "test": said["test"],
            "augment": augment,
            "method": {"name": method, **asdict(config)},
            "seconds": round(time.monotonic() - start),
        }
        write_atomic(place, (json.dumps(found, indent=1) + "\n").encode())
        claim.unlink()
    write_tables(words.out)


if __name__ == "__main__":
    main()

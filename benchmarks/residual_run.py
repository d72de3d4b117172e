"""One run of the study of the residual adapter: a stream learned once, read out in several ways.

    python benchmarks/residual_run.py EXPERIMENT.yaml STREAM SEED FOLDER OUT.json

EXPERIMENT.yaml names the method and its fields (``method``), the images a class (``train_per_class``), what
is measured (``test: held_back``, the 50 training images of each class that follow, or ``val``) and whether
the gate is mixed with the true task (``oracle``) or replaced at inference (``gates``).
``benchmarks/residual.py`` runs all that is missing.

After each task only its own test images are looked at, and all of them after the last one: enough for final
figures and for forgetting. The class rows are kept several times, so that one training answers several
questions: on the final feature alone, with the mean patch token after the last block, with what is read below
the adapters; unmoved and moved by the drift map.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from duallora.classifiers.calibration import calibrate
from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics
from duallora.classifiers.log_probabilities import sum_rows
from duallora.commands.options import BackboneOptions, StreamOptions
from duallora.commands.run_setting import load_setting
from duallora.learner import ContinualLearner
from duallora.methods import METHODS
from duallora.methods.base import Method
from duallora.methods.drift import ridge_map
from duallora.methods.interface import Encoding, TaskInfo
from duallora.storage.atomic import write_atomic
from duallora.streams import Stream, TaskDataset, all_at_once

STREAMS: dict[str, dict[str, Any]] = {
    "random": {"tasks": 10, "order": 1993, "domains": None, "classes": None},
    "semantic": {"tasks": 10, "order": "alphabetical", "domains": None, "classes": None},
    "domains": {
        "tasks": None,
        "order": 1993,
        "domains": "photo,edges,negative,pixelated,posterised",
        "classes": 20,
    },
}
SCHEDULE = {"epochs": 4, "batch_size": 32, "head_learning_rate": 5e-3}
MIXES = (0.25, 0.5, 0.75, 1.0)
BATCH = 64


class Twins:
    """Class rows beside the method's own, on parts of the features, or moved by the drift map.

    Args:
        method: whose features are remembered.

    Attributes:
        start: the coming task's features before it is learned (n, row_dim); None for the first task.
        images: its images (n, 3, H, W).
    """

    def __init__(self, method: Method) -> None:
        final, dim = method.backbone.feature_dim, method.backbone.row_dim
        widths = {"final": final, "last": final + method.backbone.dim, "all": dim}
        self.method = method
        self.twins = {name: (ClassStatistics(width, method.device), width) for name, width in widths.items()}
        self.moved = ClassStatistics(dim, method.device)
        self.start: Tensor | None = None
        self.images = torch.zeros(0)
        own = method.remember

        def remember(task: TaskInfo, features: Tensor, labels: Tensor) -> None:
            own(task, features, labels)
            for rows, width in self.twins.values():
                rows.replace(task.index, ClassMoments.of(features[:, :width], labels, len(task.classes)))
                rows.fit_temperature(task.index, features[:, :width], labels)
            if self.start is not None:
                self.moved.move(ridge_map(self.start, self._after(task.index)))
            self.moved.replace(task.index, ClassMoments.of(features, labels, len(task.classes)))
            self.moved.fit_temperature(task.index, features, labels)

        method.remember = remember  # type: ignore[method-assign]

    def extract(self) -> Tensor:
        """Features of the task's images as the model is now (n, row_dim)."""
        return torch.cat([self.method.extract(batch).float() for batch in self.images.split(BATCH)])

    def _after(self, task: int) -> Tensor:
        """As an old image meets the model: without the residual of ``task``, weights over earlier tasks."""
        memory = getattr(self.method, "memory", None)
        if memory is None:
            return self.extract()
        own, off = memory.gate, memory.mode == "off"

        def gate(layer: int, x: Tensor) -> Tensor | None:
            w = own(layer, x)
            if w is not None:
                w = w.clone()
                w[:, task] = 0.0
                w = w if off else w / w.sum(1, keepdim=True).clamp(min=1e-12)
            return w

        memory.gate = gate
        found = self.extract()
        memory.gate = own
        return found

    def readouts(self, features: Tensor) -> dict[str, Tensor]:
        """Log-probabilities of the rows (n, R) by readout for features (n, row_dim)."""
        logits = self.method.head_logits(Encoding(features))
        row_task = self.method.rows.task
        known = {name: rows.log_q(features[:, :width]) for name, (rows, width) in self.twins.items()}
        known["moved"] = self.moved.log_q(features)
        found = {"heads": logits.log_softmax(1)}
        for name, log_q in known.items():
            log_task = sum_rows(log_q, row_task, int(row_task.max()) + 1)
            found[f"rows {name}"] = log_q
            found[f"calibrated {name}"] = calibrate(logits, log_q, log_task, row_task, "class", 1.0)
        return found


def figures(
    log_rows: Tensor, labels: Tensor, truth: Tensor, row_task: Tensor, row_class: Tensor
) -> dict[str, float]:
    """Shares of right answers: among all classes, with the row's task as well, given the task, of the task.

    Args:
        log_rows: (n, R).
        labels: index of the class (n,).
        truth: index of the task (n,).
        row_task: of every row (R,).
        row_class: of every row (R,).
    """
    by_class = log_rows.exp().new_zeros(len(labels), int(row_class.max()) + 1)
    by_class.index_add_(1, row_class, log_rows.exp())
    best = log_rows.argmax(1)
    given = log_rows.masked_fill(row_task != truth[:, None], -torch.inf).argmax(1)
    right = {
        "accuracy": by_class.argmax(1) == labels,
        "row": (row_class[best] == labels) & (row_task[best] == truth),
        "given_task": row_class[given] == labels,
        "task": row_task[best] == truth,
    }
    return {name: float(hit.double().mean()) for name, hit in right.items()}


class Study:
    """A learner on a stream, its test images in memory.

    Args:
        learner: has learned nothing yet.
        stream: its tasks.
    """

    def __init__(self, learner: ContinualLearner, stream: Stream) -> None:
        self.learner, self.method, self.stream = learner, learner.method, stream
        self.twins = Twins(learner.method)
        self.tests = [self._tensors(task.test) for task in stream]
        self.then: list[dict[str, float]] = []

    def learn(self) -> None:
        """All tasks; after each one its own test images."""
        for t, task in enumerate(self.stream):
            self.twins.images = self._tensors(task.train)[0]
            with torch.no_grad():
                self.twins.start = self.twins.extract() if t > 0 else None
            self.learner.learn(task.train, name=task.name)
            self.then.append({name: f["given_task"] for name, f in self._measure([t])[0].items()})

    def results(self, oracle: bool, gates: bool) -> dict[str, Any]:
        """Figures by readout over all test images, the gate's own, and those that other gates would bring."""
        final, gate, kept = self._measure(range(len(self.tests)))
        for name, found in final.items():
            now = [self._measure_kept(kept, t)[name]["given_task"] for t in range(len(self.tests))]
            lost = [max(a, b) - b for a, b in zip((x[name] for x in self.then[:-1]), now[:-1], strict=True)]
            found["forgetting_given_task"] = sum(lost) / max(len(lost), 1)
        return {
            "readouts": final,
            "gate": gate,
            "oracle": self._oracle() if oracle and gate is not None else None,
            "gates": self._gates() if gates and gate is not None else None,
            "tasks": [asdict(record) for record in self.learner.tasks],
            "kept": kept,
        }

    def _tensors(self, test: TaskDataset) -> tuple[Tensor, list[str]]:
        images = torch.stack([self.learner.preprocess(image) for image, _ in test])  # type: ignore[attr-defined]
        return images, [test.classes[target] for target in test.targets]

    def _rows(self) -> tuple[Tensor, Tensor]:
        row_class = [self.learner.classes.index(c) for task in self.learner.tasks for c in task.classes]
        return self.method.rows.task, torch.tensor(row_class)

    @torch.no_grad()
    def _measure(self, tasks: Any) -> tuple[dict[str, dict[str, float]], dict[str, float] | None, Any]:
        features, gates, labels, truth = [], [], [], []
        for t in tasks:
            images, names = self.tests[t]
            for batch in images.split(BATCH):
                self.truth = t
                seen = self.method.encode(batch)
                features.append(seen.features)
                gates += [] if seen.gate is None else [seen.gate]
            labels += [self.learner.classes.index(name) for name in names]
            truth += [t] * len(names)
        f, y, task = torch.cat(features), torch.tensor(labels), torch.tensor(truth)
        gate = None
        if gates:
            w = torch.cat(gates)
            gate = {
                "accuracy": float((w.argmax(1) == task).double().mean()),
                "own_weight": float(w.gather(1, task[:, None]).mean()),
                "sum": float(w.sum(1).mean()),
            }
        found = {name: figures(lr, y, task, *self._rows()) for name, lr in self.twins.readouts(f).items()}
        return found, gate, {"features": f, "labels": y, "task": task}

    def _measure_kept(self, kept: dict[str, Tensor], t: int) -> dict[str, dict[str, float]]:
        mine = kept["task"] == t
        read = self.twins.readouts(kept["features"][mine])
        return {
            name: figures(lr, kept["labels"][mine], kept["task"][mine], *self._rows())
            for name, lr in read.items()
        }

    def _oracle(self) -> dict[str, Any]:
        """Figures with ``(1 - m) w + m (true task)`` in the place of the gate's weights w."""

        def mixed(w: Tensor, mix: float) -> Tensor:
            truth = torch.zeros_like(w)
            truth[:, self.truth] = 1.0
            return (1 - mix) * w + mix * truth

        return {str(mix): self._gated_by(lambda w, mix=mix: mixed(w, mix)) for mix in MIXES}

    def _gates(self) -> dict[str, Any]:
        """Figures with the likeliest task alone, and with w times how well the image fits any row."""
        memory = self.method.memory  # type: ignore[attr-defined]
        layer, point = next(iter(memory.points.items()))
        return {
            "top": self._gated_by(lambda w: torch.zeros_like(w).scatter(1, w.argmax(1, keepdim=True), 1.0)),
            "suppressed": self._gated_by(
                lambda w: w * point.rows.familiarity(memory.current.get().features[layer].float())[:, None]
            ),
        }

    def _gated_by(self, change: Callable[[Tensor], Tensor]) -> dict[str, dict[str, float]]:
        """Figures with ``change(w)`` in the place of the gate's weights w (n, T), at inference alone."""
        memory = self.method.memory  # type: ignore[attr-defined]
        own = memory.gate

        def gate(layer: int, x: Tensor) -> Tensor | None:
            w = own(layer, x)
            return None if w is None else change(w)

        memory.gate = gate
        found = self._measure(range(len(self.tests)))[0]
        memory.gate = own
        return found


def load(experiment: dict[str, Any], stream: str, folder: str) -> Any:
    """The setting of an experiment on a stream."""
    held_back = experiment["test"] == "held_back"
    options = StreamOptions(
        folder,
        train_per_class=experiment["train_per_class"],
        holdout=50 if held_back else 0,
        **STREAMS[stream],
    )
    return load_setting(options, BackboneOptions(augment="crop,flip"))


def main(words: list[str]) -> None:
    """Learns, measures, writes."""
    path, stream, seed, folder, out = words
    experiment = yaml.safe_load(Path(path).read_text())
    setting = load(experiment, stream, folder)
    given = dict(experiment["method"])
    name = given.pop("name", "duallora")
    config = METHODS[name].config(**SCHEDULE | given)
    start = time.monotonic()
    learner = ContinualLearner(setting.backbone, config, int(seed), augment=setting.augment, device="cpu")
    study = Study(learner, all_at_once(setting.stream) if learner.method.all_at_once else setting.stream)
    study.learn()
    results = study.results(experiment.get("oracle", False), experiment.get("gates", False))
    results.pop("kept")
    results |= {
        "experiment": Path(path).stem,
        "config": setting.asked(name, config, int(seed)) | {"stream": stream},
        "seconds": time.monotonic() - start,
    }
    write_atomic(Path(out), (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])

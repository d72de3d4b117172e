"""The main job: a learner learns a stream task by task and is evaluated after every task on all it has seen.

After task t the model is saved, the test sets 0 to t are evaluated, and their hits are recorded; a run that
was interrupted anywhere goes on after the last saved task. The evaluation after the last task is part of the
final pass, which also gives what is measured once, at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from duallora import metrics, report
from duallora.backbones import Backbone
from duallora.documents import percent
from duallora.errors import DualLoRAError
from duallora.features import FrozenFeatures
from duallora.learner import ContinualLearner
from duallora.progress import Progress
from duallora.results import SCHEMA_VERSION, FinalPass, Row, assemble
from duallora.run_directory import RunDirectory
from duallora.streams import Stream, TaskDataset

_CACHE_BYTES = 256 * 2**20


def run_stream(
    make_learner: Callable[[], ContinualLearner],
    stream: Stream,
    out: Path,
    config: dict[str, Any],
    *,
    device: str = "auto",
    progress: Progress,
    backbone: Backbone | None = None,
    features: FrozenFeatures | None = None,
) -> dict[str, Any]:
    """Learns a stream and writes a run's folder; takes up an unfinished run of the same stream and settings.

    Args:
        make_learner: Gives a learner that has learned nothing yet; not called when a run is resumed, and
            else before the folder is made: what cannot be made leaves nothing behind.
        stream: The tasks, in order.
        out: The run's folder.
        config: What was asked for, ready for JSON; a run is resumed only under an equal one.
        device: Where a resumed learner computes, as in `ContinualLearner`.
        progress: Takes one line a task.
        backbone: What a resumed learner stands on; where there is none, it is loaded as the model says.
        features: Features of the bare backbone, for methods that read them; they change no result.

    Returns:
        The contents of ``results.json``.

    Raises:
        DualLoRAError: The folder holds a finished run, another run or something else, or is in use.
    """
    identity = {"version": SCHEMA_VERSION, "stream": _describe(stream), "config": config}
    directory = RunDirectory(Path(out), identity)
    directory.admit()
    fresh = None if directory.has_model() else make_learner()
    with directory.opened():
        finished = directory.results()
        if finished is not None:  # interrupted between the results and the removal of the progress files
            directory.clean()
            return finished
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        learner, rows = _start(fresh, backbone, directory, stream, device, progress)
        if features is not None:
            learner.method.cache = features
        tests = _cached_tests(stream)
        _learn(learner, stream, tests, rows, directory, progress)
        final = _final_pass(learner, tests, directory, progress)
        rows.append(final.row)
        _tell(stream, rows, directory, progress)
        results = assemble(learner, stream, config, rows, final)
        _write_report(results, learner, tests, final, directory, progress)
        return directory.finish(results)


class CachedImages(Dataset[tuple[Any, int]]):
    """A data set that keeps images in memory after their first use, up to a number of bytes.

    Args:
        dataset: Test images of a task, which are read again after every later task.
        limit: Bytes of decoded images to keep; what does not fit is decoded again.
    """

    def __init__(self, dataset: TaskDataset, limit: int) -> None:
        self._dataset, self._free = dataset, limit
        self._kept: dict[int, tuple[Any, int]] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index in self._kept:
            return self._kept[index]
        sample = self._dataset[index]
        size = _bytes(sample[0])
        if size <= self._free:
            self._free -= size
            self._kept[index] = sample
        return sample


def _start(
    fresh: ContinualLearner | None,
    backbone: Backbone | None,
    directory: RunDirectory,
    stream: Stream,
    device: str,
    progress: Progress,
) -> tuple[ContinualLearner, list[Row]]:
    """A new learner, or the one of the interrupted run with the evaluations it had."""
    if fresh is not None and not directory.has_model():
        directory.log("start", stream=stream.name, tasks=len(stream))
        return fresh, []
    # Another process may have begun this run, and ended, since `fresh` took the backbone.
    free = None if fresh is not None else backbone
    learner = ContinualLearner.load(directory.model, device=device, progress=progress, backbone=free)
    learned, rows = len(learner.tasks), directory.rows()
    if learned > len(stream) or any(
        record.name != task.name or set(record.classes) != set(task.train.classes)
        for record, task in zip(learner.tasks, stream, strict=False)
    ):
        raise DualLoRAError(f"{directory.model} has learned other tasks than this run: name another folder.")
    if learned > len(rows) + 1:
        raise DualLoRAError(
            f"{directory.path} has lost the evaluation after task {len(rows) + 1}, which cannot be repeated: "
            "name another folder."
        )
    directory.log("resume", tasks_learned=learned)
    progress.line(f"resuming after task {learned} of {len(stream)}")
    return learner, rows[:learned]  # there are more rows than tasks after an undo of the model


def _learn(
    learner: ContinualLearner,
    stream: Stream,
    tests: list[TaskDataset],
    rows: list[Row],
    directory: RunDirectory,
    progress: Progress,
) -> None:
    """Learns what is left of the stream and appends the missing rows, but for the last."""
    for t, task in enumerate(stream):
        if t >= len(learner.tasks):
            learner.learn(task.train, name=task.name)
            learner.save(directory.model)
        if len(rows) == t < len(stream) - 1:
            row, features = _evaluate(learner, tests[: t + 1], progress)
            rows.append(row)
            directory.finish_task(rows, features)
            _tell(stream, rows, directory, progress)


def _evaluate(learner: ContinualLearner, tests: list[TaskDataset], progress: Progress) -> tuple[Row, Tensor]:
    """Hits on the test sets of all tasks so far, and the final features of the latest one's images."""
    row: Row = {}
    for task, test in progress.track(enumerate(tests), len(tests), "evaluating"):
        outputs = learner.outputs(test)
        labels = _labels(learner, test)
        for name in metrics.readouts_of(outputs):
            row.setdefault(name, []).append(metrics.count_hits(outputs, name, labels, task))
    return row, outputs.features


def _final_pass(
    learner: ContinualLearner, tests: list[TaskDataset], directory: RunDirectory, progress: Progress
) -> FinalPass:
    final = FinalPass()
    for task, test in progress.track(enumerate(tests), len(tests), "evaluating"):
        outputs = learner.outputs(test)
        then = directory.features(task) if task < len(tests) - 1 else outputs.features
        final.add(outputs, _labels(learner, test), then)
    return final


def _tell(stream: Stream, rows: list[Row], directory: RunDirectory, progress: Progress) -> None:
    task = len(rows) - 1
    shares = {name: metrics.accuracy(hits) for name, hits in rows[-1].items()}
    directory.log("evaluated", task=task, name=stream.tasks[task].name, accuracy=shares)
    figures = ", ".join(f"{percent(share)} % ({name})" for name, share in shares.items())
    progress.line(f"after task {task + 1} of {len(stream)}: accuracy on all seen test images {figures}")


def _write_report(
    results: dict[str, Any],
    learner: ContinualLearner,
    tests: list[TaskDataset],
    final: FinalPass,
    directory: RunDirectory,
    progress: Progress,
) -> None:
    plot = report.accuracy_plot(results)
    if plot is None:
        progress.line(report.PLOT_HINT)
    else:
        directory.write("accuracy.png", plot)
    directory.write("report.md", report.markdown(results, plot=plot is not None).encode())
    batches = [
        (test.identifiers, [test.classes[target] for target in test.targets], record.name, probabilities)
        for test, record, probabilities in zip(tests, learner.tasks, final.probabilities, strict=True)
    ]
    directory.write("predictions.csv", report.predictions_csv(learner.classes, batches))
    directory.log("finished", final_accuracy=results["final_accuracy"])


def _labels(learner: ContinualLearner, test: TaskDataset) -> Tensor:
    """(n,) indices into the learner's classes."""
    index = {name: i for i, name in enumerate(learner.classes)}
    own = torch.tensor([index[name] for name in test.classes])
    return own[torch.tensor(test.targets)]


def _cached_tests(stream: Stream) -> list[TaskDataset]:
    return [
        TaskDataset(
            CachedImages(task.test, _CACHE_BYTES // len(stream)),
            range(len(task.test)),
            classes=task.test.classes,
            targets=task.test.targets,
            identifiers=task.test.identifiers,
        )
        for task in stream
    ]


def _bytes(image: Any) -> int:
    if isinstance(image, Image.Image):
        return image.width * image.height * len(image.getbands())
    return int(image.numel() * image.element_size())


def _describe(stream: Stream) -> dict[str, Any]:
    """What tells one stream from another: names, classes, counts, a hash over images' names and labels."""
    digest = hashlib.sha256()
    tasks = []
    for task in stream:
        for part in (task.train, task.test):
            digest.update(json.dumps([part.classes, part.targets, part.identifiers]).encode())
        tasks.append(
            {
                "name": task.name,
                "classes": list(task.train.classes),
                "train_images": len(task.train),
                "test_images": len(task.test),
            }
        )
    return {
        "name": stream.name,
        "order_seed": stream.order_seed,
        "class_order": list(stream.class_order),
        "tasks": tasks,
        "sha256": digest.hexdigest(),
    }

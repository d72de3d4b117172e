"""The main job: a learner learns a stream task by task and is evaluated after every task on all it has seen.

After task t the model is saved, the test sets 0 to t are evaluated, and their hits are recorded; a run that
was interrupted anywhere goes on after the last saved task. The evaluation after the last task is part of the
final pass, which also gives what is measured once, at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duallora.backbones.backbone import Backbone
from duallora.backbones.frozen_features import FrozenFeatures
from duallora.errors import DualLoRAError
from duallora.learner import ContinualLearner
from duallora.predictions import readouts_of
from duallora.runs import figures, report
from duallora.runs.metrics import accuracy, count_hits
from duallora.runs.results import SCHEMA_VERSION, FinalPass, Row, assemble
from duallora.runs.run_directory import RunDirectory
from duallora.runtime import parallel
from duallora.runtime.compute import Machine
from duallora.runtime.progress import Progress
from duallora.storage.documents import percent
from duallora.streams import Stream, TaskDataset


def run_stream(
    make_learner: Callable[[], ContinualLearner],
    stream: Stream,
    out: Path,
    config: dict[str, Any],
    *,
    device: str | Machine = "auto",
    progress: Progress,
    backbone: Backbone | None = None,
    features: FrozenFeatures | None = None,
    evaluate_every: int = 1,
) -> dict[str, Any]:
    """Learns a stream and writes a run's folder; takes up an unfinished run of the same stream and settings.

    Args:
        make_learner: Gives a learner that has learned nothing yet; not called when a run is resumed, and
            else before the folder is made: what cannot be made leaves nothing behind.
        stream: The tasks, in order.
        out: The run's folder.
        config: What was asked for, ready for JSON; a run is resumed only under an equal one.
        device: Where a resumed learner computes, as in `ContinualLearner`. Of several processes the first
            one writes; all have to see the folder.
        progress: Takes one line a task.
        backbone: What a resumed learner stands on; where there is none, it is loaded as the model says.
        features: Features of the bare backbone for a learner that is loaded to go on; a new one has its own.
        evaluate_every: All test images seen so far are looked at after every so many tasks and after the
            last; in between, only the task's own.

    Returns:
        The contents of ``results.json``.

    Raises:
        DualLoRAError: The folder holds a finished run, another run or something else, or is in use.
    """
    identity = {"version": SCHEMA_VERSION, "stream": _describe(stream), "config": config}
    directory = RunDirectory(Path(out), identity)
    machine, first = Machine.of(device), parallel.rank() == 0
    with parallel.failing_together():
        if first:
            directory.admit()
    resumed = parallel.agree(directory.has_model())
    with parallel.failing_together():
        fresh = None if resumed else make_learner()
    with ExitStack() as held:
        with parallel.failing_together():
            if first:
                held.enter_context(directory.opened())
        finished = directory.results()
        parallel.wait()
        if finished is not None:  # interrupted between the results and the removal of the progress files
            if first:
                directory.clean()
            return finished
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        learner, rows = _start(fresh, backbone, directory, stream, machine, progress, features)
        tests = [task.test for task in stream]
        held.callback(learner.loader.close)
        for test in tests:  # looked at after every task, and kept as it is seen
            reading = learner.loader.reading(test, learner.preprocess, keep="views", region="run")
            held.enter_context(reading)
        _learn(learner, stream, tests, rows, directory, progress, evaluate_every)
        final = _final_pass(learner, tests, directory, progress)
        rows.append(final.row)
        with parallel.failing_together():
            if first:
                _tell(stream, rows, directory, progress)
                results = assemble(learner, stream, config, rows, final, machine.precision)
                _write_report(results, learner, tests, final, directory, progress)
                directory.finish(results)
        return directory.results() or {}


def _start(
    fresh: ContinualLearner | None,
    backbone: Backbone | None,
    directory: RunDirectory,
    stream: Stream,
    machine: Machine,
    progress: Progress,
    features: FrozenFeatures | None,
) -> tuple[ContinualLearner, list[Row]]:
    """A new learner, or the one of the interrupted run with the evaluations it had."""
    first = parallel.rank() == 0
    if fresh is not None and not parallel.agree(directory.has_model()):
        if first:
            directory.log("start", stream=stream.name, tasks=len(stream))
        return fresh, []
    # Another process may have begun this run, and ended, since `fresh` took the backbone.
    free = None if fresh is not None else backbone
    learner = ContinualLearner.load(
        directory.model, device=machine, progress=progress, backbone=free, features=features
    )
    learned, rows = len(learner.tasks), directory.rows()
    parallel.wait()  # nothing is written before all have read
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
    if first:
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
    evaluate_every: int,
) -> None:
    """Learns what is left of the stream and appends the missing rows, but for the last."""
    first = parallel.rank() == 0
    for t, task in enumerate(stream):
        if t >= len(learner.tasks):
            record = learner.learn(task.train, name=task.name)
            progress.record(record.figures(t + 1))
            with parallel.failing_together():
                if first:
                    learner.save(directory.model)
        if len(rows) == t < len(stream) - 1:
            skipped = t if (t + 1) % evaluate_every else 0
            row, features = _evaluate(learner, tests[: t + 1], skipped, progress)
            rows.append(row)
            with parallel.failing_together():
                if first:
                    directory.finish_task(rows, features)
                    _tell(stream, rows, directory, progress)


def _evaluate(
    learner: ContinualLearner, tests: list[TaskDataset], skipped: int, progress: Progress
) -> tuple[Row, Tensor]:
    """Hits on the test sets of the tasks so far, and the final features of the latest one's images.

    Args:
        learner: After the latest task.
        tests: Of all tasks so far.
        skipped: So many of the first ones are not looked at.
        progress: Where to report.
    """
    row: Row = {}
    for task, test in progress.track(enumerate(tests), len(tests), "evaluating"):
        if task < skipped:
            continue
        outputs = learner.outputs(test)
        progress.record(figures.of_gate(outputs, task))
        labels = _labels(learner, test)
        for name in readouts_of(outputs):
            row.setdefault(name, []).append(count_hits(outputs, name, labels, task))
    for hits in row.values():
        hits[:0] = [None] * skipped
    return row, outputs.features


def _final_pass(
    learner: ContinualLearner, tests: list[TaskDataset], directory: RunDirectory, progress: Progress
) -> FinalPass:
    final = FinalPass()
    for task, test in progress.track(enumerate(tests), len(tests), "evaluating"):
        outputs = learner.outputs(test)
        progress.record(figures.of_gate(outputs, task))
        then = directory.features(task) if task < len(tests) - 1 else outputs.features
        final.add(outputs, _labels(learner, test), then)
    return final


def _tell(stream: Stream, rows: list[Row], directory: RunDirectory, progress: Progress) -> None:
    task = len(rows) - 1
    progress.record(figures.of_row(rows[-1]))
    if any(None in hits for hits in rows[-1].values()):
        directory.log("learned", task=task, name=stream.tasks[task].name)
        return
    shares = {name: accuracy(hits) for name, hits in rows[-1].items()}
    directory.log("evaluated", task=task, name=stream.tasks[task].name, accuracy=shares)
    told = ", ".join(f"{percent(share)} % ({name})" for name, share in shares.items())
    progress.line(f"after task {task + 1} of {len(stream)}: accuracy on all seen test images {told}")


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

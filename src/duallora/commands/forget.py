"""``duallora forget``: takes back what was taught."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from duallora.commands import console
from duallora.errors import DualLoRAError

if TYPE_CHECKING:
    from duallora.forgetting import Forgotten
    from duallora.learner import ContinualLearner
    from duallora.streams import FolderDataset, TaskDataset
    from duallora.teaching.measure import Measured

_NOT_MEASURED = "other classes and relearning: not measured; give labelled images in --check"


def forget(
    model: Path,
    *,
    task: str | None = None,
    class_: str | None = None,
    check: Path | None = None,
    purge: bool = False,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
) -> None:
    """Take a task or a class back from a saved model; undo brings it back, until it is purged.

    Args:
        model: folder of the saved model
        task: name of the task to forget
        class_: name of the class to forget, in all tasks that taught it
        check: labelled images of known, of forgotten and of never taught classes, to measure on
        purge: also delete the previous state, so that nothing can be undone; alone, only that
        device: where to compute
    """
    if task is not None and class_ is not None:
        raise DualLoRAError("give --task or --class, not both; forget them one after the other.")
    if task is None and class_ is None and not purge:
        raise DualLoRAError("say what to forget: --task NAME or --class NAME; `duallora inspect` lists them.")
    if task is None and class_ is None and check is not None:
        raise DualLoRAError("--check measures what forgetting does; give --task or --class with it.")

    from duallora.storage import checkpoint

    checkpoint.read_manifest(model)  # a folder without a model is refused before the lock would create it
    with checkpoint.exclusive(model):
        if task is not None or class_ is not None:
            _forget(model, task, class_, check, device)
        purged = checkpoint.purge(model) if purge else None
    if purged is not None:
        told = "the previous state is deleted" if purged else "there was no previous state to delete"
        console.line(f"{told}; `duallora undo` has nothing to go back to")


def _forget(model: Path, task: str | None, name: str | None, check: Path | None, device: str) -> None:
    """Forgets, measures, saves and prints; the caller holds the lock."""
    from duallora.learner import ContinualLearner
    from duallora.streams import FolderDataset, evaluation_folder
    from duallora.teaching.measure import Measured

    learner = ContinualLearner.load(model, device=device)
    data = None
    if check is not None:
        data = FolderDataset(evaluation_folder(check))
        data.check()
    known = list(learner.classes)
    remaining = _remaining(learner, task, name)
    others = None if data is None else _of_classes(data, remaining)
    before = Measured.on(learner, others)
    forgotten = learner.forget(task=task, name=name)
    after = Measured.on(learner, others)
    lines = [_NOT_MEASURED]
    if data is not None:
        lines = [_told(before, after), *_relearning(learner, data, forgotten, known)]
    leaves = learner.method.leaves
    learner.commit(model)
    classes = ", ".join(forgotten.classes) or "no class, for other tasks taught them too"
    whole = "".join(f", with the task {each} as a whole" for each in forgotten.tasks)
    console.line(f"{model} has forgotten {classes}{whole}; it knows {len(learner.classes)} classes")
    for text in lines:
        console.line(text)
    console.line(f"what stays of it: {leaves} (docs/forgetting.md)")
    for each in forgotten.still_named:
        console.line(f"the name of the task {each!r} names what is forgotten; it goes with the task alone")


def _remaining(learner: ContinualLearner, task: str | None, name: str | None) -> set[str]:
    """Classes that the learner will still know."""
    return {c for record in learner.tasks if record.name != task for c in record.classes if c != name}


def _of_classes(data: FolderDataset, names: set[str]) -> TaskDataset | None:
    """The images of some classes; None where there are none."""
    from duallora.streams.task import as_task_dataset
    from duallora.teaching.training_images import present

    view = as_task_dataset(data)
    chosen = [i for i, target in enumerate(view.targets) if view.classes[target] in names]
    return present(view.subset(chosen)) if chosen else None


def _told(before: Measured | None, after: Measured | None) -> str:
    from duallora.storage.documents import percent

    if before is None or after is None:
        return "other classes: not measured, --check has no images of them"
    shares = f"{percent(before.accuracy)} % before, {percent(after.accuracy)} % after"
    return f"other classes on the --check images: {shares} ({len(after.answers)} images)"


def _relearning(
    learner: ContinualLearner, data: FolderDataset, forgotten: Forgotten, known: list[str]
) -> list[str]:
    """How well the forgotten classes could be taught again, and those that were never taught."""
    from duallora.forgetting import relearned
    from duallora.storage.documents import percent
    from duallora.streams.task import as_task_dataset, positions_by_class

    counts = {c: len(p) for c, p in zip(data.classes, positions_by_class(as_task_dataset(data)), strict=True)}
    enough = {c for c, count in counts.items() if count > 1}  # each image is left out of its own class
    gone, new = enough & set(forgotten.classes), enough - set(known)
    view = _of_classes(data, gone | new)
    if view is None or not gone:
        return ["relearning: not measured, --check has no class of the forgotten ones with two images"]
    shares = dict(zip(view.classes, relearned(learner, view).tolist(), strict=True))

    def mean(names: set[str]) -> str:
        return f"{percent(sum(shares[c] for c in names) / len(names))} % of the images ({len(names)} classes)"

    beside = mean(new) if new else "not measured, --check has none with two images"
    return [
        "recognised if taught again from what is left:",
        f"  forgotten classes: {mean(gone)}",
        f"  classes never taught: {beside}",
    ]

"""Takes a task or a class back from a saved model: open under the lock, forget, measure, save.

What the weights still hold of a forgotten class is measured by how well it could be taught again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duallora.learner import ContinualLearner
from duallora.storage import checkpoint
from duallora.streams.names import normal
from duallora.streams.task import as_task_dataset, positions_by_class
from duallora.teaching.measure import Measured
from duallora.teaching.training_images import present
from duallora.training import batches, evaluated

if TYPE_CHECKING:
    from duallora.classifiers.class_statistics import ClassStatistics
    from duallora.forgetting import Forgotten
    from duallora.streams import FolderDataset, TaskDataset


@dataclass(frozen=True)
class Relearned:
    """Share of images that would be recognised if their class were taught again from what is left.

    Attributes:
        forgotten: class name to share, of classes that were forgotten.
        new: the same of classes that were never taught.
    """

    forgotten: dict[str, float]
    new: dict[str, float]


@dataclass(frozen=True)
class TakenBack:
    """What a saved model has forgotten, and what that did.

    Attributes:
        forgotten: classes and tasks.
        known: how many classes are left.
        leaves: what stays of them in the method's weights, in words.
        before: on images of the classes that stay, before; None where there were none.
        after: the same afterwards.
        relearned: how well what is forgotten could be taught again; None where it was not measured.
    """

    forgotten: Forgotten
    known: int
    leaves: str
    before: Measured | None
    after: Measured | None
    relearned: Relearned | None


def take_back(
    model: Path,
    *,
    task: str | None = None,
    name: str | None = None,
    check: FolderDataset | None = None,
    purge: bool = False,
    device: str = "auto",
) -> TakenBack:
    """Forgets a task or a class and saves the model.

    Args:
        model: folder of the saved model.
        task: name of the task.
        name: of the class; one of the two is given.
        check: images of known, of forgotten and of never taught classes, to measure on.
        purge: also delete the state before, so that nothing can be undone.
        device: where to compute.

    Raises:
        DualLoRAError: There is no model, none of that name, it is all that the model knows, or it is in use.
    """
    checkpoint.read_manifest(model)  # a folder without a model is refused before the lock would create it
    with checkpoint.exclusive(model):
        learner = ContinualLearner.load(model, device=device)
        known = list(learner.classes)
        gone = None if name is None else normal(name)
        stay = {c for r in learner.tasks if r.name != task for c in r.classes if normal(c) != gone}
        others = None if check is None else _of_classes(check, stay)
        before = Measured.on(learner, others)
        forgotten = learner.forget(task=task, name=name)
        after = Measured.on(learner, others)
        again = None if check is None else _relearned(learner, check, forgotten, known)
        leaves = learner.method.leaves
        learner.commit(model)
        if purge:
            checkpoint.purge(model)
    return TakenBack(forgotten, len(learner.classes), leaves, before, after, again)


def relearned(learner: ContinualLearner, data: TaskDataset) -> Tensor:
    """How well classes that a learner does not know could be taught again, from its weights as they are.

    All of them become class rows beside the known ones, under the covariance that is there; every image is
    left out of the mean of its own class when it is answered.

    Args:
        learner: whose features and rows are used; nothing about it changes.
        data: images of classes that it does not know, two or more of each.

    Returns:
        The share of images of every class of ``data`` that are recognised (C,), fp64.
    """
    with learner.loader.reading(data, learner.preprocess) as source:
        asked = partial(batches, learner.loader, source, data, evaluated(range(len(data))), len(data))
        features, labels = learner.method.observe(asked)
    return _recognised(learner.method.rows, features, labels, len(data.classes))


@torch.no_grad()
def _recognised(rows: ClassStatistics, features: Tensor, labels: Tensor, classes: int) -> Tensor:
    z, own = rows.whitened(features).cpu().double(), labels.cpu()
    count = torch.bincount(own, minlength=classes).double()
    mean = torch.zeros(classes, z.shape[1], dtype=z.dtype).index_add_(0, own, z) / count[:, None]
    share = rows.shares(count)  # as rows of so many images beside the known ones
    scores = share * (z @ mean.T) - share.square() * mean.square().sum(1) / 2
    n = count[own][:, None]
    without = (n * mean[own] - z) / (n - 1)  # the mean of the other images of the class
    without = rows.shares(count - 1)[own][:, None] * without
    alone = (z * without).sum(1) - without.square().sum(1) / 2
    scores = scores.scatter(1, own[:, None], alone[:, None])
    known = rows.scores(features).cpu().double()
    right = torch.cat([scores, known], 1).argmax(1) == own
    return torch.bincount(own[right], minlength=classes).double() / count


def _relearned(
    learner: ContinualLearner, data: FolderDataset, forgotten: Forgotten, known: Collection[str]
) -> Relearned | None:
    """How well the forgotten classes could be taught again, and those that were never taught."""
    view = as_task_dataset(data)
    counts = {c: len(p) for c, p in zip(data.classes, positions_by_class(view), strict=True)}
    enough = {c for c, count in counts.items() if count > 1}  # each image is left out of its own class
    gone, new = enough.intersection(forgotten.classes), enough.difference(known)
    chosen = _of_classes(data, gone | new)
    if chosen is None or not gone:
        return None
    shares = dict(zip(chosen.classes, relearned(learner, chosen).tolist(), strict=True))
    return Relearned({c: shares[c] for c in gone}, {c: shares[c] for c in new})


def _of_classes(data: FolderDataset, names: Collection[str]) -> TaskDataset | None:
    """The images of some classes; None where there are none."""
    view = as_task_dataset(data)
    chosen = [i for i, target in enumerate(view.targets) if view.classes[target] in names]
    return present(view.subset(chosen)) if chosen else None

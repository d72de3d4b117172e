"""How heads that read all that class rows read begin, and what leads a training in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duallora.classifiers.class_statistics import ClassMoments
from duallora.methods.interface import TaskInfo
from duallora.methods.leader import Leader

if TYPE_CHECKING:
    from duallora.methods.base import Method


@torch.no_grad()
def imprint(method: Method, task: TaskInfo, features: Tensor, labels: Tensor) -> None:
    """Starts the task's head as the classifier of its rows, so that training goes on from there.

    Args:
        method: whose latest head it is.
        task: the one being prepared.
        features: of its images (n, row_dim), before training.
        labels: (n,).
    """
    method.rows.replace(task.index, ClassMoments.of(features, labels, len(task.classes)))
    method.rows.fit_temperature(task.index, features, labels)
    if len(labels) > len(task.classes):  # single images have no spread to weigh features by
        method.heads.imprint(*method.rows.linear(task.index))
    if len(method.starts.tasks) == len(method.heads.tasks) - 1:  # a model that was saved without stays so
        method.starts.copy_latest(method.heads)


def lead(method: Method, task: TaskInfo) -> None:
    """Lets heads of its own, drawn at random and on the last layer, lead the task's training.

    An imprinted head fits the task's images as it is, from features below the adapters too: it leaves
    adapters nothing to learn. These are thrown away by :func:`settle`.

    Args:
        method: trained next.
        task: the one being prepared.
    """
    backbone, patches = method.backbone, method.backbone.patch_columns
    columns = [slice(0, backbone.feature_dim), *([] if patches is None else [patches])]
    method.leader = Leader(columns, len(task.classes), method.generator(task.index), method.device)


def settle(method: Method, task: TaskInfo) -> None:
    """After :func:`lead`, with the rows of the trained features there: the head is their classifier.

    Args:
        method: has been trained; where nothing has led it, nothing changes.
        task: the one being consolidated.
    """
    if method.leader is not None:
        imprint_again(method, task.index)
        method.leader = None


@torch.no_grad()
def imprint_again(method: Method, task: int) -> None:
    """Makes the head of a task the classifier of its rows as they are now."""
    for heads in (method.heads, method.starts):
        if task < len(heads.tasks):  # the latest has no start yet, a model that was saved without has none
            heads.imprint(*method.rows.linear(task), task)

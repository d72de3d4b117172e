"""Prompt methods on tiny backbones, learned, opened and counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_tasks import new_learner, small_config, three_tasks
from tiny import WIDTH, tiny_backbone, tiny_images
from torch import Tensor, nn

from duallora.methods import Batch, Method

NAMES = ("coda-prompt", "dualprompt", "l2p")
names = pytest.mark.parametrize("name", NAMES)


def learned(name: str, tasks: int = 2, family: str = "vit", **changes: Any) -> Method:
    learner = new_learner(small_config(name, **changes), family=family)
    for task in three_tasks()[:tasks]:
        learner.learn(task)
    return exact(learner.method)


def opened(name: str, tasks: int = 2, depth: int = 2, **changes: Any) -> Method:
    """A method on a fresh backbone with the parameters of some tasks as drawn, heads of two classes."""
    method = new_learner(small_config(name, **changes), depth=depth).method
    for task in range(tasks):
        method.heads.open(2, method.generator(task))
        method.grow(task)
    return exact(method)


def exact(method: Method) -> Method:
    """Computes its losses in fp32 on every machine; gradients of the training are gone."""
    method.context = replace(method.context, autocast=nullcontext)
    method.adapters.zero_grad()
    return method


def batch(count: int = 6) -> Batch:
    labels = torch.arange(count) % 2
    return Batch(tiny_images(count, seed=5), labels, torch.arange(count))


def queries(images: Tensor, family: str = "vit") -> Tensor:
    """Final features of a backbone that no method has touched, fp64."""
    return tiny_backbone(family)(images)[:, :WIDTH].double()


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in module.named_parameters()}


@contextmanager
def passes(method: Method) -> Iterator[list[Tensor]]:
    """What the backbone gives, pass by pass."""
    found: list[Tensor] = []
    handle = method.backbone.register_forward_hook(lambda _, __, y: found.append(y.detach()))
    yield found
    handle.remove()

"""DualLoRA on tiny backbones: tasks, training, and what enters a projection."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny import tiny_backbone, tiny_images
from torch import Tensor
from torch.testing import assert_close

from duallora.adapters.dual_lora import AdaptedQKV, DualAdapter
from duallora.backbones.backbone import Backbone
from duallora.methods import Batch, TaskInfo
from duallora.methods.duallora import DualLoRA
from duallora.methods.duallora_config import DualLoRAConfig

DIM, TOKENS, CPU = 32, 17, torch.device("cpu")
near = partial(assert_close, rtol=1e-4, atol=1e-5, check_dtype=False)


class Data:
    """A task of images in memory."""

    def __init__(self, index: int, images: Tensor, labels: Tensor) -> None:
        classes = tuple(f"{index}-{c}" for c in range(int(labels.max()) + 1))
        self.info, self.images, self.labels = TaskInfo(index, f"task {index + 1}", classes), images, labels

    def batch(self, indices: Tensor) -> Batch:
        return Batch(self.images[indices], self.labels[indices], indices)

    def loader(self) -> list[Batch]:
        return [self.batch(indices) for indices in torch.arange(len(self.labels)).split(5)]


def random_task(index: int, count: int = 12, classes: int = 2) -> Data:
    """Random images whose classes differ, and whose task differs from other tasks."""
    labels = torch.arange(count) % classes
    shift = torch.randn(1 + classes, 3, 32, 32, generator=torch.Generator().manual_seed(500 + index))
    return Data(index, tiny_images(count, 10 + index) + 0.3 * shift[0] + 0.3 * shift[1 + labels], labels)


def method_of(backbone: Backbone | None = None, **fields: Any) -> DualLoRA:
    fields = {"rank": 4, "residual_rank": 3, "projections": "kv", "known_domain": 2.0} | fields
    return DualLoRA(
        tiny_backbone() if backbone is None else backbone, DualLoRAConfig(**{"residual": "next"} | fields), 0
    )


def train(method: DualLoRA, data: Data, steps: int = 12, learning_rate: float = 2e-2) -> None:
    optimizer = torch.optim.Adam(
        [p for group in method.parameter_groups() for p in group["params"]], learning_rate
    )
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        batch = data.batch(torch.randint(0, len(data.labels), (8,), generator=generator))
        optimizer.zero_grad()
        method.loss(batch).backward()
        optimizer.step()
        method.after_step()


def learn(method: DualLoRA, data: Data, steps: int = 12) -> None:
    method.prepare(data.info, data.loader)
    if len(data.info.classes) > 1:
        train(method, data, steps)
    method.consolidate(data.info, data.loader)


def adapters(method: DualLoRA) -> list[tuple[tuple[int, str], DualAdapter]]:
    return [((layer, group), method.adapted[layer].groups[group]) for layer, group in method.subspaces]


def calls_of(module: AdaptedQKV, run: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of an adapted projection while ``run`` runs, over all its batches."""
    inputs, outputs = [], []

    def read(_: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(args[0].detach().clone())
        outputs.append(output.detach().clone())

    handle = module.register_forward_hook(read)
    run()
    handle.remove()
    return torch.cat(inputs), torch.cat(outputs)


def described(x: Tensor, layer: int = 1, class_token: bool = True, prefix: int = 1) -> Tensor:
    """What the gate reads of the tokens x (n, N, d): class token and mean patch token, written out."""
    mean = sum(x[:, i] for i in range(prefix, x.shape[1])) / (x.shape[1] - prefix)
    return torch.cat([x[:, 0], mean], 1) if class_token and layer > 0 else mean


def judge(monkeypatch: pytest.MonkeyPatch, helps: bool) -> None:
    """Decides whether adapters help a domain's second task; those of random weights may not."""
    monkeypatch.setattr("duallora.methods.duallora.harmed", lambda *_: not helps)

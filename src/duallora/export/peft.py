"""The fixed part of what a learner adds to its backbone, as one LoRA that peft loads.

What is merged after every task is a matrix beside each frozen projection, so the sum of all tasks is one as
well, and its singular value decomposition gives the LoRA of least rank within an error. A residual adapter is
weighted by the gate for every image, so it is part of a fixed update only where that weight cannot change.
The heads and class statistics stay behind: what peft gives is the adapted backbone, and its features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from duallora.adapters.dual_lora import AdaptedQKV
from duallora.adapters.lora import Beside
from duallora.adapters.wrapped_qkv import WrappedQKV
from duallora.backbones.projections import made_from, projection_names
from duallora.errors import DualLoRAError
from duallora.learner import ContinualLearner
from duallora.storage.atomic import replace_file, sync_folder

CONFIG, WEIGHTS, ABOUT = "adapter_config.json", "adapter_model.safetensors", "duallora.json"


@dataclass(frozen=True)
class PeftExport:
    """What was written.

    Attributes:
        ranks: of the LoRA, by layer name in the model that peft adapts.
        error: largest relative error of a layer's update, ``|dW - B A| / |dW|`` (Frobenius).
        gate: in words, what became of the residual adapters.
        base: in words, the model that peft adapts.
    """

    ranks: dict[str, int]
    error: float
    gate: str
    base: str


def to_peft(learner: ContinualLearner, folder: Path, error: float, task: str | None = None) -> PeftExport:
    """Writes a learner's fixed update as a LoRA of the least rank within an error.

    Args:
        learner: on the CPU.
        folder: empty or not there; gets ``adapter_config.json``, ``adapter_model.safetensors`` and
            ``duallora.json``.
        error: largest relative Frobenius error of a layer's update, from 0 (full rank) to below 1.
        task: where several residual adapters are gated by image, that of this task's domain is taken with
            weight 1; None refuses such a model.

    Raises:
        DualLoRAError: the method has no fixed update, the gate weights its adapters image by image, or a
            wrapper would be bypassed in the model it is for.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise DualLoRAError(f"{folder} is there already; name a new folder for the adapter.")
    kept, gate = _kept_residuals(learner, task)
    info, tensors, ranks, worst = learner.backbone.info, dict[str, Tensor](), dict[str, int](), 0.0
    for layer in sorted(learner.backbone.plain_qkv):
        update = _fixed_update(learner, layer, kept)
        names = projection_names(info, layer)
        for name, part in zip(names, update.chunk(len(names)), strict=True):
            if not bool(part.any()):
                continue
            a, b, found = least_rank(part, error)
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
            ranks[name], worst = len(a), max(worst, found)
    if not ranks:
        raise DualLoRAError(
            f"the method {learner.method_name} has added nothing to the weights of its backbone, so there is "
            "nothing for peft; export as torch-export or onnx."
        )
    done = PeftExport(ranks, worst, gate, made_from(info))
    _write(folder, learner, tensors, done)
    return done


def least_rank(update: Tensor, error: float) -> tuple[Tensor, Tensor, float]:
    """The product of least rank within a relative Frobenius error of a matrix.

    Args:
        update: (out, in), not all zero.
        error: from 0 to below 1.

    Returns:
        A (r, in) and B (out, r), fp32 and contiguous, and the relative error of ``B A``.
    """
    u, s, v = torch.linalg.svd(update.double(), full_matrices=False)
    whole = s.square().sum()
    left = (whole - s.square().cumsum(0)).clamp(min=0) / whole  # squared error after 1, 2, ... directions
    within = (left.sqrt() <= max(error, 1e-6)).nonzero()  # the update itself is in fp32
    rank = int(within[0]) + 1 if len(within) else len(s)
    root = s[:rank].sqrt()
    a, b = (root[:, None] * v[:rank]).float().contiguous(), (u[:, :rank] * root).float().contiguous()
    found = (update.double() - b.double() @ a.double()).norm() / whole.sqrt()
    return a, b, float(found)


def _kept_residuals(learner: ContinualLearner, task: str | None) -> tuple[set[int], str]:
    """The tasks whose residual adapters are part of the update, and in words what that means."""
    names = [each.name for each in learner.tasks]
    if task is not None and task not in names:
        raise DualLoRAError(f"there is no task {task!r} in the model; its tasks are {', '.join(names)}.")
    wrappers = [
        learner.backbone.attention(layer).get_submodule("qkv") for layer in learner.backbone.plain_qkv
    ]
    groups = [group for w in wrappers if isinstance(w, AdaptedQKV) for group in w.groups.values()]
    owners = {part.task for group in groups for part in group.residuals}
    if not owners:
        return owners, "no residual adapter: the update is the same for every image"
    config: Any = learner.config
    method: Any = learner.method
    uses = method.memory.domains.uses
    if task is not None:
        own = uses[names.index(task)]
        took = "its residual adapter with weight 1" if own in owners else "none of its own"
        return owners & {own}, f"for images of {task}: {took}, and no residual adapter of others"
    if config.gate == "off":
        return owners, "the gate is off: all residual adapters, with weight 1"
    alone = len(names) == 1 or config.relevance == "gaussian"  # energies do not add up to 1
    if len(owners) == 1 and set(uses) == owners and alone:
        return owners, "the one residual adapter, whose weight is 1 for every image"
    first = ", ".join(names[owner] for owner in sorted(owners)[:5])
    raise DualLoRAError(
        f"the gate weights the residual adapters of {len(owners)} domains (first taught by {first}) image by "
        "image, so no one update stands for them; name with --task the task whose images the adapter is for, "
        "or export as torch-export or onnx."
    )


def _fixed_update(learner: ContinualLearner, layer: int, kept: set[int]) -> Tensor:
    """What is added to a layer's weight (3 d_out, d), fp64, with the residual adapters of some tasks."""
    wrapper = learner.backbone.attention(layer).get_submodule("qkv")
    updates = _updates(wrapper, kept)
    if updates is None or not isinstance(wrapper, WrappedQKV):
        raise DualLoRAError(
            f"what the method {learner.method_name} adds is no matrix beside a weight but depends on the "
            "image, so it is no LoRA; export as torch-export or onnx."
        )
    whole = torch.zeros_like(wrapper.base.weight, dtype=torch.float64)
    for name, update in updates:
        for rows, own in zip(wrapper.slices(name), update.T.split(wrapper.width), strict=True):
            whole[rows] += own
    return whole


def _updates(wrapper: nn.Module, kept: set[int]) -> list[tuple[str, Tensor]] | None:
    """Matrices (d, out) in fp64 and the projections they are added to; None where an update is no matrix."""
    if isinstance(wrapper, Beside):
        delta = wrapper.delta_weight()
        return None if delta is None else [(wrapper.projections, delta.double())]
    if not isinstance(wrapper, AdaptedQKV):
        return None
    found = []
    for name, group in wrapper.groups.items():
        merged = group.delta_weight()
        found += [] if merged is None else [(name, merged.double())]
        found += [
            (name, part.psi.double() @ part.c.double()) for part in group.residuals if part.task in kept
        ]
    return found


def _write(folder: Path, learner: ContinualLearner, tensors: Mapping[str, Tensor], done: PeftExport) -> None:
    """The configuration last: without it peft takes the folder for no adapter."""
    largest = max(done.ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": learner.backbone.info.name,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,  # over the rank: the update is taken as it is
        "rank_pattern": done.ranks,
        "alpha_pattern": done.ranks,
        "target_modules": sorted(done.ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    about = {
        "base": done.base,
        "backbone": learner.backbone.info.to_dict() | {"file": None},
        "method": learner.method_name,
        "tasks": [task.name for task in learner.tasks],
        "relative_error": done.error,
        "gate": done.gate,
    }
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS, [safetensors.torch.save(dict(tensors))])
    replace_file(folder / ABOUT, [(json.dumps(about, indent=2) + "\n").encode()])
    sync_folder(folder)
    replace_file(folder / CONFIG, [(json.dumps(config, indent=2) + "\n").encode()])

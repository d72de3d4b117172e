"""Whether a saved model's description and its tensors fit each other, before anything is made of them.

The hashes in ``model.json`` tell damage from what was saved; they do not tell who wrote it. So every number
that decides how much is allocated or how often something is done is compared with what the file holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duallora.errors import DualLoRAError

LARGEST_SIDE = 1536
"""Pixels of a side of the images that a backbone takes."""

_MOST_TASKS = 100_000
_MOST_LAYERS = 1000
_LARGEST = 2**53  # whole numbers that JSON's readers agree on
_SMALL = 64  # numbers of a configuration that ask for little, whatever they are of
_UNIT_BYTES = 3 * 4 * 12  # fp32, three projections of twelve layers: what one direction of a task may take
_MOST_BYTES = 4 << 30
_HEAD = re.compile(r"heads\.tasks\.(\d{1,9})\.weight")
_NUMBERED = re.compile(r"(?:^|\.)(fit|residual|orthogonal|tasks|probation)\.(\d+)(?:\.|$)")
_LAYER = re.compile(r"^(?:layers|gate|adapters)\.(\d+)\.")
# What is beside a projection: products are made of it before anything looks at its shape.
_MATRIX = re.compile(r"layers\..*\.(a|b|psi|c|dense|phi|basis)$")
# Without energy a task has no finite mean of it.
_MAY_BE_INFINITE = re.compile(r"\.energy\.|(?:^|\.)fit\.")


def check(folder: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuses a model whose parts contradict each other, or that asks for more than it holds.

    Args:
        folder: of the model, for messages.
        manifest: content of ``model.json``.
        tensors: the saved weights by name.

    Raises:
        DualLoRAError: naming the first contradiction.
    """
    found = _first_fault(folder, manifest, tensors)
    if found is not None:
        raise DualLoRAError(
            f"{folder / 'model.json'} or the weights beside it are damaged, or no model that duallora saved: "
            f"{found}; restore them from a copy of the model."
        )


def _first_fault(folder: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    try:
        return (
            _tasks_fault(manifest)
            or _settings_fault(manifest)
            or _backbone_fault(folder, manifest)
            or _numbers_fault(tensors)
            or _matrices_fault(tensors)
            or _indices_fault(tensors, len(manifest["tasks"]))
            or _rows_fault(tensors, [len(task["classes"]) for task in manifest["tasks"]])
            or _probation_fault(tensors, [len(task["classes"]) for task in manifest["tasks"]])
            or _heads_fault(tensors, [len(task["classes"]) for task in manifest["tasks"]])
            or _size_fault(manifest, tensors)
        )
    except KeyError as error:
        return f"{error} is missing"
    except (TypeError, AttributeError, IndexError, ValueError, OverflowError, RecursionError):
        return "an entry of model.json is of another kind than it has to be"


def _tasks_fault(manifest: Mapping[str, Any]) -> str | None:
    tasks, classes = manifest["tasks"], manifest.get("classes")
    if not (classes is None or _is_texts(classes)) or not isinstance(tasks, list) or len(tasks) > _MOST_TASKS:
        return "its classes or tasks are no lists"
    taught: set[str] = set()
    for task in tasks:
        if not isinstance(task["name"], str) or not _is_texts(task["classes"]):
            return "a task has no name or no classes"
        if not isinstance(task["learned_at"], str) or not _is_count(task["train_images"]):
            return "a task does not say when or from how many images it was learned"
        if not isinstance(task.get("unknown_below"), int | float | None):
            return "a task does not say in a number what is unknown"
        numbers = (value for value in task.values() if isinstance(value, int | float))
        if not all(0 <= value <= _LARGEST for value in numbers):  # also refuses NaN
            return "a task has a number that cannot be"
        taught.update(task["classes"])
    # A model that lost the list has the same classes in its tasks.
    return None if classes is None or taught == set(classes) else "its tasks and its classes are not the same"


def _settings_fault(manifest: Mapping[str, Any]) -> str | None:
    config = manifest["config"]
    if not isinstance(manifest["method"], str) or not isinstance(config, dict):
        return "its method is no name"
    seed = manifest["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        return "its seed is no whole number that can be one"
    if not isinstance(manifest["augment"], str):
        return "its augmentation is no word"
    if not all(value is None or isinstance(value, str | int | float) for value in config.values()):
        return "a field of its method is neither a number nor a word"
    return None


def _backbone_fault(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    about = manifest["backbone"]
    size = about["input_size"]
    if len(size) != 3 or not all(_is_count(side) and 0 < side <= LARGEST_SIDE for side in size):
        return f"its images have sides of more than {LARGEST_SIDE} pixels, or of none"
    views = [about["crop_pct"], *about["mean"], *about["std"]]
    if not all(_is_number(value) for value in views) or len(views) != 7:
        return "the preparation of its images is no numbers"
    if not 0 < about["crop_pct"] <= 1 or min(about["std"]) <= 0:
        return "the preparation of its images cannot be"
    config = about.get("config")
    if config is None:
        return None
    width, depth, hidden = (
        config.get(key, 0) for key in ("hidden_size", "num_hidden_layers", "intermediate_size")
    )
    copies = [folder / name for name in manifest["files"] if name.startswith("backbone-")]
    held = sum(path.stat().st_size for path in copies if path.is_file())
    # A weight takes a byte at least.
    if copies and depth * (4 * width * width + 2 * width * hidden) > held:
        return "its backbone's config names more weights than the file holds"
    return None


def _numbers_fault(tensors: Mapping[str, Tensor]) -> str | None:
    for name, tensor in tensors.items():
        if tensor.is_complex() or not (tensor.is_floating_point() or tensor.dtype in _WHOLE):
            return f"{name} holds numbers of a kind that duallora does not write"
        if not tensor.is_floating_point():
            continue
        values = tensor.float() if tensor.element_size() == 1 else tensor
        sound = ~values.isnan() if _MAY_BE_INFINITE.search(name) else values.isfinite()
        if not bool(sound.all()):
            return f"{name} holds what is no number"
    return None


def _matrices_fault(tensors: Mapping[str, Tensor]) -> str | None:
    for name, tensor in tensors.items():
        if _MATRIX.match(name) and tensor.ndim != 2:
            return f"{name} has {tensor.ndim} dimensions, and a matrix has two"
    return None


def _indices_fault(tensors: Mapping[str, Tensor], tasks: int) -> str | None:
    for name, tensor in tensors.items():
        numbered = [int(number) for _, number in _NUMBERED.findall(name) if len(number) < 10]
        if len(numbered) < len(_NUMBERED.findall(name)) or any(number >= tasks for number in numbered):
            return f"{name} is of a task that there is not"
        layer = _LAYER.match(name)
        if layer is not None and (len(layer[1]) > 9 or int(layer[1]) >= _MOST_LAYERS):
            return f"{name} is of a layer that there is not"
        last = name.rpartition(".")[2]
        if last in ("task", "tasks", "centre_task") and not _all_within(tensor, -1, tasks):
            return f"{name} names a task that there is not"
        if last == "phi" and _misfits(name, tensors):
            return f"{name} is of another width than its layer's adapters"
        if last == "sizes" and (tensor.is_floating_point() or bool((tensor < 0).any())):
            return f"{name} holds what is no size"
        if last == "sizes":
            basis = tensors.get(f"{name.rpartition('.')[0]}.phi")
            if basis is not None and (basis.ndim != 2 or int(tensor.sum()) != basis.shape[1]):
                return f"{name} names other directions than there are"
    return None


def _misfits(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether directions of a layer have another length than those of other layers or of its adapters."""
    start = name.removesuffix("phi")
    others = [
        tensor
        for other, tensor in tensors.items()
        if other.endswith(".phi") or (other.startswith(start) and other.endswith((".a", ".psi")))
    ]
    return any(tensor.ndim != 2 or tensor.shape[:1] != tensors[name].shape[:1] for tensor in others)


def _rows_fault(tensors: Mapping[str, Tensor], classes: Sequence[int]) -> str | None:
    if "rows.task" not in tensors:
        return None if not classes else "rows.task is missing"
    for start in (name.removesuffix("task") for name in tensors if name.endswith("rows.task")):
        task, count = tensors[f"{start}task"], tensors[f"{start}count"]
        mean, scatter = tensors[f"{start}mean"], tensors[f"{start}scatter"]
        rows = sum(classes)
        if mean.ndim != 2 or tuple(task.shape) != (rows,) or tuple(count.shape) != (rows,):
            return f"{start}* are not one row for every class of every task"
        if mean.shape[0] != rows or tuple(scatter.shape) != (mean.shape[1],) * 2:
            return f"{start}mean and {start}scatter do not fit each other"
        if not _all_within(task, 0, len(classes)):
            return f"{start}task names a task that there is not"
        if torch.bincount(task, minlength=len(classes)).tolist() != [*classes]:
            return f"{start}task gives tasks other classes than model.json"
        if bool((count < 0).any()) or bool((count > _LARGEST).any()):
            return f"{start}count holds what is no number of images"
        forgotten = tensors.get(f"{start}forgotten")
        if forgotten is not None and (
            tuple(forgotten.shape) != (2,) or float(forgotten[0]) != len(classes) or float(forgotten[1]) < 0
        ):
            return f"{start}forgotten names other tasks than model.json"
    return None


def _probation_fault(tensors: Mapping[str, Tensor], classes: Sequence[int]) -> str | None:
    """What is noted of rows before a training has to fit the rows."""
    for name, tensor in tensors.items():
        if name.startswith("probation."):
            _, task, part = name.split(".")
            width = tensors["rows.mean"].shape[1]
            known = {
                "mean": (classes[int(task)], width),
                "fit": tuple(tensors[f"rows.fit.{task}"].shape),
                "scatter": (width, width),
            }
            if tuple(tensor.shape) != known[part]:
                return f"{name} does not fit the rows"
    return None


def _heads_fault(tensors: Mapping[str, Tensor], classes: Sequence[int]) -> str | None:
    heads = {int(found[1]): tensors[found[0]] for found in map(_HEAD.fullmatch, tensors) if found}
    if not heads and "heads.tasks.0.weight" not in tensors and not classes:
        return None
    if sorted(heads) != list(range(len(classes))):
        return "it has not one head for every task"
    for task, weight in heads.items():
        if weight.ndim != 2 or weight.shape[0] != classes[task]:
            return f"the head of task {task} is not of its classes"
    return None


def _size_fault(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """Ranks, lengths and numbers of a configuration that would ask for far more than the file holds."""
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    width = max((max(tensor.shape, default=1) for tensor in tensors.values()), default=1)
    most = max(_MOST_BYTES, 64 * held)
    for name, value in manifest["config"].items():
        if isinstance(value, bool) or not isinstance(value, int) or value <= _SMALL or name in _NO_SIZES:
            continue
        if value * max(len(manifest["tasks"]), 1) * min(width, 1 << 14) * _UNIT_BYTES > most:
            return f"its method's {name} of {value:,} asks for far more than the file holds"
    return None


def _all_within(tensor: Tensor, first: int, end: int) -> bool:
    """Whether all are whole numbers from ``first`` to below ``end``."""
    if tensor.is_floating_point():
        return False
    return not tensor.numel() or (int(tensor.min()) >= first and int(tensor.max()) < end)


def _is_texts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(text, str) and text.strip() and not _is_broken(text) for text in value)
        and len(set(value)) == len(value)
    )


def _is_broken(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_WHOLE = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool})
# Numbers of repetitions, of images, and of what there is already.
_NO_SIZES = frozenset(
    {"epochs", "batch_size", "refit_epochs", "drift_steps", "samples", "top_tasks", "top_k"}
    | {"first_adapted_layer"}
)

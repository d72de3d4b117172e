"""Which test images a finished run names rightly: what two runs need to be compared image by image.

A run keeps one bit an image and readout, in an order that every run on the same images shares: by class, then
by identifier. Neither the order of the classes nor whether the tasks were learned one by one changes it.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duallora.errors import DualLoRAError
from duallora.storage.regular import read_text
from duallora.streams import TaskDataset

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Answers:
    """The answers of one run after its last task, image by image.

    Attributes:
        images_sha256: Of the classes and identifiers of the images: equal for runs on the same images.
        by_class: Images of every class, in the order of the images.
        right: For every readout (n,) bool, whether the class of largest probability is the right one.
    """

    images_sha256: str
    by_class: tuple[int, ...]
    right: Mapping[str, Tensor]


def packed(tests: Sequence[TaskDataset], right: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
    """The ``answers`` of ``results.json``.

    Args:
        tests: Test images of every task, in the order of the tasks.
        right: For every readout, one (n,) bool tensor a task.
    """
    names = [
        (test.classes[target], identifier)
        for test in tests
        for target, identifier in zip(test.targets, test.identifiers, strict=True)
    ]
    return _packed(names, {readout: torch.cat(list(parts)).numpy() for readout, parts in right.items()})


def from_predictions(path: Path, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``answers`` of a run from before they were kept, under its own readout alone.

    Args:
        path: ``predictions.csv`` of the run.
        results: Its ``results.json``.

    Returns:
        None where the file is not there or does not give the accuracy of the results: its probabilities have
        six digits, and two classes may have become equal.
    """
    names, right = [], []
    try:
        header, *lines = csv.reader(io.StringIO(read_text(path), newline=""))
        classes = [name.removeprefix("probability:") for name in header[3:]]
        for image, label, _, *probabilities in lines:
            values = [float(value) for value in probabilities]
            names.append((label, image))
            right.append(classes[values.index(max(values))] == label)
    except (OSError, ValueError, IndexError):
        return None
    if not right or abs(sum(right) / len(right) - results["final_accuracy"]) > _ROUNDING:
        return None
    return _packed(names, {results["readout"]: np.array(right)})


def _packed(names: Sequence[tuple[str, str]], right: Mapping[str, Any]) -> dict[str, Any]:
    """Answers to images by class and identifier, as they are kept."""
    # Stable: an image that several domains show has one name, and keeps the order of the domains.
    order = sorted(range(len(names)), key=lambda i: names[i])
    shown = [names[i] for i in order]
    return {
        "images_sha256": hashlib.sha256(json.dumps(shown).encode()).hexdigest(),
        "images_by_class": dict(Counter(name for name, _ in shown)),
        "right": {
            readout: base64.b64encode(np.packbits(bits[order]).tobytes()).decode()
            for readout, bits in right.items()
        },
    }


def unpacked(results: Mapping[str, Any]) -> Answers | None:
    """Reads the answers of ``results.json``; None for a run from before they were kept.

    Raises:
        DualLoRAError: They contradict the results they stand in.
    """
    stored = results.get("answers")
    if stored is None:
        return None
    try:
        by_class = tuple(int(count) for count in stored["images_by_class"].values())
        total = sum(by_class)
        right = {name: _bits(text, total) for name, text in stored["right"].items()}
        shares = {name: float(bits.double().mean()) for name, bits in right.items()}
        told = {name: results["readouts"][name]["final_accuracy"] for name in right}
        sound = all(abs(shares[name] - told[name]) <= _ROUNDING for name in right)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unsound() from error
    if not sound:
        raise _unsound()
    return Answers(str(stored["images_sha256"]), by_class, right)


def _bits(text: str, count: int) -> Tensor:
    data = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(data) != -(-count // 8):
        raise ValueError(f"{len(data)} bytes for {count} images")
    return torch.from_numpy(np.unpackbits(data, count=count).astype(bool))


def _unsound() -> DualLoRAError:
    return DualLoRAError(
        "the answers by image in a results.json contradict its accuracies; take the file from its run again."
    )

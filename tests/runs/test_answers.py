"""Answers image by image: kept in a few bytes, and in one order for every run on the same images."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from duallora.errors import DualLoRAError
from duallora.runs.answers import from_predictions, packed, unpacked
from duallora.streams import TaskDataset
from duallora.streams.task import concatenated


def part(classes: list[str], targets: list[int], identifiers: list[str]) -> TaskDataset:
    nothing = TensorDataset(torch.zeros(len(targets), 1))
    return TaskDataset(
        nothing, range(len(targets)), classes=classes, targets=targets, identifiers=identifiers
    )


FIRST = part(["ox", "cat"], [0, 1, 0], ["b", "c", "a"])
SECOND = part(["dog"], [0, 0], ["z", "d"])
RIGHT = [torch.tensor([True, False, False]), torch.tensor([True, False])]


def results(stored: dict[str, Any], **accuracies: float) -> dict[str, Any]:
    written = {"answers": stored, "readouts": {n: {"final_accuracy": a} for n, a in accuracies.items()}}
    loaded: dict[str, Any] = json.loads(json.dumps(written))
    return loaded


def test_bits_are_sorted_by_class_and_image() -> None:
    found = unpacked(results(packed([FIRST, SECOND], {"heads": RIGHT}), heads=0.4))
    assert found is not None
    assert found.by_class == (1, 2, 2)  # cat, dog, ox
    # cat/c, dog/d, dog/z, ox/a, ox/b
    assert found.right["heads"].tolist() == [False, False, True, False, True]


def test_the_order_of_tasks_and_classes_changes_nothing() -> None:
    stored = packed([FIRST, SECOND], {"heads": RIGHT})
    assert packed([SECOND, FIRST], {"heads": RIGHT[::-1]}) == stored
    whole = concatenated([FIRST, SECOND], ["dog", "ox", "cat"])
    assert packed([whole], {"heads": [torch.cat(RIGHT)]}) == stored


def test_an_image_of_several_domains_keeps_their_order() -> None:
    photo, edges = part(["a"], [0], ["1"]), part(["a"], [0], ["1"])
    bits = [torch.tensor([True]), torch.tensor([False])]
    found = unpacked(results(packed([photo, edges], {"heads": bits}), heads=0.5))
    assert found is not None and found.right["heads"].tolist() == [True, False]
    both = concatenated([photo, edges], ["a"])
    assert packed([both], {"heads": [torch.cat(bits)]}) == packed([photo, edges], {"heads": bits})


def test_other_images_have_another_hash() -> None:
    stored = packed([FIRST, SECOND], {"heads": RIGHT})["images_sha256"]
    renamed = part(["dog"], [0, 0], ["z", "e"])
    assert packed([FIRST, renamed], {"heads": RIGHT})["images_sha256"] != stored
    relabelled = part(["dog", "hen"], [0, 1], ["z", "d"])
    assert packed([FIRST, relabelled], {"heads": RIGHT})["images_sha256"] != stored


def test_results_from_before_answers_were_kept_have_none() -> None:
    assert unpacked({"readouts": {}}) is None


def test_answers_of_an_older_run_are_read_off_its_predictions(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    header = "image,label,task,probability:ox,probability:cat,probability:dog\n"
    rows = ["b,ox,1,.9,.1,0", "c,cat,1,.5,.2,.3", "a,ox,1,0,.5,.5", "z,dog,2,0,0,1", "d,dog,2,1,0,0"]
    path.write_text(header + "\n".join(rows) + "\n")
    told = {"readout": "heads", "final_accuracy": 0.4}
    assert from_predictions(path, told) == packed([FIRST, SECOND], {"heads": RIGHT})
    assert from_predictions(path, told | {"final_accuracy": 0.6}) is None
    assert from_predictions(tmp_path / "none.csv", told) is None
    path.write_text("nothing\n")
    assert from_predictions(path, told) is None
    path.write_text(header + "b,ox,1,x,.1,0\n")
    assert from_predictions(path, told) is None


def _break(stored: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return copy.deepcopy(stored) | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"right": {"heads": "AAAA"}},  # three bytes for five images
        {"right": {"heads": "no base64"}},
        {"right": {"calibrated": "KA=="}},  # a readout that the run does not have
        {"right": {"heads": "+A=="}},  # five hits
        {"images_by_class": {"cat": 1}},
        {"images_by_class": [3]},
        {"images_by_class": {}},
    ],
)
def test_answers_that_contradict_the_accuracy_are_refused(changes: dict[str, Any]) -> None:
    stored = packed([FIRST, SECOND], {"heads": RIGHT})
    assert unpacked(results(stored, heads=0.4)) is not None
    with pytest.raises(DualLoRAError, match="contradict"):
        unpacked(results(_break(stored, **changes), heads=0.4))

"""The answer of a batch: classes and tasks as sums over rows, ties, and how sure it is."""

from __future__ import annotations

import pytest
import torch
from row_logs import make_outputs

from duallora import predictions as rule
from duallora.predictions import calibration_error, class_probabilities, predictions, task_probabilities
from duallora.runs.metrics import count_hits


def test_a_class_is_the_sum_over_its_rows():
    outputs = make_outputs([[0.40, 0.35, 0.25, 0.00]], row_task=[0, 0, 1, 1], row_class=[0, 1, 1, 2])
    assert class_probabilities(outputs)[0].tolist() == pytest.approx([0.4, 0.6, 0.0])


def test_a_task_is_the_sum_over_its_rows_and_not_that_of_the_best_row():
    rows = dict(row_task=[0, 1, 1], row_class=[0, 1, 2])
    by_heads = make_outputs([[0.4, 0.35, 0.25]], **rows, tasks=[[0.9, 0.1]])
    (found,) = predictions(by_heads, ["a", "b", "c"], ["first", "second"], [None], 3)
    assert (found.label, found.task) == ("a", "second")
    assert found.task_confidence == pytest.approx(0.6)
    calibrated = [[0.3, 0.5, 0.2]]
    by_posterior = make_outputs(
        [[0.4, 0.35, 0.25]], **rows, calibrated=calibrated, tasks=[[0.9, 0.1]], readout="calibrated"
    )
    (found,) = predictions(by_posterior, ["a", "b", "c"], ["first", "second"], [None], 1)
    assert (found.label, found.task) == ("b", "first")


@pytest.mark.parametrize("top", [1, 2, 40])
def test_among_equals_the_first_class_is_named(top):
    classes = 40
    outputs = make_outputs([[1 / classes] * classes], [0] * classes, list(range(classes)))
    names = [f"class {k}" for k in range(classes)]
    (found,) = predictions(outputs, names, ["only"], [None], top)
    assert [name for name, _ in found.top] == names[:top]
    assert count_hits(outputs, "heads", torch.tensor([0]), 0).label == 1
    assert int(rule.best(class_probabilities(outputs))[1]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounded_logs_give_no_probability_above_one(dtype):
    logs = torch.full((1, 3), 1 / 3, dtype=dtype).log() + 1e-6
    outputs = make_outputs([[1.0] * 3], [0] * 3, [0] * 3)
    outputs.heads = logs
    assert float(rule.summed_classes(logs, outputs.row_class, 1)) == 1.0
    assert float(task_probabilities(outputs, 1)) == 1.0


def test_readouts():
    outputs = make_outputs([[0.9, 0.1]], [0, 0], [0, 1], calibrated=[[0.2, 0.8]])
    assert rule.readouts_of(outputs) == ("heads", "calibrated")
    label = torch.tensor([1])
    assert count_hits(outputs, "heads", label, 0).label == 0
    assert count_hits(outputs, "calibrated", label, 0).label == 1
    plain = make_outputs([[0.9, 0.1]], [0, 0], [0, 1])
    assert rule.readouts_of(plain) == ("heads",)
    with pytest.raises(ValueError, match="no calibrated"):
        rule.log_rows(plain, "calibrated")
    with pytest.raises(ValueError, match="unknown readout"):
        rule.log_rows(plain, "posterior")


def test_calibration_error_by_hand():
    # Bins of width 1/15: .50 and .52 share bin 7, .95 is in bin 14.
    confidence = torch.tensor([0.50, 0.52, 0.95, 0.95])
    correct = torch.tensor([True, False, True, True])
    expected = 0.5 * abs(0.5 - 0.51) + 0.5 * abs(1.0 - 0.95)
    assert calibration_error(confidence, correct) == pytest.approx(expected)


def test_certainty_belongs_to_the_last_bin():
    # In one bin the errors of .94 (right) and 1 (wrong) partly cancel; in two bins they would add up.
    confidence = torch.tensor([0.94, 1.0])
    assert calibration_error(confidence, torch.tensor([True, False])) == pytest.approx(0.47)


def test_calibration_error_is_none_where_it_is_undefined():
    assert calibration_error(torch.tensor([]), torch.tensor([], dtype=torch.bool)) is None
    assert calibration_error(torch.tensor([float("nan")]), torch.tensor([True])) is None


def test_probabilities_a_rounding_above_one_are_no_logits():
    confidence = torch.full((4,), 1.0 + 1e-6)
    assert calibration_error(confidence, torch.ones(4, dtype=torch.bool)) == pytest.approx(0.0)

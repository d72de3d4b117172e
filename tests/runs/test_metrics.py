from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_logs import make_outputs
from torchmetrics.functional.classification import multiclass_calibration_error

from duallora.predictions import best, calibration_error, class_probabilities
from duallora.runs import metrics
from duallora.runs.metrics import Hits


def hits(images, label, given_task=None, row=None, task=None):
    given_task = label if given_task is None else given_task
    return Hits(
        images, label, given_task, label if row is None else row, given_task if task is None else task
    )


# Three tasks of 10, 20 and 10 test images.
ROWS = [
    [hits(10, 9)],
    [hits(10, 7, given_task=10), hits(20, 18)],
    [hits(10, 8, given_task=9), hits(20, 10, given_task=15, row=9, task=12), hits(10, 10)],
]


def test_hand_computed_figures():
    figures = metrics.summary(ROWS, 0.25)
    assert figures["accuracy_matrix"] == [[0.9, None, None], [0.7, 0.9, None], [0.8, 0.5, 1.0]]
    assert figures["oracle_accuracy_matrix"] == [[0.9, None, None], [1.0, 0.9, None], [0.9, 0.75, 1.0]]
    assert figures["incremental_accuracy"] == [0.9, 25 / 30, 28 / 40]
    assert figures["final_accuracy"] == 28 / 40
    assert figures["final_row_accuracy"] == 27 / 40
    assert figures["final_accuracy_task_mean"] == pytest.approx((0.8 + 0.5 + 1.0) / 3)
    assert figures["average_incremental_accuracy"] == pytest.approx((0.9 + 25 / 30 + 0.7) / 3)
    assert figures["forgetting"] == pytest.approx((0.1 + 0.4) / 2)
    assert figures["forgetting_given_task"] == pytest.approx((0.1 + 0.15) / 2)
    assert figures["backward_transfer"] == pytest.approx((-0.1 - 0.4) / 2)
    assert figures["task_identity_accuracy"] == (9 + 12 + 10) / 40
    assert figures["calibration_error"] == 0.25


def test_forgetting_is_against_the_best_row_not_the_first():
    rows = [[hits(10, 4)], [hits(10, 9), hits(10, 5)], [hits(10, 6), hits(10, 5), hits(10, 5)]]
    assert metrics.forgetting(rows) == pytest.approx(0.3 / 2)
    assert metrics.backward_transfer(rows) == pytest.approx(0.2 / 2)


def test_a_single_task_forgets_nothing():
    figures = metrics.summary([[hits(4, 3)]], None)
    assert figures["forgetting"] == figures["forgetting_given_task"] == figures["backward_transfer"] == 0.0
    assert figures["accuracy_matrix"] == [[0.75]]


def test_more_than_ten_tasks_keep_their_integer_order():
    # Sorted as strings, task 10 would come before task 2.
    rows = [[hits(100, i) for i in range(t + 1)] for t in range(12)]
    matrix = metrics.accuracy_matrix(rows)
    assert matrix[11] == [i / 100 for i in range(12)]
    assert [row.count(None) for row in matrix] == list(range(11, -1, -1))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [[hits(3, 1)], [hits(3, 1)]],
        [[hits(0, 0)]],
        [[hits(3, 1)], [hits(4, 1), hits(3, 1)]],
    ],
)
def test_impossible_rows_are_refused(rows):
    with pytest.raises(ValueError):
        metrics.accuracy_matrix(rows)


def test_count_hits_by_hand():
    # Rows: task 0 has classes 0 and 1, task 1 has class 1 again and class 2.
    outputs = make_outputs(
        [
            [0.40, 0.35, 0.25, 0.00],  # row (0, 0) is largest, class 1 has .60 in sum
            [0.10, 0.20, 0.60, 0.10],  # row (1, 1): right class, wrong task
            [0.30, 0.20, 0.10, 0.40],  # row (1, 2); given task 0: class 0
            [0.20, 0.70, 0.05, 0.05],  # row (0, 1)
        ],
        row_task=[0, 0, 1, 1],
        row_class=[0, 1, 1, 2],
    )
    counted = metrics.count_hits(outputs, "heads", torch.tensor([1, 1, 0, 1]), task=0)
    assert counted == Hits(images=4, label=3, given_task=3, row=1, task=2)


def test_feature_drift():
    then = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    now = torch.tensor([[3.0, 5.0], [0.0, 2.0]])
    assert metrics.feature_drift(now, then) == pytest.approx(0.5 * (1 / 5))
    assert metrics.feature_drift(then, then) == 0.0
    with pytest.raises(ValueError, match="different shapes"):
        metrics.feature_drift(now, then[:1])


@st.composite
def triangles(draw):
    images = draw(st.lists(st.integers(1, 50), min_size=1, max_size=12))
    rows = []
    for t in range(len(images)):
        entries = []
        for n in images[: t + 1]:
            given_task = draw(st.integers(0, n))
            task = draw(st.integers(0, n))
            row = draw(st.integers(0, min(given_task, task)))
            entries.append(Hits(n, draw(st.integers(0, n)), given_task, row, task))
        rows.append(entries)
    return rows


@settings(deadline=None)
@given(triangles())
def test_bounds(rows):
    figures = metrics.summary(rows, None)
    cells = figures["accuracy_matrix"][-1]
    assert all(0.0 <= cell <= 1.0 for row in figures["accuracy_matrix"] for cell in row if cell is not None)
    for key in ("final_accuracy", "final_accuracy_task_mean"):
        assert min(cells) - 1e-12 <= figures[key] <= max(cells) + 1e-12
    assert 0.0 <= figures["forgetting"] <= 1.0
    assert figures["forgetting"] >= -figures["backward_transfer"] - 1e-12
    assert figures["final_row_accuracy"] <= figures["task_identity_accuracy"]
    assert min(figures["incremental_accuracy"]) - 1e-12 <= figures["average_incremental_accuracy"]


@settings(deadline=None)
@given(triangles())
def test_equal_tasks_weigh_the_same_either_way(rows):
    same = [[Hits(50, h.label, h.given_task, h.row, h.task) for h in row] for row in rows]
    last = same[-1]
    assert metrics.accuracy(last) == pytest.approx(metrics.task_mean_accuracy(last))


@settings(deadline=None)
@given(triangles())
def test_an_unchanged_last_row_forgets_nothing(rows):
    final = rows[-1]
    frozen = [list(final[: t + 1]) for t in range(len(rows))]
    assert metrics.forgetting(frozen) == metrics.backward_transfer(frozen) == 0.0


row_tables = st.integers(1, 4).flatmap(
    lambda tasks: st.lists(st.tuples(st.integers(0, tasks - 1), st.integers(0, 5)), min_size=1, unique=True)
)


@settings(deadline=None)
@given(row_tables, st.integers(0, 2**31 - 1), st.integers(1, 30))
def test_hits_of_random_outputs(table, seed, n):
    generator = torch.Generator().manual_seed(seed)
    row_task = torch.tensor([task for task, _ in table])
    # Class indices without gaps, as a learner has them.
    names = {c: i for i, c in enumerate(sorted({c for _, c in table}))}
    row_class = torch.tensor([names[c] for _, c in table])
    # In fp64: the logs of fp32 add up to one only to fp32 precision, which the bound below is finer than.
    scores = torch.randn(n, len(table), generator=generator).double().log_softmax(1)
    outputs = SimpleNamespace(heads=scores, calibrated=None, row_task=row_task, row_class=row_class)
    task = int(row_task[torch.randint(len(table), (1,), generator=generator)])
    labels = row_class[row_task == task]
    labels = labels[torch.randint(len(labels), (n,), generator=generator)]

    counted = metrics.count_hits(outputs, "heads", labels, task)
    assert counted.images == n
    assert counted.row <= min(counted.task, counted.given_task)
    if len(names) == len(table):  # every class has one row: a right class is a right row
        assert counted.label == counted.row
    torch.testing.assert_close(
        class_probabilities(outputs, "heads").sum(1), torch.ones(n, dtype=torch.float64)
    )

    order = torch.randperm(n, generator=generator)
    shuffled = SimpleNamespace(heads=scores[order], calibrated=None, row_task=row_task, row_class=row_class)
    assert metrics.count_hits(shuffled, "heads", labels[order], task) == counted

    confidence, found = best(class_probabilities(outputs, "heads"))
    error = calibration_error(confidence, found == labels)
    assert error is not None and 0.0 <= error <= 1.0
    if len(names) > 1:
        reference = multiclass_calibration_error(
            class_probabilities(outputs, "heads").clamp_max(1.0 - 1e-12),
            labels,
            len(names),
            n_bins=15,
        )
        assert error == pytest.approx(float(reference), abs=1e-6)

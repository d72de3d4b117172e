"""Rows of few images beside rows of many: what their scores lack, and what is put right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics
from duallora.classifiers.few_images import shares, spread_of_means

CPU, DIM = torch.device("cpu"), 40


def drawn(counts: list[int], seed: int, spread: float = 0.45) -> tuple[Tensor, Tensor, Tensor]:
    """Centres (k, d), images (n, d) and labels (n,) of classes with so many images each."""
    generator = torch.Generator().manual_seed(seed)
    centres = spread * torch.randn(len(counts), DIM, generator=generator)
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])
    return centres, centres[labels] + torch.randn(len(labels), DIM, generator=generator), labels


def memory(features: Tensor, labels: Tensor, sizes: list[int], *, plain: bool = False) -> ClassStatistics:
    """Rows of tasks with so many classes each."""
    rows, first = ClassStatistics(features.shape[1], CPU), 0
    for task, size in enumerate(sizes):
        mine = (labels >= first) & (labels < first + size)
        rows.replace(task, ClassMoments.of(features[mine], labels[mine] - first, size))
        if plain:
            rows.load_state_dict({name: x for name, x in rows.state_dict().items() if name != "shrinks"})
        rows.fit_temperature(task, features[mine], labels[mine] - first)
        first += size
    return rows


def recall(rows: ClassStatistics, centres: Tensor, few: int) -> tuple[float, float]:
    """Of new images of the first classes, and of those from ``few`` on."""
    generator = torch.Generator().manual_seed(99)
    truth = torch.arange(len(centres)).repeat_interleave(200)
    images = centres[truth] + torch.randn(len(truth), DIM, generator=generator)
    right = (rows.scores(images).argmax(1) == truth).double()
    return float(right[truth < few].mean()), float(right[truth >= few].mean())


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("spread", [0.45, 0.8])
def test_classes_of_few_images_are_found_and_the_others_stay(n: int, spread: float) -> None:
    gained, lost = [], []
    for seed in range(4):
        centres, features, labels = drawn([90] * 6 + [n] * 6, seed, spread)
        before = recall(memory(features, labels, [6, 6], plain=True), centres, 6)
        after = recall(memory(features, labels, [6, 6]), centres, 6)
        gained.append(after[1] - before[1])
        lost.append(before[0] - after[0])
    assert sum(gained) / 4 > 0.03, gained
    assert sum(lost) < sum(gained) / 2, (lost, gained)


def test_the_heads_that_start_from_rows_and_the_tasks_gain_alike() -> None:
    centres, features, labels = drawn([90] * 6 + [2] * 6, 1)
    truth = torch.arange(12).repeat_interleave(100)
    images = centres[truth] + torch.randn(len(truth), DIM, generator=torch.Generator().manual_seed(7))
    few, found = truth >= 6, {}
    for plain in (True, False):
        rows = memory(features, labels, [6, 6], plain=plain)
        weight, bias = (torch.cat(part) for part in zip(rows.linear(0), rows.linear(1), strict=True))
        logits = images @ weight.T + bias
        offset = logits - rows.kappa * rows.scores(images)
        assert_close(offset, offset.mean(1, keepdim=True).expand_as(offset), rtol=0, atol=1e-3)
        by_task = rows.task_weights(images).argmax(1)
        found[plain] = (
            float((logits.argmax(1) == truth)[few].double().mean()),
            float(by_task[few].double().mean()),
        )
    assert found[False][0] > found[True][0] + 0.1
    assert found[False][1] > found[True][1] + 0.1


@pytest.mark.parametrize("n", [1, 3, 20])
def test_classes_of_as_many_images_score_bit_for_bit_as_before(n: int) -> None:
    _, features, labels = drawn([n] * 7, 3)
    now, before = memory(features, labels, [4, 3]), memory(features, labels, [4, 3], plain=True)
    images = torch.randn(30, DIM)
    assert torch.equal(now.scores(images), before.scores(images))
    for task in (0, 1):
        before.kappa = now.kappa
        for a, b in zip(now.linear(task), before.linear(task), strict=True):
            assert torch.equal(a, b)


def test_an_image_left_out_leaves_a_row_of_one_image_less() -> None:
    """As rows that are made without the image, with the same covariance and the same spread of means."""
    _, features, labels = drawn([30] * 3 + [3] * 3, 5)
    rows = memory(features, labels, [6])
    for i in (0, 35, 95):
        own = rows.own(0, labels[i : i + 1], features[i : i + 1])
        found = rows.scores(features[i : i + 1], own)[0]
        row = int(labels[i])
        others = (labels == row) & (torch.arange(len(labels)) != i)
        nu = rows.whitened(features[others].mean(0, keepdim=True))[0]
        nu = nu * rows.shares(others.sum()[None].float())
        z = rows.whitened(features[i : i + 1])[0]
        assert_close(found[row], z @ nu - nu @ nu / 2, rtol=1e-4, atol=1e-3)
        rest = torch.arange(6) != row
        assert torch.equal(found[rest], rows.scores(features[i : i + 1])[0][rest])


def test_distances_are_to_the_means_as_they_were_found() -> None:
    _, features, labels = drawn([30] * 3 + [2] * 3, 5)
    now, before = memory(features, labels, [3, 3]), memory(features, labels, [3, 3], plain=True)
    images = torch.randn(9, DIM)
    for a, b in zip(now.distance(images), before.distance(images), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(now.posterior_and_familiarity(images)[1], before.posterior_and_familiarity(images)[1])


def test_a_model_of_before_answers_as_it_did_until_it_learns_again() -> None:
    _, features, labels = drawn([30] * 3 + [2] * 3 + [2] * 3, 2)
    old = memory(features[:96], labels[:96], [3, 3], plain=True)
    images = torch.randn(9, DIM)
    stored = old.state_dict()
    assert "shrinks" not in stored
    loaded = ClassStatistics(DIM, CPU)
    loaded.load_state_dict(stored)
    assert torch.equal(loaded.scores(images), old.scores(images))
    assert torch.equal(old.shares(torch.tensor([1.0, 30.0])), torch.ones(2))
    loaded.replace(2, ClassMoments.of(features[96:], labels[96:] - 6, 3))
    assert float(loaded.shares(torch.tensor([2.0]))) < 0.7
    assert bool(loaded.state_dict()["shrinks"])
    again = ClassStatistics(DIM, CPU)
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again.scores(images), loaded.scores(images))


def test_the_spread_of_means_is_found_without_the_spread_that_sampling_adds() -> None:
    found = []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        count = torch.tensor([100.0] * 6 + [1.0] * 6 + [7.0] * 3, dtype=torch.float64)
        true = 0.6 * torch.randn(15, DIM, generator=generator, dtype=torch.float64)
        noise = torch.randn(15, DIM, generator=generator, dtype=torch.float64) / count[:, None].sqrt()
        found.append(spread_of_means(true + noise, count, trace=float(DIM)))
    assert sum(found) / 30 == pytest.approx(0.36 * DIM, rel=0.08)
    same = torch.ones(4, DIM, dtype=torch.float64)
    assert spread_of_means(same, torch.tensor([9.0, 1.0, 1.0, 4.0]), 5.0) == 0.0


@pytest.mark.parametrize(
    ("between", "trace", "expected"),
    [
        (0.0, 5.0, [0.1, 0.5, 1.0, 1.0]),  # means that do not differ: only the numbers of images count
        (1e9, 1.0, [1.0, 1.0, 1.0, 1.0]),
        (3.0, 0.0, [1.0, 1.0, 1.0, 1.0]),  # no sampling error at all
        (0.5, 5.0, [2 / 11, 2 / 3, 1.0, 1.0]),
    ],
)
def test_shares_by_hand(between: float, trace: float, expected: list[float]) -> None:
    found = shares(torch.tensor([1.0, 5.0, 10.0, 12.0]), 10.0, between, trace)
    assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)

"""Sums of probabilities over groups, as logs."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_statistics import near

from duallora.classifiers.log_probabilities import sum_rows


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(0, 99))
def test_sums_over_groups_equal_plain_sums(group: list[int], seed: int) -> None:
    log_rows = (3 * torch.randn(4, len(group), generator=torch.Generator().manual_seed(seed))).log_softmax(1)
    found = sum_rows(log_rows, torch.tensor(group), 4)
    for g in range(4):
        members = [i for i, other in enumerate(group) if other == g]
        expected = log_rows.double()[:, members].exp().sum(1).log()
        near(found[:, g], expected)


def test_a_group_far_below_the_best_does_not_underflow() -> None:
    log_rows = torch.tensor([[0.0, -300.0, -301.0, -math.inf]])
    found = sum_rows(log_rows, torch.tensor([0, 1, 1, 2]), 4)
    near(found[0, 1], torch.tensor(-300 + math.log(1 + math.exp(-1))))
    assert found[0, 2] == found[0, 3] == -math.inf

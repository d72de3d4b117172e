"""The ridge map against its formula, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from duallora.methods.drift import ridge_map

DIM = 6


def drawn(n: int, seed: int = 0, dim: int = DIM) -> Tensor:
    return 2 * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + 1


@pytest.mark.parametrize("n", [1, 4, 6, 50])
def test_the_map_equals_its_formula(n: int) -> None:
    x, y = drawn(n), drawn(n, 1)
    found = ridge_map(x, y)
    x, y = x.double(), y.double()
    ridge = 0.01 * sum(float(value) ** 2 for value in x.flatten()) / DIM
    eye = torch.eye(DIM, dtype=torch.float64)
    assert found.dtype == torch.float64
    assert_close(found, eye + torch.linalg.inv(x.T @ x + ridge * eye) @ x.T @ (y - x))


def test_a_linear_drift_is_found_where_images_show_it() -> None:
    drift = torch.eye(DIM, dtype=torch.float64) + 0.3 * drawn(DIM, 2).double()
    x = drawn(400).double()
    assert_close(x @ ridge_map(x, x @ drift), x @ drift, rtol=0.1, atol=0.2)


def test_features_that_do_not_move_stay_exactly_as_they_are() -> None:
    x = drawn(30, dim=9)
    y = x.clone()
    y[:, [1, 4, 8]] += drawn(30, 1, dim=3)
    found, still = ridge_map(x, y), torch.tensor([0, 2, 3, 5, 6, 7])
    assert torch.equal(found[:, still], torch.eye(9, dtype=torch.float64)[:, still])
    means = drawn(7, 3, dim=9).double()
    moved = means @ found
    assert torch.equal(moved[:, still], means[:, still])
    assert float((moved - means)[:, [1, 4, 8]].abs().min()) > 1e-3


@pytest.mark.parametrize("n", [1, 3, 40])
def test_without_any_drift_the_map_is_the_identity(n: int) -> None:
    x = drawn(n)
    assert torch.equal(ridge_map(x, x.clone()), torch.eye(DIM, dtype=torch.float64))


def test_what_no_image_shows_does_not_move() -> None:
    """Directions that the features have none of: the map is the identity there."""
    x = drawn(2)
    found = ridge_map(x, x + drawn(2, 1))
    outside = torch.linalg.svd(x.double())[2][2:]
    assert_close(outside @ found, outside)


def test_features_of_no_columns_have_a_map() -> None:
    assert ridge_map(torch.zeros(5, 0), torch.zeros(5, 0)).shape == (0, 0)

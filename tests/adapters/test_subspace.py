"""Bases: orthonormal, disjoint, as few as the energy criterion allows, and the same on every machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duallora.adapters.subspace import (
    DESIGNED_SCALE,
    Subspace,
    energy_share,
    orthonormal,
    own_directions,
    top_eigenvectors,
)

DIM = 24


def spectrum_moment(seed: int, decay: float = 0.8, rank: int = DIM, dim: int = DIM) -> Tensor:
    """A moment with a random eigenbasis and eigenvalues ``decay ** i`` (0 beyond ``rank``)."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    values = decay ** np.arange(dim) * (np.arange(dim) < rank)
    return torch.from_numpy(basis * values @ basis.T)


def identity_error(columns: Tensor) -> float:
    if not columns.shape[1]:
        return 0.0
    return float((columns.T @ columns - torch.eye(columns.shape[1], dtype=columns.dtype)).abs().max())


def share_of(basis: np.ndarray, moment: np.ndarray) -> float:
    return float(np.trace(basis.T @ moment @ basis) / np.trace(moment))


def fewest_directions(phi: np.ndarray, moment: np.ndarray, share: float) -> int:
    """Smallest m so that Phi and the m strongest directions outside it hold the share: tried one by one."""
    outside = np.eye(len(moment)) - phi @ phi.T
    values, vectors = np.linalg.eigh(outside @ moment @ outside)
    vectors = vectors[:, np.argsort(-values)]
    for count in range(len(moment) - phi.shape[1] + 1):
        if share_of(np.hstack([phi, vectors[:, :count]]), moment) >= share - 1e-12:
            return count
    raise AssertionError("not even all directions hold the share")


@pytest.mark.parametrize(
    ("threshold", "task", "expected"),
    [
        (0.95, 0, 0.95),
        (0.95, 1, 0.955),
        (0.95, 2, 0.9595),
        (0.95, 10, 1 - 0.05 * 0.9**10),
        (0.95, 22, 0.995),
        (0.999, 9, 0.999),
        (0.5, 0, 0.5),
        (0.5, 1, 0.55),
        (1.0, 3, 1.0),
    ],
)
def test_protected_share_grows_with_the_tasks_up_to_its_ceiling(
    threshold: float, task: int, expected: float
) -> None:
    assert energy_share(threshold, task) == pytest.approx(expected, abs=1e-12)


def test_growth_takes_the_fewest_directions_that_hold_the_share_of_each_task() -> None:
    subspace = Subspace(DIM)
    for task in range(4):
        moment = spectrum_moment(task, decay=0.6)
        before, share = subspace.phi.numpy().copy(), max(0.9, min(0.995, 1 - 0.1 * 0.9**task))
        expected = fewest_directions(before, moment.numpy(), share)
        subspace.grow(moment, 0.9)
        assert subspace.sizes[task] == expected
        assert share_of(subspace.phi.numpy(), moment.numpy()) >= share - 1e-12
        if expected:
            assert share_of(subspace.phi.numpy()[:, :-1], moment.numpy()) < share
    assert sum(size > 0 for size in subspace.sizes) >= 3, (
        "the tasks must differ enough for the rule to matter"
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    threshold=st.floats(0.3, 1.0),
    decays=st.lists(st.floats(0.3, 0.95), min_size=1, max_size=4),
)
def test_bases_are_orthonormal_and_disjoint_whatever_the_tasks(
    seed: int, threshold: float, decays: list[float]
) -> None:
    subspace = Subspace(12)
    for task, decay in enumerate(decays):
        moment = spectrum_moment(seed + task, decay, dim=12)
        free = subspace.design(moment)
        assert identity_error(free) < 1e-10
        if free.shape[1] and subspace.phi.shape[1]:
            assert float((subspace.phi.T @ free).abs().max()) < 1e-7
        subspace.grow(moment, threshold)
    assert identity_error(subspace.phi) < 1e-12
    assert sum(subspace.sizes) == subspace.phi.shape[1] <= 12
    blocks = [subspace.block(task) for task in range(len(decays))]
    assert torch.equal(torch.cat(blocks, 1), subspace.phi)


def test_earlier_blocks_keep_their_span_and_direction_when_the_subspace_grows() -> None:
    subspace, seen = Subspace(DIM), []
    for task in range(3):
        new = subspace.new_block(spectrum_moment(task, 0.5), 0.9)
        subspace.grow(spectrum_moment(task, 0.5), 0.9)
        assert torch.allclose(subspace.block(task), new, atol=1e-10)
        seen.append(subspace.block(task).clone())
    for task, block in enumerate(seen):
        assert torch.allclose(subspace.block(task), block, atol=1e-10)


def test_a_task_inside_the_subspace_adds_nothing() -> None:
    subspace = Subspace(DIM)
    subspace.grow(spectrum_moment(0, rank=6), 1.0)
    subspace.grow(spectrum_moment(0, rank=6), 1.0)
    assert subspace.sizes.tolist() == [6, 0]
    assert subspace.block(1).shape == (DIM, 0)
    assert subspace.free == DIM - 6


def test_directions_count_by_the_largest_eigenvalue_of_the_whole_moment() -> None:
    """Outside Phi the largest eigenvalue may itself be round-off: it must not set its own yardstick."""
    values = torch.tensor([1.0, 0.5, 1e-3, 5e-7, 4e-7, 1e-8], dtype=torch.float64)
    subspace, moment = Subspace(6), values.diag()
    assert subspace.design(moment).shape[1] == 3
    subspace.phi, subspace.sizes = torch.eye(6, dtype=torch.float64)[:, :3], torch.tensor([3])
    assert subspace.design(moment).shape == (6, 0)
    assert subspace.new_block(moment, 1.0).shape == (6, 0)
    subspace.phi, subspace.sizes = torch.eye(6, dtype=torch.float64)[:, :2], torch.tensor([2])
    assert torch.equal(subspace.design(moment).abs(), torch.eye(6, dtype=torch.float64)[:, 2:3])


def test_rank_deficient_moments_give_as_many_directions_as_their_rank() -> None:
    rows = torch.randn(5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moment = rows.T @ rows / 5
    subspace = Subspace(DIM)
    assert subspace.design(moment).shape[1] == 5
    subspace.grow(moment, 1.0)
    assert subspace.sizes.tolist() == [5]
    assert float((rows - rows @ subspace.phi @ subspace.phi.T).abs().max()) < 1e-10


def test_an_exhausted_complement_has_no_direction() -> None:
    subspace = Subspace(DIM)
    subspace.grow(spectrum_moment(0), 1.0)
    assert subspace.free == 0
    assert subspace.design(spectrum_moment(1)).shape == (DIM, 0)
    assert subspace.protected(spectrum_moment(1)).shape == (DIM, DIM)
    subspace.grow(spectrum_moment(1), 1.0)
    assert subspace.sizes.tolist() == [DIM, 0]


def test_directions_come_by_falling_energy_and_match_numpy() -> None:
    subspace, moment = Subspace(DIM), spectrum_moment(5, 0.7)
    subspace.grow(spectrum_moment(4, 0.5), 0.9)
    projector = np.eye(DIM) - subspace.phi.numpy() @ subspace.phi.numpy().T
    values, vectors = np.linalg.eigh(projector @ moment.numpy() @ projector)
    design = subspace.design(moment).numpy()
    for i in range(6):
        assert abs(design[:, i] @ vectors[:, -1 - i]) == pytest.approx(1, abs=1e-8)
        assert design[:, i] @ moment.numpy() @ design[:, i] == pytest.approx(values[-1 - i], rel=1e-8)


def test_protected_directions_lie_inside_phi_by_falling_energy() -> None:
    subspace, moment = Subspace(DIM), spectrum_moment(7, 0.7)
    assert subspace.protected(moment).shape == (DIM, 0)
    subspace.grow(spectrum_moment(6, 0.5), 0.9)
    basis = subspace.protected(moment)
    assert identity_error(basis) < 1e-10
    assert basis.shape[1] == subspace.phi.shape[1]
    assert float((basis - subspace.phi @ (subspace.phi.T @ basis)).abs().max()) < 1e-10
    energies = (basis.T @ moment @ basis).diagonal()
    within = np.linalg.eigvalsh(subspace.phi.numpy().T @ moment.numpy() @ subspace.phi.numpy())[::-1]
    assert np.allclose(energies.numpy(), within, atol=1e-12)


def test_own_directions_avoid_the_orthogonal_adapter_alone() -> None:
    moment = spectrum_moment(8, 0.7)
    taken = top_eigenvectors(moment)[0][:, 2:5] * DESIGNED_SCALE
    basis = own_directions(moment, taken)
    assert basis.shape == (DIM, DIM - 3)
    assert identity_error(basis) < 1e-10
    assert float((taken.T @ basis).abs().max()) < 1e-10
    strongest = top_eigenvectors(moment)[0][:, :2]
    assert torch.allclose(basis[:, :2], strongest, atol=1e-8)
    assert torch.allclose(own_directions(moment, taken[:, :0])[:, :2], strongest, atol=1e-8)


def test_signs_are_fixed_by_the_largest_entry() -> None:
    vectors, values = top_eigenvectors(spectrum_moment(9))
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())
    assert bool((values.diff() <= 0).all())
    subspace = Subspace(DIM)
    subspace.grow(spectrum_moment(9), 0.9)
    assert torch.allclose(subspace.phi, vectors[:, : subspace.sizes[0]], atol=1e-8)


def test_orthonormal_keeps_the_directions_of_its_columns() -> None:
    columns = torch.linalg.qr(torch.randn(DIM, 4, dtype=torch.float64))[0]
    assert torch.allclose(orthonormal(columns), columns, atol=1e-12)
    assert torch.allclose(orthonormal(-3 * columns), -columns, atol=1e-12)
    assert orthonormal(columns[:, :0]).shape == (DIM, 0)


def test_the_designed_scale_is_the_row_norm_of_an_ordinary_lora() -> None:
    """LoRA draws A uniformly in +-1/sqrt(d) (fan-in d): a column then has an expected squared norm of 1/3."""
    assert pytest.approx(1 / 3) == DESIGNED_SCALE**2

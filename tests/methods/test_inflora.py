"""InfLoRA: where it may write, what it protects and the memory behind both, against plain linear algebra."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tasks import (
    assert_carried,
    assert_same_outputs,
    assert_same_state,
    new_learner,
    reloaded,
    small_config,
    three_tasks,
)
from tiny import FAMILIES, WIDTH
from torch import Tensor

from duallora import DualLoRAError
from duallora.adapters.dual_gpm import DualGPM
from duallora.adapters.dual_lora import DualAdapter
from duallora.methods.inflora import InfLoRA

DIM = 24
# With the first eps the memory stays a basis of what is used, with the second it turns over after a task.
REMOVE, RETAIN = 0.5, 0.998


def random_moment(seed: int, rank: int = DIM, decay: float = 0.8) -> Tensor:
    """A second moment with eigenvalues 1, decay, decay^2, ... in random directions."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64))[0]
    values = decay ** torch.arange(DIM, dtype=torch.float64)
    values[rank:] = 0
    return (vectors * values) @ vectors.T


def reference_gpm(moments: list[Tensor], share: float) -> list[Tensor]:
    """Bases of used directions after each moment: the "remove" update alone, one column at a time."""
    basis, found = torch.zeros(DIM, 0, dtype=torch.float64), []
    for moment in moments:
        total = moment.square().sum()
        columns = torch.linalg.svd(moment - basis @ basis.T @ moment)[0]
        for column in columns.T:
            captured = total - (moment - basis @ basis.T @ moment).square().sum()
            if captured >= share * total:
                break
            basis = torch.linalg.qr(torch.cat([basis, column[:, None]], 1))[0]
        found.append(basis)
    return found


def test_the_memory_is_the_same_projector_before_and_after_the_flip() -> None:
    moments = [random_moment(seed) for seed in range(5)]
    memory, modes = DualGPM(DIM), []
    for moment, used in zip(moments, reference_gpm(moments, 0.97), strict=True):
        memory.grow(moment, 0.97)
        expected = torch.eye(DIM, dtype=torch.float64) - used @ used.T
        torch.testing.assert_close(memory.complement, expected, rtol=0, atol=1e-8)
        assert memory.free == DIM - used.shape[1]
        columns = memory.basis.shape[1]
        gram = memory.basis.T @ memory.basis
        torch.testing.assert_close(gram, torch.eye(columns, dtype=torch.float64), rtol=0, atol=1e-10)
        assert columns == (memory.free if memory.retain else used.shape[1]) and 2 * columns <= DIM
        modes.append(bool(memory.retain))
    assert modes[0] is False and modes[-2:] == [True, True], "both kinds of update must have been made"


def test_the_flip_comes_beyond_half_the_width_and_not_before() -> None:
    for rank, retain in ((DIM // 2, False), (DIM // 2 + 1, True)):
        memory = DualGPM(DIM)
        memory.grow(random_moment(0, rank, decay=1.0), 1.0)
        assert memory.retain == retain
        assert memory.basis.shape == (DIM, DIM // 2 if not retain else DIM - rank)


def test_energy_is_of_squared_eigenvalues() -> None:
    """Eigenvalues 10, 5, 1, 1, ...: squares 100, 25 and 22 ones, which is 68 %, 85 %, then 1 % each."""
    values = torch.ones(DIM, dtype=torch.float64)
    values[0], values[1] = 10.0, 5.0
    for share, columns in ((100 / 147 - 1e-6, 1), (100 / 147 + 1e-6, 2), (0.85, 2), (125.5 / 147, 3)):
        memory = DualGPM(DIM)
        memory.grow(values.diag(), share)
        assert memory.basis.shape[1] == columns, share
        assert set(memory.basis.abs().argmax(0).tolist()) >= set(range(min(columns, 2)))
    # What is known already counts: the same moment adds nothing, a larger share the next direction.
    before = memory.basis.clone()
    memory.grow(values.diag(), 125.5 / 147)
    assert torch.equal(memory.basis, before)
    memory.grow(values.diag(), 126.5 / 147)
    assert memory.basis.shape[1] == 4


@pytest.mark.parametrize("share", [0.5, 0.999])
def test_a_design_is_the_top_of_the_projected_moment(share: float) -> None:
    memory = DualGPM(DIM)
    memory.grow(random_moment(0), share)
    assert memory.retain == (share > 0.9) and memory.free >= 5
    used = torch.eye(DIM, dtype=torch.float64) - memory.complement
    moment = random_moment(7)
    d = memory.design(moment, 5)
    torch.testing.assert_close(used @ d, torch.zeros_like(d), rtol=0, atol=1e-10)
    torch.testing.assert_close(3 * d.T @ d, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-10)
    projected = memory.complement @ moment @ memory.complement
    best = torch.linalg.eigvalsh(projected).flip(0)[:5]
    torch.testing.assert_close(3 * (d.T @ projected @ d), best.diag(), rtol=0, atol=1e-10)


def test_directions_without_energy_are_no_part_of_a_design() -> None:
    few = random_moment(0, rank=3)
    memory = DualGPM(DIM)
    assert memory.design(few, 8).shape[1] == 3
    memory.grow(few, 1.0)
    assert memory.design(few, 8).shape[1] == 0
    everything = DualGPM(DIM)
    everything.grow(random_moment(1, decay=1.0), 1.0)
    assert everything.retain and everything.free == 0
    everything.grow(random_moment(2), 1.0)
    assert everything.design(random_moment(3), 8).shape == (DIM, 0)


def test_round_off_is_never_protected() -> None:
    for seed in range(20):
        memory = DualGPM(DIM)
        memory.grow(random_moment(seed, rank=5), 1.0)
        assert memory.basis.shape[1] == 5, seed


class Watched:
    """A learner of three tasks, with every D_t as it was opened and the complement at that time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
        self.opened: list[tuple[Tensor, Tensor]] = []
        self.changes: list[Tensor] = []
        begin, merge = DualAdapter.begin, DualAdapter.merge
        self.learner = new_learner(small_config("inflora", **changes))
        self.learner.method.context = replace(
            self.learner.method.context, autocast=nullcontext
        )  # bf16, where the machine has it, would blur the moments
        method = self.learner.method
        assert isinstance(method, InfLoRA)
        self.method, (self.layer,) = method, method.gpm

        def watched_begin(adapter: DualAdapter, task: int, a: Tensor, psi: Tensor) -> None:
            self.opened.append((a.clone(), method.gpm[self.layer].complement.float()))
            begin(adapter, task, a, psi)

        def watched_merge(adapter: DualAdapter) -> None:
            assert adapter.a is not None and adapter.b is not None
            assert torch.equal(adapter.a, self.opened[-1][0]), "the down-projection is not trained"
            assert not adapter.a.requires_grad and adapter.b.requires_grad
            self.changes.append((adapter.a @ adapter.b).detach())
            merge(adapter)

        monkeypatch.setattr(DualAdapter, "begin", watched_begin)
        monkeypatch.setattr(DualAdapter, "merge", watched_merge)
        self.modes = []
        for task in three_tasks():
            self.learner.learn(task)
            self.modes.append(method.gpm[self.layer].retain)


@pytest.mark.parametrize("lamb", [REMOVE, RETAIN])
def test_a_task_writes_into_the_complement_alone(lamb: float, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, lamb=lamb)
    assert watched.modes == [lamb == RETAIN] * 3
    assert len(watched.opened) == 3 and watched.opened[0][0].shape == (WIDTH, 4)
    total = torch.zeros_like(watched.changes[0])
    for (d, complement), change in zip(watched.opened, watched.changes, strict=True):
        used = torch.eye(WIDTH) - complement
        torch.testing.assert_close(used @ d, torch.zeros_like(d), rtol=0, atol=1e-5)
        assert float(change.norm()) > 1e-3
        torch.testing.assert_close(used @ change, torch.zeros_like(change), rtol=0, atol=1e-5)
        total += change
    assert float((torch.eye(WIDTH) - watched.opened[1][1]).norm()) >= 1, "nothing was protected"
    merged = watched.method.adapted[watched.layer]
    expected = merged.base.weight.clone()
    expected[WIDTH:] += total.T  # k and v, not q
    torch.testing.assert_close(merged.weight, expected)


def test_the_first_design_is_made_from_all_tokens_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    d, _ = watched.opened[0]
    fresh = new_learner(small_config("inflora"))
    rows: list[Tensor] = []
    qkv = fresh.backbone.attention(watched.layer).qkv
    qkv.register_forward_hook(lambda _, args, __: rows.append(args[0].reshape(-1, WIDTH)))
    with torch.no_grad():
        fresh.backbone(torch.stack([fresh.preprocess(image) for image in three_tasks()[0].images]))
    x = rows[0].double()
    assert len(x) == len(three_tasks()[0]) * 17
    expected = torch.linalg.svd(x, full_matrices=False)[2][:4].T  # right singular vectors of the tokens
    torch.testing.assert_close(3 * d.double() @ d.double().T, expected @ expected.T, rtol=0, atol=1e-4)


def test_the_share_grows_towards_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    monkeypatch.setattr(DualGPM, "grow", lambda self, moment, share: shares.append(share))
    learner = new_learner(small_config("inflora", lamb=0.9))
    for task in three_tasks():
        learner.learn(task)
    assert shares == pytest.approx([0.9, 1 - 0.1 * 0.9, 1 - 0.1 * 0.81])


@pytest.mark.parametrize("after", [1, 2])
def test_a_flipped_memory_survives_a_save(after: int, tmp_path: Path) -> None:
    def learned(tasks: int) -> Any:
        learner = new_learner(small_config("inflora", lamb=RETAIN), depth=3)
        for task in three_tasks()[:tasks]:
            learner.learn(task)
        return learner

    whole, half = learned(3), learned(after)
    loaded = reloaded(half, tmp_path, depth=3)
    assert [memory.retain for memory in half.method.gpm.values()] == [True, after == 2]
    for layer, memory in half.method.gpm.items():
        assert memory.basis.shape[1] > 0 and loaded.method.gpm[layer].retain == memory.retain
        assert torch.equal(loaded.method.gpm[layer].basis, memory.basis)
    for task in three_tasks()[after:]:
        loaded.learn(task)
    assert_same_state(loaded, whole)
    assert_same_outputs(loaded.outputs(three_tasks()[0]), whole.outputs(three_tasks()[0]))


def test_an_exhausted_complement_is_said_and_lived_with(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = new_learner(small_config("inflora"))
    learner.learn(three_tasks()[0])
    for memory in learner.method.gpm.values():
        memory.basis, memory.retain = torch.zeros(WIDTH, 0, dtype=torch.float64), torch.tensor(1)
    before = learner.method.adapted[1].weight.clone()
    with pytest.warns(UserWarning, match="no direction is left"):
        record = learner.learn(three_tasks()[1])
    assert record.orthogonal_norm == 0.0 and torch.equal(learner.method.adapted[1].weight, before)
    assert learner.method.gpm[1].basis.shape == (WIDTH, 0)


@pytest.mark.parametrize("lamb", [0.0, 1.5])
def test_a_share_has_to_be_one(lamb: float) -> None:
    with pytest.raises(DualLoRAError, match="lamb must lie in"):
        small_config("inflora", lamb=lamb)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_carry_it(family: str) -> None:
    assert_carried("inflora", family)

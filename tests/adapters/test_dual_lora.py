"""The adapted projection against its formula, written out image by image."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from duallora.adapters import dual_lora as lora
from duallora.adapters.dual_lora import AdaptedQKV, DualAdapter

DIM, TOKENS = 32, 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, TOKENS, DIM, generator=generator(seed))


def plain_qkv(seed: int = 0) -> nn.Linear:
    base = nn.Linear(DIM, 3 * DIM)
    with torch.no_grad():
        base.weight.normal_(std=0.3, generator=generator(seed))
        base.bias.normal_(generator=generator(seed + 1))
    return base.requires_grad_(False)


def basis(rank: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(DIM, DIM, generator=generator(seed)))[0][:, :rank].contiguous()


def teach(adapter: DualAdapter, task: int, rank: int, residual_rank: int, merge: bool = True) -> None:
    """Opens a task with random bases and fills B and C as training would."""
    adapter.begin(task, basis(rank, 10 * task + 1), basis(residual_rank, 10 * task + 2))
    with torch.no_grad():
        for i, parameter in enumerate([adapter.b, adapter.c]):
            if parameter is not None:
                parameter.normal_(std=0.2, generator=generator(10 * task + 3 + i))
    if merge:
        adapter.merge()


def naive_output(module: AdaptedQKV, x: Tensor, weights: Tensor | None, history: Sequence[dict]) -> Tensor:
    """``x (W_0 + sum A_j B_j) + sum_j w_j (x Psi_j) C_j + bias`` in fp64, one image at a time."""
    result = []
    for i, image in enumerate(x.double()):
        y = image @ module.base.weight.double().T + module.base.bias.double()
        for entry in history:
            extra = image @ (entry["a"].double() @ entry["b"].double())
            if weights is not None and entry["psi"] is not None:
                extra = (
                    extra
                    + float(weights[i, entry["task"]]) * (image @ entry["psi"].double()) @ entry["c"].double()
                )
            for j, projection in enumerate(entry["group"]):
                start = "qkv".index(projection) * DIM
                y[:, start : start + DIM] += extra[:, j * DIM : (j + 1) * DIM]
        result.append(y)
    return torch.stack(result)


def snapshot(adapter: DualAdapter, group: str, task: int) -> dict:
    """Copies of what a task holds just before it is merged."""
    a = torch.zeros(DIM, 1) if adapter.a is None else adapter.a.detach().clone()
    b = torch.zeros(1, adapter.out) if adapter.b is None else adapter.b.detach().clone()
    psi = None if adapter.psi is None else adapter.psi.clone()
    c = None if adapter.c is None else adapter.c.detach().clone()
    return {"group": group, "task": task, "a": a, "b": b, "psi": psi, "c": c}


def taught(
    groups: Sequence[str], ranks: Sequence[tuple[int, int]], selected: int = 4, open_last: bool = True
) -> tuple[AdaptedQKV, list[dict]]:
    module, history = AdaptedQKV(plain_qkv(), groups, selected), []
    for task, (rank, residual_rank) in enumerate(ranks):
        for name, adapter in module.groups.items():
            teach(adapter, task, rank, residual_rank, merge=False)
            history.append(snapshot(adapter, name, task))
        if task < len(ranks) - 1 or not open_last:
            module.merge()
    return module, history


def random_weights(batch: int, tasks: int, seed: int = 7) -> Tensor:
    return torch.rand(batch, tasks, generator=generator(seed))


@pytest.mark.parametrize("groups", [("kv",), ("qv",), ("qkv",), ("q", "k", "v"), ("k", "v")])
@pytest.mark.parametrize("open_last", [True, False])
def test_the_projection_equals_its_formula(groups: tuple[str, ...], open_last: bool) -> None:
    module, history = taught(groups, [(4, 3), (5, 2), (3, 3)], open_last=open_last)
    x, weights = tokens(), random_weights(3, 3)
    module.gate = lambda _: weights
    expected = naive_output(module, x, weights, history)
    assert torch.allclose(module(x).double(), expected, atol=2e-5)
    without = naive_output(module, x, None, history)
    assert float((expected - without).abs().max()) > 0.1, "the residual must matter"
    module.gate = lambda _: None
    assert torch.allclose(module(x).double(), without, atol=2e-5)


@pytest.mark.parametrize("gate", [None, torch.ones(3, 1)])
def test_zero_adapters_give_the_frozen_projection_bit_for_bit(gate: Tensor | None) -> None:
    base, x = plain_qkv(), tokens()
    module = AdaptedQKV(base, ["kv"])
    module.gate = lambda _: gate
    assert torch.equal(module(x), base(x))
    module.groups["kv"].begin(0, basis(4, 0), basis(4, 1))
    assert torch.equal(module(x), base(x))
    module.merge()
    assert torch.equal(module(x), base(x))


def test_merged_equals_unmerged_and_the_frozen_weight_is_never_touched() -> None:
    module, _ = taught(["kv"], [(4, 3), (6, 3)])
    weight, x, gate = module.base.weight.clone(), tokens(), random_weights(3, 2)
    module.gate = lambda _: gate
    before = module(x)
    module.merge()
    after = module(x)
    assert torch.allclose(before, after, atol=1e-5)
    assert torch.equal(module.base.weight, weight)
    assert float((after - module.base(x)).abs().max()) > 0.1
    assert not list(module.groups["kv"].parameters()), "nothing is left to train after a merge"


def test_a_fixed_down_projection_gets_no_gradient_and_a_trained_one_does() -> None:
    for train_a in (False, True):
        module, _ = taught(["kv"], [(4, 3)], open_last=False)
        adapter = module.groups["kv"]
        adapter.begin(1, basis(4, 50), basis(3, 51), train_a)
        with torch.no_grad():
            adapter.b.normal_(generator=generator(1))
        module.gate = lambda x: torch.ones(len(x), 2)
        module(tokens()).square().sum().backward()
        assert adapter.b.grad is not None and float(adapter.b.grad.abs().max()) > 0
        assert adapter.c.grad is not None and float(adapter.c.grad.abs().max()) > 0
        assert (adapter.a.grad is not None) == train_a
        assert module.base.weight.grad is None
        assert adapter.residuals[0].c.grad is None and not adapter.residuals[0].c.requires_grad


def test_up_projections_start_at_zero_and_empty_bases_are_skipped() -> None:
    adapter = DualAdapter(DIM, 2 * DIM)
    adapter.begin(0, basis(4, 0), basis(3, 1))
    assert not bool(adapter.b.any()) and not bool(adapter.c.any())
    assert adapter.b.shape == (4, 2 * DIM) and adapter.c.shape == (3, 2 * DIM)
    adapter.merge()
    adapter.begin(1, torch.zeros(DIM, 0), torch.zeros(DIM, 0))
    assert adapter.a is adapter.b is adapter.psi is adapter.c is None
    adapter.merge()
    assert [part.task for part in adapter.residuals] == [0]


def test_a_task_without_a_basis_contributes_nothing() -> None:
    """One task has no residual, the last one no direction at all: weights go by task, not by position."""
    module, history = taught(["kv"], [(4, 3), (4, 0), (4, 2), (0, 0)])
    x, weights = tokens(), random_weights(3, 4)
    module.gate = lambda _: weights
    assert torch.allclose(module(x).double(), naive_output(module, x, weights, history), atol=2e-5)


def selected_weights(batch: int, tasks: int, selected: int) -> Tensor:
    """Random weights, each image with its own choice of non-zero tasks."""
    weights = random_weights(batch, tasks) + 0.1
    keep = torch.rand(batch, tasks, generator=generator(8)).topk(selected, 1).indices
    return weights * torch.zeros_like(weights).scatter(1, keep, 1.0)


@pytest.mark.parametrize("open_last", [True, False])
def test_gathered_beyond_a_hundred_directions_equals_stacked(
    monkeypatch: pytest.MonkeyPatch, open_last: bool
) -> None:
    ranks = [(1, 20), (1, 20), (1, 7), (1, 0), (1, 20), (1, 20), (1, 20), (1, 20)]
    module, history = taught(["kv"], ranks, selected=3, open_last=open_last)
    x, weights = tokens(5), selected_weights(5, len(ranks), 3)
    module.gate = lambda _: weights
    expected = naive_output(module, x, weights, history)
    calls = []
    real = lora._gathered
    monkeypatch.setattr(lora, "_gathered", lambda *args: calls.append(1) or real(*args))
    gathered = module(x)
    assert calls, "127 directions of 7 tasks must be gathered"
    monkeypatch.setattr(lora, "STACKED_LIMIT", 10_000)
    stacked = module(x)
    assert len(calls) == 1
    assert torch.allclose(gathered, stacked, atol=1e-5)
    assert torch.allclose(stacked.double(), expected, atol=5e-5)
    assert float((expected - naive_output(module, x, None, history)).abs().max()) > 0.1


def test_factors_and_their_sum_are_the_same_update() -> None:
    adapter, expected, dense_from = DualAdapter(DIM, DIM), torch.zeros(DIM, DIM, dtype=torch.float64), None
    assert adapter.delta_weight() is None
    for task in range(6):
        teach(adapter, task, 4, 0, merge=False)
        expected += adapter.a.detach().double() @ adapter.b.detach().double()
        adapter.merge()
        assert torch.allclose(adapter.delta_weight().double(), expected, atol=1e-5)
        if adapter.dense is not None and dense_from is None:
            dense_from = 4 * (task + 1)
            assert adapter.factors == []
    assert dense_from == DIM // 2, "factors are kept while their rank sum is below d / 2"


def test_the_effective_weight_is_cast_once_from_the_exact_sum() -> None:
    base = plain_qkv().to(torch.bfloat16)
    module = AdaptedQKV(base, ["v"])
    total = base.weight.float().clone()
    for task in range(12):
        module.groups["v"].begin(task, basis(1, task), torch.zeros(DIM, 0))
        with torch.no_grad():
            module.groups["v"].b.fill_(2e-3)
        total[2 * DIM :] += (module.groups["v"].a @ module.groups["v"].b).detach().T
        module.merge()
    steps = (module.weight.float() - total.to(torch.bfloat16).float()).abs()
    assert float((steps > 0).float().mean()) < 0.01, "rounding at every merge would add up"
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(module.weight[: 2 * DIM], base.weight[: 2 * DIM])


@pytest.mark.parametrize("rank", [3, 7])
def test_state_restores_the_module(rank: int) -> None:
    module, _ = taught(["q", "v"], [(rank, 3), (rank, 0), (rank, 4)], open_last=False)
    other = AdaptedQKV(plain_qkv(), ["q", "v"])
    for name, adapter in module.groups.items():
        other.groups[name].load_state_dict({key: x.clone() for key, x in adapter.state_dict().items()})
    other.refresh()
    weights, x = random_weights(3, 3), tokens()
    module.gate = other.gate = lambda _: weights
    assert torch.equal(module(x), other(x))
    assert float((module(x) - module.base(x)).abs().max()) > 0.1
    assert (module.groups["q"].dense is None) == (rank == 3)


def test_more_than_nine_residuals_are_restored_by_number() -> None:
    module, _ = taught(["v"], [(1, 1)] * 12, selected=12, open_last=False)
    other = AdaptedQKV(plain_qkv(), ["v"], selected=12)
    other.groups["v"].load_state_dict(module.groups["v"].state_dict())
    other.refresh()
    assert [part.task for part in other.groups["v"].residuals] == list(range(12))
    weights, x = random_weights(3, 12), tokens()
    module.gate = other.gate = lambda _: weights
    assert torch.equal(module(x), other(x))


def test_frozen_weight_and_slices_follow_the_order_q_k_v() -> None:
    module = AdaptedQKV(plain_qkv(), ["qv"])
    weight = module.base.weight
    assert torch.equal(module.frozen_weight("qv"), torch.cat([weight[:DIM], weight[2 * DIM :]]).T)
    assert module.slices("qkv") == [slice(0, DIM), slice(DIM, 2 * DIM), slice(2 * DIM, 3 * DIM)]

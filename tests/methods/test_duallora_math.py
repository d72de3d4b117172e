"""DualLoRA's adapters on tiny backbones, against formulas written out from what it stored."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from duallora_tools import (
    CPU,
    DIM,
    TOKENS,
    Data,
    adapters,
    calls_of,
    described,
    learn,
    method_of,
    near,
    random_task,
    train,
)
from tiny import tiny_backbone, tiny_images
from torch import Tensor

from duallora import streams
from duallora.backbones.backbone import load_backbone
from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics
from duallora.data.transforms import evaluation_transform
from duallora.methods import BatchOutputs
from duallora.methods.duallora import DualLoRA

pytestmark = pytest.mark.slow

# -- the network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["next", "protected", "own", "none"])
def test_before_the_first_step_the_network_is_the_frozen_one_bit_for_bit(residual: str) -> None:
    data = random_task(0)
    frozen = tiny_backbone()(data.images)
    method = method_of(residual=residual)
    assert torch.equal(method.extract(data.images), frozen)
    method.prepare(data.info, data.loader)
    assert torch.equal(method.extract(data.images), frozen)
    assert len(list(method.adapted[1].groups["kv"].parameters())) > 0
    own = (data.labels, torch.arange(12))
    assert torch.equal(method.encode(data.images, own).features, frozen)
    train(method, data)
    assert float((method.extract(data.images) - frozen).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("residual", ["next", "own", "protected"])
@pytest.mark.parametrize("projections", ["kv", "qv", "qkv"])
def test_an_adapted_layer_equals_its_formula_with_the_gate_written_out(
    residual: str, projections: str
) -> None:
    """W_0, the stored factors and a softmax over rows of raw features give the layer's output."""
    tasks = [random_task(index) for index in range(3)]
    method = method_of(residual=residual, projections=projections, energy_threshold=0.6, top_tasks=2)
    frozen = tiny_backbone().attention(1).get_submodule("qkv")
    updates, residuals = torch.zeros(DIM, DIM * len(projections), dtype=torch.float64), {}
    for data in tasks:
        method.prepare(data.info, data.loader)
        train(method, data)
        adapter = method.adapted[1].groups[projections]
        updates += (adapter.a.double() @ adapter.b.double()).detach()
        if adapter.psi is not None:
            residuals[data.info.index] = (adapter.psi.double() @ adapter.c.double()).detach()
        method.consolidate(data.info, data.loader)
    probes = torch.cat([data.images[:3] for data in tasks])
    readouts: list[BatchOutputs] = []
    x, y = calls_of(method.adapted[1], lambda: readouts.append(method.logits(probes)))
    x, found = x.double(), readouts[0].gate

    # Features at the gate come from frozen layers: any later pass sees the same.
    rows = ClassStatistics(2 * DIM, CPU)
    for data in tasks:
        f = described(calls_of(method.adapted[1], lambda data=data: method.logits(data.images))[0])
        rows.replace(data.info.index, ClassMoments.of(f, data.labels, 2))
        rows.fit_temperature(data.info.index, f, data.labels)
    scores = (rows.kappa * rows.scores(described(x).float())).softmax(1)
    weights = torch.stack([scores[:, 2 * t] + scores[:, 2 * t + 1] for t in range(3)], 1).double()
    weights = weights * (weights >= weights.sort(1, descending=True).values[:, 1:2])

    expected = x @ frozen.weight.double().T + frozen.bias.double()
    for i in range(len(x)):
        extra = x[i] @ updates + sum(weights[i, t] * (x[i] @ product) for t, product in residuals.items())
        for j, projection in enumerate(projections):
            start = "qkv".index(projection) * DIM
            expected[i, :, start : start + DIM] += extra[:, j * DIM : (j + 1) * DIM]
    near(y, expected, atol=1e-4)
    assert len(residuals) == (2 if residual == "protected" else 3)
    assert all(float(product.norm()) > 1e-2 for product in residuals.values())
    near(found, weights)
    assert 0.5 < float(weights.max(1).values.mean()) < 0.99, "the gate must have something to weigh"


def test_bases_of_a_task_are_disjoint_and_outside_the_earlier_tasks() -> None:
    for residual in ("next", "own", "protected"):
        method = method_of(residual=residual, energy_threshold=0.7)
        for index in range(3):
            data = random_task(index)
            method.prepare(data.info, data.loader)
            for place, adapter in adapters(method):
                phi = method.subspaces[place].phi.float()
                near(adapter.a.T @ adapter.a, torch.eye(4) / 3)
                near(phi.T @ adapter.a, torch.zeros(phi.shape[1], 4))
                if adapter.psi is None:
                    assert residual == "protected" and index == 0
                    continue
                near(adapter.psi.T @ adapter.psi, torch.eye(3))
                near(adapter.psi.T @ adapter.a, torch.zeros(3, 4))
                inside = float((phi.T @ adapter.psi).norm()) / 3**0.5
                low, high = {"next": (0, 1e-4), "protected": (0.9999, 1.0001), "own": (0.01, 1)}[residual]
                assert index == 0 or low <= inside <= high
            train(method, data, 2)
            method.consolidate(data.info, data.loader)


def test_class_token_moments_give_every_projection_its_own_bases() -> None:
    method = method_of(moments="class_token", projections="qkv", first_adapted_layer=0, gate="layer")
    for index in range(2):
        learn(method, random_task(index), 4)
    assert set(method.subspaces) == {(layer, group) for layer in (0, 1) for group in "qkv"}
    sizes = {place: subspace.phi.shape[1] for place, subspace in method.subspaces.items()}
    assert sizes[1, "q"] <= 24 and sizes[1, "q"] != sizes[1, "k"]
    assert bool(torch.isfinite(method.logits(tiny_images()).calibrated).all())


# -- what protects earlier tasks -----------------------------------------------------------------------------


@pytest.mark.parametrize("projections", ["kv", "qkv"])
def test_inputs_of_exact_rank_keep_their_outputs(projections: str) -> None:
    """One image has 17 tokens in 32 dimensions: at threshold 1 its whole span is protected everywhere."""
    backbone = tiny_backbone(depth=3)
    method = method_of(
        backbone,
        residual="none",
        energy_threshold=1.0,
        projections=projections,
    )
    old, new = Data(0, tiny_images(1, 1), torch.zeros(1, dtype=torch.long)), random_task(1)
    learn(method, old)
    assert all(subspace.phi.shape[1] <= TOKENS for subspace in method.subspaces.values())
    assert len(method.subspaces) == 2, "layers 1 and 2"
    before = {layer: calls_of(m, lambda: method.logits(old.images))[1] for layer, m in method.adapted.items()}
    features, others = method.extract(old.images), method.extract(new.images)
    learn(method, new)
    for layer, module in method.adapted.items():
        after = calls_of(module, lambda: method.logits(old.images))[1]
        assert float((after - before[layer]).abs().max()) < 1e-5
    assert float((method.extract(old.images) - features).abs().max()) < 1e-5
    assert float((method.extract(new.images) - others).abs().max()) > 1e-2, (
        "the task must have learned something"
    )


def test_a_gated_residual_for_others_is_what_may_move_an_old_image() -> None:
    """The same with a residual outside the old span: safe by construction, whatever the gate says."""
    method = method_of(tiny_backbone(depth=3), residual="next", energy_threshold=1.0, gate="off")
    old, new = Data(0, tiny_images(1, 1), torch.zeros(1, dtype=torch.long)), random_task(1)
    learn(method, old)
    features = method.extract(old.images)
    learn(method, new)
    assert method.residual_norm > 1e-3
    assert float((method.extract(old.images) - features).abs().max()) < 1e-5


@pytest.fixture(scope="module")
def digits() -> tuple[DualLoRA, dict[int, Tensor], dict[int, Tensor], dict[int, Tensor]]:
    """Two tasks of real images: tokens of the first one, Phi after it, and the update of the second one."""
    backbone = load_backbone()
    view, tasks = evaluation_transform(backbone.info), []
    for index, task in enumerate(list(streams.digits())[:2]):
        chosen = [i for c in range(2) for i in [j for j, y in enumerate(task.train.targets) if y == c][:10]]
        samples = [task.train[i] for i in chosen]
        tasks.append(
            Data(index, torch.stack([view(x) for x, _ in samples]), torch.tensor([y for _, y in samples]))
        )
    method = method_of(backbone, rank=10, residual_rank=10)
    old, new = tasks
    learn(method, old, 4)
    tokens = {
        layer: calls_of(m, lambda: method.extract(old.images))[0].detach().double().flatten(0, 1)
        for layer, m in method.adapted.items()
    }
    phi = {layer: subspace.phi.clone() for (layer, _), subspace in method.subspaces.items()}
    learn(method, new, 4)
    updates = {layer: m.groups["kv"].factors[1] for layer, m in method.adapted.items()}
    return method, tokens, phi, {layer: (a.double(), b.double()) for layer, (a, b) in updates.items()}


@pytest.mark.slow
def test_on_real_images_the_update_moves_old_tokens_less_than_the_unprotected_energy_allows(
    digits: Any,
) -> None:
    _, tokens, phi, updates = digits
    assert len(tokens) == 4
    for layer, x in tokens.items():
        a, b = updates[layer]
        moment = x.T @ x / len(x)
        captured = float((phi[layer].T @ moment @ phi[layer]).trace() / moment.trace())
        assert 0.95 <= captured < 1
        size = float(torch.linalg.matrix_norm(b, 2) ** 2 * torch.linalg.matrix_norm(a, 2) ** 2)
        bound = size * (1 - captured) * float(moment.trace())
        moved = float((x @ a @ b).square().sum(1).mean())
        assert 0 < moved < bound
        strongest = torch.linalg.eigh(moment)[1][:, -a.shape[1] :] * 3**-0.5
        assert float((x @ strongest @ b).square().sum(1).mean()) > 3 * moved, (
            "an unprotected A must move them more"
        )


def test_on_real_images_phi_is_as_small_as_the_threshold_allows(digits: Any) -> None:
    _, tokens, phi, _ = digits
    for layer, x in tokens.items():
        moment = x.T @ x / len(x)
        share = (phi[layer].T @ moment @ phi[layer]).diagonal() / moment.trace()
        assert float(share.sum()) >= 0.95 - 1e-6
        assert float(share[:-1].sum()) < 0.95
        assert phi[layer].shape[1] < 96, "half the width at most: the threshold must leave room"


# -- tasks that are hard to measure --------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["next", "protected", "own", "none"])
@pytest.mark.parametrize("moments", ["tokens", "class_token"])
def test_single_images_and_few_directions_are_learned(residual: str, moments: str) -> None:
    """Fewer tokens than dimensions, one image a class, one class: bases shrink, nothing becomes NaN."""
    method = method_of(residual=residual, moments=moments, rank=14, residual_rank=14)
    pair = Data(0, tiny_images(2, 3), torch.arange(2))
    single = Data(1, tiny_images(1, 4), torch.zeros(1, dtype=torch.long))
    copies = Data(2, tiny_images(1, 5).expand(4, -1, -1, -1), torch.arange(4) % 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the complement may run out: tested below
        for data in (pair, single, copies):
            learn(method, data, 3)
    readout = method.logits(torch.cat([pair.images, single.images, copies.images[:1], tiny_images(3, 99)]))
    assert readout.heads.shape == (7, 5)
    for value in (readout.heads, readout.calibrated, readout.task_posterior, readout.familiarity):
        assert bool(torch.isfinite(value).all())
    near(readout.calibrated.exp().sum(1), torch.ones(7))
    assert readout.task_posterior.argmax(1)[:4].tolist() == [0, 0, 1, 2]
    if moments == "class_token":
        assert method.subspaces[1, "v"].phi.shape[1] <= 2 * 2 + 2 + 2, (
            "a pooled row for each head of each image"
        )


@pytest.mark.parametrize(
    ("residual", "goes_on"), [("next", False), ("none", False), ("own", True), ("protected", True)]
)
def test_an_exhausted_complement_stops_the_orthogonal_adapter_with_one_warning_a_layer(
    residual: str, goes_on: bool
) -> None:
    method = method_of(tiny_backbone(depth=3), residual=residual, energy_threshold=1.0)
    learn(method, random_task(0))
    used = [subspace.phi.shape[1] for subspace in method.subspaces.values()]
    assert used == [DIM - 1] * 2, (
        "tokens after a norm have mean zero: that direction has no energy and never counts"
    )
    features = method.extract(random_task(0).images)
    data = random_task(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method.prepare(data.info, data.loader)
    assert len(caught) == 2, "one for each adapted layer"
    assert all(f"layer {layer}" in str(w.message) for layer, w in zip((1, 2), caught, strict=True))
    for _, adapter in adapters(method):
        assert adapter.a is None and adapter.b is None
        assert (adapter.psi is not None) == goes_on
    train(method, data)
    method.consolidate(data.info, data.loader)
    assert method.orthogonal_norm == 0 and (method.residual_norm > 1e-3) == goes_on
    assert all(len(adapter.factors) == 1 or adapter.dense is not None for _, adapter in adapters(method))
    moved = float((method.extract(data.images) - tiny_backbone(depth=3)(data.images)).abs().max())
    assert moved > 1e-2
    if not goes_on and residual == "none":
        assert torch.equal(method.extract(random_task(0).images), features)


def test_an_orthogonal_adapter_of_rank_zero_is_no_exhausted_complement() -> None:
    method, data = method_of(rank=0), random_task(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.prepare(data.info, data.loader)
    assert method.adapted[1].groups["kv"].psi.shape == (DIM, 3)


def test_the_last_directions_are_shared_out_before_they_run_out() -> None:
    """17 of the 31 directions with energy are taken: r = 10 gets all it wants, r_R what is left."""
    method = method_of(rank=10, residual_rank=10, energy_threshold=1.0)
    learn(method, Data(0, tiny_images(1, 1), torch.zeros(1, dtype=torch.long)))
    taken = method.subspaces[1, "kv"].phi.shape[1]
    assert taken <= TOKENS
    data = random_task(1)
    method.prepare(data.info, data.loader)
    adapter = method.adapted[1].groups["kv"]
    assert adapter.a.shape[1] == 10 and adapter.psi.shape[1] == min(10, DIM - 1 - taken - 10)


def test_a_designed_down_projection_is_never_touched() -> None:
    method, data = method_of(), random_task(0)
    method.prepare(data.info, data.loader)
    start = method.adapted[1].groups["kv"].a.detach().clone()
    train(method, data)
    assert torch.equal(method.adapted[1].groups["kv"].a.detach(), start)
    trained = sum(p.numel() for group in method.parameter_groups() for p in group["params"])
    assert trained == (4 + 3) * 2 * DIM + 2 * (4 * DIM + 1), "B, C and the head, which reads what rows read"

"""DualLoRA's gate in training, rows and readouts, against formulas written out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from duallora_tools import CPU, DIM, adapters, calls_of, described, learn, method_of, near, random_task, train
from tiny import FAMILIES, tiny_backbone, tiny_images
from torch import Tensor

from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics
from duallora.methods import Encoding, TaskInfo

# -- the gate in training ------------------------------------------------------------------------------------


def test_training_leaves_each_image_out_of_its_own_row() -> None:
    method = method_of()
    learn(method, random_task(0))
    data = random_task(1, count=6)
    method.prepare(data.info, data.loader)
    point, batch = method.memory.points[1], data.batch(torch.tensor([4, 1, 3]))
    encode, passes = method.encode, []

    def noted(*args: Any) -> Encoding:
        passes.append(encode(*args))
        return passes[-1]

    method.encode = noted  # type: ignore[method-assign]
    method.loss(batch)
    found = passes[0].gate
    f0 = described(calls_of(method.adapted[1], lambda: method.extract(data.images))[0])
    rows = ClassStatistics(2 * DIM, CPU)
    old = random_task(0)
    old_f = described(calls_of(method.adapted[1], lambda: method.extract(old.images))[0])
    for task, (f, y) in enumerate([(old_f, old.labels), (f0, data.labels)]):
        rows.replace(task, ClassMoments.of(f, y, 2))
        rows.fit_temperature(task, f, y)
    assert rows.kappa == pytest.approx(point.rows.kappa)
    moments = rows.moments
    sigma = moments.scatter / (18 - 4)
    variances = sigma.diagonal().clamp(min=max(1e-3 * float(sigma.trace()) / (2 * DIM), 1e-4))
    sigma = sigma + (2 * DIM / 14) ** 1.5 / 2 * torch.diag(variances)
    inverse = torch.linalg.inv(sigma)
    for i, index in enumerate(batch.indices.tolist()):
        f, label = f0[index].double(), int(data.labels[index])
        others = [f0[j].double() for j in range(6) if data.labels[j] == label and j != index]
        means, count, centre = moments.mean.clone(), moments.count.clone(), moments.mean.mean(0)
        means[2 + label], count[2 + label] = torch.stack(others).mean(0), len(others)
        # Rows of few images count with a share of their distance from the centre.
        means = centre + rows.shares(count.float())[:, None] * (means - centre)
        scores = torch.stack([f @ inverse @ mu - mu @ inverse @ mu / 2 for mu in means])
        q = (rows.kappa * scores).softmax(0)
        near(found[i], torch.stack([q[:2].sum(), q[2:].sum()]), atol=1e-3, rtol=1e-3)
    unknown = method.encode(batch.images).gate
    assert float((unknown - found)[:, 1].min()) > -1e-4
    assert not torch.allclose(unknown, found, atol=1e-3)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_pass_before_a_task_sees_what_a_whole_pass_sees(family: str) -> None:
    """It may stop at the last adapted projection; what enters the projections must not change by that."""
    method = method_of(tiny_backbone(family, depth=3), gate="layer", residual="own", first_adapted_layer=0)
    learn(method, random_task(0))
    data = random_task(1)
    whole = {layer: calls_of(m, lambda: method.logits(data.images)) for layer, m in method.adapted.items()}
    method.prepare(data.info, data.loader)
    for layer, (x, _) in whole.items():
        point = method.memory.points[layer]
        backbone = method.backbone
        expected = described(x, layer, backbone.has_class_token, backbone.num_prefix_tokens)
        near(point.f0, expected, atol=1e-5)
        moment = sum(token.outer(token) for token in x.double().flatten(0, 1)) / x[..., 0].numel()
        outside = torch.eye(DIM, dtype=torch.float64)
        outside -= method.subspaces[layer, "kv"].phi @ method.subspaces[layer, "kv"].phi.T
        top = torch.linalg.eigh(outside @ moment @ outside)[1][:, -4:]
        a = method.adapted[layer].groups["kv"].a.double() * 3**0.5
        near((top.T @ a).square().sum(), torch.tensor(4.0), atol=1e-3)


@pytest.mark.parametrize("gate", ["first", "layer"])
def test_gate_rows_never_go_stale_at_the_first_layer_alone(gate: str) -> None:
    backbone = tiny_backbone(depth=3)
    method = method_of(backbone, gate=gate, energy_threshold=0.5)
    old = random_task(0)
    learn(method, old)
    stored = {layer: point.rows.moments.mean[:2].clone() for layer, point in method.memory.points.items()}
    learn(method, random_task(1), 20)
    assert list(stored) == ([1] if gate == "first" else [1, 2])
    for layer, mean in stored.items():
        f = described(calls_of(method.adapted[layer], lambda: method.extract(old.images))[0])
        now = ClassMoments.of(f.detach(), old.labels, 2).mean
        gap = float((now - mean).abs().max())
        assert gap < 1e-5 if layer == 1 else gap > 1e-4


@pytest.mark.parametrize("residual", ["next", "none"])
@pytest.mark.parametrize("gate", ["first", "off"])
def test_energy_gives_the_posterior_with_calibration_by_task(residual: str, gate: str) -> None:
    method = method_of(
        residual=residual, gate=gate, relevance="energy", calibration="task", energy_threshold=0.6
    )
    for index in range(3):
        learn(method, random_task(index), 4)
    images = torch.cat([random_task(index).images[:2] for index in range(3)])
    x, _ = calls_of(method.adapted[1], lambda: method.logits(images))
    readout, point, subspace = method.logits(images), method.memory.points[1], method.subspaces[1, "kv"]
    columns = []
    for task in range(3):
        images = random_task(task).images
        own = calls_of(method.adapted[1], lambda images=images: method.extract(images))[0][:, 0].double()
        f = x[:, 0].double()
        block = subspace.block(task)
        shares = [(g @ block).square().sum(1) / g.square().sum(1) for g in (own, f)]
        columns.append(shares[1] / shares[0].mean())
    energies = torch.stack(columns, 1)
    expected = (point.energy.kappa * energies.log()).log_softmax(1)
    near(readout.task_posterior, expected, atol=1e-3)
    near(readout.calibrated.exp().sum(1), torch.ones(6))
    images = torch.cat([random_task(index).images[:2] for index in range(3)])
    logits = method.heads(method.features(images))
    head = torch.cat([part.log_softmax(1) for part in logits.split(2, 1)], 1)
    near(readout.calibrated, (head + expected.repeat_interleave(2, 1)).log_softmax(1), atol=1e-3)
    if residual == "next" and gate == "first":
        near(readout.gate, energies.clamp(max=1), atol=1e-4)


# -- rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2])
def test_rows_of_earlier_tasks_stay(classes: int) -> None:
    method = method_of(residual="own", energy_threshold=0.5)
    learn(method, random_task(0))
    old = method.rows.moments.mean.clone()
    features = method.features(random_task(0).images)
    learn(method, random_task(1, classes=classes), 30)
    assert torch.equal(method.rows.moments.mean[:2], old)
    moved = (method.features(random_task(0).images) - features).abs()
    assert float(moved[:, 2 * DIM :].max()) < 1e-5, "what rows read below the adapters does not drift"
    assert classes == 1 or float(moved[:, : 2 * DIM].max()) > 1e-2


# -- readouts ------------------------------------------------------------------------------------------------


def test_the_calibrated_readout_equals_its_formula() -> None:
    method = method_of()
    for index in range(3):
        learn(method, random_task(index, classes=1 if index == 1 else 2), 4)
    readout = method.logits(tiny_images(6, 42))
    features = method.features(tiny_images(6, 42))
    assert torch.equal(readout.features, features[:, :DIM]) and features.shape == (6, 4 * DIM)
    log_q = method.rows.log_q(features)
    assert method.rows.task.tolist() == [0, 0, 1, 2, 2]
    sizes, expected = [2, 1, 2], []
    for head, q in zip(method.heads(features).split(sizes, 1), log_q.split(sizes, 1), strict=True):
        task = q.logsumexp(1, keepdim=True)
        expected.append(task + (head.log_softmax(1) / 2 + q / 2).log_softmax(1))
    near(readout.calibrated, torch.cat(expected, 1), atol=1e-4)
    near(readout.calibrated.exp().sum(1), torch.ones(6))
    near(readout.task_posterior.exp().sum(1), torch.ones(6))
    changed = method.heads(features) - method.starts(features)
    near(readout.heads, (log_q + changed / 2).log_softmax(1), atol=1e-4)


def test_autocast_reaches_the_backbone_alone() -> None:
    """Where the device has bf16, rows, temperatures, sums and merged weights must not notice."""
    method, plain = method_of(), method_of()
    method.context = replace(method.context, autocast=partial(torch.autocast, "cpu", dtype=torch.bfloat16))
    seen, remember = [], method.remember

    def note(task: TaskInfo, features: Tensor, labels: Tensor) -> None:
        seen.append((features, labels))
        remember(task, features, labels)

    method.remember = note
    for index in range(2):
        learn(method, random_task(index), 3)
        plain.remember(random_task(index).info, *seen[-1])
    found, expected = method.state(), plain.state()
    names = [name for name in expected if name.startswith("rows.")]
    assert len(names) > 4
    for name in names:
        assert torch.equal(found[name], expected[name]), name
    for (layer, _), adapter in adapters(method):
        update = sum(a.double() @ b.double() for a, b in adapter.factors)
        weight = method.adapted[layer].base.weight[DIM:].double().T + update
        near(method.adapted[layer].weight[DIM:].T, weight, atol=1e-6)
    frozen = tiny_backbone()(random_task(1).images)
    rounded = method.features(random_task(1).images) - method.extract(random_task(1).images)
    assert 1e-4 < float(rounded.abs().max()) < 0.5 * float(frozen.abs().max()), (
        "the backbone must run in bf16"
    )


def test_norms_are_relative_to_the_frozen_weight() -> None:
    method, data = method_of(), random_task(0)
    method.prepare(data.info, data.loader)
    train(method, data)
    adapter = method.adapted[1].groups["kv"]
    frozen = tiny_backbone().attention(1).get_submodule("qkv").weight[DIM:]
    orthogonal = float((adapter.a @ adapter.b).detach().norm() / frozen.norm())
    residual = float((adapter.psi @ adapter.c).detach().norm() / frozen.norm())
    method.consolidate(data.info, data.loader)
    assert method.orthogonal_norm == pytest.approx(orthogonal, rel=1e-5) and orthogonal > 1e-3
    assert method.residual_norm == pytest.approx(residual, rel=1e-5) and residual > 1e-3

"""Class rows read all of the backbone's columns; heads that are not imprinted the final feature alone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from small_tasks import Patterns, small_config, three_tasks, unseen
from tiny import FAMILIES, WIDTH, tiny_backbone, tiny_images

from duallora import ContinualLearner
from duallora.backbones.backbone import Backbone
from duallora.methods import Encoding

TASKS = three_tasks(20)


def blind(backbone: Backbone) -> Backbone:
    """The same with a last norm that gives every image one and the same final feature."""
    with torch.no_grad():
        backbone.model.norm.weight.zero_()
        backbone.model.norm.bias.copy_(torch.linspace(-1, 1, WIDTH))
    return backbone


def taught(backbone: Backbone, name: str = "linear") -> ContinualLearner:
    learner = ContinualLearner(backbone, small_config(name), device="cpu")
    learner.method.context = replace(learner.method.context, autocast=nullcontext)
    for task in TASKS:
        learner.learn(task)
    return learner


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_that_differ_only_below_the_adapters_are_found(family: str) -> None:
    backbone = blind(tiny_backbone(family))
    final = backbone(tiny_images())[:, : backbone.feature_dim]
    # Up to rounding, which may differ by an image's place in the batch: the final feature says nothing.
    torch.testing.assert_close(final, final[:1].expand(3, -1), rtol=0, atol=1e-5)
    learner = taught(backbone)
    data = unseen(TASKS, 6)
    outputs = learner.outputs(data)
    assert outputs.calibrated is not None and outputs.task_posterior is not None
    found = outputs.calibrated.argmax(1).eq(torch.tensor(data.targets)).float()  # rows: classes in this order
    assert found.mean() > 0.8 and found.reshape(7, 6).mean(1).min() > 0.4, found.reshape(7, 6)
    assert (outputs.heads - outputs.heads[:1]).abs().max() < 1e-5, "the heads cannot tell them apart"
    assert outputs.features.shape == (len(data), backbone.feature_dim)


def test_the_rows_of_a_method_are_moments_of_all_columns() -> None:
    learner, bare = taught(tiny_backbone()), tiny_backbone()
    rows = learner.method.rows
    assert rows.dim == bare.row_dim == 4 * WIDTH
    means = []
    for task in TASKS:
        features = bare(torch.stack([learner.preprocess(image) for image in task.images])).double()
        labels = torch.tensor(task.targets)
        means += [features[labels == k].mean(0) for k in range(len(task.classes))]
    torch.testing.assert_close(rows.moments.mean, torch.stack(means), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["linear", "lora", "slca", "sldc", "l2p", "dualprompt", "duallora", "frozen"]
)
def test_features_of_the_outputs_are_the_final_ones_and_what_heads_read(name: str) -> None:
    learner = taught(tiny_backbone(), name)
    method, data = learner.method, Patterns(["ant", "fox"], 3, seed=5)
    images = torch.stack([learner.preprocess(image) for image in data.images])
    with torch.no_grad():
        features = method.extract(images)
        readout = method.logits(images)
    assert features.shape == (6, 4 * WIDTH)
    assert torch.equal(readout.features, features[:, :WIDTH])
    assert torch.equal(method.final(features), features[:, :WIDTH])
    width = 4 * WIDTH if method.imprinted else WIDTH
    expected = method.heads(features[:, :width])
    if method.imprinted:  # on top of the rows, half of what training changed
        expected = method.rows.log_q(features) + (expected - method.starts(features)) / 2
    assert torch.equal(readout.heads, expected.log_softmax(1))
    assert [head.in_features for head in method.heads.tasks] == [width] * 3
    other = features.clone()
    other[:, WIDTH:] = 7.0
    same = torch.equal(method.head_logits(Encoding(other)), method.head_logits(Encoding(features)))
    assert same != method.imprinted

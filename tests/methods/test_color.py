"""CoLoR: which task an image gets, what acts for it, and what an earlier task keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tasks import Patterns, assert_same_outputs, new_learner, reloaded, small_config, three_tasks
from tiny import FAMILIES, tiny_backbone, tiny_images
from torch import Tensor
from torch.nn import functional as F

from duallora import ContinualLearner, DualLoRAError
from duallora.backbones.frozen_features import FrozenFeatures
from duallora.methods import Batch
from duallora.methods.color import CoLoR, CoLoRConfig, _centres

DEPTH, WIDTH = 3, 32
DARK, BRIGHT = -170.0, 170.0
CLASSES = ["ant", "bee", "cat"]


def domains(per_class: int = 8, seed: int = 0) -> list[Patterns]:
    """The same classes in the dark, in bright light, and in between."""
    return [Patterns(CLASSES, per_class, 10 * seed + i, shift) for i, shift in enumerate((DARK, BRIGHT, 0.0))]


def learned(tasks: list[Patterns], **changes: Any) -> tuple[ContinualLearner, CoLoR]:
    learner = new_learner(small_config("color", **changes), depth=DEPTH)
    for task in tasks:
        learner.learn(task)
    assert isinstance(learner.method, CoLoR)
    return learner, learner.method


def images_of(learner: ContinualLearner, data: Patterns) -> Tensor:
    return torch.stack([learner.preprocess(image) for image in data.images])


def batch_of(learner: ContinualLearner, data: Patterns) -> Batch:
    return Batch(images_of(learner, data), torch.tensor(data.targets), torch.arange(len(data)))


def adapted(method: CoLoR, image: Tensor, task: int) -> Tensor:
    """The features of one image with the LoRA of a task, added to the weights of a plain backbone."""
    plain = tiny_backbone(depth=DEPTH)
    for (layer, wrapper), update in zip(method.beside.items(), method.updates, strict=True):
        pair = update.pairs[task]
        delta = (pair.a @ pair.b).detach().T
        weight = plain.attention(layer).get_submodule("qkv").weight.data
        weight[:WIDTH] += delta[:WIDTH]  # q
        weight[2 * WIDTH :] += delta[WIDTH:]  # v
        assert not torch.equal(weight, wrapper.base.weight)
    return plain(image[None])[0]


def test_the_right_task_on_separated_domains() -> None:
    learner, method = learned(domains(), centres=5)
    for task, data in enumerate(domains(seed=1)):
        assert method.choose(images_of(learner, data)).eq(task).all()


def test_the_choice_is_the_nearest_centre_of_bare_features() -> None:
    learner, method = learned(three_tasks())
    bare, chosen = tiny_backbone(depth=DEPTH), []
    images = torch.cat([images_of(learner, data) for data in (*three_tasks(), *domains(2))])
    for image in images:
        feature = bare(image[None])[0, :WIDTH].double()
        distances = [float((feature - centre.double()).norm()) for centre in method.centres]
        chosen.append(int(method.centre_task[distances.index(min(distances))]))
    assert set(chosen) == {0, 1, 2}
    assert method.choose(images).tolist() == chosen


def test_centres_are_means_of_the_frozen_features_nearest_to_them() -> None:
    task = three_tasks()[1]
    learner, method = learned([task])
    features = tiny_backbone(depth=DEPTH)(images_of(learner, task))[:, :WIDTH]
    nearest = torch.stack([(features - centre).norm(dim=1) for centre in method.centres]).argmin(0)
    means = torch.stack([features[nearest == k].mean(0) for k in range(len(method.centres))])
    torch.testing.assert_close(method.centres, means, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("centres", "task", "expected"),
    [
        (None, Patterns(["ant", "bee"], 8), 4),
        (None, Patterns(["ant", "bee", "cat"], 8), 6),
        (None, Patterns(["ant"], 8), 2),
        (None, Patterns(["ant", "bee"], 1), 2),
        (5, Patterns(["ant", "bee"], 8), 5),
        (1, Patterns(["ant", "bee"], 8), 1),
        (50, Patterns(["ant", "bee"], 4), 8),
    ],
)
def test_the_number_of_centres(centres: int | None, task: Patterns, expected: int) -> None:
    _, method = learned([task], centres=centres)
    assert method.centres.shape == (expected, WIDTH) and method.centre_task.tolist() == [0] * expected


def test_equal_images_count_once(recwarn: pytest.WarningsRecorder) -> None:
    task = Patterns(["ant", "bee"], 4)
    task.images = [task.images[0]] * 8
    _, method = learned([task])
    # An image's features may differ in the last bit by its place in the batch.
    first = method.centres[:1]
    torch.testing.assert_close(method.centres, first.expand_as(method.centres), rtol=0, atol=1e-5)
    recwarn.clear()
    torch.testing.assert_close(_centres(first.expand(8, -1), 4, seed=0), first)
    assert not [w for w in recwarn if "distinct" in str(w.message)]


def test_each_image_gets_the_weights_of_its_task() -> None:
    learner, method = learned(domains())
    images = torch.cat([images_of(learner, data)[:3] for data in domains(seed=1)])
    images = images[torch.randperm(9, generator=torch.Generator().manual_seed(0))]
    chosen = method.choose(images)
    assert set(chosen.tolist()) == {0, 1, 2}
    expected = torch.stack([adapted(method, x, int(s)) for x, s in zip(images, chosen, strict=True)])
    torch.testing.assert_close(method.extract(images), expected, rtol=0, atol=1e-5)
    for part in (1, 4):
        split = torch.cat([method.extract(x) for x in images.split(part)])
        torch.testing.assert_close(split, expected, rtol=0, atol=1e-5)
    other = torch.stack([adapted(method, x, int(s + 1) % 3) for x, s in zip(images, chosen, strict=True)])
    assert (other - expected)[:, :WIDTH].abs().amax(1).min() > 1e-3, "it makes a difference which one"


def test_rows_are_of_the_features_met_at_inference() -> None:
    tasks = [Patterns(["ant", "bee"], 12, 0), Patterns(["ant", "bee"], 12, 7)]  # alike: choices go astray
    learner, method = learned(tasks, centres=1)
    images, labels = images_of(learner, tasks[1]), torch.tensor(tasks[1].targets)
    assert set(method.choose(images).tolist()) == {0, 1}
    with torch.no_grad():
        features = method.features(images)
    means = torch.stack([features[labels == k].mean(0) for k in range(2)]).double()
    torch.testing.assert_close(method.rows.moments.mean[2:], means, rtol=0, atol=1e-5)


def test_training_uses_the_current_lora_whatever_the_image() -> None:
    learner, method = learned(domains()[:2])
    batch = batch_of(learner, domains(seed=1)[0])  # dark: the choice would be task 0
    assert method.choose(batch.images).eq(0).all()
    for update in method.updates:
        update.zero_grad()  # pair 0 has those of its own training
    loss = method.loss(batch)
    loss.backward()
    for update in method.updates:
        assert all(p.grad is None and not p.requires_grad for p in update.pairs[0].parameters())
        assert all(p.grad.abs().max() > 0 for p in update.pairs[1].parameters())
    features = torch.stack([adapted(method, image, 1) for image in batch.images])
    entropy = F.cross_entropy(method.heads.tasks[1](features[:, :WIDTH]), batch.labels)
    torch.testing.assert_close(loss, entropy, rtol=0.02, atol=0.02)  # trained in bf16 where there is


def test_earlier_loras_and_centres_stay() -> None:
    tasks = three_tasks()
    learner, method = learned(tasks[:1])
    before = {name: x.clone() for name, x in method.state().items()}
    for task in tasks[1:]:
        learner.learn(task)
    after, pairs = method.state(), 0
    for name, x in before.items():
        if name.startswith("adapters"):
            assert torch.equal(after[name], x), name
            pairs += 1
    assert pairs == 2 * len(method.updates)
    assert torch.equal(after["centres"][: len(before["centres"])], before["centres"])
    assert sum(name.startswith("adapters") for name in after) == 3 * pairs
    assert method.centre_task.tolist() == [0] * 4 + [1] * 6 + [2] * 4


def test_a_single_class_leaves_the_features_as_they_are() -> None:
    learner, method = learned([Patterns(["ant"], 6)])
    images = images_of(learner, Patterns(["ant"], 3, 5))
    torch.testing.assert_close(method.extract(images), tiny_backbone(depth=DEPTH)(images))


def test_the_heads_answer_inside_the_chosen_task() -> None:
    learner, method = learned(domains(), centres=5)
    data = domains(seed=1)[1]
    images = images_of(learner, data)
    readout = method.logits(images)
    assert readout.heads[:, 3:6].exp().sum(1).allclose(torch.ones(len(data)), atol=1e-6)
    for task, head in enumerate(method.heads.tasks):
        own = slice(3 * task, 3 * task + 3)
        inside = head(readout.features).log_softmax(1)
        torch.testing.assert_close(readout.heads[:, own].log_softmax(1), inside, rtol=0, atol=2e-5)
        if task != 1:
            assert readout.heads[:, own].max() < -40
    outputs = learner.outputs(data)
    assert outputs.row_task[outputs.heads.argmax(1)].eq(1).all()


def test_nothing_acts_outside_its_own_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, method = learned(domains()[:2])
    images = tiny_images()
    bare = tiny_backbone(depth=DEPTH)(images)

    def at_rest() -> None:
        assert method.active.get() is None
        assert torch.equal(method.backbone(images), bare)
        assert torch.equal(method.frozen_features(images), bare)

    at_rest()
    for use in (method.extract, method.logits, method.choose):
        use(images)
        at_rest()
    method.loss(Batch(images, torch.tensor([0, 1, 0]), torch.arange(3)))
    at_rest()
    monkeypatch.setattr(method.rows, "posterior_and_familiarity", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        method.logits(images)
    at_rest()
    with pytest.raises(RuntimeError):
        method.loss(Batch(images[:, :2], torch.tensor([0, 1, 0]), torch.arange(3)))
    at_rest()


def test_two_passes_however_many_tasks_are_met() -> None:
    learner, method = learned(domains())
    mixed = torch.cat([images_of(learner, data)[:2] for data in domains(seed=1)])
    calls: list[int] = []
    method.backbone.register_forward_hook(lambda *_: calls.append(1))
    first = method.logits(mixed)
    assert len(calls) == method.forward_passes == 2
    method.context = replace(
        method.context, cache=FrozenFeatures.compute(tiny_backbone(depth=DEPTH), [mixed])
    )
    second = method.logits(mixed)
    assert len(calls) == 3, "the query pass is read from the cache"
    torch.testing.assert_close(second.heads, first.heads)


def test_the_choice_is_made_in_fp32_also_in_a_pass_under_autocast() -> None:
    learner, method = learned(domains())
    images = images_of(learner, domains(seed=1)[0])
    bare = tiny_backbone(depth=DEPTH)(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(method.backbone(images), bare), "autocast would change it"
        inside = method.frozen_features(images)
    assert torch.equal(inside, bare)


def test_centres_are_saved(tmp_path: Path) -> None:
    learner, method = learned(domains(), centres=3)
    loaded = reloaded(learner, tmp_path, depth=DEPTH)
    assert isinstance(loaded.method, CoLoR)
    assert torch.equal(loaded.method.centres, method.centres) and len(method.centres) == 9
    assert torch.equal(loaded.method.centre_task, method.centre_task)
    assert_same_outputs(loaded.outputs(domains(seed=1)[0]), learner.outputs(domains(seed=1)[0]))


def test_no_centre_at_all_is_refused() -> None:
    with pytest.raises(DualLoRAError, match="centres must be above 0"):
        CoLoRConfig(centres=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    learner = ContinualLearner(tiny_backbone(family), small_config("color"), device="cpu")
    for task in domains(3)[:2]:
        learner.learn(task)
    assert isinstance(learner.method, CoLoR)
    bare = tiny_backbone(family)(tiny_images())
    assert torch.equal(learner.method.frozen_features(tiny_images()), bare)
    assert (learner.method.extract(tiny_images()) - bare).abs().max() > 1e-3

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from small_tasks import (
    Patterns,
    assert_same_state,
    learned,
    new_learner,
    reloaded,
    small_config,
    three_tasks,
    unseen,
)
from tiny import tiny_backbone
from torch.utils.data import Dataset

from duallora import ContinualLearner, DualLoRAConfig, DualLoRAError, MethodConfig
from duallora.predictions import class_probabilities
from duallora.runtime.progress import Progress
from duallora.streams import split

pytestmark = pytest.mark.filterwarnings("ignore:.*no direction is left")


@pytest.fixture(scope="module")
def learner() -> ContinualLearner:
    """Has learned three tasks; the tests only read it."""
    return learned("duallora", epochs=4, learning_rate=2e-3)


def to_image(tensor: torch.Tensor) -> Image.Image:
    return Image.fromarray(tensor.permute(1, 2, 0).numpy())


# --- predicting ---


def test_images_tensors_and_paths_are_the_same(learner: ContinualLearner, tmp_path: Path) -> None:
    image = three_tasks()[1].images[0]
    path = tmp_path / "an image.png"
    to_image(image).save(path)
    given = [image, image.float() / 255, to_image(image), path, str(path)]
    assert [p.path for p in learner.predict(given)] == [None, None, None, str(path), str(path)]
    found = [learner.predict([one])[0] for one in given]  # the place in a batch may change the last bit
    for other in found[1:]:
        assert replace(other, path=None).top == found[0].top
        assert other.unknown == found[0].unknown


def test_a_prediction_agrees_with_the_outputs(learner: ContinualLearner) -> None:
    data = unseen(three_tasks())
    outputs = learner.outputs(data)
    probabilities = class_probabilities(outputs, "calibrated")
    assert outputs.task_posterior is not None and outputs.familiarity is not None
    for i, found in enumerate(learner.predict(data.images, top=7)):
        best = probabilities[i].argsort(descending=True)
        assert [label for label, _ in found.top] == [learner.classes[c] for c in best]
        assert [p for _, p in found.top] == pytest.approx(probabilities[i][best].tolist())
        assert (found.label, found.probability) == found.top[0]
        confidence, task = outputs.task_posterior[i].exp().max(0)
        assert found.task == learner.tasks[int(task)].name
        assert found.task_confidence == pytest.approx(float(confidence))
        assert found.unknown == pytest.approx(1 - float(outputs.familiarity[i]))


def test_how_many_classes_are_named(learner: ContinualLearner) -> None:
    image = three_tasks()[0].images[0]
    assert [len(learner.predict([image], top=top)[0].top) for top in (1, 3, 7, 100)] == [1, 3, 7, 7]
    assert learner.predict([]) == []
    assert len(learner.predict(iter([image] * 70))) == 70  # more than one batch, from an iterator


def test_known_images_are_told_from_unknown_ones(learner: ContinualLearner) -> None:
    tasks = three_tasks()
    assert learner.evaluate(unseen(tasks, 8)).accuracy > 3 / 7  # by chance 1/7
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator) for _ in range(20)]
    strange = [p.unknown for p in learner.predict(noise)]
    learned = [p.unknown for p in learner.predict([image for task in tasks for image in task.images])]
    # Eight images a class leave the distances of new images wide open, so only the means are told apart.
    assert sum(strange) / len(strange) > 0.5 > 0.2 > sum(learned) / len(learned)


def test_an_image_that_cannot_be_read_is_named(learner: ContinualLearner, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(DualLoRAError, match=r"notes\.png"):
        learner.predict([tmp_path / "notes.png"])
    with pytest.raises(DualLoRAError, match=r"gone\.jpg"):
        learner.predict([str(tmp_path / "gone.jpg")])


@pytest.mark.parametrize("calibration", ["class", "none"])
def test_the_answer_is_the_readout_of_the_configuration(calibration: str) -> None:
    learner = new_learner(small_config(calibration=calibration))
    learner.learn(three_tasks()[0])
    outputs = learner.outputs(three_tasks()[0])
    assert outputs.readout == ("heads" if calibration == "none" else "calibrated")
    assert (outputs.calibrated is None) == (calibration == "none")
    assert learner.predict(three_tasks()[0].images[:1])[0].probability <= 1


# --- evaluating ---


def test_an_evaluation_by_hand(learner: ContinualLearner) -> None:
    data = unseen(three_tasks(), 5)
    evaluation = learner.evaluate(data)
    found = learner.predict(data.images)
    right = [p.label == data.classes[t] for p, t in zip(found, data.targets, strict=True)]
    assert evaluation.images == 35 and evaluation.accuracy == sum(right) / 35
    starts = [0, 10, 25, 35]
    for k, task in enumerate(evaluation.tasks):
        mine = right[starts[k] : starts[k + 1]]
        assert (task.name, task.images) == (f"task {k + 1}", len(mine))
        assert task.accuracy == sum(mine) / len(mine)
    assert [sum(row) for row in evaluation.task_confusion] == [10, 15, 10]
    named = [[task.name for task in learner.tasks].index(p.task) for p in found]
    for k in range(3):
        counts = torch.bincount(torch.tensor(named[starts[k] : starts[k + 1]]), minlength=3)
        assert evaluation.task_confusion[k] == tuple(counts.tolist()), "as predict names them"
    assert evaluation.calibration_error is not None and 0 <= evaluation.calibration_error <= 1


def test_only_what_is_there_is_evaluated(learner: ContinualLearner) -> None:
    evaluation = learner.evaluate(Patterns(["dog", "ant"], [4, 3], 7))
    assert [task.images for task in evaluation.tasks] == [3, 4, 0]
    assert evaluation.tasks[2].accuracy is None


def test_classes_are_known_by_name(learner: ContinualLearner) -> None:
    names = ["gnu", "ant", "dog"]
    forwards, backwards = Patterns(names, 4, 7), Patterns(names[::-1], 4, 7)
    backwards.images = forwards.images
    backwards.targets = [2 - target for target in forwards.targets]
    assert learner.evaluate(forwards) == learner.evaluate(backwards)


def test_unknown_classes_are_named(learner: ContinualLearner) -> None:
    with pytest.raises(DualLoRAError, match=r"has not learned 'yak', 'zebu'; it knows 7 classes"):
        learner.evaluate(Patterns(["ant", "yak", "zebu"], 2))
    with pytest.raises(DualLoRAError, match=r"'n4' \.\.\.;"):
        learner.evaluate(Patterns([f"n{i}" for i in range(9)], 1))


def test_a_repeated_class_counts_for_its_latest_task() -> None:
    learner = new_learner()
    learner.learn(Patterns(["ant", "bee"], 5))
    learner.learn(Patterns(["bee", "cat"], 5, 1, shift=50.0))
    evaluation = learner.evaluate(Patterns(["ant", "bee", "cat"], 3, 2))
    assert [task.images for task in evaluation.tasks] == [3, 6]


# --- learning ---


def test_names_of_tasks() -> None:
    learner = new_learner()
    learner.learn(three_tasks()[0])
    learner.learn(three_tasks()[1], name="möbel/rot")
    learner.learn(three_tasks()[2])
    assert [task.name for task in learner.tasks] == ["task 1", "möbel/rot", "task 3"]


def test_a_stream_is_learned() -> None:
    images = Patterns(["ant", "bee", "cat", "dog", "elk"], 10)
    learner = new_learner()
    stream = split(images, tasks=2, order_seed=1993)
    for task in stream:
        record = learner.learn(task.train, name=task.name)
        assert record.train_images == len(task.train)
        assert learner.evaluate(task.test).images == len(task.test)
    assert learner.classes == list(stream.class_order)


class Plain(Dataset[tuple[Image.Image, int]]):
    """PIL images and labels without anything else but the names."""

    classes = ("gnu", "ant")

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return to_image(Patterns(["gnu", "ant"], 3).images[index]), index // 3


def test_any_data_set_with_class_names() -> None:
    learner = new_learner()
    learner.learn(Plain())
    same = new_learner()
    same.learn(Patterns(["gnu", "ant"], 3))
    assert_same_state(learner, same)


def test_the_order_of_the_images_keys_their_views() -> None:
    """The same images under other indices are augmented otherwise, so nothing is keyed by content."""
    first, second = new_learner(), new_learner()
    data = three_tasks()[0]
    first.learn(data)
    turned = Patterns(data.classes, 6)
    turned.images, turned.targets = data.images[::-1], data.targets[::-1]
    second.learn(turned)
    assert not torch.equal(first.outputs(data).heads, second.outputs(data).heads)
    # What is measured without augmentation is the same up to rounding.
    means = [learner.method.state()["gate.1.rows.mean"] for learner in (first, second)]
    torch.testing.assert_close(*means, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", ["crop,flip", "crop", "none"])
def test_the_augmentation_is_kept(policy: str, tmp_path: Path) -> None:
    def new() -> ContinualLearner:
        made = ContinualLearner(tiny_backbone(), small_config(), augment=policy, device="cpu")
        made.learn(three_tasks()[0])
        return made

    whole, parts = new(), reloaded(new(), tmp_path)
    assert parts.augment == policy
    for made in (whole, parts):
        made.learn(three_tasks()[1])
    assert_same_state(parts, whole)
    if policy != "crop,flip":
        other = new_learner()
        other.learn(three_tasks()[0])
        assert not torch.equal(other.outputs(three_tasks()[0]).heads, new().outputs(three_tasks()[0]).heads)


def test_a_bad_image_in_the_middle_is_an_error_of_the_user(tmp_path: Path) -> None:
    @dataclass
    class Bad(Patterns):
        def __init__(self) -> None:
            super().__init__(["yak", "zebu"], 6)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            if index == 7:
                raise DualLoRAError("7.jpg is no image.")
            return super().__getitem__(index)

    learner = new_learner()
    learner.learn(three_tasks()[0])
    with pytest.raises(DualLoRAError, match=r"7\.jpg"):
        learner.learn(Bad())
    assert len(learner.tasks) == 1


def test_a_learner_that_has_learned_nothing(tmp_path: Path) -> None:
    learner = new_learner()
    for use in (
        lambda: learner.outputs(three_tasks()[0]),
        lambda: learner.predict(three_tasks()[0].images),
    ):
        with pytest.raises(DualLoRAError, match="learned nothing yet"):
            use()
    with pytest.raises(DualLoRAError, match="has not learned 'ant', 'bee'"):
        learner.evaluate(three_tasks()[0])


def test_an_empty_learner_can_be_saved_and_goes_on(tmp_path: Path) -> None:
    loaded = reloaded(new_learner(), tmp_path)
    assert loaded.tasks == [] and loaded.classes == []
    direct = new_learner()
    for made in (loaded, direct):
        made.learn(three_tasks()[0])
    assert_same_state(loaded, direct)


def test_no_images_are_no_outputs(learner: ContinualLearner) -> None:
    with pytest.raises(DualLoRAError, match="no images"):
        learner.outputs_of([])
    with pytest.raises(DualLoRAError, match="no images"):
        learner.evaluate(Patterns([], 0))


# --- construction ---


def test_refused_at_once() -> None:
    for arguments, words in (
        ({"augment": "flop"}, "unknown augmentation 'flop'"),
        ({"device": "tpu"}, "device 'tpu' is not available"),
        ({"method": MethodConfig()}, "MethodConfig is no method's configuration"),
    ):
        with pytest.raises(DualLoRAError, match=words):
            ContinualLearner(tiny_backbone(), **arguments)
    with pytest.raises(DualLoRAError, match="embeded"):
        ContinualLearner("embeded")


def test_the_defaults() -> None:
    learner = ContinualLearner(device="cpu")
    assert learner.config == DualLoRAConfig() and learner.method_name == "duallora" and learner.seed == 0
    assert learner.backbone.info.name == "embedded" and learner.augment == "crop,flip"
    assert learner.device.type == "cpu" and learner.forward_passes == 1


@pytest.mark.parametrize("second", ["duallora", "lora", "linear"])
def test_a_backbone_in_use_is_refused(second: str) -> None:
    """Two learners on one backbone would see each other's adapters."""
    backbone = tiny_backbone()
    first = ContinualLearner(backbone, small_config(), device="cpu")
    with pytest.raises(DualLoRAError):
        ContinualLearner(backbone, small_config(second), device="cpu")
    first.learn(three_tasks()[0])


def test_progress_is_told() -> None:
    text = io.StringIO()
    progress = Progress(Console(file=text, width=200))
    learner = ContinualLearner(tiny_backbone(), small_config(), device="cpu", progress=progress)
    learner.learn(Patterns(["ant"], 3), name="one")
    assert "one: a single class has nothing to tell apart" in text.getvalue()
    bars = io.StringIO()
    learner.progress = Progress(Console(file=bars, width=200, force_terminal=True))
    learner.learn(Patterns(["bee", "cat"], 3), name="two")
    assert "two: epoch 1/1" in bars.getvalue() and "two: remembering" in bars.getvalue()
    quiet = new_learner()
    assert quiet.progress.quiet


def test_nothing_is_printed_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    learner = new_learner()
    learner.learn(Patterns(["ant"], 3))
    learner.predict(three_tasks()[0].images)
    assert capfd.readouterr() == ("", "")

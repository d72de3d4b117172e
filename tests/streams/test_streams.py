"""Streams: which image lands in which task, folders good and bad, domains."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset

from duallora import streams
from duallora.errors import DualLoRAError


class Memory(Dataset[tuple[Image.Image, int]]):
    """One-pixel images whose red value is their number; ``reads`` counts the decoded ones."""

    def __init__(self, targets: list[int], classes: list[Any], *, listed: bool = True) -> None:
        self.classes = classes
        self.labels = targets
        self.reads = 0
        if listed:
            self.targets = targets

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.reads += 1
        return Image.new("RGB", (1, 1), (index % 256, 0, 0)), self.labels[index]


def memory(classes: int = 10, each: int = 10) -> Memory:
    """Interleaved classes whose names are not in sorted order."""
    names = [f"class {i}" for i in reversed(range(classes))]
    return Memory([i % classes for i in range(classes * each)], names)


def numbers(view: streams.TaskDataset) -> list[int]:
    return [image.getpixel((0, 0))[0] for image, _ in (view[i] for i in range(len(view)))]


class TestSplit:
    def test_order_1993_is_numpys_permutation_of_the_sorted_names(self) -> None:
        names = [f"n{i:03d}" for i in range(100)]
        stream = streams.split(Memory([i % 100 for i in range(500)], names[::-1]))
        assert [int(name[1:]) for name in stream.class_order[:5]] == [68, 56, 78, 8, 23]
        assert sorted(stream.class_order) == names
        assert [task.name for task in stream] == [f"task {i}" for i in range(1, 11)]
        assert tuple(name for task in stream for name in task.train.classes) == stream.class_order

    def test_every_sample_lands_once_with_its_own_class(self) -> None:
        data = memory()
        stream = streams.split(data, tasks=3)
        assert [len(task.train.classes) for task in stream] == [4, 3, 3]
        seen = Counter[int]()
        for task in stream:
            for view in (task.train, task.test):
                assert view.classes == task.train.classes
                for position, number in enumerate(numbers(view)):
                    seen[number] += 1
                    name = data.classes[data.targets[number]]
                    assert view.classes[view.targets[position]] == name
                    assert view[position][1] == view.targets[position]
                    assert view.identifiers[position] == str(number)
        assert seen == Counter(range(100))

    def test_every_fifth_image_of_a_class_is_test(self) -> None:
        task = streams.split(memory(classes=1, each=11), tasks=1).tasks[0]
        assert numbers(task.test) == [4, 9]
        assert numbers(task.train) == [0, 1, 2, 3, 5, 6, 7, 8, 10]

    def test_train_per_class_and_holdout(self) -> None:
        task = streams.split(memory(classes=1, each=11), tasks=1, train_per_class=3, holdout=4).tasks[0]
        assert (numbers(task.train), numbers(task.test)) == ([0, 1, 2], [3, 4, 5, 6])
        task = streams.split(memory(classes=1, each=11), tasks=1, holdout=4).tasks[0]
        assert (numbers(task.train), numbers(task.test)) == ([0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10])
        task = streams.split(memory(classes=1, each=11), tasks=1, train_per_class=3).tasks[0]
        assert (numbers(task.train), numbers(task.test)) == ([0, 1, 2], [4, 9])

    def test_classes_takes_the_first_sorted_names(self) -> None:
        stream = streams.split(memory(), tasks=2, classes=4, order_seed="alphabetical")
        assert stream.class_order == ("class 0", "class 1", "class 2", "class 3")
        assert stream.tasks[1].test.classes == ["class 2", "class 3"]
        assert stream.order_seed == "alphabetical"

    def test_a_test_set_is_matched_by_name(self) -> None:
        train, test = Memory([0, 1], ["a", "b"]), Memory([0, 1, 0], ["b", "a"])
        first, second = streams.split(train, tasks=2, test=test, order_seed="alphabetical")
        assert (numbers(first.train), numbers(first.test)) == ([0], [1])
        assert (numbers(second.train), numbers(second.test)) == ([1], [0, 2])

    def test_nothing_is_decoded_where_targets_are_listed(self) -> None:
        data = memory()
        streams.split(data, tasks=2)
        assert data.reads == 0

    def test_targets_are_read_off_the_samples_or_tensors(self) -> None:
        plain = Memory([0, 1, 0], ["a", "b"], listed=False)
        assert streams.as_task_dataset(plain).targets == [0, 1, 0]
        tensors: Any = Memory([0, 1], ["a", "b"])
        tensors.targets = torch.tensor([1, 0])
        assert streams.as_task_dataset(tensors).targets == [1, 0]

    @given(
        classes=st.integers(1, 12), tasks=st.integers(1, 12), each=st.integers(5, 12), seed=st.integers(0, 9)
    )
    @settings(max_examples=40, deadline=None)
    def test_tasks_are_nearly_equal_and_complete(
        self, classes: int, tasks: int, each: int, seed: int
    ) -> None:
        data = memory(classes, each)
        if tasks > classes:
            with pytest.raises(DualLoRAError, match="at least"):
                streams.split(data, tasks, order_seed=seed)
            return
        stream = streams.split(data, tasks, order_seed=seed)
        sizes = [len(task.train.classes) for task in stream]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1
        assert sum(len(t.train) + len(t.test) for t in stream) == len(data)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tasks": 0}, "tasks must be at least 1"),
            ({"tasks": 11}, "at least 11 classes"),
            ({"classes": 11}, "the data set has 10"),
            ({"train_per_class": 0}, "train_per_class must be at least 1"),
            ({"holdout": -1}, "holdout must be 0 or more"),
            ({"train_per_class": 10, "holdout": 1}, "too few to hold 1 back"),
            ({"holdout": 10}, "no image to train on"),
            ({"holdout": 1, "test": Memory([0], ["class 0"])}, "leave out the test set"),
            ({"test": Memory([0], ["klass 0"])}, "'klass 0'"),
            ({"test": Memory([0], ["class 0"])}, "has no image to test on"),
            ({"order_seed": -1}, "alphabetical"),
            ({"order_seed": "random"}, "alphabetical"),
        ],
    )
    def test_what_cannot_be_split_is_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(DualLoRAError, match=message):
            streams.split(memory(), **options)


class TestClassNames:
    def test_slashes_and_unicode_work(self) -> None:
        names = ["cat/dog", "Übergröße", "猫", "..", "🐈 katze"]
        stream = streams.split(Memory([i % 5 for i in range(25)], names), tasks=5)
        assert sorted(stream.class_order) == sorted(names)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["a", "a"], "'a' comes twice"),
            (["a", " "], "empty"),
            (["a", "b\nc"], "control characters"),
            (["a", "\udcff"], "not valid unicode"),
            (["a", 3], "must be text, not 3"),
        ],
    )
    def test_unusable_names_are_refused(self, names: list[Any], message: str) -> None:
        with pytest.raises(DualLoRAError, match=message):
            streams.as_task_dataset(Memory([0, 1], names))

    def test_a_data_set_without_names_or_with_stray_targets_is_refused(self) -> None:
        nameless: Any = Memory([0], ["a"])
        del nameless.classes
        with pytest.raises(DualLoRAError, match="`classes`"):
            streams.as_task_dataset(nameless)
        with pytest.raises(DualLoRAError, match="target 2 has no class name"):
            streams.as_task_dataset(Memory([0, 2], ["a", "b"]))
        with pytest.raises(DualLoRAError, match="target -1 has no class name"):
            streams.as_task_dataset(Memory([0, -1], ["a", "b"]))


class TestHoldBack:
    def test_a_tenth_of_each_class_with_ten_images(self) -> None:
        data = Memory([0] * 25 + [1] * 9 + [2] * 10, ["a", "b", "c"])
        train, held = streams.hold_back(data)
        assert held is not None
        assert numbers(held) == [9, 19, 43]
        assert held.targets == [0, 0, 2]
        assert held.classes == train.classes == data.classes
        assert sorted(numbers(train) + numbers(held)) == list(range(44))

    def test_small_classes_are_left_alone(self) -> None:
        train, held = streams.hold_back(Memory([0] * 9, ["a"]))
        assert held is None
        assert len(train) == 9


class TestDigits:
    def test_five_tasks_of_two(self) -> None:
        stream = streams.digits()
        assert len(stream) == 5
        assert all(len(task.train.classes) == 2 for task in stream)
        assert sum(len(t.train) + len(t.test) for t in stream) == 1797
        assert list(stream.class_order) == [str(i) for i in np.random.RandomState(1993).permutation(10)]
        assert stream.augmentation == "crop"
        image, target = stream.tasks[0].train[0]
        assert isinstance(image, Image.Image)
        assert (image.mode, image.size, target) == ("RGB", (8, 8), stream.tasks[0].train.targets[0])
        assert image.getextrema()[0] == (0, 255)


class TestDomains:
    def test_one_task_a_domain_with_all_classes(self) -> None:
        base = streams.split(memory(4, 10), tasks=2)
        stream = streams.with_domains(base, ("photo", "negative"))
        assert [task.name for task in stream] == ["photo", "negative"]
        assert stream.class_order == base.class_order
        for task in stream:
            assert task.train.classes == list(base.class_order)
            assert (len(task.train), len(task.test)) == (32, 8)
        photo, negative = (task.train for task in stream)
        data = memory(4, 10)
        for i, number in enumerate(numbers(photo)):
            assert photo.identifiers[i] == str(number)
            assert photo.classes[photo[i][1]] == data.classes[data.targets[number]]
            assert negative[i][0].getpixel((0, 0)) == (255 - number, 255, 255)

    @pytest.mark.parametrize("size", [(64, 64), (1, 1), (8, 8), (50, 33)])
    @pytest.mark.parametrize("domain", list(streams.DOMAINS))
    def test_every_domain_keeps_the_size(self, domain: str, size: tuple[int, int]) -> None:
        values = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        change = streams.DOMAINS[domain]
        shown = change(Image.fromarray(values))
        assert isinstance(shown, Image.Image)
        assert (shown.mode, shown.size) == ("RGB", (size[1], size[0]))
        assert change(torch.from_numpy(values).permute(2, 0, 1)).tobytes() == shown.tobytes()
        assert (shown.tobytes() == values.tobytes()) == (
            domain == "photo" or (domain == "pixelated" and max(size) <= 8)
        )

    def test_edges_are_where_the_grey_changes(self) -> None:
        step = np.zeros((8, 8, 3), dtype=np.uint8)
        step[:, 4:] = 20
        shown = np.asarray(streams.DOMAINS["edges"](Image.fromarray(step)))[..., 0]
        assert shown.tolist() == [[0, 0, 0, 80, 80, 0, 0, 0]] * 8

    def test_unknown_domains_are_refused(self) -> None:
        base = streams.split(memory(4, 10), tasks=2)
        with pytest.raises(DualLoRAError, match=r"'edge' \(did you mean edges\?\): choose from photo, edges"):
            streams.with_domains(base, ("edge",))
        with pytest.raises(DualLoRAError, match="twice"):
            streams.with_domains(base, ("photo", "photo"))
        with pytest.raises(DualLoRAError, match="no domain"):
            streams.with_domains(base, ())


def test_views_work_in_loader_workers() -> None:
    view = streams.digits().tasks[0].train
    loader = torch.utils.data.DataLoader(
        view.subset(range(6)), batch_size=3, num_workers=2, collate_fn=lambda batch: [t for _, t in batch]
    )
    assert [target for batch in loader for target in batch] == view.targets[:6]

"""How classes and domains are divided among tasks, and in which order they come."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_tasks import new_learner, small_config
from stream_fixtures import save, write_domainnet, write_table
from torch.utils.data import Dataset

from duallora import streams
from duallora.errors import DualLoRAError
from duallora.runs.protocol import run_stream
from duallora.runtime.progress import Progress
from duallora.streams.sizes import task_sizes


class Numbered(Dataset[tuple[Image.Image, int]]):
    """Images known by class and number; sorted names are ``c00``, ``c01``, ..."""

    def __init__(self, classes: int, each: int) -> None:
        self.classes = [f"c{i:02d}" for i in range(classes)]
        self.targets = [i // each for i in range(classes * each)]
        self.identifiers = [f"{self.classes[i // each]}/{i % each}" for i in range(classes * each)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (8, 8), (index % 256, index // 256, 0)), self.targets[index]


def sizes(stream: streams.Stream) -> list[int]:
    return [len(task.train.classes) for task in stream]


class TestSizes:
    def test_sizes_may_be_given_one_by_one(self) -> None:
        stream = streams.split(Numbered(10, 5), (4, 1, 3, 2))
        assert sizes(stream) == [4, 1, 3, 2]
        assert tuple(name for task in stream for name in task.train.classes) == stream.class_order
        assert stream.class_order == streams.split(Numbered(10, 5), 5).class_order
        assert sizes(streams.load("digits", tasks=[3, 3, 4])) == [3, 3, 4]
        assert sizes(streams.load("digits", tasks=(2, 1), classes=3)) == [2, 1]

    def test_the_first_task_may_be_larger(self) -> None:
        assert sizes(streams.load("digits", tasks=6, first_classes=5)) == [5, 1, 1, 1, 1, 1]
        assert sizes(streams.load("digits", first_classes=4)) == [4, 2, 2, 1, 1]
        assert task_sizes(50, 9, 10) == [10, *[5] * 8]
        assert task_sizes(100, 6, 50) == [50, *[10] * 5]

    @given(classes=st.integers(1, 60), tasks=st.integers(1, 60), first=st.none() | st.integers(1, 60))
    @settings(max_examples=200, deadline=None)
    def test_sizes_add_up_and_are_nearly_equal(self, classes: int, tasks: int, first: int | None) -> None:
        try:
            found = task_sizes(classes, tasks, first)
        except DualLoRAError:
            assert tasks > classes or (first is not None and (tasks < 2 or classes - first < tasks - 1))
            return
        assert (sum(found), len(found)) == (classes, tasks)
        rest = found if first is None else found[1:]
        assert first is None or found[0] == first
        assert rest == sorted(rest, reverse=True)
        assert rest[0] - rest[-1] <= 1 <= rest[-1]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tasks": (4, 4)}, "the tasks have 4, 4 classes, 8 together, and there are 10"),
            ({"tasks": (10, 0)}, "every task needs at least 1 class, and the sizes are 10, 0"),
            ({"tasks": ()}, "the sizes are none"),
            ({"tasks": (5, 5), "first_classes": 5}, "leave first_classes out"),
            ({"first_classes": 0}, "first_classes must be at least 1"),
            ({"first_classes": 8}, "a first task of 8 of 10 classes leaves 2 for 4 more"),
            ({"tasks": 1, "first_classes": 5}, "at least 2 tasks"),
            ({"repeat": 1.0}, "from 0 to below 1, not 1.0"),
            ({"repeat": -0.1}, "from 0 to below 1, not -0.1"),
            ({"scenario": "domain"}, "digits has no domains of its own"),
            ({"scenario": "task"}, 'must be "class" or "domain", not \'task\''),
            ({"domains": ("photo", "edges"), "scenario": "class"}, "leave the scenario class out"),
            ({"domains": ("photo", "edges"), "tasks": (5, 5)}, "2 domains make 2 tasks: leave the number"),
            ({"domains": ("photo", "edges"), "first_classes": 5}, "same classes: leave first_classes out"),
            ({"domains": ("photo", "edges"), "repeat": 0.5}, "same classes: leave repeat out"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(DualLoRAError, match=message):
            streams.load("digits", **options)


class TestOrders:
    def test_the_rule_names_generator_and_direction(self) -> None:
        seeded = streams.split(Numbered(20, 5), 2, order_seed=7)
        names = [f"c{i:02d}" for i in range(20)]
        assert list(seeded.class_order) == [names[i] for i in np.random.RandomState(7).permutation(20)]
        assert seeded.order_rule == (
            "numpy.random.RandomState(7).permutation(20): position i is class order[i] of the sorted class "
            "names"
        )
        plain = streams.split(Numbered(20, 5), 2, order_seed="alphabetical")
        assert list(plain.class_order) == names
        assert plain.order_rule == "the sorted class names"
        assert streams.all_at_once(seeded).order_rule == seeded.order_rule
        assert streams.with_domains(seeded, ["photo"]).order_rule == seeded.order_rule
        assert streams.with_repeats(seeded, 0.2).order_rule == seeded.order_rule

    def test_the_usual_order_of_two_hundred_classes(self) -> None:
        """As the logs of published code have it."""
        stream = streams.split(Numbered(200, 5), 10)
        names = sorted(stream.class_order)
        assert [names.index(name) for name in stream.class_order[:8]] == [168, 136, 51, 9, 183, 101, 171, 99]


class TestPermutedDigits:
    def test_two_hundred_tasks_of_two(self) -> None:
        stream = streams.load("permuted-digits", tasks=200)
        assert sizes(stream) == [2] * 200
        assert len(set(stream.class_order)) == 400
        groups = [{name[:3] for name in task.train.classes} for task in stream]
        assert groups == [{f"p{p:02d}"} for p in range(40) for _ in range(5)]
        digits = [str(i) for i in np.random.RandomState(1993).permutation(10)]
        assert [name[4:] for name in stream.class_order] == digits * 40
        assert stream.order_rule == (
            "numpy.random.RandomState(1993).permutation(10): position i is class order[i] of the sorted "
            "class names within each of 40 groups of classes, one after another"
        )
        assert stream.augmentation == "none"

    def test_an_image_is_a_digit_with_its_pixels_moved(self) -> None:
        digits, permuted = streams.DigitsDataset(), streams.PermutedDigitsDataset(40)
        for index in (0, 1800, len(permuted) - 1):
            image, target = permuted[index]
            p, number = permuted.identifiers[index][1:].split("/")
            assert permuted.classes[target] == f"p{p}-{digits.targets[int(number)]}"
            order = np.random.RandomState(int(p)).permutation(64)
            plain = np.asarray(digits[int(number)][0]).reshape(64, 3)
            assert image.mode == "RGB"
            assert (np.asarray(image).reshape(64, 3) == plain[order]).all()

    @pytest.mark.parametrize(
        ("options", "classes"),
        [
            ({}, 100),
            ({"tasks": 7}, 14),
            ({"tasks": 3, "classes": 30}, 30),
            ({"tasks": (4, 6, 5)}, 15),
            ({"tasks": 11, "first_classes": 10}, 30),
            ({"domains": ("photo", "negative")}, 100),
        ],
    )
    def test_it_has_as_many_classes_as_the_tasks_need(self, options: dict[str, Any], classes: int) -> None:
        stream = streams.load("permuted-digits", train_per_class=1, **options)
        assert len(stream.class_order) == classes

    def test_many_permutations_stay_in_order(self) -> None:
        names = streams.PermutedDigitsDataset(1001).classes
        assert names[-1] == "p100-0"
        assert names == sorted(names)
        with pytest.raises(DualLoRAError, match="at least 1"):
            streams.load("permuted-digits", classes=0)


class TestRepeats:
    def test_a_share_of_the_classes_seen_comes_back(self) -> None:
        base = streams.split(Numbered(20, 10), 5)
        stream = streams.with_repeats(base, 0.25)
        assert stream.name == "split (repeat 0.25)"
        back = [task.train.classes[4:] for task in stream]
        assert [len(names) for names in back] == [0, 1, 2, 3, 4]
        for t, task in enumerate(stream):
            assert task.train.classes[:4] == base.tasks[t].train.classes
            assert set(back[t]) <= {name for earlier in base.tasks[:t] for name in earlier.train.classes}
            assert task.test.classes == base.tasks[t].test.classes
            assert task.test.identifiers == base.tasks[t].test.identifiers

    @pytest.mark.parametrize("order", [1993, 4, "alphabetical"])
    @pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
    def test_no_image_is_lost_or_shown_twice(self, share: float, order: Any) -> None:
        base = streams.split(Numbered(12, 5), 6, order_seed=order)
        stream = streams.with_repeats(base, share)
        shown = Counter(name for task in stream for name in task.train.identifiers)
        assert shown == Counter(name for task in base for name in task.train.identifiers)
        appearances = Counter(name for task in stream for name in task.train.classes)
        for name, times in appearances.items():
            parts = [
                sum(identifier.startswith(name) for identifier in task.train.identifiers) for task in stream
            ]
            assert sum(part > 0 for part in parts) == times <= 4  # it has four images to train on
            assert max(parts) - min(part for part in parts if part) <= 1
        assert max(appearances.values()) > 1
        for task in stream:
            image, target = task.train[len(task.train) - 1]
            red, green, _ = image.getpixel((0, 0))
            assert Numbered(12, 5).identifiers[red + 256 * green] == task.train.identifiers[-1]
            assert task.train.identifiers[-1].startswith(task.train.classes[target])

    def test_the_seed_of_the_order_draws_them(self) -> None:
        def drawn(order: Any) -> list[list[str]]:
            stream = streams.load("digits", order=order, repeat=0.4)
            return [task.train.classes[2:] for task in stream]

        assert drawn(3) == drawn("3") != drawn(4)
        assert drawn("alphabetical") != drawn(3)
        assert streams.load("digits", repeat=0.4).name == "digits (repeat 0.4)"
        assert streams.with_repeats(streams.digits(), 0.0).name == "digits"

    def test_tasks_of_the_same_classes_have_none_to_bring_back(self) -> None:
        with pytest.raises(DualLoRAError, match="every task has them all"):
            streams.with_repeats(streams.load("digits", domains=("photo", "edges")), 0.1)

    def test_joint_training_sees_the_same_images(self) -> None:
        base = streams.split(Numbered(6, 5), 3)
        joint = streams.all_at_once(streams.with_repeats(base, 0.5)).tasks[0]
        assert sorted(joint.train.identifiers) == sorted(
            name for task in base for name in task.train.identifiers
        )
        assert joint.train.classes == list(base.class_order)

    def test_a_run_counts_every_test_image_once(self, tmp_path: Path) -> None:
        """A class taught again has rows in two tasks, and its test images stay with the first."""
        stream = streams.load("digits", tasks=3, classes=6, train_per_class=6, repeat=0.5)
        results = run(stream, tmp_path)
        assert [len(task["classes"]) for task in results["tasks"]] == [2, 3, 4]
        assert [task["test_images"] for task in results["tasks"]] == [len(task.test) for task in stream]
        assert results["final_accuracy"] > 1 / 6


class TestDomains:
    def test_a_run_over_domains_that_lack_a_class(self, tmp_path: Path) -> None:
        write_domainnet(tmp_path)
        results = run(streams.load("domainnet", data=tmp_path), tmp_path / "run")
        assert [task["name"] for task in results["tasks"]][2] == "painting"
        assert [len(task["classes"]) for task in results["tasks"]] == [4, 4, 3, 4, 4, 4]
        assert results["tasks"][2]["test_images"] == 8

    def test_a_class_that_no_earlier_domain_taught_is_not_tested(self, tmp_path: Path) -> None:
        rows = [("a.png", "ant", "train", "one"), ("b.png", "ant", "test", "one")]
        rows += [("c.png", "bee", "test", "one"), ("d.png", "bee", "train", "two")]
        rows += [("e.png", "bee", "test", "two"), ("f.png", "ant", "test", "two")]
        table = write_table(tmp_path / "t.csv", ("path", "label", "split", "domain"), rows)
        for name, label, *_ in rows:
            save(tmp_path / name, label == "bee")
        one, two = streams.load(str(table), order="alphabetical")
        assert one.test.identifiers == ["b.png"]
        assert two.train.classes == ["bee"]
        assert two.test.identifiers == ["e.png", "f.png"]
        assert [two.test.classes[target] for target in two.test.targets] == ["bee", "ant"]

    def test_options_that_divide_classes_do_not_fit(self, tmp_path: Path) -> None:
        write_domainnet(tmp_path)
        for option in ({"tasks": 5}, {"first_classes": 2}, {"repeat": 0.1}):
            with pytest.raises(DualLoRAError, match="or pool them with the scenario class"):
                streams.load("domainnet", data=tmp_path, **option)  # type: ignore[arg-type]
        assert len(streams.load("domainnet", data=tmp_path, tasks=6)) == 6
        shown = streams.load("domainnet", data=tmp_path, domains=("photo", "edges"))
        assert [len(task.train) for task in shown] == [69, 69]


class TestTables:
    def images(self, folder: Path, classes: int = 2, each: int = 5) -> list[tuple[str, str]]:
        rows = [(f"images/{c}-{i}.png", f"class {c}") for c in range(classes) for i in range(each)]
        for c, (path, _) in enumerate(rows):
            save(folder / path, c // each)
        return rows

    def test_path_and_label_are_enough(self, tmp_path: Path) -> None:
        table = write_table(tmp_path / "shapes.csv", ("path", "label"), self.images(tmp_path)[::-1])
        stream = streams.load(str(table), tasks=2, order="alphabetical")
        assert (stream.name, stream.class_order) == ("shapes", ("class 0", "class 1"))
        assert stream.tasks[0].test.identifiers == ["images/0-4.png"]
        assert len(streams.load(f"folder:{table}", tasks=1).tasks[0].train) == 8

    def test_columns_come_in_any_order(self, tmp_path: Path) -> None:
        rows = [
            ("val" if i % 5 > 2 else "Train", label, path)
            for i, (path, label) in enumerate(self.images(tmp_path))
        ]
        table = write_table(tmp_path / "a.csv", ("split", " label", "path"), rows)
        table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
        stream = streams.load(str(table), tasks=2, order="alphabetical")
        assert stream.tasks[1].test.identifiers == ["images/1-3.png", "images/1-4.png"]
        held = streams.load(str(table), tasks=2, order="alphabetical", holdout=1)
        assert held.tasks[1].test.identifiers == ["images/1-2.png"]

    def test_domains_come_as_they_appear(self, tmp_path: Path) -> None:
        rows = [(*row, ("night", "day")[i % 2]) for i, row in enumerate(self.images(tmp_path, each=12))]
        table = write_table(tmp_path / "a.csv", ("path", "label", "domain"), rows)
        stream = streams.load(str(table))
        assert [task.name for task in stream] == ["night", "day"]
        assert [(len(task.train), len(task.test)) for task in stream] == [(10, 2), (10, 2)]
        assert len(streams.load(str(table), scenario="class", tasks=2).tasks[0].train.classes) == 1

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("file,label\na.png,x\n", r"the first line of .* is file,label: it must be path,label"),
            ("path,label,extra\na.png,x,1\n", "it must be path,label and may go on"),
            ("", "is empty: it must be"),
            ("path,label\n", "names no image"),
            ("path,label\na.png\n", r"line 2 of .* has not 2 fields"),
            ("path,label\na.png,x,y\n", r"line 2 of .* has not 2 fields"),
            ("path,label\na.png,\n", r"line 2 of .* has no label"),
            ("path,label,domain\na.png,x,\n", r"line 2 of .* has no domain"),
            ("path,label,split\na.png,x,dev\n", "has the split 'dev': it must be train, test or val"),
            ("path,label\na.png,x\na.png,y\n", r"line 3 of .* names a\.png a second time"),
            ("path,label\na.png,x\nb.png,x\n", r"names 1 of 2 images that are not in .* b\.png"),
            ("path,label,split\na.png,x,test\nc.png,x,val\n", "images of both test and val"),
            (
                "path,label,domain\na.png,x,one\nc.png,x,two\n",
                r"one \(x\) has no image to test on",
            ),
            ("path,label,split\na.png,x,train\nc.png,y,test\n", "1 classes that the training set has not"),
        ],
    )
    def test_bad_tables_are_refused_by_line(self, text: str, message: str, tmp_path: Path) -> None:
        save(tmp_path / "a.png", 0)
        save(tmp_path / "c.png", 0)
        table = tmp_path / "t.csv"
        table.write_text(text)
        with pytest.raises(DualLoRAError, match=message):
            streams.load(str(table), tasks=1 if "domain" not in text else None)

    def test_a_domain_that_is_only_tested_is_refused(self, tmp_path: Path) -> None:
        rows = [
            ("a.png", "ant", "train", "one"),
            ("b.png", "ant", "test", "one"),
            ("c.png", "ant", "test", "two"),
        ]
        for name, *_ in rows:
            save(tmp_path / name, 0)
        table = write_table(tmp_path / "t.csv", ("path", "label", "split", "domain"), rows)
        with pytest.raises(DualLoRAError, match="the domain 'two' has no image to train on"):
            streams.load(str(table))

    def test_a_file_that_is_no_text_is_refused(self, tmp_path: Path) -> None:
        table = tmp_path / "t.csv"
        table.write_bytes(b"path,label\n\xff\xfe,1\n")
        with pytest.raises(DualLoRAError, match="cannot be read as a CSV file: save it as UTF-8"):
            streams.load(str(table))


def run(stream: streams.Stream, out: Path) -> dict[str, Any]:
    """The results of a method that trains nothing."""
    config = small_config("ncm")
    return run_stream(
        lambda: new_learner(config), stream, out, {}, device="cpu", progress=Progress(quiet=True)
    )

"""Small data sets in the real format of every listed stream.

The colour of an image says what it is: red is its class (``red`` of its place among the sorted names of the
fixture), green is 255 for an image to test on and 0 for one to train on, where the split is not ours to make.
"""

from __future__ import annotations

import csv
import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from duallora.streams import Stream

TRAIN, TEST = 0, 255
SESSIONS = range(1, 12)
DOMAINNET = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
OFFICE_HOME = ("Art", "Clipart", "Product", "Real World")
WNIDS = ("n01443537", "n01484850", "n02056570", "n09472597")


@dataclass(frozen=True)
class Small:
    """A small data set.

    Attributes:
        write: writes it below a data folder and returns what to load, where that is not its name.
        classes: all class names, sorted.
        train: images to train on, of all classes and domains.
        test: images to test on.
        domains: in the order of the tasks; empty where classes are divided among tasks.
        official: whether green says which images are to test on.
        coloured: whether red says the class.
    """

    write: Callable[[Path, pytest.MonkeyPatch], str | None]
    classes: tuple[str, ...]
    train: int
    test: int
    domains: tuple[str, ...] = ()
    official: bool = True
    coloured: bool = True


def counts(stream: Stream) -> tuple[int, int]:
    """Images to train on and to test on."""
    return sum(len(task.train) for task in stream), sum(len(task.test) for task in stream)


def red(target: int) -> int:
    return 10 + 20 * target


def picture(target: int, green: int = TRAIN, size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), (red(target), green, 0))


def save(path: Path, target: int, green: int = TRAIN) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(target, green).save(path)


def write_cifar(data: Path, monkeypatch: pytest.MonkeyPatch, name: str, each: int = 6) -> Path:
    """The pickled batches of CIFAR, whose checksums torchvision is told to expect."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = data / name / kind.base_folder
    folder.mkdir(parents=True)
    names = FIXTURES[name].classes
    batches = [entry[0] for entry in kind.train_list]
    sums = {}
    for batch in [*batches, kind.test_list[0][0]]:
        green = TEST if "test" in batch else TRAIN
        count = 2 if green else each // len(batches) or 1
        labels = [i % len(names) for i in range(count * len(names))][::-1]
        pixels = [np.asarray(picture(t, green, 32)).transpose(2, 0, 1).ravel() for t in labels]
        key = "labels" if name == "cifar10" else "fine_labels"
        content = {"data": np.stack(pixels), key: labels, "batch_label": batch}
        sums[batch] = _dump(folder / batch, content)
    content = {kind.meta["key"]: list(names)}
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": _dump(folder / kind.meta["filename"], content)})
    for table in ("train_list", "test_list"):
        monkeypatch.setattr(kind, table, [[batch, sums[batch]] for batch, _ in getattr(kind, table)])
    return folder


def _dump(path: Path, content: object) -> str:
    path.write_bytes(pickle.dumps(content, protocol=2))
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_imagenet_r(data: Path, _: pytest.MonkeyPatch | None = None) -> None:
    root = data / "imagenet-r"
    for target, wnid in enumerate(WNIDS):
        for i in range(10):
            save(root / wnid / f"{('art', 'cartoon', 'sketch')[i % 3]}_{i}.jpg", target)
    (root / "README.txt").write_text("ImageNet-R")


def write_split_lists(folder: Path, test: int = 3) -> Path:
    """The two public lists, which name the last images of each class to test on."""
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        names, targets = [], []
        for target, wnid in enumerate(WNIDS):
            kept = range(test, 10) if part == "train" else range(test)
            for i in kept:
                names.append(f"data/imagenet-r/{wnid}/{('art', 'cartoon', 'sketch')[i % 3]}_{i}.jpg")
                targets.append(target)
        lines = ["data:", *(f"- {name}" for name in names), "targets:", *(f"- {t}" for t in targets)]
        (folder / f"imagenet-r_{part}.yaml").write_text("\n".join(lines) + "\n")
    return folder


def write_tiny_imagenet(data: Path, _: pytest.MonkeyPatch | None = None) -> None:
    root = data / "tiny-imagenet" / "tiny-imagenet-200"
    rows = []
    for target, wnid in enumerate(WNIDS):
        for i in range(4):
            save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", target)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
        for i in range(2):
            name = f"val_{2 * target + i}.JPEG"
            save(root / "val" / "images" / name, target, TEST)
            rows.append(f"{name}\t{wnid}\t0\t32\t44\t62")
    save(root / "test" / "images" / "test_0.JPEG", 0)
    (root / "val" / "val_annotations.txt").write_text("\n".join(reversed(rows)) + "\n")
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)))
    (root / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\n")


def write_cub(data: Path, _: pytest.MonkeyPatch | None = None) -> None:
    root = data / "cub200" / "CUB_200_2011"
    names = FIXTURES["cub200"].classes
    images, labels, parts = [], [], []
    for target, name in enumerate(names):
        for i in range(5):
            number, key = len(images) + 1, f"{name}/{name[4:]}_{i:04d}_{i}.jpg"
            save(root / "images" / key, target, TEST if i % 2 else TRAIN)
            images.append(f"{number} {key}")
            labels.append(f"{number} {target + 1}")
            parts.append(f"{number} {0 if i % 2 else 1}")
    classes = [f"{i} {name}" for i, name in enumerate(names, start=1)]
    lists = {
        "images": images,
        "image_class_labels": labels,
        "train_test_split": parts,
        "classes": classes,
        "bounding_boxes": ["1 60.0 27.0 325.0 304.0"],
    }
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")


def write_domainnet(data: Path, _: pytest.MonkeyPatch | None = None) -> None:
    """As in the real lists, one class has no training image among the paintings."""
    root = data / "domainnet"
    for domain in DOMAINNET:
        for part, count in (("train", 3), ("test", 2)):
            lines = []
            for target, name in enumerate(FIXTURES["domainnet"].classes):
                if (domain, part, name) == ("painting", "train", "t-shirt"):
                    continue
                for i in range(count):
                    key = f"{domain}/{name}/{domain}_{target:03d}_{part}{i:06d}.jpg"
                    save(root / key, target, TEST if part == "test" else TRAIN)
                    lines.append(f"{key} {target}")
            (root / f"{domain}_{part}.txt").write_text("\n".join(lines) + "\n")


def write_core50(data: Path, _: pytest.MonkeyPatch | None = None) -> None:
    """Objects 1, 6 and 50; sessions to test on have ten frames, so two tasks get two of a video."""
    names = FIXTURES["core50"].classes
    for session in SESSIONS:
        testing = session in (3, 7, 10)
        for number, name in ((1, "plug_adapter1"), (6, "mobile_phone1"), (50, "remote_control5")):
            for i in range(10 if testing else 3):
                folder = data / "core50" / "core50_128x128" / f"s{session}" / f"o{number}"
                target = names.index(name)
                save(folder / f"C_{session:02d}_{number:02d}_{i:03d}.png", target, TEST * testing)


def write_office_home(data: Path, _: pytest.MonkeyPatch | None = None, real: str = "Real World") -> None:
    root = data / "office-home" / "OfficeHomeDataset_10072016"
    for domain in (*OFFICE_HOME[:3], real):
        for target, name in enumerate(FIXTURES["office-home"].classes):
            for i in range(5):
                save(root / domain / name / f"{i + 1:05d}.jpg", target)
    (root / "ImageInfo.csv").write_text("Art,Alarm_Clock,1\n")


def write_parts(root: Path, classes: Sequence[str], second: str = "test") -> None:
    for target, name in enumerate(classes):
        for part, count in (("train", 4), (second, 2)):
            for i in range(count):
                save(root / part / name / f"{i}.jpg", target, TEST if part == second else TRAIN)


def write_archive(name: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    place = "vtab-cil/vtab" if name == "vtab" else name
    return lambda data, _: write_parts(data / place, FIXTURES[name].classes)


def write_folder(data: Path, _: pytest.MonkeyPatch | None = None) -> str:
    write_parts(data / "own", FIXTURES["folder:PATH"].classes, "val")
    return f"folder:{data / 'own'}"


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    """A table, without the images that it names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_hub(data: Path, _: pytest.MonkeyPatch | None = None) -> str:
    """What the library's ``save_to_disk`` writes, with the labels of ``test`` hidden."""
    datasets = pytest.importorskip("datasets")
    names = list(FIXTURES["hf:NAME"].classes)
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "img": datasets.Image(),
            "coarse": datasets.ClassLabel(names=["animal", "thing"]),
            "kind": datasets.ClassLabel(names=names),
        }
    )
    splits = {}
    for split, each in (("train", 4), ("validation", 2), ("test", 1)):
        targets = [t for t in range(len(names)) for _ in range(each)]
        green = TRAIN if split == "train" else TEST
        rows = {
            "id": [f"{split}{i}" for i in range(len(targets))],
            "img": [picture(t, green) for t in targets],
            "coarse": [0] * len(targets),
            "kind": [-1] * len(targets) if split == "test" else targets,
        }
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(str(data / "saved"))
    return f"hf:{data / 'saved'}"


def nothing(_: Path, __: pytest.MonkeyPatch) -> None:
    """Streams that come with the package need no files."""


def _cifar(name: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def write(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_cifar(data, monkeypatch, name)

    return write


_TEN = tuple(str(i) for i in range(10))
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = ("apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle")
_BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
_THINGS = ("The_Eiffel_Tower", "aircraft_carrier", "t-shirt", "zebra")
_OBJECTS = ("mobile_phone1", "plug_adapter1", "remote_control5")
_OFFICE = ("Alarm_Clock", "Backpack", "Batteries")
_ANIMALS = ("ant", "bee", "cat", "dog", "elk")

FIXTURES: dict[str, Small] = {
    "digits": Small(nothing, _TEN, 1442, 355, official=False, coloured=False),
    "permuted-digits": Small(
        nothing,
        tuple(f"p{p:02d}-{digit}" for p in range(10) for digit in range(10)),
        14420,
        3550,
        official=False,
        coloured=False,
    ),
    "cifar100": Small(_cifar("cifar100"), _CIFAR100, 60, 20),
    "cifar10": Small(_cifar("cifar10"), _CIFAR10, 50, 20),
    "imagenet-r": Small(write_imagenet_r, WNIDS, 32, 8, official=False),
    "tiny-imagenet": Small(write_tiny_imagenet, WNIDS, 16, 8),
    "cub200": Small(write_cub, _BIRDS, 9, 6),
    "domainnet": Small(write_domainnet, _THINGS, 6 * 12 - 3, 6 * 8, DOMAINNET),
    "core50": Small(write_core50, _OBJECTS, 8 * 9, 3 * 30, ("s1", "s2", "s4", "s5", "s6", "s8", "s9", "s11")),
    "office-home": Small(write_office_home, _OFFICE, 4 * 12, 4 * 3, OFFICE_HOME, official=False),
    "imagenet-a": Small(write_archive("imagenet-a"), WNIDS, 16, 8),
    "objectnet": Small(write_archive("objectnet"), ("alarm_clock", "backpack"), 8, 4),
    "omnibenchmark": Small(write_archive("omnibenchmark"), ("0", "1", "10", "2"), 16, 8),
    "vtab": Small(write_archive("vtab"), ("0", "1", "10", "11", "2"), 20, 10),
    "folder:PATH": Small(write_folder, _ANIMALS, 20, 10),
    "hf:NAME": Small(write_hub, _ANIMALS, 20, 10),
}

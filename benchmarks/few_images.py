"""How many images a class needs: some classes of up to 100 images, then as many of n each.

    python benchmarks/few_images.py digits NAME=FOLDER ... [--out results/few_images.json]

FOLDER holds images in ``train/<class>/`` and ``val/<class>/``. Of every stream, up to 40 classes are drawn by
the seed: one half is learned from up to 100 images a class, then the other half from n of each. Nothing is
trained: one pass of the embedded backbone, then class rows on what the package reads, gate rows at the first
adapted layer, and heads that start as classifiers of their rows. For each of them the recall of the classes
of many images and that of the classes of few (the gate: of their tasks), with

- plain: every row's mean as it was found;
- constant: the same, ``tr(S) / (2 n)`` added to the score of a row of n images;
- package: rows of few images count with a share of their distance from the centre.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duallora.backbones.backbone import Backbone, load_backbone
from duallora.classifiers.class_statistics import ClassMoments, ClassStatistics, shrunk
from duallora.data.images import read_image
from duallora.data.transforms import evaluation_transform
from duallora.storage.atomic import write_atomic
from duallora.streams import digits

CPU = torch.device("cpu")
NUMBERS = (1, 2, 3, 5, 10, 20, 50, 100)
MANY, TESTED, CLASSES = 100, 40, 40
Looked = tuple[Tensor, Tensor, Tensor]  # features (n, d), gate features (n, d'), labels (n,)
Task = tuple[Tensor, Tensor]  # features (n, d), labels inside the task (n,)


@torch.no_grad()
def looked_at(backbone: Backbone, images: Any, labels: list[int]) -> Looked:
    """One pass over images."""
    view, gate, read = evaluation_transform(backbone.info), [], []

    def keep(_: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        gate.append(torch.cat([x[:, 0], x[:, backbone.num_prefix_tokens :].mean(1)], 1))

    handle = backbone.attention(max(1, backbone.depth // 3)).register_forward_pre_hook(keep)
    images = iter(images)
    while batch := list(islice(images, 64)):
        read.append(backbone(torch.stack([view(image) for image in batch])))
    handle.remove()
    return torch.cat(read), torch.cat(gate), torch.tensor(labels)


def stream(backbone: Backbone, folder: Path | None) -> tuple[Looked, Looked]:
    """Images to learn from and to be asked about, of the digits or of a folder."""
    if folder is None:
        task = digits(tasks=1).tasks[0]
        sets = ([task.train[i][0] for i in range(len(task.train))], task.train.targets)
        asked = ([task.test[i][0] for i in range(len(task.test))], task.test.targets)
        return looked_at(backbone, *sets), looked_at(backbone, *asked)
    names = sorted(entry.name for entry in (folder / "train").iterdir())
    found = []
    for part, most in (("train", MANY), ("val", TESTED)):
        files = [
            (file, label) for label, name in enumerate(names)
            for file in sorted((folder / part / name).iterdir())[:most]
        ]  # fmt: skip
        images = (read_image(file) for file, _ in files)
        found.append(looked_at(backbone, images, [label for _, label in files]))
    return found[0], found[1]


def rows_of(tasks: list[Task], rule: str) -> tuple[ClassStatistics, list[tuple[Tensor, Tensor]]]:
    """Rows of two tasks, and the classifiers that their heads would start as, each in its time."""
    rows, heads = ClassStatistics(tasks[0][0].shape[1], CPU), []
    for t, (f, y) in enumerate(tasks):
        rows.replace(t, ClassMoments.of(f, y, int(y.max()) + 1))
        if rule != "package":  # rows saved before there were shares answer without them
            rows.load_state_dict({name: x for name, x in rows.state_dict().items() if name != "shrinks"})
        rows.fit_temperature(t, f, y)
        heads.append(rows.linear(t))
    return rows, heads


def sampling_error(rows: ClassStatistics) -> Tensor:
    """``tr(S) / (2 n)`` of every row (R,)."""
    found = rows.moments.scatter / rows.freedom
    trace = float(torch.linalg.solve(shrunk(rows.moments.scatter, rows.freedom), found).trace())
    return (trace / (2 * rows.moments.count)).float()


def recalls(train: Looked, test: Looked, seed: int, n: int) -> dict[str, tuple[float, float]]:
    """Recall of the classes of many and of few images, by reader and rule."""
    generator = torch.Generator().manual_seed(seed)
    labels = int(train[2].max()) + 1
    half = min(labels, CLASSES) // 2
    classes = torch.randperm(labels, generator=generator)[: 2 * half].tolist()
    order = torch.randperm(len(train[2]), generator=generator)
    chosen = [order[train[2][order] == c][: MANY if k < half else n] for k, c in enumerate(classes)]
    kept = torch.cat([(test[2] == c).nonzero()[:TESTED, 0] for c in classes])
    truth = torch.tensor([classes.index(int(c)) for c in test[2][kept]])
    few = truth >= half
    found = {}

    def note(name: str, right: Tensor) -> None:
        found[name] = (float(right[~few].double().mean()), float(right[few].double().mean()))

    for rule in ("plain", "constant", "package"):
        for reader in (0, 1):
            tasks = []
            for own in (chosen[:half], chosen[half:]):
                y = torch.cat([torch.full((len(i),), k) for k, i in enumerate(own)])
                tasks.append((train[reader][torch.cat(own)], y))
            rows, heads = rows_of(tasks, rule)
            more = sampling_error(rows) if rule == "constant" else torch.zeros(2 * half)
            f = test[reader][kept]
            log_q = (rows.kappa * (rows.scores(f) + more)).log_softmax(1)
            if reader == 1:
                note(f"gate {rule}", rows.by_task(log_q).argmax(1) == few.long())
                continue
            note(f"rows {rule}", log_q.argmax(1) == truth)
            weight, bias = (torch.cat(part) for part in zip(*heads, strict=True))
            note(f"heads {rule}", (f @ weight.T + bias + rows.kappa * more).argmax(1) == truth)
    return found


def main() -> None:
    """Measures all streams that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("streams", nargs="+", metavar="digits or NAME=FOLDER")
    parser.add_argument("--out", type=Path, default=Path("results/few_images.json"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    backbone = load_backbone("embedded")
    figures: dict[str, Any] = {}
    for named in arguments.streams:
        name, _, folder = named.partition("=")
        train, test = stream(backbone, Path(folder) if folder else None)
        for n in NUMBERS:
            runs = [recalls(train, test, seed, n) for seed in range(arguments.seeds)]
            figures.setdefault(name, {})[str(n)] = {
                key: {"many": [run[key][0] for run in runs], "few": [run[key][1] for run in runs]}
                for key in runs[0]
            }
            shown = {
                key: tuple(f"{sum(v) / len(v):.3f}" for v in x.values())
                for key, x in figures[name][str(n)].items()
            }
            print(name, n, shown, flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.out, (json.dumps(figures, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

"""Makes the folder of the *mixed* stream for ``duallora run`` and ``compare``: links, no images.

    python benchmarks/mixed.py DATA OUT

DATA is that of ``benchmarks/adapters.py``. OUT gets ``train/`` and ``val/`` with one link a class, named so
that their alphabetical order is that of the stream: traffic signs in 8 tasks, seedlings in 4, twenty classes
of Tiny-ImageNet in 2. The options that go with it are printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from adapters import mixed_parts


def link(data: Path, out: Path) -> list[int]:
    """Makes the links and gives the numbers of classes of the tasks.

    Raises:
        FileExistsError: OUT has links already.
    """
    parts = mixed_parts(data, "val", 60)
    classes = [(source, name) for source, part in parts.items() for name in part.class_order]
    for number, (source, name) in enumerate(classes):
        for split in ("train", "val"):
            place = out / split / f"{number:02d}-{name}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to((data / source / split / name).resolve(), target_is_directory=True)
    return [len(task.train.classes) for part in parts.values() for task in part]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    sizes = ",".join(map(str, link(given.data, given.out)))
    print(f"--stream {given.out} --order alphabetical --tasks {sizes} --augment crop")

"""ImageNet-R: renditions of 200 ImageNet classes, with the public split or a seeded one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from duallora.data.images import find_images
from duallora.errors import DualLoRAError
from duallora.storage.regular import read_text
from duallora.streams.collection import UNSURE, Collection, Part, Request, StreamEntry
from duallora.streams.listed import Labelled, ListedImages, stratified

_LISTS = ("imagenet-r_train.yaml", "imagenet-r_test.yaml")
_WNID = re.compile(r"n\d{8}")


def load_imagenet_r(request: Request) -> Collection:
    """Finds the images and divides them: by published lists, by ``train/`` and ``test/``, or by a seed.

    An image is known by ``wnid/file``, wherever in the folder it lies.

    Raises:
        DualLoRAError: the images or the lists are missing, or do not fit together.
    """
    root = request.root()
    paths = {f"{path.parent.name}/{path.name}": path for path in find_images(root)}
    paths = {key: path for key, path in paths.items() if _WNID.fullmatch(path.parent.name)}
    if not paths:
        raise request.missing(f"{root} has no folders of images named by a WordNet id (such as n01443537)")
    if request.split_lists is not None:
        parts = _listed(request.split_lists, paths, root)
        split = f"split lists, {len(parts[0]):,} + {len(parts[1]):,}"
    elif all((root / part).is_dir() for part in ("train", "test")):
        parts = [
            _labelled([key for key, path in paths.items() if (root / part) in path.parents])
            for part in ("train", "test")
        ]
        split = "train/ and test/ as found"
    else:
        parts = list(stratified(_labelled(list(paths))))
        split = "seeded 80/20 split"
    train, test = (ListedImages(root, part, paths) for part in parts)
    return Collection(f"{request.entry.name} ({split})", (Part("", train, test),))


def _labelled(keys: list[str]) -> list[Labelled]:
    return [(key, key.partition("/")[0]) for key in keys]


def _listed(lists: Path, paths: dict[str, Path], root: Path) -> list[list[Labelled]]:
    parts = []
    for name in _LISTS:
        keys = _read_list(lists / name)
        missing = [key for key in keys if key not in paths]
        if missing:
            raise DualLoRAError(
                f"{lists / name} names {len(missing)} of {len(keys)} images that are not in {root}, the "
                f"first is {missing[0]}: unpack imagenet-r.tar again"
            )
        parts.append(_labelled(keys))
    both = sorted(set(parts[0]) & set(parts[1]))
    if both:
        raise DualLoRAError(
            f"the lists in {lists} have {len(both)} images in common, the first is {both[0][0]}: an image to "
            "test on must not be trained on, take the published lists"
        )
    return parts


def _read_list(path: Path) -> list[str]:
    """The keys ``wnid/file`` of a published list."""
    import yaml  # type: ignore[import-untyped]

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        content = yaml.load(read_text(path), Loader=loader)
    except FileNotFoundError as error:
        raise DualLoRAError(
            f"{path} does not exist: put {' and '.join(_LISTS)} into one folder and name it, or leave the "
            "lists out for a seeded split"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DualLoRAError(f"{path} is not a readable YAML file: fetch the published list again") from error
    names = content.get("data") if isinstance(content, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and "/" in n for n in names):
        raise DualLoRAError(
            f"{path} has no list `data` of paths .../wnid/file: fetch the published list again"
        )
    keys = ["/".join(name.split("/")[-2:]) for name in names]
    if len(set(keys)) < len(keys):
        raise DualLoRAError(f"{path} names an image twice: fetch the published list again")
    return keys


IMAGENET_R = StreamEntry(
    name="imagenet-r",
    summary="renditions (paintings, sculptures, sketches, ...) of ImageNet classes",
    classes="200",
    images="24,000 + 6,000",
    size="2 GB",
    licence=UNSURE,
    load=load_imagenet_r,
    page="https://github.com/hendrycks/imagenet-r",
    files="imagenet-r.tar",
    folder="imagenet-r",
    places=("imagenet-r/imagenet-r", "imagenet-r"),
    layout=("<wnid>/<file>.jpg, 200 folders such as n01443537/",),
    notes=(
        "The public split of 24,000 and 6,000 images is read from its two lists, imagenet-r_train.yaml and "
        "imagenet-r_test.yaml, which the CODA-Prompt repository holds among others: put both into one folder "
        "and name it with --split-lists. Images are matched by wnid/file.",
        "Without them the images are divided 80/20 by a seed, class by class, or as train/ and test/ where a "
        "repacked archive has them; the stream's name says which.",
        "Published with class orders alphabetical and 1993.",
    ),
    takes_lists=True,
)

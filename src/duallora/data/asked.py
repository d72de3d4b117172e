"""Batches of whatever a caller wants to have looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duallora.data.assembly import Chunk
from duallora.data.loader import ImageLoader
from duallora.data.one_by_one import one_by_one
from duallora.data.transforms import EvaluationTransform

Asked = tuple[Tensor, list[str | None]]
"""Preprocessed images (B, 3, H, W), and the files they came from."""


def asked(images: Any, loader: ImageLoader, view: EvaluationTransform, size: int) -> Iterator[Asked]:
    """Batches of images: files that are all known are read in parallel, all else one image after another.

    Args:
        images: as for :func:`one_by_one`; nothing is held of it beside one batch.
        loader: reads the files.
        view: of every image.
        size: of a batch.

    Raises:
        DualLoRAError: an image cannot be read.
    """
    if isinstance(images, list | tuple) and all(isinstance(image, str | Path) for image in images):
        return _files(images, loader, view, size)
    return _others(one_by_one(images), view, size)


class _Files:
    """Image files as samples."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[str | Path, None]:
        return self._paths[index], None


def _files(
    paths: Sequence[str | Path], loader: ImageLoader, view: EvaluationTransform, size: int
) -> Iterator[Asked]:
    chunks = [
        Chunk(tuple(range(start, min(start + size, len(paths))))) for start in range(0, len(paths), size)
    ]
    with (
        loader.reading(_Files(paths), view) as source,
        closing(loader.batches(source, chunks, len(paths))) as found,
    ):
        for chunk, batch in zip(chunks, found, strict=True):
            yield batch, [str(paths[position]) for position in chunk.positions]


def _others(images: Iterator[Any], view: EvaluationTransform, size: int) -> Iterator[Asked]:
    views: list[Tensor] = []
    paths: list[str | None] = []
    for image in images:
        views.append(view(image))
        paths.append(str(image) if isinstance(image, (str, Path)) else None)
        if len(views) == size:
            yield torch.stack(views), paths
            views, paths = [], []
    if views:
        yield torch.stack(views), paths

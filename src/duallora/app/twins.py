"""Pictures that two new classes were both given: the same bytes, or nearly the same picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from duallora.app.seen_file import Seen

MOST = 1_000
"""Pairs that are looked for; with more of them the classes are mixed up as a whole."""

_NEAR = 3  # bits of 64 that two views of one picture may differ in
_SAME_COLOURS = 16.0  # of 255: mean difference of two 8 x 8 thumbnails
_ROWS = 256  # pictures that are compared with all others at once
_PAIRS = 8_192  # pairs whose colours are compared at once
_MOST_COMPARED = 1 << 20  # pairs whose colours are compared at all


@dataclass(frozen=True)
class Twins:
    """Two classes were given the same picture, or nearly.

    Attributes:
        first: class and file.
        second: class and file.
        exact: whether the bytes are the same.
    """

    first: tuple[str, str]
    second: tuple[str, str]
    exact: bool


def find_twins(classes: Sequence[tuple[str, Sequence[Seen]]]) -> list[Twins]:
    """Pictures that two classes were both given, at most ``MOST`` pairs of either kind.

    Nearly is a difference hash (8 x 8) of at most 3 other bits and thumbnails of about the same colours;
    pictures without structure are compared by their bytes alone.

    Args:
        classes: name and readable images of each.
    """
    owned = [(name, seen) for name, images in classes for seen in images]
    found = dict.fromkeys(islice(_same_bytes([seen.digest for _, seen in owned]), MOST), True)
    hashed = [i for i, (_, seen) in enumerate(owned) if seen.hash is not None]
    if hashed:
        bits = np.stack([owned[i][1].hash for i in hashed])  # type: ignore[misc]  # not None, as above
        small = np.stack([owned[i][1].thumbnail for i in hashed])  # type: ignore[misc]
        sizes = [sum(seen.hash is not None for seen in images) for _, images in classes]
        for a, b in islice(_near_pairs(bits, small, sizes), MOST):
            found.setdefault((hashed[a], hashed[b]), False)
    return [
        Twins((owned[i][0], owned[i][1].name), (owned[j][0], owned[j][1].name), exact)
        for (i, j), exact in sorted(found.items())
    ]


def _same_bytes(digests: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Positions of the same bytes, the first before the second; within a class nothing is there twice."""
    places: dict[str, list[int]] = defaultdict(list)
    for j, digest in enumerate(digests):
        for i in places[digest]:
            yield i, j
        places[digest].append(j)


def _near_pairs(bits: np.ndarray, small: np.ndarray, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Positions of pictures of two classes that are nearly the same, the first before the second.

    Args:
        bits: hashes (n, 64), class by class.
        small: thumbnails (n, 192).
        sizes: how many of the pictures each class has. Pictures of one class are not compared: those of a
            burst or a film are all alike, and every pair of them would be a find.
    """
    ones, left = bits.sum(1), _MOST_COMPARED
    ends = np.cumsum(sizes)
    for begin, end in zip(ends - sizes, ends, strict=True):
        for start in range(begin, end, _ROWS):
            stop = min(start + _ROWS, end)
            distance = ones[start:stop, None] + ones[end:] - 2 * bits[start:stop] @ bits[end:].T
            first, second = np.nonzero(distance <= _NEAR)
            for part in range(0, len(first), _PAIRS):
                i, j = first[part : part + _PAIRS] + start, second[part : part + _PAIRS] + end
                alike = np.abs(small[i] - small[j]).mean(1) <= _SAME_COLOURS
                yield from zip(i[alike].tolist(), j[alike].tolist(), strict=True)
                left -= len(i)
                if left <= 0:
                    return

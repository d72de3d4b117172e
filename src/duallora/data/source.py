"""A data set as the loader reads it: views of its images as bytes, from what is kept where it can be."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from duallora.data.image_memory import Bytes, Region
from duallora.data.images import to_pil
from duallora.data.transforms import Augmentation, EvaluationTransform

Keep = Literal["images", "views", "nothing"]

_NO_ROOM = -1


class Samples(Protocol):
    """What is read: ``samples[i][0]`` is an image, a tensor or a path."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Source:
    """Views of a data set's images, the same in every process.

    Args:
        samples: the data set.
        evaluation: the view without an epoch.
        augmentation: the view in an epoch; None where there are no epochs.
        keep: decoded images, from which every view is made; evaluation views, which are smaller and final;
            or nothing.
        region: where they are kept.
    """

    def __init__(
        self,
        samples: Samples,
        evaluation: EvaluationTransform,
        augmentation: Augmentation | None,
        keep: Keep,
        region: Region,
    ) -> None:
        self.samples, self.evaluation, self.augmentation = samples, evaluation, augmentation
        # An augmentation that changes nothing is the evaluation view.
        self._plain = augmentation is None or augmentation.policy == "none"
        self.keep: Keep = "views" if keep == "images" and self._plain else keep
        self.region = region
        # Per image where it begins, 0 for none, and its width and height.
        place = None if keep == "nothing" else region.take(len(samples) * 3 * 8, image=False)
        if place is None:
            self.keep, place = "nothing", 0
        self.table_place = place

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict[str, Any]:
        """Without the region, which workers have already."""
        return {name: value for name, value in self.__dict__.items() if name != "region"}

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a view: height, width, 3."""
        return self.evaluation.height, self.evaluation.width, 3

    def write(self, index: int, epoch: int | None, out: Bytes) -> None:
        """Writes the view of one image in an epoch, or its evaluation view.

        Args:
            index: of the sample.
            epoch: from 0, or None.
            out: (height, width, 3).

        Raises:
            DualLoRAError: the image cannot be read.
        """
        if self.keep == "views":
            found = self._kept(index)
            if found is None:
                out[:] = self.evaluation.pixels(self.samples[index][0])
                self._keep(index, out)
            else:
                out[:] = found
            return
        picture = self._picture(index)
        if epoch is None or self.augmentation is None:
            out[:] = self.evaluation.pixels(picture)
        else:
            out[:] = self.augmentation.pixels(picture, epoch, index)

    def _picture(self, index: int) -> Image.Image:
        found = self._kept(index)
        if found is not None:
            return Image.frombuffer("RGB", found.shape[1::-1], found, "raw", "RGB", 0, 1)
        picture = to_pil(self.samples[index][0])
        if self.keep == "images":
            self._keep(index, np.asarray(picture))
        return picture

    @property
    def _table(self) -> npt.NDArray[np.int64]:
        return self.region.at(self.table_place, len(self) * 3 * 8).view(np.int64).reshape(-1, 3)

    def _kept(self, index: int) -> Bytes | None:
        if self.keep == "nothing":
            return None
        place, width, height = (int(x) for x in self._table[index])
        return None if place <= 0 else self.region.at(place, width * height * 3).reshape(height, width, 3)

    def _keep(self, index: int, pixels: Bytes) -> None:
        if self._table[index, 0] == _NO_ROOM:
            return
        place = self.region.take(pixels.size, image=True)
        if place is None:
            self._table[index, 0] = _NO_ROOM
            return
        self.region.at(place, pixels.size).reshape(pixels.shape)[:] = pixels
        # The place comes last: whoever sees it finds everything else written.
        self._table[index, 1:] = pixels.shape[1::-1]
        self._table[index, 0] = place

"""A stream whose tasks are joined into one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from duallora import streams
from duallora.streams import Stream, TaskDataset, all_at_once
from duallora.streams.domains import with_domains

DIGITS = streams.digits(3, classes=6, train_per_class=5, holdout=2)


def labelled(part: TaskDataset) -> list[tuple[str, str, bytes]]:
    """Identifier, class name and pixels of every sample."""
    samples = (part[i] for i in range(len(part)))
    return [
        (name, part.classes[target], np.asarray(image).tobytes())
        for name, (image, target) in zip(part.identifiers, samples, strict=True)
    ]


@pytest.mark.parametrize(
    "stream", [DIGITS, with_domains(DIGITS, ["photo", "negative"])], ids=lambda s: s.name
)
def test_all_at_once_has_every_image_once_with_its_class(stream: Stream) -> None:
    joined = all_at_once(stream)
    (task,) = joined.tasks
    assert (joined.name, joined.order_seed, joined.augmentation) == (stream.name, 1993, "crop")
    for part in ("train", "test"):
        found: TaskDataset = getattr(task, part)
        assert found.classes == list(stream.class_order) == list(joined.class_order)
        expected = [sample for each in stream for sample in labelled(getattr(each, part))]
        assert Counter(labelled(found)) == Counter(expected)
        assert found.targets == [found[i][1] for i in range(len(found))]
        assert len(found) == sum(len(getattr(each, part)) for each in stream) > 0
        assert set(found.targets) == set(range(6))


def test_a_stream_of_one_task_is_at_once_already() -> None:
    stream = streams.digits(1, classes=2, train_per_class=3, holdout=1)
    assert all_at_once(stream) is stream

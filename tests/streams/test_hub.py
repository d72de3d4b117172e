"""Data sets of Hugging Face by name."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from stream_fixtures import (
    counts,
    write_hub,
)

from duallora import streams
from duallora.errors import DualLoRAError


class TestHub:
    def test_columns_and_splits_are_found(self, tmp_path: Path) -> None:
        stream = streams.load(write_hub(tmp_path), tasks=5, order="alphabetical")
        assert stream.name == f"hf:{tmp_path / 'saved'}"
        assert stream.class_order == ("ant", "bee", "cat", "dog", "elk")
        assert stream.tasks[1].test.identifiers == ["validation/2", "validation/3"]

    def test_a_single_split_and_labels_of_text(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        images = [np.full((4, 4, 3), i, dtype=np.uint8) for i in range(10)]
        table = {"picture": images, "label": ["cat", "ant"] * 5}
        features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("string")})
        datasets.Dataset.from_dict(table, features=features).save_to_disk(str(tmp_path / "one"))
        stream = streams.load(f"hf:{tmp_path / 'one'}", tasks=2, order="alphabetical")
        assert stream.class_order == ("ant", "cat")
        assert counts(stream) == (8, 2)
        assert stream.tasks[1].train[0][0].getpixel((0, 0)) == (0, 0, 0)

    def test_data_sets_without_the_columns_are_refused(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(tmp_path / "text"))
        with pytest.raises(DualLoRAError, match=r"no column of type Image .*text, label"):
            streams.load(f"hf:{tmp_path / 'text'}")
        features = datasets.Features({"image": datasets.Image(), "tags": datasets.Value("string")})
        rows = {"image": [np.zeros((2, 2, 3), dtype=np.uint8)], "tags": ["a"]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "tags"))
        with pytest.raises(DualLoRAError, match=r"no column of type ClassLabel .*image, tags"):
            streams.load(f"hf:{tmp_path / 'tags'}")

    def test_without_the_hub_it_is_one_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        import huggingface_hub

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(DualLoRAError, match=r"hf:someone/something cannot be loaded \(.*\): check") as e:
            streams.load("hf:someone/something")
        assert "\n" not in str(e.value)

    def test_without_the_library_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(DualLoRAError, match=r"pip install 'duallora\[hf\]'"):
            streams.load("hf:cifar10")
        with pytest.raises(DualLoRAError, match="hf: needs a name"):
            streams.load("hf:")

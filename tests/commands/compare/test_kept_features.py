"""The features of the bare backbone, which the runs of a comparison share."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from command_line import Call, assert_refused
from compare_tools import (
    SMALL,
    Started,
    comparable,
    read,
    words_of,
)
from tiny import tiny_backbone

from duallora.backbones.frozen_features import FrozenFeatures


def test_the_features_of_a_comparison_are_read_and_computed_once(
    call: Call, started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass over un-augmented images finds all of them; augmented ones are not looked for."""
    asked: list[bool] = []
    real = FrozenFeatures.lookup

    def spy(self: FrozenFeatures, batch: torch.Tensor) -> torch.Tensor | None:
        found = real(self, batch)
        asked.append(found is not None)
        return found

    monkeypatch.setattr(FrozenFeatures, "lookup", spy)
    assert call(*words_of(tmp_path, "ncm,linear", seeds="0")).code == 0
    assert len(asked) > 8 and all(asked)
    (path,) = (tmp_path / "out").glob("features-*.safetensors")
    backbone = tiny_backbone()
    assert path.name == f"features-{backbone.info.sha256[:12]}-32x32-{backbone.row_dim}.safetensors"
    assert len(FrozenFeatures.load(path, backbone)) == 36
    stamp = path.stat().st_mtime_ns
    assert call(*words_of(tmp_path, "ncm", seeds="1")).code == 0
    assert path.stat().st_mtime_ns == stamp


def test_features_that_cannot_be_read_are_refused_before_the_runs(
    call: Call, started: Started, finished: Path
) -> None:
    (path,) = (finished / "out").glob("features-*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    assert call(*words_of(finished, "ncm")).code == 0  # nothing is missing, so that nothing reads them
    refused = call(*words_of(finished, "ncm", seeds="5"))
    assert_refused(refused, str(path), "no features that can be read", "delete it")
    assert started == []
    path.unlink()
    assert call(*words_of(finished, "ncm", seeds="5")).code == 0


def test_kept_features_of_another_width_are_not_used(
    call: Call, started: Started, finished: Path, tmp_path: Path
) -> None:
    """Those of an earlier version hold the final feature alone; compare passes them by, run refuses them."""
    backbone = tiny_backbone()
    (path,) = (finished / "out").glob("features-*.safetensors")
    old = finished / "out" / f"features-{backbone.info.sha256[:12]}.safetensors"
    kept = safetensors.torch.load_file(path)
    narrow = kept["features"][:, : backbone.feature_dim].contiguous()
    safetensors.torch.save_file({"keys": kept["keys"], "features": narrow}, old)
    path.unlink()
    assert call(*words_of(finished, "ncm", seeds="5")).code == 0
    assert path.exists() and old.exists()
    assert len(FrozenFeatures.load(path, backbone)) == len(kept["keys"])
    words = ["--method", "ncm", "--out", tmp_path / "run", *SMALL, "--features", old]
    refused = call("run", *words)
    assert_refused(
        refused, f"width {backbone.feature_dim}", f"width {backbone.row_dim}", "leave --features out"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method", ["ncm", "frozen"])
def test_kept_features_change_no_result(
    call: Call, finished: Path, monkeypatch: pytest.MonkeyPatch, method: str, bf16: bool
) -> None:
    """Also where the machine would compute in bf16: kept features are in fp32."""
    monkeypatch.setattr("duallora.runtime.compute._computes_in_bf16", lambda _: bf16)
    (path,) = (finished / "out").glob("features-*.safetensors")
    found = []
    for place, words in (("with", ["--features", path]), ("without", [])):
        out = finished / place
        assert call("run", "--method", method, "--epochs", 1, "--out", out, *SMALL, *words).code == 0
        found.append(read(out / "results.json"))
    assert comparable(found[0]) == comparable(found[1])
    assert found[0]["config"] == found[1]["config"]


def test_a_run_with_features_that_are_not_there_is_refused(call: Call, tmp_path: Path) -> None:
    words = ["--method", "ncm", "--out", tmp_path / "run", *SMALL, "--features", tmp_path / "nowhere"]
    assert_refused(call("run", *words), "nowhere holds no features", "leave --features out")
    assert not (tmp_path / "run").exists()

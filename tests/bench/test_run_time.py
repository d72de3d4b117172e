"""Estimates of a run's time: by hand, from a measurement, and from operations that were counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from duallora.bench.run_time import (
    BACKBONE_FLOPS,
    FLOPS_PER_SECOND,
    OPERATIONS,
    Cost,
    Costs,
    Work,
    counted,
    measured,
)
from duallora.errors import DualLoRAError

RESULTS = Path(__file__).resolve().parents[2] / "results"


def rows(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / name / "bench.json").read_text())["rows"]
    return found


def test_a_run_by_hand() -> None:
    costs = Costs({"lora": Cost(prediction=0.01, step=0.1, passes=0.02)}, "made up")
    # 100 images, 3 epochs and the passes; 40 test images, a quarter of them after the first task of four.
    work = Work("lora", 3, train=100, test=40, tasks=4)
    assert work.seconds(costs) == pytest.approx(100 * (3 * 0.1 + 0.02) + (10 + 20 + 30 + 40) * 0.01)
    assert Work("unheard-of", 3, 100, 40, 4).seconds(costs) == work.seconds(costs)


def test_the_operations_are_those_that_the_bench_counted() -> None:
    kept = [row for row in rows("bench-embedded") if (row["tasks"], row["batch"]) == (10, 64)]
    (bare,) = [row["flops_per_image"] for row in kept if row["method"] == "backbone"]
    shown = {row["method"]: row for row in kept if "backbone_passes" in row}
    for method, (prediction, step, passes) in OPERATIONS.items():
        row = shown[method]
        assert prediction == pytest.approx(row["flops_per_image"] / bare, abs=0.01)
        trained = (row.get("training_flops") or 0) / (row.get("training_batch") or 1)
        assert step == pytest.approx(trained / bare, abs=0.01)
        assert passes == pytest.approx(row["backbone_passes"], abs=0.5)
    large = next(row for row in rows("bench-vit-b16") if row["method"] == "backbone")
    assert pytest.approx(large["flops_per_image"], rel=1e-3) == BACKBONE_FLOPS
    seconds = counted().of("lora").prediction
    assert seconds == pytest.approx(OPERATIONS["lora"][0] * BACKBONE_FLOPS / FLOPS_PER_SECOND)


def test_a_measurement_gives_seconds() -> None:
    costs = measured(RESULTS / "bench-vit-b16")
    (row,) = [
        row
        for row in rows("bench-vit-b16")
        if (row["method"], row["tasks"], row["batch"]) == ("duallora", 10, 8)
    ]
    cost = costs.of("duallora")
    assert cost.prediction == row["prediction_seconds"] / 8
    assert cost.step == row["training_seconds"] / row["training_batch"]
    assert cost.passes == (row["prepare_seconds"] + row["consolidate_seconds"]) / row["task_images"]
    assert "cpu" in costs.source and "bench.json" in costs.source and "measured" in costs.source


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "holds no bench.json"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"rows": [], "environment": {"device": "x", "precision": "32"}}', "no training of lora"),
        ('{"rows": [{"task_images": 3}]}', "cannot be read"),
    ],
)
def test_a_measurement_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, content: str | None, part: str
) -> None:
    if content is not None:
        (tmp_path / "bench.json").write_text(content)
    with pytest.raises(DualLoRAError, match=part):
        measured(tmp_path)

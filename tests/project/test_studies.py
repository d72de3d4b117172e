"""The studies under benchmarks/ start: they load what the commands load, every experiment is a method."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from duallora import METHODS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
EXPERIMENTS = sorted((BENCHMARKS / "residual").glob("*.yaml"))


@pytest.fixture(scope="module")
def study() -> Any:
    """The names of residual_run.py."""
    sys.path.insert(0, str(BENCHMARKS))
    yield runpy.run_path(str(BENCHMARKS / "residual_run.py"), run_name="study")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twenty classes of 52 training images: two are learned, 50 are asked about."""
    root = tmp_path_factory.mktemp("images")
    for number in range(20):
        for part, count in (("train", 52), ("val", 1)):
            place = root / part / f"n{number:02}"
            place.mkdir(parents=True)
            for image in range(count):
                pixels = np.full((8, 8, 3), (12 * number, image, 0), np.uint8)
                Image.fromarray(pixels).save(place / f"{image:03}.png")
    return str(root)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_names_a_method_and_streams(path: Path, study: Any) -> None:
    experiment = yaml.safe_load(path.read_text())
    given = dict(experiment["method"])
    METHODS[given.pop("name", "duallora")].config(**study["SCHEDULE"] | given)
    assert set(experiment["streams"]) <= set(study["STREAMS"])
    assert experiment["test"] in ("held_back", "val")


@pytest.mark.parametrize(("name", "tasks"), [("random", 10), ("semantic", 10), ("domains", 5)])
def test_a_stream_is_loaded(name: str, tasks: int, study: Any, folder: str) -> None:
    """Held-back images are those after the training images of each class; val/ is not read."""
    setting = study["load"]({"test": "held_back", "train_per_class": 2}, name, folder)
    assert len(setting.stream) == tasks
    assert sum(len(task.train) for task in setting.stream) == 2 * 20 * (5 if name == "domains" else 1)
    assert sum(len(task.test) for task in setting.stream) == 50 * 20 * (5 if name == "domains" else 1)
    assert setting.augment == "crop,flip"


@pytest.mark.parametrize("script", ["gate", "class_model", "growth", "fuzz", "kill", "residual", "serve"])
def test_a_script_explains_itself(
    script: str, study: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything it imports is there."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out

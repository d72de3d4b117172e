"""The studies under benchmarks/ start: they load what the commands load, every experiment is a method."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from compared_runs import answered
from PIL import Image

from duallora import METHODS
from duallora.streams import load

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
EXPERIMENTS = sorted((BENCHMARKS / "adapters").glob("*.yaml"))


@pytest.fixture(scope="module")
def study() -> Any:
    """What the scripts define."""
    sys.path.insert(0, str(BENCHMARKS))
    yield {
        name: runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="study")
        for name in ("adapters", "adapters_tables", "held_back", "mixed", "room_picture")
    }
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty classes of 52 training images: two are learned, up to 50 are asked about."""
    root = tmp_path_factory.mktemp("images")
    for number in range(20):
        for part, count in (("train", 52), ("val", 1)):
            place = root / "tinyimagenet-cl100" / part / f"n{number:02}"
            place.mkdir(parents=True)
            for image in range(count):
                pixels = np.full((8, 8, 3), (12 * number, image, 0), np.uint8)
                Image.fromarray(pixels).save(place / f"{image:03}.png")
    return root


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_names_a_method_and_streams(path: Path, study: Any) -> None:
    experiment = yaml.safe_load(path.read_text())
    given = dict(experiment["method"])
    METHODS[given.pop("name", "duallora")].config(**given)
    assert set(experiment["streams"]) <= set(study["adapters"]["ORDER"])
    assert experiment["test"] in ("held_back", "val")


@pytest.mark.parametrize(("name", "tasks"), [("random", 10), ("semantic", 10), ("domains", 5)])
def test_a_stream_is_loaded(name: str, tasks: int, study: Any, folder: Path) -> None:
    """Held-back images are those after the training images of each class; val/ is not read."""
    setting = study["held_back"]["load"](name, str(folder / "tinyimagenet-cl100"), 2)
    assert len(setting.stream) == tasks
    assert sum(len(task.train) for task in setting.stream) == 2 * 20 * (5 if name == "domains" else 1)
    assert sum(len(task.test) for task in setting.stream) == 50 * 20 * (5 if name == "domains" else 1)
    assert setting.augment == "crop,flip"


@pytest.mark.parametrize(("test", "images"), [("val", 1), ("held_back", 15)])
def test_the_study_of_adapters_tests_on_what_it_says(
    test: str, images: int, study: Any, folder: Path
) -> None:
    stream = study["adapters"]["load_stream"](folder, "domains", test, 2)
    assert len(stream) == 5
    assert sum(len(task.train) for task in stream) == 2 * 20 * 5
    assert sum(len(task.test) for task in stream) == images * 20 * 5


def test_joint_training_gets_the_steps_of_all_tasks(study: Any, folder: Path) -> None:
    stream = study["adapters"]["load_stream"](folder, "domains", "val", 2)
    configured = study["adapters"]["configured"]
    assert configured({"method": {"name": "joint"}}, stream, "domains")[1].min_steps == 500
    assert configured({"method": {"name": "lora"}}, stream, "domains")[1].min_steps == 100


def test_the_mixed_stream_of_links_is_that_of_the_study(study: Any, tmp_path: Path) -> None:
    """The same classes in the same order, the same images under the same labels in every task."""
    parts = {"gtsrb": 43, "seedlings": 12, "tinyimagenet-cl100": 20}
    for colour, (name, classes) in enumerate(parts.items()):
        for number in range(classes):
            for part in ("train", "val"):
                place = tmp_path / "data" / name / part / f"c{number:02}"
                place.mkdir(parents=True)
                pixels = np.full((8, 8, 3), (6 * number, 80 * colour, part == "val"), np.uint8)
                Image.fromarray(pixels).save(place / "0.png")
    sizes = study["mixed"]["link"](tmp_path / "data", tmp_path / "mixed")
    linked = load(str(tmp_path / "mixed"), tasks=sizes, order="alphabetical")
    wanted = study["adapters"]["load_stream"](tmp_path / "data", "mixed", "val", 60)
    assert [len(task.train.classes) for task in linked] == sizes and sum(sizes) == 75
    for one, other in zip(linked, wanted, strict=True):
        for mine, theirs in ((one.train, other.train), (one.test, other.test)):
            assert shown(mine) == shown(theirs)


def shown(images: Any) -> list[tuple[int, list[int]]]:
    """Label and first pixel of every image, sorted."""
    first = (np.asarray(image)[0, 0].tolist() for image, _ in images)
    return sorted(zip(images.targets, first, strict=True))


def test_room_is_the_share_of_joint_trainings_gain(study: Any) -> None:
    def run(name: str, accuracy: float) -> dict[str, Any]:
        return {"experiment": name, "readouts": {k: {"accuracy": accuracy} for k in ("heads", "calibrated")}}

    known = {"duallora": 55.0, "frozen": 50.0, "joint": 60.0}
    runs = {(name, "gtsrb"): {0: run(name, accuracy)} for name, accuracy in known.items()}
    room = study["adapters_tables"]["room"]
    assert room(runs, "duallora", "gtsrb", 0) == 0.5
    assert room(runs, "lora", "gtsrb", 0) is None


@pytest.mark.parametrize(
    "script", ["adapters", "adapters_steps", "gate", "class_model", "growth", "fuzz", "kill", "serve"]
)
def test_a_script_explains_itself(
    script: str, study: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything it imports is there."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_room_is_read_off_the_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = {"frozen": [0, 1] * 100, "joint": [1] * 200, "lora-wide": [0, 1, 1, 1] * 50}
    for line, bits in right.items():
        run = answered([100, 100], heads=bits) | {"config": {"method": {"name": line.partition("-")[0]}}}
        (tmp_path / "runs" / f"{line}-3").mkdir(parents=True)
        (tmp_path / "runs" / f"{line}-3" / "results.json").write_text(json.dumps(run))
    monkeypatch.setattr(sys, "argv", ["room.py", str(tmp_path), "--reference", "frozen"])
    runpy.run_path(str(BENCHMARKS / "room.py"), run_name="__main__")
    told = capsys.readouterr().out
    rows = {row.split("|")[1].strip(): row for row in told.splitlines() if row.startswith("| lora-wide")}
    assert "Room captured" in told and "Final accuracy less that of frozen" in told
    assert "heads (room 50.0" in told and list(rows) == ["lora-wide"]
    assert "| 50 (" in told and "| +25.0 (" in told


def test_room_captured_is_drawn_for_every_page(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = {"lora": -2.5, "frozen": None, "duallora": 0.4}
    lines = [
        {
            "name": name,
            "seeds": [0],
            "readouts": {
                "calibrated": {
                    "room_captured": share and {"share": share, "low": share - 0.1, "high": share + 0.1}
                }
            },
        }
        for name, share in shares.items()
    ]
    for name in ("compare-one", "compare-two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "compare.json").write_text(json.dumps({"lines": lines}))
    shown = study["room_picture"]["captured"](tmp_path / "compare-one")
    assert [line["name"] for line in shown] == ["duallora", "lora"]
    folders = [str(tmp_path / name) for name in ("compare-one", "compare-two")]
    monkeypatch.setattr(sys, "argv", ["room_picture.py", *folders, "--out", str(tmp_path / "room.png")])
    study["room_picture"]["main"]()
    with Image.open(tmp_path / "room.png") as picture:
        assert picture.width > 2 * picture.height

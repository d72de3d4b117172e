from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, assert_refused, caller, images, on_disk, use_tiny_backbone
from tiny import tiny_backbone

import duallora
from duallora import METHODS, CheckFailed, ContinualLearner
from duallora.cli import VERBS
from duallora.commands.arguments import build_parser, parse
from duallora.commands.configs import read_config, shipped_configs
from duallora.commands.learn import learn
from duallora.commands.run import run
from duallora.storage import checkpoint
from duallora.teaching.method_choice import MethodChoice

COMMANDS = {
    verb: getattr(importlib.import_module(place.split(":")[0]), place.split(":")[1])
    for verb, place in VERBS.items()
}
DOCS = Path(__file__).resolve().parents[2] / "docs" / "commands.md"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    use_tiny_backbone(monkeypatch)
    return caller(capsys)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return images(tmp_path / "pets", ["cat", "dog"], 12)


@pytest.fixture
def model(call: Call, pets: Path, tmp_path: Path) -> Path:
    assert call("learn", tmp_path / "model", pets, "--epochs", 1).code == 0
    return tmp_path / "model"


# -- help and parsing --------------------------------------------------------------------------------------


def test_help_lists_the_verbs_with_a_line_each(call: Call) -> None:
    called = call("--help")
    assert called.code == 0
    listed = [line.split()[0] for line in called.out.splitlines() if line.startswith("  ")]
    assert listed == list(VERBS)
    assert call().code == 2


def test_version(call: Call) -> None:
    assert call("--version") == (0, "duallora 0.1.0\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_explains_every_option(call: Call, verb: str) -> None:
    called = call(verb, "--help")
    assert called.code == 0
    for action in build_parser(verb, COMMANDS[verb])._actions:
        name = action.option_strings[0] if action.option_strings else str(action.metavar)
        assert name.replace("--method.name", "--method") in called.out
        assert action.help


@pytest.mark.parametrize("verb", VERBS)
def test_the_documentation_names_every_option(verb: str) -> None:
    text = DOCS.read_text(encoding="utf-8")
    verbs = (
        [verb, "run"] if verb in ("compare", "reproduce") else [verb]
    )  # these name the options of run as such
    parts = [text.split(f"\n## `duallora {each}", 1)[1].split("\n## ", 1)[0] for each in verbs]
    section = "".join([text.split("\n## ", 1)[0], *parts])
    for action in build_parser(verb, COMMANDS[verb])._actions:
        for name in action.option_strings or [str(action.metavar).removesuffix("...")]:
            assert f"`{name}" in section or name.startswith("--method."), name


def test_the_documentation_names_every_field() -> None:
    text = "".join((DOCS.parent / page).read_text(encoding="utf-8") for page in ("commands.md", "methods.md"))
    fields = {field.name for entry in METHODS.values() for field in dataclasses.fields(entry.config)}
    assert not {name for name in fields if f"`{name}`" not in text}


def test_help_of_a_method_shows_its_own_fields_and_values(call: Call) -> None:
    shown = call("run", "--help").out
    assert f"--method {{{','.join(METHODS)}}}" in shown
    assert "--method.residual {none,next,protected,own}" in shown
    assert "--epochs" in shown
    other = call("run", "--method", "lora", "--help").out
    assert "--method.residual " not in other
    assert "--method.learning_rate" in other


@pytest.mark.parametrize("name", METHODS)
def test_a_printed_configuration_gives_the_same_run(call: Call, tmp_path: Path, name: str) -> None:
    words = ["--out", "x", "--method", name, "--epochs", "7", "--method.tau=0.5", "--domains", "photo,edges"]
    words += ["--train-per-class", "5", "--order", "alphabetical"]
    printed = call("run", *words, "--print_config")
    assert printed.code == 0
    (tmp_path / "run.yaml").write_text(printed.out)
    again = parse("run", run, ["--config", str(tmp_path / "run.yaml")])
    assert again == parse("run", run, words)
    assert again["method"].config() == METHODS[name].config(epochs=7, tau=0.5)


def test_a_printed_configuration_of_learn_keeps_what_is_not_said(call: Call, tmp_path: Path) -> None:
    words = ["model", "folder", "--method.rank", "3", "--dry-run"]
    (tmp_path / "learn.yaml").write_text(call("learn", *words, "--print_config").out)
    again = parse("learn", learn, ["--config", str(tmp_path / "learn.yaml")])
    assert again == parse("learn", learn, words)
    assert again["method"] == MethodChoice(None, {"rank": 3})
    assert parse("learn", learn, ["model", "folder"])["method"] is None


@pytest.mark.parametrize("method", ["lora", "{name: lora, rank: 3}"])
def test_a_method_in_a_file_is_a_name_or_a_section(tmp_path: Path, method: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"out: x\nmethod: {method}\n")
    asked = parse("run", run, ["--config", str(file)])["method"]
    assert asked.config() == METHODS["lora"].config(rank=3 if "rank" in method else 20)


def test_a_file_alone_is_answered_likewise(call: Call, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("out: x\nseed: many\n")
    assert_refused(call("run", "--config", tmp_path / "run.yaml"), "--seed does not take many")


def test_the_command_line_wins_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("out: x\nseed: 1\ntasks: 2\nmethod: {name: linear, epochs: 2, tau: 3}\n")
    for words in (["--seed", "5", "--config", str(file)], [f"--config={file}", "--seed=5"]):
        asked = parse("run", run, [*words, "--method", "lora", "--epochs", "9"])
        assert (asked["seed"], asked["stream"].tasks, asked["out"]) == (5, 2, Path("x"))
        assert asked["method"].config() == METHODS["lora"].config(epochs=9, tau=3)


OF_METHODS = [name for name in shipped_configs() if name.startswith("methods/")]


@pytest.mark.parametrize("name", sorted({*shipped_configs()}.difference(OF_METHODS)))
def test_a_shipped_configuration_suits_every_method(name: str) -> None:
    for method in METHODS:
        asked = parse("run", run, ["--config", name, "--out", "x", "--method", method])
        assert asked["method"].config() == METHODS[method].config()  # the reference settings are the defaults
        assert asked["stream"].order == 1993
    assert parse("run", run, ["--config", f"{name}.yaml", "--out", "x"])["method"].name == "duallora"


@pytest.mark.parametrize("name", OF_METHODS)
def test_a_shipped_configuration_of_a_method_is_of_that_method_alone(call: Call, name: str) -> None:
    content = read_config(name)
    assert list(content) == ["method"]  # of the protocol it says nothing
    fields = dict(content["method"])
    method = fields.pop("name")
    asked = parse("run", run, ["--config", name, "--out", "x"])
    assert asked["method"].name == method
    assert asked["method"].config() == METHODS[method].config(**fields)
    named = name.removeprefix("methods/")
    assert named in (method, "duallora-heads", "duallora-paper")
    assert parse("run", run, ["--config", "digits", "--config", name, "--out", "x"])["stream"].tasks == 5
    for field, value in fields.items():
        assert type(value) is type(getattr(asked["method"].config(), field)), field


def test_the_reference_configurations() -> None:
    assert set(shipped_configs()).difference(OF_METHODS) == {"cl100", "digits", "domains", "screening"}
    cl100 = parse("run", run, ["--config", "cl100", "--out", "x"])["stream"]
    assert (cl100.tasks, cl100.train_per_class, cl100.holdout) == (10, 60, 0)
    domains = parse("run", run, ["--config", "domains", "--out", "x"])["stream"]
    assert domains.classes == 20
    assert domains.domains is not None and domains.domains.count(",") == 4


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("rnu", ["no command rnu", "run"]),
        ("frobnicate", ["run, compare, reproduce, methods, streams"]),
        ("run --out x --methd lora", ["unknown option --methd", "--method"]),
        ("run --out x --epoch 3", ["--method.epochs"]),
        ("run --out x --residual-rank 3", ["--method.residual_rank"]),
        ("run --out x --method.residual-rank=3", ["--method.residual_rank"]),
        ("run --out x --train_per_class 3", ["--train-per-class"]),
        ("run --out x --method lara", ["no method lara", "lora"]),
        ("run --out x --method nothing", [", ".join(METHODS)]),
        ("run --out x --method.residual nxt", ["--method.residual does not take nxt", "next", "protected"]),
        ("run --out x --method lora --method.residual own", ["--method.residual", "duallora", "not of"]),
        ("run --out x --method.rank many", ["--method.rank does not take many", "a whole number"]),
        ("run --out x --method.tau much", ["a number"]),
        ("run --out x --method ranpac --method.first_session maybe", ["true or false"]),
        ("run --out x --order alphabetic", ["did you mean alphabetical", "a whole number"]),
        ("run --out x --augment crap", ["unknown augmentation 'crap'", "crop=SHARE"]),
        ("run --out x --device gpu", ["auto", "cuda"]),
        ("run --out x --tasks", ["--tasks needs a value", "a whole number"]),
        ("run --out x --method", ["--method needs a value"]),
        ("run --out x --seed -1", ["--seed", "from 0"]),
        ("run --out x --method.epochs 0", ["epochs", "above 0"]),
        ("run --out x y", ["unexpected argument y"]),
        ("run", ["--out is missing", "run --help"]),
        ("learn model", ["FOLDER", "missing"]),
        ("learn model folder --max-drop 2", ["--max-drop", "0 to 1"]),
        ("learn model folder --dryrun", ["--dry-run"]),
        ("predict model", ["IMAGE", "missing"]),
        ("predict model a.png --top 0", ["--top"]),
        ("predict model a.png --unknown-below 7", ["--unknown-below"]),
        ("undo model --josn", ["unknown option --josn"]),
        ("inspect model --josn", ["--json"]),
        ("run --config nowhere", ["nowhere", "cl100"]),
        ("compare --methods ncm", ["--out is missing", "compare --help"]),
        ("compare --out x --method.epoch 3", ["--method.epochs"]),
        ("methods --josn", ["unknown option --josn", "--json"]),
        ("run --out x --config", ["--config needs a value"]),
    ],
)
def test_a_wrong_word_is_answered_with_the_nearest_valid_ones(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(call(*line.split()), *parts)
    assert not on_disk(tmp_path)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("sede: 3", ["--sede", "--seed"]),
        ("train_per_clas: 3", ["--train-per-class"]),
        ("method: {name: lora, rnk: 3}", ["--method.rnk", "--method.rank"]),
        ("method: {name: loro}", ["no method loro", "lora"]),
        ("seed: [1, 2]", ["--seed", "a whole number"]),
        ("seed: {", ["not valid YAML"]),
        ("- seed", ["holds no configuration"]),
        ("", ["holds no configuration"]),
    ],
)
def test_a_wrong_file_is_answered_likewise(call: Call, tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "run.yaml").write_text(text)
    before = on_disk(tmp_path)
    assert_refused(call("run", "--out", tmp_path / "x", "--config", tmp_path / "run.yaml"), *parts)
    assert on_disk(tmp_path) == before


# -- a model from its first task to undo -------------------------------------------------------------------


def test_a_model_is_taught_asked_measured_and_taken_back(
    call: Call, model: Path, pets: Path, tmp_path: Path
) -> None:
    cars = images(tmp_path / "cars", ["bus", "van"], 10)
    first = call("inspect", model, "--json").out
    learned = call("learn", model, cars, "--check", pets, "--max-drop", 1, "--epochs", 2, "--seed", 3)
    assert learned.code == 0
    for part in ("2 classes, 18 images", "% before, ", "held-back accuracy", "calibration error"):
        assert part in learned.out
    assert "old classes most often confused with the new ones:" in learned.out

    predicted = call("predict", model, pets, cars / "bus" / "000.png", "--json", "--top", 2)
    predictions = json.loads(predicted.out)["predictions"]
    assert len(predictions) == 25
    assert list(predictions[0]) == [
        "path",
        "class",
        "probability",
        "task",
        "task_confidence",
        "unknown",
        "called_unknown",
        "top",
    ]
    assert predictions[-1]["path"] == str(cars / "bus" / "000.png")
    assert predictions[-1]["top"][0] == {
        "class": predictions[-1]["class"],
        "probability": predictions[-1]["probability"],
    }

    found = json.loads(call("evaluate", model, pets, "--json").out)
    assert list(found) == ["accuracy", "tasks", "task_confusion", "calibration_error"]
    assert [(task["name"], task["images"]) for task in found["tasks"]] == [("pets", 24), ("cars", 0)]
    assert found["tasks"][1]["accuracy"] is None
    assert sum(map(sum, found["task_confusion"])) == 24
    assert "pets" in call("evaluate", model, pets).out

    about = json.loads(call("inspect", model, "--json").out)
    assert [task["classes"] for task in about["tasks"]] == [["cat", "dog"], ["bus", "van"]]
    assert about["config"]["epochs"] == 1  # --epochs 2 was for one task
    assert about["seed"] == 0
    (layer,) = about["layers"]
    assert layer["free"] == 32 - sum(layer["bases"])
    assert len(layer["residual_ranks"]) <= 2
    assert about["bytes"]["total"] == sum(size for part, size in about["bytes"].items() if part != "total")
    assert "free directions" in call("inspect", model).out

    assert "pets" in call("undo", model).out
    assert call("inspect", model, "--json").out == first
    assert_refused(call("undo", model), "othing to undo")


def test_every_method_can_be_taught_and_inspected(call: Call, pets: Path, tmp_path: Path) -> None:
    for name in METHODS:
        assert call("learn", tmp_path / name, pets, "--method", name, "--epochs", 1).code == 0
        about = json.loads(call("inspect", tmp_path / name, "--json").out)
        assert about["method"] == name
        assert bool(about["layers"]) == (name == "duallora")
        assert about["bytes"]["total"] > about["bytes"]["heads"] > 0
        assert call("inspect", tmp_path / name).code == 0


def test_predictions_as_a_table_and_as_csv(call: Call, model: Path, pets: Path, tmp_path: Path) -> None:
    called = call("predict", model, pets / "cat", "--out", tmp_path / "p.csv", "--unknown-below", 1)
    assert called.code == 0
    assert str(pets / "cat" / "000.png") in called.out
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {row["class"] for row in rows} == {"unknown"}  # no familiarity reaches 1
    assert {row["class_1"] for row in rows} <= {"cat", "dog"}
    assert float(rows[0]["probability_1"]) + float(rows[0]["probability_2"]) == pytest.approx(1)


def test_a_folder_with_val_is_measured_there(call: Call, tmp_path: Path) -> None:
    images(tmp_path / "cars" / "train", ["bus", "van"], 3)
    images(tmp_path / "cars" / "val", ["bus", "van"], 2, seed=1)
    learned = call("learn", tmp_path / "model", tmp_path / "cars", "--name", "vehicles", "--epochs", 1)
    assert "vehicles: 2 classes, 6 images" in learned.out
    assert "on 4 images" in learned.out
    assert json.loads(call("evaluate", tmp_path / "model", tmp_path / "cars", "--json").out)["tasks"] == [
        {"name": "vehicles", "accuracy": pytest.approx(1, abs=1), "images": 4}
    ]


def test_few_images_are_not_held_back(call: Call, tmp_path: Path) -> None:
    learned = call("learn", tmp_path / "model", images(tmp_path / "few", ["a", "b"], 3), "--epochs", 1)
    assert learned.code == 0
    assert "not measured" in learned.out


def test_only_classes_of_ten_images_are_held_back(call: Call, tmp_path: Path) -> None:
    images(tmp_path / "mixed", ["many"], 10)
    images(tmp_path / "mixed", ["few"], 3)
    learned = call("learn", tmp_path / "model", tmp_path / "mixed", "--epochs", 1)
    assert "2 classes, 12 images" in learned.out
    assert "on 1 images" in learned.out


def test_the_same_folder_again_is_another_task(call: Call, model: Path, pets: Path) -> None:
    assert "learned pets 2: 2 classes" in call("learn", model, pets).out
    assert_refused(call("learn", model, pets, "--name", "pets"), "a task named pets already", "--name")


def test_a_dry_run_writes_nothing(call: Call, model: Path, pets: Path, tmp_path: Path) -> None:
    (pets / "cat" / "broken.png").write_bytes(b"no image")
    before = on_disk(tmp_path)
    for place in (model, tmp_path / "new"):
        planned = call("learn", place, pets, "--dry-run")
        assert planned.code == 0
        for part in ("2 classes", "22 images to learn from, 2 held back", "bad images: 1", "minutes on cpu"):
            assert part in planned.out
        assert str(pets / "cat" / "broken.png") in planned.out
    assert on_disk(tmp_path) == before


def test_bad_images_are_skipped_and_counted(call: Call, pets: Path, tmp_path: Path) -> None:
    (pets / "cat" / "broken.png").write_bytes(b"no image")
    (pets / "dog" / "notes.txt").write_text("no image")
    learned = call("learn", tmp_path / "model", pets, "--skip-bad-images", "--epochs", 1)
    assert learned.code == 0
    assert "bad images left out: 2" in learned.out


def test_a_drop_of_the_check_leaves_the_model(call: Call, model: Path, pets: Path, tmp_path: Path) -> None:
    """Names swapped: what was a cat is taught as a dog."""
    (images(tmp_path / "raw", ["cat", "dog"], 12, seed=1) / "cat").rename(tmp_path / "raw" / "was_cat")
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    (tmp_path / "raw" / "dog").rename(swapped / "cat")
    (tmp_path / "raw" / "was_cat").rename(swapped / "dog")
    before = on_disk(model)
    refused = call("learn", model, swapped, "--check", pets, "--epochs", 1)
    assert_refused(refused, "100.0 % before", "% after", "0.02", code=CheckFailed.exit_code)
    assert on_disk(model) == before
    assert call("learn", model, swapped, "--check", pets, "--max-drop", 1, "--epochs", 1).code == 0


def test_the_task_alone_is_trained_as_asked(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    real = ContinualLearner.learn

    def spy(self: ContinualLearner, *args: Any) -> Any:
        seen.update(epochs=self.method.config.epochs, seed=self.method.seed, augment=self.augment)
        return real(self, *args)

    monkeypatch.setattr(ContinualLearner, "learn", spy)
    stored = json.loads(call("inspect", model, "--json").out)
    words = ["--epochs", 2, "--seed", 5, "--augment", "none"]
    assert call("learn", model, images(tmp_path / "cars", ["bus", "van"]), *words).code == 0
    assert seen == {"epochs": 2, "seed": 5, "augment": "none"}
    after = json.loads(call("inspect", model, "--json").out)
    assert [after[key] for key in ("config", "seed", "augment")] == [
        stored[key] for key in ("config", "seed", "augment")
    ]


def test_the_embedded_backbone_is_named_as_small(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call = caller(capsys)
    folder = images(tmp_path / "pets", ["cat", "dog"], 2)
    learned = call("learn", tmp_path / "model", folder, "--epochs", 1)
    assert learned.code == 0
    assert sum("--backbone vit_base_patch16_224" in line for line in learned.out.splitlines()) == 1
    assert json.loads(call("inspect", tmp_path / "model", "--json").out)["backbone"]["name"] == "embedded"


@pytest.mark.parametrize(("family", "said"), [("siglip", True), ("vit", False)])
def test_a_final_feature_other_than_the_class_token_is_said(
    call: Call, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, said: bool
) -> None:
    for module in ("learner", "backbones"):
        monkeypatch.setattr(f"duallora.{module}.load_backbone", lambda *_: tiny_backbone(family))
    learned = call("learn", tmp_path / "model", pets, "--epochs", 1)
    small = ["--classes", 2, "--tasks", 1, "--train-per-class", 4, "--holdout", 2, "--epochs", 1]
    ran = call("run", "--out", tmp_path / "run", *small)
    for called in (learned, ran):
        assert called.code == 0
        lines = [line for line in called.out.splitlines() if line.startswith("final feature: ")]
        assert len(lines) == said
        assert not said or "attention pooling over the tokens" in lines[0]


def test_the_images_to_check_are_looked_at_twice_and_the_held_back_ones_once(
    call: Call, model: Path, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = ContinualLearner.outputs

    def spy(self: ContinualLearner, data: Any) -> Any:
        seen.append(len(data))
        return real(self, data)

    monkeypatch.setattr(ContinualLearner, "outputs", spy)
    cars = images(tmp_path / "cars", ["bus", "van"], 10)
    assert call("learn", model, cars, "--check", pets, "--max-drop", 1, "--epochs", 1).code == 0
    assert sorted(seen) == [2, 24, 24]


# -- the main job -------------------------------------------------------------------------------------------


def test_run_writes_a_folder_and_refuses_to_write_it_again(call: Call, tmp_path: Path) -> None:
    small = ["--classes", 4, "--tasks", 2, "--train-per-class", 6, "--holdout", 3, "--epochs", 1]
    finished = call("run", "--out", tmp_path / "run", *small)
    assert finished.code == 0
    assert "Accuracy in percent" in finished.out
    assert str(tmp_path / "run" / "report.md") in finished.out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["config"]["method"]["name"] == "duallora"
    assert results["config"]["method"]["epochs"] == 1
    assert results["config"]["augment"] == "crop"
    assert len(results["tasks"]) == 2
    before = on_disk(tmp_path)
    assert_refused(call("run", "--out", tmp_path / "run", *small), "finished run")
    assert_refused(call("run", "--out", tmp_path / "run", *small, "--seed", 1), "finished run")
    assert on_disk(tmp_path) == before


def _nothing(*_: object, **__: object) -> None:
    raise AssertionError("called too early, or for nothing")


def test_run_refuses_a_folder_before_it_loads_or_decodes_anything(
    call: Call, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--stream", pets, "--tasks", 1, "--holdout", 2, "--epochs", 1]
    assert call("run", "--out", tmp_path / "run", *words).code == 0
    monkeypatch.setattr("duallora.backbones.backbone.load_backbone", _nothing)
    monkeypatch.setattr("duallora.streams.folder.read_image", _nothing)
    assert_refused(call("run", "--out", tmp_path / "run", *words), "finished run")
    assert_refused(call("run", "--out", pets, *words), "not from a run")


def _interrupted_run(call: Call, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """A run that ends after its first task."""
    real = ContinualLearner.learn

    def first(self: ContinualLearner, *args: Any, **kwargs: Any) -> Any:
        if self.tasks:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ContinualLearner, "learn", first)
        assert call("run", *words).code == 130


def test_a_resumed_run_loads_its_backbone_once(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--out", tmp_path / "run", "--stream", images(tmp_path / "pets", ["a", "b", "c", "d"], 4)]
    words += ["--tasks", 2, "--holdout", 1, "--epochs", 1]
    _interrupted_run(call, monkeypatch, *words)
    loaded = []
    monkeypatch.setattr(
        "duallora.backbones.backbone.load_backbone", lambda *_: loaded.append(1) or tiny_backbone()
    )
    monkeypatch.setattr("duallora.learner.load_backbone", _nothing)
    monkeypatch.setattr("duallora.commands.run._check_images", _nothing)
    assert call("run", *words).code == 0
    assert loaded == [1]
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]) == 2


def test_a_run_is_not_resumed_with_other_weights(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--out", tmp_path / "run", "--classes", 4, "--tasks", 2, "--train-per-class", 4, "--holdout", 2]
    words += ["--epochs", 1, "--backbone-file", tmp_path / "weights.safetensors"]
    _interrupted_run(call, monkeypatch, *words)
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["backbone_file"] == "weights.safetensors"
    assert config["backbone_sha256"] == tiny_backbone().info.sha256
    before = on_disk(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("duallora.backbones.backbone.load_backbone", lambda *_: tiny_backbone(seed=1))
        assert_refused(call("run", *words), "another run", "backbone_sha256")
    assert_refused(call("run", *words[:-1], tmp_path / "other.safetensors"), "another run", "backbone_file")
    assert on_disk(tmp_path) == before
    assert call("run", *words).code == 0


@pytest.mark.parametrize("words", [["--device", "mps"], ["--method.first_adapted_layer", 7]])
def test_a_run_that_cannot_begin_leaves_no_folder(call: Call, tmp_path: Path, words: list[object]) -> None:
    assert call("run", "--out", tmp_path / "run", *words).code == 2
    assert not (tmp_path / "run").exists()


def test_run_on_a_folder_in_several_domains(call: Call, tmp_path: Path) -> None:
    images(tmp_path / "data" / "train", ["bus", "van"], 3)
    images(tmp_path / "data" / "val", ["bus", "van"], 2, seed=1)
    words = [
        "--stream",
        tmp_path / "data",
        "--domains",
        "photo, negative",
        "--method",
        "linear",
        "--epochs",
        1,
    ]
    assert call("run", "--out", tmp_path / "run", *words).code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [task["name"] for task in results["tasks"]] == ["photo", "negative"]
    assert results["readout"] == "heads"
    assert str(tmp_path) not in json.dumps(results["config"])


# -- exits --------------------------------------------------------------------------------------------------


def test_an_unexpected_error_is_one_sentence_and_a_traceback_only_on_demand(
    call: Call, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(checkpoint, "read", fail)
    assert_refused(call("inspect", model), "internal error", "first line second line", code=1)
    monkeypatch.setenv("DUALLORA_DEBUG", "1")
    assert "Traceback" in call("inspect", model).err


def test_a_warning_of_the_package_is_one_plain_line(
    call: Call, model: Path, pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = warnings.showwarning
    real = ContinualLearner.evaluate

    def warn(self: ContinualLearner, *args: Any) -> Any:
        place = Path(duallora.__file__).parent / "methods" / "duallora.py"
        warnings.warn_explicit("no direction\nis left", UserWarning, str(place), 1)
        return real(self, *args)

    monkeypatch.setattr(ContinualLearner, "evaluate", warn)
    called = call("evaluate", model, pets)
    assert called.code == 0
    assert called.err.splitlines() == ["duallora: no direction is left"]
    assert warnings.showwarning is shown


def test_an_exhausted_complement_is_said_in_plain_lines(call: Call, pets: Path, tmp_path: Path) -> None:
    words = ["--epochs", 1, "--method.energy_threshold", 1]
    said = ""
    for number in range(1, 4):
        called = call("learn", tmp_path / "model", pets, "--name", number, *words)
        assert called.code == 0
        said += called.err
    lines = [line for line in said.splitlines() if "no direction is left" in line]
    assert lines and all(line.startswith("duallora: layer ") for line in lines)
    assert ".py" not in said and "Warning" not in said


ENTRY = "from duallora.cli import main; raise SystemExit(main())"


def _duallora(*words: object, entry: str = ENTRY, **settings: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", entry, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **(pipes | settings))


def test_the_console_entry_teaches_and_predicts(tmp_path: Path) -> None:
    folder = images(tmp_path / "pets", ["cat", "dog"], 3)
    taught = _duallora("learn", tmp_path / "model", folder, "--epochs", 1)
    out, err = taught.communicate()
    assert taught.returncode == 0, err
    assert "2 classes, 6 images" in out
    asked = _duallora("predict", tmp_path / "model", folder, "--json")
    assert len(json.loads(asked.communicate()[0])["predictions"]) == 6
    assert asked.returncode == 0


def test_ctrl_c_while_learning_exits_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    folder = images(tmp_path / "pets", ["cat", "dog"], 3)
    entry = (
        "from duallora import progress; progress._SILENCE = -1; "
        "from duallora.cli import main; raise SystemExit(main())"
    )
    words = ["learn", tmp_path / "model", folder, "--epochs", 100_000]
    learning = _duallora(*words, entry=entry)
    # Python loses an interrupt that comes at certain moments of an import: training has to be under way.
    assert learning.stderr is not None and any("epoch 2/" in line for line in learning.stderr)
    learning.send_signal(signal.SIGINT)
    try:
        out, err = learning.communicate(timeout=300)
    finally:
        learning.kill()
    assert (learning.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "duallora: interrupted; every saved file is whole."
    assert "Traceback" not in err
    assert not (tmp_path / "model").exists()


def test_real_kills_of_a_command_that_learns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Killed at a random moment of the lesson, then just after the first change of the folder."""
    call = caller(capsys)
    model, pets = tmp_path / "model", images(tmp_path / "pets", ["cat", "dog"], 3)
    cars = images(tmp_path / "cars", ["bus", "van"], 3)
    assert call("learn", model, pets, "--epochs", 1).code == 0
    chance = random.Random(0)
    # Once it is done it waits to be killed: whoever kills it may be late.
    entry = "import time; from duallora.cli import main; main(); time.sleep(600)"
    for saving in (False, True):
        (model / ".lock").unlink()
        before = sorted([*_names(model), ".lock"])
        learning = _duallora("learn", model, cars, "--epochs", 1 if saving else 100_000, entry=entry)
        try:
            _wait_until((model / ".lock").exists, learning)
            if saving:
                _wait_until(lambda before=before: sorted(_names(model)) != before, learning)
            time.sleep(chance.random() / (500 if saving else 1))
        finally:
            learning.kill()
            learning.communicate()
        assert learning.returncode == -signal.SIGKILL
        tasks = [task.name for task in ContinualLearner.load(model, device="cpu").tasks]
        assert tasks in ([["pets"], ["pets", "cars"]] if saving else [["pets"]])
    assert call("learn", model, cars, "--epochs", 1, "--name", "more").code == 0
    after = ContinualLearner.load(model, device="cpu").tasks
    assert [task.name for task in after] == [*tasks, "more"]
    assert not [name for name in _names(model) if name.endswith(".tmp")]


def _wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "it ended before it could be killed"
        time.sleep(0.001)


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_closed_pipe_is_no_error_to_talk_about() -> None:
    reader, writer = os.pipe()
    os.close(reader)  # before anything can be written
    helping = _duallora("--help", stdout=writer)
    os.close(writer)
    assert helping.stderr is not None
    assert (helping.stderr.read(), helping.wait()) == ("", 141)

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
from command_line import Call, assert_refused, on_disk

from duallora import METHODS
from duallora.cli import VERBS
from duallora.commands.arguments import build_parser, parse
from duallora.commands.configs import read_config, shipped_configs
from duallora.commands.learn import learn
from duallora.commands.run import run
from duallora.teaching.method_choice import MethodChoice

COMMANDS = {
    verb: getattr(importlib.import_module(place.split(":")[0]), place.split(":")[1])
    for verb, place in VERBS.items()
}
DOCS = Path(__file__).resolve().parents[2] / "docs" / "commands.md"


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
    headings = ["Options of every command", *(f"`duallora {each}" for each in verbs)]
    section = "".join(text.split(f"\n## {each}", 1)[1].split("\n## ", 1)[0] for each in headings)
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
    assert "--method.residual {own,next,protected,none}" in shown
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
    assert again["method"].config() == METHODS[name].config(epochs=7, min_steps=0, tau=0.5)


@pytest.mark.parametrize(
    ("words", "epochs", "steps"),
    [
        ([], 4, 100),
        (["--epochs", "7"], 7, 0),
        (["--method.epochs=7"], 7, 0),
        (["--method.min_steps", "30", "--epochs", "7"], 7, 30),
        (["--config", "cl100"], 4, 100),
        (["--config", "digits"], 4, 0),
        (["--config", "digits", "--method.min_steps", "30"], 4, 30),
    ],
)
def test_who_names_epochs_means_just_these(words: list[str], epochs: int, steps: int) -> None:
    config = parse("run", run, ["--out", "x", *words])["method"].config()
    assert (config.epochs, config.min_steps) == (epochs, steps)
    lesson = parse("learn", learn, ["model", "folder", *words[: 0 if "--config" in words else None]])[
        "method"
    ]
    said = {} if lesson is None else dict(lesson.fields)
    assert "--config" in words or said.get("min_steps", 100) == steps


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
        assert asked["method"].config() == METHODS["lora"].config(epochs=9, min_steps=0, tau=3)


OF_METHODS = [name for name in shipped_configs() if name.startswith("methods/")]


@pytest.mark.parametrize("name", sorted({*shipped_configs()}.difference(OF_METHODS)))
def test_a_shipped_configuration_suits_every_method(name: str) -> None:
    for method in METHODS:
        asked = parse("run", run, ["--config", name, "--out", "x", "--method", method])
        # The reference settings are the defaults; digits need no further steps.
        steps = {"min_steps": 0} if name == "digits" else {}
        assert asked["method"].config() == METHODS[method].config(**steps)
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
    least = {"min_steps": 0} if "epochs" in fields else {}
    assert asked["method"].config() == METHODS[method].config(**least, **fields)
    named = name.removeprefix("methods/")
    assert named in (method, "duallora-heads", "duallora-o", "duallora-paper")
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

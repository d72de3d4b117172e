"""``duallora compare`` with runs: in this process on a tiny backbone, and in processes of their own."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, assert_refused, on_disk
from compare_tools import (
    BUDGET,
    SMALL,
    Started,
    comparable,
    in_process,
    order_of,
    read,
    rows_of,
    words_of,
)

from duallora import ContinualLearner
from duallora.cli import main
from duallora.commands import compare as compare_module
from duallora.commands.arguments import parse
from duallora.commands.subprocess_jobs import Job
from duallora.runs.answers import unpacked

# -- the whole ----------------------------------------------------------------------------------------------


def test_a_comparison_leaves_runs_and_one_page_about_all_lines(finished: Path) -> None:
    out = finished / "out"
    runs = [f"{name}-{seed}" for name in ("joint", "lora", "lora-x", "ncm") for seed in (0, 1)]
    assert sorted(path.name for path in (out / "runs").iterdir()) == runs
    assert all((out / "runs" / run / "model" / "model.json").exists() for run in runs)
    rows = rows_of(out)
    assert {row["line"]: row["method"] for row in rows} == {
        **{name: name for name in ("lora", "ncm", "joint")},
        "lora-x": "lora",
    }
    for row in rows:
        assert row["seeds"] == "0 1"
        results = [read(out / "runs" / f"{row['line']}-{seed}" / "results.json") for seed in (0, 1)]
        accuracies = [run["readouts"][row["readout"]]["final_accuracy"] for run in results]
        assert float(row["final_accuracy"]) == pytest.approx(sum(accuracies) / 2, rel=1e-5)
        assert (row["forgetting"] == "") == (row["line"] == "joint")
    best = [max(float(r["final_accuracy"]) for r in rows if r["line"] == name) for name in order_of(rows)]
    assert best == sorted(best, reverse=True)
    for page in ("compare.md", "compare.html"):
        text = (out / page).read_text()
        for part in ("lora-x", "joint (all data at once)", "2 tasks", "4 classes", "24 training", "12 test"):
            assert part in text, (page, part)
        assert "training: 1 epochs, batches of 32" in text
        assert "heads at 0.001 (joint)" in text, "its head begins as the classifier of its rows"
        assert "rank 20, layers from 1 on" in text and "nothing is trained: ncm" in text
        assert ", precision " in text


def test_the_command_on_the_page_is_the_one_that_made_it(finished: Path, template: Path) -> None:
    (block,) = re.findall(r"```sh\n(.*)\n```", (finished / "out" / "compare.md").read_text())
    program, verb, *words = shlex.split(block)
    assert (program, verb) == ("duallora", "compare")
    given = words_of(template, "lora,ncm,joint", template / "lora-x.yaml")
    parsed = [parse("compare", compare_module.compare, each) for each in (words, given[1:])]
    assert parsed[0] == parsed[1]


def test_the_page_says_what_room_there_is_and_how_lines_differ(call: Call, finished: Path) -> None:
    out = finished / "out"
    for page in ("compare.md", "compare.html"):
        assert "add frozen to --methods" in (out / page).read_text()
    found = read(out / "compare.json")
    assert "add frozen to --methods" in found["rooms_lacking"] and not found["rooms"]
    pairs = {frozenset((each["line"], each["other"])) for each in found["differences"]}
    assert len(pairs) == 6 and all(line["answers_by_image"] for line in found["lines"])
    lines = words_of(finished, "lora,ncm,joint,frozen", finished / "lora-x.yaml", seeds="0")
    done = call(*lines, "--reference", "ncm")
    assert done.code == 0 and "room" in done.out
    found = read(out / "compare.json")
    assert found["rooms"].keys() == {"heads", "calibrated"} and found["rooms_lacking"] is None
    assert "## Room captured" in (text := (out / "compare.md").read_text())
    assert "## Final accuracy less that of ncm" in text
    for line in found["lines"]:  # bits that a run kept give the accuracy that it reports
        run = read(out / "runs" / f"{line['name']}-0" / "results.json")
        assert unpacked(run) is not None


def test_joint_training_with_the_steps_of_all_tasks_is_the_run_that_was_asked_for(
    call: Call, tmp_path: Path
) -> None:
    words = ["compare", "--methods", "joint", "--out", tmp_path / "out", *SMALL, *BUDGET]
    assert call(*words, "--method.min_steps", 2).code == 0
    results = read(tmp_path / "out" / "runs" / "joint-0" / "results.json")
    assert results["config"]["method"]["min_steps"] == 2
    model = read(tmp_path / "out" / "runs" / "joint-0" / "model" / "model.json")
    assert model["config"]["min_steps"] == 4  # of two tasks


@pytest.mark.parametrize("name", ["lora-x", "joint"])
def test_the_kept_configuration_repeats_a_run(call: Call, finished: Path, name: str) -> None:
    config = finished / "out" / "configs" / f"{name}.yaml"
    words = ["--config", config, "--seed", 1, "--device", "cpu", "--out", finished / "again"]
    assert call("run", *words).code == 0
    again = read(finished / "again" / "results.json")
    there = read(finished / "out" / "runs" / f"{name}-1" / "results.json")
    assert again["config"] == there["config"]
    assert comparable(again) == comparable(there)


@pytest.mark.parametrize(
    "words",
    [
        ["--domains", "photo, negative", "--order", "alphabetical", "--augment", "none"],
        ["--tasks", "3", "--method.learning_rate", "1e-05", "--method.tau", "1e-12"],
    ],
)
def test_a_kept_configuration_says_all_that_the_run_was_asked_for(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    asked: list[dict[str, Any]] = []

    def note(jobs: Sequence[Job], *_: object) -> list[Job]:
        from duallora.commands import run as module

        for job in jobs:
            given = parse("run", module.run, job.words[1:])
            choice, seed = given.pop("method"), given.pop("seed")
            for key in ("out", "features"):
                del given[key]
            setting = compare_module.load_setting(given["stream"], given["backbone"])
            asked.append(setting.asked(choice.name, choice.config(), seed))
        return []

    monkeypatch.setattr(compare_module, "run_jobs", note)
    file = tmp_path / "weights.safetensors"
    common = ["--methods", "lora", "--classes", "4", "--train-per-class", "3", "--backbone-file", str(file)]
    given = [*common, "--out", str(tmp_path / "out"), "--seeds", "3", *words]
    assert main(["compare", *given]) == 0
    (found,) = asked
    keywords = parse("compare", compare_module.compare, given)
    method = keywords["method"]
    expected = {} if method is None else method.fields
    assert {key: found["method"][key] for key in expected} == expected
    assert found["method"]["name"] == "lora"
    assert (found["seed"], found["backbone_file"], found["classes"]) == (3, file.name, 4)
    assert found["order"] == keywords["stream"].order
    assert found["domains"] == (("photo", "negative") if keywords["stream"].domains else ())
    assert found["augment"] == (keywords["backbone"].augment or "crop")


# -- what ends early ----------------------------------------------------------------------------------------


def test_an_interrupted_comparison_is_resumed(
    call: Call, started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its second run, after the first task of it."""
    real, words = ContinualLearner.learn, words_of(tmp_path, "ncm,lora,frozen", seeds="0")

    def two_tasks_of_lora(self: ContinualLearner, *args: Any, **kwargs: Any) -> Any:
        if self.method.config.__class__.__name__ == "LoRAConfig" and self.tasks:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    def stop(jobs: Sequence[Job], at_once: int, tell: Callable[[str], None], *_: object) -> list[Job]:
        for job in jobs:
            if in_process(started)([job], at_once, tell):
                raise KeyboardInterrupt
        raise AssertionError("nothing was interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(ContinualLearner, "learn", two_tasks_of_lora)
        patch.setattr(compare_module, "run_jobs", stop)
        assert call(*words).code == 130
    assert started == ["ncm, seed 0", "lora, seed 0"]
    assert not (tmp_path / "out" / "compare.html").exists()
    assert call(*words).code == 0
    assert started[2:] == ["lora, seed 0", "frozen, seed 0"]
    log = (tmp_path / "out" / "runs" / "lora-0" / "log.jsonl").read_text().splitlines()
    (resumed,) = [event for event in map(json.loads, log) if event["event"] == "resume"]
    assert resumed["tasks_learned"] == 1
    assert set(order_of(rows_of(tmp_path / "out"))) == {"ncm", "lora", "frozen"}


def test_a_run_that_fails_is_named_and_the_page_shows_the_others(call: Call, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("method: {name: lora, projections: qv, tau: 0.5}\n")
    words = words_of(tmp_path, "ncm", bad, seeds="0,1")
    out = tmp_path / "out"
    (out / "runs" / "bad-1").mkdir(parents=True)
    (out / "runs" / "bad-1" / "notes.txt").write_text("no run")
    called = call(*words)
    assert called.code == 2
    last = called.err.splitlines()[-1]
    for part in ("1 of 4 runs failed (bad, seed 1)", "page shows the others", str(out / "logs"), "repeat"):
        assert part in last
    assert {row["line"]: row["seeds"] for row in rows_of(out)} == {"ncm": "0 1", "bad": "0"}
    (out / "runs" / "bad-1" / "notes.txt").unlink()
    assert call(*words).code == 0
    assert {row["seeds"] for row in rows_of(out)} == {"0 1"}


def test_nothing_is_shown_where_every_run_fails(call: Call, tmp_path: Path) -> None:
    words = [*words_of(tmp_path, "lora", seeds="0"), "--method.first_adapted_layer", 7]
    called = call(*words)
    assert called.code == 2
    assert "1 of 1 runs failed (lora, seed 0); there is nothing to show yet." in called.err
    assert not (tmp_path / "out" / "compare.md").exists()


# -- what is asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--reference", "lora"], ["--reference lora is no line"]),
        (["--seeds", "0,x"], ["--seeds must be numbers separated by commas", "0,x"]),
        (["--seeds", "0,,1"], ["--seeds must be numbers"]),
        (["--seeds", "-1"], ["--seeds", "from 0"]),
        (["--seeds", str(2**70)], ["--seeds", "from 0"]),
        (["--jobs", "0"], ["--jobs", "from 1"]),
        (["--method", "lora"], ["takes its methods from --methods", "leave --method out"]),
        (["--methods", " , "], ["--methods names no method"]),
        (["--methods", "lora,lroa"], ["no method lroa", "lora"]),
        (["--methods", "lora", "--method.residual", "own"], ["none of the methods", "--method.residual"]),
        (["--methods", "ncm,ncm"], ["ncm twice"]),
        (["--stream", "nowhere"], ["nowhere"]),
        (["--device", "mps"], ["mps"]),
    ],
)
def test_a_wrong_request_is_refused_and_leaves_nothing(
    call: Call, started: Started, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    given = ["compare", "--methods", "ncm", "--out", tmp_path / "out", *SMALL, *words]
    assert_refused(call(*given), *parts)
    assert not on_disk(tmp_path)
    assert started == []


def test_a_file_is_no_place_for_a_comparison(call: Call, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert_refused(call(*words_of(tmp_path, "ncm")), "out is a file", "name a folder")


@pytest.mark.parametrize(("text", "numbers"), [("0", [0]), ("2, 0,2", [0, 2]), ("11", [11])])
def test_seeds_are_numbers_once_each(text: str, numbers: list[int]) -> None:
    assert compare_module.seed_numbers(text) == numbers


def test_seeds_in_a_file_may_be_one_number(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("methods: ncm\nout: x\nseeds: 5\n")
    assert (
        str(parse("compare", compare_module.compare, ["--config", str(tmp_path / "c.yaml")])["seeds"]) == "5"
    )

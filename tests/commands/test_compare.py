"""``duallora compare`` with runs: in this process on a tiny backbone, and in processes of their own."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from command_line import Call, Called, assert_refused, caller, images, on_disk, use_tiny_backbone
from tiny import tiny_backbone

from duallora import ContinualLearner
from duallora.backbones.frozen_features import FrozenFeatures
from duallora.cli import main
from duallora.commands import compare as compare_module
from duallora.commands.arguments import parse
from duallora.commands.subprocess_jobs import Job, run_jobs
from duallora.runs.results import MEASURED

SMALL = ["--classes", "4", "--tasks", "2", "--train-per-class", "6", "--holdout", "3", "--device", "cpu"]
BUDGET = ["--same-budget", "--epochs", "1"]
Started = list[str]


def _in_process(started: Started) -> Callable[..., list[Job]]:
    """Stands for the processes: the same command lines, one after another, in this one."""

    def run(jobs: Sequence[Job], at_once: int, tell: Callable[[str], None]) -> list[Job]:
        failed = []
        for job in jobs:
            started.append(job.name)
            if main(list(job.words)):
                failed.append(job)
        return failed

    return run


def _quick(patch: pytest.MonkeyPatch) -> Started:
    """A tiny backbone, no processes, no pictures of single runs and little to time; says what was started."""
    started: Started = []
    use_tiny_backbone(patch)
    patch.setattr(compare_module, "run_jobs", _in_process(started))
    patch.setattr("duallora.runs.report.accuracy_plot", lambda _: None)
    patch.setattr("duallora.runs.comparison_page.plot", lambda _: None)
    patch.setattr("duallora.runs.results._SPEED_IMAGES", 4)
    return started


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    return _quick(monkeypatch)


@pytest.fixture
def call(started: Started, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    return caller(capsys)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison: two seeds of three lines, one of which has the start of another's name."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "lora-x.yaml").write_text("method: {name: lora, rank: 3, projections: qv, tau: 2}\n")
    with pytest.MonkeyPatch.context() as patch:
        _quick(patch)
        assert main(_words(folder, "lora,ncm,joint", folder / "lora-x.yaml")) == 0
    return folder


def _words(folder: Path, methods: str, *files: Path, seeds: str = "0,1") -> list[str]:
    names = ",".join([methods, *map(str, files)])
    return ["compare", "--methods", names, "--seeds", seeds, "--out", str(folder / "out"), *SMALL, *BUDGET]


@pytest.fixture
def finished(template: Path, tmp_path: Path) -> Path:
    """A copy of the finished comparison; its folder."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path


def _rows(out: Path) -> list[dict[str, str]]:
    with (out / "compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = _read(path)
    change(content)
    path.write_text(json.dumps(content))


def _stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def comparable(value: Any) -> Any:
    """The same without what a clock or the memory gave."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items() if key not in MEASURED}
    return [comparable(item) for item in value] if isinstance(value, list) else value


# -- the whole ----------------------------------------------------------------------------------------------


def test_a_comparison_leaves_runs_and_one_page_about_all_lines(finished: Path) -> None:
    out = finished / "out"
    runs = [f"{name}-{seed}" for name in ("joint", "lora", "lora-x", "ncm") for seed in (0, 1)]
    assert sorted(path.name for path in (out / "runs").iterdir()) == runs
    assert all((out / "runs" / run / "model" / "model.json").exists() for run in runs)
    rows = _rows(out)
    assert {row["line"]: row["method"] for row in rows} == {
        **{name: name for name in ("lora", "ncm", "joint")},
        "lora-x": "lora",
    }
    for row in rows:
        assert row["seeds"] == "0 1"
        results = [_read(out / "runs" / f"{row['line']}-{seed}" / "results.json") for seed in (0, 1)]
        accuracies = [run["readouts"][row["readout"]]["final_accuracy"] for run in results]
        assert float(row["final_accuracy"]) == pytest.approx(sum(accuracies) / 2, rel=1e-5)
        assert (row["forgetting"] == "") == (row["line"] == "joint")
    best = [max(float(r["final_accuracy"]) for r in rows if r["line"] == name) for name in _order(rows)]
    assert best == sorted(best, reverse=True)
    for page in ("compare.md", "compare.html"):
        text = (out / page).read_text()
        for part in ("lora-x", "joint (all data at once)", "2 tasks", "4 classes", "24 training", "12 test"):
            assert part in text, (page, part)
        assert "one budget for all: 1 epochs, batches of 32" in text
        assert "rank 20, layers from 1 on" in text and "nothing is trained: ncm" in text
        assert ", precision " in text


def _order(rows: list[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(row["line"] for row in rows))


def test_the_command_on_the_page_is_the_one_that_made_it(finished: Path, template: Path) -> None:
    (block,) = re.findall(r"```sh\n(.*)\n```", (finished / "out" / "compare.md").read_text())
    program, verb, *words = shlex.split(block)
    assert (program, verb) == ("duallora", "compare")
    given = _words(template, "lora,ncm,joint", template / "lora-x.yaml")
    parsed = [parse("compare", compare_module.compare, each) for each in (words, given[1:])]
    assert parsed[0] == parsed[1]


@pytest.mark.parametrize("name", ["lora-x", "joint"])
def test_the_kept_configuration_repeats_a_run(call: Call, finished: Path, name: str) -> None:
    config = finished / "out" / "configs" / f"{name}.yaml"
    words = ["--config", config, "--seed", 1, "--device", "cpu", "--out", finished / "again"]
    assert call("run", *words).code == 0
    again = _read(finished / "again" / "results.json")
    there = _read(finished / "out" / "runs" / f"{name}-1" / "results.json")
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


# -- what is there already ----------------------------------------------------------------------------------


def test_a_finished_run_counts_as_done_and_is_not_touched(
    call: Call, started: Started, finished: Path
) -> None:
    runs = finished / "out" / "runs"
    for path in runs.iterdir():  # as a run is committed: without its model, and without all else
        shutil.rmtree(path / "model")
        for other in path.iterdir():
            if other.name != "results.json":
                other.unlink()
    (finished / "out" / "compare.md").unlink()
    before, stamps = on_disk(runs), _stamps(runs)
    assert call(*_words(finished, "lora,ncm,joint", finished / "lora-x.yaml")).code == 0
    assert started == []
    assert on_disk(runs) == before and _stamps(runs) == stamps
    assert "lora-x" in (finished / "out" / "compare.md").read_text()


def test_only_what_is_missing_is_run(call: Call, started: Started, finished: Path) -> None:
    shutil.rmtree(finished / "out" / "runs" / "lora-0")
    stamps = _stamps(finished / "out" / "runs")
    assert call(*_words(finished, "lora,ncm", seeds="0,1,2")).code == 0
    assert started == ["lora, seed 0", "lora, seed 2", "ncm, seed 2"]
    after = _stamps(finished / "out" / "runs")
    assert {path: after[path] for path in stamps} == stamps
    assert {row["seeds"] for row in _rows(finished / "out")} == {"0 1 2"}


def _budget(words: list[str]) -> None:
    words.remove("--same-budget")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda words: words.extend(["--epochs", "2"]), ["method.epochs: 1 there, 2 asked for"]),
        (lambda words: words.extend(["--augment", "none"]), ['augment: "crop" there, "none" asked for']),
        (lambda words: words.extend(["--holdout", "2"]), ["holdout: 3 there, 2 asked for"]),
        (_budget, ["method.rank: 20 there, 3 asked for"]),
    ],
)
def test_a_finished_run_with_other_settings_is_refused(
    call: Call, started: Started, finished: Path, change: Callable[[list[str]], None], parts: list[str]
) -> None:
    words = _words(finished, "", finished / "lora-x.yaml", seeds="0")
    change(words)
    before = on_disk(finished)
    folder = str(finished / "out" / "runs" / "lora-x-")
    assert_refused(call(*words), folder, "a finished run with other settings", *parts, "--out")
    assert on_disk(finished) == before
    assert started == []


def test_a_run_of_another_seed_is_looked_at_before_anything_is_run(
    call: Call, started: Started, finished: Path
) -> None:
    """Else a comparison would run for hours and then not make its page."""
    _edit(finished / "out" / "runs" / "ncm-1" / "results.json", lambda run: run["config"].update(tasks=4))
    refused = call(*_words(finished, "ncm", seeds="2"))
    assert_refused(refused, "ncm-1", "tasks: 4 there, 2 asked for")
    assert started == []


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda run: run["stream"].update(class_order=["a", "b"]), 'class order: ["a", "b"] there, ["'),
        (lambda run: run["tasks"].pop(), "training images: 12 there, 24 asked for"),
        (lambda run: run["tasks"][0].update(test_images=99), "test images: 105 there, 12 asked for"),
        (lambda run: run.update(version=2), "version: 2 there, 1 asked for"),
    ],
)
def test_a_finished_run_on_other_images_is_refused(
    call: Call, finished: Path, change: Callable[[dict[str, Any]], object], part: str
) -> None:
    _edit(finished / "out" / "runs" / "ncm-0" / "results.json", change)
    assert_refused(call(*_words(finished, "ncm")), "ncm-0", part)


def test_another_folder_of_images_is_another_comparison(call: Call, tmp_path: Path) -> None:
    """A configuration does not say which folder was read."""
    for name, classes in (("pets", ["cat", "dog"]), ("cars", ["bus", "van"])):
        images(tmp_path / name / "train", classes, 3)
        images(tmp_path / name / "val", classes, 2, seed=1)
    words = ["compare", "--methods", "ncm", "--tasks", 1, "--out", tmp_path / "out", "--stream"]
    assert call(*words, tmp_path / "pets").code == 0
    assert_refused(call(*words, tmp_path / "cars"), 'class order: ["cat", "dog"] there, ["bus", "van"]')
    # The same images under another path are the same run, as on another machine.
    (tmp_path / "pets").rename(tmp_path / "animals")
    assert call(*words, tmp_path / "animals").code == 0


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"config": {"seed": 0}}', b"\xff\xfe"])
def test_results_that_cannot_be_read_are_refused(
    call: Call, started: Started, finished: Path, content: bytes
) -> None:
    path = finished / "out" / "runs" / "ncm-0" / "results.json"
    path.write_bytes(content)
    assert_refused(call(*_words(finished, "ncm")), str(path), "cannot be read", "delete", "run it again")
    assert started == []


def test_a_run_that_was_copied_in_is_on_the_page(call: Call, started: Started, finished: Path) -> None:
    """Of a seed that was not asked for; names that only begin like a line's have no part in it."""
    runs = finished / "out" / "runs"
    shutil.copytree(runs / "lora-1", runs / "lora-7")
    _edit(runs / "lora-7" / "results.json", lambda run: run["config"].update(seed=7))
    _edit(runs / "lora-7" / "results.json", lambda run: run["environment"].update(device="cuda (other)"))
    for name in ("lora-old", "lora-9", "lora-"):  # a name of one's own, a run that is not finished, a slip
        (runs / name).mkdir()
    (runs / "lora-old" / "results.json").write_text("mine")
    assert call(*_words(finished, "lora,ncm", seeds="0")).code == 0
    assert started == []
    assert {row["line"]: row["seeds"] for row in _rows(finished / "out")} == {"lora": "0 1 7", "ncm": "0 1"}
    text = (finished / "out" / "compare.md").read_text()
    assert "cuda (other)" in text and "0, 1, 7" in text


def test_a_line_may_have_an_odd_name(call: Call, started: Started, tmp_path: Path) -> None:
    """A name is no pattern for other names, and is shown as it is."""
    file = tmp_path / "a[1] <b>.yaml"
    file.write_text("method: {name: ncm, scale: 3}\n")
    assert call(*_words(tmp_path, "ncm", file, seeds="0")).code == 0
    assert [row["line"] for row in _rows(tmp_path / "out")].count("a[1] <b>") == 2
    assert "a[1] &lt;b&gt;" in (tmp_path / "out" / "compare.html").read_text()
    assert call(*_words(tmp_path, "ncm", file, seeds="0")).code == 0
    assert len(started) == 2


# -- what ends early ----------------------------------------------------------------------------------------


def test_an_interrupted_comparison_is_resumed(
    call: Call, started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its second run, after the first task of it."""
    real, words = ContinualLearner.learn, _words(tmp_path, "ncm,lora,frozen", seeds="0")

    def two_tasks_of_lora(self: ContinualLearner, *args: Any, **kwargs: Any) -> Any:
        if self.method.config.__class__.__name__ == "LoRAConfig" and self.tasks:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    def stop(jobs: Sequence[Job], at_once: int, tell: Callable[[str], None]) -> list[Job]:
        for job in jobs:
            if _in_process(started)([job], at_once, tell):
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
    assert set(_order(_rows(tmp_path / "out"))) == {"ncm", "lora", "frozen"}


def test_a_run_that_fails_is_named_and_the_page_shows_the_others(call: Call, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("method: {name: lora, projections: qv, tau: 0.5}\n")
    words = _words(tmp_path, "ncm", bad, seeds="0,1")
    out = tmp_path / "out"
    (out / "runs" / "bad-1").mkdir(parents=True)
    (out / "runs" / "bad-1" / "notes.txt").write_text("no run")
    called = call(*words)
    assert called.code == 2
    last = called.err.splitlines()[-1]
    for part in ("1 of 4 runs failed (bad, seed 1)", "page shows the others", str(out / "logs"), "repeat"):
        assert part in last
    assert {row["line"]: row["seeds"] for row in _rows(out)} == {"ncm": "0 1", "bad": "0"}
    (out / "runs" / "bad-1" / "notes.txt").unlink()
    assert call(*words).code == 0
    assert {row["seeds"] for row in _rows(out)} == {"0 1"}


def test_nothing_is_shown_where_every_run_fails(call: Call, tmp_path: Path) -> None:
    words = [*_words(tmp_path, "lora", seeds="0"), "--method.first_adapted_layer", 7]
    called = call(*words)
    assert called.code == 2
    assert "1 of 1 runs failed (lora, seed 0); there is nothing to show yet." in called.err
    assert not (tmp_path / "out" / "compare.md").exists()


# -- what is asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
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
    assert_refused(call(*_words(tmp_path, "ncm")), "out is a file", "name a folder")


@pytest.mark.parametrize(("text", "numbers"), [("0", [0]), ("2, 0,2", [0, 2]), ("11", [11])])
def test_seeds_are_numbers_once_each(text: str, numbers: list[int]) -> None:
    assert compare_module.seed_numbers(text) == numbers


def test_seeds_in_a_file_may_be_one_number(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("methods: ncm\nout: x\nseeds: 5\n")
    assert (
        str(parse("compare", compare_module.compare, ["--config", str(tmp_path / "c.yaml")])["seeds"]) == "5"
    )


# -- kept features ------------------------------------------------------------------------------------------


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
    assert call(*_words(tmp_path, "ncm,linear", seeds="0")).code == 0
    assert len(asked) > 8 and all(asked)
    (path,) = (tmp_path / "out").glob("features-*.safetensors")
    backbone = tiny_backbone()
    assert path.name == f"features-{backbone.info.sha256[:12]}-32x32-{backbone.row_dim}.safetensors"
    assert len(FrozenFeatures.load(path, backbone)) == 36
    stamp = path.stat().st_mtime_ns
    assert call(*_words(tmp_path, "ncm", seeds="1")).code == 0
    assert path.stat().st_mtime_ns == stamp


def test_features_that_cannot_be_read_are_refused_before_the_runs(
    call: Call, started: Started, finished: Path
) -> None:
    (path,) = (finished / "out").glob("features-*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    assert call(*_words(finished, "ncm")).code == 0  # nothing is missing, so that nothing reads them
    refused = call(*_words(finished, "ncm", seeds="5"))
    assert_refused(refused, str(path), "no features that can be read", "delete it")
    assert started == []
    path.unlink()
    assert call(*_words(finished, "ncm", seeds="5")).code == 0


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
    assert call(*_words(finished, "ncm", seeds="5")).code == 0
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
        found.append(_read(out / "results.json"))
    assert comparable(found[0]) == comparable(found[1])
    assert found[0]["config"] == found[1]["config"]


def test_a_run_with_features_that_are_not_there_is_refused(call: Call, tmp_path: Path) -> None:
    words = ["--method", "ncm", "--out", tmp_path / "run", *SMALL, "--features", tmp_path / "nowhere"]
    assert_refused(call("run", *words), "nowhere holds no features", "leave --features out")
    assert not (tmp_path / "run").exists()


# -- processes ----------------------------------------------------------------------------------------------


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Job]]:
    """Makes jobs whose process is a shell that runs a few words, in a folder of its own."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\ncd "$(dirname "$0")"\nshift 2\neval "$1"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    number = itertools.count()
    yield lambda text: Job(f"job {(n := next(number))}", (text,), tmp_path / "logs" / f"{n}.log")


def test_jobs_run_in_order_and_say_how_they_end(stub: Callable[[str], Job], tmp_path: Path) -> None:
    jobs = [stub("echo one; echo 1 >> order"), stub("echo why it failed >&2; echo; exit 3"), stub("exit 1")]
    jobs.append(stub("echo 2 >> order"))
    said: list[str] = []
    assert run_jobs(jobs, 1, said.append) == jobs[1:3]
    assert (tmp_path / "order").read_text() == "1\n2\n"
    assert jobs[0].log.read_text() == "one\n"
    assert said[0] == "job 0: started, 3 more to start"
    assert said[1].startswith("job 0: finished in ")
    assert said[3] == f"job 1: failed, why it failed ({jobs[1].log})"
    assert said[5] == f"job 2: failed, see {jobs[2].log}"
    assert run_jobs([], 2, said.append) == []


def test_two_jobs_run_at_a_time_and_share_the_threads(
    stub: Callable[[str], Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    # Each of the first two waits for the other; the third would see neither's file if it began with them.
    wait = "i=0; while [ ! -e {other} ] && [ $i -lt 6000 ]; do sleep 0.05; i=$((i+1)); done; [ -e {other} ]"
    first = stub("touch a; echo $OMP_NUM_THREADS; " + wait.format(other="b"))
    second = stub("touch b; " + wait.format(other="a"))
    third = stub("[ -e a ] && [ -e b ]")
    assert run_jobs([first, second, third], 2, lambda _: None) == []
    assert first.log.read_text() == "4\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    last = stub("echo $OMP_NUM_THREADS")
    assert run_jobs([last], 2, lambda _: None) == []
    assert last.log.read_text() == "3\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, signal.SIGTERM])
def test_no_process_outlives_an_interruption(
    stub: Callable[[str], Job], tmp_path: Path, error: type[BaseException] | signal.Signals
) -> None:
    jobs = [
        stub("echo $$ > first; exec sleep 600"),
        stub("echo $$ > second; exec sleep 600"),
        stub("touch third"),
    ]

    def written(number: Path) -> bool:
        return number.exists() and number.read_text().endswith("\n")

    def interrupt(said: str) -> None:
        if said.startswith("job 1"):
            end = time.monotonic() + 300
            while not all(written(tmp_path / name) for name in ("first", "second")):
                assert time.monotonic() < end
                time.sleep(0.02)
            if isinstance(error, signal.Signals):
                signal.raise_signal(error)
                raise AssertionError("the signal was ignored")
            raise error

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt if isinstance(error, signal.Signals) else error):
        run_jobs(jobs, 2, interrupt)
    assert signal.getsignal(signal.SIGTERM) == handler
    for name in ("first", "second"):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / name).read_text()), 0)
    assert not (tmp_path / "third").exists()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Called]:
    """A comparison in two processes at a time, on the embedded backbone; one of the lines cannot be run."""
    folder = tmp_path_factory.mktemp("real")
    bad = folder / "deep.yaml"
    bad.write_text("method: {name: lora, first_adapted_layer: 99}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["compare", "--methods", f"joint,{bad.name}", "--out", "out", "--jobs", "2"]
        code = main([*words, *SMALL, "--epochs", "1"])
    return folder, Called(code, "", "")


@pytest.mark.process
def test_runs_are_processes_of_their_own(real: tuple[Path, Called]) -> None:
    folder, called = real
    out = folder / "out"
    assert called.code == 2
    assert "first_adapted_layer must be below" in (out / "logs" / "deep-0.log").read_text()
    assert set(_order(_rows(out))) == {"joint"}
    assert "report: out/runs/joint-0/report.md" in (out / "logs" / "joint-0.log").read_text()
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in (out / "compare.html").read_text()
    results = _read(out / "runs" / "joint-0" / "results.json")
    assert [len(task["classes"]) for task in results["tasks"]] == [4]
    assert results["config"]["method"]["epochs"] == 1

"""What a comparison makes of runs that are there already."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, assert_refused, images, on_disk
from compare_tools import (
    Started,
    edit,
    rows_of,
    stamps_of,
    words_of,
)


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
    before, times = on_disk(runs), stamps_of(runs)
    assert call(*words_of(finished, "lora,ncm,joint", finished / "lora-x.yaml")).code == 0
    assert started == []
    assert on_disk(runs) == before and stamps_of(runs) == times
    assert "lora-x" in (finished / "out" / "compare.md").read_text()


def test_only_what_is_missing_is_run(call: Call, started: Started, finished: Path) -> None:
    shutil.rmtree(finished / "out" / "runs" / "lora-0")
    times = stamps_of(finished / "out" / "runs")
    assert call(*words_of(finished, "lora,ncm", seeds="0,1,2")).code == 0
    assert started == ["lora, seed 0", "lora, seed 2", "ncm, seed 2"]
    after = stamps_of(finished / "out" / "runs")
    assert {path: after[path] for path in times} == times
    assert {row["seeds"] for row in rows_of(finished / "out")} == {"0 1 2"}


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
    words = words_of(finished, "", finished / "lora-x.yaml", seeds="0")
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
    edit(finished / "out" / "runs" / "ncm-1" / "results.json", lambda run: run["config"].update(tasks=4))
    refused = call(*words_of(finished, "ncm", seeds="2"))
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
    edit(finished / "out" / "runs" / "ncm-0" / "results.json", change)
    assert_refused(call(*words_of(finished, "ncm")), "ncm-0", part)


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
    assert_refused(call(*words_of(finished, "ncm")), str(path), "cannot be read", "delete", "run it again")
    assert started == []


def test_a_run_that_was_copied_in_is_on_the_page(call: Call, started: Started, finished: Path) -> None:
    """Of a seed that was not asked for; names that only begin like a line's have no part in it."""
    runs = finished / "out" / "runs"
    shutil.copytree(runs / "lora-1", runs / "lora-7")
    edit(runs / "lora-7" / "results.json", lambda run: run["config"].update(seed=7))
    edit(runs / "lora-7" / "results.json", lambda run: run["environment"].update(device="cuda (other)"))
    for name in ("lora-old", "lora-9", "lora-"):  # a name of one's own, a run that is not finished, a slip
        (runs / name).mkdir()
    (runs / "lora-old" / "results.json").write_text("mine")
    assert call(*words_of(finished, "lora,ncm", seeds="0")).code == 0
    assert started == []
    assert {row["line"]: row["seeds"] for row in rows_of(finished / "out")} == {"lora": "0 1 7", "ncm": "0 1"}
    text = (finished / "out" / "compare.md").read_text()
    assert "cuda (other)" in text and "0, 1, 7" in text


def test_a_line_may_have_an_odd_name(call: Call, started: Started, tmp_path: Path) -> None:
    """A name is no pattern for other names, and is shown as it is."""
    file = tmp_path / "a[1] <b>.yaml"
    file.write_text("method: {name: ncm, scale: 3}\n")
    assert call(*words_of(tmp_path, "ncm", file, seeds="0")).code == 0
    assert [row["line"] for row in rows_of(tmp_path / "out")].count("a[1] <b>") == 2
    assert "a[1] &lt;b&gt;" in (tmp_path / "out" / "compare.html").read_text()
    assert call(*words_of(tmp_path, "ncm", file, seeds="0")).code == 0
    assert len(started) == 2

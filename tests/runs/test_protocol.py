from __future__ import annotations

import csv
import json
import os

import faults
import numpy as np
import pytest
from means_learner import MeansLearner

from duallora import ContinualLearner, DualLoRAConfig, streams
from duallora.errors import DualLoRAError
from duallora.runs import protocol, report, results
from duallora.runs.answers import unpacked
from duallora.runs.protocol import run_stream
from duallora.runs.results import MEASURED
from duallora.runtime.progress import Progress
from duallora.storage import checkpoint

pytestmark = pytest.mark.slow

QUIET = Progress(quiet=True)
CONFIG = {"method": {"name": "means"}, "seed": 0, "sizes": (1, 2)}


@pytest.fixture(autouse=True)
def fake_learner(monkeypatch):
    monkeypatch.setattr(protocol, "ContinualLearner", MeansLearner)
    monkeypatch.setattr(results, "_SPEED_IMAGES", 4)


@pytest.fixture(scope="module")
def stream():
    return streams.digits(tasks=3, classes=6, train_per_class=8, holdout=6)


@pytest.fixture(scope="module")
def reference(stream, tmp_path_factory):
    """Results of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "ContinualLearner", MeansLearner)
        patch.setattr(report, "accuracy_plot", lambda results: b"a plot")
        return run(stream, tmp_path_factory.mktemp("reference") / "run")


def run(stream, out, fail_at=None, config=CONFIG, every=1):
    return run_stream(
        lambda: MeansLearner(fail_at),
        stream,
        out,
        config,
        device="cpu",
        progress=QUIET,
        evaluate_every=every,
    )


def comparable(value):
    """Results without what is measured with a clock or a memory counter."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items() if key not in MEASURED}
    return [comparable(item) for item in value] if isinstance(value, list | tuple) else value


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_finished_run(stream, tmp_path):
    out = tmp_path / "deep" / "run"
    returned = run(stream, out)
    written = json.loads((out / "results.json").read_text())
    assert json.loads(json.dumps(returned)) == written
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        *("results.json", "report.md", "accuracy.png", "predictions.csv", "model", "log.jsonl", "run.json")
    }
    assert [[cell is None for cell in row] for row in written["accuracy_matrix"]] == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]
    assert written["readout"] == "calibrated"
    assert written["readouts"]["calibrated"]["final_accuracy"] == written["final_accuracy"]
    assert set(written["readouts"]["heads"]) == set(written["readouts"]["calibrated"])
    assert written["stream"] == {
        "name": stream.name,
        "class_order": list(stream.class_order),
        "order_seed": stream.order_seed,
        "order_rule": stream.order_rule,
    }
    assert written["config"] == json.loads(json.dumps(CONFIG))
    assert written["peak_memory_bytes"] > 2**20
    assert written["inference"]["images_per_second"] > 0
    assert [task["test_images"] for task in written["tasks"]] == [12, 12, 12]
    assert [json.loads(line)["event"] for line in (out / "log.jsonl").read_text().splitlines()] == [
        *("start", "evaluated", "evaluated", "evaluated", "finished")
    ]
    assert MeansLearner.load(out / "model", device="cpu", progress=QUIET).classes == list(stream.class_order)


def test_the_figures_agree_with_the_predictions(stream, reference, tmp_path):
    run(stream, tmp_path / "run")
    with (tmp_path / "run" / "predictions.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["image", "label", "task", *(f"probability:{name}" for name in stream.class_order)]
    right = [line[1] == stream.class_order[int(np.argmax([float(p) for p in line[3:]]))] for line in lines]
    assert sum(right) / len(right) == reference["final_accuracy"]
    answers = unpacked(reference)
    assert answers is not None
    ordered = sorted(range(len(lines)), key=lambda i: (lines[i][1], lines[i][0]))
    assert answers.right["calibrated"].tolist() == [right[i] for i in ordered]
    assert len(lines) == sum(len(task.test) for task in stream)
    assert [line[0] for line in lines[:12]] == stream.tasks[0].test.identifiers


def test_drift_and_gate_by_hand(reference):
    # Features are the pixels times 1 + t: after three tasks, those of task 0 have gone from 2 to 4.
    assert reference["feature_drift"] == pytest.approx([1.0, 1 / 3, 0.0])
    assert all(0 < task["own_gate"] < 1 for task in reference["tasks"])
    assert 0 < reference["task_posterior_accuracy"] <= 1


def test_what_a_method_lacks_is_null(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(MeansLearner, "readout", "heads")
    monkeypatch.setattr(MeansLearner, "gated", False)
    figures = run(stream, tmp_path / "run")
    assert figures["readouts"]["calibrated"] is None and figures["readout"] == "heads"
    assert [task["own_gate"] for task in figures["tasks"]] == [None] * 3


def test_a_single_task(tmp_path):
    figures = run(streams.digits(tasks=1, classes=2, train_per_class=4, holdout=4), tmp_path / "run")
    assert figures["forgetting"] == 0.0 and figures["feature_drift"] == [0.0]
    assert len(figures["accuracy_matrix"]) == 1


def test_domains_share_their_classes(tmp_path):
    stream = streams.with_domains(
        streams.digits(tasks=1, classes=3, train_per_class=6, holdout=4), ("photo", "negative")
    )
    figures = run(stream, tmp_path / "run")
    assert figures["final_accuracy"] >= figures["final_row_accuracy"]
    assert figures["tasks"][0]["classes"] == figures["tasks"][1]["classes"]
    header = (tmp_path / "run" / "predictions.csv").read_text().splitlines()[0]
    assert header.count(",") == 2 + 3


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_resume_after_an_interruption(stream, reference, tmp_path, fail_at):
    with pytest.raises(KeyboardInterrupt):
        run(stream, tmp_path / "run", fail_at)
    assert comparable(run(stream, tmp_path / "run")) == comparable(reference)
    assert not list((tmp_path / "run").glob("progress*"))


@pytest.mark.parametrize("every", [2, 3, 9])
def test_what_is_not_looked_at_is_null_and_the_rest_is_the_same(stream, reference, tmp_path, every):
    with pytest.raises(KeyboardInterrupt):
        run(stream, tmp_path / "run", 2, every=every)
    written = run(stream, tmp_path / "run", every=every)
    assert written == json.loads((tmp_path / "run" / "results.json").read_text())
    looked_at = [
        (t + 1) % every == 0 or t in (0, 2) for t in range(3)
    ]  # one task's own images are all of them
    for readout, figures in written["readouts"].items():
        whole = reference["readouts"][readout]
        for key in ("accuracy_matrix", "oracle_accuracy_matrix"):
            for t, (row, wanted) in enumerate(zip(figures[key], whole[key], strict=True)):
                kept = [share if looked_at[t] or i == t else None for i, share in enumerate(wanted)]
                assert row == kept
        curve = [share if looked_at[t] else None for t, share in enumerate(whole["incremental_accuracy"])]
        assert figures["incremental_accuracy"] == curve
        known = [share for share in curve if share is not None]
        assert figures["average_incremental_accuracy"] == pytest.approx(sum(known) / len(known))
        for key in ("final_accuracy", "final_row_accuracy", "backward_transfer", "calibration_error"):
            assert figures[key] == whole[key]
        assert figures["forgetting"] <= whole["forgetting"]
    assert written["feature_drift"] == reference["feature_drift"]
    assert "| task 2 |" in (tmp_path / "run" / "report.md").read_text()


def test_a_long_stream_is_reported_by_its_curve(tmp_path, monkeypatch):
    long = streams.load("permuted-digits", tasks=25, train_per_class=3)
    written = run(long, tmp_path / "run", every=10)
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| after | all seen | given the task, mean over tasks |" in text
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| task ")][:4] == [
        "| task 1",
        "| task 10",
        "| task 20",
        "| task 25",
    ]
    assert report.accuracy_table(written).row_count == 4
    assert report.accuracy_plot(written)


def test_resume_after_an_undo_of_the_model(stream, reference, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(stream, tmp_path / "run", fail_at=2)
    checkpoint.undo(tmp_path / "run" / "model")
    assert comparable(run(stream, tmp_path / "run")) == comparable(reference)


@pytest.mark.parametrize(
    ("kind", "first"), [("full", 0), ("interrupt_after", 1), ("crash", 2), ("reorder", 0)]
)
def test_a_fault_at_any_file_operation(tmp_path, monkeypatch, kind, first):
    """Every third operation of each kind."""
    monkeypatch.setattr(report, "accuracy_plot", lambda results: b"a plot")
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: None
    )  # the injector keeps the books of what is synced
    short = streams.digits(tasks=2, classes=4, train_per_class=2, holdout=2)
    expected = comparable(run(short, tmp_path / "reference"))
    trials = 0
    for trial in faults.sweep(None, tmp_path, lambda folder: run(short, folder), kind, first=first, step=3):
        trials += 1
        if kind == "full" and trial.error is not None:
            assert isinstance(trial.error, DualLoRAError), trial
        if (trial.folder / "results.json").exists() and not any(trial.folder.glob("progress*")):
            figures = json.loads((trial.folder / "results.json").read_text())
        else:
            figures = run(short, trial.folder)
        assert comparable(figures) == expected, trial
        left = {name for name in files(trial.folder) if "progress" in name or name.endswith(".tmp")}
        assert not left, trial
    assert trials > 20


def test_a_learner_that_cannot_be_made_leaves_no_folder(stream, tmp_path):
    def fail():
        raise DualLoRAError("no such layer")

    with pytest.raises(DualLoRAError, match="no such layer"):
        run_stream(fail, stream, tmp_path / "run", CONFIG, device="cpu", progress=QUIET)
    assert not (tmp_path / "run").exists()


def test_a_resume_takes_the_given_backbone_and_makes_no_learner(stream, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(stream, tmp_path / "run", fail_at=1)
    load, given = MeansLearner.load, []

    def spy(folder, *, backbone, **settings):
        given.append(backbone)
        return load(folder, **settings)

    monkeypatch.setattr(MeansLearner, "load", spy)
    unused = object()
    run_stream(pytest.fail, stream, tmp_path / "run", CONFIG, device="cpu", progress=QUIET, backbone=unused)
    assert given == [unused]


def test_a_finished_folder_is_refused(stream, tmp_path):
    run(stream, tmp_path / "run")
    before = files(tmp_path / "run")
    with pytest.raises(DualLoRAError, match="finished run"):
        run(stream, tmp_path / "run")
    assert files(tmp_path / "run") == before


def test_a_foreign_folder_is_refused(stream, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DualLoRAError, match="not from a run"):
        run(stream, tmp_path)
    assert files(tmp_path) == {"thesis.txt": b"precious"}
    with pytest.raises(DualLoRAError, match="is a file"):
        run(stream, tmp_path / "thesis.txt")


def test_another_configuration_is_refused_and_named(stream, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(stream, tmp_path / "run", fail_at=1)
    before = files(tmp_path / "run")
    other = {**CONFIG, "method": {"name": "duallora"}}
    with pytest.raises(DualLoRAError, match=r'config\.method\.name: "means" there, "duallora" asked for'):
        run(stream, tmp_path / "run", config=other)
    assert files(tmp_path / "run") == before


def test_another_stream_is_refused(stream, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(stream, tmp_path / "run", fail_at=1)
    other = streams.digits(tasks=3, classes=6, train_per_class=7, holdout=6)
    with pytest.raises(DualLoRAError, match="another run"):
        run(other, tmp_path / "run")


def test_a_model_that_learned_something_else_is_refused(stream, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(stream, tmp_path / "run", fail_at=1)
    learner = MeansLearner.load(tmp_path / "run" / "model", device="cpu", progress=QUIET)
    learner.learn(stream.tasks[2].train, "by hand")
    learner.save(tmp_path / "run" / "model")
    with pytest.raises(DualLoRAError, match="other tasks"):
        run(stream, tmp_path / "run")


def test_lost_evaluations_are_named(stream, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(stream, tmp_path / "run", fail_at=2)
    (tmp_path / "run" / "progress-0.safetensors").unlink()
    with pytest.raises(DualLoRAError, match="lost the evaluation after task 1"):
        run(stream, tmp_path / "run")


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [3]}'])
def test_a_damaged_progress_file_is_named(stream, tmp_path, content):
    with pytest.raises(KeyboardInterrupt):
        run(stream, tmp_path / "run", fail_at=2)
    (tmp_path / "run" / "progress.json").write_text(content)
    with pytest.raises(DualLoRAError, match=r"progress\.json cannot be read"):
        run(stream, tmp_path / "run")


def test_a_folder_in_use_is_refused(stream, tmp_path):
    with checkpoint.exclusive(tmp_path / "run"), pytest.raises(DualLoRAError) as refusal:
        run(stream, tmp_path / "run")
    assert "nother process" in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_without_matplotlib_everything_else_is_written(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "accuracy_plot", lambda results: None)
    lines = []
    monkeypatch.setattr(QUIET, "line", lines.append)
    run(stream, tmp_path / "run")
    assert [line for line in lines if "duallora[report]" in line]
    assert not (tmp_path / "run" / "accuracy.png").exists()
    assert (tmp_path / "run" / "results.json").exists()


def test_the_real_learner_in_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "ContinualLearner", ContinualLearner)
    stream = streams.digits(tasks=3, classes=6, train_per_class=10, holdout=5)

    def learner():
        return ContinualLearner(
            method=DualLoRAConfig(epochs=1, min_steps=0, batch_size=8), augment="crop", device="cpu"
        )

    def interrupted():
        made = learner()
        learn = made.learn
        made.learn = lambda data, name: stop() if len(made.tasks) == 2 else learn(data, name)
        return made

    def stop():
        raise KeyboardInterrupt

    whole = run_stream(learner, stream, tmp_path / "whole", {}, device="cpu", progress=QUIET)
    with pytest.raises(KeyboardInterrupt):
        run_stream(interrupted, stream, tmp_path / "parts", {}, device="cpu", progress=QUIET)
    parts = run_stream(learner, stream, tmp_path / "parts", {}, device="cpu", progress=QUIET)
    assert comparable(parts) == comparable(whole)
    predictions = [(tmp_path / name / "predictions.csv").read_bytes() for name in ("whole", "parts")]
    assert predictions[0] == predictions[1]
    assert whole["final_accuracy"] > 1.5 / 6
    assert whole["inference"]["forward_passes_per_image"] == 1
    # The digits are one domain: its first task alone trains adapters.
    assert [task["orthogonal_norm"] > 0 for task in whole["tasks"]] == [True, False, False]

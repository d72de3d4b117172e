"""The main job in miniature: real images, the embedded backbone, three tasks, and what DualLoRA is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from duallora import ContinualLearner, DualLoRAConfig, LoRAConfig, MethodConfig, streams
from duallora.runs import report, results
from duallora.runs.protocol import run_stream
from duallora.runtime.progress import Progress

pytestmark = pytest.mark.slow

TASKS = 3
STREAM = streams.digits(tasks=TASKS, classes=6, train_per_class=30, holdout=12)
FAST: dict[str, Any] = {"epochs": 3, "min_steps": 0, "batch_size": 8, "learning_rate": 3e-3}
QUIET = Progress(quiet=True)

Runs = dict[str, tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Folder and results of both methods under the same epochs, seed and order."""
    configs: dict[str, MethodConfig] = {
        "duallora": DualLoRAConfig(rank=10, residual="own", **FAST),
        "lora": LoRAConfig(**FAST),
    }
    found: Runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "_SPEED_IMAGES", 16)
        patch.setattr(report, "accuracy_plot", lambda _: b"a plot")
        for name, config in configs.items():
            out = tmp_path_factory.mktemp(name) / "run"
            learner = ContinualLearner("embedded", config, device="cpu", augment=STREAM.augmentation)
            run_stream(lambda made=learner: made, STREAM, out, {"method": name}, device="cpu", progress=QUIET)
            found[name] = out, json.loads((out / "results.json").read_text())
    return found


def test_duallora_beats_sequential_lora(runs: Runs) -> None:
    """By far, under the plain heads that sequential LoRA is read with, and under its other readout too."""
    dual, lora = runs["duallora"][1], runs["lora"][1]
    assert (dual["readout"], lora["readout"]) == ("calibrated", "heads")
    assert lora["final_accuracy"] == lora["readouts"]["heads"]["final_accuracy"]
    assert dual["final_accuracy"] > 0.85
    assert dual["final_accuracy"] > lora["final_accuracy"] + 0.2
    assert dual["final_accuracy"] > lora["readouts"]["calibrated"]["final_accuracy"] + 0.3


def test_duallora_does_not_forget(runs: Runs) -> None:
    dual, lora = runs["duallora"][1], runs["lora"][1]
    assert dual["forgetting_given_task"] <= 0.02
    assert dual["forgetting"] < 0.15 < lora["readouts"]["calibrated"]["forgetting"]
    assert max(dual["feature_drift"]) < 0.1 < max(lora["feature_drift"])


def test_both_methods_do_learn(runs: Runs) -> None:
    for _, figures in runs.values():
        matrix = figures["oracle_accuracy_matrix"]
        learned = [matrix[t][t] for t in range(TASKS)]
        assert sum(learned) / TASKS > 0.85, learned  # by chance 0.5
    assert all(task["orthogonal_norm"] > 1e-3 for task in runs["lora"][1]["tasks"])
    first, *later = runs["duallora"][1]["tasks"]  # the digits are one domain, made in its first task
    assert first["orthogonal_norm"] > 1e-3 and first["residual_norm"] > 1e-3
    assert all(task["orthogonal_norm"] == task["residual_norm"] == 0 for task in later)
    assert runs["duallora"][1]["task_posterior_accuracy"] > 0.7


def test_what_is_trained(runs: Runs) -> None:
    """DualLoRA: B, Psi, C and two heads that lead them in the first task of a domain, then heads alone.

    The heads of DualLoRA read all that class rows read; those of sequential LoRA, and the first of those that
    lead, the final feature, the other the mean patch token.
    """
    dual, lora = (runs[name][1]["tasks"] for name in ("duallora", "lora"))
    layers, width, rank = 4, 192, 20
    r = DualLoRAConfig().residual_rank
    factors = 10 * 2 + r + r * 2  # B of k and v; the bases of R, and C of k and v
    head, wide = 2 * (width + 1), 2 * (4 * width + 1)
    trained = [t["trainable_parameters"] for t in dual]
    assert trained == [layers * factors * width + 2 * head, *[wide] * (TASKS - 1)]
    assert [t["trainable_parameters"] for t in lora] == [layers * rank * 3 * width + head] * TASKS


def test_the_model_of_the_run_predicts(runs: Runs) -> None:
    out, figures = runs["duallora"]
    learner = ContinualLearner.load(out / "model", device="cpu")
    right = images = 0
    for task in STREAM:
        found = learner.predict([task.test[i][0] for i in range(len(task.test))])
        right += sum(
            p.label == task.test.classes[target] for p, target in zip(found, task.test.targets, strict=True)
        )
        images += len(found)
    assert right / images == figures["final_accuracy"]
    assert learner.evaluate(STREAM.tasks[0].test).accuracy == figures["accuracy_matrix"][-1][0]

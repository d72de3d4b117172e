"""The threshold of the unknown: from held-back images, printed, saved, and used with ``auto``."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from command_line import assert_refused, images
from small_tasks import Patterns, learned, reloaded, three_tasks

from duallora import ContinualLearner, DualLoRAError
from duallora.outputs import mean_threshold, unknown_thresholds
from duallora.teaching.measure import Measured
from duallora.teaching.unknown import unknown_below

QUICK = ("--epochs", 1, "--method.min_steps", 0)


@pytest.fixture(scope="module")
def learner():
    return learned("duallora", three_tasks(8)[:2])


@pytest.mark.parametrize(("images", "place"), [(19, 1), (38, 1), (39, 2), (99, 5), (100, 5)])
def test_of_many_images_it_is_one_of_the_smallest(images, place):
    values = torch.linspace(0.2, 0.9, images, dtype=torch.float64)
    assert unknown_below(values.flip(0).tolist()) == pytest.approx(float(values[place - 1]))


@pytest.mark.parametrize("images", [2, 5, 18, 19, 60])
def test_95_of_100_new_images_lie_above(images):
    """Of many draws of log odds from a normal distribution, as with Student's interval."""
    drawn = torch.randn(2000, images + 1, generator=torch.Generator().manual_seed(images)).double().sigmoid()
    above = [float(new[-1]) >= unknown_below(new[:-1].tolist()) for new in drawn]
    assert 0.93 < sum(above) / len(above) < 0.975


def test_of_one_image_there_is_none():
    assert unknown_below([]) is None and unknown_below([0.5]) is None
    assert 0 < unknown_below([1.0, 1.0]) <= 1


def test_familiarities_are_those_of_the_outputs(learner):
    data = Patterns(["ant", "bee"], 5, seed=9)
    assert Measured.on(learner, data).familiarity == tuple(learner.outputs(data).familiarity.tolist())


def test_it_is_saved_with_the_lesson(learner, tmp_path):
    measured = Measured.on(learner, Patterns(["cat", "dog", "elk"], 4, seed=9))
    before = learner.tasks[-1]
    try:
        measured.note(learner)
        found = reloaded(learner, tmp_path / "model").tasks
        assert found[-1].unknown_below == unknown_below(measured.familiarity)
        assert found[0].unknown_below is None
    finally:
        learner.tasks[-1] = before


def test_lessons_without_images_take_the_mean_of_the_others(learner):
    one, two = learner.tasks
    with pytest.raises(DualLoRAError, match=r"--unknown-below 0\.2"):
        unknown_thresholds([one, two])
    records = [
        replace(one, name="a", unknown_below=0.2, held_back_images=30),
        replace(one, name="b", unknown_below=0.6, held_back_images=10),
        replace(one, name="c"),
    ]
    assert unknown_thresholds(records) == pytest.approx({"a": 0.2, "b": 0.6, "c": 0.3})
    assert mean_threshold(records) == pytest.approx(0.3) and mean_threshold([one, two]) is None


def test_learn_prints_it_and_predict_uses_it(call, tmp_path):
    said = call("learn", tmp_path / "pets", images(tmp_path / "a", ["cat", "dog"], 20), *QUICK)
    assert "95 % of new ones are above" in said.out
    manifest = json.loads((tmp_path / "pets" / "model.json").read_text())
    below = manifest["tasks"][0]["unknown_below"]
    assert f"unknown below a familiarity of {below:.2f}" in said.out
    other = images(tmp_path / "b", ["cat", "yak"], 4, seed=3)
    words = ("predict", tmp_path / "pets", other, "--json", "--unknown-below")
    found = json.loads(call(*words, "auto").out)["predictions"]
    assert [each["called_unknown"] for each in found] == [1 - each["unknown"] < below for each in found]
    named = json.loads(call(*words, below).out)["predictions"]
    assert [each["called_unknown"] for each in named] == [each["called_unknown"] for each in found]


def test_a_model_without_held_back_images_has_none(call, tmp_path):
    call("learn", tmp_path / "pets", images(tmp_path / "a", ["cat", "dog"], 4), *QUICK)
    refused = call("predict", tmp_path / "pets", tmp_path / "a", "--unknown-below", "auto")
    assert_refused(refused, "no lesson of this model had images held back")
    refused = call("predict", tmp_path / "pets", tmp_path / "a", "--unknown-below", "often")
    assert refused.code == 2 and "unknown-below" in refused.err


def test_a_threshold_that_is_no_number_is_damage(learner, tmp_path):
    learner.save(tmp_path / "model")
    manifest = json.loads((tmp_path / "model" / "model.json").read_text())
    manifest["tasks"][0]["unknown_below"] = "often"
    (tmp_path / "model" / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(DualLoRAError):
        ContinualLearner.load(tmp_path / "model", backbone=learner.backbone)

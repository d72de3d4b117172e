"""``predict --explain`` and ``evaluate --worst``: what is written, what is told, what is refused."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
from command_line import assert_refused, images, on_disk, taught_once
from PIL import Image


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A model that knows three classes, and unseen images with wrong names of two of them."""
    folder = tmp_path_factory.mktemp("template")
    taught_once(folder / "pets", images(folder / "a", ["cat", "dog", "elk"]))
    other = images(folder / "b", ["cat", "dog", "elk"], 3, seed=1)
    (other / "cat").rename(other / "x")
    (other / "dog").rename(other / "cat")
    (other / "x").rename(other / "dog")
    return folder


@pytest.fixture
def pets(call, template, tmp_path):
    return shutil.copytree(template, tmp_path, dirs_exist_ok=True)


def test_pictures_are_written_and_told(call, pets):
    one = pets / "b" / "elk" / "000.png"
    found = call("predict", pets / "pets", one, pets / "a" / "cat" / "000.png", "--explain", pets / "why")
    assert found.code == 0
    names = sorted(path.name for path in (pets / "why").iterdir())
    assert names == ["000.png.2.why.png", "000.png.why.png"]
    assert Image.open(pets / "why" / names[0]).size == (224, 224)
    assert "2103.15679" in found.out and "nearest lesson a, which taught cat, dog, elk" in found.out
    before = on_disk(pets / "why")
    said = call("predict", pets / "pets", one, "--explain", pets / "why", "--json")
    (record,) = json.loads(said.out)["predictions"]
    assert record["explanation"] == str(pets / "why" / "000.png.why.png")
    assert record["task_classes"] == ["cat", "dog", "elk"]
    assert on_disk(pets / "why") == before


def test_there_must_be_a_place_for_pictures(call, pets):
    (pets / "file").write_text("")
    one = pets / "b" / "elk" / "000.png"
    assert_refused(call("predict", pets / "pets", one, "--explain", pets / "file"), "is a file")
    assert_refused(call("predict", pets / "pets", one, "--explain", pets / "no" / "why"), "does not exist")


def test_the_surest_mistakes_come_first(call, pets):
    found = call("evaluate", pets / "pets", pets / "b", "--worst", 4, "--worst-out", pets / "worst", "--json")
    worst = json.loads(found.out)["worst"]
    assert len(worst) == 4
    assert {(each["true"], each["answer"]) for each in worst} <= {("cat", "dog"), ("dog", "cat")}
    sure = [each["probability"] for each in worst]
    assert sure == sorted(sure, reverse=True)
    assert all(each["probability_of_true"] < each["probability"] for each in worst)
    with (pets / "worst" / "worst.csv").open(encoding="utf-8", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [each["path"] for each in worst]
    assert Image.open(pets / "worst" / "worst.png").size == (4 * 152, 184)


def test_no_mistakes_are_said_to_be_none(call, pets):
    found = call("evaluate", pets / "pets", pets / "a", "--worst", 3, "--worst-out", pets / "worst")
    assert found.code == 0 and "no answer is wrong" in found.out
    assert list((pets / "worst").iterdir()) == []
    assert "worst" not in json.loads(call("evaluate", pets / "pets", pets / "a", "--json").out)


def test_worst_out_needs_a_number(call, pets):
    words = ("evaluate", pets / "pets", pets / "b", "--worst-out", pets / "worst")
    assert_refused(call(*words), "--worst N")
    assert_refused(call(*words, "--worst", -1), "--worst must be from 0")
    assert not (pets / "worst").exists()

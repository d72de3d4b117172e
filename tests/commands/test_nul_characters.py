"""A NUL character is part of no name: whoever gives one is told so, before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Call, assert_refused

from duallora import ContinualLearner, DualLoRAError


@pytest.mark.parametrize(
    "line", ["evaluate \0 pets", "inspect mo\0del", "predict model a\0.png", "run --out \0 --stream pets"]
)
def test_in_an_argument(call: Call, line: str) -> None:
    assert_refused(call(*line.split()), "NUL character", "leave it out")


def test_in_a_configuration(tmp_path: Path, call: Call) -> None:
    (tmp_path / "c.yaml").write_text('stream: "pe\\0ts"\n')
    words = ("run", "--out", tmp_path / "new", "--config", tmp_path / "c.yaml")
    assert_refused(call(*words), "NUL character", "--config")
    assert not (tmp_path / "new").exists()


def test_in_a_path_of_python(tmp_path: Path) -> None:
    with pytest.raises(DualLoRAError, match="NUL character"):
        ContinualLearner.load(tmp_path / "mo\0del", device="cpu")

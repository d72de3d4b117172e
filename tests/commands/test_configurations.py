"""Configurations that are blank, nested where a name belongs, or far too large; arguments of a megabyte."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Call, assert_refused, caller


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


BLANK = ["stream", "seed", "backbone", "device", "method", "precision"]
NESTED = {
    "method: {name: [duallora]}\n": "method.name is a list",
    "method: {name: {a: b}}\n": "method.name is a dict",
    "method: [duallora]\nseed: 1\n": "method is a list",
    "stream: [digits]\n": "stream is a list",
    "seed: {a: 1}\nstream: digits\n": "seed is a section",
    "method: {rank: [4, 5]}\n": "method.rank is a list",
    "backbone: [embedded]\nstream: digits\n": "backbone is a list",
}
ALIASES = "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 8)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize("key", BLANK)
def test_a_key_without_a_value_is_named(call: Call, tmp_path: Path, key: str) -> None:
    (tmp_path / "c.yaml").write_text(f"{key}:\nevaluate_every: 1\n")
    out = tmp_path / "out"
    assert_refused(call("run", "--out", out, "--config", tmp_path / "c.yaml"), f"{key} has no value")
    assert not out.exists()


@pytest.mark.parametrize("text", NESTED)
def test_a_list_where_one_value_belongs_is_named(call: Call, tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    out = tmp_path / "out"
    assert_refused(call("run", "--out", out, "--config", tmp_path / "c.yaml"), NESTED[text])
    assert not out.exists()


@pytest.mark.parametrize("text", [ALIASES, "a: &a [*a]\nb: 1\n", "seed: 1\n" + "# \n" * 400_000])
def test_a_file_that_swells_is_refused(call: Call, tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    code, _, err = call("run", "--out", tmp_path / "out", "--config", tmp_path / "c.yaml")
    assert code == 2 and ("more than 10,000 values" in err or "larger than a configuration" in err)


@pytest.mark.parametrize(
    "words",
    [
        ["x" * 1_000_000],
        ["run", "--" + "x" * 1_000_000],
        ["run", "--out", "o", "--stream", "x" * 1_000_000],
        ["run", "--out", "o", "--seed", "x" * 1_000_000],
        ["predict", "m", "x" * 1_000_000],
        ["inspect", "x" * 1_000_000],
        ["learn", "m", "x" * 1_000_000],
        ["run", "--config", "x" * 1_000_000],
        ["methods", "x" * 1_000_000],
    ],
)
def test_a_megabyte_of_argument_is_not_echoed(call: Call, words: list[str]) -> None:
    code, out, err = call(*words)
    assert code == 2 and len(out) + len(err) < 2000 and "internal error" not in err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_low_memory_is_said_as_such(call: Call, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("duallora.commands.methods.methods", fail)
    monkeypatch.setattr("duallora.commands.arguments.parse", lambda *_: {})
    assert_refused(call("methods"), "there is not enough memory")

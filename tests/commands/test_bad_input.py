from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Call, assert_refused, caller, images, on_disk, use_tiny_backbone
from PIL import Image

from duallora import ContinualLearner
from duallora.storage import checkpoint


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    use_tiny_backbone(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return caller(capsys)


@pytest.fixture
def refused(call: Call, tmp_path: Path) -> Callable[..., None]:
    """Asserts that a command is refused with one sentence that has the parts, and changes nothing."""

    def check(line: str, *parts: str) -> None:
        before = on_disk(tmp_path)
        assert_refused(call(*line.split()), *parts)
        assert on_disk(tmp_path) == before

    return check


Refused = Callable[..., None]


# -- folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "learn model nowhere",
        "learn model nowhere --dry-run",
        "learn new nowhere",
        "learn model pets --check nowhere",
        "evaluate model nowhere",
        "predict model nowhere.png",
        "predict model pets/cat nowhere",
        "run --out new --stream nowhere",
    ],
)
def test_a_missing_folder_or_image(model: Path, refused: Refused, line: str) -> None:
    refused(line, "nowhere")


@pytest.mark.parametrize(
    "line", ["evaluate nowhere pets", "predict nowhere pets", "inspect nowhere", "undo nowhere"]
)
def test_a_missing_model(model: Path, refused: Refused, line: str) -> None:
    refused(line, "no saved model in nowhere")


@pytest.mark.parametrize(
    "line", ["learn model birds", "learn new birds --skip-bad-images", "evaluate model birds"]
)
def test_an_empty_class_folder(model: Path, tmp_path: Path, refused: Refused, line: str) -> None:
    images(tmp_path / "birds", ["emu"])
    (tmp_path / "birds" / "kiwi").mkdir()
    refused(line, "birds/kiwi", "no readable image")


def test_an_empty_class_folder_in_a_stream(call: Call, tmp_path: Path, refused: Refused) -> None:
    images(tmp_path / "birds" / "train", ["emu", "owl"])
    images(tmp_path / "birds" / "val", ["emu"])
    (tmp_path / "birds" / "val" / "owl").mkdir()
    refused("run --out new --stream birds --tasks 2", "val/owl", "no readable image")


def test_a_folder_without_classes(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "empty").mkdir()
    refused("learn model empty", "empty", "one folder a class")
    refused("predict model empty", "empty", "no images")


def test_a_class_in_val_alone(call: Call, tmp_path: Path, refused: Refused) -> None:
    images(tmp_path / "birds" / "train", ["emu", "owl"])
    images(tmp_path / "birds" / "val", ["emu", "tit"], seed=1)
    refused("learn new birds", "tit")
    refused("learn new birds --dry-run", "tit")


def test_a_check_of_classes_that_the_model_does_not_know(
    model: Path, tmp_path: Path, refused: Refused
) -> None:
    images(tmp_path / "birds", ["emu", "owl"])
    refused("learn model birds --check birds", "emu")
    refused("learn model birds --check birds --dry-run", "emu")
    refused("learn new birds --check birds", "no model in new")
    refused("evaluate model birds", "emu")


def test_model_and_folder_swapped(model: Path, refused: Refused) -> None:
    refused("learn pets model", "pets", "no saved model", "cat")


def test_a_file_in_place_of_a_folder(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("")
    refused("learn file pets", "file is a file")
    refused("learn model file", "file is a file")
    refused("run --out file", "file is a file")
    refused("evaluate model file", "file is a file")


def test_an_output_that_cannot_be_written(model: Path, refused: Refused) -> None:
    refused("predict model pets --out nowhere/p.csv", "nowhere/p.csv")


# -- images -------------------------------------------------------------------------------------------------


def _png(width: int, height: int) -> bytes:
    """A file that claims a size, with next to no pixels in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"0"))
        + chunk(b"IEND", b"")
    )


def _truncated(folder: Path) -> bytes:
    whole = (folder / "000.png").read_bytes()
    return whole[: len(whole) // 2]


BAD_FILES: dict[str, Callable[[Path], bytes]] = {
    "empty.png": lambda _: b"",
    "text.jpg": lambda _: b"not an image",
    "page.html": lambda _: b"<html>",
    "cut.png": _truncated,
    "huge.png": lambda _: _png(100_000, 100_000),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_image_is_named_or_skipped(
    call: Call, model: Path, tmp_path: Path, refused: Refused, name: str
) -> None:
    birds = images(tmp_path / "birds", ["emu", "owl"])
    (birds / "emu" / name).write_bytes(BAD_FILES[name](birds / "emu"))
    refused("learn model birds", f"birds/emu/{name}", "--skip-bad-images")
    refused("learn new birds", f"birds/emu/{name}")
    refused("run --out new --stream birds --tasks 2 --holdout 1", f"birds/emu/{name}")
    refused(f"predict model birds/emu/{name}", f"birds/emu/{name}")
    skipped = call("learn", "model", "birds", "--skip-bad-images", "--epochs", 1)
    assert skipped.code == 0
    assert "bad images left out: 1" in skipped.out
    refused("evaluate model birds", f"birds/emu/{name}")


def test_bad_images_among_those_to_check(call: Call, model: Path, tmp_path: Path, refused: Refused) -> None:
    images(tmp_path / "birds", ["emu", "owl"])
    for name in ("text.jpg", "page.html"):
        (tmp_path / "pets" / "cat" / name).write_text("no image")
    refused("learn model birds --check pets", "pets/cat/page.html", "--skip-bad-images")
    planned = call("learn", "model", "birds", "--check", "pets", "--dry-run").out
    assert "bad images: 2; " in planned and "pets/cat/page.html" in planned
    words = ["--check", "pets", "--max-drop", 1, "--skip-bad-images", "--epochs", 1]
    learned = call("learn", "model", "birds", *words)
    assert (learned.code, "bad images left out: 2" in learned.out) == (0, True)


def test_a_bad_image_where_none_can_be_skipped(call: Call, model: Path, tmp_path: Path) -> None:
    for name in ("text.jpg", "page.html"):
        (tmp_path / "pets" / "cat" / name).write_text("no image")
        for line in ("evaluate model pets", "run --out new --stream pets --tasks 1 --holdout 1"):
            called = call(*line.split())
            assert_refused(called, f"pets/cat/{name}")
            assert "skip" not in called.err
        (tmp_path / "pets" / "cat" / name).unlink()


def test_a_huge_image_is_refused_by_its_size(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "huge.png").write_bytes(_png(100_000, 100_000))
    refused("predict model huge.png", "huge.png", "pixels")


def test_all_readable_kinds_of_images_work(call: Call, model: Path, tmp_path: Path) -> None:
    kinds = tmp_path / "kinds" / "odd"
    kinds.mkdir(parents=True)
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(0, 255, (9, 7), dtype=np.uint8))
    colour = Image.fromarray(rng.integers(0, 255, (9, 7, 3), dtype=np.uint8))
    Image.fromarray(rng.integers(0, 65535, (9, 7), dtype=np.uint16)).save(kinds / "16bit.png")
    colour.quantize(16).save(kinds / "palette.png")
    colour.convert("CMYK").save(kinds / "cmyk.jpg")
    colour.convert("RGBA").save(kinds / "alpha.png")
    grey.convert("1").save(kinds / "bits.png")
    grey.save(kinds / "animated.gif", save_all=True, append_images=[grey.rotate(90)])
    colour.resize((1, 1)).save(kinds / "pixel.bmp")
    predictions = json.loads(call("predict", "model", "kinds", "--json").out)["predictions"]
    assert len(predictions) == 7
    learned = call("learn", "model", "kinds", "--epochs", 1)
    assert (learned.code, "1 classes, 7 images" in learned.out) == (0, True)


@pytest.mark.parametrize("name", ["猫", "a\\b", "café crème", "-rf", "[red]", "%s", "no.1"])
def test_unusual_class_names_work(call: Call, model: Path, tmp_path: Path, name: str) -> None:
    images(tmp_path / "odd", [name, "plain"])
    learned = call("learn", "model", "odd", "--name", f"of {name}", "--epochs", 1)
    assert learned.code == 0
    about = json.loads(call("inspect", "model", "--json").out)
    assert name in about["tasks"][1]["classes"]
    assert name in call("inspect", "model").out
    assert call("evaluate", "model", "odd").code == 0
    assert call("predict", "model", "odd").code == 0


@pytest.mark.parametrize("name", ["two\nlines", os.fsdecode(b"\xff\xfe")])
def test_class_names_that_no_text_can_hold(model: Path, tmp_path: Path, refused: Refused, name: str) -> None:
    images(tmp_path / "odd", ["plain"])
    (tmp_path / "odd" / "plain").rename(tmp_path / "odd" / name)
    refused("learn model odd", "class name", "rename")


# -- models -------------------------------------------------------------------------------------------------


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        manifest = json.loads((model / "model.json").read_text())
        change(manifest)
        (model / "model.json").write_text(json.dumps(manifest))

    return edit


def _weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        (file,) = model.glob("model-*.safetensors")
        file.write_bytes(change(file.read_bytes()))

    return edit


DAMAGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "truncated": (lambda m: os.truncate(m / "model.json", 100), ["model.json", "truncated"]),
    "foreign": (lambda m: (m / "model.json").write_text('{"model": 1}') and None, ["not a model"]),
    "newer format": (_edit(lambda m: m.update(format_version=3)), ["newer duallora", "upgrade"]),
    "earlier format": (
        _edit(lambda m: m.update(format_version=1)),
        ["earlier duallora", "teach the model again", "the version that wrote it"],
    ),
    "tampered weights": (_weights(lambda data: data[:-1] + b"\x7f"), ["model-", "sha256"]),
    "truncated weights": (_weights(lambda data: data[:100]), ["model-", "sha256"]),
    "another backbone": (
        _edit(lambda m: m["backbone"].update(sha256="0" * 64)),
        ["000000000000", "sha256", "tiny-vit"],
    ),
    "unknown method": (_edit(lambda m: m.update(method="magic")), ["magic", "duallora"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model(model: Path, refused: Refused, damage: str) -> None:
    spoil, parts = DAMAGES[damage]
    spoil(model)
    refused("predict model pets", *parts)
    refused("evaluate model pets", *parts)
    refused("learn model pets", *parts)


@pytest.mark.parametrize("key", ["tasks", "method", "config", "backbone", "seed", "augment"])
def test_an_entry_that_somebody_removed(model: Path, refused: Refused, key: str) -> None:
    _edit(lambda m: m.pop(key))(model)
    for line in ("inspect model", "inspect model --json", "learn model pets", "learn model pets --dry-run"):
        refused(line, "model.json", key)


@pytest.mark.parametrize("tasks", [None, 3, ["pets"], [{"name": "pets"}], [{"classes": []}]])
def test_tasks_that_somebody_rewrote(model: Path, refused: Refused, tasks: object) -> None:
    _edit(lambda m: m.update(tasks=tasks))(model)
    for line in ("inspect model", "learn model pets --name more"):
        refused(line, "model.json")


def test_an_earlier_state_that_somebody_edited(
    call: Call, model: Path, tmp_path: Path, refused: Refused
) -> None:
    assert call("learn", "model", "pets", "--epochs", 1).code == 0
    _edit(lambda m: m["previous"].pop("tasks"))(model)
    refused("undo model", "model.json", "tasks")


def test_a_missing_weight_file(model: Path, refused: Refused) -> None:
    next(model.glob("model-*.safetensors")).unlink()
    refused("predict model pets", "model-", "missing")
    refused("inspect model", "model-", "missing")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--method lora", ["--method duallora, not lora"]),
        ("--method lora --method.rank 10", ["--method duallora, not lora"]),
        ("--method.rank 5", ["--method.rank 20, not 5"]),
        ("--method.residual next --epochs 2", ["--method.residual own, not next"]),
        ("--backbone vit_base_patch16_224.augreg_in21k", ["--backbone tiny-vit, not vit_base"]),
        ("--backbone-file pets/cat/000.png", ["sha256", "pets/cat/000.png has"]),
        ("--backbone-file nowhere", ["nowhere cannot be read"]),
        ("--name pets", ["a task named pets already"]),
    ],
)
def test_a_wish_that_the_model_does_not_store(
    model: Path, refused: Refused, words: str, parts: list[str]
) -> None:
    refused(f"learn model pets {words}", *parts)
    refused(f"learn model pets {words} --dry-run", *parts)


def test_what_the_model_stores_may_be_said_again(call: Call, model: Path) -> None:
    words = ["--method", "duallora", "--method.rank", 20, "--backbone", "tiny-vit", "--epochs", 1]
    assert call("learn", "model", "pets", *words).code == 0


def test_an_unknown_backbone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "pets", ["cat", "dog"], 2)
    before = on_disk(tmp_path)
    for line in ("learn new pets", "learn new pets --dry-run", "run --out new"):
        for words, part in (
            ("--backbone embeded", "embedded"),
            ("--backbone vit_base_patch16_224", "vit_base_patch16_224.augreg_in21k"),
            ("--backbone-file pets/cat/000.png", "pets/cat/000.png"),
        ):
            assert_refused(caller(capsys)(*line.split(), *words.split()), part)
    assert on_disk(tmp_path) == before


# -- circumstances ------------------------------------------------------------------------------------------


def test_a_second_writer(call: Call, model: Path, refused: Refused) -> None:
    with checkpoint.exclusive(model):
        refused("learn model pets --epochs 1", "nother process is writing to model")
        refused("undo model", "nother process is writing to model")
        assert call("predict", "model", "pets").code == 0  # readers never lock


def test_a_full_disk(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("duallora.storage.atomic.os.write", full)
        refused("learn model pets --epochs 1", "the disk is full")
        refused("learn new pets --epochs 1", "the disk is full")
        refused("predict model pets --out p.csv", "the disk is full")
    assert call("learn", "model", "pets", "--epochs", 1).code == 0


@pytest.mark.parametrize("moment", ["learn", "commit", "outputs"])
def test_ctrl_c(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ContinualLearner, moment, interrupt)
    before = on_disk(tmp_path)
    for place in ("model", "new"):
        called = call(
            "learn", place, "pets", *(["--check", "pets"] if place == "model" else []), "--epochs", 1
        )
        if moment != "outputs" or place == "model":
            assert_refused(called, "interrupted", code=130)
            assert on_disk(tmp_path) == before

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from saved_generations import assert_clean, generation_of, names, save, weights

from duallora.errors import DualLoRAError
from duallora.storage import checkpoint

NAME = "model-0123456789ab.safetensors"


def test_what_is_read_is_what_was_committed(model: Path) -> None:
    assert generation_of(model) == 2
    manifest = checkpoint.read_manifest(model)
    assert manifest["classes"] == ["ä/b", "c"]
    assert manifest["format_version"] == checkpoint.FORMAT_VERSION
    data = (model / manifest["weights"]).read_bytes()
    assert manifest["files"] == {manifest["weights"]: hashlib.sha256(data).hexdigest()}
    assert manifest["weights"] == f"model-{hashlib.sha256(data).hexdigest()[:12]}.safetensors"
    assert manifest["previous"]["generation"] == 1 and "previous" not in manifest["previous"]


def test_files_that_no_generation_names_are_deleted(model: Path) -> None:
    first = checkpoint.read_manifest(model)["previous"]["weights"]
    (model / "notes.txt").write_text("mine")
    (model / ".model.json.0123456789abcdef.tmp").write_text("left by a kill")
    save(model, 3)
    assert first not in names(model)
    assert "notes.txt" in names(model)
    (model / "notes.txt").unlink()
    assert_clean(model)


def test_the_same_generation_saved_twice_is_one_step_for_undo(model: Path) -> None:
    save(model, 2)
    assert checkpoint.undo(model)["generation"] == 1


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    with checkpoint.exclusive(tmp_path):
        checkpoint.commit(tmp_path, {}, {"k": shared, "v": shared, "part": shared[2:]})
    _, tensors = checkpoint.read(tmp_path)
    assert torch.equal(tensors["v"], shared) and torch.equal(tensors["part"], shared[2:])


def test_an_extra_file_is_copied_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "vit.safetensors"
    source.write_bytes(b"weights" * 1000)
    folder = tmp_path / "model"
    save(folder, 1, source)
    copy = next(folder.glob("backbone-*.safetensors"))
    assert copy.read_bytes() == source.read_bytes()
    before = copy.stat()
    save(folder, 2, source)
    save(folder, 3, copy)
    assert copy.stat().st_mtime_ns == before.st_mtime_ns and copy.stat().st_ino == before.st_ino
    assert generation_of(folder) == 3
    assert_clean(folder)
    copy.write_bytes(b"weightS" * 1000)
    with pytest.raises(DualLoRAError, match=r"backbone-.*changed"):
        checkpoint.read(folder)


def test_an_extra_file_that_is_missing_changes_nothing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DualLoRAError, match="could not be saved"):
        save(model, 3, tmp_path / "gone.safetensors")
    assert generation_of(model) == 2
    assert_clean(model)


# --- undo ---


def test_undo_goes_back_one_step_and_only_one(model: Path) -> None:
    assert checkpoint.undo(model)["generation"] == 1
    assert generation_of(model) == 1
    assert_clean(model)
    with pytest.raises(DualLoRAError, match="nothing to undo"):
        checkpoint.undo(model)
    save(model, 5)
    assert checkpoint.undo(model)["generation"] == 1


def test_undo_of_a_first_generation_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model", 1)
    with pytest.raises(DualLoRAError, match="nothing to undo"):
        checkpoint.undo(tmp_path / "model")
    assert generation_of(tmp_path / "model") == 1


def test_undo_to_a_damaged_generation_is_refused(model: Path) -> None:
    path = model / checkpoint.read_manifest(model)["previous"]["weights"]
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(DualLoRAError, match="truncated or changed"):
        checkpoint.undo(model)
    path.unlink()
    with pytest.raises(DualLoRAError, match="missing"):
        checkpoint.undo(model)
    assert generation_of(model) == 2


def test_undo_without_a_model_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(DualLoRAError, match="no saved model"):
        checkpoint.undo(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- damaged, foreign and newer models ---


def test_a_changed_or_truncated_weight_file_is_named(model: Path) -> None:
    name = checkpoint.read_manifest(model)["weights"]
    data = (model / name).read_bytes()
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[: len(data) // 2], b""):
        (model / name).write_bytes(damaged)
        with pytest.raises(DualLoRAError, match=name):
            checkpoint.read(model)


def test_a_missing_weight_file_is_named(model: Path) -> None:
    name = checkpoint.read_manifest(model)["weights"]
    (model / name).unlink()
    with pytest.raises(DualLoRAError, match=f"{name} is missing"):
        checkpoint.read(model)


def test_a_truncated_manifest_is_refused_and_not_replaced(model: Path) -> None:
    path = model / "model.json"
    path.write_bytes(path.read_bytes()[:100])
    for act in (lambda: checkpoint.read(model), lambda: save(model, 3), lambda: checkpoint.undo(model)):
        before = {name: (model / name).read_bytes() for name in names(model)}
        with pytest.raises(DualLoRAError, match="truncated or not JSON"):
            act()
        assert {name: (model / name).read_bytes() for name in names(model)} == before


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        "{}",
        '{"format_version": "1"}',
        '{"format_version": true}',
        '{"format_version": 0}',
        '{"format_version": 2}',
        '{"format_version": 2, "weights": "a", "files": {"a": 3}}',
        '{"format_version": 2, "weights": "../x.safetensors", "files": {"../x.safetensors": "00"}}',
        '{"format_version": 2, "weights": ["a"], "files": {}}',
        json.dumps({"format_version": 2, "weights": NAME, "files": {NAME: 1}}),
        json.dumps({"format_version": True, "weights": NAME, "files": {NAME: "00"}}),
    ],
)
def test_a_foreign_manifest_is_refused_and_not_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.json").write_text(content)
    for act in (
        lambda: checkpoint.read(tmp_path),
        lambda: save(tmp_path, 3),
        lambda: checkpoint.undo(tmp_path),
    ):
        with pytest.raises(DualLoRAError, match="not a model saved by duallora"):
            act()
    assert (tmp_path / "model.json").read_text() == content


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000, b""])
def test_a_manifest_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(DualLoRAError, match="not JSON"):
        checkpoint.read(tmp_path)


def test_a_newer_format_is_refused_and_not_replaced(model: Path) -> None:
    manifest = checkpoint.read_manifest(model)
    newer = json.dumps({**manifest, "format_version": checkpoint.FORMAT_VERSION + 1})
    (model / "model.json").write_text(newer)
    for act in (lambda: checkpoint.read(model), lambda: save(model, 3), lambda: checkpoint.undo(model)):
        with pytest.raises(DualLoRAError, match=r"newer duallora .*upgrade"):
            act()
    assert (model / "model.json").read_text() == newer


def test_an_earlier_format_is_refused_with_the_remedy_and_not_replaced(model: Path) -> None:
    manifest = checkpoint.read_manifest(model)
    for version in range(1, checkpoint.FORMAT_VERSION):
        earlier = json.dumps({**manifest, "format_version": version})
        (model / "model.json").write_text(earlier)
        for act in (
            lambda: checkpoint.read(model),
            lambda: checkpoint.read_manifest(model),
            lambda: save(model, 3),
            lambda: checkpoint.undo(model),
        ):
            with pytest.raises(
                DualLoRAError, match=rf"earlier duallora \(format {version}, .*teach"
            ) as caught:
                act()
            assert "\n" not in str(caught.value)
            assert "the version that wrote it" in str(caught.value)
        assert (model / "model.json").read_text() == earlier


@pytest.mark.parametrize("version", [0, -1, None, "1", 1.0, True])
def test_a_format_that_never_was_is_no_model(model: Path, version: object) -> None:
    manifest = checkpoint.read_manifest(model)
    (model / "model.json").write_text(json.dumps({**manifest, "format_version": version}))
    with pytest.raises(DualLoRAError, match="not a model saved by duallora"):
        checkpoint.read(model)


@pytest.mark.parametrize("kind", ["nowhere", "folder", "file"])
def test_a_place_without_a_model_is_refused(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "folder":
        place.mkdir()
    elif kind == "file":
        place.write_text("")
    with pytest.raises(DualLoRAError, match="no saved model"):
        checkpoint.read(place)
    if kind == "file":
        with pytest.raises(DualLoRAError, match="cannot be written"):
            save(place, 1)


def test_an_extra_file_is_read_once_and_must_be_the_one_that_was_loaded(tmp_path: Path) -> None:
    backbone = tmp_path / "vit.safetensors"
    backbone.write_bytes(b"first")
    digest = checkpoint.sha256_of(backbone)
    save(tmp_path / "model", 1, backbone)
    backbone.write_bytes(b"another")
    with checkpoint.exclusive(tmp_path / "model"):
        # The copy in the folder is enough: the source may have changed or gone.
        checkpoint.commit(
            tmp_path / "model", {"generation": 2}, weights(2), extra_files={"backbone": (backbone, digest)}
        )
    assert generation_of(tmp_path / "model") == 2
    with (
        checkpoint.exclusive(tmp_path / "other"),
        pytest.raises(DualLoRAError, match="has changed since it was loaded"),
    ):
        checkpoint.commit(
            tmp_path / "other", {"generation": 1}, weights(1), extra_files={"backbone": (backbone, digest)}
        )

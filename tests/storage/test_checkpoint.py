from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest
import torch

from duallora.errors import DualLoRAError
from duallora.storage import atomic, checkpoint

NAME = "model-0123456789ab.safetensors"
FORK = multiprocessing.get_context("fork")


def weights(generation: int) -> dict[str, torch.Tensor]:
    return {
        "dW": torch.full((3, 4), float(generation)),
        "rows": torch.arange(6, dtype=torch.float64).reshape(2, 3).T + generation,
        "counts": torch.tensor([generation], dtype=torch.int64),
        "nothing": torch.zeros(0, 5, dtype=torch.bfloat16),
    }


def save(folder: Path, generation: int, backbone: Path | None = None) -> None:
    extra = {}
    if backbone is not None:
        digest = checkpoint.sha256_of(backbone) if backbone.exists() else "0" * 64
        extra = {"backbone": (backbone, digest)}
    with checkpoint.exclusive(folder):
        checkpoint.commit(
            folder,
            {"generation": generation, "classes": ["ä/b", "c"]},
            weights(generation),
            extra_files=extra,
        )


def generation_of(folder: Path) -> int:
    """The generation in the folder, after checking that it is complete."""
    manifest, tensors = checkpoint.read(folder)
    generation: int = manifest["generation"]
    for name, expected in weights(generation).items():
        assert tensors[name].dtype == expected.dtype
        assert torch.equal(tensors[name], expected), name
    return generation


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_clean(folder: Path) -> None:
    """Only what the current and the previous generation name is there."""
    manifest = checkpoint.read_manifest(folder)
    named = set(manifest["files"]) | set((manifest["previous"] or {"files": {}})["files"])
    assert names(folder) == named | {"model.json", ".lock"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with two generations, the second one current."""
    folder = tmp_path / "model"
    save(folder, 1)
    save(folder, 2)
    return folder


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


# --- faults ---


@pytest.mark.parametrize("kind", faults.KINDS)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_fault_at_any_operation_leaves_the_old_or_the_new_model(
    tmp_path: Path, kind: faults.Kind, first: bool
) -> None:
    start = None
    backbone = tmp_path / "vit.safetensors"
    backbone.write_bytes(b"x" * 1000)
    if not first:
        start = tmp_path / "start"
        save(start, 0)
        save(start, 1)
    operations = []
    for trial in faults.sweep(start, tmp_path, lambda folder: save(folder, 2, backbone), kind):
        operations.append(trial.operation)
        if first and not (trial.folder / "model.json").exists():
            assert trial.error is not None, trial
            with pytest.raises(DualLoRAError, match="no saved model"):
                checkpoint.read(trial.folder)
        else:
            assert generation_of(trial.folder) == 2 or (not first and generation_of(trial.folder) == 1), trial
        if trial.error is None:
            assert generation_of(trial.folder) == 2
        expected: Any = {
            "full": DualLoRAError,
            "full_for_good": DualLoRAError,
            "interrupt": KeyboardInterrupt,
        }
        expected |= {"interrupt_after": KeyboardInterrupt}
        assert trial.error is None or isinstance(trial.error, expected.get(kind, faults.SimulatedCrash)), (
            trial
        )
        if isinstance(trial.error, DualLoRAError):
            assert not list(trial.folder.glob(".*.tmp")) if trial.folder.exists() else True
            assert "the disk is full" in str(trial.error)
        save(trial.folder, 3)
        assert generation_of(trial.folder) == 3
        assert_clean(trial.folder)
    assert len(operations) > 12


@pytest.mark.parametrize("kind", faults.KINDS)
def test_a_fault_at_any_operation_of_undo_leaves_either_generation(tmp_path: Path, kind: faults.Kind) -> None:
    start = tmp_path / "start"
    save(start, 1)
    save(start, 2)
    for trial in faults.sweep(start, tmp_path, checkpoint.undo, kind):
        assert generation_of(trial.folder) in (1, 2), trial
        if trial.error is None:
            assert generation_of(trial.folder) == 1
        save(trial.folder, 3)
        assert_clean(trial.folder)


def test_undo_still_works_after_a_failed_save(tmp_path: Path) -> None:
    start = tmp_path / "start"
    save(start, 1)
    save(start, 2)
    for trial in faults.sweep(start, tmp_path, lambda folder: save(folder, 3), "full"):
        current = generation_of(trial.folder)
        checkpoint.undo(trial.folder)
        assert generation_of(trial.folder) == current - 1, trial


@pytest.mark.parametrize("kind", faults.KINDS)
def test_an_atomic_write_leaves_the_old_or_the_new_content(tmp_path: Path, kind: faults.Kind) -> None:
    start = tmp_path / "start"
    start.mkdir()
    (start / "results.json").write_bytes(b"old content")
    for trial in faults.sweep(
        start, tmp_path, lambda d: checkpoint.write_atomic(d / "results.json", b"new"), kind
    ):
        content = (trial.folder / "results.json").read_bytes()
        assert content == b"new" or (trial.operation is not None and content == b"old content"), trial
        checkpoint.remove_leftovers(trial.folder)
        assert names(trial.folder) == {"results.json"}


def test_the_injected_faults_find_a_careless_writer(tmp_path: Path) -> None:
    start = tmp_path / "start"
    start.mkdir()
    (start / "state").write_text("old content")

    def in_place(folder: Path) -> None:
        (folder / "state").write_text("new content")

    def without_sync(folder: Path) -> None:
        (folder / "temporary").write_text("new content")
        (folder / "temporary").replace(folder / "state")
        (folder / "done").touch()

    cases: list[tuple[Callable[[Path], None], faults.Kind]] = [
        (in_place, "crash"),
        (in_place, "full"),
        (without_sync, "reorder"),
        (without_sync, "power"),
    ]
    for action, kind in cases:
        states = {
            (t.folder / "state").read_text() for t in faults.sweep(start, tmp_path / kind, action, kind)
        }
        lost = not states <= {"old content", "new content"}
        # Undoing every unsynced rename happens to be safe; keeping one without its file's content is not.
        assert lost == (kind != "power"), (action, kind, states)


# --- writers and readers beside each other ---


def test_a_second_writer_is_refused_and_a_killed_one_does_not_block(model: Path) -> None:
    held, tell = FORK.Pipe(duplex=False)

    def hold() -> None:
        with checkpoint.exclusive(model):
            tell.send(True)
            time.sleep(600)

    process = FORK.Process(target=hold)
    process.start()
    assert held.recv()
    with pytest.raises(DualLoRAError, match="another process is writing"):
        save(model, 3)
    with pytest.raises(DualLoRAError, match="another process is writing"):
        checkpoint.undo(model)
    assert generation_of(model) == 2
    process.kill()
    process.join()
    save(model, 3)
    assert generation_of(model) == 3


def test_two_writers_and_a_reader_never_see_half_a_model(model: Path) -> None:
    def write(offset: int) -> None:
        done = 0
        while done < 15:
            try:
                save(model, offset + done)
                done += 1
            except DualLoRAError as error:
                if "another process" not in str(error):
                    os._exit(1)

    writers = [FORK.Process(target=write, args=(offset,)) for offset in (100, 200)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        generation_of(model)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert generation_of(model) in (114, 214)
    assert_clean(model)


def test_kills_at_random_moments_lose_nothing(model: Path) -> None:
    draw = random.Random(0)
    last = 2

    def write() -> None:
        for generation in range(last, last + 10_000):
            save(model, generation)

    for _ in range(15):
        process = FORK.Process(target=write)
        process.start()
        time.sleep(draw.uniform(0, 0.05))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert generation_of(model) >= last
        last = generation_of(model)
    save(model, last + 1)
    assert_clean(model)


def test_the_lock_removes_a_folder_into_which_nothing_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with pytest.raises(ZeroDivisionError), checkpoint.exclusive(folder):
        assert folder.is_dir()
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    with checkpoint.exclusive(folder):
        (folder / "x").touch()
    assert (folder / "x").exists()


def test_the_lock_is_not_fooled_by_a_deleted_lock_file(tmp_path: Path) -> None:
    with checkpoint.exclusive(tmp_path):
        (tmp_path / ".lock").unlink()
        with checkpoint.exclusive(tmp_path):
            pass


# --- atomic writes ---


def test_an_atomic_write_replaces_the_target_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    checkpoint.write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def test_an_atomic_write_to_a_pipe_goes_through_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    checkpoint.write_atomic(tmp_path / "pipe", b"new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)


def test_an_atomic_write_into_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DualLoRAError, match="could not be written: No such file"):
        checkpoint.write_atomic(tmp_path / "gone" / "file", b"")


def test_a_large_file_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_CHUNK", 7)
    checkpoint.write_atomic(tmp_path / "file", bytes(range(100)))
    assert (tmp_path / "file").read_bytes() == bytes(range(100))


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

"""A fault, a kill or another process at any moment leaves a whole model."""

from __future__ import annotations

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
from saved_generations import assert_clean, generation_of, names, save

from duallora.errors import DualLoRAError
from duallora.storage import checkpoint

pytestmark = pytest.mark.slow

FORK = multiprocessing.get_context("fork")


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

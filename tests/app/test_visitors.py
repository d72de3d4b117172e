"""Open pages: which copies of images they own, what a lesson takes of a draft, and what is answered."""

from __future__ import annotations

import errno
import io
import json
import os
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra app is not installed")

import gradio as gr
from app_tools import files_below
from command_line import Call, images

from duallora import DualLoRAError
from duallora.app import twins
from duallora.app.answer_report import shown
from duallora.app.answers import Answer
from duallora.app.image_field import chosen
from duallora.app.intake import Draft
from duallora.app.lesson_thread import Watched
from duallora.app.session import Session
from duallora.app.shell import Shell
from duallora.app.uploads import OLD, Uploads, files_of, named_folder
from duallora.app.view_teach import Teach
from duallora.app.view_try import Try
from duallora.storage import checkpoint
from duallora.teaching.method_choice import MethodChoice
from duallora.teaching.model_request import ModelRequest

pytestmark = pytest.mark.filterwarnings("ignore:.*no direction is left")
A, B = (SimpleNamespace(session_hash=name) for name in "ab")


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    (tmp_path / "uploads").mkdir()
    return Uploads(tmp_path / "uploads")


@pytest.fixture
def shell(call: Call, tmp_path: Path, uploads: Uploads) -> Iterator[Shell]:
    method = MethodChoice("duallora", {"epochs": 1, "min_steps": 0, "energy_threshold": 0.7})
    session = Session(tmp_path / "model", ModelRequest(method, device="cpu"), uploads)
    yield Shell(session)
    session.close()


@pytest.fixture
def teach(shell: Shell) -> Teach:
    with gr.Blocks():
        return Teach(shell)


def sent(uploads: Uploads, number: int, name: str | None = None) -> dict[str, Any]:
    """An upload as Gradio keeps and describes it: the same content lies at the same place."""
    folder = uploads.folder / f"sha-{number}"
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / (name or f"{number}.png"))
    return {"path": str(folder / (name or f"{number}.png")), "orig_name": name or f"{number}.png"}


def packed(uploads: Uploads, **entries: bytes) -> dict[str, Any]:
    folder = uploads.folder / "sha-zip"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return {"path": str(folder / "a.zip"), "orig_name": "a.zip"}


def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def added(teach: Teach, name: str, files: list[dict[str, Any]], who: Any, path: str = "") -> Any:
    """What the view says in the end."""
    return list(teach.on_add(name, json.dumps(files), "", path, who))[-1]


def kept(uploads: Uploads) -> list[str]:
    return sorted(path.name for path in files_below(uploads.folder))


def aged(path: Path) -> None:
    os.utime(path, (time.time() - OLD - 60,) * 2)


# -- who owns a copy -----------------------------------------------------------------------------------------


def test_one_copy_stays_while_anybody_needs_it(teach: Teach, uploads: Uploads) -> None:
    picture = sent(uploads, 1)
    added(teach, "ash", [picture], A)
    added(teach, "beech", [picture], A)
    added(teach, "cedar", [picture], B)
    teach.shell.visitors.show(teach.shell.visitors.of("c"), picture)
    for gone in (
        lambda: teach.on_remove("ash", A),
        lambda: teach.on_remove("beech", A),
        lambda: teach.shell.visitors.leave("b"),
    ):
        assert kept(uploads) == ["1.png"]
        gone()
    assert kept(uploads) == ["1.png"]
    teach.shell.visitors.show(teach.shell.visitors.of("c"), sent(uploads, 2))
    assert kept(uploads) == ["2.png"]
    teach.shell.visitors.leave("c")
    assert kept(uploads) == [] and uploads.folder.is_dir()


def test_a_failed_add_can_be_repeated(teach: Teach, uploads: Uploads) -> None:
    archive = packed(uploads, **{"1.png": png(1), "more/2.png": png(2), "more/same.png": png(3)})
    picture = sent(uploads, 1)
    for _ in range(2):
        said = added(teach, "", [archive, picture], A)
        assert len(said) == 10 and "no class name" in said[0]
        assert kept(uploads) == ["1.png", "a.zip"]
    said = added(teach, "ash", [archive, picture], A)
    assert "ash added" in said[0] and "a.zip" not in kept(uploads)
    assert len(teach.shell.visitors.of("a").draft.paths) == len(kept(uploads)) == 4


def test_only_old_copies_that_nobody_needs_are_swept(teach: Teach, uploads: Uploads) -> None:
    learned, shown, chosen, waiting, _ = (sent(uploads, number) for number in range(5))
    added(teach, "ash", [learned], A)
    added(teach, "", [waiting], A)
    teach.shell.visitors.show(teach.shell.visitors.of("a"), shown)
    for each in (learned, shown, chosen, waiting):
        aged(Path(each["path"]))
    (uploads.folder / "half-sent").write_bytes(b"x")
    aged(uploads.folder / "half-sent")
    uploads.sweep()
    assert kept(uploads) == ["0.png", "1.png", "4.png"] and uploads.folder.is_dir()
    assert "choose it again" in added(teach, "ash", [waiting], A)[0]


def test_sweeping_goes_on_by_itself_until_the_end(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duallora.app.uploads._BETWEEN", 0.01)
    aged(Path(sent(uploads, 1)["path"]))
    uploads.start_sweeping()
    deadline = time.monotonic() + 300
    while kept(uploads) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert kept(uploads) == []
    uploads.close()
    assert not uploads.folder.exists()


# -- lessons -------------------------------------------------------------------------------------------------


def gave(teach: Teach, uploads: Uploads, name: str, first: int, who: Any = A) -> None:
    added(teach, name, [sent(uploads, first + i) for i in range(4)], who)


def test_only_what_was_taught_leaves_the_draft(
    teach: Teach, uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, step = threading.Event(), Watched.begin_step

    def waiting(progress: Watched) -> None:
        assert given.wait(300)
        step(progress)

    monkeypatch.setattr(Watched, "begin_step", waiting)
    gave(teach, uploads, "ash", 0)
    gave(teach, uploads, "beech", 10)
    gave(teach, uploads, "elm", 20, B)
    teach.shell.visitors.show(teach.shell.visitors.of("a"), sent(uploads, 3))
    lesson = teach.on_learn("", A)
    next(lesson)
    gave(teach, uploads, "cedar", 30)  # while it runs
    given.set()
    other = list(teach.on_load(B))  # a page that was loaded meanwhile
    end = list(lesson)[-1]
    assert "is learned" in end[0] and end[4] == "" and "cedar" in end[6] and "ash" not in end[6]
    assert list(teach.shell.visitors.of("a").draft.files) == ["cedar"]
    assert list(teach.shell.visitors.of("b").draft.files) == ["elm"]
    assert all(value[4] == gr.skip() for value in other)
    left = [3, *range(20, 24), *range(30, 34)]
    assert kept(uploads) == sorted(f"{number}.png" for number in left)


def test_a_page_closed_during_a_lesson_that_fails_leaves_no_copies(
    teach: Teach, uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, closed = threading.Event(), threading.Event()

    def fails(*_: Any) -> None:
        started.set()
        assert closed.wait(300)
        raise DualLoRAError("no more.")

    monkeypatch.setattr(teach.session, "_learn", fails)
    gave(teach, uploads, "ash", 0)
    lesson = teach.on_learn("", A)
    next(lesson)
    assert started.wait(300)
    teach.shell.visitors.leave("a")
    assert len(kept(uploads)) == 4
    closed.set()
    assert "no more" in list(lesson)[-1][0]
    assert kept(uploads) == []


def test_a_failed_lesson_keeps_the_draft(
    teach: Teach, uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teach.session, "_learn", lambda *_: 1 / 0)
    gave(teach, uploads, "ash", 0)
    assert "ZeroDivisionError" in list(teach.on_learn("", A))[-1][0]
    assert len(kept(uploads)) == len(teach.shell.visitors.of("a").draft.paths) == 4
    monkeypatch.setattr(teach.session, "teach", lambda *_: 1 / 0)
    (said,) = teach.on_learn("", A)
    assert "internal error: ZeroDivisionError" in said[0] and len(said) == 10


def test_the_backbone_file_is_read_once_for_a_generation(
    teach: Teach, uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    gave(teach, uploads, "ash", 0)
    list(teach.on_learn("", A))
    calls = []
    stored = ModelRequest.stored
    monkeypatch.setattr(ModelRequest, "stored", lambda *given: calls.append(1) or stored(*given))
    teach.shell.refresh(A)
    assert calls == []
    gave(teach, uploads, "beech", 10)
    list(teach.on_learn("", A))
    assert teach.session.classes() == ["ash", "beech"] and calls


def test_undo_looks_at_the_generation_under_the_lock(
    teach: Teach, uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("ash", "beech", "cedar")):
        gave(teach, uploads, name, 10 * number)
        list(teach.on_learn("", A))
        if number == 1:
            step = teach.session.step_back()
    manifest = checkpoint.read_manifest(teach.session.folder)
    for stale in (step, teach.session.step_back().__class__("model-000.safetensors", "", "", True)):
        with pytest.raises(DualLoRAError, match="has changed meanwhile"):
            teach.session.undo(stale)
    with pytest.raises(DualLoRAError, match="has changed meanwhile"):
        checkpoint.clear(teach.session.folder, manifest["weights"])  # it has something to go back to
    assert checkpoint.read_manifest(teach.session.folder) == manifest


# -- errors are sentences ------------------------------------------------------------------------------------


def test_a_damaged_stream_in_a_zip_is_a_sentence(teach: Teach, uploads: Uploads) -> None:
    place = uploads.folder / "a.zip"
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", np.random.default_rng(0).bytes(1000) + bytes(5000))
    data = bytearray(place.read_bytes())
    data[40:80] = b"\xff" * 40
    place.write_bytes(data)
    with pytest.raises((zlib.error, OSError, EOFError, ValueError, zipfile.BadZipFile)):
        zipfile.ZipFile(place).read("a.png")
    said = added(teach, "ash", [{"path": str(place), "orig_name": "a.zip"}], A)
    assert "a.zip is damaged or no zip archive" in said[0]
    assert kept(uploads) == ["a.zip"]


def test_images_that_are_still_being_sent_are_waited_for(teach: Teach) -> None:
    assert "still sending the images; wait" in list(teach.on_add("ash", '"sending"', "", "", A))[-1][0]
    assert chosen("", None, "no list", "{}", "[1]") == []


def test_paths_that_cannot_be_used_are_sentences(
    teach: Teach, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "home folder in ~nouser/x is not known" in added(teach, "ash", [], A, "~nouser/x")[0]
    assert "too long" in added(teach, "ash", [], A, str(tmp_path / ("x" * 300)))[0]
    assert named_folder(f' "{tmp_path}" ') == tmp_path

    def closed(path: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DualLoRAError, match="change them or choose another folder"):
        files_of(tmp_path)


def test_what_has_no_words_is_said_all_the_same(teach: Teach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Draft, "adding", lambda *_: 1 / 0)
    assert "internal error: ZeroDivisionError" in added(teach, "ash", [], A)[0]
    assert "choose a class first" in teach.on_remove(None, A)[0]
    monkeypatch.setattr(teach.session, "step_back", lambda: 1 / 0)
    assert any("ZeroDivisionError" in value for value in teach.shell.refresh(A) if isinstance(value, str))


# -- the view Try --------------------------------------------------------------------------------------------


def test_everything_that_was_answered_is_deleted(shell: Shell, uploads: Uploads, tmp_path: Path) -> None:
    shell.session.teach(draft_check(images(tmp_path / "pets", ["cat", "dog"], 4))).join()
    with gr.Blocks():
        view = Try(shell)
    archive = packed(uploads, **{"box/1.png": png(1), "box/notes.txt": b"hello"})
    said, *rest = list(view.on_many(json.dumps([archive]), "", "", 0.2, A))[-1]
    assert "1 image answered." in said and rest == ["", "", ""] and kept(uploads) == []
    archive = packed(uploads, **{"box/notes.txt": b"hello"})
    assert "there are no images" in list(view.on_many(json.dumps([archive]), "", "", 0.2, A))[-1][0]
    assert kept(uploads) == ["a.zip"]
    one = sent(uploads, 1)
    for _ in range(2):  # the slider asks about the same picture again
        said, button, why = view.on_picture(one, 0.0, A)
        assert ("Familiarity" in said or "unknown" in said) and button["visible"] and why == ""
    explained, button = view.on_why(one, A)
    assert "gradient-weighted attention" in explained and "data:image/png" in explained
    assert not button["visible"]
    view.on_picture(None, 0.0, A)
    assert kept(uploads) == ["a.zip"]


def draft_check(folder: Path) -> Any:
    draft = Draft()
    draft.add([files_of(folder)], "")
    return draft.check()


@pytest.mark.parametrize(
    ("familiarity", "words"), [(0.1, "unknown<"), (0.44, "cat (66.0 %), doubtful<"), (0.9, "cat (66.0 %)<")]
)
def test_what_lies_far_from_what_was_taught_is_doubtful(familiarity: float, words: str) -> None:
    record = {
        "class": "unknown" if familiarity < 0.2 else "cat",
        "probability": 0.66,
        "task": "pets",
        "task_confidence": 0.9,
        "unknown": 1 - familiarity,
        "called_unknown": familiarity < 0.2,
        "top": [{"class": "cat", "probability": 0.66}],
    }
    said = shown(Answer(record, (("pets", 1.0),), False), 0.2)
    assert words in said and ("about 95 lie above 0.50" in said) == ("doubtful" in words)


# -- the check -----------------------------------------------------------------------------------------------


def test_a_burst_within_a_class_costs_nothing_and_twins_are_capped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = Draft()
    base = np.random.default_rng(0).integers(0, 200, (6, 6, 3)).astype(np.uint8)
    for name in ("ash", "beech"):
        (tmp_path / name).mkdir()
        for number in range(12):  # one scene, a little lighter in every frame
            frame = Image.fromarray(base + np.uint8(2 * number + (name == "beech")))
            frame.resize((48, 48), Image.Resampling.BICUBIC).save(tmp_path / name / f"{number:02}.png")
    draft.add([files_of(tmp_path / "ash")], "")
    compared = []
    monkeypatch.setattr(twins, "_PAIRS", 10)
    real = twins._near_pairs
    monkeypatch.setattr(twins, "_near_pairs", lambda *given: compared.extend(real(*given)) or iter(compared))
    assert draft.check().twins == () and compared == []
    assert draft.check() is draft.check() and draft.copy().check() is draft.check()
    draft.add([files_of(tmp_path / "beech")], "")
    check = draft.check()
    assert len(check.twins) > 50 and {(t.first[0], t.second[0]) for t in check.twins} == {("ash", "beech")}
    monkeypatch.setattr(twins, "MOST", 20)
    draft.remove("none")
    assert len(draft.check().twins) == 20

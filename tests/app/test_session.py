"""The model behind the page: lessons, answers, undo, forgetting, and what others write meanwhile."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, images, on_disk

from duallora import ContinualLearner, DualLoRAError
from duallora.app.intake import Check, Draft
from duallora.app.lesson_thread import Taught, Teaching, Watched
from duallora.app.session import Session
from duallora.app.undo_question import lesson_name
from duallora.app.uploads import Uploads, files_of
from duallora.storage import checkpoint
from duallora.teaching.method_choice import MethodChoice
from duallora.teaching.model_request import ModelRequest

pytestmark = pytest.mark.filterwarnings("ignore:.*no direction is left")


def new_session(folder: Path, place: Path, **fields: Any) -> Session:
    place.mkdir(exist_ok=True)
    method = MethodChoice("duallora", {"epochs": 1, "min_steps": 0, "energy_threshold": 0.7, **fields})
    return Session(folder, ModelRequest(method, device="cpu"), Uploads(place))


@pytest.fixture
def session(call: Call, tmp_path: Path) -> Iterator[Session]:
    session = new_session(tmp_path / "model", tmp_path / "uploads")
    yield session
    session.close()


def draft_of(folder: Path) -> Check:
    draft = Draft()
    draft.add([files_of(folder)], "")
    return draft.check()


def taught(session: Session, folder: Path, name: str = "") -> Taught:
    teaching = session.teach(draft_of(folder), name)
    teaching.join()
    assert teaching.error is None and teaching.taught is not None
    return teaching.taught


@contextmanager
def held(until: threading.Event | None = None) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Lessons wait at their first step for ``until``, or for a stop; gives what says that they do, and it."""
    reached, step = threading.Event(), Watched.begin_step

    def waiting(progress: Watched) -> None:
        reached.set()
        assert (until or progress.stopping).wait(300)
        step(progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watched, "begin_step", waiting)
        yield reached, until or threading.Event()


# -- lessons ------------------------------------------------------------------------------------------------


def test_a_lesson_is_what_learn_would_have_saved(session: Session, tmp_path: Path) -> None:
    assert session.newest() is None and session.tasks() == [] and session.step_back() is None
    with pytest.raises(DualLoRAError, match="learned nothing yet"):
        session.ask([tmp_path / "x.png"])
    found = taught(session, images(tmp_path / "pets", ["cat", "dog"], 12))
    assert found.record.name == "cat, dog" and found.record.train_images == 20
    assert found.held_back is not None and len(found.held_back.answers) == 4
    assert found.learned_of == {"cat": 10, "dog": 10} and not found.had_old
    stored = checkpoint.read_manifest(session.folder)["tasks"][0]
    assert stored["held_back_accuracy"] == found.held_back.accuracy and stored["held_back_images"] == 4
    assert [task.held_back_images for task in session.tasks()] == [4]
    step = session.step_back()
    assert step is not None and step.whole and "would know nothing again" in step.question
    loaded = ContinualLearner.load(session.folder, device="cpu")
    assert loaded.tasks == session.tasks()


def test_a_second_lesson_tells_what_is_taken_for_old_classes_and_is_undone(
    session: Session, tmp_path: Path
) -> None:
    taught(session, images(tmp_path / "pets", ["cat", "dog"], 6))
    # The same pictures under other names: some of them have to be taken for the old classes.
    for old, new in (("cat", "lion"), ("dog", "wolf")):
        (tmp_path / "wild").mkdir(exist_ok=True)
        (tmp_path / "pets" / old).rename(tmp_path / "wild" / new)
    found = taught(session, tmp_path / "wild", "wild animals")
    assert found.had_old and found.mistaken_images == len(found.mistaken) > 0
    for each in found.mistaken:
        assert each.found in ("cat", "dog") and each.true in ("lion", "wolf")
        assert each.picture.startswith("data:image/jpeg;base64,") and 0 < each.probability <= 1
    step = session.step_back()
    assert step is not None
    assert step.question == "The lesson “wild animals” would be taken back (classes: lion, wolf)."
    assert session.undo(step) == "Undone. The lesson “wild animals” is taken back (classes: lion, wolf)."
    assert session.classes() == ["cat", "dog"]
    with pytest.raises(DualLoRAError, match="has changed meanwhile"):
        session.undo(step)


def test_a_first_lesson_goes_as_a_whole_and_another_can_be_taught(session: Session, tmp_path: Path) -> None:
    pets = images(tmp_path / "pets", ["cat", "dog"], 5)
    taught(session, pets)
    (session.folder / "notes.txt").write_text("mine")
    step = session.step_back()
    assert step is not None and step.whole
    taught(session, images(tmp_path / "birds", ["owl", "tit"], 5))
    with pytest.raises(DualLoRAError, match="has changed meanwhile"):
        session.undo(step)
    for whole in (False, True):
        last = session.step_back()
        assert last is not None and last.whole is whole
        said = session.undo(last)
    assert said == "The lesson “cat, dog” is deleted. The model knows nothing and starts again."
    assert set(on_disk(session.folder)) <= {"notes.txt", ".lock"}
    (session.folder / "notes.txt").unlink()
    assert session.newest() is None and session.step_back() is None
    taught(session, pets)
    assert session.classes() == ["cat", "dog"]


def test_a_class_too_small_to_hold_back_is_not_measured(session: Session, tmp_path: Path) -> None:
    found = taught(session, images(tmp_path / "pets", ["cat", "dog"], 4))
    assert found.held_back is None
    assert session.tasks()[0].held_back_accuracy is None


def test_a_single_class_can_be_taught(session: Session, tmp_path: Path) -> None:
    assert taught(session, images(tmp_path / "one", ["cat"], 5)).record.classes == ("cat",)
    assert session.classes() == ["cat"]


def test_a_lesson_refuses_a_name_that_is_taken_and_a_second_one_at_a_time(
    session: Session, tmp_path: Path
) -> None:
    pets = draft_of(images(tmp_path / "pets", ["cat", "dog"], 4))
    session.teach(pets, "pets").join()
    with pytest.raises(DualLoRAError, match="named “pets” already"):
        session.teach(pets, "pets")
    with pytest.raises(DualLoRAError, match="no classes yet"):
        session.teach(Check((), ()))
    with held(until=threading.Event()) as (reached, until):
        first = session.teach(pets)
        assert reached.wait(300)
        with pytest.raises(DualLoRAError, match="being changed"):
            session.teach(pets)
        with pytest.raises(DualLoRAError, match="lesson is being learned"):
            session.forget(name="cat")
        until.set()
        first.join()
    assert [task.name for task in session.tasks()] == ["pets", "cat, dog"]
    second = session.teach(pets)
    second.join()
    assert second.name == "cat, dog 2"


def test_a_stopped_lesson_leaves_everything_as_it_was(session: Session, tmp_path: Path) -> None:
    pets = images(tmp_path / "pets", ["cat", "dog"], 6)
    taught(session, pets)
    before = on_disk(session.folder)
    with held() as (reached, _):
        teaching = session.teach(draft_of(pets))
        assert reached.wait(300)
        teaching.stop()
        teaching.join()
    assert teaching.taught is None and teaching.error == "stopped; the model is as it was."
    assert on_disk(session.folder) == before
    taught(session, pets, "again")


def test_a_saved_lesson_is_learned_even_where_it_cannot_be_read_back(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pets = draft_of(images(tmp_path / "pets", ["cat", "dog"], 4))
    commit = ContinualLearner.commit

    def saved(learner: ContinualLearner, *given: Any) -> Any:
        monkeypatch.setattr(session, "newest", lambda: (_ for _ in ()).throw(OSError("no memory")))
        return commit(learner, *given)

    monkeypatch.setattr(ContinualLearner, "commit", saved)
    teaching = session.teach(pets)
    teaching.join()
    assert teaching.error is None and teaching.taught is not None


def test_a_stop_before_the_first_lesson_leaves_no_folder(session: Session, tmp_path: Path) -> None:
    pets = draft_of(images(tmp_path / "pets", ["cat", "dog"], 6))
    stopped = threading.Event()

    def work(progress: Any) -> Taught:
        stopped.wait(300)
        return session._learn(pets.divided(), "pets", progress)

    teaching = Teaching("pets", work)
    teaching.start()
    teaching.stop()
    stopped.set()
    teaching.join()
    assert teaching.taught is None and "as it was" in str(teaching.error)
    assert not session.folder.exists()


def test_a_failed_lesson_says_why_and_frees_the_model(session: Session, tmp_path: Path) -> None:
    pets = draft_of(images(tmp_path / "pets", ["cat", "dog"], 4))
    gone = pets.classes[0].images[0].path
    data = gone.read_bytes()
    gone.unlink()
    teaching = session.teach(pets)
    teaching.join()
    assert teaching.error is not None and "does not exist" in teaching.error
    gone.write_bytes(data)
    session.teach(pets).join()
    assert session.classes() == ["cat", "dog"]


def test_uploaded_copies_are_deleted_once_they_are_learned(session: Session, tmp_path: Path) -> None:
    outside = images(tmp_path / "outside", ["dog"], 4)
    copies = images(session.uploads.folder / "sent", ["cat"], 4)
    draft = Draft()
    draft.add([files_of(outside), files_of(copies)], "")
    files = [seen.path for own in draft.files.values() for seen in own]
    teaching = session.teach(draft.check(), "", files)
    session.uploads.discard(files)  # the page is closed meanwhile
    teaching.join()
    assert teaching.error is None
    assert [path for path in session.uploads.folder.rglob("*") if path.is_file()] == []
    assert len(list(outside.rglob("*.png"))) == 4


# -- answers ------------------------------------------------------------------------------------------------


def test_answers_are_those_of_predict(call: Call, session: Session, tmp_path: Path) -> None:
    pets = images(tmp_path / "pets", ["cat", "dog"], 6)
    taught(session, pets)
    taught(session, images(tmp_path / "birds", ["owl", "tit"], 6))
    paths = [pets / "cat" / "001.png", tmp_path / "birds" / "owl" / "001.png"]
    said = json.loads(call("predict", session.folder, *paths, "--json", "--device", "cpu").out)["predictions"]
    answers = session.ask(paths)
    assert [a.record | {"path": None} for a in answers] == [s | {"path": None} for s in said]
    for answer, one in zip(answers, said, strict=True):
        assert answer.gated and [name for name, _ in answer.weights] == ["cat, dog", "owl, tit"]
        assert all(0 <= weight <= 1 for _, weight in answer.weights)
        assert max(answer.weights, key=lambda each: each[1])[0] == one["task"]
    assert session.ask(paths, 3, 1.0)[0].record["class"] == "unknown"


def test_the_gate_is_shown_where_there_are_residual_adapters(call: Call, tmp_path: Path) -> None:
    session = new_session(tmp_path / "own", tmp_path / "uploads", residual="own", residual_rank=4, rank=4)
    taught(session, images(tmp_path / "pets", ["cat", "dog"], 6))
    taught(session, images(tmp_path / "birds", ["owl", "tit"], 6))
    (answer,) = session.ask([tmp_path / "pets" / "cat" / "001.png"])
    assert answer.gated and {name for name, _ in answer.weights} == {"cat, dog", "owl, tit"}
    assert sum(weight for _, weight in answer.weights) == pytest.approx(1, abs=1e-4)
    session.forget(task="cat, dog")
    (answer,) = session.ask([tmp_path / "birds" / "owl" / "001.png"])
    assert [name for name, _ in answer.weights] == ["owl, tit"]


# -- what changes it -----------------------------------------------------------------------------------------


def test_forgetting_and_undo(session: Session, tmp_path: Path) -> None:
    taught(session, images(tmp_path / "pets", ["cat", "dog", "elk"], 5))
    said = session.forget(name="dog")
    assert said.startswith("Forgotten: dog. Undo brings it back.") and session.classes() == ["cat", "elk"]
    step = session.step_back()
    assert step is not None and step.question == "The forgotten class dog would come back."
    assert session.undo(step) == "Undone. The forgotten class dog is back."
    assert session.classes() == ["cat", "dog", "elk"]
    assert "is deleted" in session.forget(name="dog", purge=True)
    step = session.step_back()
    assert step is not None and step.whole  # the forgotten class cannot come back
    with pytest.raises(DualLoRAError, match="no class named 'dog'"):
        session.forget(name="dog")


def test_what_another_process_writes_is_noticed(call: Call, session: Session, tmp_path: Path) -> None:
    pets = images(tmp_path / "pets", ["cat", "dog"], 5)
    assert call("learn", session.folder, pets, "--epochs", 1, "--method.energy_threshold", 0.7).code == 0
    assert session.classes() == ["cat", "dog"]
    taught(session, images(tmp_path / "birds", ["owl", "tit"], 5))
    step = session.step_back()
    assert step is not None
    fish = images(tmp_path / "fish", ["cod", "eel"], 5)
    assert call("learn", session.folder, fish, "--epochs", 1).code == 0
    with pytest.raises(DualLoRAError, match="has changed meanwhile"):
        session.undo(step)
    assert len(session.classes()) == 6
    (answer,) = session.ask([fish / "cod" / "001.png"])
    assert [name for name, _ in answer.weights] == ["pets", "owl, tit", "fish"]
    with checkpoint.exclusive(session.folder):
        teaching = session.teach(draft_of(pets), "again")
        teaching.join()
    assert teaching.error is not None and "another process is writing" in teaching.error


def test_learn_stores_the_held_back_accuracy(call: Call, session: Session, tmp_path: Path) -> None:
    pets = images(tmp_path / "pets", ["cat", "dog"], 12)
    assert call("learn", session.folder, pets, "--epochs", 1, "--method.energy_threshold", 0.7).code == 0
    (task,) = session.tasks()
    assert task.held_back_images == 2 and task.held_back_accuracy is not None


def test_an_old_model_without_the_accuracy_loads(session: Session, tmp_path: Path) -> None:
    taught(session, images(tmp_path / "pets", ["cat", "dog"], 5))
    manifest = json.loads((session.folder / "model.json").read_text())
    for task in manifest["tasks"]:
        del task["held_back_accuracy"], task["held_back_images"]
    (session.folder / "model.json").write_text(json.dumps(manifest))
    fresh = new_session(session.folder, tmp_path / "other")
    assert fresh.tasks()[0].held_back_accuracy is None


def test_the_matrix_of_a_run(call: Call, tmp_path: Path) -> None:
    stream = images(tmp_path / "stream", ["ant", "bee", "cat", "dog"], 5)
    words = ["--stream", stream, "--tasks", 2, "--epochs", 1, "--method.energy_threshold", 0.7]
    assert call("run", "--out", tmp_path / "run", *words).code == 0
    session = new_session(tmp_path / "run" / "model", tmp_path / "uploads")
    results = session.run_results()
    assert results is not None and len(results["accuracy_matrix"]) == 2
    session.forget(name="ant")
    assert session.run_results() is None  # the figures are of another model now
    step = session.step_back()
    assert step is not None and session.undo(step) and session.run_results() is not None
    session.forget(task=session.tasks()[0].name)
    assert session.run_results() is None
    (tmp_path / "run" / "results.json").write_text("{}")
    assert session.run_results() is None


def test_a_folder_with_other_files_is_refused(session: Session) -> None:
    session.folder.mkdir()
    (session.folder / "letter.txt").write_text("hello")
    with pytest.raises(DualLoRAError, match="holds other files"):
        session.newest()


def test_names_of_lessons() -> None:
    assert lesson_name(["cat", "dog"], set()) == "cat, dog"
    assert lesson_name(["cat", "dog"], {"cat, dog", "cat, dog 2"}) == "cat, dog 3"
    assert lesson_name([f"class {i}" for i in range(40)], set()) == "class 0 and 39 more"

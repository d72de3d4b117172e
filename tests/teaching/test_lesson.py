"""A lesson and its taking back, as the command and the page use them."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Call, images, on_disk

from duallora.outputs import free_name
from duallora.runtime.progress import Progress
from duallora.storage import checkpoint
from duallora.teaching.lesson import Lesson
from duallora.teaching.method_choice import MethodChoice
from duallora.teaching.model_request import ModelRequest
from duallora.teaching.take_back import take_back
from duallora.teaching.training_images import TrainingImages

QUIET = Progress(quiet=True)


class Named(Progress):
    """Notes what is begun."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.begun: list[str] = []

    def begin(self, label: str) -> None:
        self.begun.append(label)


def lesson(model: Path, folder: Path, **fields: object) -> Lesson:
    request = ModelRequest(MethodChoice("duallora", {"epochs": 1, "min_steps": 0}), device="cpu")
    read = TrainingImages.read(folder, QUIET, skip_bad_images=False)
    return Lesson(model, request, read, base="pets", **fields)  # type: ignore[arg-type]


def test_a_lesson_is_saved_at_its_end_and_under_the_lock(call: Call, tmp_path: Path) -> None:
    model = tmp_path / "model"
    first = lesson(model, images(tmp_path / "pets", ["cat", "dog"], 12))
    with pytest.raises(RuntimeError), first.taught(QUIET):
        raise RuntimeError("what is told of it cannot be told")
    assert not model.exists()
    with first.taught(QUIET) as learned:
        assert not (model / "model.json").exists()
        with pytest.raises(Exception, match="another process is writing"), checkpoint.exclusive(model):
            pass
    assert learned.record.name == "pets" and learned.known == () and learned.old == set()
    assert learned.held_back is not None and learned.train is None
    tasks = checkpoint.read_manifest(model)["tasks"]
    assert [task["held_back_accuracy"] for task in tasks] == [learned.held_back.accuracy]
    before = on_disk(model)
    progress = Named()
    again = lesson(model, images(tmp_path / "more", ["owl"], 12), measure_train=True)
    with pytest.raises(RuntimeError), again.taught(progress) as learned:
        assert learned.record.name == "pets 2" and learned.old == {"cat", "dog"}
        assert learned.train is not None and len(learned.train.answers) == learned.record.train_images
        raise RuntimeError("as before")
    assert on_disk(model) == before
    assert len(progress.begun) == 2 and "saving" not in progress.begun


def test_what_is_taken_back_is_saved_and_what_is_refused_changes_nothing(call: Call, tmp_path: Path) -> None:
    model = tmp_path / "model"
    with lesson(model, images(tmp_path / "pets", ["cat", "dog"], 12)).taught(QUIET):
        pass
    before = on_disk(model)
    with pytest.raises(Exception, match="no class named 'owl'"):
        take_back(model, name="owl", device="cpu")
    assert on_disk(model) == before
    taken = take_back(model, name="dog", purge=True, device="cpu")
    assert taken.forgotten.classes == ("dog",) and taken.known == 1 and taken.relearned is None
    manifest = checkpoint.read_manifest(model)
    assert manifest["classes"] == ["cat"] and manifest.get("previous") is None
    with pytest.raises(Exception, match="there is no saved model"):
        take_back(tmp_path / "none", name="dog")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("taken", "name"),
    [((), "pets"), (("pets",), "pets 2"), (("pets", "pets 2", "pets 4"), "pets 3"), (("pets 2",), "pets")],
)
def test_a_free_name_is_the_first_one(taken: tuple[str, ...], name: str) -> None:
    assert free_name("pets", taken) == name

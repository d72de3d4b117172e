"""A model sent to the hub and fetched from it is the same model; whatever goes wrong is one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Call, assert_refused, images, on_disk
from hub_standin import TOKEN, Hub
from huggingface_hub import constants

from duallora import ContinualLearner
from duallora.errors import DualLoRAError
from duallora.sharing.local import local_folder
from duallora.sharing.place import HubPlace, own_folder

pytestmark = pytest.mark.slow

NAME = "jane/birds"


def published(hub: Hub, model: Path, name: str = NAME, **more: bytes) -> str:
    """Puts a model on the hub as it lies in its folder."""
    files = {path.name: path.read_bytes() for path in model.iterdir() if not path.name.startswith(".")}
    return hub.put(name, files | more)


def test_what_is_sent_comes_back_the_same(call: Call, hub: Hub, shared_model: Path, tmp_path: Path) -> None:
    sent = call("push", shared_model, NAME, "--private", "--license", "cc-by-4.0")
    assert sent.code == 0, sent
    assert hub.repositories[NAME].private
    commit = hub.repositories[NAME].resolve("main")
    assert str(commit)[:12] in sent.out
    assert call("pull", NAME, tmp_path / "there").code == 0
    here, there = on_disk(shared_model), on_disk(tmp_path / "there")
    assert there == {name: data for name, data in here.items()}
    assert set(hub.files(NAME)) == {*here, "README.md"} - {".lock"}
    for name in {*here} - {".lock"}:
        assert hub.files(NAME)[name] == here[name]


def test_answers_are_the_same_by_folder_and_by_name(
    call: Call, hub: Hub, shared_model: Path, tmp_path: Path
) -> None:
    commit = published(hub, shared_model)
    photos = images(tmp_path / "photos", ["a", "b"], 2)
    by_folder = call("predict", shared_model, photos, "--json")
    assert by_folder.code == 0
    for name in (f"hf:{NAME}", f"hf:{NAME}@main", f"hf:{NAME}@{commit}"):
        assert call("predict", name, photos, "--json").out == by_folder.out
    assert call("inspect", f"hf:{NAME}").out == call("inspect", shared_model).out
    assert (
        ContinualLearner.load(f"hf:{NAME}", device="cpu").classes
        == ContinualLearner.load(shared_model, device="cpu").classes
    )


def test_a_commit_stays_what_it_was(hub: Hub, shared_model: Path, call: Call) -> None:
    commit = published(hub, shared_model)
    manifest = json.loads((shared_model / "model.json").read_text())
    other = json.dumps(manifest | {"seed": 77}).encode()
    hub.put(NAME, hub.files(NAME) | {"model.json": other})
    assert json.loads(call("inspect", f"hf:{NAME}", "--json").out)["seed"] == 77
    assert json.loads(call("inspect", f"hf:{NAME}@{commit}", "--json").out)["seed"] == manifest["seed"]


def test_a_second_push_replaces_the_files_of_the_first(call: Call, hub: Hub, shared_model: Path) -> None:
    hub.put(NAME, {"model-0123456789ab.safetensors": b"old", "notes.txt": b"mine", "model.json": b"{}"})
    assert call("push", shared_model, NAME).code == 0
    names = set(hub.files(NAME))
    assert "model-0123456789ab.safetensors" not in names and "notes.txt" in names
    assert json.loads(hub.files(NAME)["model.json"])["weights"] in names


def test_the_state_before_is_not_sent(call: Call, hub: Hub, shared_model: Path) -> None:
    assert call("forget", shared_model, "--task", "synthetic 1").code == 0
    stored = json.loads((shared_model / "model.json").read_text())
    assert stored["previous"] is not None
    assert call("push", shared_model, NAME).code == 0
    sent = json.loads(hub.files(NAME)["model.json"])
    assert sent == stored | {"previous": None}
    assert {name for name in hub.files(NAME) if name.endswith("safetensors")} == {stored["weights"]}


def test_only_named_files_are_asked_for(call: Call, hub: Hub, shared_model: Path, tmp_path: Path) -> None:
    published(
        hub, shared_model, **{"model.pkl": b"x", "modeling.py": b"raise SystemExit", "config.json": b"{}"}
    )
    assert call("pull", NAME, tmp_path / "there").code == 0
    fetched = {request.rsplit("/", 1)[1] for request in hub.asked if "/resolve/" in request}
    assert fetched == {path.name for path in shared_model.iterdir()} - {".lock"}


def test_what_is_fetched_is_checked_as_any_model(
    call: Call, hub: Hub, shared_model: Path, tmp_path: Path
) -> None:
    weights = json.loads((shared_model / "model.json").read_text())["weights"]
    data = bytearray((shared_model / weights).read_bytes())
    data[-1] ^= 1
    published(hub, shared_model, **{weights: bytes(data)})
    assert_refused(call("pull", NAME, tmp_path / "there"), "is not the file that was saved")
    assert not (tmp_path / "there").exists()
    outside = {"weights": "../x.safetensors", "files": {"../x.safetensors": "0" * 64}, "format_version": 2}
    hub.put("jane/made-up", {"model.json": json.dumps(outside).encode()})
    assert_refused(call("inspect", "hf:jane/made-up"), "is not a model saved by duallora")
    contradiction = json.loads((shared_model / "model.json").read_text())
    contradiction["classes"] = ["other"]
    published(hub, shared_model, "jane/torn", **{"model.json": json.dumps(contradiction).encode()})
    assert_refused(
        call("pull", "jane/torn", tmp_path / "there"), "its tasks and its classes are not the same"
    )


@pytest.mark.parametrize("kind", ["manifest", "weights"])
def test_what_is_far_too_large_is_not_fetched(
    call: Call, hub: Hub, shared_model: Path, tmp_path: Path, kind: str
) -> None:
    published(hub, shared_model)
    weights = json.loads((shared_model / "model.json").read_text())["weights"]
    file = "model.json" if kind == "manifest" else weights
    hub.pretended[file] = 1 << 40
    assert_refused(call("pull", NAME, tmp_path / "there"), file, "far more than a model takes")
    assert not [asked for asked in hub.asked if asked.startswith("GET") and asked.endswith(file)]


def test_the_cache_answers_without_a_connection(
    call: Call, hub: Hub, shared_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published(hub, shared_model)
    assert call("inspect", f"hf:{NAME}").code == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert call("inspect", f"hf:{NAME}").code == 0
    assert_refused(call("pull", "jane/other", tmp_path / "x"), "jane/other", "the hub cannot be reached")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("pull", "jane/none", "x"), ["jane/none could not be fetched", "no such repository", "HF_TOKEN"]),
        (("pull", "jane/birds@v9", "x"), ["no revision v9"]),
        (("pull", "jane/empty", "x"), ["no model that duallora has saved"]),
        (("inspect", "hf:jane"), ["'jane' names no repository", "OWNER/NAME"]),
        (("inspect", "hf:../../etc"), ["names no repository"]),
        (("inspect", "hf:jane/birds@../main"), ["is no revision"]),
        (("pull", "jane/gated", "x"), ["grants access on request"]),
        (("learn", "hf:jane/birds", "x"), ["cannot be changed there", "duallora pull jane/birds DIR"]),
        (("undo", "hf:jane/birds"), ["cannot be changed there"]),
        (("forget", "hf:jane/birds", "--purge"), ["cannot be changed there"]),
        (("pull", "jane/birds", "hf:jane/birds"), ["cannot be changed there"]),
        (("push", "MODEL", "jane/birds@main"), ["not to a revision"]),
        (("push", "MODEL", "birds"), ["names no repository"]),
        (("push", "MODEL", "jane/birds", "--license", "My Licence"), ["no name of a licence"]),
        (("push", "MODEL", "jane/birds", "--out", "x"), ["--out goes with --dry-run"]),
        (("push", "nowhere", "jane/birds"), ["there is no saved model in nowhere"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_use_is_one_sentence(
    call: Call,
    hub: Hub,
    shared_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.put("jane/empty", {"README.md": b"hello"})
    hub.put("jane/gated", {"model.json": b"{}"}, gated=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN if "gated" not in " ".join(words) else "hf_another")
    published(hub, shared_model)
    called = call(*(str(shared_model) if word == "MODEL" else word for word in words))
    assert_refused(called, *parts)
    assert not (tmp_path / "x").exists()


def test_a_private_model_needs_the_token(
    call: Call, hub: Hub, shared_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("push", shared_model, NAME, "--private").code == 0
    monkeypatch.delenv("HF_TOKEN")
    assert_refused(call("pull", NAME, tmp_path / "x"), "no such repository, or it is private")
    assert_refused(call("push", shared_model, NAME), "there is no token", "HF_TOKEN", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert_refused(call("push", shared_model, NAME), "could not be sent", "does not allow it")


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_the_token_is_in_no_message(
    call: Call, hub: Hub, shared_model: Path, tmp_path: Path, verb: str
) -> None:
    hub.broken = True
    words = (shared_model, NAME) if verb == "push" else (NAME, tmp_path / "x")
    called = call(verb, *words)
    assert called.code == 2
    assert "error 500" in called.err or "cannot be reached" in called.err
    assert TOKEN not in called.err + called.out


def test_a_dry_run_writes_a_model_and_asks_nothing(
    call: Call, hub: Hub, shared_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    called = call("push", shared_model, NAME, "--dry-run")
    assert called.code == 0 and "nothing was sent" in called.out and hub.asked == []
    written = tmp_path / "birds-push"
    assert ContinualLearner.load(written, device="cpu").classes
    assert (written / "README.md").read_text().startswith("---\n")
    assert_refused(call("push", shared_model, NAME, "--dry-run"), "holds a saved model already")


def test_a_folder_in_use_is_not_pulled_into(call: Call, hub: Hub, shared_model: Path, tmp_path: Path) -> None:
    published(hub, shared_model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = on_disk(tmp_path / "full")
    assert_refused(call("pull", NAME, tmp_path / "full"), "holds other files (notes.txt)")
    assert_refused(call("pull", NAME, shared_model), "holds a saved model already")
    assert on_disk(tmp_path / "full") == before


def test_places_are_read_by_one_rule() -> None:
    assert HubPlace.parse("hf:a/b@v1.0") == HubPlace.parse("a/b@v1.0") == HubPlace("a/b", "v1.0")
    assert str(HubPlace("a/b")) == "a/b" and str(HubPlace("a/b", "main")) == "a/b@main"
    assert local_folder("some/folder") == own_folder("some/folder") == Path("some/folder")
    with pytest.raises(DualLoRAError, match="no revision"):
        HubPlace.parse("a/b@")


@pytest.mark.process
def test_the_address_of_the_hub_is_that_of_the_environment(
    hub: Hub, shared_model: Path, tmp_path: Path
) -> None:
    published(hub, shared_model)
    words = ["-m", "duallora", "inspect", f"hf:{NAME}", "--json"]
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["tasks"]) == 2

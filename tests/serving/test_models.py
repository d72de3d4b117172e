"""A saved model behind the server: its answers are predict's, and new generations come without a loss."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import httpx
import safetensors.torch
import torch
from command_line import Call, assert_refused, images
from PIL import Image
from serving_tools import picture, running, until
from small_tasks import new_learner, small_config, three_tasks
from starlette.testclient import TestClient
from tiny import tiny_backbone

from duallora import ContinualLearner, DualLoRAError
from duallora.commands import serve as command
from duallora.serving.app import create_app
from duallora.serving.limits import Limits
from duallora.serving.model_watch import ModelWatch, ServedModel
from duallora.storage import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned two tasks."""
    learner = new_learner(small_config())
    for task in three_tasks()[:2]:
        learner.learn(task)
    folder = tmp_path_factory.mktemp("template") / "model"
    learner.save(folder)
    return folder


@pytest.fixture
def model(call: Call, template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "model"))


def learn_more(folder: Path) -> str:
    """A third task; returns the new generation."""
    learner = ContinualLearner.load(folder, device="cpu", backbone=tiny_backbone())
    learner.learn(three_tasks()[2])
    learner.save(folder)
    return str(checkpoint.read_manifest(folder)["weights"])


def client_of(watch: ModelWatch) -> TestClient:
    return TestClient(create_app(watch), base_url="http://localhost")


def test_the_server_answers_as_the_commands_do(call: Call, model: Path, tmp_path: Path) -> None:
    folder = images(tmp_path / "pets", ["cat", "dog"], 3)
    files = sorted(folder.rglob("*.png"))
    words = ("--top", 2, "--unknown-below", 0.5, "--json", "--device", "cpu")
    expected = json.loads(call("predict", model, folder, *words).out)["predictions"]
    watch = ModelWatch(model, "cpu")
    with client_of(watch) as client:
        form = [("image", (str(file), file.read_bytes(), "image/png")) for file in files]
        found = client.post("/predict?top=2&unknown_below=0.5", files=form).json()["predictions"]
        alone = [
            client.post("/predict?top=2&unknown_below=0.5", content=file.read_bytes()).json()
            for file in files
        ]
        assert client.get("/model").json() == json.loads(call("inspect", model, "--json").out)
    assert [each.pop("path") for each in expected] == [str(file) for file in files]
    for several, one, said in zip(found, alone, expected, strict=True):
        several.pop("path")
        (single,) = one["predictions"]
        assert single.pop("path") is None
        assert_same_answer(several, said)
        assert_same_answer(single, said)


def assert_same_answer(found: dict[str, object], expected: dict[str, object]) -> None:
    """Equal up to what the size of a batch moves."""
    assert found.keys() == expected.keys()
    assert found["class"] == expected["class"] and found["task"] == expected["task"]
    for name in ("probability", "task_confidence", "unknown"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)


@pytest.mark.parametrize("name", ["duallora", "frozen", "color", "ranpac"])
def test_answers_do_not_depend_on_the_neighbours(name: str, call: Call, tmp_path: Path) -> None:
    """The same image alone, and in passes with others of any kind."""
    learner = new_learner(small_config(name))
    for task in three_tasks():
        learner.learn(task)
    learner.save(tmp_path / "model")
    model = ServedModel.load(tmp_path / "model", learner.machine)
    asked = torch.stack([learner.preprocess(image) for task in three_tasks() for image in task.images[::5]])
    others = torch.stack(
        [model.preprocess(Image.open(io.BytesIO(picture(seed))).convert("RGB")) for seed in range(40)]
    )
    alone = [model.answer(image[None], 7)[0] for image in asked]
    for count, strange in itertools.product((1, 7, 40), (others, -others, 50 * others)):
        found = model.answer(torch.cat([strange[:count], asked]), 7)[count:]
        for a, b in zip(found, alone, strict=True):
            assert (a.label, a.task) == (b.label, b.task)
            assert dict(a.top) == pytest.approx(dict(b.top), abs=2e-5)
            assert a.unknown == pytest.approx(b.unknown, abs=1e-4)


def test_a_new_generation_is_taken_and_a_broken_one_refused(call: Call, model: Path) -> None:
    said: list[str] = []
    watch = ModelWatch(model, "cpu", said.append)
    first = watch.current
    with client_of(watch) as client:
        watch.stop()
        watch.check()
        assert watch.current is first and said == []
        second = learn_more(model)
        watch.check()
        assert watch.current.generation == second and watch.taken == 1
        assert client.get("/health").json()["generation"] == second
        assert len(client.get("/model").json()["tasks"]) == 3
        third = broken_generation(model)
        watch.check()
        assert watch.current.generation == second and watch.refusals == 1
        assert (
            watch.refused is not None and third in watch.refused and "truncated or changed" in watch.refused
        )
        assert client.get("/health").json() == {
            "status": "ok",
            "generation": second,
            "newest": "refused",
        }
        assert client.post("/predict", content=picture()).headers["x-model-generation"] == second
        watch.check()  # the same broken one is not told again
        assert watch.refusals == 1
        (model / "model.json").write_text("{")
        watch.check()
        assert watch.refusals == 2 and "not JSON" in str(watch.refused)
        (model / "model.json").unlink()
        watch.check()
        assert watch.refusals == 3 and watch.current.generation == second
    assert [line.split(",")[0].split(":")[0] for line in said] == [
        f"now serving {second}",
        *["a new generation is refused"] * 3,
    ]


def broken_generation(folder: Path) -> str:
    """Puts one more generation there, with its weights cut before model.json names them."""
    aside = folder.with_name("aside")
    shutil.copytree(folder, aside)
    manifest, tensors = checkpoint.read(aside)
    tensors["heads.tasks.0.bias"] = tensors["heads.tasks.0.bias"] + 1
    with checkpoint.exclusive(aside):
        name = checkpoint.commit(aside, manifest, tensors)
    data = (aside / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    (aside / "model.json").replace(folder / "model.json")
    shutil.rmtree(aside)
    return name


def test_a_generation_whose_answers_are_no_numbers_is_refused(call: Call, model: Path) -> None:
    watch = ModelWatch(model, "cpu")
    manifest, tensors = checkpoint.read(model)
    tensors["heads.tasks.0.bias"] = tensors["heads.tasks.0.bias"] * float("nan")
    with checkpoint.exclusive(model):
        checkpoint.commit(model, manifest, tensors)
    before = watch.current
    watch.check()
    assert watch.current is before and watch.refused is not None


def test_files_that_come_late_are_taken_later(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is copied: model.json first, its weights after the look."""
    monkeypatch.setattr("duallora.serving.model_watch._RETRY", 3600.0)
    shutil.copytree(model, tmp_path / "copy")
    weights = learn_more(model)
    watch = ModelWatch(tmp_path / "copy", "cpu")
    shutil.copy(model / "model.json", tmp_path / "copy" / "model.json")
    watch.check()
    assert watch.refused is not None and watch.taken == 0
    shutil.copy(model / weights, tmp_path / "copy" / weights)
    watch.check()
    assert watch.taken == 0  # not at every look: a large broken file would be read again and again
    monkeypatch.setattr(watch, "_retry", 0.0)
    watch.check()
    assert watch.refused is None and watch.current.generation == weights


def test_no_request_is_lost_while_generations_change(call: Call, model: Path) -> None:
    """Clients ask on and on while the model learns, is undone, breaks and forgets."""
    watch = ModelWatch(model, "cpu", interval=0.02)
    generations: set[str] = set()
    with running(watch, Limits(queue=64, timeout=300)) as address:
        stop, lost, answered = threading.Event(), [], [0]

        def ask(seed: int) -> None:
            with httpx.Client(base_url=address, timeout=300) as client:
                while not stop.is_set():
                    response = client.post("/predict", content=picture(seed))
                    if response.status_code != 200:
                        lost.append(response.text)
                    generations.add(response.headers.get("x-model-generation", ""))
                    answered[0] += 1

        clients = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
        for each in clients:
            each.start()
        first = watch.current.generation
        until(lambda: first in generations)
        for change in (lambda: learn_more(model), lambda: checkpoint.undo(model), lambda: learn_more(model)):
            change()
            wanted = checkpoint.read_manifest(model)["weights"]
            until(lambda wanted=wanted: watch.current.generation == wanted)
        broken_generation(model)
        until(lambda: watch.refused is not None)
        before = answered[0]
        until(lambda: answered[0] > before + 8)
        stop.set()
        for each in clients:
            each.join(300)
        assert lost == []
        assert generations == {first, watch.current.generation}
        assert watch.taken == 3


def test_an_old_generation_is_let_go(call: Call, model: Path) -> None:
    import gc
    import weakref

    watch = ModelWatch(model, "cpu")
    with client_of(watch) as client:
        watch.stop()
        assert client.post("/predict", content=picture()).status_code == 200
        old = weakref.ref(watch.current.learner.method)
        learn_more(model)
        watch.check()
        client.post("/predict", content=picture())
        gc.collect()
        assert old() is None


def test_what_cannot_be_served(call: Call, tmp_path: Path) -> None:
    with pytest.raises(DualLoRAError, match="no saved model"):
        ModelWatch(tmp_path, "cpu")
    new_learner(small_config()).save(tmp_path / "empty")
    with pytest.raises(DualLoRAError, match="learned nothing"):
        ModelWatch(tmp_path / "empty", "cpu")


def test_the_command_refuses_what_it_cannot_do(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(call("serve", model, "--host", "0.0.0.0"), "--host 0.0.0.0", "--token-file", "127.0.0.1")
    (tmp_path / "token").write_text("short")
    words = ("--host", "0.0.0.0", "--token-file", tmp_path / "token")
    assert_refused(call("serve", model, *words), "at least 16 characters")
    assert_refused(call("serve", model, "--token-file", tmp_path / "none"), "cannot be read")
    assert_refused(call("serve", model, "--port", 70_000), "--port must be from 0 to 65535")
    assert_refused(call("serve", model, "--queue", 0), "--queue must be more than 0")
    assert_refused(call("serve", tmp_path / "none", "--port", 0), "no saved model")
    assert_refused(call("serve", model, "--port", 0, "--device", "mps"), "mps")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(call("serve", model, "--port", port), f"port {port}", "take another")
    monkeypatch.setattr(command, "_NEEDED", ("a_library",))
    assert_refused(call("serve", model), "a-library is missing", "pip install 'duallora[serve]'")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str], Path]]:
    """``duallora serve`` in a process of its own, on the embedded backbone."""
    entry = "from duallora.cli import main; raise SystemExit(main())"
    learner = ContinualLearner(seed=0, device="cpu", method=small_config("frozen"))
    learner.learn(three_tasks()[0])
    learner.save(tmp_path / "model")
    (tmp_path / "token").write_text("0123456789abcdef")
    words = ["serve", tmp_path / "model", "--port", 0, "--token-file", tmp_path / "token", "--max-images", 2]
    words += ["--timeout", 300]
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", entry, *map(str, words)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith(f"serving {tmp_path / 'model'} at http://127.0.0.1:"), line
    try:
        yield line.split(" at ")[1].split(" ")[0], process, tmp_path / "model"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.process
def test_the_command_serves_until_it_is_stopped(served: tuple[str, subprocess.Popen[str], Path]) -> None:
    import signal

    address, process, folder = served
    headers = {"Authorization": "Bearer 0123456789abcdef"}
    with httpx.Client(base_url=address, timeout=300) as client:
        assert client.get("/health").json()["status"] == "ok"
        assert client.post("/predict", content=picture()).status_code == 401
        assert client.post("/predict", content=picture(), headers=headers).status_code == 200
        form = [("image", (f"{i}.png", picture(i))) for i in range(3)]
        assert client.post("/predict", files=form, headers=headers).status_code == 413
        learner = ContinualLearner.load(folder, device="cpu")
        learner.learn(three_tasks()[1])
        learner.save(folder)
        wanted = checkpoint.read_manifest(folder)["weights"]
        until(lambda: client.get("/health").json()["generation"] == wanted)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.splitlines() == [
        f"duallora: now serving {wanted}",
        "duallora: interrupted; every saved file is whole.",
    ]


def test_weights_of_a_generation_are_whole_when_they_are_served(call: Call, model: Path) -> None:
    """What the server holds is what the file says, so that the name in every answer means something."""
    served = ServedModel.load(model, ModelWatch(model, "cpu").machine)
    stored = safetensors.torch.load_file(model / served.generation)
    state = served.learner.method.state()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name].cpu(), stored[name]) for name in stored)

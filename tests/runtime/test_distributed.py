"""Two processes learn what one learns: the same command under torchrun, and started by --devices.

What a single process does is done in that of the tests, and where torchrun itself is not the subject its two
processes are forked from it: starting one takes longer than what it learns here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import pytest
from command_line import use_tiny_backbone
from torch import distributed

from duallora import ContinualLearner
from duallora.cli import main
from duallora.errors import DualLoRAError
from duallora.runtime import compute, parallel
from duallora.runtime.compute import Compute, Machine
from duallora.streams import load

RUN = ["run", "--stream", "digits", "--device", "cpu", "--precision", "32"]
FOUR = ["--classes", "4", "--train-per-class", "21"]  # 84 images: no multiple of a batch of 32
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
FORK = multiprocessing.get_context("fork")
HELPERS = Path(command_line.__file__).parent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process, and in those forked from it, time a few images only and draw nothing."""
    monkeypatch.setattr("duallora.runs.results._SPEED_IMAGES", 4)
    monkeypatch.setattr("duallora.runs.results._SPEED_REPEATS", 1)
    monkeypatch.setattr("duallora.runs.report.accuracy_plot", lambda _: b"a plot")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny backbone: what several processes add up is as equal there, and sooner."""
    use_tiny_backbone(monkeypatch)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def duallora(*words: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *before, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)


def torchrun(*words: str, entry: tuple[str, ...] = ("-m", "duallora")) -> subprocess.CompletedProcess[str]:
    return duallora(*entry, *words, before=TORCHRUN)


def forked(target: Callable[..., object], *given: object) -> None:
    """Calls ``target`` in two processes with the environment that torchrun gives its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0"}

    def one(rank: int) -> None:
        os.environ.update(common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        sys.exit(target(*given))  # type: ignore[arg-type]

    processes = [FORK.Process(target=one, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(1800)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.join()


def finished(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def same_logits(one: Path, two: Path, classes: int) -> float:
    """Largest difference of the logits of the heads and of the calibrated readout."""
    test = load("digits", tasks=1, classes=classes).tasks[0].test
    outputs = [ContinualLearner.load(path / "model", device="cpu").outputs(test) for path in (one, two)]
    kinds = [(getattr(out, kind) for out in outputs) for kind in ("heads", "calibrated")]
    return max(float((a - b).abs().max()) for a, b in kinds)


@pytest.mark.process
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("method", ["duallora", "inflora", "sldc", "coda-prompt"])
def test_one_task_of_two_epochs_is_that_of_one_process(tmp_path: Path, method: str) -> None:
    words = [*RUN, *FOUR, "--tasks", "1", "--epochs", "2", "--method", method]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    forked(main, [*words, "--out", str(tmp_path / "two")])
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    assert same_logits(tmp_path / "one", tmp_path / "two", 4) < 1e-3
    images = sum(task["test_images"] for task in one["tasks"])
    assert abs(one["final_accuracy"] - two["final_accuracy"]) * images < 1.5
    calibrated = one["readouts"]["calibrated"]["final_accuracy"]
    assert calibrated > 0.4  # of four classes: what was learned is not nothing


QUICK = """
import sys
from duallora.cli import main
from duallora.runs import results

results._SPEED_IMAGES, results._SPEED_REPEATS = 4, 1
sys.exit(main())
"""


@pytest.mark.process
def test_a_whole_run_is_that_of_one_process(tmp_path: Path) -> None:
    """On the embedded backbone, three tasks, started by torchrun itself."""
    words = [*RUN, "--classes", "6", "--tasks", "3", "--train-per-class", "21", "--epochs", "1"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    (tmp_path / "quick.py").write_text(QUICK)
    finished(torchrun(*words, "--out", str(tmp_path / "two"), entry=(str(tmp_path / "quick.py"),)))
    one, two = (results(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one["accuracy_matrix"], two["accuracy_matrix"], strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x is None and y is None) or abs(x - y) < 0.03
    assert one["final_accuracy"] > 0.9
    stored = [[task["stored_bytes"] for task in run["tasks"]] for run in (one, two)]
    assert stored[0] == stored[1]


# The second task waits to be interrupted: whoever does so may be late.
WAITING = """
import sys, time
from duallora import ContinualLearner
from duallora.cli import main

learn = ContinualLearner.learn

def waiting(learner, *given, **named):
    if learner.tasks:
        time.sleep(600)
    return learn(learner, *given, **named)

ContinualLearner.learn = waiting
sys.path.append(sys.argv.pop(1))
import pytest
from command_line import use_tiny_backbone

use_tiny_backbone(pytest.MonkeyPatch())
sys.exit(main())
"""


@pytest.mark.process
@pytest.mark.usefixtures("tiny")
def test_an_interrupted_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*RUN, *FOUR, "--tasks", "2", "--epochs", "1", "--out", str(tmp_path / "run")]
    whole = [*words[:-1], str(tmp_path / "whole")]
    assert main(whole) == 0
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    started = subprocess.Popen(
        [sys.executable, *TORCHRUN, str(script), str(HELPERS), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    model = tmp_path / "run" / "model" / "model.json"
    deadline = time.monotonic() + 300
    while not model.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    started.terminate()
    started.wait(timeout=300)
    assert model.exists() and not (tmp_path / "run" / "results.json").exists()
    assert main(words) == 0
    assert "resuming after task" in capsys.readouterr().err
    assert results(tmp_path / "run")["environment"]["processes"] == 1
    one, two = (results(tmp_path / name)["accuracy_matrix"] for name in ("whole", "run"))
    assert all(abs(a - b) < 0.03 for a, b in zip(one[1], two[1], strict=True))


@pytest.mark.process
def test_devices_start_the_processes_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*RUN, *FOUR, "--tasks", "2", "--epochs", "1", "--devices", "2", "--out", str(tmp_path / "run")]
    done = finished(duallora("-m", "duallora", *words))
    assert results(tmp_path / "run")["environment"]["processes"] == 2
    assert done.stdout.count("report:") == 1  # only the first process speaks
    assert done.stderr.count("after task 1 of 2") == 1
    assert main(words) == 2
    assert "holds a finished run" in capsys.readouterr().err


def refused(words: list[str], folder: Path) -> list[str]:
    """What each of two processes says when the command is refused in both."""
    folder.mkdir()

    def one() -> int:
        with (folder / os.environ["RANK"]).open("w") as said, contextlib.redirect_stderr(said):
            return main(words) - 2

    forked(one)
    return [(folder / str(rank)).read_text() for rank in (0, 1)]


@pytest.mark.process
def test_a_task_with_fewer_images_than_processes_is_refused(tmp_path: Path) -> None:
    words = [*RUN, "--classes", "2", "--tasks", "2", "--train-per-class", "1", "--out", str(tmp_path / "run")]
    for said in refused(words, tmp_path / "said"):
        assert "task 1 has 1 images for 2 processes; run it with fewer devices." in said


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_every_optimiser_step_sums_the_pieces_of_a_batch(tmp_path: Path) -> None:
    words = [*RUN, *FOUR, "--tasks", "1", "--epochs", "2"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    assert main([*words, "--accumulate", "3", "--out", str(tmp_path / "pieces")]) == 0
    assert same_logits(tmp_path / "one", tmp_path / "pieces", 4) < 1e-3


@pytest.mark.process
def test_what_the_first_process_refuses_ends_all_with_its_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")  # only the first process looks at whose the folder is
    words = [*RUN, *FOUR, "--tasks", "2", "--out", str(tmp_path / "run")]
    for said in refused(words, tmp_path / "said"):
        assert said.count("belongs to another run") == 1
        assert "internal error" not in said


def take_turns(folder: Path) -> None:
    """What each of two processes does and writes down."""
    distributed.init_process_group("gloo")
    rank = parallel.rank()

    def fetch() -> bool:
        there = (folder / "fetched").exists()
        if not there:
            time.sleep(1)
            (folder / "fetched").touch()
        return there

    said = [str(parallel.first_alone(fetch))]
    for failing in ((0,), (1,), (0, 1)):
        try:
            with parallel.failing_together():
                if rank in failing:
                    raise DualLoRAError(f"{rank} cannot: größer")
            said.append("went on")
        except DualLoRAError as error:
            said.append(str(error))
    (folder / str(rank)).write_text("; ".join(said), encoding="utf-8")
    parallel.leave()


@pytest.mark.process
def test_processes_take_turns_and_fail_together(tmp_path: Path) -> None:
    forked(take_turns, tmp_path)
    said = [(tmp_path / str(rank)).read_text(encoding="utf-8").split("; ") for rank in (0, 1)]
    sentences = ["0 cannot: größer", "1 cannot: größer", "0 cannot: größer"]
    assert said == [["False", *sentences], ["True", *sentences]]


def test_the_memory_for_images_is_shared_by_the_processes_of_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "_CGROUPS", tmp_path)
    whole = Machine(Compute(), "cpu", "32").image_bytes
    assert whole > 2**20
    monkeypatch.setattr(parallel, "size", lambda: 4)
    assert Machine(Compute(), "cpu", "32", devices=2, nodes=2).image_bytes == whole // 2
    (tmp_path / "memory.max").write_text("max\n")
    assert Machine(Compute(), "cpu", "32", devices=4).image_bytes == whole // 4
    (tmp_path / "memory.max").write_text(f"{2**20}\n")  # what a container is allowed
    assert Machine(Compute(image_memory=0.5), "cpu", "32", devices=4).image_bytes == 2**17


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--devices", "0"], "--devices must be at least 1, not 0."),
        (["--num-nodes", "0"], "--num-nodes must be at least 1, not 0."),
        (["--accumulate", "0"], "--accumulate must be at least 1, not 0."),
        (["--workers", "-1"], "--workers must be at least 0, not -1."),
        (["--image-memory", "2"], "--image-memory must lie in [0, 1], not 2.0."),
        (["--precision", "16-mixed"], "--precision 16-mixed needs a CUDA device; take bf16-mixed or 32."),
    ],
)
def test_what_a_machine_cannot_do_is_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert main([*RUN[:-2], *words, "--out", str(tmp_path / "run")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_shares_are_blocks_that_cover_everything_once() -> None:
    for total, parts in itertools.product((0, 1, 7, 64), (1, 2, 3, 5)):
        blocks = [parallel.block(total, part, parts) for part in range(parts)]
        assert [i for block in blocks for i in block] == list(range(total))
        assert max(map(len, blocks)) - min(map(len, blocks)) <= 1

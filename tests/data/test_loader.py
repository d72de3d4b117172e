"""Batches of the loader: equal whoever makes them, decoded once, and ended cleanly."""

from __future__ import annotations

import multiprocessing.process
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_backbone

from duallora.data import loader as loader_module
from duallora.data import workers as workers_module
from duallora.data.assembly import Chunk
from duallora.data.loader import ImageLoader
from duallora.data.source import Source
from duallora.data.transforms import Augmentation, EvaluationTransform
from duallora.errors import DualLoRAError

INFO = tiny_backbone().info
EVALUATION = EvaluationTransform(INFO)
AUGMENTATION = Augmentation(INFO, "crop,flip", seed=3, task=1)
COUNT, SIDE = 50, 40
IMAGE_BYTES = SIDE * SIDE * 3


class Drawn:
    """Random images that note in files, for all processes, how often each is decoded."""

    def __init__(self, folder: Path, bad: Sequence[int] = (), fatal: int | None = None) -> None:
        self.folder, self.bad, self.fatal = folder, tuple(bad), fatal

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with (self.folder / str(index)).open("ab") as file:
            file.write(b".")
        if index in self.bad:
            raise DualLoRAError(f"image {index} is damaged")
        if index == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        pixels = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        return Image.fromarray(pixels), 0

    def decodes(self) -> list[int]:
        files = [self.folder / str(index) for index in range(COUNT)]
        return [file.stat().st_size if file.exists() else 0 for file in files]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are started for any work."""
    monkeypatch.setattr(loader_module, "START_WORTH", -1.0)
    monkeypatch.setattr(loader_module, "SEND_WORTH", -1.0)
    monkeypatch.setattr(loader_module, "CHEAP", 0.0)


@pytest.fixture
def made() -> Iterator[Any]:
    loaders: list[ImageLoader] = []

    def make(workers: int, image_bytes: int = 2**24) -> ImageLoader:
        loaders.append(ImageLoader(torch.device("cpu"), workers, image_bytes))
        loaders[-1].ahead = 20  # as for a GPU
        return loaders[-1]

    yield make
    for each in loaders:
        each.close()


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a process that is started."""
    found: list[int] = []
    start = multiprocessing.process.BaseProcess.start

    def counted(self: Any) -> None:
        start(self)
        found.append(self.pid)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", counted)
    return found


def chunks(size: int = 12, epochs: Sequence[int | None] = (None,)) -> list[Chunk]:
    orders = [
        torch.randperm(COUNT, generator=torch.Generator().manual_seed(-1 if e is None else e)) for e in epochs
    ]
    return [
        Chunk(tuple(order[start : start + size].tolist()), epoch)
        for epoch, order in zip(epochs, orders, strict=True)
        for start in range(0, COUNT, size)
    ]


def gone_through(loader: ImageLoader, source: Source, asked: list[Chunk]) -> list[torch.Tensor]:
    return list(loader.batches(source, asked, sum(len(chunk.positions) for chunk in asked)))


def expected(samples: Drawn, asked: list[Chunk]) -> list[torch.Tensor]:
    def view(index: int, epoch: int | None) -> torch.Tensor:
        image = samples[index][0]
        return EVALUATION(image) if epoch is None else AUGMENTATION(image, epoch, index)

    return [torch.stack([view(index, chunk.epoch) for index in chunk.positions]) for chunk in asked]


@pytest.mark.parametrize("forks", [True, False], ids=["forks", "threads"])
@pytest.mark.parametrize("keep", ["images", "nothing"])
@pytest.mark.parametrize("workers", [0, 2, pytest.param(4, marks=pytest.mark.process)])
def test_batches_are_equal_with_any_number_of_workers(
    workers: int, keep: Any, forks: bool, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "forking", lambda: forks)
    loader, samples = made(workers), Drawn(tmp_path)
    loader.ahead = 0 if keep == "nothing" else 20
    asked = chunks(epochs=[None, 0, 1, None])
    with loader.reading(samples, EVALUATION, AUGMENTATION, keep=keep) as source:
        for _ in range(2):
            found = gone_through(loader, source, asked)
            assert all(map(torch.equal, found, expected(samples, asked)))
            assert all(batch.is_contiguous() for batch in found)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_fits_is_decoded_once_and_the_rest_again(workers: int, made: Any, tmp_path: Path) -> None:
    samples, passes = Drawn(tmp_path), 3
    roomy = made(workers)
    with roomy.reading(samples, EVALUATION, AUGMENTATION, keep="images") as source:
        # Two workers may decode an image at once: the first epoch is over before another one asks for it.
        gone_through(roomy, source, chunks(epochs=[None]))
        for _ in range(passes):
            gone_through(roomy, source, chunks(epochs=[None, 0, 1]))
    assert samples.decodes() == [1] * COUNT

    (tmp_path / "narrow").mkdir()
    narrow, some = made(workers, 2 * 20 * IMAGE_BYTES), Drawn(tmp_path / "narrow")
    with narrow.reading(some, EVALUATION, AUGMENTATION, keep="images") as source:
        for _ in range(passes):
            gone_through(narrow, source, chunks())
        kept = source.region.image_bytes
    assert 18 * IMAGE_BYTES <= kept <= 20 * IMAGE_BYTES  # whole pages of it
    assert sorted(some.decodes()) == [1] * (kept // IMAGE_BYTES) + [passes] * (COUNT - kept // IMAGE_BYTES)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_views_are_kept_as_they_are_seen(workers: int, made: Any, tmp_path: Path) -> None:
    samples, loader = Drawn(tmp_path), made(workers)
    with loader.reading(samples, EVALUATION, keep="views", region="run") as source:
        first, second = (gone_through(loader, source, chunks()) for _ in range(2))
        assert source.region.image_bytes == COUNT * 3 * 32 * 32
        with loader.reading(samples, EVALUATION) as again:
            assert again is source
    assert all(map(torch.equal, first, second))
    assert samples.decodes() == [1] * COUNT
    assert source.region.image_bytes == 0


def test_workers_start_once_for_all_tasks(made: Any, tmp_path: Path, starts: list[int]) -> None:
    loader = made(2)
    for task in range(3):
        (tmp_path / str(task)).mkdir()
        samples = Drawn(tmp_path / str(task))
        with loader.reading(samples, EVALUATION, AUGMENTATION, keep="images") as source:
            for epoch in range(2):
                gone_through(loader, source, chunks(epochs=[epoch]))
        assert samples.decodes() == [1] * COUNT
    assert len(starts) == loader.started == 2


def test_a_data_set_that_cannot_be_sent_is_inherited_by_new_workers(
    made: Any, tmp_path: Path, starts: list[int]
) -> None:
    loader = made(2)
    for task in range(2):
        samples = Drawn(tmp_path)
        samples.callback = lambda: None  # type: ignore[attr-defined]
        with loader.reading(samples, EVALUATION, AUGMENTATION) as source:
            for epoch in range(3):
                found = gone_through(loader, source, chunks(epochs=[epoch]))
            assert torch.equal(found[0], expected(samples, chunks(epochs=[2]))[0])
        assert len(starts) == 2 * (task + 1)


def test_little_work_starts_no_process(
    made: Any, tmp_path: Path, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "START_WORTH", 1e6)
    loader = made(2)
    with loader.reading(Drawn(tmp_path), EVALUATION, AUGMENTATION) as source:
        gone_through(loader, source, chunks())
    assert not starts


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_bad_image_is_named_and_the_loader_goes_on(workers: int, made: Any, tmp_path: Path) -> None:
    loader, asked = made(workers), chunks()
    order = [index for chunk in asked for index in chunk.positions]
    samples = Drawn(tmp_path, bad=[order[45], order[20], order[22]])
    found = []
    with loader.reading(samples, EVALUATION, AUGMENTATION) as source:
        with pytest.raises(DualLoRAError, match=f"^image {order[20]} is damaged$"):
            found += list(loader.batches(source, asked, COUNT))
        assert torch.equal(gone_through(loader, source, asked[:1])[0], expected(samples, asked[:1])[0])


def test_a_pass_that_is_left_leaves_nothing_under_way(made: Any, tmp_path: Path) -> None:
    loader, samples = made(2), Drawn(tmp_path)
    for _ in range(3):
        with loader.reading(samples, EVALUATION, AUGMENTATION, keep="images") as source:
            passing = loader.batches(source, chunks(4), COUNT)
            next(passing)
            with loader.reading(samples, EVALUATION, AUGMENTATION) as same:  # a pass inside a pass
                assert torch.equal(gone_through(loader, same, chunks())[0], expected(samples, chunks())[0])
            passing.close()
    with loader.reading(samples, EVALUATION, AUGMENTATION) as source:
        assert all(map(torch.equal, gone_through(loader, source, chunks()), expected(samples, chunks())))


def test_a_source_may_be_closed_under_a_pass(made: Any, tmp_path: Path) -> None:
    loader, samples = made(2), Drawn(tmp_path)
    with loader.reading(samples, EVALUATION, AUGMENTATION, keep="images") as source:
        passing = loader.batches(source, chunks(4), COUNT)
        next(passing)
    passing.close()
    assert source.region.image_bytes == 0


def test_a_worker_that_dies_is_one_sentence(made: Any, tmp_path: Path) -> None:
    loader, asked = made(2), chunks()
    with (
        loader.reading(Drawn(tmp_path, fatal=asked[2].positions[3]), EVALUATION, AUGMENTATION) as source,
        pytest.raises(DualLoRAError, match=r"ended unexpectedly.*--workers or --image-memory"),
    ):
        gone_through(loader, source, asked)
    (tmp_path / "sound").mkdir()
    sound = Drawn(tmp_path / "sound")
    with loader.reading(sound, EVALUATION, AUGMENTATION) as source:
        assert len(gone_through(loader, source, asked)) == len(asked)


def test_two_threads_read_at_once(made: Any, tmp_path: Path) -> None:
    loader, samples, asked = made(2), Drawn(tmp_path), chunks(6)
    found: dict[int, list[torch.Tensor]] = {}
    with loader.reading(samples, EVALUATION, AUGMENTATION, keep="images") as source:
        threads = [
            threading.Thread(target=lambda n=n: found.update({n: gone_through(loader, source, asked)}))
            for n in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for batches in found.values():
        assert all(map(torch.equal, batches, expected(samples, asked)))
    assert len(found) == 2


SCRIPT = """
import sys, time
from pathlib import Path
import torch
sys.path[:0] = {path!r}
import test_loader as t
from duallora.data import loader as module
module.START_WORTH = module.SEND_WORTH = module.CHEAP = -1.0
loader = module.ImageLoader(torch.device("cpu"), 2, 2**20)
with loader.reading(t.Drawn(Path(sys.argv[1])), t.EVALUATION, t.AUGMENTATION) as source:
    passing = loader.batches(source, t.chunks(4) * 10_000, t.COUNT * 10_000)
    next(passing)
    print(*[each.pid for each in loader._workers._started], flush=True)
    for batch in passing:
        pass
"""


INTERRUPTED_AT_ONCE = """
import os, signal, sys
from pathlib import Path
import torch
sys.path[:0] = {path!r}
import test_loader as t
from duallora.data import loader as module
module.START_WORTH = module.SEND_WORTH = module.CHEAP = -1.0
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGINT))
loader = module.ImageLoader(torch.device("cpu"), 2, 2**20)
with loader.reading(t.Drawn(Path(sys.argv[1])), t.EVALUATION, t.AUGMENTATION) as source:
    print(sum(len(batch) for batch in loader.batches(source, t.chunks(4) * 10, t.COUNT * 10)), loader.started)
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.process
def test_a_worker_is_not_interrupted_before_its_first_line(tmp_path: Path) -> None:
    here = Path(__file__).parent
    script = INTERRUPTED_AT_ONCE.format(path=[str(here), str(here.parent / "helpers")])
    words = [sys.executable, "-c", script, str(tmp_path)]
    run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert "Traceback" not in run.stderr, run.stderr
    assert run.stdout.split() == [str(10 * COUNT), "2", "interrupted"]


def alive(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has asked for yet has."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_interruption_does_not_wait_for_what_has_come(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the arrival of a piece and its entry in the books: nobody may wait for it then."""
    loader = made(2)

    def interrupted(_: Any) -> None:
        wait(loader._workers._results)[0].recv()
        raise KeyboardInterrupt

    with loader.reading(Drawn(tmp_path), EVALUATION, AUGMENTATION) as source:
        passing = loader.batches(source, chunks(4) * 10, COUNT * 10)
        next(passing)
        with monkeypatch.context() as patch:
            patch.setattr("duallora.data.loader.Assembly.take", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(passing)
        assert loader._workers is None
        assert len(gone_through(loader, source, chunks(4))) == len(chunks(4))


@pytest.mark.process
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill"])
def test_no_worker_outlives_its_process(sent: signal.Signals, tmp_path: Path) -> None:
    here = Path(__file__).parent
    script = SCRIPT.format(path=[str(here), str(here.parent / "helpers")])
    words = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        pids = [int(word) for word in run.stdout.readline().split()]
        assert len(pids) == 2
        if sent == signal.SIGINT:
            os.killpg(run.pid, sent)  # as a terminal does
        else:
            os.kill(run.pid, sent)
        said = run.stderr.read()  # ends when the last process that holds it has ended
        run.wait()
    while any(map(alive, pids)):
        time.sleep(0.01)
    assert said.count("Traceback") == (sent == signal.SIGINT)  # of the first process alone

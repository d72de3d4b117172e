"""Malformed inputs of every kind: how many end in a traceback, hang, change a file or take much memory.

    python benchmarks/fuzz.py 10000 --seed 0

Images, `model.json`, tensors whose hashes fit, configurations, tables, zips, command lines and requests in
turn, in this process. Each must be answered or refused with a sentence. Exits with 1 for any fault, and
writes the input of each into the folder of `--keep`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch
from PIL import Image

import fuzz_inputs as inputs
from duallora import ContinualLearner, DualLoRAError
from duallora.app.intake import Seen
from duallora.app.uploads import Uploads
from duallora.cli import VERBS, main
from duallora.data.images import decode_image
from duallora.serving.app import create_app
from duallora.serving.limits import Limits
from duallora.serving.model_watch import ModelWatch
from duallora.streams.table import read_table

SECONDS, WAITING = 20.0, 300.0
"""Of computing and of waiting, after which an input counts as one that hangs."""

MEGABYTES = 3000
"""Of memory that the process may have taken at any moment, the libraries and the model included."""

_WORDS = [
    *("", "-", "--", "---x", "--config", "--config=", "--help", "--seed", "--seed=-1", "--epochs", "nan"),
    *("--stream", "digits", "/dev/zero", "/proc/self/mem", "--method", "--method=sora", "--method.rank"),
    *("--out", "--json", "--top", "0", "-1", "é", "1e400", "\x00", "../..", "--device", "tpu", "{}", "["),
    "x" * 3000,
]
# These compute, listen or draw for long once their words are right; one that is wrong is always among them.
_LONG = frozenset({"run", "compare", "reproduce", "bench", "serve", "app", "learn", "export"})


class Hang(BaseException):
    """An input took too long."""


class Fuzzer:
    """Sound inputs in a scratch folder, and one check for every kind.

    Args:
        scratch: an empty folder.
        rng: draws the inputs.
    """

    def __init__(self, scratch: Path, rng: random.Random) -> None:
        self.rng, self.scratch = rng, scratch
        self.images = inputs.sound_images()
        self.model = scratch / "model"
        self.data = scratch / "data"
        for name, colour in (("ant", "red"), ("bee", "navy")):
            (self.data / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (40, 40 + number), colour).save(self.data / name / f"{number}.png")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = main(["learn", str(self.model), str(self.data), "--epochs", "1", "--device", "cpu"])
        if code:
            sys.exit("the model that is damaged could not be learned")
        self.manifest = json.loads((self.model / "model.json").read_bytes())
        self.tensors = safetensors.torch.load((self.model / self.manifest["weights"]).read_bytes())
        self.given: Any = None

    def checks(self) -> dict[str, Callable[[], str]]:
        """The kinds; each gives in a word what came of one input."""
        return {
            "image": self.image,
            "model.json": self.description,
            "tensors": self.saved,
            "configuration": self.configuration,
            "table": self.table,
            "zip": self.zip,
            "command": self.command,
            "request": self.request,
        }

    def image(self) -> str:
        """An image, as every command reads it."""
        self.given = inputs.shrunk(lambda: inputs.image(self.images, self.rng))
        read = decode_image(self.given, "photo", 20_000_000)
        return "answered" if read.mode == "RGB" and min(read.size) > 0 else "WRONG"

    def description(self) -> str:
        """A model.json; half of them with tensors that fit, half the bytes themselves damaged."""
        with self._copy() as model:
            if self.rng.random() < 0.7:
                self.given = inputs.changed_tree(self.manifest, self.rng)
                inputs.rewrite(model, self.given, self.tensors)
            else:
                self.given = inputs.damaged((self.model / "model.json").read_bytes(), self.rng, 4000)
                (model / "model.json").write_bytes(self.given)
            return self._asked(model)

    def saved(self) -> str:
        """Tensors whose hashes fit, or a damaged file."""
        with self._copy() as model:
            tensors = inputs.changed_tensors(self.tensors, self.rng)
            self.given = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
            inputs.rewrite(model, self.manifest, tensors)
            return self._asked(model)

    def configuration(self) -> str:
        """A YAML file for a run, which must not begin."""
        self.given = inputs.yaml(self.rng)
        (self.scratch / "c.yaml").write_bytes(self.given)
        words = ["run", "--out", str(self.scratch / "out"), "--config", str(self.scratch / "c.yaml")]
        return self._called([*words, "--seed=-1"])

    def table(self) -> str:
        """A table of images."""
        self.given = inputs.table(self.rng)
        (self.data / "images.csv").write_bytes(self.given)
        try:
            return "answered" if read_table(self.data / "images.csv").parts else "WRONG"
        finally:
            (self.data / "images.csv").unlink()

    def zip(self) -> str:
        """A zip, as the page takes it, and the images in it."""
        self.given = inputs.shrunk(lambda: inputs.archive(self.images, self.rng))
        with Uploads() as uploads:
            (uploads.folder / "a.zip").write_bytes(self.given)
            for found in uploads.unpack(uploads.folder / "a.zip", "a.zip"):
                Seen.at(found)
        return "answered"

    def command(self) -> str:
        """A command line."""
        verb = self.rng.choice([*VERBS, "", "x"])
        pool = [*_WORDS, str(self.model), str(self.data)]
        words = self.rng.choices(pool, k=self.rng.randrange(7))
        if verb in _LONG:
            words = [word for word in words if word != "--"]  # after which nothing is an option
            words.insert(self.rng.randrange(len(words) + 1), "--there-is-no-such-option")
        self.given = [verb, *words]
        return self._called(self.given)

    def request(self) -> str:
        """A request to the server."""
        method, path, rest = self.given = inputs.request(self.images, self.rng)
        answer = self.client.request(method, path, **rest)
        if answer.status_code == 500:
            return "TRACEBACK (500)"
        return "answered" if answer.status_code < 400 else "refused"

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, the model is served to :attr:`client`."""
        from fastapi.testclient import TestClient

        watch = ModelWatch(self.model, "cpu", interval=3600)
        app = create_app(watch, Limits(max_pixels=20_000_000), local=True)
        with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as self.client:
            yield

    def _asked(self, model: Path) -> str:
        learner = ContinualLearner.load(model, device="cpu")
        (found,) = learner.predict([torch.zeros(3, 40, 40)])
        numbers = (found.probability, found.task_confidence, found.unknown)
        return "answered" if all(math.isfinite(number) for number in numbers) else "NAN"

    def _called(self, words: list[str]) -> str:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(self.data):
            code = main(words)
        said = err.getvalue()
        if code == 1 or "internal error" in said or "Traceback" in said:
            return f"TRACEBACK ({said.strip()[-200:]})"
        if len(said) > 5000:
            return f"LONG ({len(said):,} letters)"
        return "answered" if code == 0 else "refused"

    @contextlib.contextmanager
    def _copy(self) -> Iterator[Path]:
        model = self.scratch / "changed"
        shutil.copytree(self.model, model)
        try:
            yield model
        finally:
            shutil.rmtree(model)


def one(check: Callable[[], str]) -> str:
    """What came of one input; a fault in capitals."""

    def hang(number: int, frame: FrameType | None) -> None:
        raise Hang

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, WAITING))
    for timer, number, seconds in timers:
        signal.signal(number, hang)
        signal.setitimer(timer, seconds)
    try:
        return check()
    except DualLoRAError as error:
        return "refused" if len(str(error)) < 3000 and "\n" not in str(error) else f"NO SENTENCE ({error})"
    except Hang:
        return "HANG"
    except Exception:
        return f"TRACEBACK ({traceback.format_exc()[-600:]})"
    finally:
        for timer, _, _ in timers:
            signal.setitimer(timer, 0)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder that an input must not change."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("c.yaml", ".lock")
    }


def fuzz(number: int, seed: int, keep: Path | None = None) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Counts by kind and outcome, and the faults.

    Args:
        number: of inputs.
        seed: of the inputs.
        keep: folder for inputs that met a fault.
    """
    counts: Counter[tuple[str, str]] = Counter()
    faults = []
    with tempfile.TemporaryDirectory(prefix="duallora-fuzz-") as folder:
        fuzzer = Fuzzer(Path(folder), random.Random(seed))
        before = listing(Path(folder))
        begin = time.monotonic()
        with fuzzer.serving():
            kinds = list(fuzzer.checks().items())
            for turn in range(number):
                kind, check = kinds[turn % len(kinds)]
                found = one(check)
                if not found[0].isupper():
                    after = listing(Path(folder))
                    if after != before:
                        found, before = f"CHANGED {sorted(set(after) ^ set(before))[:3]}", after
                counts[kind, found.partition(" ")[0]] += 1
                if found[0].isupper():
                    faults.append(f"{turn} {kind}: {found}")
                    print(faults[-1], f"\n    input: {str(fuzzer.given)[:300]}", flush=True)
                    if keep is not None:
                        (keep / f"{seed}-{turn}-{kind}").write_bytes(_bytes(fuzzer.given))
                if (turn + 1) % 1000 == 0:
                    print(f"{turn + 1:,} inputs in {time.monotonic() - begin:.0f} s", flush=True)
    return counts, faults


def _bytes(given: Any) -> bytes:
    return given if isinstance(given, bytes) else repr(given).encode("utf-8", "backslashreplace")


def run() -> int:
    """Returns 1 when an input met a fault or the memory was too much."""
    parser = argparse.ArgumentParser(description="Malformed inputs; each must be answered or refused.")
    parser.add_argument("number", type=int, help="of inputs")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--keep", type=Path, help="existing folder for inputs that met a fault")
    arguments = parser.parse_args()
    begin = time.monotonic()
    counts, faults = fuzz(arguments.number, arguments.seed, arguments.keep)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
    print("\ninputs  kind, outcome")
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{count:6}  {kind}, {outcome}")
    print(f"faults: {len(faults)} of {arguments.number}; {time.monotonic() - begin:.0f} s, peak {peak:,} MB")
    return int(bool(faults) or peak > MEGABYTES)


if __name__ == "__main__":
    sys.exit(run())

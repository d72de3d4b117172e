"""The examples of the README and the list of commands run as they stand there, on folders of tiny images.

Run are the README's blocks marked ``python`` and ``sh``, and those marked ``sh`` and ``console`` under "At a
glance" in ``docs/commands.md``. ``make run`` and ``make test`` are not: they install an environment. Every
``duallora run``, ``compare`` and ``bench`` is followed by options that make it small, and the speed of
inference is timed on a few images only.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from command_line import use_tiny_backbone
from compare_tools import in_process
from PIL import Image
from tiny import tiny_backbone

from duallora.cli import VERBS, main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
GLANCE = COMMANDS.split("## At a glance")[1].split("\n## ")[0]
SMALLER = ["--epochs", "1"]
SMALLER_DIGITS = [*SMALLER, "--train-per-class", "4", "--classes", "4", "--tasks", "2"]

pytestmark = pytest.mark.filterwarnings("ignore:.*no direction is left")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def command_lines(block: str) -> list[str]:
    return [line for line in block.splitlines() if line.strip()]


def words_of(line: str) -> list[str]:
    name, *words = shlex.split(line, comments=True)
    assert name == "duallora", line
    if words[0] == "bench":
        return [*words, "--tasks", "1", "--batch", "1", "--images", "4", "--repeats", "1"]
    if words[0] == "learn":
        return words if "--epochs" in words else words + SMALLER
    if words[0] not in ("run", "compare"):
        return words
    return words + (SMALLER if "--stream" in words else SMALLER_DIGITS)


def write_image(path: Path, colour: np.ndarray, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = colour + rng.normal(0, 8, (16, 16, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def write_classes(folder: Path, first: int, classes: int, images: int) -> None:
    """Classes that differ in colour, so that a few images are enough to tell them apart."""
    for number in range(first, first + classes):
        rng = np.random.default_rng(number)
        colour = np.array([number % 3, number // 3 % 3, number // 9]) * 110.0 + 15
        for image in range(images):
            write_image(folder / f"class-{number:02}" / f"{image}.jpg", colour, rng)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the README's examples name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("duallora.runs.results._SPEED_IMAGES", 8)
    monkeypatch.setattr("duallora.runs.results._SPEED_REPEATS", 1)
    monkeypatch.setattr("duallora.training.epochs_for", lambda *given: 1)
    rng = np.random.default_rng(0)
    for photo in ("photo.jpg", "holiday/1.jpg", "holiday/2.jpg"):
        write_image(Path(photo), np.array([15.0, 15.0, 15.0]), rng)
    return tmp_path


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 130


@pytest.mark.slow
def test_python_block(here: Path) -> None:
    write_classes(here / "images/pets", 0, classes=2, images=5)
    write_classes(here / "images/birds", 12, classes=2, images=5)
    (block,) = blocks("python")
    assert len(block.splitlines()) <= 15
    printed, names = io.StringIO(), {"__name__": "readme"}
    with redirect_stdout(printed):
        exec(compile(block, "README.md", "exec"), names)
    assert len(names["learner"].tasks) == 2 and len(names["learner"].classes) == 4
    assert len(printed.getvalue().splitlines()) == 2
    assert (here / "animals/model.json").exists()


@pytest.mark.slow
def test_the_readmes_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classes(here / "images/pets", 0, classes=2, images=12)
    write_classes(here / "images/birds", 12, classes=2, images=12)
    for line in command_lines(blocks("sh")[0]):
        assert main(words_of(line)) == 0, f"{line}: {capsys.readouterr().err}"


@pytest.mark.slow
def test_commands_at_a_glance(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tiny backbone, and the runs of ``compare`` in this process: what they do is tested elsewhere."""
    use_tiny_backbone(monkeypatch)
    monkeypatch.setattr("duallora.backbones.backbone.load_backbone", lambda *_, **__: tiny_backbone())
    monkeypatch.setattr("duallora.commands.compare.run_jobs", in_process([]))
    monkeypatch.setattr("duallora.bench.timing.SHORTEST", 0.0)
    write_classes(here / "images/pets", 0, classes=2, images=12)
    write_classes(here / "images/birds", 12, classes=2, images=12)
    lines = [line for block in blocks("sh", GLANCE) for line in command_lines(block)]
    assert {words_of(line)[0] for line in lines} == set(VERBS) - {"app", "serve", "pull"}  # no end; no hub
    for line in lines:
        assert main(words_of(line)) == 0, f"{line}: {capsys.readouterr().err}"
    assert {"results.json", "report.md", "predictions.csv", "model"} <= {
        path.name for path in (here / "runs/first").iterdir()
    }
    compared = {path.name for path in (here / "runs/compared").iterdir()}
    assert {"compare.csv", "compare.md", "compare.html"} <= compared


@pytest.mark.process
def test_the_example_of_a_request(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    write_classes(here / "images/pets", 0, classes=2, images=4)
    assert main(["learn", "pets", "images/pets", "--epochs", "1"]) == 0, capsys.readouterr().err
    serve, answer, ask = command_lines(blocks("console", GLANCE)[0])
    assert serve.startswith("$ duallora ") and ask.startswith("$ curl ")
    entry = "from duallora.cli import main; raise SystemExit(main())"
    words = [sys.executable, "-u", "-c", entry, *serve.split()[2:], "--port", "0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        said = server.stdout.readline().strip()
        (address,) = re.findall(r"127\.0\.0\.1:\d+", said)
        assert said.replace(address, "127.0.0.1:8000") == answer
        asked = shlex.split(ask.replace("127.0.0.1:8000", address))[1:]
        got = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    finally:
        server.kill()
        server.wait()
    (found,) = json.loads(got)["predictions"]
    assert found["path"] == "photo.jpg" and len(found["top"]) == 2


def test_links_lead_to_files() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []

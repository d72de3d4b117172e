"""Suites: run end to end on a small data set in its real format, resumed, judged, and written as scripts."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import stream_fixtures
from command_line import Call, assert_refused, caller
from compare_tools import Started, edit, in_process, quick, rows_of
from tiny import tiny_backbone

from duallora.cli import main
from duallora.commands import suite_runs
from duallora.commands.arguments import parse
from duallora.commands.published_protocols import protocols
from duallora.commands.reproduce import reproduce
from duallora.commands.subprocess_jobs import Job
from duallora.commands.suites import placed, read_suite, suites
from duallora.methods import METHODS

SUITE = """
stream: imagenet-r
tasks: 2
order: seed
seeds: [1, 2]
backbone: embedded
augment: none
images: {train: 28, test: 12, tasks: 2}
lines:
  frozen: {method: {epochs: 1}}
  joint: {method: {epochs: 1, batch_size: 8}}
  lora:
    method: {epochs: 1, batch_size: 8, rank: 2}
    seeds: [0]
    order: alphabetical
    expected: {final_accuracy: 0.5, tolerance: 1.0, source: nowhere}
  ncm: {expected: {final_accuracy: 0.0, average_incremental_accuracy: 0.0, tolerance: 0.001, source: a guess}}
"""


def in_this_process(patch: pytest.MonkeyPatch) -> Started:
    started = quick(patch)
    patch.setattr(suite_runs, "run_jobs", in_process(started))
    return started


def words(folder: Path, *more: object) -> list[str]:
    given = [
        *("reproduce", "--suite", folder / "small.yaml"),
        "--data",
        folder / "data",
        "--out",
        folder / "out",
    ]
    lists = ["--split-lists", folder / "lists"]
    return [str(word) for word in (*given, *lists, "--device", "cpu", *more)]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished suite on ImageNet-R as it lies on a disk, and its public split."""
    folder = tmp_path_factory.mktemp("suite")
    stream_fixtures.write_imagenet_r(folder / "data")
    stream_fixtures.write_split_lists(folder / "lists")
    (folder / "small.yaml").write_text(SUITE)
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch)
        assert main(words(folder)) == 0
    return folder


@pytest.fixture
def finished(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    return in_this_process(monkeypatch)


@pytest.fixture
def call(started: Started, capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


def document(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "out" / "compare.json").read_text())
    return content


# -- the whole ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_suite_leaves_runs_a_page_and_a_verdict_on_every_line(template: Path) -> None:
    out = template / "out"
    runs = {"frozen-1", "frozen-2", "joint-1", "joint-2", "lora-0", "ncm-1", "ncm-2"}
    assert {path.name for path in (out / "runs").iterdir()} == runs
    assert {row["line"]: row["seeds"] for row in rows_of(out)} == {
        **{name: "1 2" for name in ("frozen", "joint", "ncm")},
        "lora": "0",
    }
    found = document(template)
    assert found["suite"] == "small" and set(found["rooms"]) == {"heads", "calibrated"}
    verdicts = {(each["line"], each["figure"]): each for each in found["verdicts"]}
    assert len(verdicts) == 4 * 2
    assert verdicts["lora", "final_accuracy"]["inside"] is True
    assert verdicts["ncm", "final_accuracy"]["inside"] is False
    assert verdicts["frozen", "final_accuracy"]["inside"] is None
    assert verdicts["lora", "average_incremental_accuracy"]["published"] is None
    measured = json.loads((out / "runs" / "lora-0" / "results.json").read_text())
    assert verdicts["lora", "final_accuracy"]["measured"] == measured["final_accuracy"]
    for page in ("compare.md", "compare.html"):
        text = (out / page).read_text()
        for part in ("Published and measured", "inside ± 100.0", "outside ± 0.1", "no published figure"):
            assert part in text, (page, part)
        for part in (
            "suite small",
            "28 training and 12 test images",
            "nowhere",
            "of the run",
            "alphabetical",
        ):
            assert part in text, (page, part)


@pytest.mark.slow
def test_every_run_has_the_order_of_its_seed(template: Path) -> None:
    orders = {}
    for path in (template / "out" / "runs").iterdir():
        results = json.loads((path / "results.json").read_text())
        orders[path.name] = results["stream"]["order_seed"]
        assert results["stream"]["name"].startswith("imagenet-r (split lists")
    assert (orders["ncm-1"], orders["ncm-2"], orders["lora-0"]) == (1, 2, "alphabetical")


@pytest.mark.slow
def test_lines_of_other_orders_are_paired_by_their_images(template: Path) -> None:
    found = document(template)
    pairs = {(each["line"], each["other"]) for each in found["differences"]}
    assert {frozenset(pair) for pair in pairs} >= {frozenset(("ncm", "lora")), frozenset(("joint", "lora"))}


@pytest.mark.slow
def test_a_finished_suite_runs_nothing_and_shows_the_same(
    call: Call, started: Started, finished: Path
) -> None:
    (finished / "out" / "compare.json").unlink()
    done = call(*words(finished))
    assert done.code == 0 and started == []
    assert "Published" in done.out or "published" in done.out
    assert document(finished)["verdicts"]


@pytest.mark.slow
def test_only_what_is_missing_is_run_and_logged(call: Call, started: Started, finished: Path) -> None:
    for run in ("ncm-1", "frozen-2"):
        shutil.rmtree(finished / "out" / "runs" / run)
    assert call(*words(finished, "--logger", "csv", "--log-dir", finished / "figures")).code == 0
    assert started == ["ncm, seed 1", "frozen, seed 2"]
    assert {path.name for path in (finished / "figures").iterdir()} == {"ncm-1", "frozen-2"}


@pytest.mark.slow
def test_a_suite_that_was_interrupted_goes_on(
    call: Call, started: Started, tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("data", "lists", "small.yaml"):
        copy = shutil.copytree if (template / name).is_dir() else shutil.copy
        copy(template / name, tmp_path / name)

    def stop(jobs: Sequence[Job], at_once: int, tell: Callable[[str], None], *_: object) -> list[Job]:
        assert in_process(started)(jobs[:1], at_once, tell) == []
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(suite_runs, "run_jobs", stop)
        assert call(*words(tmp_path, "--methods", "ncm,lora")).code == 130
    assert not (tmp_path / "out" / "compare.json").exists()
    assert call(*words(tmp_path, "--methods", "ncm,lora")).code == 0
    assert started == ["ncm, seed 1", "lora, seed 0", "ncm, seed 2"]
    assert "add frozen,joint to --methods" in (tmp_path / "out" / "compare.md").read_text()


@pytest.mark.slow
def test_runs_and_page_can_be_made_apart(call: Call, started: Started, finished: Path) -> None:
    out = finished / "out"
    shutil.rmtree(out)
    refused = call(*words(finished, "--part", "page"))
    assert_refused(refused, "no finished run", "run the suite first")
    one = call(*words(finished, "--part", "runs", "--methods", "ncm", "--seeds", "2"))
    assert one.code == 0 and started == ["ncm, seed 2"]
    assert not (out / "compare.json").exists()
    assert call(*words(finished, "--part", "page")).code == 0
    assert started == ["ncm, seed 2"]
    assert {row["line"]: row["seeds"] for row in rows_of(out)} == {"ncm": "2"}


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_page_shows_the_others(
    call: Call, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(finished / "out" / "runs" / "ncm-2")
    monkeypatch.setattr(suite_runs, "run_jobs", lambda jobs, *_: list(jobs))
    failed = call(*words(finished))
    assert failed.code == 2
    assert "1 of 1 runs failed (ncm, seed 2)" in failed.err and "repeat the command" in failed.err
    assert {row["seeds"] for row in rows_of(finished / "out") if row["line"] == "ncm"} == {"1"}


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_missing_data_is_one_sentence_before_anything_is_run(
    call: Call, started: Started, finished: Path
) -> None:
    shutil.rmtree(finished / "data")
    refused = call(*words(finished))
    assert_refused(refused, "imagenet-r", "fetch", "--data")
    assert started == []


@pytest.mark.slow
def test_missing_weights_are_one_sentence(call: Call, finished: Path) -> None:
    (finished / "weights").mkdir()
    refused = call(*words(finished, "--backbone-file", finished / "weights"))
    assert_refused(refused, "weights has no embedded.safetensors", "put the weights")


def test_a_folder_of_weights_has_one_for_every_backbone(tmp_path: Path) -> None:
    suite = read_suite("imagenet-r-10")
    for tag in ("augreg_in21k", "augreg_in21k_ft_in1k"):
        (tmp_path / f"vit_base_patch16_224.{tag}.safetensors").write_bytes(b"")
    found = {line: placed(suite.protocol(line), None, None, tmp_path) for line in ("inflora", "l2p")}
    files = {line: protocol.backbone.backbone_file for line, protocol in found.items()}
    assert files["inflora"] == tmp_path / "vit_base_patch16_224.augreg_in21k.safetensors"
    assert files["l2p"] == tmp_path / "vit_base_patch16_224.augreg_in21k_ft_in1k.safetensors"


@pytest.mark.slow
def test_a_folder_that_holds_another_run_is_refused(call: Call, started: Started, finished: Path) -> None:
    edit(finished / "out" / "runs" / "ncm-1" / "results.json", lambda run: run["config"].update(tasks=4))
    assert_refused(call(*words(finished)), "ncm-1", "tasks: 4 there, 2 asked for")
    assert started == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lines: [a]", ["is not sound", "lines:"]),
        ("lines: {lora: 3}", ["is not sound"]),
        ("table: nowhere-10\nlines: {lora: {}}", ["nowhere-10", "no protocol"]),
        ("lines: {nosuch: {}}", []),
        ("lines: {lora: {method: {rnak: 3}}}", ["small/lora", "rnak"]),
        ("lines: {lora: {method: {epochs: many}}}", ["small/lora", "epochs"]),
        ("lines: {lora: {method: nosuch}}", ["nosuch"]),
        ("lines: {lora: {nosuch: 3}}", ["small/lora", "nosuch"]),
        ("tasks: [ten]\nlines: {lora: {}}", ["small/lora"]),
        ("seeds: [x]\nlines: {lora: {}}", ["--seeds must be numbers"]),
        ("lines: {lora: {expected: {final_accuracy: 0.5}}}", ["'expected' of small/lora", "tolerance"]),
        ("lines: {lora: {expected: {final_accuracy: 71, tolerance: 1, source: x}}}", ["in [0, 1]"]),
        ("lines: {lora: {expected: 3}}", ["'expected'"]),
        ("images: 5\nlines: {lora: {}}", ["'images' of the suite", "tasks"]),
        ("lines: {}", ["names no line"]),
    ],
)
def test_a_suite_that_cannot_be_meant_is_one_sentence(
    call: Call, started: Started, tmp_path: Path, text: str, parts: list[str]
) -> None:
    (tmp_path / "small.yaml").write_text(f"stream: digits\n{text}\n")
    assert_refused(call("reproduce", "--suite", tmp_path / "small.yaml", "--out", tmp_path / "out"), *parts)
    assert started == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--suite", "imagenet-r-11"], ["no suite imagenet-r-11", "imagenet-r-10"]),
        (["--suite", "imagenet-r-10", "--methods", "inflroa"], ["no line inflroa", "inflora"]),
        (["--suite", "imagenet-r-10", "--methods", ","], ["names no line"]),
        (["--suite", "imagenet-r-10", "--jobs", "0"], ["--jobs", "from 1"]),
        (["cifar100-10/inflora", "--suite", "imagenet-r-10"], ["not both"]),
        (["cifar100-10/inflora", "--methods", "inflora"], ["--methods goes with --suite"]),
        (["cifar100-10/inflora", "--jobs", "2"], ["--jobs goes with --suite"]),
        (["cifar100-10/inflora", "--part", "page"], ["--part goes with --suite"]),
        (["--script", "slurm"], ["--script goes with --suite"]),
    ],
)
def test_a_wrong_request_is_one_sentence(call: Call, given: list[str], parts: list[str]) -> None:
    assert_refused(call("reproduce", *given), *parts)


# -- suites that come with the package ----------------------------------------------------------------------


@pytest.mark.parametrize("name", suites())
def test_a_shipped_suite_is_sound(name: str) -> None:
    suite = read_suite(name)
    assert suite.lines[:2] == ["frozen", "joint"] and "duallora" in suite.lines
    published = [row.split("/")[1] for row in protocols() if row.startswith(f"{name}/")]
    assert set(published) <= set(suite.lines)
    made = {line: suite.protocol(line) for line in suite.lines}
    for line, protocol in made.items():
        assert protocol.method.name in METHODS and protocol.method.config(), line
        assert protocol.stream.stream == made["joint"].stream.stream
        assert protocol.seeds
    bases = {made[line].backbone for line in ("frozen", "joint", "duallora")}
    assert len(bases) == 1  # else there would be no room to measure
    assert suite.images is not None
    tasks = made["duallora"].stream.tasks
    assert tasks is None or tasks == suite.images[2]


def test_a_method_without_a_protocol_has_the_values_of_its_paper() -> None:
    suite = read_suite("imagenet-r-20")
    made = suite.protocol("ranpac")
    assert made.method.fields["first_session"] is True and not made.expected
    assert made.stream.tasks == 20 and made.backbone.backbone.endswith("augreg_in21k")
    assert suite.protocol("duallora-heads").method.name == "duallora"
    assert suite.protocol("inflora").expected["final_accuracy"] == 0.6989


def test_a_script_says_what_its_estimate_leaves_out(call: Call) -> None:
    made = call("reproduce", "--suite", "imagenet-r-10", "--methods", "duallora,tuna", "--script", "slurm")
    assert "# Counted as plain LoRA, for want of figures: tuna.\n" in made.out
    assert "passes for an image grow with the tasks: tuna.\n" in made.out
    assert "#   duallora   3 x " in made.out and "#   tuna       1 x " in made.out


def test_the_list_has_every_suite(call: Call) -> None:
    listed = call("reproduce", "--suite", "list")
    assert listed.code == 0 and all(name in listed.out for name in suites())


@pytest.mark.slow
def test_a_dry_run_tries_every_line(call: Call, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duallora.backbones.backbone.load_backbone", lambda *_, **__: tiny_backbone())
    shutil.rmtree(finished / "out")
    done = call(*words(finished, "--dry-run", "--methods", "lora,ncm"))
    assert done.code == 0, done.err
    assert [line.split(":")[0] for line in done.out.splitlines()] == ["lora", "ncm"]
    assert done.out.count("sound; 2 tasks") == 2 and not (finished / "out").exists()


# -- scripts ------------------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.slow
def test_a_slurm_array_has_every_run_and_says_its_time(call: Call, finished: Path) -> None:
    made = call(*words(finished, "--script", "slurm"))
    assert made.code == 0 and made.err == ""
    text = made.out
    assert "#SBATCH --array=0-6\n" in text and "ESTIMATE" in text and "assumed and not measured" in text
    assert re.search(r"#SBATCH --time=01:00:00\n", text)  # minutes, by estimate
    told = finished / "script.sh"
    # What the shell makes of element 5, with the program replaced by one that shows its words.
    told.write_text(text.replace("\nduallora ", "\nprintf '%s\\n' "))
    found = set()
    for element in range(7):
        words_of = subprocess.run(
            ["bash", str(told)],
            env={"SLURM_ARRAY_TASK_ID": str(element), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        assert words_of[:3] == ["reproduce", "--suite", str(finished / "small.yaml")]
        assert words_of[words_of.index("--part") + 1] == "runs" and "--script" not in words_of
        found.add((words_of[words_of.index("--methods") + 1], words_of[words_of.index("--seeds") + 1]))
    assert found == {
        *((line, seed) for line in ("frozen", "joint", "ncm") for seed in ("1", "2")),
        ("lora", "0"),
    }
    (inner,) = shlex.split(re.findall(r"--wrap (.*)", text)[0])
    assert "--part page" in inner and inner.startswith("duallora reproduce --suite")


@pytest.mark.slow
def test_the_script_of_one_gpu_runs_the_suite(call: Call, started: Started, finished: Path) -> None:
    made = call(*words(finished, "--script", "one-gpu", "--seeds", "1", "--logger", "csv"))
    *_, strict, command = made.out.splitlines()
    assert strict == "set -euo pipefail"
    program, verb, *given = shlex.split(command)
    assert (program, verb) == ("duallora", "reproduce")
    expected = words(finished, "--seeds", "1", "--logger", "csv")[1:]
    parsed = [parse("reproduce", reproduce, each) for each in (given, expected)]
    assert parsed[0] == parsed[1]
    assert "4 x" not in made.out and made.out.count(" 1 x ") == 4

"""``duallora reproduce``: a published protocol, and what was published beside what is measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from duallora.commands import console
from duallora.commands.compare import command_line
from duallora.commands.number_ranges import require_range, seed_numbers
from duallora.commands.published_protocols import Protocol, protocols, read_protocol
from duallora.commands.run import run_on
from duallora.commands.suite_runs import SuiteRuns
from duallora.commands.suite_script import one_gpu_script, plan, slurm_script
from duallora.commands.suites import Suite, placed, read_suite, suites
from duallora.errors import DualLoRAError
from duallora.runtime.compute import Compute
from duallora.runtime.loggers import Logging
from duallora.storage.regular import read_regular
from duallora.teaching.method_choice import MethodChoice

if TYPE_CHECKING:
    from duallora.runtime.compute import Machine

_DRY_IMAGES, _DRY_TASKS, _DRY_SIZE, _DRY_FEATURES = 2, 2, 32, 64


def reproduce(
    name: str | None = None,
    *,
    suite: str | None = None,
    methods: str | None = None,
    out: Path | None = None,
    data: Path | None = None,
    split_lists: Path | None = None,
    seeds: int | str | None = None,
    backbone_file: Path | None = None,
    jobs: int = 1,
    part: Literal["all", "runs", "page"] = "all",
    script: Literal["slurm", "one-gpu"] | None = None,
    bench: Path | None = None,
    dry_run: bool = False,
    compute: Compute = Compute(),
    log: Logging = Logging(),
) -> None:
    """Run a published protocol, or a suite of them, and print what was published beside what is measured.

    Every run is a folder of duallora run under OUT; an interrupted one is resumed by the same command. Only
    the machine is left to choose. A suite ends with the page of duallora compare and a verdict on every line.

    Args:
        name: of the protocol, such as cifar100-10/inflora; without one, all are listed
        suite: a stream with many methods instead, such as imagenet-r-10, or a YAML file of one's own; list
            shows all
        methods: lines of the suite, separated by commas; where it is not given, all
        out: folder for the runs; where it is not given, runs/NAME
        data: folder that holds the data sets that duallora streams names; where it is not given, ./data
        split_lists: folder with the two lists of the public split of imagenet-r
        seeds: only these, numbers separated by commas
        backbone_file: local .safetensors file with the backbone's weights; for a suite also a folder of them
        jobs: runs of a suite at a time; each takes a GPU of its own where there are several
        part: runs makes the missing runs of a suite and no page, page makes the page of those that are there
        script: print a shell script for the suite instead, a Slurm array or one for a single GPU, with the
            time that it needs by estimate
        bench: folder of duallora bench on the machine that the script is for; where it is not given, the
            estimate is from operations counted by it
        dry_run: check the data, the options and the method on a few images, small inputs and random weights,
            and write nothing
        compute: where and how to compute
        log: where figures go while a run trains; of --log-dir, each run gets a folder of its own
    """
    given = locals()
    log.check()  # before anything takes long
    if suite is not None:
        if name is not None:
            raise DualLoRAError("name a protocol or a --suite, not both.")
        if suite == "list":
            _list_suites()
            return
        require_range("--jobs", jobs, 1, 1024)
        _suite(read_suite(suite), given)
        return
    _refuse_suite_options(methods=methods, script=script, bench=bench, jobs=jobs != 1, part=part != "all")
    if name is None or name == "list":
        _list()
        return
    protocol = placed(read_protocol(name), data, split_lists, backbone_file)
    if dry_run:
        console.line(f"{name}: {_try(protocol)}")
        return
    _reproduce(protocol, out, seeds, compute, log)


def _suite(suite: Suite, given: Mapping[str, Any]) -> None:
    """A suite, with the arguments of `reproduce`."""
    methods, asked = given["methods"], given["seeds"]
    named = suite.lines if methods is None else [m.strip() for m in methods.split(",") if m.strip()]
    if not named:
        raise DualLoRAError("--methods names no line of the suite; leave it out to take all.")
    lines = {line: suite.protocol(line) for line in named}
    seeds = None if asked is None else seed_numbers(asked)
    out = given["out"] or Path("runs") / suite.name
    if given["script"] is not None:
        _print_script(suite, lines, seeds, dict(given) | {"out": out})
        return
    places = (given["data"], given["split_lists"], given["backbone_file"])
    lines = {line: placed(protocol, *places) for line, protocol in lines.items()}
    if given["dry_run"]:
        for line, protocol in lines.items():
            console.line(f"{line}: {_try(protocol)}")
        return
    runs = SuiteRuns(suite.name, lines, out, seeds, given["compute"], given["log"])
    runs.run(given["jobs"], given["part"], command_line("reproduce", reproduce, given))


def _print_script(
    suite: Suite, lines: Mapping[str, Protocol], seeds: Sequence[int] | None, given: Mapping[str, Any]
) -> None:
    def command(**changes: Any) -> str:
        return command_line("reproduce", reproduce, {**given, **changes})

    made = plan(suite, lines, seeds, given["bench"])
    plain = {"script": None, "bench": None}
    if given["script"] == "one-gpu":
        console.line(one_gpu_script(made, command(), command(**plain)))
        return
    one = command(**plain, part="runs", methods=None, seeds=None)
    console.line(slurm_script(made, command(), one, command(**plain, part="page")))


def _reproduce(
    protocol: Protocol, out: Path | None, seeds: int | str | None, compute: Compute, log: Logging
) -> None:
    """One protocol, in this process."""
    from duallora.runtime import parallel

    chosen = protocol.seeds if seeds is None else seed_numbers(seeds)
    machine = compute.start()
    place = Path("runs") / protocol.name.replace("/", "-") if out is None else out
    found = [_result(machine, protocol, place / f"seed-{seed}", seed, log) for seed in chosen]
    if parallel.rank() == 0:
        _show(protocol, found)
    parallel.leave()


def _refuse_suite_options(**given: Any) -> None:
    """Options that mean nothing without a suite."""
    for option, value in given.items():
        if value:
            raise DualLoRAError(f"--{option} goes with --suite; name one, or leave --{option} out.")


def _list_suites() -> None:
    cells = []
    for name in suites():
        suite = read_suite(name)
        known = [line for line in suite.lines if suite.protocol(line).expected]
        cells.append([name, ", ".join(suite.lines), ", ".join(known) or "-"])
    console.rows(["suite", "lines", "with a published figure"], cells)


def _list() -> None:
    cells = []
    for name in protocols():
        protocol = read_protocol(name)
        expected = protocol.expected
        final = f"{100 * expected['final_accuracy']:.2f}" if expected else "-"
        source = str(expected["source"]) if expected else "no figure is known"
        cells.append([name, protocol.backbone.backbone, str(len(protocol.seeds)), final, source])
    console.rows(["protocol", "backbone", "seeds", "published", "source"], cells)


def _result(machine: Machine, protocol: Protocol, folder: Path, seed: int, log: Logging) -> dict[str, Any]:
    """The results of one run, which is made or taken up unless it is finished."""
    from duallora.runs.run_directory import require_unfinished

    path = folder / "results.json"
    if path.exists():
        known: dict[str, Any] = json.loads(read_regular(path))
        asked = {"name": protocol.method.name, **dataclasses.asdict(protocol.method.config())}
        if known["config"]["seed"] != seed or known["config"]["method"] != asked:
            raise DualLoRAError(f"{folder} is another run; name another --out, or move it away.")
        return known
    require_unfinished(folder)
    about = (protocol.ordered(seed), protocol.method, protocol.backbone, seed)
    return run_on(machine, folder, *about, log=log.of(folder.name))


def _show(protocol: Protocol, found: list[dict[str, Any]]) -> None:
    """A table of the published figures and the measured ones, in percent, under the method's own readout."""
    from duallora.runs.verdicts import FIGURES, judge, shown

    cells = []
    for verdict in judge(protocol.name, found, protocol.expected):
        published = "-" if verdict.published is None else f"{100 * verdict.published:.2f}"
        cells.append([FIGURES[verdict.figure], published, shown(verdict.measured), verdict.words])
    console.rows([f"{protocol.name}, {len(found)} seeds", "published", "measured", ""], cells)
    if protocol.expected:
        console.line(f"published: {protocol.expected['source']}")


def _try(protocol: Protocol) -> str:
    """Learns two tasks of a few images on small inputs at random weights; says what was found."""
    from duallora.backbones.backbone import load_backbone
    from duallora.learner import ContinualLearner
    from duallora.streams import load

    asked = protocol.ordered(protocol.seeds[0])
    stream = load(asked.stream, data=asked.data, split_lists=asked.split_lists, **asked.asked())
    changed = protocol.backbone.changed() | {"image_size": _DRY_SIZE}
    backbone = load_backbone(protocol.backbone.backbone, pretrained=False, **changed)
    fields = dict(protocol.method.fields) | {"epochs": 1, "min_steps": 0}
    if "first_adapted_layer" in fields or protocol.method.name == "duallora":
        fields["first_adapted_layer"] = backbone.depth - 1  # one layer says as much as all
    if "random_features" in fields:
        fields["random_features"] = _DRY_FEATURES  # their product is decomposed
    config = MethodChoice(protocol.method.name, fields).config()
    augment = protocol.backbone.augment or stream.augmentation
    learner = ContinualLearner(backbone, config, protocol.seeds[0], device="cpu", augment=augment)
    for task in list(stream)[:_DRY_TASKS]:
        targets = task.train.targets
        kept = [i for c in range(2) for i in [i for i, t in enumerate(targets) if t == c][:_DRY_IMAGES]]
        few = task.train.subset(kept)
        few.classes = few.classes[: max(few.targets) + 1]
        learner.learn(few, name=task.name)
        learner.predict([task.test[0][0]])
    train, test = (sum(len(getattr(task, part)) for task in stream) for part in ("train", "test"))
    return (
        f"sound; {len(stream)} tasks, {len(stream.class_order)} classes, {train} training and {test} test "
        f"images, {len(protocol.seeds)} seeds"
    )

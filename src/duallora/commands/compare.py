"""``duallora compare``: many methods under one protocol, and one page about them."""

from __future__ import annotations

import dataclasses
import glob
import inspect
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duallora.commands import console
from duallora.commands.compare_protocol import image_counts, protocol
from duallora.commands.compared_methods import Line, read_lines
from duallora.commands.comparison_output import write_comparison
from duallora.commands.number_ranges import require_range, seed_numbers
from duallora.commands.options import BackboneOptions, StreamOptions
from duallora.commands.run_setting import Setting, load_setting
from duallora.commands.subprocess_jobs import Job, gpu_for_each, run_jobs
from duallora.errors import DualLoRAError
from duallora.runtime.compute import Compute
from duallora.runtime.loggers import Logging
from duallora.storage.regular import read_regular
from duallora.teaching.method_choice import MethodChoice

if TYPE_CHECKING:
    from duallora.runs.comparison import Entry, Results


def compare(
    *,
    out: Path,
    methods: str,
    seeds: int | str = 0,
    same_budget: bool = False,
    jobs: int = 1,
    reference: str | None = None,
    stream: StreamOptions = StreamOptions(),
    method: MethodChoice | None = None,
    backbone: BackboneOptions = BackboneOptions(),
    compute: Compute = Compute(),
    log: Logging = Logging(),
) -> None:
    """Run several methods on one stream and write one page about them.

    Every run is a folder of duallora run under OUT/runs, so that an interrupted comparison is resumed by the
    same command, and runs from elsewhere can be copied in: a folder whose results.json has the same
    configuration counts as done. What OUT/runs already holds of the methods asked for, of any seed, is on the
    page.

    Args:
        out: folder for compare.csv, compare.json, compare.md, compare.html, compare.png, configs/ and runs/
        methods: names of duallora methods, or paths of YAML files with a method block, separated by commas
        seeds: numbers separated by commas
        same_budget: every method at its defaults, which have the same epochs, batch size, learning rates,
            rank and layers; without it each has the values of its paper (configs/methods/NAME.yaml), and
            those without such a file (duallora, lora, linear, frozen, joint) their defaults beside them
        jobs: number of runs at a time; they share the processor's threads, or take a GPU each
        reference: the line that the others are compared with image by image; where it is not given, duallora,
            else the best one
        stream: what is learned
        method: fields for every method that has them
        backbone: what the methods stand on
        compute: where and how to compute
        log: where figures go while a run trains; of --log-dir, each run gets a folder of its own
    """
    command = command_line("compare", compare, locals())
    if out.exists() and not out.is_dir():
        raise DualLoRAError(f"{out} is a file; name a folder for the comparison.")
    require_range("--jobs", jobs, 1, 1024)
    numbers = seed_numbers(seeds)
    if method is not None and method.name is not None:
        raise DualLoRAError("compare takes its methods from --methods; leave --method out.")
    names = [name.strip() for name in methods.split(",") if name.strip()]
    lines = read_lines(names, {} if method is None else method.fields, same_budget)
    if reference is not None and reference not in (line.name for line in lines):
        raise DualLoRAError(f"--reference {reference} is no line of --methods; name one that is there.")
    device, _, devices, _ = compute.check()  # before large weights are read
    log.check()
    setting = load_setting(stream, backbone)
    options = elsewhere(stream, backbone, compute)
    for line in lines:  # a foreign run of any seed is refused now, not when all others have been run
        _entry(line, setting, out)
    _write_configs(lines, setting, out)
    missing = _missing(lines, numbers, setting, out, options, log)
    if missing:
        features = _keep_features(setting, out, compute.device)
        missing = [Job(j.name, (*j.words, "--features", str(features)), j.log) for j in missing]
    own = gpu_for_each(device, devices, jobs)
    failed = run_jobs(missing, jobs, lambda text: console.line(text, stderr=True), own)
    entries = [entry for line in lines if (entry := _entry(line, setting, out)) is not None]
    entries.sort(key=_final, reverse=True)
    if entries:
        from duallora.runs.comparison_tables import Comparison
        from duallora.runs.room import default_reference, find_evidence

        there = reference is not None and reference in [entry.name for entry in entries]
        chosen = str(reference) if there else default_reference(entries)
        _recall_answers(entries, out)
        told = protocol(entries, setting, same_budget)
        write_comparison(Comparison(entries, find_evidence(entries), chosen, told, command), out)
    if failed:
        rest = "the page shows the others" if entries else "there is nothing to show yet"
        raise DualLoRAError(
            f"{len(failed)} of {len(missing)} runs failed ({', '.join(job.name for job in failed)}); {rest}. "
            f"Put right what their logs in {out / 'logs'} say and repeat the command."
        )


def _folder(out: Path, line: Line, seed: int) -> Path:
    return out / "runs" / f"{line.name}-{seed}"


def _missing(
    lines: Sequence[Line],
    seeds: Sequence[int],
    setting: Setting,
    out: Path,
    options: Sequence[str],
    log: Logging,
) -> list[Job]:
    """The runs that are not finished, all lines of a seed before the next seed."""
    jobs = []
    for seed in seeds:
        for line in lines:
            folder = _folder(out, line, seed)
            if finished_run(folder, line, setting, seed) is not None:
                continue
            config = str(out / "configs" / f"{line.name}.yaml")
            words = ("run", "--config", config, "--seed", str(seed), "--out", str(folder), *options)
            words += tuple(logged(log, folder.name))
            jobs.append(Job(f"{line.name}, seed {seed}", words, out / "logs" / f"{folder.name}.log"))
    return jobs


def _write_configs(lines: Sequence[Line], setting: Setting, out: Path) -> None:
    from duallora.storage.checkpoint import write_atomic

    (out / "configs").mkdir(parents=True, exist_ok=True)
    for line in lines:
        write_atomic(out / "configs" / f"{line.name}.yaml", kept_config(line, setting))


def kept_config(line: Line, setting: Setting) -> bytes:
    """What ``duallora run --config`` takes to repeat a line's runs; JSON is YAML."""
    asked = setting.asked(line.method, line.config, 0)
    asked["domains"] = ",".join(asked["domains"]) or None
    if isinstance(asked["tasks"], list):
        asked["tasks"] = ",".join(map(str, asked["tasks"]))
    kept = {key: asked[key] for key in asked if key not in ("seed", "backbone_file", "backbone_sha256")}
    comment = f"# duallora run --config FILE --stream FOLDER --seed 0 --out DIR: the line {line.name}\n"
    return (comment + json.dumps(kept, indent=2) + "\n").encode()


def finished_run(folder: Path, line: Line, setting: Setting, seed: int) -> Results | None:
    """The results of a finished run.

    Raises:
        DualLoRAError: The folder holds a finished run under another configuration or on other images.
    """
    from duallora.methods import METHODS
    from duallora.methods.config import ADDED_FIELDS
    from duallora.runs.results import SCHEMA_VERSION

    path = folder / "results.json"
    if not path.exists():
        return None
    try:
        results: Results = json.loads(read_regular(path))
        tasks, classes = results["tasks"], results["stream"]["class_order"]
        counts = (sum(task[f"{part}_images"] for task in tasks) for part in ("train", "test"))
        there = {"version": results["version"], **results["config"], **_images(classes, *counts)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DualLoRAError(f"{path} cannot be read; delete {folder} to run it again.") from error
    asked = setting.asked(line.method, line.config, seed)
    shown = _images(setting.stream.class_order, *image_counts(setting.stream))
    wanted = json.loads(json.dumps({"version": SCHEMA_VERSION, **asked, **shown}))
    # A field that the method did not have yet was at the value that it stood for.
    known = asdict(METHODS[line.method].config())
    later = {field: value for field, value in ADDED_FIELDS.items() if field in known}
    there["method"] = later | there["method"]
    if there == wanted:
        return results
    from duallora.runs.run_directory import difference

    raise DualLoRAError(
        f"{folder} is a finished run with other settings ({difference(there, wanted)}); "
        "name another --out, or move that folder away to run it again."
    )


def _images(class_order: Sequence[str], train: int, test: int) -> dict[str, Any]:
    """What tells the images of two streams apart: a configuration does not say which folder was read."""
    return {"class order": list(class_order), "training images": train, "test images": test}


def _entry(line: Line, setting: Setting, out: Path) -> Entry | None:
    """All finished runs of a line, also of seeds that were not asked for now."""
    from duallora.methods import METHODS
    from duallora.runs.comparison import Entry

    found: dict[int, Results] = {}
    for folder in (out / "runs").glob(f"{glob.escape(line.name)}-*"):
        number = folder.name.removeprefix(f"{line.name}-")
        if number.isdecimal():
            results = finished_run(folder, line, setting, int(number))
            if results is not None:
                found[int(number)] = results
    if not found:
        return None
    kind, seeds = METHODS[line.method].method, tuple(sorted(found))
    runs = tuple(found[seed] for seed in seeds)
    return Entry(line.name, line.method, kind.reconstruction, kind.all_at_once, seeds, runs)


def _recall_answers(entries: Sequence[Entry], out: Path) -> None:
    """Answers by image of runs from before ``results.json`` kept them, where their predictions are there."""
    from duallora.runs.answers import from_predictions

    for entry in entries:
        for seed, run in zip(entry.seeds, entry.runs, strict=True):
            if "answers" not in run:
                folder = out / "runs" / f"{entry.name}-{seed}"
                run["answers"] = from_predictions(folder / "predictions.csv", run)


def _keep_features(setting: Setting, out: Path, device: str) -> Path:
    """Computes the frozen features of all un-augmented images once, in the batches of an evaluation."""
    from duallora.backbones.frozen_features import FrozenFeatures
    from duallora.data.loader import ImageLoader
    from duallora.data.transforms import evaluation_transform
    from duallora.runtime.compute import Machine
    from duallora.runtime.progress import Progress
    from duallora.training import evaluated

    backbone = setting.backbone
    height, width = backbone.info.input_size[1:]
    name = f"features-{backbone.info.sha256[:12]}-{height}x{width}-{backbone.row_dim}.safetensors"
    path = out / name
    if path.exists():
        FrozenFeatures.load(path, backbone)  # one that cannot be read is refused once, not by every run
        return path
    view, machine = evaluation_transform(backbone.info), Machine.of(device)
    backbone.to(machine.device)
    loader = ImageLoader(machine.device, machine.workers, machine.image_bytes)
    parts = [part for task in setting.stream for part in (task.train, task.test)]

    def images() -> Any:
        for part in Progress().track(parts, len(parts), "frozen features"):
            with loader.reading(part, view) as source:
                yield from loader.batches(source, evaluated(range(len(part))), len(part))

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        FrozenFeatures.compute(backbone, images()).save(path)
    finally:
        loader.close()
    return path


def _final(entry: Entry) -> float:
    """Mean final accuracy under the better readout."""
    from duallora.runs.comparison import ACCURACIES, readouts, spread

    values = [spread(entry, ACCURACIES[0], readout) for readout in readouts(entry)]
    return max(value.mean for value in values if value is not None)


def command_line(verb: str, command: Callable[..., None], given: Mapping[str, Any]) -> str:
    """The command line that the arguments of a command came from, defaults left out."""
    words = ["duallora", verb]
    for name, parameter in inspect.signature(command).parameters.items():
        value, option = given[name], "--" + name.replace("_", "-")
        if isinstance(value, MethodChoice):
            for field, item in value.fields.items():
                words += [f"--method.{field}", json.dumps(item) if isinstance(item, bool) else str(item)]
        elif dataclasses.is_dataclass(value):
            words += _words(value, parameter.default, [each.name for each in dataclasses.fields(value)])
        elif value is True:
            words.append(option)
        elif value != parameter.default:
            words += [option, str(value)]
    return shlex.join(words)


def elsewhere(stream: StreamOptions, backbone: BackboneOptions, compute: Compute) -> list[str]:
    """Options of a run that its kept configuration does not hold: where things lie, and how to compute."""
    computing = [each.name for each in dataclasses.fields(compute)]
    return [
        *("--stream", stream.stream),
        *_words(stream, StreamOptions(), ["data", "split_lists"]),
        *_words(backbone, BackboneOptions(), ["backbone_file"]),
        *_words(compute, Compute(), computing),
    ]


def logged(log: Logging, run: str) -> list[str]:
    """Options that log one of several runs, in a folder of its own; ``run`` is its name."""
    return _words(log.of(run), Logging(), ["logger", "log_dir"])


def _words(group: Any, defaults: Any, names: Sequence[str]) -> list[str]:
    """Options of a group that are not at their default."""
    words: list[str] = []
    for name in names:
        value, option = getattr(group, name), "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif value != getattr(defaults, name):
            words += [option, str(value)]
    return words

"""``duallora compare``: many methods under one protocol, and one page about them."""

from __future__ import annotations

import glob
import inspect
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duallora.commands import console
from duallora.commands.choice import MethodChoice
from duallora.commands.jobs import Job, run_jobs
from duallora.commands.lines import Line, read_lines
from duallora.commands.ranges import LARGEST_SEED, require_range
from duallora.commands.setting import Augment, Device, Order, Setting, load_setting
from duallora.errors import DualLoRAError

if TYPE_CHECKING:
    from duallora.comparison import Entry, Results


def compare(
    *,
    out: Path,
    methods: str,
    seeds: int | str = 0,
    same_budget: bool = False,
    jobs: int = 1,
    stream: str = "digits",
    domains: str | None = None,
    tasks: int | None = None,
    order: Order = 1993,
    classes: int | None = None,
    train_per_class: int | None = None,
    holdout: int = 0,
    method: MethodChoice | None = None,
    backbone: str = "embedded",
    backbone_file: Path | None = None,
    augment: Augment | None = None,
    device: Device = "auto",
) -> None:
    """Run several methods on one stream and write one page about them.

    Every run is a folder of duallora run under OUT/runs, so that an interrupted comparison is resumed by the
    same command, and runs from elsewhere can be copied in: a folder whose results.json has the same
    configuration counts as done. What OUT/runs already holds of the methods asked for, of any seed, is on the
    page.

    Args:
        out: folder for compare.csv, compare.md, compare.html, compare.png, configs/ and runs/
        methods: names of duallora methods, or paths of YAML files with a method block, separated by commas
        seeds: numbers separated by commas
        same_budget: every method at its defaults, which have the same epochs, batch size, learning rates,
            rank and layers; without it each has the values of its paper (configs/methods/NAME.yaml)
        jobs: number of runs at a time; they share the processor's threads
        stream: digits, or a folder of images with train/ and val/
        domains: show the same images in several domains, one task each, separated by commas
        tasks: number of tasks; where it is not given, 5 for digits and 10 for a folder
        order: seed of the class order (1993 is the usual one of benchmarks), or alphabetical
        classes: take the first so many of the sorted class names
        train_per_class: take the first so many training images of each class
        holdout: test on the next so many training images of each class; val/ is not read then
        method: fields for every method that has them
        backbone: embedded, or a timm ViT by its full tag
        backbone_file: local .safetensors file with the backbone's weights
        augment: views of the training images; where it is not given, crop for digits and crop,flip otherwise
        device: where to compute
    """
    command = _command(locals())
    if out.exists() and not out.is_dir():
        raise DualLoRAError(f"{out} is a file; name a folder for the comparison.")
    require_range("--jobs", jobs, 1, 1024)
    numbers = _numbers(str(seeds))
    if method is not None and method.name is not None:
        raise DualLoRAError("compare takes its methods from --methods; leave --method out.")
    names = [name.strip() for name in methods.split(",") if name.strip()]
    lines = read_lines(names, {} if method is None else method.fields, same_budget)
    setting = load_setting(
        stream,
        domains,
        tasks,
        order,
        classes,
        train_per_class,
        holdout,
        backbone,
        backbone_file,
        augment,
        device,
    )
    options = ["--stream", stream, "--device", device]
    if backbone_file is not None:
        options += ["--backbone-file", str(backbone_file)]
    for line in lines:  # a foreign run of any seed is refused now, not when all others have been run
        _entry(line, setting, out)
    _write_configs(lines, setting, out)
    missing = _missing(lines, numbers, setting, out, options)
    if missing:
        features = _keep_features(setting, out, device)
        missing = [Job(j.name, (*j.words, "--features", str(features)), j.log) for j in missing]
    failed = run_jobs(missing, jobs, lambda text: console.line(text, stderr=True))
    entries = [entry for line in lines if (entry := _entry(line, setting, out)) is not None]
    entries.sort(key=_final, reverse=True)
    if entries:
        _write(entries, _protocol(entries, setting, same_budget), command, out)
    if failed:
        rest = "the page shows the others" if entries else "there is nothing to show yet"
        raise DualLoRAError(
            f"{len(failed)} of {len(missing)} runs failed ({', '.join(job.name for job in failed)}); {rest}. "
            f"Put right what their logs in {out / 'logs'} say and repeat the command."
        )


def _numbers(text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise DualLoRAError(f"--seeds must be numbers separated by commas, not {text!r}.") from error
    for number in numbers:
        require_range("--seeds", number, 0, LARGEST_SEED)
    return numbers


def _folder(out: Path, line: Line, seed: int) -> Path:
    return out / "runs" / f"{line.name}-{seed}"


def _missing(
    lines: Sequence[Line], seeds: Sequence[int], setting: Setting, out: Path, options: Sequence[str]
) -> list[Job]:
    """The runs that are not finished, all lines of a seed before the next seed."""
    jobs = []
    for seed in seeds:
        for line in lines:
            folder = _folder(out, line, seed)
            if _finished(folder, line, setting, seed) is not None:
                continue
            config = str(out / "configs" / f"{line.name}.yaml")
            words = ("run", "--config", config, "--seed", str(seed), "--out", str(folder), *options)
            jobs.append(Job(f"{line.name}, seed {seed}", words, out / "logs" / f"{folder.name}.log"))
    return jobs


def _write_configs(lines: Sequence[Line], setting: Setting, out: Path) -> None:
    """Writes for each line what ``duallora run --config`` takes to repeat its runs; JSON is YAML."""
    from duallora.checkpoint import write_atomic

    (out / "configs").mkdir(parents=True, exist_ok=True)
    for line in lines:
        write_atomic(out / "configs" / f"{line.name}.yaml", _yaml(line, setting))


def _yaml(line: Line, setting: Setting) -> bytes:
    asked = setting.asked(line.method, line.config, 0)
    asked["domains"] = ",".join(asked["domains"]) or None
    kept = {key: asked[key] for key in asked if key not in ("seed", "backbone_file", "backbone_sha256")}
    comment = f"# duallora run --config FILE --stream FOLDER --seed 0 --out DIR: the line {line.name}\n"
    return (comment + json.dumps(kept, indent=2) + "\n").encode()


def _finished(folder: Path, line: Line, setting: Setting, seed: int) -> Results | None:
    """The results of a finished run.

    Raises:
        DualLoRAError: The folder holds a finished run under another configuration or on other images.
    """
    from duallora.results import SCHEMA_VERSION

    path = folder / "results.json"
    if not path.exists():
        return None
    try:
        results: Results = json.loads(path.read_bytes())
        tasks, classes = results["tasks"], results["stream"]["class_order"]
        counts = (sum(task[f"{part}_images"] for task in tasks) for part in ("train", "test"))
        there = {"version": results["version"], **results["config"], **_images(classes, *counts)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DualLoRAError(f"{path} cannot be read; delete {folder} to run it again.") from error
    asked = setting.asked(line.method, line.config, seed)
    shown = _images(setting.stream.class_order, *_image_counts(setting))
    wanted = json.loads(json.dumps({"version": SCHEMA_VERSION, **asked, **shown}))
    if there == wanted:
        return results
    from duallora.run_directory import difference

    raise DualLoRAError(
        f"{folder} is a finished run with other settings ({difference(there, wanted)}); "
        "name another --out, or move that folder away to run it again."
    )


def _images(class_order: Sequence[str], train: int, test: int) -> dict[str, Any]:
    """What tells the images of two streams apart: a configuration does not say which folder was read."""
    return {"class order": list(class_order), "training images": train, "test images": test}


def _image_counts(setting: Setting) -> tuple[int, int]:
    """Training and test images of all tasks."""
    return sum(len(task.train) for task in setting.stream), sum(len(task.test) for task in setting.stream)


def _entry(line: Line, setting: Setting, out: Path) -> Entry | None:
    """All finished runs of a line, also of seeds that were not asked for now."""
    from duallora.comparison import Entry
    from duallora.methods import METHODS

    found: dict[int, Results] = {}
    for folder in (out / "runs").glob(f"{glob.escape(line.name)}-*"):
        number = folder.name.removeprefix(f"{line.name}-")
        if number.isdecimal():
            results = _finished(folder, line, setting, int(number))
            if results is not None:
                found[int(number)] = results
    if not found:
        return None
    kind, seeds = METHODS[line.method].method, tuple(sorted(found))
    runs = tuple(found[seed] for seed in seeds)
    return Entry(line.name, line.method, kind.reconstruction, kind.all_at_once, seeds, runs)


def _keep_features(setting: Setting, out: Path, device: str) -> Path:
    """Computes the frozen features of all un-augmented images once, in the batches of an evaluation."""
    from duallora.features import FrozenFeatures
    from duallora.progress import Progress
    from duallora.train import EVALUATION_BATCH, batches, make_fabric
    from duallora.transforms import evaluation_transform

    backbone = setting.backbone
    path = out / f"features-{backbone.info.sha256[:12]}-{backbone.row_dim}.safetensors"
    if path.exists():
        FrozenFeatures.load(path, backbone)  # one that cannot be read is refused once, not by every run
        return path
    view, place = evaluation_transform(backbone.info), make_fabric(device).device
    backbone.to(place)
    parts = [part for task in setting.stream for part in (task.train, task.test)]

    def images() -> Any:
        for part in Progress().track(parts, len(parts), "frozen features"):
            for batch in batches(part, lambda image, _: view(image), EVALUATION_BATCH, place):
                yield batch.images

    path.parent.mkdir(parents=True, exist_ok=True)
    FrozenFeatures.compute(backbone, images()).save(path)
    return path


def _write(entries: list[Entry], protocol: list[str], command: str, out: Path) -> None:
    from duallora import comparison, comparison_page
    from duallora.checkpoint import write_atomic

    plot = comparison_page.plot(entries)
    if plot is not None:
        write_atomic(out / "compare.png", plot)
    write_atomic(out / "compare.csv", comparison.to_csv(entries))
    text = comparison_page.markdown(entries, protocol, command, plot=plot is not None)
    write_atomic(out / "compare.md", text.encode())
    write_atomic(out / "compare.html", comparison_page.page(entries, protocol, command, plot).encode())
    first = comparison_page.tables(entries)[0]
    console.rows(first.header, first.cells)
    console.line(f"page: {out / 'compare.html'}")


def _final(entry: Entry) -> float:
    """Mean final accuracy under the better readout."""
    from duallora.comparison import ACCURACIES, readouts, spread

    values = [spread(entry, ACCURACIES[0], readout) for readout in readouts(entry)]
    return max(value.mean for value in values if value is not None)


def _protocol(entries: Sequence[Entry], setting: Setting, same_budget: bool) -> list[str]:
    stream, info = setting.stream, setting.backbone.info
    counts = _image_counts(setting)
    trained = sorted({_trained(entry) for entry in entries})
    budget = trained[0] if len(trained) == 1 else "; ".join(f"{e.name}: {_trained(e)}" for e in entries)
    rates = {str(e.runs[0]["config"]["method"].get("learning_rate")) for e in entries} - {"None"}
    if same_budget and len(trained) == 1 and len(rates) == 1:
        budget = f"one budget for all: {budget}, what is adapted at {rates.pop()}"
    machines = [run["environment"] for entry in entries for run in entry.runs]
    where = {f"{m['device']}, {m['threads']} threads, torch {m['packages']['torch']}" for m in machines}
    return [
        f"stream {stream.name}: {len(stream)} tasks, {len(stream.class_order)} classes, order "
        f"{stream.order_seed}; {counts[0]} training and {counts[1]} test images",
        f"backbone {info.name} (sha256 {info.sha256[:12]}), input {'x'.join(map(str, info.input_size))}, "
        f"mean {info.mean}, std {info.std}",
        f"views of the training images: {setting.augment}; Adam, cosine to zero; {budget}",
        "no task labels at test time; every test image seen so far after every task; accuracy is over images",
        f"run on: {'; '.join(sorted(where))}",
    ]


def _trained(entry: Entry) -> str:
    fields = entry.runs[0]["config"]["method"]
    rate = fields["head_learning_rate"]
    return f"{fields['epochs']} epochs, batches of {fields['batch_size']}, heads at {rate}"


def _command(given: Mapping[str, Any]) -> str:
    """The command line that these arguments came from, defaults left out."""
    words = ["duallora", "compare"]
    for name, parameter in inspect.signature(compare).parameters.items():
        value, option = given[name], "--" + name.replace("_", "-")
        if isinstance(value, MethodChoice):
            for field, item in value.fields.items():
                words += [f"--method.{field}", json.dumps(item) if isinstance(item, bool) else str(item)]
        elif value is True:
            words.append(option)
        elif value != parameter.default:
            words += [option, str(value)]
    return shlex.join(words)

"""``duallora reproduce``: a published protocol, and what was published beside what is measured."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duallora.commands import console
from duallora.commands.configs import read_config
from duallora.commands.number_ranges import seed_numbers
from duallora.commands.options import BackboneOptions, StreamOptions
from duallora.commands.parse_errors import nearest
from duallora.commands.run import run_on
from duallora.errors import DualLoRAError
from duallora.runtime.compute import Compute
from duallora.storage.regular import read_regular
from duallora.teaching.method_choice import MethodChoice

if TYPE_CHECKING:
    from duallora.runtime.compute import Machine

FIGURES = {
    "final_accuracy": "final accuracy",
    "average_incremental_accuracy": "average incremental accuracy",
}
_DRY_IMAGES, _DRY_TASKS, _DRY_SIZE, _DRY_FEATURES = 2, 2, 32, 64


@dataclass(frozen=True)
class Protocol:
    """One row of a published table, as ``configs/paper/TABLE/ROW.yaml`` says it.

    Attributes:
        name: ``TABLE/ROW``.
        stream: The data set, its tasks and their order; the order 0 stands for each run's seed.
        by_seed: Whether the class order is that of each run's seed; where the stream's own is alphabetical,
            seed 0 keeps it, as in CODA-Prompt's code.
        backbone: The backbone, its preprocessing and the training views.
        method: The method and its fields.
        seeds: Of the runs that were averaged.
        expected: Published figures (shares), with ``tolerance`` and ``source``; empty where none is known.
    """

    name: str
    stream: StreamOptions
    by_seed: bool
    backbone: BackboneOptions
    method: MethodChoice
    seeds: tuple[int, ...]
    expected: Mapping[str, Any]

    def ordered(self, seed: int) -> StreamOptions:
        """The stream of one run."""
        kept = not self.by_seed or (seed == 0 and self.stream.order == "alphabetical")
        return self.stream if kept else dataclasses.replace(self.stream, order=seed)


def reproduce(
    name: str = "list",
    *,
    out: Path | None = None,
    data: Path | None = None,
    split_lists: Path | None = None,
    seeds: int | str | None = None,
    backbone_file: Path | None = None,
    dry_run: bool = False,
    compute: Compute = Compute(),
) -> None:
    """Run a published protocol and print what was published beside what is measured.

    Every run is a folder of duallora run under OUT; an interrupted one is resumed by the same command. Only
    the machine is left to choose.

    Args:
        name: of the protocol, such as cifar100-10/inflora; list shows all
        out: folder for the runs; where it is not given, runs/NAME
        data: folder that holds the data sets that duallora streams names; where it is not given, ./data
        split_lists: folder with the two lists of the public split of imagenet-r
        seeds: only these, numbers separated by commas
        backbone_file: local .safetensors file with the backbone's weights
        dry_run: check the data, the options and the method on a few images, small inputs and random weights,
            and write nothing
        compute: where and how to compute
    """
    if name == "list":
        _list()
        return
    protocol = read_protocol(name)
    stream = dataclasses.replace(protocol.stream, data=data, split_lists=split_lists)
    backbone = dataclasses.replace(protocol.backbone, backbone_file=backbone_file)
    protocol = dataclasses.replace(protocol, stream=stream, backbone=backbone)
    if dry_run:
        console.line(f"{name}: {_try(protocol)}")
        return
    from duallora.runtime import parallel

    chosen = protocol.seeds if seeds is None else seed_numbers(seeds)
    machine = compute.start()
    place = Path("runs") / name.replace("/", "-") if out is None else out
    found = [_result(machine, protocol, place / f"seed-{seed}", seed) for seed in chosen]
    if parallel.rank() == 0:
        _show(protocol, found)
    parallel.leave()


def protocols() -> list[str]:
    """Names of the protocols that come with the package."""
    folder = resources.files("duallora") / "configs" / "paper"
    return sorted(
        f"{table.name}/{row.name.removesuffix('.yaml')}"
        for table in folder.iterdir()
        for row in table.iterdir()
        if row.name.endswith(".yaml")
    )


def read_protocol(name: str) -> Protocol:
    """Reads a protocol by its name.

    Raises:
        DualLoRAError: There is none of that name, or it says something that cannot be meant.
    """
    if name not in protocols():
        raise DualLoRAError(f"there is no protocol {name}{nearest(name, protocols())}")
    with resources.as_file(resources.files("duallora") / "configs" / "paper" / f"{name}.yaml") as path:
        given = read_config(str(path))
    seeds, expected = tuple(given.pop("seeds")), given.pop("expected", {})
    rule = given.get("order")
    by_seed = rule in ("seed", "trial")
    if by_seed:
        given["order"] = "alphabetical" if rule == "trial" else 0
    method = dict(given.pop("method"))
    groups = []
    for kind in (StreamOptions, BackboneOptions):
        own = {field.name for field in dataclasses.fields(kind)} & given.keys()
        groups.append(kind(**{key: given.pop(key) for key in own}))
    unknown = [*given, *(set(expected) - set(FIGURES) - {"tolerance", "source"})]
    if unknown or (expected and not {"final_accuracy", "tolerance", "source"} <= expected.keys()):
        raise DualLoRAError(f"the protocol {name} is not sound ({', '.join(unknown) or 'expected'}).")
    stream, backbone = groups
    return Protocol(
        name,
        stream,  # type: ignore[arg-type]
        by_seed,
        backbone,  # type: ignore[arg-type]
        MethodChoice(method.pop("name"), method),
        seeds,
        expected,
    )


def _list() -> None:
    cells = []
    for name in protocols():
        protocol = read_protocol(name)
        expected = protocol.expected
        final = f"{100 * expected['final_accuracy']:.2f}" if expected else "-"
        source = str(expected["source"]) if expected else "no figure is known"
        cells.append([name, protocol.backbone.backbone, str(len(protocol.seeds)), final, source])
    console.rows(["protocol", "backbone", "seeds", "published", "source"], cells)


def _result(machine: Machine, protocol: Protocol, folder: Path, seed: int) -> dict[str, Any]:
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
    return run_on(machine, folder, protocol.ordered(seed), protocol.method, protocol.backbone, seed)


def _show(protocol: Protocol, found: list[dict[str, Any]]) -> None:
    """A table of the published figures and the measured ones, in percent, under the method's own readout."""
    cells = []
    for key, title in FIGURES.items():
        measured = [100 * run[key] for run in found]
        spread = f" ± {statistics.stdev(measured):.2f}" if len(measured) > 1 else ""
        mean, published = statistics.mean(measured), protocol.expected.get(key)
        verdict = "nothing to compare with"
        if published is not None:
            far, allowed = abs(mean - 100 * published), 100 * protocol.expected["tolerance"]
            verdict = f"{'within' if far <= allowed else 'outside'} ± {allowed:.1f}"
        shown = "-" if published is None else f"{100 * published:.2f}"
        cells.append([title, shown, f"{mean:.2f}{spread}", verdict])
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

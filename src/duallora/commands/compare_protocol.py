"""What the runs of a comparison have in common and where they differ, in sentences for its page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from duallora.commands.configs import shipped_configs

if TYPE_CHECKING:
    from duallora.backbones.backbone import Backbone
    from duallora.commands.run_setting import Setting
    from duallora.runs.comparison import Entry, Results
    from duallora.streams import Stream


def protocol(entries: Sequence[Entry], setting: Setting, same_budget: bool) -> list[str]:
    """The protocol of a comparison, one sentence each.

    Args:
        entries: The lines.
        setting: What all of them stand on.
        same_budget: Whether the methods were taken at their defaults.
    """
    stream, info = setting.stream, setting.backbone.info
    train, test = image_counts(stream)
    return [
        f"stream {stream.name}: {len(stream)} tasks, {len(stream.class_order)} classes, order "
        f"{stream.order_seed}; {train} training and {test} test images",
        f"backbone {info.name} (sha256 {info.sha256[:12]}), input {'x'.join(map(str, info.input_size))}, "
        f"mean {info.mean}, std {info.std}",
        f"views of the training images: {setting.augment}",
        *_budget(entries, setting.backbone, same_budget),
        "no task labels at test time; every test image seen so far after every task; accuracy is over images",
        f"run on: {'; '.join(machines(entries))}",
    ]


def image_counts(stream: Stream) -> tuple[int, int]:
    """Training and test images of all tasks."""
    return sum(len(task.train) for task in stream), sum(len(task.test) for task in stream)


def machines(entries: Sequence[Entry]) -> list[str]:
    """What the runs were made on, each kind once."""
    return sorted({_machine(run) for entry in entries for run in entry.runs})


def _machine(run: Results) -> str:
    found = run["environment"]
    precision = f", precision {found['precision']}" if "precision" in found else ""  # not in early results
    return f"{found['device']}, {found['threads']} threads, torch {found['packages']['torch']}{precision}"


def _budget(entries: Sequence[Entry], backbone: Backbone, same_budget: bool) -> list[str]:
    """How long, how fast and how large the lines are trained."""
    idle = [e.name for e in entries if not any(task["trainable_parameters"] for task in e.runs[0]["tasks"])]
    trained = [entry for entry in entries if entry.name not in idle]
    training = grouped(trained, _training)
    adapted = grouped(trained, partial(_adapted, backbone))
    told = [f"nothing is trained: {', '.join(idle)}"] if idle else []
    if trained:
        shared = "one budget for all" if same_budget and len(training) == 1 else "training"
        told = [f"{shared}: {listed(training)}", f"beside the heads: {listed(adapted)}", *told]
    if not same_budget and len(training) > 1:
        told.append(_differences(trained))
    return told


def grouped(entries: Sequence[Entry], tell: Callable[[Entry], str]) -> dict[str, list[str]]:
    """Names of the lines by what is said of them."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        found.setdefault(tell(entry), []).append(entry.name)
    return found


def listed(groups: dict[str, list[str]]) -> str:
    """Groups of `grouped` in words; a single one without its lines."""
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in groups.items())


def _training(entry: Entry) -> str:
    fields = entry.runs[0]["config"]["method"]
    kind = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}[fields.get("optimizer", "adam")]
    fall = {
        "cosine": "cosine to zero",
        "constant": "constant rates",
        "quarter-cosine": "quarter of a cosine",
        "step": "a tenth of the rate in the last fifth",
    }[fields.get("schedule", "cosine")]
    decay = f", weight decay {fields['weight_decay']}" if fields.get("weight_decay") else ""
    least = f", at least {fields['min_steps']} steps" if fields.get("min_steps") else ""
    passes = f"{fields['epochs']} epochs{least}, batches of {fields['batch_size']}"
    return f"{passes}, {kind}, {fall}{decay}, heads at {fields['head_learning_rate']}"


def _adapted(backbone: Backbone, entry: Entry) -> str:
    """What a line trains beside its heads; results from before a field was there do not hold it."""
    from duallora.adapters.wrapped_qkv import adapted_layers

    fields = entry.runs[0]["config"]["method"]
    if "backbone_rate" in fields:
        return f"the whole backbone at {fields['head_learning_rate'] * fields['backbone_rate']:g}"
    if "learning_rate" not in fields:
        return "nothing"
    parts = [f"what is adapted at {fields['learning_rate']}"]
    if "rank" in fields:
        both = fields.get("residual", "none") != "none"
        parts.append(f"rank {fields['rank']}" + (f" + {fields['residual_rank']}" if both else ""))
    if "first_adapted_layer" in fields:
        parts.append(f"layers from {adapted_layers(backbone, fields['first_adapted_layer'])[0]} on")
    return ", ".join(parts)


def _differences(entries: Sequence[Entry]) -> str:
    """That the lines cannot be compared at equal cost, and which of them no paper speaks for."""
    shipped = shipped_configs()
    told = "budgets differ (--same-budget gives one to all): each line has the values of its paper or file"
    plain = [e.name for e in entries if e.name == e.method and f"methods/{e.name}" not in shipped]
    told += f"; the defaults of the package: {', '.join(plain)}" * bool(plain)
    bounds = [entry.name for entry in entries if entry.upper_bound]
    return told + f"; {', '.join(bounds)} is no upper bound of lines that are trained longer" * bool(bounds)

"""``duallora run``: the main job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duallora.commands import console
from duallora.commands.number_ranges import LARGEST_SEED, require_range
from duallora.commands.options import BackboneOptions, StreamOptions
from duallora.commands.run_setting import Setting, load_setting
from duallora.runtime.compute import Compute
from duallora.runtime.loggers import Logging
from duallora.teaching.method_choice import DEFAULT_METHOD, UNSAID, MethodChoice

if TYPE_CHECKING:
    from duallora.backbones.frozen_features import FrozenFeatures
    from duallora.learner import ContinualLearner
    from duallora.methods import MethodConfig
    from duallora.runtime.compute import Machine
    from duallora.runtime.progress import Progress


def run(
    *,
    out: Path,
    stream: StreamOptions = StreamOptions(),
    method: MethodChoice = UNSAID,
    backbone: BackboneOptions = BackboneOptions(),
    seed: int = 0,
    evaluate_every: int = 1,
    compute: Compute = Compute(),
    features: Path | None = None,
    log: Logging = Logging(),
) -> None:
    """Learn a stream of tasks one after another and write the results: the main job.

    An unfinished folder is resumed after its last finished task; a finished or foreign one is refused.

    Args:
        out: folder for results.json, report.md, accuracy.png, predictions.csv, log.jsonl and model/
        stream: what is learned
        method: what learns
        backbone: what it stands on
        seed: of initialisation, image order and augmentation
        evaluate_every: evaluate on all seen test images after every so many tasks and after the last; in
            between only on the task's own, so that a long stream does not take time with the square of it
        compute: where and how to compute
        features: file of frozen features of un-augmented images, which compare keeps in its folder; what is
            missing in it is computed
        log: where figures go while it trains
    """
    require_range("--seed", seed, 0, LARGEST_SEED)
    require_range("--evaluate-every", evaluate_every, 1, 2**31)
    method.config()

    from duallora.runs.run_directory import require_unfinished

    require_unfinished(out)
    log.check()

    from duallora.runtime import parallel

    machine = compute.start()  # before large weights are read: what is not there is refused now
    run_on(machine, out, stream, method, backbone, seed, evaluate_every, features, log)
    parallel.leave()


def run_on(
    machine: Machine,
    out: Path,
    stream: StreamOptions,
    method: MethodChoice,
    backbone: BackboneOptions,
    seed: int,
    evaluate_every: int = 1,
    features: Path | None = None,
    log: Logging = Logging(),
) -> dict[str, Any]:
    """One run on a machine that is there; the arguments are those of `run`.

    Returns:
        The contents of ``results.json``.
    """
    from duallora.backbones.frozen_features import FrozenFeatures
    from duallora.methods import METHODS
    from duallora.runs.protocol import run_stream
    from duallora.runs.report import accuracy_table
    from duallora.runtime import parallel
    from duallora.runtime.progress import Progress
    from duallora.streams import all_at_once

    first = parallel.rank() == 0
    config = method.config()
    setting = parallel.first_alone(lambda: load_setting(stream, backbone))  # it may fetch what is not there
    name = method.name or DEFAULT_METHOD
    asked = setting.asked(name, config, seed)  # as it was asked for: compare takes it for the same run
    learned = setting.stream
    if METHODS[name].method.all_at_once:  # one task, with the steps of all
        learned = all_at_once(learned)
        config = replace(config, min_steps=config.min_steps * len(setting.stream))
    known = None if features is None else FrozenFeatures.load(features, setting.backbone)

    asked |= {} if evaluate_every == 1 else {"evaluate_every": evaluate_every}
    with (log if first else Logging()).recording(out / "logs", asked) as figures:
        progress = Progress(quiet=not first, figures=figures)
        results = run_stream(
            lambda: _learner(
                setting, config, seed, machine, progress, known, check=stream.stream != "digits"
            ),
            learned,
            out,
            asked,
            device=machine,
            progress=progress,
            backbone=setting.backbone,
            features=known,
            evaluate_every=evaluate_every,
        )
    if first:
        console.table(accuracy_table(results))
        console.final_feature(setting.backbone)
        console.line(f"report: {out / 'report.md'}")
    return results


def _learner(
    setting: Setting,
    config: MethodConfig,
    seed: int,
    machine: Machine,
    progress: Progress,
    features: FrozenFeatures | None,
    *,
    check: bool,
) -> ContinualLearner:
    """A learner that has learned nothing; with ``check``, every image has been decoded once."""
    from duallora.learner import ContinualLearner

    made = ContinualLearner(
        setting.backbone,
        config,
        seed,
        device=machine,
        augment=setting.augment,
        progress=progress,
        features=features,
    )
    if check:
        _check_images(setting, progress)
    return made


def _check_images(setting: Setting, progress: Progress) -> None:
    """Decodes every image once, so that a bad one is named before the run has begun."""
    from duallora.runtime import parallel

    tasks = setting.stream.tasks
    # All domains show the same images.
    for task in tasks[:1] if setting.options["domains"] else tasks:
        for part in (task.train, task.test):
            own = parallel.share(len(part))
            for index in progress.track(own, len(own), f"checking the images of {task.name}"):
                part[index]

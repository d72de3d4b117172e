"""Shell scripts that run a suite: a Slurm array, or one GPU; with the time that they need, by estimate."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from duallora.bench.run_time import PLAIN, Costs, Work, counted, measured
from duallora.errors import DualLoRAError

if TYPE_CHECKING:
    from duallora.commands.published_protocols import Protocol
    from duallora.commands.suites import Suite

_MARGIN, _LEAST_HOURS = 1.5, 1.0
_CPUS = 8


@dataclass(frozen=True)
class Plan:
    """What a script runs.

    Attributes:
        suite: Its name.
        seeds: Of every line.
        hours: Of one run of every line, by estimate.
        costs: What the estimate is from.
        guessed: Lines whose method counts as plain LoRA.
        growing: Lines with ever more passes for an image, which the estimate leaves out.
        bench: The command that measures on one's own machine.
    """

    suite: str
    seeds: Mapping[str, Sequence[int]]
    hours: Mapping[str, float]
    costs: Costs
    guessed: Sequence[str]
    growing: Sequence[str]
    bench: str

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Lines and seeds, the longest first."""
        lines = sorted(self.seeds, key=lambda line: -self.hours[line])
        return [(line, seed) for line in lines for seed in self.seeds[line]]


def plan(
    suite: Suite, lines: Mapping[str, Protocol], seeds: Sequence[int] | None, bench: Path | None
) -> Plan:
    """What a script for a suite runs, and how long it takes.

    Args:
        suite: The suite.
        lines: How every line is run.
        seeds: Those asked for; None are each line's own.
        bench: Folder of a measurement; None counts operations.

    Raises:
        DualLoRAError: The suite does not say how many images there are, or the measurement cannot be used.
    """
    if suite.images is None:
        raise DualLoRAError(
            f"the suite {suite.name} does not say how many images it has, from which time is estimated: "
            "write 'images: {train: N, test: N, tasks: N}' into its file."
        )
    from duallora.methods import METHODS

    costs = counted() if bench is None else measured(bench)
    hours, guessed, growing = {}, [], []
    for line, protocol in lines.items():
        name = str(protocol.method.name)
        hours[line] = _work(protocol, suite.images).seconds(costs) / 3600
        if name not in costs.known:
            guessed.append(line)
        if METHODS[name].method.more_passes:
            growing.append(line)
    first = next(iter(lines.values())).backbone.backbone
    methods = ",".join(dict.fromkeys([PLAIN, *(str(p.method.name) for p in lines.values())]))
    words = ["duallora", "bench", "--backbone", first, "--methods", methods, "--tasks", "10", "--batch", "64"]
    words += ["--device", "cuda", "--precision", "bf16-mixed", "--out", "bench-here"]
    own = {line: protocol.seeds if seeds is None else seeds for line, protocol in lines.items()}
    return Plan(suite.name, own, hours, costs, guessed, growing, shlex.join(words))


def slurm_script(made: Plan, command: str, one: str, page: str) -> str:
    """A job array of one run an element.

    Args:
        made: What is run.
        command: That made the script.
        one: Runs one line and seed, whose options are added.
        page: Writes the page.
    """
    runs, longest = made.runs, max(made.hours.values())
    hours = max(_LEAST_HOURS, _MARGIN * longest)
    limit = f"{int(hours):02d}:{math.ceil(60 * (hours % 1)) % 60:02d}:00"
    return "\n".join(
        [
            "#!/bin/bash",
            *_about(made, command),
            "# --time is half as much again as the longest run; a run that is cut off goes on where it was.",
            "# Submit it, and the page after it:",
            f"#   job=$(sbatch --parsable {made.suite}.sh)",
            f"#   sbatch --dependency=afterany:$job --wrap {shlex.quote(page)}",
            f"#SBATCH --job-name={made.suite}",
            f"#SBATCH --array=0-{len(runs) - 1}",
            "#SBATCH --gres=gpu:1",
            f"#SBATCH --cpus-per-task={_CPUS}",
            f"#SBATCH --time={limit}",
            "#SBATCH --requeue",
            "#SBATCH --output=slurm-%A-%a.txt",
            "set -euo pipefail",
            f"lines=({' '.join(shlex.quote(line) for line, _ in runs)})",
            f"seeds=({' '.join(str(seed) for _, seed in runs)})",
            f'{one} --methods "${{lines[$SLURM_ARRAY_TASK_ID]}}" --seeds "${{seeds[$SLURM_ARRAY_TASK_ID]}}"',
        ]
    )


def one_gpu_script(made: Plan, command: str, whole: str) -> str:
    """All runs one after another.

    Args:
        made: What is run.
        command: That made the script.
        whole: Runs the suite and writes its page.
    """
    told = _about(made, command)
    return "\n".join(
        ["#!/bin/bash", *told, "# Started again, it goes on where it was.", "set -euo pipefail", whole]
    )


def _work(protocol: Protocol, images: tuple[int, int, int]) -> Work:
    from duallora.methods import METHODS

    (train, test, tasks), config = images, protocol.method.config()
    name, epochs = str(protocol.method.name), float(getattr(config, "epochs", 0))
    if getattr(config, "first_session", False):  # a LoRA, in the first task alone
        name, epochs = PLAIN, epochs / tasks
    at_once = METHODS[str(protocol.method.name)].method.all_at_once
    return Work(name, epochs, train, test, 1 if at_once else tasks)


def _about(made: Plan, command: str) -> list[str]:
    """The estimate as comments."""
    width = max(len(line) for line in made.seeds)
    rows = [
        f"#   {line:<{width}}  {len(seeds):>2} x {made.hours[line]:6.2f} h"
        for line, seeds in sorted(made.seeds.items(), key=lambda item: -made.hours[item[0]])
    ]
    whole = sum(len(seeds) * made.hours[line] for line, seeds in made.seeds.items())
    limits = {
        "Counted as plain LoRA, for want of figures": made.guessed,
        "More than said, because the passes for an image grow with the tasks": made.growing,
    }
    told = (
        f"About {whole:.1f} hours for {len(made.runs)} runs on one device. This is an ESTIMATE, without the "
        f"decoding of images, compilation and waiting. It is from {made.costs.source}."
    )
    return [
        f"# {command}",
        "#",
        *textwrap.wrap(told, 100, initial_indent="# ", subsequent_indent="# "),
        *rows,
        *(f"# {what}: {', '.join(lines)}." for what, lines in limits.items() if lines),
        "# From a measurement of your machine instead, with --bench bench-here after:",
        f"#   {made.bench}",
    ]

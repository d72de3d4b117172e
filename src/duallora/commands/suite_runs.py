"""Runs what is missing of a suite, then writes the page of a comparison with a verdict on every line."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from duallora.commands import console
from duallora.commands.compare import elsewhere, finished_run, kept_config, logged
from duallora.commands.compare_protocol import grouped, listed, machines
from duallora.commands.compared_methods import Line
from duallora.commands.comparison_output import write_comparison
from duallora.commands.run_setting import Setting, Settings
from duallora.commands.subprocess_jobs import Job, gpu_for_each, run_jobs
from duallora.errors import DualLoRAError

if TYPE_CHECKING:
    from duallora.commands.published_protocols import Protocol
    from duallora.runs.comparison import Entry, Results
    from duallora.runtime.compute import Compute
    from duallora.runtime.loggers import Logging

Part = Literal["all", "runs", "page"]


@dataclass(frozen=True)
class SuiteRuns:
    """The runs of a suite in a folder.

    Attributes:
        name: Of the suite.
        protocols: How every line is run, with the places of this machine.
        out: Folder of the runs and the page.
        seeds: Those asked for; None are each line's own.
        compute: Where and how to compute.
        log: Where figures go while a run trains.
    """

    name: str
    protocols: Mapping[str, Protocol]
    out: Path
    seeds: Sequence[int] | None
    compute: Compute
    log: Logging

    def run(self, jobs: int, part: Part, command: str) -> None:
        """Runs what is missing and writes the page.

        Args:
            jobs: Processes at a time.
            part: ``"runs"`` writes no page, ``"page"`` runs nothing.
            command: For the page.

        Raises:
            DualLoRAError: A data set, weights or a device is not there, a folder holds another run, a run
                failed, or there is nothing to show.
        """
        own: Sequence[str] = ()
        if part != "page":
            device, _, devices, _ = self.compute.check()
            own = gpu_for_each(device, devices, jobs)
        settings = Settings()
        for line, protocol in self.protocols.items():  # what is missing is told before anything is run
            for seed in self._seeds(protocol):
                self._results(line, protocol, seed, settings)
        missing = self._missing(settings)
        failed: list[Job] = []
        if part != "page":
            self._write_configs(settings)
            failed = run_jobs(missing, jobs, lambda text: console.line(text, stderr=True), own)
        entries = [] if part == "runs" else self._entries(settings)
        if entries:
            self._write_page(entries, settings, command)
        if failed:
            raise DualLoRAError(
                f"{len(failed)} of {len(missing)} runs failed ({', '.join(job.name for job in failed)}). Put "
                f"right what their logs in {self.out / 'logs'} say and repeat the command."
            )
        if part != "runs" and not entries:
            raise DualLoRAError(f"{self.out} has no finished run to show yet; run the suite first.")

    def _seeds(self, protocol: Protocol) -> Sequence[int]:
        return protocol.seeds if self.seeds is None else self.seeds

    def _folder(self, line: str, seed: int) -> Path:
        return self.out / "runs" / f"{line}-{seed}"

    def _setting(self, protocol: Protocol, seed: int, settings: Settings) -> Setting:
        return settings.load(protocol.ordered(seed), protocol.backbone)

    def _results(self, line: str, protocol: Protocol, seed: int, settings: Settings) -> Results | None:
        setting = self._setting(protocol, seed, settings)
        return finished_run(self._folder(line, seed), _line(line, protocol), setting, seed)

    def _missing(self, settings: Settings) -> list[Job]:
        """The runs that are not finished, the first seed of every line before the second of any."""
        columns = [
            [(line, protocol, seed) for seed in self._seeds(protocol)]
            for line, protocol in self.protocols.items()
        ]
        jobs = []
        for row in itertools.zip_longest(*columns):
            for line, protocol, seed in (cell for cell in row if cell is not None):
                if self._results(line, protocol, seed, settings) is None:
                    jobs.append(self._job(line, protocol, seed))
        return jobs

    def _job(self, line: str, protocol: Protocol, seed: int) -> Job:
        asked, folder = protocol.ordered(seed), self._folder(line, seed)
        config = str(self.out / "configs" / f"{line}.yaml")
        words = ["run", "--config", config, "--seed", str(seed), "--order", str(asked.order)]
        words += ["--out", str(folder), *elsewhere(asked, protocol.backbone, self.compute)]
        words += logged(self.log, folder.name)
        return Job(f"{line}, seed {seed}", tuple(words), self.out / "logs" / f"{folder.name}.log")

    def _write_configs(self, settings: Settings) -> None:
        from duallora.storage.checkpoint import write_atomic

        (self.out / "configs").mkdir(parents=True, exist_ok=True)
        for line, protocol in self.protocols.items():
            setting = self._setting(protocol, self._seeds(protocol)[0], settings)
            write_atomic(self.out / "configs" / f"{line}.yaml", kept_config(_line(line, protocol), setting))

    def _entries(self, settings: Settings) -> list[Entry]:
        """All lines with their finished runs, also of seeds that were not asked for now."""
        from duallora.methods import METHODS
        from duallora.runs.comparison import Entry

        entries = []
        for line, protocol in self.protocols.items():
            known = {*protocol.seeds, *self._seeds(protocol)}
            found = {seed: self._results(line, protocol, seed, settings) for seed in sorted(known)}
            runs = {seed: results for seed, results in found.items() if results is not None}
            kind = METHODS[str(protocol.method.name)].method
            about = (line, str(protocol.method.name), kind.reconstruction, kind.all_at_once)
            if runs:
                entries.append(Entry(*about, tuple(runs), tuple(runs.values())))
        return sorted(entries, key=lambda entry: -_final(entry))

    def _write_page(self, entries: Sequence[Entry], settings: Settings, command: str) -> None:
        from duallora.runs.comparison_tables import Comparison
        from duallora.runs.room import default_reference, find_evidence
        from duallora.runs.verdicts import judge, verdict_table

        expected = {line: protocol.expected for line, protocol in self.protocols.items()}
        verdicts = {e.name: judge(e.name, e.runs, expected[e.name]) for e in entries}
        table = verdict_table(entries, verdicts)
        reference, told = default_reference(entries), self._told(entries, settings)
        shown = Comparison(entries, find_evidence(entries), reference, told, command, (table,))
        documents = [verdict.document() for each in verdicts.values() for verdict in each]
        write_comparison(shown, self.out, suite=self.name, verdicts=documents)

    def _told(self, entries: Sequence[Entry], settings: Settings) -> list[str]:
        """What is common to the lines and where they differ, in sentences for the page."""
        first = self.protocols[entries[0].name]
        stream = self._setting(first, entries[0].seeds[0], settings).stream
        sizes = [sum(len(getattr(task, part)) for task in stream) for part in ("train", "test")]
        return [
            f"suite {self.name}: every line as its protocol has it; what they differ in is below",
            f"stream {stream.name}: {len(stream)} tasks, {len(stream.class_order)} classes; {sizes[0]} "
            f"training and {sizes[1]} test images",
            f"backbone: {listed(grouped(entries, _backbone))}",
            f"class order: {listed(grouped(entries, self._order))}",
            f"trained: {listed(grouped(entries, _training))}",
            "room captured and differences are of lines on one backbone; their budgets may differ",
            "no task labels at test time; after every task, every test image seen so far; images count alike",
            f"run on: {'; '.join(machines(entries))}",
        ]

    def _order(self, entry: Entry) -> str:
        protocol = self.protocols[entry.name]
        if not protocol.by_seed:
            return str(protocol.stream.order)
        trial = protocol.stream.order == "alphabetical"
        return "alphabetical for seed 0, else of the run's seed" if trial else "of the run's seed"


def _line(name: str, protocol: Protocol) -> Line:
    return Line(name, str(protocol.method.name), protocol.method.config())


def _final(entry: Entry) -> float:
    return float(statistics.mean(run["final_accuracy"] for run in entry.runs))


def _backbone(entry: Entry) -> str:
    info = entry.runs[0]["backbone"]
    return f"{info['name']} (sha256 {info['sha256'][:12]})"


def _training(entry: Entry) -> str:
    fields = entry.runs[0]["config"]["method"]
    if not any(task["trainable_parameters"] for task in entry.runs[0]["tasks"]):
        return "nothing"
    return f"{fields['epochs']} epochs in batches of {fields['batch_size']}"

"""Room captured and paired differences of runs that are there, without their images.

    python benchmarks/room.py FOLDER [--reference LINE]

FOLDER holds ``runs/LINE-SEED/results.json``, as ``duallora compare`` leaves them. What its page says of
room and differences is printed as Markdown; the images are not needed for it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from duallora.methods import METHODS
from duallora.runs.comparison import Entry, Results
from duallora.runs.comparison_tables import Comparison, tables
from duallora.runs.room import default_reference, find_evidence
from duallora.storage.documents import markdown_table


def main() -> None:
    """Reads the runs and prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reference")
    given = parser.parse_args()
    entries = read_entries(given.folder / "runs")
    evidence = find_evidence(entries)
    reference = given.reference or default_reference(entries)
    print(evidence.lacking or f"{evidence.draws} draws")
    if evidence.apart:
        print(f"drawn apart, without answers by image: {', '.join(evidence.apart)}")
    for table in tables(Comparison(entries, evidence, reference, (), "")):
        if table.title.startswith(("Room captured", "Final accuracy less")):
            print(f"\n{table.title}\n\n{markdown_table(table.header, table.cells)}")


def read_entries(runs: Path) -> list[Entry]:
    """The lines, by their names."""
    found: dict[str, dict[int, Results]] = {}
    for path in runs.glob("*/results.json"):
        line, _, seed = path.parent.name.rpartition("-")
        found.setdefault(line, {})[int(seed)] = json.loads(path.read_text())
    entries = []
    for line, by_seed in sorted(found.items()):
        seeds = tuple(sorted(by_seed))
        method = by_seed[seeds[0]]["config"]["method"]["name"]
        kind = METHODS[method].method
        made = tuple(by_seed[seed] for seed in seeds)
        entries.append(Entry(line, method, kind.reconstruction, kind.all_at_once, seeds, made))
    return entries


if __name__ == "__main__":
    main()

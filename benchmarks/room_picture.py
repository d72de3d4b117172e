"""Room captured by method and stream, as one picture, from the pages of ``duallora compare``.

    python benchmarks/room_picture.py FOLDER [FOLDER ...] --out FILE

Every FOLDER holds a ``compare.json`` and is a panel. A point is a method under its calibrated answer, a line
the 95 % interval; an open point has one seed. What lies left of -1 is drawn at -1, as an arrow.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LEAST = -1.0


def captured(folder: Path) -> list[dict[str, Any]]:
    """Lines with a share of the room, the largest first: name, seeds, share, low and high."""
    lines = json.loads((folder / "compare.json").read_text(encoding="utf-8"))["lines"]
    found = []
    for line in lines:
        room = line["readouts"]["calibrated"]["room_captured"]
        if room is not None:
            found.append({"name": line["name"], "seeds": len(line["seeds"]), **room})
    return sorted(found, key=lambda line: -line["share"])


def draw(folders: list[Path], out: Path) -> None:
    """Writes the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [captured(folder) for folder in folders]
    figure, axes = pyplot.subplots(
        1, len(folders), figsize=(4.2 * len(folders), 3.6), layout="constrained", squeeze=False
    )
    for axis, folder, lines in zip(axes[0], folders, panels, strict=True):
        for place, line in enumerate(lines):
            own = line["name"] == "duallora"
            colour = "C3" if own else "C0"
            share, low = max(line["share"], LEAST), max(line["low"], LEAST)
            axis.plot([low, max(line["high"], LEAST)], [place, place], color=colour, linewidth=1.5)
            filled = colour if line["seeds"] > 1 else "white"
            marker = "<" if line["share"] < LEAST else "o"
            axis.plot(share, place, marker=marker, color=colour, markerfacecolor=filled, markersize=6)
        axis.set_yticks(range(len(lines)), [line["name"] for line in lines])
        axis.invert_yaxis()
        axis.set_xlim(LEAST - 0.06, 1.06)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.axvline(1, color="grey", linestyle=":")
        axis.set_title(folder.name.removeprefix("compare-"))
        axis.set_xlabel("room captured: 0 frozen, 1 joint")
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Reads the pages and draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    draw(given.folders, given.out)


if __name__ == "__main__":
    main()

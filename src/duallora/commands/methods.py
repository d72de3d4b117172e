"""``duallora methods``: what there is to compare."""

from __future__ import annotations

from duallora.commands import console


def methods(*, json: bool = False) -> None:
    """List the methods with their paper, what they are and what they store.

    Those marked as a reconstruction follow a paper whose code or full text was not to be had.

    Args:
        json: print one JSON document
    """
    from duallora.methods import METHODS

    entries = [
        {
            "name": name,
            "summary": (entry.method.__doc__ or "").strip().splitlines()[0].replace("`", ""),
            "paper": entry.method.paper,
            "reconstruction": entry.method.reconstruction,
            "stores": entry.method.stores,
            "forward_passes": entry.method.forward_passes,
            "more_passes": entry.method.more_passes,
        }
        for name, entry in METHODS.items()
    ]
    if json:
        console.document(entries)
        return
    console.rows(
        ["method", "paper", "what it is", "stores", "passes"],
        [
            [
                str(entry["name"]),
                f"{entry['paper']}{' (reconstruction)' if entry['reconstruction'] else ''}",
                str(entry["summary"]),
                str(entry["stores"]),
                str(entry["more_passes"] or entry["forward_passes"]),
            ]
            for entry in entries
        ],
    )
    console.line("fields of a method: duallora run --method NAME --help; equations: docs/methods.md")

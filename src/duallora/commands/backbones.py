"""``duallora backbones``: what a method can stand on."""

from __future__ import annotations

from duallora.backbones.catalog import FAMILIES
from duallora.commands import console


def backbones(*, json: bool = False) -> None:
    """List the families of backbones with names, image size, parameters and what each leaves out.

    Any other model of these families goes by its full name too, and weights can come from a local file.

    Args:
        json: print one JSON document
    """
    if json:
        console.document(
            [
                {
                    "family": family.name,
                    "source": family.source,
                    "name": example.name,
                    "final_feature": family.feature,
                    "image_size": example.size,
                    "parameters": example.parameters,
                    "notes": family.notes,
                }
                for family in FAMILIES
                for example in family.examples
            ]
        )
        return
    console.rows(
        ["family", "--backbone", "final feature", "image", "parameters", "notes"],
        [
            [
                family.name if position == 0 else "",
                example.name,
                family.feature if position == 0 else "",
                str(example.size),
                f"{example.parameters / 1e6:.1f} M",
                family.notes if position == 0 else "",
            ]
            for family in FAMILIES
            for position, example in enumerate(family.examples)
        ],
    )
    console.line(
        "names with hf: are of Hugging Face (also hf:FOLDER), all others but embedded of timm; "
        "what is refused, and why: docs/backbones.md"
    )

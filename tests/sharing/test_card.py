"""The card says what the model says of itself, and names in it are text whatever they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from duallora.errors import DualLoRAError
from duallora.sharing.card import model_card
from duallora.sharing.place import HubPlace
from duallora.storage import checkpoint


def card(folder: Path, licence: str | None = None, **changes: Any) -> str:
    manifest, tensors = checkpoint.read(folder)
    return model_card(folder, manifest | changes, tensors, HubPlace("jane/birds"), licence)


def header(text: str) -> dict[str, Any]:
    _, fields, _ = text.split("---\n", 2)
    return dict(yaml.safe_load(fields))


def test_it_holds_what_the_model_says(shared_model: Path) -> None:
    manifest = json.loads((shared_model / "model.json").read_text())
    manifest["tasks"][1] |= {"held_back_accuracy": 0.875, "held_back_images": 16}
    text = card(shared_model, "cc-by-4.0", tasks=manifest["tasks"])
    assert header(text) == {
        "library_name": "duallora",
        "license": "cc-by-4.0",
        "pipeline_tag": "image-classification",
        "tags": ["continual-learning", "vision-transformer", "lora"],
    }
    assert "knows 4 classes, learned in 2 lessons" in text and "Licence: cc-by-4.0." in text
    for task in manifest["tasks"]:
        assert f"| {task['name']} | {', '.join(task['classes'])} |" in text
    assert "| 87.5 % | 16 |" in text and "| not measured | - |" in text
    assert all(name in text for name in manifest["files"])
    assert 'ContinualLearner.load("hf:jane/birds")' in text


def test_without_a_licence_it_says_so(shared_model: Path) -> None:
    text = card(shared_model)
    assert "license" not in header(text) and "licence was not stated" in text


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("vit_base_patch16_224.augreg_in21k", "timm/vit_base_patch16_224.augreg_in21k"),
        ("hf:google/vit-base-patch16-224-in21k", "google/vit-base-patch16-224-in21k"),
        ("hf:/home/jane/secret/vit", None),
        ("embedded", None),
    ],
)
def test_it_names_the_backbone_and_no_folder(shared_model: Path, name: str, base: str | None) -> None:
    stored = json.loads((shared_model / "model.json").read_text())["backbone"]
    text = card(shared_model, backbone=stored | {"name": name})
    assert header(text).get("base_model") == base
    assert "/home/jane" not in text


def test_names_are_no_markup(shared_model: Path) -> None:
    tasks = json.loads((shared_model / "model.json").read_text())["tasks"]
    tasks[0] |= {"name": "<script>x</script>\n# Title", "classes": ["a|b", "![p](http://x)"]}
    text = card(shared_model, tasks=tasks)
    assert "<script" not in text and "\n# Title" not in text
    (row,) = [line for line in text.splitlines() if "script" in line]
    assert r"a\|b" in row and "![p](" not in row


def test_many_classes_are_cut(shared_model: Path) -> None:
    tasks = json.loads((shared_model / "model.json").read_text())["tasks"]
    tasks[0]["classes"] = [f"bird{number}" for number in range(60)]
    text = card(shared_model, tasks=tasks)
    assert "bird49 and 10 more" in text and "bird50" not in text


def test_a_model_that_knows_nothing_has_no_card(shared_model: Path) -> None:
    tasks = json.loads((shared_model / "model.json").read_text())["tasks"]
    with pytest.raises(DualLoRAError, match="learned nothing yet"):
        card(shared_model, tasks=[task | {"classes": []} for task in tasks])

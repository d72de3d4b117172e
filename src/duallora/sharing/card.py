"""The card of a saved model: README.md of its repository, made from what the model says of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from torch import Tensor

from duallora.backbones.catalog import HUGGING_FACE
from duallora.errors import DualLoRAError
from duallora.methods.saved_state import description
from duallora.sharing.place import HubPlace
from duallora.storage.checkpoint import intact
from duallora.storage.documents import markdown_table, percent

_MOST_CLASSES = 50  # of a lesson that are shown by name
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_MARKED = re.compile(r"([\\`*_{}\[\]<>#~&])")

_LIMITS = """\
- It names one of the classes above for every image, whatever is on it. `unknown`, from 0 to 1, says how
  little an image fits anything learned; choose a threshold on images of your own.
- Accuracy is measured on images from the folder that was taught. Other cameras, light or surroundings can
  cost much of it.
- It holds no image. It does hold a mean of features for every class and one covariance over all, which say
  something of the images they were made of.
- It carries the biases of its backbone's pre-training and of the images taught.
"""


def model_card(
    folder: Path,
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    place: HubPlace,
    licence: str | None,
) -> str:
    """The text of ``README.md``, with the header that the hub reads.

    Names of classes and lessons are shown as text: whatever they hold, it is no markup.

    Args:
        folder: of the model, for messages.
        manifest: content of ``model.json``.
        tensors: the saved weights by name.
        place: where the model will be.
        licence: as the hub names licences (``apache-2.0``); None says that none was given.

    Raises:
        DualLoRAError: a licence that is no name, a model that has learned nothing, or a damaged one.
    """
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise DualLoRAError(
            f"{licence!r} is no name of a licence; name it as the hub does, such as apache-2.0, or other."
        )
    with intact(folder):
        about = description(folder, manifest, tensors)
        lessons = [task for task in manifest["tasks"] if task["classes"]]
        if not lessons:
            raise DualLoRAError(f"the model in {folder} has learned nothing yet; teach it a folder first.")
        return "\n".join(
            [
                _header(about["backbone"]["name"], licence),
                f"# {_text(place.repository.split('/')[1])}\n",
                _summary(manifest, about) + "\n",
                f"## Lessons\n\n{_lessons(lessons)}\n",
                f"## Limits\n\n{_LIMITS}",
                f"## Use\n\n{_usage(place)}",
                f"## Files\n\n{_files(manifest, about)}\n",
                f"## Licence\n\n{_licence(licence, about['backbone'], manifest)}\n",
            ]
        )


def _header(backbone: str, licence: str | None) -> str:
    fields: dict[str, Any] = {
        "library_name": "duallora",
        "pipeline_tag": "image-classification",
        "tags": ["continual-learning", "vision-transformer", "lora"],
    }
    if licence is not None:
        fields["license"] = licence
    base = _hub_name(backbone)
    if base is not None:
        fields["base_model"] = base
    return f"---\n{yaml.safe_dump(fields, sort_keys=True)}---\n"


def _hub_name(backbone: str) -> str | None:
    """The repository of a backbone; None where it has none, or is a local folder."""
    name = backbone.removeprefix(HUGGING_FACE)
    if name != backbone:
        return name if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not Path(name).is_dir() else None
    return f"timm/{name}" if "." in name else None


def _summary(manifest: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    classes = {name for task in about["tasks"] for name in task["classes"]}
    count = sum(bool(task["classes"]) for task in about["tasks"])
    backbone = about["backbone"]
    size = " x ".join(map(str, backbone["input_size"][1:]))
    return (
        f"An image classifier that knows {len(classes)} classes, learned in {count} "
        f"{'lesson' if count == 1 else 'lessons'} one after another without keeping their images. Method "
        f"`{about['method']}` of duallora {_text(str(manifest['package_version']))} on the frozen backbone "
        f"{_text(Path(backbone['name']).name if _is_path(backbone['name']) else backbone['name'])} "
        f"({size} pixels)."
    )


def _is_path(backbone: str) -> bool:
    """Whether a backbone's name is a folder of the machine it was loaded on, which only its owner knows."""
    name = backbone.removeprefix(HUGGING_FACE)
    return name != backbone and _hub_name(backbone) is None


def _lessons(lessons: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for task in lessons:
        names = [_text(name) for name in task["classes"]]
        more = f" and {len(names) - _MOST_CLASSES} more (`model.json`)" if len(names) > _MOST_CLASSES else ""
        accuracy = task.get("held_back_accuracy")
        told = "not measured" if accuracy is None else f"{percent(accuracy)} %"
        images = str(task.get("held_back_images", 0)) if accuracy is not None else "-"
        shown = ", ".join(names[:_MOST_CLASSES]) + more
        rows.append([_text(task["name"]), shown, f"{task['train_images']:,}", told, images])
    table = markdown_table(["lesson", "classes", "images", "accuracy", "measured on"], rows)
    return (
        f"{table}\n\n*accuracy* is the share of images held back from the lesson that were named rightly "
        "among all classes known on that day; it was not measured again after later lessons."
    )


def _usage(place: HubPlace) -> str:
    return (
        "```\n"
        "pip install 'duallora[hub]'\n"
        f"duallora predict hf:{place.repository} IMAGE...\n"
        f"duallora pull {place.repository} DIR\n"
        "```\n\n"
        "```python\n"
        "from duallora import ContinualLearner\n\n"
        f'learner = ContinualLearner.load("hf:{place.repository}")\n'
        'print(learner.predict(["photo.jpg"])[0].label)\n'
        "```\n"
    )


def _files(manifest: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    rows = [[name, str(digest)[:12]] for name, digest in sorted(manifest["files"].items())]
    parts = ", ".join(f"{part} {size:,}" for part, size in about["bytes"].items())
    return (
        "`model.json` describes the model and names its other files with their sha256. Nothing is pickled, "
        "and no code is run.\n\n"
        f"{markdown_table(['file', 'sha256 begins with'], rows)}\n\nBytes by part: {parts}."
    )


def _licence(licence: str | None, backbone: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    own = "The model's licence was not stated; ask its owner." if licence is None else f"Licence: {licence}."
    copied = any(name.startswith("backbone-") for name in manifest["files"])
    where = "lie beside the model" if copied else "are not part of it"
    return f"{own} The backbone's weights {where} and keep the licence of whoever published them."


def _text(name: str) -> str:
    """A name as plain text in Markdown."""
    return _MARKED.sub(r"\\\1", " ".join(name.split())).replace("\\<", "&lt;").replace("\\&", "&amp;")

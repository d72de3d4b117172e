"""Fields for images: one to drop or choose them, and a folder by its path behind it.

Gradio's own field for folders forgets in which of them the files lay, and so their classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gradio as gr

from duallora.app import html
from duallora.app.assets import asset
from duallora.app.uploads import MOST_FILES
from duallora.errors import DualLoRAError

OTHERWISE = "A whole folder instead"
FOLDER = "Choose a folder; the browser sends a copy of it"
PATH = "Path of a folder, which is read where it lies"

_DROP = """
<div class="drop" role="group" aria-label="TITLE">
  <p class="drop-title">TITLE</p>
  <p class="drop-hint" aria-hidden="true">Drop images here, or a zip or a folder of them</p>
  <label class="drop-choose">Choose images<input type="file" class="unseen" multiple accept="image/*,.zip"
    aria-label="TITLE: choose images or a zip"></label>
  <p class="field-said" role="status"></p>
  <button type="button" class="field-clear" hidden>Take these out</button>
</div>
"""
_FOLDER = f"""
<div class="folder">
  <label>{FOLDER}<input type="file" webkitdirectory multiple></label>
  <p class="field-said" role="status"></p>
  <button type="button" class="field-clear" hidden>Take these out</button>
</div>
"""


@dataclass(frozen=True)
class ImageFields:
    """The ways to give images, made inside ``gr.Blocks``.

    Attributes:
        images: images or a zip, dropped or chosen; a folder, dropped.
        folder: a folder chosen in the browser.
        path: a folder named by its path.
    """

    images: Any
    folder: Any
    path: Any

    @classmethod
    def make(cls, title: str, name: str, example: str) -> ImageFields:
        """The fields: one that a newcomer sees, and the others behind a line that opens.

        Args:
            title: of the first one.
            name: of all of them, for ``elem_id``: NAME-images, NAME-folder, NAME-path.
            example: of a path.
        """
        images = _field(_DROP.replace("TITLE", html.text(title)), f"{name}-images")
        with gr.Accordion(OTHERWISE, open=False, elem_id=f"{name}-otherwise"):
            folder = _field(_FOLDER, f"{name}-folder")
            path = gr.Textbox(label=PATH, placeholder=example, max_lines=1, elem_id=f"{name}-path")
        return cls(images, folder, path)

    @property
    def all(self) -> list[Any]:
        """Their values are read with :func:`chosen`; an empty text empties each."""
        return [self.images, self.folder, self.path]


def chosen(*values: str | None) -> list[dict[str, Any]]:
    """The uploaded files of fields, each with ``path`` and ``orig_name``, its name or its place in a folder.

    Args:
        values: of the fields.

    Raises:
        DualLoRAError: the browser is still sending some.
    """
    found: list[dict[str, Any]] = []
    for value in values:
        try:
            one = json.loads(value or "[]")
        except ValueError:
            continue
        if one == "sending":
            raise DualLoRAError("the browser is still sending the images; wait until they are ready.")
        found += [each for each in one if isinstance(each, dict)] if isinstance(one, list) else []
    return found


def _field(template: str, elem_id: str) -> Any:
    return gr.HTML(
        "",
        html_template=template,
        js_on_load=asset("time_left.js") + asset("image_field.js").replace("MOST", str(MOST_FILES)),
        elem_id=elem_id,
        elem_classes=["image-field"],
    )

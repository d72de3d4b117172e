"""Fields for images: what they are called, and one for folders.

Gradio's own field for folders forgets in which of them the files lay, and so their classes.
"""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from duallora.app.uploads import MOST_FILES

FILES = "Files: images or a zip"
FOLDER = "Folder: the browser sends a copy of it"
PATH = "Path: a folder that is read where it lies"

_TEMPLATE = (
    f'<label class="folder"><span>{FOLDER}</span>'
    '<input type="file" webkitdirectory multiple></label><p class="folder-said" role="status"></p>'
)

# Hidden files are not sent; the others go a few at a time, and what was chosen before is given up.
_SCRIPT = """
const hidden = (file) => file.webkitRelativePath.split("/").some((part) => /^[.]|^__MACOSX$/.test(part));
const say = (text) => { element.querySelector(".folder-said").textContent = text; };
let turn = 0;
element.addEventListener("change", async (event) => {
  if (!event.target.matches("input[type=file]")) return;
  const mine = ++turn, files = [...event.target.files].filter((file) => !hidden(file)), sent = [];
  const all = files.length;
  const send = async () => {
    while (files.length && mine === turn) {
      const file = files.shift(), { path } = await upload(file);
      sent.push({ path, orig_name: file.webkitRelativePath });
      if (mine === turn) say(`${sent.length} of ${all} files sent.`);
    }
  };
  props.value = "";
  if (all > MOST) return say(`This folder has more than ${MOST} files; choose a smaller one.`);
  if (!all) return say("This folder has no files.");
  try {
    await Promise.all([send(), send(), send(), send()]);
    if (mine !== turn) return;
    props.value = JSON.stringify(sent);
    setTimeout(() => { if (mine === turn) say(`${all} ${all === 1 ? "file" : "files"} ready.`); });
  } catch (error) {
    turn += 1;
    say("The folder could not be sent; type its path instead.");
  }
});
watch("value", () => {
  if (props.value) return;
  const input = element.querySelector("input[type=file]");
  if (props.value === "" && !input.matches(":focus")) { input.value = ""; say(""); }
});
"""


def folder_picker(elem_id: str) -> Any:
    """The field; its value is read with :func:`chosen`, and an empty text empties it.

    Args:
        elem_id: of the field.
    """
    return gr.HTML(
        "",
        html_template=_TEMPLATE,
        js_on_load=_SCRIPT.replace("MOST", str(MOST_FILES)),
        elem_id=elem_id,
        elem_classes=["folder-picker"],
    )


def chosen(value: str | None) -> list[dict[str, Any]]:
    """The uploaded files of a folder, each with ``path`` and ``orig_name`` (its place in the folder)."""
    try:
        found = json.loads(value or "[]")
    except ValueError:
        return []
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []

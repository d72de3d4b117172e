"""The view Look: what the model holds, how good it was on which day, and what can be forgotten."""

from __future__ import annotations

from typing import Any

import gradio as gr

from duallora.app import html
from duallora.app.shell import PRIVATE, Shell, count, sentences, when
from duallora.errors import DualLoRAError
from duallora.storage.documents import percent

_LESSON, _CLASS = "lesson: ", "class: "


class Look:
    """The view; made inside ``gr.Blocks``.

    Args:
        shell: the frame.
    """

    def __init__(self, shell: Shell) -> None:
        self.shell, self.session = shell, shell.session
        gr.HTML(html.heading(2, "What the model knows"))
        shell.follows(gr.HTML(elem_id="look"), self.shown)
        with shell.follows(gr.Column(visible=False), self._forget_part):
            gr.HTML(
                html.heading(2, "Forget")
                + html.paragraph(
                    "Takes back a lesson or a class without its images. Statistics that all classes share "
                    "keep their part of it.",
                    "aside",
                )
            )
            self.which = shell.follows(
                gr.Dropdown([], label="What to forget", interactive=True, elem_id="forget-which"),
                self._choices,
            )
            self.purge = gr.Checkbox(
                label="Also delete the state before, so that undo cannot bring it back",
                elem_id="forget-purge",
            )
            self.forget = gr.Button("Forget", elem_id="forget")
            with gr.Column(visible=False) as self.ask:
                self.question = gr.HTML(elem_id="forget-question", elem_classes=["said"])
                with gr.Row():
                    self.really = gr.Button("Yes, forget it", variant="stop", elem_id="forget-yes")
                    self.keep = gr.Button("No, keep it", elem_id="forget-no")
        self.said = gr.HTML(elem_id="forget-said", elem_classes=["said"])
        self.asked = gr.State(None)

    def connect(self) -> None:
        """Joins buttons and handlers."""
        self.forget.click(
            self.on_asked,
            [self.which, self.purge],
            [self.said, self.ask, self.question, self.asked],
            **PRIVATE,
        )
        self.keep.click(lambda: gr.update(visible=False), None, self.ask, **PRIVATE)
        self.really.click(
            self.on_forget, [self.which, self.purge, self.asked], [self.said, self.ask], **PRIVATE
        ).then(self.shell.refresh, None, self.shell.parts, **PRIVATE)

    def shown(self) -> str:
        """The model as HTML."""
        about = self.session.about()
        if about is None:
            return html.paragraph("Nothing yet. What is taught under Teach is listed here.")
        return "".join([_lessons(self.session.tasks()), self._matrix(), _layers(about), _bytes(about)])

    def _matrix(self) -> str:
        results = self.session.run_results()
        title = html.heading(3, "Accuracy after every lesson")
        if results is None:
            return title + html.paragraph("Only models that duallora run made have this matrix.", "aside")
        names = [str(task["name"]) for task in results["tasks"]]
        caption = "Accuracy in percent. Row: after that lesson; column: test images of a lesson"
        return title + html.matrix(caption, names, results["accuracy_matrix"])

    # -- forgetting ------------------------------------------------------------------------------------------

    def _forget_part(self) -> Any:
        return gr.update(visible=len(self.session.classes()) > 1)

    def _choices(self) -> Any:
        tasks, classes = self.session.tasks(), self.session.classes()
        whole = [task.name for task in tasks] if len(tasks) > 1 else []
        names = [*(_LESSON + name for name in whole), *(_CLASS + name for name in classes)]
        return gr.update(choices=names, value=None)

    @sentences(4)
    def on_asked(self, which: str | None, purge: bool) -> list[Any]:
        """Asks once more."""
        if not which:
            raise DualLoRAError("choose a lesson or a class first.")
        end = (
            "It cannot be brought back."
            if purge
            else "Undo can bring it back as long as nothing else changes."
        )
        question = html.paragraph(f"Forget the {which.replace(': ', ' ', 1)}? {end}")
        return ["", gr.update(visible=True), question, (which, purge)]

    @sentences(2)
    def on_forget(self, which: str | None, purge: bool, asked: tuple[str, bool] | None) -> list[Any]:
        """Forgets what was asked about."""
        if not which or asked is None or (which, purge) != tuple(asked):
            raise DualLoRAError("the choice has changed since the question; press Forget again.")
        if which.startswith(_LESSON):
            said = self.session.forget(task=which.removeprefix(_LESSON), purge=purge)
        else:
            said = self.session.forget(name=which.removeprefix(_CLASS), purge=purge)
        return [html.done(said), gr.update(visible=False)]


def _lessons(tasks: list[Any]) -> str:
    rows = [
        [
            task.name,
            when(task.learned_at),
            f"{task.train_images:,}",
            "not measured"
            if task.held_back_accuracy is None
            else f"{percent(task.held_back_accuracy)} % of {task.held_back_images}",
            ", ".join(task.classes),
        ]
        for task in tasks
    ]
    header = ["Lesson", "Learned", "Images", "Held-back accuracy on that day", "Classes"]
    return html.table("Lessons in the order in which they were learned", header, rows, (2, 3))


def _layers(about: dict[str, Any]) -> str:
    """How many directions every layer has left for later lessons."""
    title = html.heading(3, "Free space in each layer")
    layers = [layer for layer in about["layers"] if layer["free"] is not None]
    if not layers:
        words = f"The method {about['method']} does not divide layers into used and free directions."
        return title + html.paragraph(words, "aside")
    rows = []
    for layer in layers:
        width = layer["free"] + sum(layer["bases"])
        name = f"layer {layer['layer']} ({layer['projections']})"
        rows.append((name, layer["free"] / width, f"{layer['free']} of {width} free"))
    said = html.paragraph(
        "A lesson with several classes uses up directions; later ones learn in what is left.", "aside"
    )
    return title + html.bars("Directions that no lesson uses yet", ("Layer", "Free"), rows) + said


def _bytes(about: dict[str, Any]) -> str:
    parts = {name: size for name, size in about["bytes"].items() if name != "total"}
    total = about["bytes"]["total"]
    rows = [(name, size / max(total, 1), f"{size:,}") for name, size in parts.items()]
    title = html.heading(3, "Bytes of each part")
    caption = f"{count(total, 'byte', 'bytes')} beside the frozen backbone"
    return title + html.bars(caption, ("Part", "Bytes"), rows)

"""Undo in the view Teach: the last change goes back, or a first lesson goes and the model starts again."""

from __future__ import annotations

from typing import Any

import gradio as gr

from duallora.app import html
from duallora.app.shell import PRIVATE, Shell, sentences
from duallora.app.undo_question import Step
from duallora.errors import DualLoRAError

_UNDO, _AGAIN = "Undo", "Start again"


class Undo:
    """The part of the view; made inside ``gr.Blocks``.

    Args:
        shell: the frame.
    """

    def __init__(self, shell: Shell) -> None:
        self.shell, self.session = shell, shell.session
        with shell.follows(gr.Column(visible=False, elem_id="undo-part"), self._part):
            shell.follows(gr.HTML(elem_id="undo-what"), self._what)
            self.button = shell.follows(gr.Button(_UNDO, elem_id="undo"), self._button)
            with gr.Column(visible=False) as self.ask:
                self.question = gr.HTML(elem_id="undo-question", elem_classes=["said"])
                with gr.Row():
                    self.really = gr.Button("Yes, take it back", variant="stop", elem_id="undo-yes")
                    self.keep = gr.Button("No, keep it", elem_id="undo-no")
        self.said = gr.HTML(elem_id="undo-said", elem_classes=["said"])
        self.step = gr.State(None)

    def connect(self) -> None:
        """Joins buttons and handlers."""
        said = [self.said, self.ask]
        self.button.click(self.on_asked, None, [*said, self.question, self.step], **PRIVATE)
        self.keep.click(lambda: gr.update(visible=False), None, self.ask, **PRIVATE)
        self.really.click(self.on_undo, self.step, said, **PRIVATE).then(
            self.shell.refresh, None, self.shell.parts, **PRIVATE
        )

    def _part(self) -> Any:
        return gr.update(visible=self.session.step_back() is not None)

    def _button(self) -> Any:
        step = self.session.step_back()
        return gr.update(value=_AGAIN if step is not None and step.whole else _UNDO)

    def _what(self) -> str:
        step = self.session.step_back()
        if step is None:
            return ""
        if step.whole:
            return html.heading(2, _AGAIN) + html.paragraph(step.question)
        return html.heading(2, _UNDO) + html.paragraph(f"One step can be taken back. {step.question}")

    @sentences(4)
    def on_asked(self) -> list[Any]:
        """Asks once more, for undo itself cannot be undone."""
        step = self.session.step_back()
        if step is None:
            raise DualLoRAError("there is nothing to undo any more.")
        question = f"{step.question} This cannot be taken back again. Go on?"
        return ["", gr.update(visible=True), html.paragraph(question), step]

    @sentences(2)
    def on_undo(self, step: Step | None) -> list[Any]:
        """Takes the step back."""
        if step is None:
            raise DualLoRAError("press the button above first.")
        return [html.done(self.session.undo(step)), gr.update(visible=False)]

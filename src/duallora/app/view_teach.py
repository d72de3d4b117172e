"""The view Teach: classes are gathered and checked, learned, and taken back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from duallora.app import html
from duallora.app.image_field import ImageFields, chosen
from duallora.app.intake import Check
from duallora.app.lesson_thread import Teaching
from duallora.app.reports import check_report, lesson_report
from duallora.app.shell import PRIVATE, Shell, sentences
from duallora.app.undo import Undo
from duallora.app.view_example import Example
from duallora.app.visitors import Visitor
from duallora.app.watching import moments, watched
from duallora.errors import DualLoRAError

_ABOUT = (
    "Give every new class a name and images of it. The images stay on this computer: copies that the "
    "browser sent are deleted once they are learned, when this page closes, and when the program ends. The "
    "model keeps statistics of them, no image."
)


class Teach:
    """The view; made inside ``gr.Blocks``.

    Args:
        shell: the frame.
    """

    def __init__(self, shell: Shell) -> None:
        self.shell, self.session = shell, shell.session
        self.example = Example(shell)
        gr.HTML(html.heading(2, "Teach new classes") + html.paragraph(_ABOUT, "aside"))
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=300):
                self._intake()
            with gr.Column(scale=1, min_width=300):
                self._lesson()
        self.undo = Undo(shell)

    # -- gathering -------------------------------------------------------------------------------------------

    def _intake(self) -> None:
        gr.HTML(html.heading(3, "1. Add a class"))
        self.name = gr.Textbox(
            label="Class name",
            info="Not needed where a zip or a folder holds one folder for each class.",
            max_lines=1,
            elem_id="class-name",
        )
        self.fields = ImageFields.make("Images of the class", "class", "/home/me/pictures/robin")
        self.add = gr.Button("Add class", elem_id="add-class")
        self.reading = gr.HTML(elem_id="intake-progress")
        self.said = gr.HTML(elem_id="intake-said", elem_classes=["said"])

    def _lesson(self) -> None:
        gr.HTML(html.heading(3, "2. Check and learn"))
        self.check = gr.HTML(self.shown(Check((), ())), elem_id="check", elem_classes=["said"])
        with gr.Row(visible=False) as self.removal:
            self.which = gr.Dropdown([], label="Class to take out", interactive=True, elem_id="remove-which")
            self.remove = gr.Button("Take out", elem_id="remove-class")
        self.lesson = gr.Textbox(
            label="Name of the lesson", info="May stay empty.", max_lines=1, elem_id="lesson-name"
        )
        with gr.Row():
            self.learn = gr.Button("Learn", variant="primary", interactive=False, elem_id="learn")
            self.stop = gr.Button("Stop", visible=False, elem_id="stop")
        self.progress = gr.HTML(elem_id="progress")
        self.stage = gr.HTML(elem_id="learn-said", elem_classes=["said", "unseen"])
        self.result = gr.HTML(elem_id="learned", elem_classes=["said"])

    def connect(self, tabs: Any, picture: Any) -> None:
        """Joins buttons and handlers, once all views are there.

        Args:
            tabs: of the views.
            picture: field of the view Try.
        """
        drafted = [self.said, self.check, self.removal, self.which, self.learn]
        given = [self.name, *self.fields.all]
        for event in (self.add.click, self.name.submit, self.fields.path.submit):
            event(self.on_add, given, [*drafted, *given, self.reading], **PRIVATE)
        self.remove.click(self.on_remove, self.which, drafted, **PRIVATE)
        self.learning = [self.result, self.progress, self.stage, self.stop, self.lesson, *drafted]
        self.learn.click(self.on_learn, self.lesson, self.learning, concurrency_limit=None, **PRIVATE).then(
            self.shell.refresh, None, self.shell.parts, **PRIVATE
        )
        self.stop.click(self.on_stop, None, self.stage, **PRIVATE)
        self.undo.connect()
        self.example.connect(tabs, picture)

    @sentences(10)
    def on_add(
        self, name: str, images: str, folder: str, path: str, request: gr.Request
    ) -> Iterator[list[Any]]:
        """Sorts what was given into classes; the fields are emptied where that went well."""
        visitor, skip = self.shell.visitors.of(request.session_hash), gr.skip()
        before = set(visitor.draft.files)
        try:
            with self.shell.visitors.given(visitor, chosen(images, folder), path or "") as given:
                steps = visitor.draft.adding(given, name or "", self.session.decoders.read)
                notes = yield from watched(steps, "Reading the images", lambda bar: [skip] * 9 + [bar])
        except Exception:
            yield [skip] * 9 + [""]
            raise
        new = [each for each in visitor.draft.files if each not in before]
        told = f"{', '.join(new)} added." if new else "The images were added to their classes."
        said = html.done(told) + "".join(html.paragraph(note) for note in notes)
        yield [said, *self.drafted(visitor), "", "", "", "", ""]

    @sentences(5)
    def on_remove(self, which: str | None, request: gr.Request) -> list[Any]:
        """Takes a class out."""
        visitor = self.shell.visitors.of(request.session_hash)
        if not which:
            raise DualLoRAError("choose a class first.")
        self.session.uploads.discard(visitor.draft.remove(which))
        return [html.done(f"{which} taken out."), *self.drafted(visitor)]

    def drafted(self, visitor: Visitor) -> list[Any]:
        """The check, what can be taken out, and whether it can be learned."""
        check, names = visitor.draft.check(), list(visitor.draft.files)
        return [
            self.shown(check),
            gr.update(visible=bool(names)),
            gr.update(choices=names, value=None),
            gr.update(interactive=check.refusal() is None),
        ]

    def shown(self, check: Check) -> str:
        """A check as HTML."""
        try:
            known = set(self.session.classes())
        except DualLoRAError:  # the line about the model says so
            known = set()
        return check_report(check, known)

    # -- learning --------------------------------------------------------------------------------------------

    @sentences(10)
    def on_learn(self, name: str, request: gr.Request) -> Iterator[list[Any]]:
        """Starts the lesson and shows it to its end."""
        visitor = self.shell.visitors.of(request.session_hash)
        # Only what is learned leaves the draft: classes can be added meanwhile, for the next lesson.
        lesson = visitor.draft.copy()
        teaching = self.session.teach(
            lesson.check(), name or "", lesson.paths, lambda: visitor.draft.release(lesson)
        )
        yield from self.followed(teaching, visitor, "")

    @sentences(10)
    def on_load(self, request: gr.Request) -> Iterator[list[Any]]:
        """Shows a lesson that another page has started, or this one before it was loaded again."""
        if self.session.teaching is not None and self.session.busy:
            visitor = self.shell.visitors.of(request.session_hash)
            yield from self.followed(self.session.teaching, visitor, gr.skip())
        else:
            yield [gr.skip()] * 10

    def followed(self, teaching: Teaching, visitor: Visitor, name: Any) -> Iterator[list[Any]]:
        """Values of ``learning`` until the lesson is over.

        Args:
            teaching: the lesson.
            visitor: who looks on.
            name: what the field for the lesson's name holds once it is learned.
        """
        skip, begun = gr.skip(), False
        for moment in moments(teaching):
            stage = skip if moment.stage is None else moment.stage
            first = ["", moment.bar, stage, gr.update(visible=True)]
            later = [skip, moment.bar, stage, skip]
            yield [*(later if begun else first), *([skip] * 5), gr.update(interactive=False)]
            begun = True
        if teaching.taught is None:
            told = html.error(teaching.error or "the lesson ended without a result; the model is as it was.")
            yield [told, "", "", gr.update(visible=False), skip, skip, *self.drafted(visitor)]
            return
        result = lesson_report(teaching.taught)
        yield [result, "", "", gr.update(visible=False), name, "", *self.drafted(visitor)]

    def on_stop(self) -> str:
        """Ends a lesson at its next step."""
        self.session.stop()
        return html.paragraph("Stopping.")

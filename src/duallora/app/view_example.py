"""An example for a model that knows nothing yet: one press teaches it, then there is a drawing to try."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import gradio as gr

from duallora.app import example, html
from duallora.app.intake import Draft
from duallora.app.lesson_thread import Taught, Teaching, thumbnail
from duallora.app.shell import PRIVATE, Shell, sentences
from duallora.app.uploads import files_of
from duallora.app.watching import moments
from duallora.storage.documents import percent

_FIRST_NEW = 1_000  # numbers of drawings below are those of the lesson
_OFFERED = 3
_CHOOSE = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-number]");
  if (button) trigger("choose", { number: Number(button.dataset.number) });
});
"""


class Example:
    """The part of the view Teach; made inside ``gr.Blocks``.

    Args:
        shell: the frame.
    """

    def __init__(self, shell: Shell) -> None:
        self.shell, self.session = shell, shell.session
        with shell.follows(gr.Column(visible=False, elem_id="example", elem_classes=["card"]), self._card):
            gr.HTML(html.heading(2, "New here? Start with an example") + html.paragraph(_about()))
            shown = [(thumbnail(example.drawn(name, 0)), name) for name in example.CLASSES]
            gr.HTML(html.pictures(shown), elem_id="example-classes")
            with gr.Row():
                self.teach = gr.Button("Teach the example", variant="primary", elem_id="teach-example")
                self.stop = gr.Button("Stop", visible=False, elem_id="stop-example")
            self.progress = gr.HTML(elem_id="example-progress")
            self.stage = gr.HTML(elem_id="example-stage", elem_classes=["said", "unseen"])
        self.said = gr.HTML(elem_id="example-said", elem_classes=["said"])
        with shell.follows(gr.Column(visible=False, elem_id="now-try", elem_classes=["card"]), self._now):
            words = "The model has not seen these drawings. Choose one to see what it says."
            gr.HTML(html.heading(2, "Now try it") + html.paragraph(words))
            self.offer = Offer(shell, "offer")

    def connect(self, tabs: Any, picture: Any) -> None:
        """Joins buttons and handlers.

        Args:
            tabs: of the views.
            picture: field of the view Try.
        """
        showing = [self.said, self.progress, self.stage, self.stop, self.teach]
        self.teach.click(self.on_teach, None, showing, concurrency_limit=None, **PRIVATE).then(
            self.shell.refresh, None, self.shell.parts, **PRIVATE
        )
        self.stop.click(self.on_stop, None, self.stage, **PRIVATE)
        self.offer.connect(picture, tabs)

    @sentences(5)
    def on_teach(self) -> Iterator[list[Any]]:
        """Draws the images, starts the lesson and shows it to its end."""
        skip, begun = gr.skip(), False
        for moment in moments(self._started()):
            first = [gr.update(visible=True), gr.update(interactive=False)]
            stage = skip if moment.stage is None else moment.stage
            yield [skip if begun else "", moment.bar, stage, *([skip, skip] if begun else first)]
            begun = True
        teaching = self.session.teaching
        told = html.error("the lesson ended without a result; the model is as it was.")
        if teaching is not None:
            told = html.error(teaching.error) if teaching.taught is None else _report(teaching.taught)
        yield [told, "", "", gr.update(visible=False), gr.update(interactive=True)]

    def on_stop(self) -> str:
        """Ends the lesson at its next step."""
        self.session.stop()
        return html.paragraph("Stopping.")

    def _started(self) -> Teaching:
        """The lesson; its drawings are deleted like copies that the browser sent."""
        draft = Draft()
        draft.add([files_of(example.write(self.session.uploads.folder / f"example-{uuid.uuid4().hex}"))], "")
        try:
            return self.session.teach(draft.check(), example.LESSON, draft.paths)
        except BaseException:
            self.session.uploads.discard(draft.paths)
            raise

    def _card(self) -> Any:
        return gr.update(visible=self.session.newest() is None)

    def _now(self) -> Any:
        """Whether the example is all that the model knows."""
        names = [task.name for task in self.session.tasks()]
        return gr.update(visible=names == [example.LESSON] and knows_example(self.session.classes()))


class Offer:
    """Drawings that a model which knows the example has not seen, as buttons; made inside ``gr.Blocks``.

    Args:
        shell: the frame.
        elem_id: of the element.
    """

    def __init__(self, shell: Shell, elem_id: str) -> None:
        self.session = shell.session
        chance = Random()
        self.drawings = [
            (n, chance.randrange(_FIRST_NEW, 10**6)) for n in chance.sample(example.CLASSES, _OFFERED)
        ]
        buttons = "".join(
            f'<button type="button" data-number="{i}" aria-label="Try drawing {i + 1}">'
            f'<img src="{thumbnail(example.drawn(name, seed))}" alt=""></button>'
            for i, (name, seed) in enumerate(self.drawings)
        )
        template = f'<div class="offer">{buttons}</div>'
        self.part = gr.HTML("", html_template=template, js_on_load=_CHOOSE, elem_id=elem_id)

    def connect(self, picture: Any, tabs: Any | None = None) -> None:
        """A drawing that is chosen goes into the field of the view Try.

        Args:
            picture: that field.
            tabs: to turn to that view; None where it is shown already.
        """

        def choose(chosen: gr.EventData) -> Any:
            file = self._written(int(chosen.number))
            return file if tabs is None else [file, gr.update(selected="try")]

        self.part.choose(choose, None, picture if tabs is None else [picture, tabs], **PRIVATE)

    def _written(self, number: int) -> str:
        """The file of a drawing, under a name that does not tell what it is."""
        folder = self.session.uploads.folder / f"drawing-{uuid.uuid4().hex}"
        folder.mkdir()
        file: Path = folder / f"drawing-{number + 1}.png"
        example.drawn(*self.drawings[number]).save(file)
        return str(file)


def knows_example(classes: list[str]) -> bool:
    """Whether a model that knows these classes can be asked about the drawings."""
    return set(example.CLASSES) <= set(classes)


def _about() -> str:
    return (
        f"Three classes of simple drawings, {example.EACH} of each, made on this computer. One press teaches "
        "them to the model, and you can see what it says of new ones. “Start again” takes the example out."
    )


def _report(taught: Taught) -> str:
    told = f"The model has learned {', '.join(taught.record.classes)} in {taught.seconds:.0f} s."
    if taught.held_back is None:
        return html.done(told)
    answers = taught.held_back.answers
    right = sum(true == found for true, found in answers)
    return html.done(
        f"{told} Of {len(answers)} drawings that were held back it names {right} rightly "
        f"({percent(taught.held_back.accuracy)} %)."
    )

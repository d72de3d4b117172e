"""What all views share: the line about the model, messages, and what changes with the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from inspect import isgeneratorfunction
from typing import Any

import gradio as gr

from duallora.app import html
from duallora.app.session import Session
from duallora.app.visitors import Visitor, Visitors
from duallora.errors import DualLoRAError

PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
"""Of every event: no programming interface, and no veil over what is shown."""


class Shell:
    """The frame of the page.

    Args:
        session: the model.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.visitors = Visitors(session.uploads)
        self._parts: list[tuple[Any, Callable[[Visitor], Any]]] = []

    def follows(self, component: Any, value: Callable[[], Any]) -> Any:
        """A component that is drawn anew whenever the model may have changed; gives the component."""
        return self.follows_for_each(component, lambda _: value())

    def follows_for_each(self, component: Any, value: Callable[[Visitor], Any]) -> Any:
        """The same where open pages may show other values."""
        self._parts.append((component, value))
        return component

    def title(self) -> None:
        """The heading of the page, and what the model is."""
        self.follows(gr.HTML(self.heading, elem_id="status", elem_classes=["said"]), self.status)

    def status(self) -> str:
        """What the model knows, or why it cannot be read."""
        try:
            model = self.session.newest()
        except DualLoRAError as error:
            return self.heading + html.error(error)
        if model is None:
            words = "The model is new and knows nothing yet. Teach it its first classes."
            return self.heading + html.paragraph(words)
        tasks = self.session.tasks()
        classes, backbone = len(model.learner.classes), model.about["backbone"]["name"]
        return self.heading + html.paragraph(
            f"{count(classes, 'class', 'classes')} from {count(len(tasks), 'lesson', 'lessons')}, the latest "
            f"“{tasks[-1].name}” on {when(tasks[-1].learned_at)}. Method {model.about['method']}, backbone "
            f"{backbone}."
        )

    @property
    def heading(self) -> str:
        """The name of the model."""
        return html.heading(1, self.session.folder.resolve().name)

    @property
    def parts(self) -> list[Any]:
        """The components of :meth:`refresh`."""
        return [component for component, _ in self._parts]

    def refresh(self, request: gr.Request) -> list[Any]:
        """New values for all parts; one that cannot be drawn says why."""
        visitor, values = self.visitors.of(request.session_hash), []
        for component, value in self._parts:
            try:
                values.append(value(visitor))
            except Exception as error:
                values.append(sentence_of(error) if isinstance(component, gr.HTML) else gr.skip())
        return values


def sentences(outputs: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For handlers whose first output is a message: whatever goes wrong becomes a sentence there.

    Args:
        outputs: how many outputs the handler has; the others stay as they are.
    """

    def instead(error: Exception) -> Any:
        sentence = sentence_of(error)
        return sentence if outputs == 1 else [sentence, *([gr.skip()] * (outputs - 1))]

    def around(handler: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(handler)
        def told(*given: Any, **named: Any) -> Any:
            try:
                return handler(*given, **named)
            except Exception as error:
                return instead(error)

        @wraps(handler)
        def told_on(*given: Any, **named: Any) -> Iterator[Any]:
            try:
                yield from handler(*given, **named)
            except Exception as error:
                yield instead(error)

        return told_on if isgeneratorfunction(handler) else told

    return around


def sentence_of(error: Exception) -> str:
    """Why something was not done; what we have no words for is said all the same: a page has no terminal."""
    if isinstance(error, DualLoRAError):
        return html.error(error)
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return html.error(f"internal error: {words}.")


def count(number: int, one: str, many: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{number:,} {one if number == 1 else many}"


def when(moment: str) -> str:
    """A moment of a record (ISO 8601, UTC) as people read it."""
    return f"{moment[:10]} {moment[11:16]} UTC" if "T" in moment else moment

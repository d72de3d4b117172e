"""The view Try: what is on one picture, before the camera, and on a folder of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from duallora.app import html
from duallora.app.answer_report import BELOW, DOUBTFUL, shown, table, why
from duallora.app.answers import answers
from duallora.app.camera import Camera
from duallora.app.image_field import ImageFields, chosen
from duallora.app.seen_file import opened
from duallora.app.shell import PRIVATE, Shell, sentence_of, sentences
from duallora.app.uploads import Found
from duallora.app.view_example import Offer, knows_example
from duallora.app.visitors import Visitor
from duallora.app.watching import Steps, watched
from duallora.data.images import is_image_name
from duallora.data.unreadable import left_out
from duallora.errors import DualLoRAError
from duallora.training import EVALUATION_BATCH

_TOP = 5
_MOST_IMAGES = 5_000
_STEP = 0.01
_BELOW_INFO = f"Answers above it and below {DOUBTFUL} are called doubtful. 0 never says unknown."
_NO_PICTURE = "Drop, choose or paste a picture, and what the model says of it stands here."


class Try:
    """The view; made inside ``gr.Blocks``.

    Args:
        shell: the frame.
    """

    def __init__(self, shell: Shell) -> None:
        self.shell, self.session = shell, shell.session
        gr.HTML(html.heading(2, "Try a picture"))
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                self._one()
            with gr.Column(scale=1, min_width=280):
                self.answer = gr.HTML(html.paragraph(_NO_PICTURE), elem_id="answer", elem_classes=["said"])
                self.why = gr.Button("Show why", visible=False, elem_id="show-why")
                self.reason = gr.HTML(elem_id="why", elem_classes=["said"])
        gr.HTML(html.heading(2, "Try the camera"))
        self.camera = Camera(self.session)
        gr.HTML(html.heading(2, "Try many pictures"))
        self.fields = ImageFields.make("Images to answer", "try", "/home/me/pictures")
        self.go = gr.Button("Answer all", elem_id="answer-all")
        self.reading = gr.HTML(elem_id="answers-progress")
        self.answers = gr.HTML(elem_id="answers", elem_classes=["said"])

    def _one(self) -> None:
        self.picture = gr.Image(
            label="Picture",
            sources=["upload", "clipboard"],
            type="filepath",
            image_mode=None,
            height=300,
            buttons=[],
            placeholder="Drop a picture here, or click to choose one",
            elem_id="picture",
            elem_classes=["upload"],
        )
        with self.shell.follows(gr.Column(visible=False, elem_id="example-offer"), self._knows_example):
            gr.HTML(html.paragraph("Or try one of these drawings, which the model has not seen:"))
            self.offer = Offer(self.shell, "offer-more")
        slider = gr.Slider(
            0,
            1,
            value=BELOW,
            step=_STEP,
            label="Unknown below a familiarity of",
            info=_BELOW_INFO,
            buttons=[],
            elem_id="unknown-below",
        )
        self.below = self.shell.follows_for_each(slider, self._own_below)

    def connect(self) -> None:
        """Joins inputs and handlers."""
        one, told = [self.picture, self.below], [self.answer, self.why, self.reason]
        self.picture.change(self.on_picture, one, told, preprocess=False, **PRIVATE)
        self.below.release(self.on_picture, one, told, preprocess=False, **PRIVATE)
        self.why.click(self.on_why, self.picture, [self.reason, self.why], preprocess=False, **PRIVATE)
        self.offer.connect(self.picture)
        self.camera.connect(self.picture)
        many = [*self.fields.all, self.below]
        shown_in = [self.answers, self.fields.images, self.fields.folder, self.reading]
        for event in (self.go.click, self.fields.path.submit):
            event(self.on_many, many, shown_in, **PRIVATE)

    def _knows_example(self) -> Any:
        return gr.update(visible=knows_example(self.session.classes()))

    def _own_below(self, visitor: Visitor) -> Any:
        """Sets the slider to the model's own value; where that is as before, what the user chose stays."""
        own = self.session.unknown_below()
        if own == visitor.unknown_below:
            return gr.skip()
        visitor.unknown_below = own
        if own is None:
            return gr.update(value=BELOW, info=_BELOW_INFO)
        value = max(round(own, 2), _STEP)  # 0 would never say unknown
        return gr.update(value=value, info=f"{value:.2f} is this model's own value. {_BELOW_INFO}")

    def on_picture(self, payload: dict[str, Any] | None, below: float, request: gr.Request) -> list[Any]:
        """What is on one picture; what was said of the one before is gone."""
        gone = [gr.update(visible=False), ""]
        try:
            image = self.shown_image(payload, request)
            if image is None:
                return [html.paragraph(_NO_PICTURE), *gone]
            model = self.session.model()
            (answer,) = answers(model, [model.preprocess(image)], ["picture"], _TOP, float(below))
        except Exception as error:
            return [sentence_of(error), *gone]
        # With a single class nothing speaks for it over others.
        explained = len(model.learner.classes) > 1
        return [shown(answer, float(below)), gr.update(visible=explained), ""]

    @sentences(2)
    def on_why(self, payload: dict[str, Any] | None, request: gr.Request) -> list[Any]:
        """Which parts of the picture speak for the answer."""
        from duallora.explaining.explain import explain

        image = self.shown_image(payload, request)
        if image is None:
            raise DualLoRAError("there is no picture; choose one first.")
        return [why(explain(self.session.model().learner, image)), gr.update(visible=False)]

    def shown_image(self, payload: dict[str, Any] | None, request: gr.Request) -> Image.Image | None:
        """The picture in the field, decoded; None where there is none.

        Raises:
            DualLoRAError: it cannot be read.
        """
        visitor = self.shell.visitors.of(request.session_hash)
        path = self.shell.visitors.show(visitor, payload or None)
        if not payload or path is None:
            return None
        try:
            return self.session.decoders.read(path)
        except DualLoRAError as error:
            name = str(payload.get("orig_name") or path.name)
            raise DualLoRAError(str(error).replace(str(path), name)) from error

    @sentences(4)
    def on_many(
        self, images: str, folder: str, path: str, below: float, request: gr.Request
    ) -> Iterator[list[Any]]:
        """A table and a CSV file of many pictures."""
        self.session.model()
        visitor, skip = self.shell.visitors.of(request.session_hash), gr.skip()
        try:
            with self.shell.visitors.given(visitor, chosen(images, folder), path or "") as given:
                steps = self.answering([each for source in given for each in source], float(below))
                told = yield from watched(steps, "Answering", lambda bar: [skip, skip, skip, bar])
        except Exception:
            yield [skip, skip, skip, ""]
            raise
        yield [told, "", "", ""]

    def answering(self, found: list[Found], below: float) -> Steps[str]:
        """The table about some files, step by step.

        Raises:
            DualLoRAError: there are none, or too many.
        """
        # Folders are walked as `duallora predict` walks them.
        others = [e.path for e in found if len(e.parts) > 1 and not is_image_name(e.path)]
        found = [each for each in found if len(each.parts) == 1 or is_image_name(each.path)]
        if not found:
            told = f" {left_out(others)}." if others else ""
            raise DualLoRAError(
                f"there are no images; choose some, a zip, or the path of a folder that has some.{told}"
            )
        if len(found) > _MOST_IMAGES:
            raise DualLoRAError(
                f"these are {len(found):,} images, more than {_MOST_IMAGES:,}; `duallora predict` takes any "
                "number."
            )
        records, bad = yield from self._asked(found, below)
        return table(records, bad) + (html.paragraph(f"{left_out(others)}.") if others else "")

    def _asked(
        self, found: list[Found], below: float
    ) -> Steps[tuple[list[dict[str, Any]], list[tuple[str, str]]]]:
        """Answers as records, and the unreadable files with the reason; one image is open at a time."""
        model = self.session.model()
        records: list[dict[str, Any]] = []
        bad: list[tuple[str, str]] = []
        images: list[Any] = []
        names: list[str] = []
        for done, each in enumerate(found):
            yield done, len(found)
            try:
                images.append(model.preprocess(opened(each.path, self.session.decoders.read)))
                names.append(each.name)
            except DualLoRAError as error:
                bad.append((each.name, str(error)))
            if images and (len(images) == EVALUATION_BATCH or done + 1 == len(found)):
                records += [a.record for a in answers(model, images, names, 3, below)]
                images, names = [], []
        return records, bad

"""The view Try: what is on one picture, and on a folder of them."""

from __future__ import annotations

import base64
from typing import Any

import gradio as gr

from duallora.app import html
from duallora.app.folder_picker import FILES, PATH, chosen, folder_picker
from duallora.app.seen_file import Seen
from duallora.app.session import NOTHING_LEARNED, Answer
from duallora.app.shell import PRIVATE, Shell, count, sentences
from duallora.app.uploads import Found
from duallora.data.images import is_image_name
from duallora.data.unreadable import left_out
from duallora.errors import DualLoRAError
from duallora.predictions import as_csv

_TOP = 5
_MOST_ROWS = 500
_MOST_IMAGES = 5_000
_BELOW = 0.2
_DOUBTFUL = 0.5  # by the formula of the familiarity, 95 of 100 images of the classes taught lie above


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
                self.picture = gr.Image(
                    label="Picture",
                    sources=["upload", "webcam", "clipboard"],
                    type="filepath",
                    image_mode=None,
                    height=300,
                    buttons=[],
                    elem_id="picture",
                    elem_classes=["upload"],
                )
                self.below = gr.Slider(
                    0,
                    1,
                    value=_BELOW,
                    step=0.05,
                    label="Unknown below a familiarity of",
                    info=f"Answers above it and below {_DOUBTFUL} are called doubtful. 0 never says unknown.",
                    buttons=[],
                    elem_id="unknown-below",
                )
            with gr.Column(scale=1, min_width=280):
                self.answer = gr.HTML(
                    html.paragraph("Drop, choose, paste or photograph a picture."),
                    elem_id="answer",
                    elem_classes=["said"],
                )
        gr.HTML(html.heading(2, "Try a folder"))
        with gr.Row(equal_height=False):
            self.files = gr.File(
                label=FILES,
                file_count="multiple",
                file_types=["image", ".zip"],
                height=150,
                elem_id="try-files",
                elem_classes=["upload"],
            )
            with gr.Column(min_width=280):
                self.chosen = folder_picker("try-chosen")
                self.folder = gr.Textbox(
                    label=PATH,
                    placeholder="/home/me/pictures",
                    max_lines=1,
                    elem_id="try-folder",
                )
                self.go = gr.Button("Answer all", elem_id="answer-all")
        self.answers = gr.HTML(elem_id="answers", elem_classes=["said"])

    def connect(self) -> None:
        """Joins inputs and handlers."""
        one = [self.picture, self.below]
        self.picture.change(self.on_picture, one, self.answer, preprocess=False, **PRIVATE)
        self.below.release(self.on_picture, one, self.answer, preprocess=False, **PRIVATE)
        many = [self.files, self.chosen, self.folder, self.below]
        working = {**PRIVATE, "show_progress": "minimal"}
        for event in (self.go.click, self.folder.submit):
            event(self.on_many, many, [self.answers, self.files, self.chosen], preprocess=False, **working)

    @sentences(1)
    def on_picture(self, payload: dict[str, Any] | None, below: float, request: gr.Request) -> str:
        """What is on one picture."""
        visitor = self.shell.visitors.of(request.session_hash)
        path = self.shell.visitors.show(visitor, payload or None)
        if not payload or path is None:
            return html.paragraph("Drop, choose, paste or photograph a picture.")
        name = str(payload.get("orig_name") or path.name)
        try:
            self.session.decoders.read(path)
        except DualLoRAError as error:
            raise DualLoRAError(str(error).replace(str(path), name)) from error
        (answer,) = self.session.ask([path], _TOP, float(below))
        return shown(answer, float(below))

    @sentences(3)
    def on_many(self, files: Any, folder: str, path: str, below: float, request: gr.Request) -> list[Any]:
        """A table and a CSV file of many pictures."""
        if self.session.newest() is None:
            raise DualLoRAError(NOTHING_LEARNED)
        visitor = self.shell.visitors.of(request.session_hash)
        payload = [*(files or []), *chosen(folder)]
        with self.shell.visitors.given(visitor, payload, path or "") as given:
            return [self.answered([each for source in given for each in source], float(below)), None, ""]

    def answered(self, found: list[Found], below: float) -> str:
        """The table about some files.

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
        seen = [Seen.at(each, self.session.decoders.read) for each in found]
        good = [(each.name, s.path) for each, s in zip(found, seen, strict=True) if s.reason is None]
        bad = [(each.name, s.reason) for each, s in zip(found, seen, strict=True) if s.reason is not None]
        answers = self.session.ask([path for _, path in good], 3, below) if good else []
        records = [a.record | {"path": name} for a, (name, _) in zip(answers, good, strict=True)]
        return _many(records, bad) + (html.paragraph(f"{left_out(others)}.") if others else "")


def shown(answer: Answer, below: float) -> str:
    """An answer about one picture, as HTML."""
    record = answer.record
    familiarity = 1 - record["unknown"]
    if record["called_unknown"]:
        first = '<p class="answer">unknown</p>' + html.paragraph(
            f"It fits nothing that was learned: its familiarity {familiarity:.2f} is below {below:.2f}. The "
            f"nearest class is {record['top'][0]['class']}."
        )
    else:
        best = f"{record['class']} ({100 * record['probability']:.1f} %)"
        doubtful = _is_doubtful(record)
        first = f'<p class="answer">{html.text(best)}{", doubtful" if doubtful else ""}</p>'
        first += html.paragraph(
            f"Familiarity {familiarity:.2f}. It may fit nothing that was learned: of 100 images of the "
            f"classes taught, about 95 lie above {_DOUBTFUL:.2f}."
            if doubtful
            else f"Familiarity {familiarity:.2f}."
        )
    lesson = html.paragraph(
        f"Lesson “{record['task']}” (confidence {100 * record['task_confidence']:.1f} %)."
    )
    top = [
        (each["class"], each["probability"], f"{100 * each['probability']:.1f} %") for each in record["top"]
    ]
    classes = html.bars("Most probable classes", ("Class", "Probability"), top)
    return first + lesson + classes + _gate(answer)


def _is_doubtful(record: dict[str, Any]) -> bool:
    return bool(not record["called_unknown"] and 1 - record["unknown"] < _DOUBTFUL)


def _gate(answer: Answer) -> str:
    weights = sorted(answer.weights, key=lambda each: -each[1])[:8]
    rest = len(answer.weights) - len(weights)
    others = html.paragraph(f"{count(rest, 'other lesson has', 'other lessons have')} less.") if rest else ""
    if answer.gated:
        rows = [(name, w, f"{w:.2f}" if w > 0 else "0, not active") for name, w in weights]
        return html.bars("Residual adapters that were active", ("Lesson", "Weight"), rows) + others
    rows = [(name, w, f"{100 * w:.1f} %") for name, w in weights]
    said = html.paragraph(
        "This model has no residual adapters; this is how probable each lesson is.", "aside"
    )
    return html.bars("Lesson that the picture belongs to", ("Lesson", "Probability"), rows) + others + said


def _many(records: list[dict[str, Any]], bad: list[tuple[str, str]]) -> str:
    told = f"{count(len(records), 'image', 'images')} answered"
    told += f"; {count(len(bad), 'file', 'files')} could not be read." if bad else "."
    parts = [html.done(told)]
    if records:
        csv = base64.b64encode(as_csv(records)).decode()
        parts.append(
            f'<p><a class="file" download="predictions.csv" href="data:text/csv;base64,{csv}">'
            f"Save all answers as predictions.csv ({count(len(records), 'line', 'lines')})</a></p>"
        )
        rows = [
            [
                r["path"],
                f"{r['class']}, doubtful" if _is_doubtful(r) else r["class"],
                f"{100 * r['probability']:.1f} %",
                r["task"],
                f"{100 * r['task_confidence']:.1f} %",
                f"{1 - r['unknown']:.2f}",
            ]
            for r in records[:_MOST_ROWS]
        ]
        caption = "Answers" + (f", the first {_MOST_ROWS}" if len(records) > _MOST_ROWS else "")
        header = ["Image", "Class", "Probability", "Lesson", "Confidence", "Familiarity"]
        parts.append(html.table(caption, header, rows, (2, 4, 5)))
    if bad:
        parts.append(html.listing("Files that could not be read", [f"{name}: {why}" for name, why in bad]))
    return "".join(parts)

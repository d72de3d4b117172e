"""What the view Try tells of pictures, as HTML."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from duallora.app import html
from duallora.app.answers import Answer
from duallora.app.shell import count
from duallora.explaining.pictures import as_png
from duallora.predictions import as_csv

if TYPE_CHECKING:
    from duallora.explaining.explain import Explanation

BELOW = 0.2
"""Familiarity below which an answer is unknown, where neither the model nor the slider says otherwise."""

DOUBTFUL = 0.5
"""By the formula of the familiarity, 95 of 100 images of the classes taught lie above."""

_MOST_ROWS = 500
_MOST_LIVE = 3  # classes of an answer that changes several times a second


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
            f"classes taught, about 95 lie above {DOUBTFUL:.2f}."
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


def why(explanation: Explanation) -> str:
    """What speaks for the answer about a picture, as HTML."""
    address = f"data:image/png;base64,{base64.b64encode(as_png(explanation.overlay)).decode()}"
    return html.heading(3, "Why this answer") + html.figure(address, explanation.text)


def live(answer: Answer, below: float) -> str:
    """An answer about a frame of the camera, short and always of the same height, as HTML."""
    record = answer.record
    doubtful = ", doubtful" if _is_doubtful(record) else ""
    told = f"{record['class']} ({100 * record['probability']:.1f} %){doubtful}"
    first = "unknown" if record["called_unknown"] else told
    top = [
        (c["class"], c["probability"], f"{100 * c['probability']:.1f} %") for c in record["top"][:_MOST_LIVE]
    ]
    return (
        f'<p class="answer">{html.text(first)}</p>'
        + html.paragraph(f"Familiarity {1 - record['unknown']:.2f}; unknown below {below:.2f}.")
        + html.bars("Most probable classes", ("Class", "Probability"), top)
    )


def _is_doubtful(record: dict[str, Any]) -> bool:
    return bool(not record["called_unknown"] and 1 - record["unknown"] < DOUBTFUL)


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


def table(records: list[dict[str, Any]], bad: list[tuple[str, str]]) -> str:
    """Answers about many pictures, as a table and a file, as HTML.

    Args:
        records: as ``duallora predict --json`` gives them.
        bad: name and reason of the files that could not be read.
    """
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

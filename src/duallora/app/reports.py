"""What the view Teach tells of the classes that were given, and of a lesson, as HTML."""

from __future__ import annotations

from typing import Any

from duallora.app import html
from duallora.app.intake import FEW, Check
from duallora.app.lesson_thread import Taught
from duallora.app.shell import count
from duallora.app.twins import MOST
from duallora.storage.documents import percent

_MOST_TWINS = 30


def check_report(check: Check, known: set[str]) -> str:
    """A check of the classes to be taught.

    Args:
        check: of them.
        known: classes that the model knows.
    """
    if not check.classes:
        return html.paragraph("No class yet.")
    rows = [
        [each.name, f"{len(each.images)}", f"{each.held_back}", _remarks(each, each.name in known)]
        for each in check.classes
    ]
    smallest = check.smallest
    parts = [
        html.paragraph(
            f"{count(len(check.classes), 'class', 'classes')}, {count(check.images, 'image', 'images')}; "
            f"the smallest class is {smallest.name} with {len(smallest.images)}."
        ),
        html.table("Check of the new classes", ["Class", "Images", "Held back", "Remarks"], rows, (1, 2)),
    ]
    bad = [(each.name, seen) for each in check.classes for seen in each.unreadable]
    if bad:
        summary = f"{count(len(bad), 'file', 'files')} cannot be read and will be left out"
        parts.append(html.listing(summary, [f"{name}: {seen.name}: {seen.reason}" for name, seen in bad]))
    if check.twins:
        parts.append(_twins(check))
    refusal = check.refusal()
    return "".join(parts) + (html.error(refusal) if refusal else "")


def lesson_report(taught: Taught) -> str:
    """What came of a lesson, as HTML."""
    record, held = taught.record, taught.held_back
    learned = (
        f"The lesson “{record.name}” is learned: {count(len(record.classes), 'class', 'classes')} from "
        f"{count(record.train_images, 'image', 'images')} in {_duration(taught.seconds)}."
    )
    parts = [html.heading(3, "3. What came of it"), html.done(learned)]
    if len(record.classes) == 1:
        parts.append(
            html.paragraph(
                "A single class has nothing to be told apart from in its lesson, so only its statistics "
                "were learned."
            )
        )
    if held is None:
        parts.append(
            html.paragraph(
                f"Held-back accuracy: not measured, for no class has {FEW} images. With more of them "
                "every fifth is held back."
            )
        )
    else:
        right = sum(true == found for true, found in held.answers)
        parts.append(
            html.paragraph(
                f"Held-back accuracy: {percent(held.accuracy)} % ({right} of {len(held.answers)} images "
                "that were not learned from, each answered among all classes)."
            )
        )
        parts.append(_by_class(taught))
    return "".join(parts) + _mistaken(taught)


def _twins(check: Check) -> str:
    many = count(len(check.twins), "picture was", "pictures were")
    summary = f"{'at least ' if len(check.twins) >= MOST else ''}{many} given to two classes"
    entries = [
        f"{t.first[1]} ({t.first[0]}) and {t.second[1]} ({t.second[0]}): "
        + ("the same file" if t.exact else "nearly the same picture")
        for t in check.twins
    ]
    return html.listing(summary, entries, _MOST_TWINS)


def _remarks(each: Any, known: bool) -> str:
    remarks = []
    if known:
        remarks.append("known already; it learns these images too")
    if 0 < len(each.images) < FEW:
        remarks.append(f"few images; none is held back below {FEW}")
    if each.unreadable:
        remarks.append(f"{len(each.unreadable)} unreadable")
    if each.repeated:
        remarks.append(f"{count(len(each.repeated), 'copy', 'copies')} left out")
    return "; ".join(remarks) or "fine"


def _by_class(taught: Taught) -> str:
    """Images and held-back answers of every class of a lesson."""
    answers = taught.held_back.answers if taught.held_back is not None else ()
    rows = []
    for name, images in taught.learned_of.items():
        own = [found for true, found in answers if true == name]
        right = sum(found == name for found in own)
        rows.append([name, f"{images}", f"{right} of {len(own)}" if own else "none held back"])
    return html.table("By class", ["Class", "Learned from", "Held back and right"], rows, (1, 2))


def _mistaken(taught: Taught) -> str:
    if not taught.had_old:
        return ""
    title = html.heading(3, "New images that are taken for an old class")
    if not taught.mistaken:
        return title + html.paragraph("None.")
    shown = [
        (
            m.picture,
            f"{m.name} ({m.true}): taken for {m.found} ({m.probability:.2f})"
            + (", held back" if m.held_back else ""),
        )
        for m in taught.mistaken
    ]
    more = taught.mistaken_images - len(shown)
    words = (
        count(taught.mistaken_images, "image", "images")
        + (f"; the {len(shown)} surest" if more else "")
        + "."
    )
    return title + html.paragraph(words) + html.pictures(shown)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} minutes"

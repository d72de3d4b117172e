"""What undo would do, in words, and names for lessons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from duallora.outputs import free_name

_LONGEST_NAME = 60

Lessons = Mapping[int, tuple[str, list[str]]]
"""Name and classes of each lesson, by its place among all that were learned."""


@dataclass(frozen=True)
class Step:
    """What can be taken back.

    Attributes:
        generation: the state that it would be taken back from.
        question: what would go, in words.
        answer: what went, in words.
        whole: whether it is all that the model has learned, so that the model starts again.
    """

    generation: str
    question: str
    answer: str
    whole: bool = False


def step_back(manifest: Mapping[str, Any]) -> Step | None:
    """What ``undo`` would take back from a generation; None where it has nothing before it.

    Args:
        manifest: of the generation.
    """
    previous = manifest.get("previous")
    if previous is None:
        return None
    now, then = _lessons(manifest), _lessons(previous)
    question = _difference(now, then, "would be taken back", "would come back", "would go back")
    answer = _difference(now, then, "is taken back", "is back", "is back")
    return Step(str(manifest["weights"]), question, f"Undone. {answer}")


def first_lesson(manifest: Mapping[str, Any]) -> Step | None:
    """The only lesson of a generation that has nothing before it; None where it is not so.

    Args:
        manifest: of the generation.
    """
    lessons = _lessons(manifest)
    if manifest.get("previous") is not None or len(lessons) != 1:
        return None
    ((name, classes),) = lessons.values()
    what = f"The lesson {quoted([name])} is all that the model has learned (classes: {', '.join(classes)})."
    question = f"{what} It would be deleted, and the model would know nothing again."
    answer = f"The lesson {quoted([name])} is deleted. The model knows nothing and starts again."
    return Step(str(manifest["weights"]), question, answer, whole=True)


def lesson_name(classes: Sequence[str], taken: set[str]) -> str:
    """A name for a lesson: its classes, with a number where the model has learned one of that name."""
    base = ", ".join(classes)
    if len(base) > _LONGEST_NAME:
        base = f"{classes[0][:_LONGEST_NAME]} and {len(classes) - 1} more"
    return free_name(base, taken)


def quoted(names: Iterable[str]) -> str:
    """Names in quotation marks: that of a lesson may be a list of classes."""
    return ", ".join(f"“{name}”" for name in names)


def _lessons(manifest: Mapping[str, Any]) -> Lessons:
    """Lessons that are not forgotten, by their place, which stays where a name may change."""
    tasks = enumerate(manifest["tasks"])
    return {place: (str(task["name"]), task["classes"]) for place, task in tasks if task["classes"]}


def _difference(now: Lessons, then: Lessons, taken: str, back: str, other: str) -> str:
    """What undo does: lessons by name, and the classes of lessons that stay."""
    learned = [lesson for place, lesson in now.items() if place not in then]
    lost = [name for place, (name, _) in then.items() if place not in now]
    parts = []
    if learned:
        classes = [each for _, own in learned for each in own]
        names = quoted(name for name, _ in learned)
        parts.append(f"The lesson {names} {taken} (classes: {', '.join(classes)}).")
    if lost:
        parts.append(f"The forgotten lesson {quoted(lost)} {back}.")
    again = [c for place in then if place in now for c in then[place][1] if c not in now[place][1]]
    if again:
        parts.append(f"The forgotten class {', '.join(dict.fromkeys(again))} {back}.")
    return " ".join(parts) or f"The model {other} to the state before its last change."

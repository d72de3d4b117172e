"""Makes the picture of the README: three lessons of handwritten digits, learned one after another.

    python tools/readme_picture.py               # docs/images/three-lessons.svg, about a minute

What the picture says is measured: after each lesson, the first lesson's images that were not taught are
answered among all classes learned so far. DualLoRA at its defaults is drawn beside LoRA without protection,
both on the embedded backbone with seed 0.
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path

from PIL import Image

from duallora import METHODS, ContinualLearner, streams

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "three-lessons.svg"
LESSONS = (3, 3, 4)  # classes of each
LINES = {"duallora": ("DualLoRA", "#1a7f5a"), "lora": ("LoRA without protection", "#c2410c")}
WIDTH, HEIGHT = 860, 330
LEFT, COLUMN = 70, 262  # where the first lesson begins, and how wide a lesson is
TOP, BOTTOM = 150, 280  # of the plot: 100 and 0 percent


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURE, help="the SVG to write")
    parser.add_argument("--train-per-class", type=int, default=60, help="training images of a class")
    arguments = parser.parse_args()
    stream = streams.split(
        streams.DigitsDataset(),
        LESSONS,
        order_seed="alphabetical",
        train_per_class=arguments.train_per_class,
    )
    measured = {name: first_lesson(name, stream) for name in LINES}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(drawn(stream, measured), encoding="utf-8")
    for name, accuracies in measured.items():
        print(name, *(f"{100 * accuracy:.1f}" for accuracy in accuracies))


def first_lesson(name: str, stream: streams.Stream) -> list[float]:
    """Accuracy in [0, 1] on the first lesson's test images after each lesson."""
    learner = ContinualLearner(method=METHODS[name].config(), augment="crop", seed=0)
    accuracies = []
    for task in stream:
        learner.learn(task.train, name=task.name)
        accuracies.append(float(learner.evaluate(stream.tasks[0].test).accuracy))
    return accuracies


def drawn(stream: streams.Stream, measured: dict[str, list[float]]) -> str:
    """The whole picture as SVG; it names no font file and loads nothing."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14" fill="#1f2937">',
        "<title>Accuracy on the first of three lessons, after each lesson</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff" stroke="#d1d5db"/>',
    ]
    for number, task in enumerate(stream):
        parts += lesson(number, task)
    for percent in (0, 50, 100):
        y = height(percent / 100)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 24}" stroke="#e5e7eb"/>')
        parts.append(text(LEFT - 8, y + 5, f"{percent} %", anchor="end", fill="#6b7280"))
    for name, accuracies in measured.items():
        parts += line(*LINES[name], accuracies, above=name == "duallora")
    caption = "Share of the first lesson's unseen images that are still recognised, after each lesson"
    parts.append(text(WIDTH / 2, HEIGHT - 16, caption, anchor="middle", fill="#4b5563"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def lesson(number: int, task: streams.Task) -> list[str]:
    """The head of a column: what the lesson teaches, one training image a class."""
    left = LEFT + COLUMN * number
    parts = [text(left + 4, 34, f"Lesson {number + 1}", weight="bold")]
    seen: dict[int, str] = {}
    for index, target in enumerate(task.train.targets):
        if target not in seen:
            seen[target] = embedded(task.train[index][0])
    for place, target in enumerate(sorted(seen)):
        parts.append(
            f'<image x="{left + 4 + 58 * place}" y="48" width="50" height="50" href="{seen[target]}"/>'
        )
    return parts


def line(label: str, colour: str, accuracies: list[float], above: bool) -> list[str]:
    """A method's accuracies, a point under each lesson, the label under the last piece of the line."""
    points = [(LEFT + 90 + COLUMN * number, height(value)) for number, value in enumerate(accuracies)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="3"/>']
    for (x, y), value in zip(points, accuracies, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        share = f"{100 * value:.0f} %"
        parts.append(text(x, y + (-11 if above else 23), share, anchor="middle", fill=colour, weight="bold"))
    x, y = points[-1]
    parts.append(text(x - 30, y + 24, label, anchor="end", fill=colour, weight="bold"))
    return parts


def embedded(image: Image.Image) -> str:
    """An image as a data address: dark ink on light paper."""
    buffer = io.BytesIO()
    Image.eval(image.convert("L"), lambda value: 255 - round(value * 0.94)).save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def height(accuracy: float) -> float:
    """Where an accuracy lies in the plot."""
    return BOTTOM - (BOTTOM - TOP) * accuracy


def text(
    x: float, y: float, words: str, anchor: str = "start", fill: str = "#1f2937", weight: str = "normal"
) -> str:
    """A line of text."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{fill}" font-weight="{weight}">{words}</text>'


if __name__ == "__main__":
    main()

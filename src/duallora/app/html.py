"""Fragments of the page: every name that a user gave is escaped here, and nothing is told by colour alone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from duallora.storage.documents import percent


def text(value: object) -> str:
    """A value as HTML shows it; file names that are no unicode are shown with escapes."""
    return escape(str(value).encode("utf-8", "backslashreplace").decode("utf-8"))


def heading(level: int, words: str) -> str:
    """A heading."""
    return f"<h{level}>{text(words)}</h{level}>"


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph; ``kind`` is its class."""
    return f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def error(sentence: object) -> str:
    """Why something was not done."""
    return f'<p class="note wrong"><strong>Not done:</strong> {text(sentence)}</p>'


def done(sentence: str) -> str:
    """That something was done."""
    return f'<p class="note right"><strong>Done:</strong> {text(sentence)}</p>'


def listing(summary: str, entries: Sequence[str], most: int = 50) -> str:
    """A list behind a summary, which the keyboard opens."""
    shown = [f"<li>{text(entry)}</li>" for entry in entries[:most]]
    if len(entries) > most:
        shown.append(f"<li>and {len(entries) - most:,} more</li>")
    return f"<details><summary>{text(summary)}</summary><ul>{''.join(shown)}</ul></details>"


def table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()
) -> str:
    """A table; its first column names the rows.

    Args:
        caption: what it shows.
        header: of the columns.
        rows: cells as text.
        numbers: columns that are aligned to the right.
    """
    places = set(numbers)

    def kind(column: int) -> str:
        return ' class="number"' if column in places else ""

    head = "".join(f'<th scope="col"{kind(i)}>{text(name)}</th>' for i, name in enumerate(header))
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{text(cell)}</th>' if i == 0 else f"<td{kind(i)}>{text(cell)}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return _scrolling(caption, head, body)


def bars(caption: str, header: tuple[str, str], shares: Sequence[tuple[str, float, str]]) -> str:
    """A bar chart as a table: name, bar, value in words.

    Args:
        caption: what it shows.
        header: of the names and of the values.
        shares: name, length from 0 to 1, and the value as it is read out.
    """
    rows = "".join(
        f'<tr><th scope="row">{text(name)}</th><td><div class="measure">'
        f'<span class="track" aria-hidden="true"><span class="bar" style="width:{_length(share)}"></span>'
        "</span> "
        f'<span class="value">{text(value)}</span></div></td></tr>'
        for name, share, value in shares
    )
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in header)
    return (
        f'<table class="bars"><caption>{text(caption)}</caption><thead class="unseen"><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def matrix(caption: str, names: Sequence[str], cells: Sequence[Sequence[float | None]]) -> str:
    """An accuracy matrix in percent: row = after that lesson, column = images of a lesson; None is empty."""
    head = "".join(f'<th scope="col" class="number">{text(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">after {text(name)}</th>'
        + "".join(
            '<td class="number"></td>'
            if share is None
            else f'<td class="number heat" style="--share:{share:.3f}">{percent(share)}</td>'
            for share in row
        )
        + "</tr>"
        for name, row in zip(names, cells, strict=True)
    )
    return _scrolling(caption, f'<th scope="col">after</th>{head}', body)


def progress(label: str, finished: int, total: int, left: str = "") -> str:
    """A progress bar; without a total it only shows that something is going on.

    Args:
        label: what is going on.
        finished: steps.
        total: steps; 0 where it is not known.
        left: how long it still takes, in words.
    """
    values = f' value="{finished}" max="{total}"' if total else ""
    count = f": {finished} of {total}" if total else ""
    return (
        f'<div class="progress"><progress aria-label="{text(label)}"{values}></progress>'
        f"<span>{text(label)}{count}{text(left and f', {left}')}</span></div>"
    )


def pictures(entries: Sequence[tuple[str, str]]) -> str:
    """Pictures with captions.

    Args:
        entries: ``data:`` address and caption.
    """
    # The caption says what there is to know, so that the picture itself needs no other words.
    figures = "".join(
        f'<figure><img src="{text(address)}" alt=""><figcaption>{text(caption)}</figcaption></figure>'
        for address, caption in entries
    )
    return f'<div class="pictures">{figures}</div>'


def figure(address: str, caption: str) -> str:
    """One picture; its caption says in words what it shows.

    Args:
        address: of the picture, as ``data:``.
        caption: below it.
    """
    image = f'<img src="{text(address)}" alt="">'
    return f'<figure class="one">{image}<figcaption>{text(caption)}</figcaption></figure>'


def _scrolling(caption: str, head: str, body: str) -> str:
    """A table; one that is wider than a narrow window scrolls in itself, also by keyboard."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption)}"><table class="plain">'
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _length(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.1f}%"

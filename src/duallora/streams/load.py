"""Streams by name or by path, with the options of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from duallora.errors import DualLoRAError
from duallora.streams.digits import DIGITS, DIGITS_TASKS, digits
from duallora.streams.domains import with_domains
from duallora.streams.folder import FolderDataset, train_and_val
from duallora.streams.split import split
from duallora.streams.task import Stream

_FOLDER_TASKS = 10


def load(
    stream: str,
    *,
    tasks: int | None = None,
    order: str | int = "1993",
    classes: int | None = None,
    train_per_class: int | None = None,
    holdout: int = 0,
    domains: Sequence[str] = (),
) -> Stream:
    """Loads the stream that a user asks for.

    Args:
        stream: ``"digits"``, or a folder with ``train/`` and ``val/``. Without ``val/``, or with ``holdout``,
            the test images are taken from the training images.
        tasks: number of tasks; None is 5 for the digits and 10 for a folder.
        order: ``"1993"`` or another seed of the class order, or ``"alphabetical"``.
        classes: as for ``split``.
        train_per_class: as for ``split``.
        holdout: as for ``split``.
        domains: show the same images in these domains, one task each.

    Raises:
        DualLoRAError: the folder is missing or unusable, or an option does not fit.
    """
    order_seed = _order_seed(order)
    if domains and tasks not in (None, len(domains)):
        raise DualLoRAError(
            f"{len(domains)} domains make {len(domains)} tasks: leave the number of tasks out"
        )
    folder = None if stream == DIGITS else _existing(stream)
    usual_tasks = DIGITS_TASKS if folder is None else _FOLDER_TASKS
    number = 1 if domains else usual_tasks if tasks is None else tasks
    if folder is None:
        made = digits(number, order_seed, classes=classes, train_per_class=train_per_class, holdout=holdout)
    else:
        train, val = train_and_val(folder)
        made = split(
            FolderDataset(train),
            number,
            test=None if val is None or holdout else FolderDataset(val),
            order_seed=order_seed,
            classes=classes,
            train_per_class=train_per_class,
            holdout=holdout,
            name=folder.resolve().name,
        )
    return with_domains(made, domains) if domains else made


def _order_seed(order: str | int) -> int | Literal["alphabetical"]:
    if order == "alphabetical":
        return "alphabetical"
    try:
        return int(order)
    except ValueError as error:
        raise DualLoRAError(f'unknown order {order!r}: it must be a number or "alphabetical"') from error


def _existing(stream: str) -> Path:
    if not Path(stream).is_dir():
        raise DualLoRAError(f"unknown stream {stream!r}: it is neither {DIGITS!r} nor an existing folder")
    return Path(stream)

"""Streams by name or by path, with the options of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from duallora.errors import DualLoRAError
from duallora.streams.by_domain import one_task_a_domain, pooled
from duallora.streams.by_path import FOLDER
from duallora.streams.collection import Collection, Request, Scenario, StreamEntry
from duallora.streams.copies import read_once, warn_of_copies
from duallora.streams.domains import with_domains
from duallora.streams.labels import refuse_two_labels
from duallora.streams.registry import find_entry
from duallora.streams.repeats import with_repeats
from duallora.streams.sizes import Sizes
from duallora.streams.split import split
from duallora.streams.task import Stream

DATA_FOLDER = Path("data")


def load(
    stream: str,
    *,
    tasks: Sizes | None = None,
    order: str | int = "1993",
    classes: int | None = None,
    train_per_class: int | None = None,
    holdout: int = 0,
    domains: Sequence[str] = (),
    data: Path | None = None,
    split_lists: Path | None = None,
    scenario: Scenario | None = None,
    first_classes: int | None = None,
    repeat: float = 0.0,
) -> Stream:
    """Loads the stream that a user asks for.

    Args:
        stream: a name of ``STREAMS``, ``folder:PATH``, ``hf:NAME``, or the path of a folder with ``train/``
            and ``val/`` or of a table. Without ``val/``, or with ``holdout``, the test images are taken from
            the training images.
        tasks: number of tasks, or the number of classes of each; None is the stream's usual number.
        order: ``"1993"`` or another seed of the class order, or ``"alphabetical"``.
        classes: as for ``split``.
        train_per_class: as for ``split``; with one task a domain, of each class in each domain.
        holdout: as for ``split``.
        domains: show the same images in these visible domains, one task each.
        data: folder that holds the data sets; None is ``data``.
        split_lists: folder of published lists of images to train and to test on, for streams that have such.
        scenario: ``"class"`` gives every task new classes, ``"domain"`` the same classes in a new domain of
            the data set's own; None is the stream's usual one.
        first_classes: number of classes of the first task, the others sharing the rest equally.
        repeat: share of the classes seen so far that comes back in every later task; see ``with_repeats``.

    Raises:
        DualLoRAError: the images are missing or unusable, or an option does not fit.
    """
    order_seed = _order_seed(order)
    if domains:
        _refuse(f"{len(domains)} domains", len(domains), tasks, first_classes, repeat)
        if scenario == "class":
            raise DualLoRAError("--domains gives one task a domain: leave the scenario class out")
    entry, rest = find_entry(stream)
    if split_lists is not None and not entry.takes_lists:
        raise DualLoRAError(f"{stream} has no published lists of images: leave the split lists out")
    number: Sizes = 1 if domains else entry.tasks if tasks is None else tasks
    wanted = entry.tasks if domains or tasks is None else tasks
    collection = entry.load(
        Request(entry, rest, data or DATA_FOLDER, split_lists, holdout > 0, wanted, classes, first_classes)
    )
    if not domains and _by_domain(stream, entry, collection, scenario):
        count = len(collection.parts)
        what = f"the {count} domains of {stream}"
        _refuse(what, count, tasks, first_classes, repeat, ", or pool them with the scenario class")
        made = one_task_a_domain(
            collection, order_seed, classes=classes, train_per_class=train_per_class, holdout=holdout
        )
        return _checked(made, entry)
    train, test = pooled(collection)
    made = split(
        train,
        number,
        test=None if holdout else test,
        order_seed=order_seed,
        classes=classes,
        train_per_class=train_per_class,
        holdout=holdout,
        name=collection.name if len(collection.parts) == 1 else f"{collection.name} (classes)",
        first_classes=first_classes,
        group=collection.group,
    )
    made = _checked(replace(made, augmentation=collection.augmentation), entry)
    return with_domains(made, domains) if domains else with_repeats(made, repeat)


def _checked(stream: Stream, entry: StreamEntry) -> Stream:
    """Warns of images in both parts and refuses two labels of one, where the images are the user's own.

    What is published is learned as it is, so that figures can be compared.
    """
    if entry is FOLDER:
        train, test = ([getattr(task, part) for task in stream] for part in ("train", "test"))
        hash_of = read_once()
        refuse_two_labels((each for view in [*train, *test] for each in view.labelled), hash_of)
        learned, tested = ([file for view in views for file in view.files] for views in (train, test))
        warn_of_copies(learned, tested, hash_of)
    return stream


def _refuse(
    what: str,
    count: int,
    tasks: Sizes | None,
    first_classes: int | None,
    repeat: float,
    remedy: str = "",
) -> None:
    """Refuses options that divide classes among tasks, where every task has all of them."""
    if tasks not in (None, count):
        raise DualLoRAError(f"{what} make {count} tasks: leave the number of tasks out{remedy}")
    if first_classes is not None or repeat:
        option = "repeat" if first_classes is None else "first_classes"
        raise DualLoRAError(f"{what} make tasks of the same classes: leave {option} out{remedy}")


def _by_domain(stream: str, entry: StreamEntry, collection: Collection, scenario: Scenario | None) -> bool:
    domains = len(collection.parts)
    if scenario == "domain" and domains < 2:
        raise DualLoRAError(
            f"{stream} has no domains of its own: show it in visible ones with --domains, or leave the "
            "scenario domain out"
        )
    if scenario not in (None, "class", "domain"):
        raise DualLoRAError(f'the scenario must be "class" or "domain", not {scenario!r}')
    return domains > 1 and scenario != "class"


def _order_seed(order: str | int) -> int | Literal["alphabetical"]:
    if order == "alphabetical":
        return "alphabetical"
    try:
        return int(order)
    except ValueError as error:
        raise DualLoRAError(f'unknown order {order!r}: it must be a number or "alphabetical"') from error

"""``duallora forget``: takes back what was taught."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from duallora.commands import console
from duallora.errors import DualLoRAError

if TYPE_CHECKING:
    from duallora.teaching.take_back import TakenBack

_NOT_MEASURED = "other classes and relearning: not measured; give labelled images in --check"


def forget(
    model: Path,
    *,
    task: str | None = None,
    class_: str | None = None,
    check: Path | None = None,
    purge: bool = False,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
) -> None:
    """Take a task or a class back from a saved model; undo brings it back, until it is purged.

    Args:
        model: folder of the saved model
        task: name of the task to forget
        class_: name of the class to forget, in all tasks that taught it
        check: labelled images of known, of forgotten and of never taught classes, to measure on
        purge: also delete the previous state, so that nothing can be undone; alone, only that
        device: where to compute
    """
    if task is not None and class_ is not None:
        raise DualLoRAError("give --task or --class, not both; forget them one after the other.")
    if task is None and class_ is None and not purge:
        raise DualLoRAError("say what to forget: --task NAME or --class NAME; `duallora inspect` lists them.")
    if task is None and class_ is None and check is not None:
        raise DualLoRAError("--check measures what forgetting does; give --task or --class with it.")

    from duallora.sharing.place import own_folder
    from duallora.storage import checkpoint

    checkpoint.read_manifest(own_folder(model))
    if task is None and class_ is None:
        with checkpoint.exclusive(model):
            purged = checkpoint.purge(model)
    else:
        _forget(model, task, class_, check, purge, device)
        purged = True
    if purge:
        told = "the previous state is deleted" if purged else "there was no previous state to delete"
        console.line(f"{told}; `duallora undo` has nothing to go back to")


def _forget(
    model: Path, task: str | None, name: str | None, check: Path | None, purge: bool, device: str
) -> None:
    from duallora.streams import FolderDataset, evaluation_folder
    from duallora.teaching.take_back import take_back

    data = None
    if check is not None:
        data = FolderDataset(evaluation_folder(check))
        data.check()
    taken = take_back(model, task=task, name=name, check=data, purge=purge, device=device)
    forgotten = taken.forgotten
    classes = ", ".join(forgotten.classes) or "no class, for other tasks taught them too"
    whole = "".join(f", with the task {each} as a whole" for each in forgotten.tasks)
    console.line(f"{model} has forgotten {classes}{whole}; it knows {taken.known} classes")
    for text in [_NOT_MEASURED] if data is None else [_others(taken), *_relearning(taken)]:
        console.line(text)
    console.line(f"what stays of it: {taken.leaves} (docs/forgetting.md)")
    for each in forgotten.still_named:
        console.line(f"the name of the task {each!r} names what is forgotten; it goes with the task alone")


def _others(taken: TakenBack) -> str:
    from duallora.storage.documents import percent

    if taken.before is None or taken.after is None:
        return "other classes: not measured, --check has no images of them"
    shares = f"{percent(taken.before.accuracy)} % before, {percent(taken.after.accuracy)} % after"
    return f"other classes on the --check images: {shares} ({len(taken.after.answers)} images)"


def _relearning(taken: TakenBack) -> list[str]:
    from duallora.storage.documents import percent

    if taken.relearned is None:
        return ["relearning: not measured, --check has no class of the forgotten ones with two images"]

    def mean(shares: dict[str, float]) -> str:
        share = sum(shares.values()) / len(shares)
        return f"{percent(share)} % of the images ({len(shares)} classes)"

    new = taken.relearned.new
    return [
        "recognised if taught again from what is left:",
        f"  forgotten classes: {mean(taken.relearned.forgotten)}",
        f"  classes never taught: {mean(new) if new else 'not measured, --check has none with two images'}",
    ]

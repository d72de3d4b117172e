"""``duallora push``: a saved model to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from duallora.commands import console
from duallora.errors import DualLoRAError


def push(
    model: Path,
    repository: str,
    *,
    dry_run: bool = False,
    out: Path | None = None,
    private: bool = False,
    license_: str | None = None,
) -> None:
    """Send a saved model to the Hugging Face hub, with a card made from the model.

    Sent are model.json, the weights it names and README.md. The state that undo would restore is not.

    Args:
        model: folder of the saved model
        repository: OWNER/NAME on the hub; created where there is none
        dry_run: write what would be sent to a folder, and send nothing
        out: with --dry-run, the folder to write; where it is not given, NAME-push
        private: of a new repository, show it to its owner alone
        license_: of the model, as the hub names it (apache-2.0, cc-by-4.0, other); goes into the card
    """
    from tempfile import TemporaryDirectory

    from duallora.sharing.hub import require_hub, send
    from duallora.sharing.outgoing import prepare
    from duallora.sharing.place import HubPlace, own_folder

    place, folder = HubPlace.parse(repository), own_folder(model)
    if out is not None and not dry_run:
        raise DualLoRAError("--out goes with --dry-run; without it the model is sent, not written.")
    if dry_run:
        target = out or Path(f"{place.repository.split('/')[1]}-push")
        tell = prepare(folder, target, place, license_)
        console.line(f"{target} holds what would be sent to {place}: {tell}; nothing was sent")
        return
    require_hub()
    with TemporaryDirectory(prefix="duallora-push-") as temporary:
        tell = prepare(folder, Path(temporary) / "model", place, license_)
        commit = send(Path(temporary) / "model", place, private=private, message="Saved model of duallora")
    console.line(f"{place} on the hub is now {folder} (commit {commit[:12]}): {tell}")
    console.line(f"to use it: duallora predict hf:{place}@{commit[:12]} IMAGE...")

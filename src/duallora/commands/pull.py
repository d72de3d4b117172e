"""``duallora pull``: a saved model from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from duallora.commands import console


def pull(repository: str, model: Path) -> None:
    """Fetch a saved model from the Hugging Face hub into a folder of its own, checked as any saved model.

    Fetched are model.json and the weights it names, and nothing else of the repository.

    Args:
        repository: OWNER/NAME on the hub, or OWNER/NAME@REVISION for a branch, a tag or a commit
        model: new folder for the saved model
    """
    from duallora.sharing.hub import fetch
    from duallora.sharing.place import HubPlace, own_folder
    from duallora.storage.copied import copy_current, require_free

    place = HubPlace.parse(repository)
    require_free(own_folder(model))  # before anything is fetched
    source = fetch(place)
    manifest, _ = copy_current(source, model)
    classes = {name for task in manifest["tasks"] for name in task["classes"]}
    console.line(
        f"{model} is {place.repository} at commit {source.name[:12]}: method {manifest['method']}, backbone "
        f"{manifest['backbone']['name']}, {len(manifest['tasks'])} tasks, {len(classes)} classes"
    )

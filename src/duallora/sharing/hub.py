"""The Hugging Face hub: a saved model is fetched from there as it is, and sent there whole.

Only ``model.json`` and the files that it names are ever asked for: nothing else of a repository reaches this
machine, and no code of it is run. Who may read or write is up to huggingface_hub: it finds the token itself,
and neither the token nor the hub's own words, which could hold parts of a request, appear in a message.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from duallora.errors import DualLoRAError
from duallora.sharing.place import HubPlace
from duallora.storage import checkpoint

MANIFEST = "model.json"
_LARGEST_MANIFEST = 64 << 20  # bytes; one of a thousand tasks has a few hundred thousand
_LARGEST_WEIGHTS = 16 << 30  # a ViT of a thousand million parameters takes four


def fetch(place: HubPlace) -> Path:
    """Brings a model into the hub's cache, where what is there already is not sent again.

    Without a connection, what the cache holds of that revision is taken.

    Args:
        place: on the hub.

    Returns:
        The folder in the cache, whose name is the commit; its files are links. Whoever reads the model
        verifies it, as any other.

    Raises:
        DualLoRAError: the repository is not there, may not be read, holds no model, or cannot be reached.
    """
    require_hub()
    folder = _download(place, MANIFEST, place.revision, _LARGEST_MANIFEST).parent
    for name in checkpoint.read_manifest(folder)["files"]:
        if not (folder / name).exists():
            # By the commit: the branch may move between two files.
            _download(place, name, folder.name, _LARGEST_WEIGHTS)
    return folder


def send(folder: Path, place: HubPlace, *, private: bool, message: str) -> str:
    """Makes what is in a folder the content of a model repository, in one commit.

    The repository is created where there is none. Files of an earlier state of the model are deleted by the
    same commit; they stay in the repository's history.

    Args:
        folder: as ``prepare`` of ``sharing/outgoing.py`` writes it, with a card.
        place: where to; without a revision.
        private: of a new repository: whether only its owner sees it.
        message: of the commit.

    Returns:
        The commit.

    Raises:
        DualLoRAError: there is no token, it does not allow this, or the hub cannot be reached.
    """
    require_hub()
    from huggingface_hub import HfApi, get_token

    if place.revision is not None:
        raise DualLoRAError(
            f"a model is sent to a repository, not to a revision; leave @{place.revision} out."
        )
    if get_token() is None:
        raise DualLoRAError(
            "there is no token for the hub; set HF_TOKEN to one that may write, or log in with "
            "`hf auth login`."
        )
    api = HfApi(library_name="duallora", library_version=version("duallora"))
    with _sentences(place, "sent"):
        api.create_repo(place.repository, private=private or None, exist_ok=True)
        sent = api.upload_folder(
            repo_id=place.repository,
            folder_path=folder,
            allow_patterns=[MANIFEST, "README.md", "*.safetensors"],
            delete_patterns=["model-*.safetensors", "backbone-*.safetensors"],
            commit_message=message,
        )
    return str(sent.oid)


def require_hub() -> None:
    """Refuses to go on without the extra.

    Raises:
        DualLoRAError: huggingface_hub is not installed.
    """
    if find_spec("huggingface_hub") is None:
        raise DualLoRAError("huggingface_hub is missing; it comes with `pip install 'duallora[hub]'`.")


def _download(place: HubPlace, file: str, revision: str | None, most: int) -> Path:
    """Brings a file of at most so many bytes into the cache."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    size = None
    with suppress(Exception):  # whatever it is, the download says it, or finds the file in the cache
        size = get_hf_file_metadata(hf_hub_url(place.repository, file, revision=revision)).size
    if size is not None and size > most:
        raise DualLoRAError(
            f"{file} of {place} has {size:,} bytes, far more than a model takes; name another repository."
        )
    with _sentences(place, "fetched"):
        return Path(
            hf_hub_download(
                place.repository,
                file,
                revision=revision,
                library_name="duallora",
                library_version=version("duallora"),
            )
        )


@contextmanager
def _sentences(place: HubPlace, done: str) -> Iterator[None]:
    """Inside, whatever the hub, its cache and the network raise is one sentence."""
    try:
        yield
    except DualLoRAError:
        raise
    except Exception as error:  # of many kinds, and of others by version
        # Without the cause: its text is the hub's own.
        raise DualLoRAError(f"{place} could not be {done}: {_reason(error, place)}.") from None


def _reason(error: Exception, place: HubPlace) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    may_not = "the token (HF_TOKEN, or that of `hf auth login`) does not allow it"
    if isinstance(error, errors.GatedRepoError):
        return "its owner grants access on request; ask on its page, and set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"there is no revision {place.revision} of it; name a branch, a tag or a commit"
    if status in (401, 403):
        return may_not if status == 403 else f"there is no such repository, or {may_not}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is private and {may_not}"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "the hub cannot be reached, and the cache does not hold it; connect, or give a local folder"
    if isinstance(error, errors.EntryNotFoundError):
        return "it is no model that duallora has saved, or part of it is missing; name another repository"
    if status is not None:
        return f"the hub answers with error {status}; try again later"
    if isinstance(error, OSError):
        return f"{error.strerror or type(error).__name__}; check the connection and the disk"
    return f"{type(error).__name__}; check the connection"

"""Where a saved model is: a folder, or a repository on the Hugging Face hub that stands for one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from duallora.backbones.catalog import HUGGING_FACE
from duallora.errors import DualLoRAError

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_REVISION = re.compile(r"\w[\w./-]*", re.ASCII)


@dataclass(frozen=True)
class HubPlace:
    """A model repository on the hub.

    Attributes:
        repository: ``OWNER/NAME``.
        revision: a branch, a tag or a commit; None is what is newest.
    """

    repository: str
    revision: str | None = None

    def __post_init__(self) -> None:
        """Refuses what cannot be one.

        Raises:
            DualLoRAError: naming the part.
        """
        if not _REPOSITORY.fullmatch(self.repository) or ".." in self.repository:
            raise DualLoRAError(
                f"{self.repository!r} names no repository on the hub; give OWNER/NAME, such as jane/birds."
            )
        if self.revision is not None and (not _REVISION.fullmatch(self.revision) or ".." in self.revision):
            raise DualLoRAError(f"{self.revision!r} is no revision; give a branch, a tag or a commit.")

    def __str__(self) -> str:
        return self.repository + ("" if self.revision is None else f"@{self.revision}")

    @classmethod
    def parse(cls, text: str) -> HubPlace:
        """Reads ``OWNER/NAME`` or ``OWNER/NAME@REVISION``; ``hf:`` may stand before it.

        Raises:
            DualLoRAError: it is neither.
        """
        repository, at, revision = text.removeprefix(HUGGING_FACE).partition("@")
        return cls(repository, revision if at else None)


def on_hub(model: str | Path) -> bool:
    """Whether a path names a model on the hub."""
    return str(model).startswith(HUGGING_FACE)


def own_folder(model: str | Path) -> Path:
    """The folder of a model that is to be changed.

    Raises:
        DualLoRAError: it is on the hub, where it is not changed in place.
    """
    if on_hub(model):
        name = str(model).removeprefix(HUGGING_FACE)
        raise DualLoRAError(
            f"{model} is on the hub and cannot be changed there; fetch it with `duallora pull {name} DIR`, "
            "change DIR, and send it with `duallora push DIR OWNER/NAME`."
        )
    return Path(model)

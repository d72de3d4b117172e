"""Who looks at the page: one draft of a lesson and the uploaded copies for every open page."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duallora.app.intake import Draft
from duallora.app.uploads import Found, Uploads, files_of, named_folder
from duallora.errors import DualLoRAError


@dataclass
class Visitor:
    """One open page.

    Attributes:
        draft: the classes to be taught next.
        shown: the copy of the picture in the view Try; empty or one.
        waiting: copies that were given and are not used up: they are being looked at, or what was wanted of
            them failed, and their field still holds them.
        unknown_below: the model's own value when the slider for unknown images was last set to it; None where
            the slider is as the page begins.
    """

    draft: Draft = field(default_factory=Draft)
    shown: set[Path] = field(default_factory=set)
    waiting: set[Path] = field(default_factory=set)
    unknown_below: float | None = None


class Visitors:
    """All open pages, by the name that the browser gives itself.

    Args:
        uploads: the copies that they own.
    """

    def __init__(self, uploads: Uploads) -> None:
        self.uploads = uploads
        self._lock = threading.Lock()
        self._known: dict[str, Visitor] = {}
        uploads.owned_by(self._needed)

    def of(self, name: str | None) -> Visitor:
        """The page of that name."""
        with self._lock:
            return self._known.setdefault(name or "", Visitor())

    def leave(self, name: str | None) -> None:
        """The page was closed: its copies are deleted, but for those that somebody else needs."""
        with self._lock:
            gone = self._known.pop(name or "", None)
        if gone is not None:
            self.uploads.discard([*gone.draft.clear(), *gone.shown, *gone.waiting])

    @contextmanager
    def given(
        self, visitor: Visitor, payload: Sequence[Mapping[str, Any]] | None, folder: str
    ) -> Iterator[list[list[Found]]]:
        """Inside: what was dropped or named, loose files together, every zip and the folder for itself.

        Afterwards the copies are deleted that the draft did not take. Where the body fails, the uploaded ones
        wait for another try, and what was unpacked is deleted.

        Args:
            visitor: whose it is.
            payload: uploaded files, each with ``path`` and ``orig_name``, its name or its place in a folder.
            folder: a path on this computer; empty for none.

        Raises:
            DualLoRAError: there is none, or it cannot be used.
        """
        sent, unpacked = set[Path](), set[Path]()
        try:
            yield self._sources(visitor, payload or [], folder, sent, unpacked)
        except BaseException:
            self._give_up(visitor, unpacked)
            raise
        self._give_up(visitor, sent | unpacked)

    def show(self, visitor: Visitor, payload: Mapping[str, Any] | None) -> Path | None:
        """Takes the picture of the view Try, and gives the one before up."""
        path = None if payload is None else self._uploaded(payload, visitor.shown)
        before = {each for each in visitor.shown if each != path}
        visitor.shown -= before
        self.uploads.discard(before)
        return path

    def _sources(
        self,
        visitor: Visitor,
        payload: Sequence[Mapping[str, Any]],
        folder: str,
        sent: set[Path],
        unpacked: set[Path],
    ) -> list[list[Found]]:
        loose: list[Found] = []
        chosen: list[Found] = []  # of a folder, which are known by their place in it
        sources: list[list[Found]] = []
        for each in payload:
            path = self._uploaded(each, visitor.waiting)
            sent.add(path)
            name = str(each.get("orig_name") or path.name)
            if name.lower().endswith(".zip"):
                files = self.uploads.unpack(path, name)
                unpacked.update(found.path for found in files)
                visitor.waiting.update(unpacked)
                sources.append(files)
            else:
                parts = tuple(part for part in name.split("/") if part)
                (chosen if len(parts) > 1 else loose).append(Found(path, parts or (path.name,)))
        if folder.strip():
            sources.append(files_of(named_folder(folder)))
        return [files for files in (loose, chosen) if files] + sources

    def _uploaded(self, each: Mapping[str, Any], owned: set[Path]) -> Path:
        path = Path(str(each.get("path", "")))
        if not self.uploads.take(path, owned):
            raise DualLoRAError("the uploaded file is not there any more; choose it again.")
        return path

    def _give_up(self, visitor: Visitor, paths: set[Path]) -> None:
        visitor.waiting -= paths
        self.uploads.discard(paths)

    def _needed(self) -> Iterator[Path]:
        with self._lock:
            known = list(self._known.values())
        for visitor in known:
            yield from visitor.draft.paths
            yield from set(visitor.shown)
            # What waits for another try that never comes is not kept for ever.
            yield from (path for path in set(visitor.waiting) if not self.uploads.is_old(path))

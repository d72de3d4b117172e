"""What a measurement has found before it is whole: in a file, so that another start goes on from there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from duallora.errors import DualLoRAError
from duallora.runtime.progress import Progress
from duallora.storage.atomic import write_atomic
from duallora.storage.documents import finite

FILE = "bench-unfinished.json"


class Unfinished:
    """The parts of a measurement that are there.

    Args:
        folder: of the measurement; it is made with the first part.
        plan: what is measured, ready for JSON.
        progress: where each part is said, with its seconds.

    Raises:
        DualLoRAError: the folder holds parts of another measurement, or a file that cannot be read.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any], progress: Progress) -> None:
        self._file, self._progress = folder / FILE, progress
        self._plan = json.loads(json.dumps(plan))
        self._parts: dict[str, Any] = {}
        if not self._file.exists():
            return
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            kept, self._parts = content["plan"], dict(content["parts"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DualLoRAError(f"{self._file} cannot be read; delete it, or name another folder.") from error
        if kept != self._plan:
            raise DualLoRAError(
                f"{folder} holds parts of another measurement; delete {FILE} there, or name another folder."
            )
        progress.line(f"{len(self._parts)} parts are there already")

    def measured(self, part: str, measure: Callable[[], Any]) -> Any:
        """A part: as it was measured before, or measured now and written.

        Args:
            part: what it is, in words.
            measure: gives what can be written as JSON.
        """
        if part not in self._parts:
            self._progress.line(f"{part}: begins")
            start = time.perf_counter()
            found = measure()
            self._parts[part] = json.loads(json.dumps(finite(found)))
            self._file.parent.mkdir(parents=True, exist_ok=True)
            content = {"plan": self._plan, "parts": self._parts}
            write_atomic(self._file, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
            self._progress.line(f"{part}: {time.perf_counter() - start:.1f} s")
        return self._parts[part]

    def remove(self) -> None:
        """Deletes the file: the measurement is whole."""
        self._file.unlink(missing_ok=True)

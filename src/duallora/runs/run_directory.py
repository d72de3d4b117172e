"""The folder of one run: what was asked, how far it has come, and what it left behind.

``run.json`` is written first and says which run the folder belongs to; ``results.json`` is written last and
says that it is finished. Between the two, ``progress.json`` holds the hits of every finished task, and
``progress-<t>.safetensors`` the final features of task t's test images right after it was learned. Every file
is replaced whole, so that an interruption at any point leaves a folder that can be resumed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from duallora.errors import DualLoRAError
from duallora.runs.metrics import Hits
from duallora.runs.results import Row
from duallora.storage.checkpoint import exclusive, remove_leftovers, write_atomic
from duallora.storage.documents import finite
from duallora.storage.regular import read_regular

_RUN, _PROGRESS, _RESULTS, _LOG = "run.json", "progress.json", "results.json", "log.jsonl"


class RunDirectory:
    """Reads and writes the files of a run.

    Args:
        path: The folder; need not exist yet.
        identity: What was asked, ready for JSON: a run is resumed only under the same identity.

    Attributes:
        model: Where the run's model is saved.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.model = path / "model"
        self._identity = json.loads(json.dumps(identity))

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Holds the folder for this process; creates it, or takes up the unfinished run in it.

        Raises:
            DualLoRAError: The folder holds something else, another run or a finished run, or is in use.
                Nothing in it has been touched then.
        """
        self.admit()  # before the lock, which creates a file
        with exclusive(self.path):
            self.admit()
            remove_leftovers(self.path)
            if not (self.path / _RUN).exists():
                write_atomic(self.path / _RUN, _json(self._identity))
            yield

    def admit(self) -> None:
        """Refuses a folder that is not for this run, and touches nothing.

        Raises:
            DualLoRAError: The folder holds something else, another run or a finished run.
        """
        require_unfinished(self.path)
        stored = _read(self.path / _RUN)
        if stored is not None and stored != self._identity:
            raise DualLoRAError(
                f"{self.path} belongs to another run ({difference(stored, self._identity)}); name another "
                "folder, or repeat the first command to resume it."
            )

    def results(self) -> dict[str, Any] | None:
        """What the finished run wrote, or None."""
        return _read(self.path / _RESULTS)

    def has_model(self) -> bool:
        """Whether a first task was learned and saved."""
        return (self.model / "model.json").exists()

    def rows(self) -> list[Row]:
        """Evaluations of the tasks that are finished, as far as their features are there too."""
        stored = _read(self.path / _PROGRESS)
        rows: list[Row] = []
        try:
            for row in [] if stored is None else stored["rows"]:
                if not self._features(len(rows)).exists():
                    break
                rows.append(
                    {
                        readout: [None if hits is None else Hits(**hits) for hits in entries]
                        for readout, entries in row.items()
                    }
                )
        except (KeyError, TypeError, AttributeError) as error:
            raise _damaged(self.path / _PROGRESS) from error
        return rows

    def finish_task(self, rows: Sequence[Row], features: Tensor) -> None:
        """Finishes a task: records its row and the final features (n, d) of its test images."""
        data = safetensors.torch.save({"features": features.contiguous()})
        write_atomic(self._features(len(rows) - 1), data)
        plain = [
            {
                readout: [None if hits is None else asdict(hits) for hits in entries]
                for readout, entries in row.items()
            }
            for row in rows
        ]
        write_atomic(self.path / _PROGRESS, _json({"rows": plain}))

    def features(self, task: int) -> Tensor:
        """Final features (n, d) of a task's test images right after it was learned."""
        path = self._features(task)
        try:
            return safetensors.torch.load(read_regular(path))["features"]
        except (OSError, SafetensorError, KeyError) as error:
            raise _damaged(path) from error

    def write(self, name: str, data: bytes) -> None:
        """Writes a file of the finished run."""
        write_atomic(self.path / name, data)

    def log(self, event: str, **fields: Any) -> None:
        """Adds a line to ``log.jsonl``."""
        path = self.path / _LOG
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **fields})
        # Rewritten whole, so that a line is never torn; a run has a few lines a task.
        write_atomic(path, (read_regular(path) if path.exists() else b"") + line.encode() + b"\n")

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Writes ``results.json``, which marks the run as finished, and removes what only a resume needs.

        Returns:
            What was written: the results with null for numbers that are not finite.
        """
        written: dict[str, Any] = finite(results)
        write_atomic(self.path / _RESULTS, _json(written))
        self.clean()
        return written

    def clean(self) -> None:
        """Removes the progress files of a run whose results are written."""
        # The hits go first: without them the features mean nothing, and the results are written already.
        try:
            for path in _progress_files(self.path):
                path.unlink(missing_ok=True)
        except OSError as error:
            problem = error.strerror or error
            raise DualLoRAError(
                f"{self.path} could not be tidied up: {problem}; the results are written, repeat the command."
            ) from error

    def _features(self, task: int) -> Path:
        return self.path / f"progress-{task}.safetensors"


def require_unfinished(path: Path) -> None:
    """Refuses, whatever is asked, a folder that a run can neither begin in nor be resumed in.

    Raises:
        DualLoRAError: It is a file, or holds a finished run or something that is no run.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise DualLoRAError(f"{path} is a file; name a folder for the run.")
    if not (path / _RUN).exists():
        # A hidden lock or temporary file may be all that an early interruption left.
        if any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise DualLoRAError(f"{path} holds files that are not from a run; name a new or an empty folder.")
    elif (path / _RESULTS).exists() and not _progress_files(path):
        raise DualLoRAError(f"{path} holds a finished run; name another folder to run again.")


def _progress_files(path: Path) -> list[Path]:
    return sorted([*path.glob(_PROGRESS), *path.glob("progress-*.safetensors")])


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(read_regular(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged(path) from error
    if not isinstance(content, dict):
        raise _damaged(path)
    return content


def _damaged(path: Path) -> DualLoRAError:
    return DualLoRAError(f"{path} cannot be read; the run cannot be resumed: name another folder.")


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def difference(stored: Any, asked: Any, name: str = "") -> str:
    """The first key in which two identities differ, with both values."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        for key in [*asked, *stored]:
            if key not in stored or key not in asked or stored[key] != asked[key]:
                return difference(stored.get(key), asked.get(key), f"{name}.{key}" if name else key)
    return f"{name}: {_short(stored)} there, {_short(asked)} asked for"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."

"""Where the figures of a training go while it goes on: a CSV file, TensorBoard, or Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from duallora.errors import DualLoRAError

Kind = Literal["none", "csv", "tensorboard", "wandb"]

_FLUSH = 20  # steps after which a CSV file is written again


class Logger(Protocol):
    """What of Lightning Fabric's loggers is used."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Writes figures of a step."""

    def finalize(self, status: str) -> None:
        """Writes what is left."""


class Recorder:
    """Gives figures to a logger, those of one step together.

    The logger is made with the first figure: whoever is refused before leaves no folder.

    Args:
        make: makes the logger.
    """

    def __init__(self, make: Callable[[], Logger]) -> None:
        self._make = make
        self._logger: Logger | None = None
        self._step, self._waiting = -1, dict[str, float]()

    def take(self, figures: Mapping[str, float], step: int) -> None:
        """Takes figures of a step, which is never below the one before."""
        if step != self._step:
            self._pass_on()
        self._step = step
        self._waiting |= figures

    def close(self, status: str) -> None:
        """Passes on what is left; ``status`` is ``success`` or ``failed``."""
        self._pass_on()
        if self._logger is not None:
            self._logger.finalize(status)

    def _pass_on(self) -> None:
        if not self._waiting:
            return
        if self._logger is None:
            self._logger = self._make()
        self._logger.log_metrics(self._waiting, self._step)
        self._waiting = {}


@dataclass(frozen=True)
class Logging:
    """Where the figures of a training go.

    Attributes:
        logger: also write loss, rates, accuracies, gate weights and norms while it trains: csv (metrics.csv),
            tensorboard or wandb (extras of the same name); the results do not depend on it
        log_dir: folder for what the logger writes, a new version_N of it every time; where it is not given,
            logs/ in the run's folder, and for learn MODEL-logs
    """

    logger: Kind = "none"
    log_dir: Path | None = None

    def of(self, run: str) -> Logging:
        """The same for one of several runs, which gets a folder of its name in ``log_dir``."""
        return replace(self, log_dir=self.log_dir and self.log_dir / run)

    def check(self) -> None:
        """Refuses what cannot be had, before anything takes long.

        Raises:
            DualLoRAError: the logger's extra is not installed, or the folder is a file.
        """
        needed = {"tensorboard": "tensorboard", "wandb": "wandb"}.get(self.logger)
        if needed is not None and find_spec(needed) is None:
            raise DualLoRAError(f"{needed} is missing; it comes with `pip install 'duallora[{needed}]'`.")
        if self.log_dir is not None and self.logger == "none":
            raise DualLoRAError("--log-dir goes with --logger; name one of csv, tensorboard and wandb.")
        if self.log_dir is not None and self.log_dir.exists() and not self.log_dir.is_dir():
            raise DualLoRAError(f"--log-dir {self.log_dir} is a file; name a folder.")

    @contextmanager
    def recording(self, default: Path, about: Mapping[str, Any]) -> Iterator[Recorder | None]:
        """Inside, figures given to the recorder are logged; None where nothing is.

        Args:
            default: the folder, where none was asked for.
            about: what was asked of the training, for a logger that shows it.

        Raises:
            DualLoRAError: see :meth:`check`.
        """
        self.check()
        if self.logger == "none":
            yield None
            return
        folder = self.log_dir or default
        recorder = Recorder(lambda: _make(self.logger, folder, about))
        status = "failed"
        try:
            yield recorder
            status = "success"
        finally:
            recorder.close(status)


def _make(kind: Kind, folder: Path, about: Mapping[str, Any]) -> Logger:
    if kind == "wandb":
        return _Wandb(folder, about)
    # Lightning Fabric is slow to import, and needed only here and in training.
    from lightning_fabric.loggers.csv_logs import CSVLogger
    from lightning_fabric.loggers.tensorboard import TensorBoardLogger

    made: Any  # their annotations name wider figures
    if kind == "csv":
        made = CSVLogger(folder, name="", flush_logs_every_n_steps=_FLUSH)
    else:
        made = TensorBoardLogger(folder, name="")
    logger: Logger = made
    return logger


class _Wandb:
    """Weights & Biases by its own package: a run, whose settings come from its own environment variables."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(project="duallora", dir=str(folder), config=dict(about))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """See :class:`Logger`."""
        self._run.log(metrics, step=step)

    def finalize(self, status: str) -> None:
        """See :class:`Logger`."""
        self._run.finish(exit_code=int(status != "success"))

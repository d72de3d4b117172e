"""YAML files for ``--config``: taken from the command line, read and checked before any parser exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jsonargparse import get_loader

from duallora.errors import DualLoRAError
from duallora.storage.regular import read_text

_MOST_LETTERS = 1_000_000
_MOST_VALUES = 10_000


def take_config_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into its other words and the values of ``--config``.

    Raises:
        DualLoRAError: A ``--config`` at the end, without a value.
    """
    words: list[str] = []
    files: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word == "--config":
            file = next(rest, None)
            if file is None:
                raise DualLoRAError(
                    "--config needs a value: the path of a YAML file or the name of a shipped one "
                    f"({', '.join(shipped_configs())})."
                )
            files.append(file)
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            words.append(word)
    return words, files


def shipped_configs() -> list[str]:
    """Names of the configurations that come with the package; ``methods/NAME`` are a method's own values."""
    folder = resources.files("duallora") / "configs"
    found = {f"{inner}{entry.name}" for inner in ("", "methods/") for entry in (folder / inner).iterdir()}
    return sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))


def read_config(file: str) -> dict[str, Any]:
    """Reads one YAML file; a ``method: NAME`` in it is spelled out as ``method: {name: NAME}``.

    Args:
        file: A path, or the name of a shipped configuration where no such path exists.

    Raises:
        DualLoRAError: No such file, not YAML, or not a mapping.
    """
    try:
        text = _read_text(file)
        if len(text) > _MOST_LETTERS:
            raise DualLoRAError(f"{file} is larger than a configuration can be; give a YAML file of options.")
        config = get_loader("yaml")(text)
    except DualLoRAError:
        raise
    except Exception as error:  # the YAML library's own class, which jsonargparse does not export
        detail = " ".join(str(error).split())
        raise DualLoRAError(f"{file} is not valid YAML: {detail}") from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise DualLoRAError(f"{file} holds no configuration: write one 'option: value' a line.")
    if _is_too_much(config):
        raise DualLoRAError(f"{file} has more than {_MOST_VALUES:,} values: an option takes a line.")
    if isinstance(config.get("method"), str):
        config["method"] = {"name": config["method"]}
    return config


def _is_too_much(config: Any) -> bool:
    """Whether there are more values than any command takes; an alias counts as often as it is used."""
    left, waiting = _MOST_VALUES, [config]
    while waiting:
        value = waiting.pop()
        left -= 1
        if left < 0:
            return True
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
    return False


def _read_text(file: str) -> str:
    path = Path(file)
    shipped = file.removesuffix(".yaml")
    if not path.exists() and shipped in shipped_configs():
        return (resources.files("duallora") / "configs" / f"{shipped}.yaml").read_text(encoding="utf-8")
    try:
        return read_text(path)
    except FileNotFoundError as error:
        raise DualLoRAError(
            f"there is no file {file}, and no shipped configuration of that name (there are "
            f"{', '.join(shipped_configs())})."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DualLoRAError(f"{file} cannot be read as a text file; give a YAML file.") from error
